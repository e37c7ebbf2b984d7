"""The settings that several daemons share mean the same under each prefix."""

from pathlib import Path

import pytest

from substrate_seam.events import ExchangeEnded, InvocationEnded
from substrate_service.address import TcpAddress
from substrate_service.logs import STEPS
from substrate_service.settings import EnvironmentReader, SettingsInvalid
from substrate_service.shared_settings import TlsFiles, open_doors, read_front, read_node, read_quiet, read_tls


def front(**environment):
    reader = EnvironmentReader({f"X_{name}": value for name, value in environment.items()}, prefix="X_")
    settings = read_front(reader, "X_")
    reader.finish()
    return settings


def problems(read, **environment):
    with pytest.raises(SettingsInvalid) as invalid:
        read(**environment)
    return str(invalid.value)


def test_without_configuration_everything_is_on_this_machine_and_bounded():
    """Loopback, caps and budgets are there without anybody asking for them."""
    settings = front()
    assert settings.listen == TcpAddress("127.0.0.1", 8080)
    assert settings.admin_listen == TcpAddress("127.0.0.1", 8081)
    assert (settings.caller_limit, settings.body_limit_bytes) == (64, 8 * 2**20)
    assert (settings.body_budget_bytes, settings.body_within_s, settings.drain_within_s) == (256 * 2**20, 30.0, None)


def test_an_open_admin_listener_needs_a_token():
    """Operators' pages are for this machine, or for whoever has the token."""
    assert "X_ADMIN_TOKEN_FILE" in problems(front, ADMIN_LISTEN_ADDR=":8081")
    assert front(ADMIN_LISTEN_ADDR=":8081", ADMIN_TOKEN_FILE="/t").admin_token_file == Path("/t")


def test_callers_that_only_kubernetes_could_review_are_refused():
    """Better no daemon than one that lets in whom it should have asked about."""
    assert "X_TOKENS_FILE" in problems(front, ALLOWED_CALLERS="system:serviceaccount:prod:web")


def test_the_log_has_a_line_for_each_call_unless_it_is_to_have_every_step():
    """A node without a front tells of its exchanges."""

    def quiet(environment, **call):
        return read_quiet(EnvironmentReader(environment, prefix="X_"), "X_", **call)

    assert quiet({}) == STEPS - {InvocationEnded}
    assert quiet({}, call=ExchangeEnded) == STEPS - {ExchangeEnded}
    assert quiet({"X_LOG_LEVEL": "debug"}) == frozenset()


def test_all_problems_are_told_at_once():
    """One start, one list."""
    told = problems(front, LISTEN_ADDR="nowhere", BODY_LIMIT="much", BODY_TIMEOUT="30", CALER_LIMIT="1")
    for variable in ("X_LISTEN_ADDR", "X_BODY_LIMIT", "X_BODY_TIMEOUT", "X_CALER_LIMIT"):
        assert variable in told
    assert "X_CALLER_LIMIT" in told  # what was meant


def test_a_node_is_called_as_the_machine_unless_somebody_names_it():
    """`NODE_NAME` of the downward API comes before the host's name, the daemon's own setting before both."""

    def node_id(**environment):
        return read_node(EnvironmentReader(environment, prefix="X_"), "X_", environment).node_id

    assert node_id(X_NODE="a", NODE_NAME="b") == "a"
    assert node_id(NODE_NAME="b") == "b"
    assert node_id() != ""


def test_a_half_configured_certificate_is_refused_by_the_missing_half():
    """All three files or none."""

    def tls(**environment):
        reader = EnvironmentReader({f"X_TLS_{name}_FILE": value for name, value in environment.items()}, prefix="X_")
        files = read_tls(reader, "X_")
        reader.finish()
        return files

    assert tls() is None
    assert tls(CERT="/c", KEY="/k", CA="/a") == TlsFiles(cert=Path("/c"), key=Path("/k"), ca=Path("/a"))
    told = problems(tls, CERT="/c")
    assert "X_TLS_KEY_FILE" in told
    assert "X_TLS_CA_FILE" in told


def test_what_stands_open_is_said_with_the_setting_that_closes_it(tmp_path):
    """And nothing where callers and operators have tokens."""
    closed = {"X_TOKENS_FILE": str(tmp_path / "t"), "X_ADMIN_TOKEN_FILE": str(tmp_path / "a")}

    def doors(environment):
        return open_doors(read_front(EnvironmentReader(environment, prefix="X_"), "X_"), "X_")

    assert [door.rpartition(" ")[2] for door in doors({})] == ["X_TOKENS_FILE.", "X_ADMIN_TOKEN_FILE."]
    assert doors(closed) == ()
