"""A list of nodes is read whole, and every bad entry is named."""

import pytest

from substrate_cluster.nodes.discovery import NodeAddress, parse_nodes


def test_nodes_are_ids_and_addresses():
    """In plain text or over TLS, by name or address."""
    nodes = parse_nodes("a=http://127.0.0.1:8443, b=https://[::1]:9000,c=https://node-c:1")
    assert nodes == {
        "a": NodeAddress(node_id="a", host="127.0.0.1", port=8443, tls=False),
        "b": NodeAddress(node_id="b", host="::1", port=9000, tls=True),
        "c": NodeAddress(node_id="c", host="node-c", port=1, tls=True),
    }
    assert [node.loopback for node in nodes.values()] == [True, True, False]


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [
        ("", "begin with `id=`"),
        ("127.0.0.1:8443", "begin with `id=`"),
        ("a=", "not `http://host:port`"),
        ("a=ftp://h:1", "not `http://host:port`"),
        ("a=http://h", "not `http://host:port`"),
        ("a=http://h:99999", "Port out of range"),
        ("a=http://h:1/path", "more than a host and a port"),
        ("a=http://u@h:1", "more than a host and a port"),
        ("a=http://h:1,a=http://h:2", "named twice"),
    ],
)
def test_a_bad_entry_is_refused_with_what_is_accepted(entry, wrong):
    """The words name the entry."""
    with pytest.raises(ValueError, match=wrong) as refused:
        parse_nodes(entry)
    assert "accepted is a list such as" in str(refused.value)


def test_all_bad_entries_are_told_at_once():
    """Nobody mends a list one error at a time."""
    with pytest.raises(ValueError, match=r"'x'.*'y'"):
        parse_nodes("x,a=http://h:1,y")
