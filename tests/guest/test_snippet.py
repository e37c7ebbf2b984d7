"""What the `python` workload accepts."""

import json
from base64 import b64encode

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from substrate_guest.problems import BadInput
from substrate_guest.workloads.snippet import (
    DEPTH_MAX,
    FILE_BYTES_MAX,
    FILES_BYTES_MAX,
    FILES_MAX,
    Snippet,
    parse_snippet,
    path_problem,
)


def b64(content):
    return b64encode(content).decode()


def parsed(**members):
    return parse_snippet(json.dumps(members).encode())


def problems(**members):
    with pytest.raises(BadInput) as refused:
        parsed(**members)
    return {problem.path: (problem.found, problem.accepted) for problem in refused.value.problems}


def test_code_alone_is_a_snippet():
    assert parsed(code="print(1)") == Snippet("print(1)", {}, 20.0)
    assert parsed(code="", files=None, timeout_seconds=None) == Snippet("", {}, 20.0)


def test_files_and_a_timeout_may_come_with_it():
    files = [{"path": "a/b.txt", "content_b64": b64(b"\x00\xff")}, {"path": "empty", "content_b64": ""}]
    assert parsed(code="x", files=files, timeout_seconds=0.5) == Snippet(
        "x", {"a/b.txt": b"\x00\xff", "empty": b""}, 0.5
    )


def test_every_problem_is_said_at_once_with_its_place():
    found = problems(
        code=7,
        timeout_seconds=60,
        kode="x",
        files=[
            "a",
            {"path": "/etc/passwd", "content_b64": "!"},
            {"path": "ok", "content_b64": "", "mode": 7},
            {"path": "ok", "content_b64": ""},
            {"content_b64": 1},
        ],
    )
    assert found["code"] == ("7", "Python source")
    assert found["timeout_seconds"] == ("60", "a number of seconds above 0, at most 25 (default 20)")
    assert found["'kode'"] == ("an unknown member", "code, files, timeout_seconds")
    assert found["files[0]"][0] == "'a'"
    assert found["files[1].path"][0] == "'/etc/passwd' (it is absolute)"
    assert found["files[1].content_b64"][0].startswith("'!'")
    assert found["files[2].'mode'"][0] == "an unknown member"
    assert found["files[3].path"][0] == "'ok' again"
    assert found["files[4].path"][0] == "nothing"
    assert found["files[4].content_b64"][0] == "1"
    assert len(found) == 10


@pytest.mark.parametrize("timeout", [0, -1, 25.1, True, "5", [], 10**400])
def test_a_timeout_is_a_positive_number_of_seconds_up_to_the_bound(timeout):
    assert list(problems(code="", timeout_seconds=timeout)) == ["timeout_seconds"]


@pytest.mark.parametrize("code", ["\ud800", None, ["print(1)"]])
def test_code_is_unicode_text(code):
    assert list(problems(code=code)) == ["code"]


@pytest.mark.parametrize(
    "path",
    ["", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/.", "a\0b", "a" * 256, "é" * 128, "\ud800"]
    + ["/".join("a" * (DEPTH_MAX + 1)), "/".join(["a" * 200] * 6)],
)
def test_a_path_that_leads_elsewhere_is_refused(path):
    assert list(problems(code="", files=[{"path": path, "content_b64": ""}])) == ["files[0].path"]


@pytest.mark.parametrize("path", ["a", "a/b", "...", "..a", "a b", "é", "-rf", "a\nb", ".hidden", "~", "C:\\x"])
def test_any_other_relative_path_is_accepted(path):
    assert path_problem(path) is None
    assert parsed(code="", files=[{"path": path, "content_b64": ""}]).files == {path: b""}


def test_a_file_cannot_be_a_directory_too():
    files = [{"path": path, "content_b64": ""} for path in ("a/b/c", "a/b", "x")]
    assert problems(code="", files=files) == {
        "files": ("'a/b' and 'a/b/c'", "no file that is also a directory"),
    }


def test_files_are_bounded_one_by_one_together_and_in_number():
    def of(*sizes):
        return [{"path": str(index), "content_b64": b64(bytes(size))} for index, size in enumerate(sizes)]

    assert len(parsed(code="", files=of(FILE_BYTES_MAX, FILE_BYTES_MAX)).files) == 2
    assert list(problems(code="", files=of(FILE_BYTES_MAX + 1))) == ["files[0].content_b64"]
    third = FILES_BYTES_MAX - 2 * FILE_BYTES_MAX + 1
    assert list(problems(code="", files=of(FILE_BYTES_MAX, FILE_BYTES_MAX, third))) == ["files"]
    assert list(problems(code="", files=of(*[0] * (FILES_MAX + 1)))) == ["files"]


@pytest.mark.parametrize("content", ["A", "AA=A", "A A A A", "AAAA\n", "A===", "é", "AA"])
def test_base64_is_strict(content):
    assert list(problems(code="", files=[{"path": "a", "content_b64": content}])) == ["files[0].content_b64"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FILE = JSON | st.fixed_dictionaries(
    {},
    optional={
        "path": JSON | st.text("ab/.\0", max_size=8),
        "content_b64": JSON | st.binary(max_size=9).map(b64),
        "mode": JSON,
    },
)
INPUT = st.fixed_dictionaries(
    {},
    optional={
        "code": JSON | st.text(),
        "files": JSON | st.lists(FILE, max_size=4),
        "timeout_seconds": JSON | st.integers(1, 30),
        "x": JSON,
    },
)


def outcome(body):
    try:
        return parse_snippet(body)
    except BadInput as refused:
        return refused


@given(document=JSON | INPUT)
@example(document={"code": "", "files": [{"path": "a", "content_b64": ""}, {"path": "a/b", "content_b64": ""}]})
def test_any_json_is_a_safe_snippet_or_a_list_of_problems(document):
    """What is accepted can be written below a directory as it is; what is not says why."""
    snippet = outcome(json.dumps(document).encode())
    if isinstance(snippet, BadInput):
        assert all(problem.path and problem.found and problem.accepted for problem in snippet.problems)
        assert snippet.as_json()["problems"]
        return
    assert snippet.code == document["code"]
    assert 0 < snippet.timeout_s <= 25
    assert all(path_problem(path) is None for path in snippet.files)
    assert len(snippet.files) == len(document.get("files") or [])


@given(body=st.binary(max_size=100))
def test_any_bytes_are_a_snippet_or_a_list_of_problems(body):
    refused = outcome(body)
    assert isinstance(refused, Snippet) or refused.problems
