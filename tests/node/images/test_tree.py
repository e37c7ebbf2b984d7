"""Layers upon layers show what an overlay of them would show, and no name leads out of the image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.images import Member, entry, file, folder, hardlink, layer, opaque, symlink, whiteout
from node.images.disk import checked, content_of, names_in, stat_of
from node.images.rig import bytes_of, merged, rendered
from real_parts import fuzz_examples, needs
from substrate_node.images import Limits
from substrate_node.images.problems import EntryUnusable
from substrate_node.images.tar import Kind
from substrate_node.images.tree import Node, walk


def shown(*layers: Sequence[Member]) -> dict[str, str]:
    """What is at each path: the bytes of a file, the target of a link with an arrow, or the kind."""
    root, contents = merged([layer(*members) for members in layers])
    found = {}
    for path, _, node in walk(root):
        if node.kind is Kind.FILE:
            found[path.decode()] = bytes_of(node, contents).decode()
        else:
            found[path.decode()] = f"-> {node.target.decode()}" if node.kind is Kind.SYMLINK else node.kind.value
    return found


def mode_of(root: Node, path: str) -> int:
    """The permissions at a path."""
    return next(node.mode for found, _, node in walk(root) if found == path.encode())


D = "directory"


def test_a_name_of_an_upper_layer_hides_that_of_a_lower_one():
    assert shown([file("a", b"old"), file("b", b"stays")], [file("a", b"new")]) == {"a": "new", "b": "stays"}


def test_within_a_layer_the_last_entry_of_a_name_wins():
    assert shown([file("a", b"1"), file("./a", b"2"), file("/a", b"3")]) == {"a": "3"}


def test_a_directory_joins_the_one_below_and_gives_it_its_attributes():
    lower, upper = layer(folder("d", mode=0o700), file("d/a", b"a")), layer(folder("d", mode=0o711), file("d/b", b"b"))
    root, _ = merged([lower, upper])
    assert mode_of(root, "d") == 0o711
    assert shown([folder("d"), file("d/a", b"a")], [folder("d"), file("d/b", b"b")]) == {"d": D, "d/a": "a", "d/b": "b"}


def test_a_file_takes_the_place_of_a_directory_and_a_directory_that_of_a_file():
    assert shown([folder("d"), file("d/a"), file("f")], [file("d", b"file"), folder("f"), file("f/b", b"b")]) == {
        "d": "file",
        "f": D,
        "f/b": "b",
    }


def test_directories_that_nobody_gave_are_made():
    root, _ = merged([layer(file("a/b/c"))])
    assert (mode_of(root, "a"), mode_of(root, "a/b")) == (0o755, 0o755)


def test_the_attributes_of_the_root_are_taken():
    root, _ = merged([layer(folder("./", mode=0o711, uid=3))])
    assert (root.mode, root.uid) == (0o711, 3)


@pytest.mark.parametrize("last", [False, True])
def test_a_whiteout_hides_what_is_below_and_nothing_of_its_own_layer_wherever_it_stands(last):
    own = [folder("d"), file("d/new", b"new")]
    upper = [*own, whiteout("d")] if last else [whiteout("d"), *own]
    assert shown([folder("d"), file("d/old"), file("e", b"e")], upper) == {"d": D, "d/new": "new", "e": "e"}


@pytest.mark.parametrize("last", [False, True])
def test_an_opaque_directory_hides_all_that_is_below_it_and_nothing_of_its_own_layer(last):
    own = [file("d/sub/new", b"new")]
    upper = [*own, opaque("d")] if last else [opaque("d"), *own]
    lower = [folder("d"), folder("d/sub", mode=0o700), file("d/sub/old"), file("d/old")]
    assert shown(lower, upper) == {"d": D, "d/sub": D, "d/sub/new": "new"}
    assert mode_of(merged([layer(*lower), layer(*upper)])[0], "d/sub") == 0o755


def test_a_whiteout_of_nothing_is_nothing():
    assert shown([file("a", b"a")], [whiteout("b"), whiteout("c/d"), opaque("e"), whiteout("a/b")]) == {"a": "a"}


def test_whiteouts_follow_no_link_to_what_they_hide():
    """The link itself would be hidden by its own name, and a hostile one leads to the root."""
    lower, link = [file("b", b"b")], symlink("a", "/")
    for hides in ([opaque("a")], [whiteout("a/b")]):
        assert shown(lower, [link, *hides]) == shown([*lower, link], hides) == shown([*lower, link])


def test_other_reserved_names_are_left_out():
    assert shown([file(".wh..wh.aufs"), folder(".wh..wh.plnk"), file("a", b"a")]) == {"a": "a"}


def test_a_third_layer_can_bring_back_what_the_second_hid():
    assert shown([file("a", b"1")], [whiteout("a")], [file("a", b"3")]) == {"a": "3"}


def test_hard_links_are_one_file_also_across_layers():
    root, _ = merged([layer(file("a", b"x"), hardlink("b", "a")), layer(hardlink("c", "/b"))])
    assert len({id(found.node) for found in root.children.values()}) == 1


def test_a_hard_link_keeps_the_file_whose_first_name_is_replaced():
    assert shown([file("a", b"old"), hardlink("b", "a")], [file("a", b"new")]) == {"a": "new", "b": "old"}
    assert shown([file("a", b"x"), hardlink("a", "a")]) == {"a": "x"}


def test_what_lies_below_a_link_to_a_directory_goes_where_the_link_leads():
    lower = [folder("usr/lib"), symlink("lib", "usr/lib"), symlink("deep", "/lib/../lib")]
    links = {"usr": D, "usr/lib": D, "lib": "-> usr/lib", "deep": "-> /lib/../lib"}
    assert shown(lower, [file("lib/a", b"a"), file("deep/b", b"b")]) == links | {"usr/lib/a": "a", "usr/lib/b": "b"}


def test_a_link_that_points_out_of_the_image_leads_to_its_root():
    assert shown([symlink("up", "../../../..")], [file("up/etc/passwd", b"x")]) == {
        "up": "-> ../../../..",
        "etc": D,
        "etc/passwd": "x",
    }
    assert shown([symlink("abs", "/etc")], [file("abs/passwd", b"x")]) == {
        "abs": "-> /etc",
        "etc": D,
        "etc/passwd": "x",
    }


REFUSED = {
    "a name that climbs": ([file("a/../../etc/passwd")], "its name has `..` in it"),
    "a hard link that climbs": ([file("a"), hardlink("b", "../a")], "its link target has `..` in it"),
    "a hard link to nothing": ([hardlink("b", "/etc/shadow")], "hard link to 'etc/shadow', which is not in the image"),
    "a hard link to a directory": ([folder("d"), hardlink("b", "d")], "'d', a directory; accepted are links to files"),
    "a hard link to the root": ([hardlink("b", "/")], "not in the image"),
    "a name below a file": ([file("f"), file("f/a")], "below 'f', which is a file and no directory"),
    "a name below a loop of links": ([symlink("a", "b"), symlink("b", "a"), file("a/x")], "over 1000 steps"),
    "a root that is a file": ([file("./")], "the root of the image is a file"),
    "a name that is too long": ([file("n" * 256)], "a part of 256 bytes; accepted are 255"),
    "a name that is too deep": ([file("d/" * 300 + "f")], "more than 256 directories deep"),
    "a whiteout of the parent": ([file("a/.wh...")], "a whiteout that names no file"),
    "a whiteout of nothing": ([file("a/.wh.")], "a whiteout that names no file"),
    "a link to nothing": ([symlink("a", "")], "a symbolic link to nothing"),
    "a link that is too long": ([symlink("a", "b/" * 2048)], "4096 bytes; accepted are 4095"),
    "an owner out of range": ([file("a", uid=2**32 - 1)], "belongs to uid 4294967295; accepted are 0 to 4294967294"),
    "a device out of range": ([entry("a", b"3", devmajor=4096)], "device 4096:0; accepted are up to 4095:1048575"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused(what):
    members, words = REFUSED[what]
    with pytest.raises(EntryUnusable, match=words):
        merged([layer(*members)])


def test_more_entries_than_accepted_are_refused_even_when_they_are_all_the_same():
    with pytest.raises(EntryUnusable, match="over 10 entries"):
        merged([layer(*[file("a")] * 6)] * 2, Limits(entries=10))


def test_more_names_and_attributes_than_memory_may_hold_are_refused():
    with pytest.raises(EntryUnusable, match="exceed the 1000 bytes accepted"):
        merged(
            [layer(*(file(f"a{number}", xattrs={"user.a": b"x" * 100}) for number in range(20)))],
            Limits(kept_bytes=1000),
        )


def test_many_whiteouts_of_many_names_take_no_more_time_than_few():
    """Each directory is cleared once in a layer; otherwise this would take minutes."""
    names = [file(f"d/{number}") for number in range(2000)]
    assert len(shown([folder("d")], [*names, *[opaque("d"), whiteout("d")] * 2000])) == 2001


# --- the same in general: a model of overlays in a dozen lines, and random layers -----------------------------------


class Shown(NamedTuple):
    """One name in the model. `identity` is the same for names of one file."""

    kind: str
    mode: int
    value: str
    identity: int


View = dict[str, Shown]


def overlaid(lower: Mapping[str, Shown], members: Sequence[Member], serial: Iterator[int]) -> View:
    """What a layer upon `lower` shows: first what it hides goes, then what it has itself comes."""
    upper: View = {}
    hidden: set[str] = set()
    emptied: set[str] = set()
    for info, data in members:
        parent, _, name = info.name.rpartition("/")
        if name == ".wh..wh..opq":
            emptied.add(parent)
        elif name.startswith(".wh."):
            hidden.add(f"{parent}/{name.removeprefix('.wh.')}".removeprefix("/"))
        elif info.islnk():
            upper = without(upper, info.name) | {info.name: upper[info.linkname]}
            hidden.add(info.name)
        elif info.isdir():
            upper = (upper if is_directory(upper.get(info.name)) else without(upper, info.name)) | {
                info.name: Shown("directory", info.mode, "", next(serial))
            }
        else:
            kind = "symbolic link" if info.issym() else "file"
            value = info.linkname if info.issym() else data.decode()
            upper = without(upper, info.name) | {info.name: Shown(kind, info.mode, value, next(serial))}
            hidden.add(info.name)  # even if a directory takes its place later in the layer
    view = dict(lower)
    for path in hidden:
        view = without(view, path)
    for path in emptied:
        view = {found: one for found, one in view.items() if not found.startswith(f"{path}/")}
    for path, one in upper.items():
        if not (is_directory(one) and is_directory(view.get(path))):
            view = without(view, path)
    return view | upper


def is_directory(one: Shown | None) -> bool:
    return one is not None and one.kind == "directory"


def without(view: View, path: str) -> View:
    """The view without a name and all below it."""
    return {found: one for found, one in view.items() if found != path and not found.startswith(f"{path}/")}


NAMES = ["a", "b", "c"]
paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)


@st.composite
def layers_of_members(draw) -> list[Member]:
    """A layer as diffs make them: the directories that lead to an entry come before it, whiteouts anywhere."""
    members: list[Member] = []
    for kind, path, mode in draw(
        st.lists(st.tuples(st.sampled_from("dfslwo"), paths, st.integers(0, 0o7777)), max_size=8)
    ):
        if kind == "w":
            members.insert(draw(st.integers(0, len(members))), whiteout(path))
            continue
        if kind == "o":
            members.insert(draw(st.integers(0, len(members))), opaque(path))
            continue
        parts = path.split("/")
        members += [folder("/".join(parts[:depth]), mode=0o711) for depth in range(1, len(parts))]
        files = surviving_files(members)
        if kind == "l" and files:
            members.append(hardlink(path, draw(st.sampled_from(sorted(files)))))
        elif kind == "d":
            members.append(folder(path, mode=mode))
        elif kind == "s":
            members.append(symlink(path, draw(st.text("xyz./", min_size=1, max_size=80))))
        else:
            members.append(file(path, draw(st.text(max_size=5)).encode(), mode=mode))
    return members


def surviving_files(members: Sequence[Member]) -> set[str]:
    """The files of the layer so far that are still there: what a hard link may name."""
    view = overlaid({}, members, iter(range(1000)))
    return {path for path, one in view.items() if one.kind == "file"}


@given(st.lists(layers_of_members(), min_size=1, max_size=4))
def test_random_layers_show_what_an_overlay_of_them_shows(layers):
    view: View = {}
    serial = iter(range(10_000))
    for members in layers:
        view = overlaid(view, members, serial)
    root, contents = merged([layer(*members) for members in layers])
    found = {path.decode(): node for path, _, node in walk(root)}
    assert found.keys() == view.keys()
    for path, one in view.items():
        node = found[path]
        assert (node.kind.value, node.mode) == (one.kind, one.mode), path
        if one.kind == "file":
            assert bytes_of(node, contents).decode() == one.value
        if one.kind == "symbolic link":
            assert node.target.decode() == one.value
    same = {(path, other) for path in view for other in view if view[path].identity == view[other].identity}
    assert same == {(path, other) for path in found for other in found if found[path] is found[other]}


@needs("e2fsck", "debugfs")
@settings(max_examples=fuzz_examples(5))
@given(st.lists(layers_of_members(), min_size=1, max_size=3))
def test_random_layers_become_file_systems_without_fault(tmp_path_factory, layers):
    root, contents = merged([layer(*members) for members in layers])
    path = checked(rendered(root, contents, tmp_path_factory.mktemp("random") / "rootfs.ext4"))
    assert names_in(path, "/") == {name.decode() for name in root.children} | {"lost+found"}
    for name, found in root.children.items():
        shown_as = stat_of(path, f"/{name.decode()}")
        assert shown_as.mode & 0o7777 == found.node.mode
        if found.node.kind is Kind.FILE:
            assert content_of(path, f"/{name.decode()}") == bytes_of(found.node, contents)
