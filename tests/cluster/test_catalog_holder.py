"""The catalog holds one table, exchanges it whole, and remembers what running calls still name."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from substrate_cluster.catalog import Catalog, TableInvalid, parse_table, table_in_file, table_in_text
from substrate_cluster.catalog.document import MOST_BYTES
from substrate_cluster.catalog.holder import MOST_REMEMBERED
from substrate_seam.events import CatalogLoaded, CatalogRefused, WarningRaised


def table_of(**workloads):
    """A table with one workload per keyword, told apart by an argument of its command."""
    table = {name: {"command": ["serve", version]} for name, version in workloads.items()}
    return parse_table(json.dumps(table).encode(), source="test.json")


@pytest.fixture
def events():
    """What the catalog says, in order."""
    return []


@pytest.fixture
def path(tmp_path):
    """A file with a table of two workloads."""
    path = tmp_path / "workloads.json"
    path.write_text('{"a": {"command": ["serve", "1"]}, "b": {"command": ["serve", "1"]}}')
    return path


@pytest.fixture
def catalog(path, events):
    """A catalog that was loaded from that file."""
    return Catalog.load(table_in_file(path), emit=events.append)


def test_a_workload_is_found_by_its_exact_name(catalog):
    """Names are exact; what is not in the table does not exist."""
    assert catalog.get("a").workload.spec.command == ("serve", "1")
    assert catalog.get("A") is None
    assert [workload.name for workload in catalog.workloads()] == ["a", "b"]


def test_loading_says_what_is_in_force(catalog, path, events):
    """One event, with the source and how many workloads there are."""
    assert events == [CatalogLoaded(source=str(path), workloads=len(catalog.workloads()))]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "directory"])
def test_a_file_that_cannot_be_read_is_an_invalid_table(tmp_path, events, make):
    """The start of a daemon has one exception to show."""
    path = tmp_path / "none.yaml"
    make(path)
    with pytest.raises(TableInvalid, match=r"none\.yaml is refused: one problem\n  - it cannot be read: "):
        Catalog.load(table_in_file(path), emit=events.append)
    assert events == []


def test_a_huge_file_is_not_read_whole(tmp_path):
    """A sparse file of a terabyte costs no more than the bound."""
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert len(table_in_file(path).read()) == MOST_BYTES + 1
    with pytest.raises(TableInvalid, match="found more than"):
        table_in_file(path).parsed()


def test_relative_paths_in_a_file_are_those_beside_it(tmp_path, monkeypatch):
    """Also when the file itself was named by a relative path."""
    (tmp_path / "table.yaml").write_text("w: {command: [x], path: code}")
    monkeypatch.chdir(tmp_path)
    table = table_in_file(tmp_path.relative_to(tmp_path) / "table.yaml").parsed()
    assert table.entries["w"].workload.spec.path == str(tmp_path / "code")


def test_a_table_in_a_setting_has_no_directory():
    """Its name is what people see in messages, and bytes that are no UTF-8 are named like any other mistake."""
    with pytest.raises(TableInvalid, match=r"FC_INVOKE_WORKLOADS is refused.*\n.*absolute path"):
        table_in_text('{"w": {"rootfsPath": "r.ext4"}}', label="FC_INVOKE_WORKLOADS").parsed()
    with pytest.raises(TableInvalid, match="found the byte 0xff; accepted is UTF-8"):
        table_in_text('{"\udcff": {}}', label="FC_INVOKE_WORKLOADS").parsed()


async def test_a_reload_puts_the_new_table_in_force(catalog, path, events):
    """Changed, added and removed workloads, and one event about it."""
    changes = []
    catalog.on_change(changes.append)
    old = {name: catalog.get(name).workload for name in "ab"}
    path.write_text('{"a": {"command": ["serve", "2"]}, "c": {"command": ["serve", "1"]}}')
    assert await catalog.reload()
    assert catalog.get("a").workload.spec.command == ("serve", "2")
    assert catalog.get("b") is None
    [change] = changes
    assert change.added == (catalog.get("a").workload, catalog.get("c").workload)
    assert change.removed == (old["a"].digest, old["b"].digest)
    assert events[1:] == [CatalogLoaded(source=str(path), workloads=2)]


async def test_calls_may_still_name_a_workload_of_the_table_before(catalog, path):
    """A call that was accepted under the old digest can still be taught to a node."""
    old = catalog.get("a").workload
    path.write_text("{}")
    assert await catalog.reload()
    assert catalog.workloads() == ()
    assert catalog.by_digest(old.digest) == old
    assert catalog.by_digest("0" * 64) is None


@pytest.mark.parametrize("bad", ['{"a": {"command": ["serve"], "vcpu": 1}, "b": {"command": ["serve"]}}', "", "{"])
async def test_a_bad_table_is_refused_whole(catalog, path, events, bad):
    """Nothing of it comes into force, not even the workload in it that is good."""
    before = catalog.workloads()
    changes = []
    catalog.on_change(changes.append)
    path.write_text(bad)
    assert not await catalog.reload()
    assert catalog.workloads() == before
    assert changes == []
    [refused] = events[1:]
    assert isinstance(refused, CatalogRefused)
    assert refused.message.startswith(f"{path} is refused: ")


async def test_a_missing_file_keeps_the_table_and_its_return_is_noticed(catalog, path, events):
    """Editors and mounts replace files, and are seen in between."""
    content = path.read_text()
    path.unlink()
    assert not await catalog.reload()
    assert catalog.get("a") is not None
    path.write_text(content)
    assert await catalog.reload()
    assert [type(event) for event in events[1:]] == [CatalogRefused, CatalogLoaded]


async def test_a_reload_that_changes_nothing_for_nodes_tells_them_nothing(catalog, path):
    """Another caller or timeout is in force at once, and no digest changes."""
    changes = []
    catalog.on_change(changes.append)
    path.write_text(
        '{"a": {"command": ["serve", "1"], "callers": ["ci"]},'
        ' "b": {"command": ["serve", "1"], "requestTimeout": "1s"}}'
    )
    assert await catalog.reload()
    assert (catalog.get("a").callers, catalog.get("b").request_timeout_s) == ({"ci"}, 1.0)
    assert changes == []


async def test_a_warning_is_said_once(path, events):
    """Not again at each reload, but again after it was gone."""
    odd, fine = '{"w": {"command": ["x"], "callers": []}}', '{"w": {"command": ["x"]}}'
    path.write_text(odd)
    catalog = Catalog.load(table_in_file(path), emit=events.append)
    for content in (odd, fine, odd):
        path.write_text(content)
        assert await catalog.reload()
    warnings = [index for index, event in enumerate(events) if isinstance(event, WarningRaised)]
    assert [type(event).__name__[0] for event in events] == list("CWCCCW")
    assert events[warnings[0]].message.startswith(f"{path}: w.callers: an empty list lets nobody call")


def test_only_so_many_workloads_of_the_past_are_remembered(events):
    """The oldest go first, so a table that changes all day costs bounded memory."""
    catalog = Catalog(table_of(a="0"), source=table_in_text("{}", label="test"), emit=events.append)
    digests = [catalog.get("a").workload.digest]
    for version in range(1, MOST_REMEMBERED + 2):
        catalog.replace(table_of(a=str(version)))
        digests.append(catalog.get("a").workload.digest)
    assert catalog.by_digest(digests[0]) is None
    assert all(catalog.by_digest(digest) for digest in digests[1:])


VERSIONS = st.lists(st.dictionaries(st.sampled_from("abc"), st.sampled_from("123")), min_size=1, max_size=8)


@given(VERSIONS)
def test_changes_add_up_to_the_table_in_force(versions):
    """Who applies every change to what it knew before knows exactly what the catalog has."""
    catalog = Catalog(
        parse_table(b"{}", source="test"), source=table_in_text("{}", label="test"), emit=lambda event: None
    )
    known = {}

    def apply(change):
        known.update({workload.digest: workload for workload in change.added})
        for digest in change.removed:
            del known[digest]

    catalog.on_change(apply)
    seen = set()
    for version in versions:
        table = table_of(**version)
        catalog.replace(table)
        seen |= {entry.workload for entry in table.entries.values()}
        assert set(known.values()) == set(catalog.workloads()) == {entry.workload for entry in table.entries.values()}
        assert all(catalog.by_digest(workload.digest) == workload for workload in seen)
