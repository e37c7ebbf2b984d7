"""Callers and their tokens."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from substrate_cluster.auth import Anonymous, StaticTokens, TokensRefused
from substrate_seam.errors import Ran, Reason, SubstrateError


def line(name: str, token: str) -> str:
    return f"{name} sha256:{sha256(token.encode()).hexdigest()}\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokens"


async def test_a_caller_is_whoever_the_tokens_hash_stands_beside(path):
    path.write_text("# people\n\n" + line("alice", "a-token") + "  " + line("system:serviceaccount:ci:bot", "b-token"))
    tokens = StaticTokens(path)
    assert await tokens.authenticate([b"Bearer a-token"]) == "alice"
    assert await tokens.authenticate([b"bEaReR \t b-token  "]) == "system:serviceaccount:ci:bot"


async def test_a_caller_may_have_two_tokens_while_it_changes_them(path):
    path.write_text(line("alice", "old") + line("alice", "new"))
    tokens = StaticTokens(path)
    assert [await tokens.authenticate([b"Bearer " + token]) for token in (b"old", b"new")] == ["alice", "alice"]


@pytest.mark.parametrize(
    "authorization",
    [[], [b""], [b"Bearer"], [b"Bearer "], [b"Basic a-token"], [b"Bearer a b"], [b"Bearer a", b"Bearer a"],
     [b"Bearera-token"], [b"Bearer \xff"]],
)  # fmt: skip
async def test_a_missing_or_malformed_header_is_told_apart_from_a_wrong_token(path, authorization):
    path.write_text(line("alice", "a-token"))
    with pytest.raises(SubstrateError, match="missing or malformed") as refused:
        await StaticTokens(path).authenticate(authorization)
    assert (refused.value.reason, refused.value.ran) == (Reason.UNAUTHENTICATED, Ran.NO)


@pytest.mark.parametrize("text", ["", line("alice", "a-token")])
async def test_a_wrong_token_is_refused_without_detail(path, text):
    path.write_text(text)
    for token in (b"A-token", b"x", sha256(b"a-token").hexdigest().encode()):
        with pytest.raises(SubstrateError, match=r"^unauthorized$") as refused:
            await StaticTokens(path).authenticate([b"Bearer " + token])
        assert refused.value.hint == ""


async def test_a_token_that_shares_the_start_of_a_hash_is_not_that_token(path):
    """The start of a hash only finds the candidate; all of it decides."""
    digest = sha256(b"guess").hexdigest()
    path.write_text(f"alice sha256:{digest[:16]}{'0' * 48}\n")
    with pytest.raises(SubstrateError, match="unauthorized"):
        await StaticTokens(path).authenticate([b"Bearer guess"])


def test_every_mistake_of_a_file_is_told_at_once_with_its_line(path):
    path.write_text(
        "alice\n# fine\n"
        + line("bob", "t")
        + "carol sha256:beef\n"
        + line("dave", "t")
        + line("anonymous", "u")
        + "ä x\n"
    )
    with pytest.raises(TokensRefused) as refused:
        StaticTokens(path)
    assert [problem.split(": ")[1] for problem in refused.value.problems] == [f"line {n}" for n in (1, 4, 5, 6, 7)]
    assert all(str(path) in problem for problem in refused.value.problems)
    assert "line 3" in refused.value.problems[2]


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_named(path, content):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TokensRefused, match="tokens"):
        StaticTokens(path)


async def test_a_reload_takes_effect_whole_or_not_at_all(path):
    path.write_text(line("alice", "a"))
    tokens = StaticTokens(path)
    path.write_text(line("bob", "b") + "broken\n")
    with pytest.raises(TokensRefused):
        tokens.reload()
    assert await tokens.authenticate([b"Bearer a"]) == "alice"
    path.write_text(line("bob", "b"))
    tokens.reload()
    assert await tokens.authenticate([b"Bearer b"]) == "bob"
    with pytest.raises(SubstrateError):
        await tokens.authenticate([b"Bearer a"])


async def test_where_nobody_is_asked_everybody_is_anonymous():
    assert await Anonymous().authenticate([b"Basic whatever"]) == "anonymous"


@given(st.text(max_size=200))
def test_any_text_is_a_token_file_or_a_list_of_lines(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "tokens"
    path.write_text(text, encoding="utf-8", errors="replace")
    problems = ()
    try:
        StaticTokens(path)
    except TokensRefused as refused:
        problems = refused.problems
    assert all(": line " in problem for problem in problems)
