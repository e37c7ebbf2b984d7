"""Settings are read once, and every problem is told at once, with its variable, what was found and what is accepted."""

from pathlib import Path

import pytest

from substrate_service.address import TcpAddress, UnixAddress
from substrate_service.settings import EnvironmentReader, SettingsInvalid


def reader(**environment):
    return EnvironmentReader(environment, prefix="FC_")


GETTERS = {
    "text": lambda r, name, default: r.text(name, default),
    "secret": lambda r, name, default: r.secret(name, default),
    "integer": lambda r, name, default: r.integer(name, default, at_least=0, at_most=1000),
    "duration": lambda r, name, default: r.duration(name, default),
    "duration or 0": lambda r, name, default: r.duration(name, default, zero=True),
    "size": lambda r, name, default: r.size(name, default),
    "address": lambda r, name, default: r.address(name, default),
    "path": lambda r, name, default: r.path(name, default),
    "boolean": lambda r, name, default: r.boolean(name, default=default),
    "choice": lambda r, name, default: r.choice(name, default, among=("auto", "on", "off")),
}

GOOD = [
    ("text", " as it is ", " as it is "),
    ("secret", "s3cret", "s3cret"),
    ("integer", "0", 0),
    ("integer", "+1000", 1000),
    ("duration", "1m30s", 90.0),
    ("duration", "300ms", 0.3),
    ("duration or 0", "0", 0.0),
    ("size", "8 MiB", 8 * 2**20),
    ("size", "64KiB", 65536),
    ("size", "17", 17),
    ("address", ":8080", TcpAddress("", 8080)),
    ("address", "127.0.0.1:0", TcpAddress("127.0.0.1", 0)),
    ("address", "[::1]:80", TcpAddress("::1", 80)),
    ("address", "localhost:80", TcpAddress("localhost", 80)),
    ("address", "unix:/run/x.sock", UnixAddress("/run/x.sock")),
    ("path", "/var/lib/x", Path("/var/lib/x")),
    ("boolean", "TRUE", True),
    ("boolean", "off", False),
    ("choice", "auto", "auto"),
]

BAD = [
    ("integer", "12x", "a whole number from 0 to 1000"),
    ("integer", "1e3", "a whole number"),
    ("integer", "-1", "a whole number"),
    ("integer", "1001", "a whole number"),
    ("integer", "٣", "a whole number"),
    ("integer", "9" * 5000, "a whole number"),
    ("duration", "90", "90s"),
    ("duration", "-1s", "more than 0"),
    ("duration", "0", "more than 0"),
    ("size", "8 MB", "8 MiB"),
    ("size", "-8", "8 MiB"),
    ("size", "8,5 MiB", "8 MiB"),
    ("address", "8080", "host:port"),
    ("address", "localhost", "host:port"),
    ("address", "a:b:80", "host:port"),
    ("address", "127.0.0.1:65536", "host:port"),
    ("address", "unix:relative", "unix:/path"),
    ("address", "unix:/" + "x" * 107, "unix:/path"),
    ("path", "/a\0b", "a path"),
    ("boolean", "maybe", "true, on, yes, 1 or false, off, no, 0"),
    ("choice", "ON", "auto, on, off"),
]


@pytest.mark.parametrize(("kind", "text", "value"), GOOD)
def test_a_good_value_is_read(kind, text, value):
    env = reader(FC_X=text)
    assert GETTERS[kind](env, "FC_X", None) == value
    env.finish()


@pytest.mark.parametrize("kind", GETTERS)
def test_unset_and_empty_are_the_default(kind):
    default = object()
    env = reader(FC_X="")
    assert GETTERS[kind](env, "FC_X", default) is default
    assert GETTERS[kind](env, "FC_Y", default) is default
    env.finish()


@pytest.mark.parametrize(("kind", "text", "accepted"), BAD)
def test_a_bad_value_is_told_with_what_is_accepted(kind, text, accepted):
    env = reader(FC_X=text)
    GETTERS[kind](env, "FC_X", None)
    with pytest.raises(SettingsInvalid) as invalid:
        env.finish()
    [problem] = invalid.value.problems
    assert problem.variable == "FC_X"
    assert problem.found.startswith(f"'{text[:5]}"[:5]) or "\\x00" in problem.found
    assert len(problem.found) < 100
    assert accepted in problem.accepted


def test_a_list_is_trimmed_and_its_empty_items_dropped():
    assert reader(FC_X=" a, ,b:c ,").names("FC_X") == ("a", "b:c")
    assert reader().names("FC_X") == ()


def test_every_problem_is_told_at_once_one_a_line():
    env = reader(FC_SIZE="big", FC_WAIT="soon", FC_TOKEN_FLIE="hunter2", FC_TOKEN_FILE="/t")
    env.size("FC_SIZE", 1)
    env.duration("FC_WAIT", 1.0)
    env.path("FC_TOKEN_FILE", None)
    with pytest.raises(SettingsInvalid) as invalid:
        env.finish()
    heading, *lines = str(invalid.value).split("\n")
    assert heading == "3 settings cannot be used:"
    assert lines == [
        "  FC_SIZE: found 'big'; accepted is a size such as 8 MiB, 64KiB or a plain number of bytes",
        "  FC_WAIT: found 'soon'; accepted is a duration in Go syntax such as 90s, 1m30s, 300ms or 1.5h "
        "(a bare number is not one, except 0), more than 0",
        "  FC_TOKEN_FLIE: found an unknown variable; accepted is no variable of this name; "
        "the nearest is FC_TOKEN_FILE",
    ]


def test_a_secret_is_never_shown():
    env = reader(FC_KEY="hunter2", FC_KYE="hunter2")
    assert env.secret("FC_KEY", "") == "hunter2"
    env.refuse("FC_KEY", "a key of 32 bytes")
    with pytest.raises(SettingsInvalid) as invalid:
        env.finish()
    assert "hunter2" not in str(invalid.value)
    assert "a key of 32 bytes" in str(invalid.value)


def test_what_kubernetes_injects_for_a_service_of_our_name_is_no_typo():
    env = reader(FC_SERVICE_HOST="10.0.0.1", FC_PORT="tcp://10.0.0.1:80", FC_PORT_80_TCP="x", OTHER="y", FC_EMPTY="")
    env.finish()


def test_variables_that_somebody_else_reads_can_be_made_known():
    reader(FC_OLD="x").finish(known=["FC_OLD"])
    with pytest.raises(SettingsInvalid):
        reader(FC_OLD="x").finish(known=["FC_OLDER"])


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        (TcpAddress("127.0.0.1", 1), True),
        (TcpAddress("127.9.9.9", 1), True),
        (TcpAddress("::1", 1), True),
        (TcpAddress("localhost", 1), True),
        (UnixAddress("/x"), True),
        (TcpAddress("", 1), False),
        (TcpAddress("0.0.0.0", 1), False),
        (TcpAddress("::", 1), False),
        (TcpAddress("10.0.0.1", 1), False),
        (TcpAddress("example.com", 1), False),
    ],
)
def test_an_address_knows_whether_only_this_machine_reaches_it(address, loopback):
    assert address.loopback is loopback


def test_a_relative_path_is_taken_from_where_the_daemon_was_started(monkeypatch, tmp_path):
    """What a person types at a prompt means what it means there, also if the daemon goes elsewhere later."""
    monkeypatch.chdir(tmp_path)
    reader = EnvironmentReader({"FC_FILE": "tables/t.yaml"}, prefix="FC_")
    assert reader.path("FC_FILE", None) == tmp_path / "tables" / "t.yaml"
