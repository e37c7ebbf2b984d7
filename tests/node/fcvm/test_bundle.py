"""Bases on disk: whole or not at all, what they say they are, removed when nothing can use them."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from substrate_node.fcvm import bundle, sparse
from substrate_node.fcvm.bundle import BadBase, Bundles, Fingerprint, Inputs, Manifest, verify
from substrate_node.fcvm.sparse import Sum, checksum, settle

MIB = 2**20
FILE = Fingerprint(1, 2, 3, "4")
INPUTS = Inputs(
    firecracker="1.17.0",
    snapshot_format="v12.0.0",
    cpu="a processor",
    arch="x86_64",
    host_kernel="6.1.0",
    kernel=FILE,
    initrd=None,
    boot_args="quiet",
    rootfs=FILE,
    vcpus=1,
    memory_mib=8,
)
KEY = INPUTS.key


def never(_: Manifest) -> None:
    """Nothing speaks against any base."""


def content(seed: int) -> bytes:
    """8 MiB, most of it zeros."""
    return bytes([seed]) * 4096 + bytes(3 * MIB) + bytes([seed + 1]) * 5000 + bytes(5 * MIB - 9096)


class Shop:
    """Bases in a directory, and how to make one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bundles = Bundles(root)

    def draft(self, base_id: str, seed: int = 1) -> Path:
        draft = self.bundles.draft(KEY, base_id)
        (draft / "state").write_bytes(b"state %d" % seed)
        (draft / "memory").write_bytes(content(seed))
        return draft

    def describe(self, base_id: str, inputs: Inputs = INPUTS):
        def described(state: Sum, memory: Sum) -> Manifest:
            return Manifest(
                base_id=base_id,
                workload="w",
                inputs=inputs,
                kernel_path="/k",
                initrd_path=None,
                rootfs_path="/r",
                state=state,
                memory=memory,
            )

        return described

    def publish(self, base_id: str, seed: int = 1) -> Path:
        return self.bundles.publish(self.draft(base_id, seed), self.describe(base_id))

    def names(self) -> set[str]:
        return {path.name for path in self.root.rglob("*") if path.is_dir() or path.is_symlink()}


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """An empty one."""
    return Shop(tmp_path)


# Publishing.


def test_a_published_base_is_whole_described_and_read_only(shop: Shop):
    """Its zeros take no room."""
    base = shop.publish("b1")
    assert base == shop.bundles.current(KEY) == shop.root / KEY / "b1"
    manifest = verify(base, INPUTS)
    assert manifest.memory.size_bytes == (base / "memory").stat().st_size == 8 * MIB
    assert (base / "memory").read_bytes() == content(1)
    assert (base / "memory").stat().st_blocks * 512 < MIB
    for name in ("state", "memory"):
        assert (base / name).stat().st_mode & 0o777 == 0o444


def test_a_replacement_counts_from_one_moment_on_and_old_files_live_on_in_their_users(shop: Shop):
    """P-07, P-08: who has the old memory goes on having it, and no state ever meets another's memory."""
    old = shop.publish("b1")
    with (old / "memory").open("rb") as mapped:
        new = shop.publish("b2", seed=7)
        assert shop.bundles.current(KEY) == new
        shop.bundles.discard(KEY, "b1")
        assert mapped.read() == content(1)
    assert shop.bundles.current(KEY) == new
    verify(new, INPUTS)


@pytest.mark.parametrize("step", ["settle", "_write", "_sync_directory", "rename", "symlink_to"])
@pytest.mark.parametrize("before", [False, True])
def test_a_daemon_that_dies_while_it_publishes_leaves_no_half_base(step, before, shop: Shop, monkeypatch):
    """At whatever step: the base of before counts, or none, and the next daemon's sweep leaves nothing else."""
    if before:
        shop.publish("b0")

    class Died(BaseException):
        pass

    def die(*_args: object, **_kwargs: object) -> None:
        raise Died

    draft = shop.draft("b1")
    target = Path if step in ("rename", "symlink_to") else bundle
    monkeypatch.setattr(target, step, die)
    with pytest.raises(Died):
        shop.bundles.publish(draft, shop.describe("b1"))
    monkeypatch.undo()
    counts = shop.bundles.current(KEY)
    assert counts == (shop.root / KEY / "b0" if before else None)
    assert shop.bundles.sweep(never, now_s=0.0) == []
    assert shop.names() == ({KEY, "b0", "current"} if before else set())
    if before:
        verify(shop.root / KEY / "b0", INPUTS)


def test_discarding_leaves_nothing_whatever_was_there(shop: Shop):
    """A base, a draft, nothing at all; another base stays."""
    shop.draft("b1")
    shop.bundles.discard(KEY, "b1")
    assert shop.names() == set()
    shop.publish("b2")
    shop.bundles.discard(KEY, "never-was")
    assert shop.bundles.current(KEY)
    shop.bundles.discard(KEY, "b2")
    shop.bundles.discard(KEY, "b2")
    assert shop.names() == set()


# Verifying.


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda base: _overwrite(base / "memory", 3 * MIB + 5000, b"x"), "its memory is damaged"),
        (lambda base: _overwrite(base / "memory", 6 * MIB, b"x"), "its memory is damaged"),
        (lambda base: _shorten(base / "memory", 4 * MIB), "its memory has 4194304 bytes, 8388608 were written"),
        (lambda base: _overwrite(base / "state", 0, b"S"), "its state is damaged"),
        (lambda base: (base / "state").unlink(), "its state can't be read"),
        (lambda base: (base / "manifest.json").write_text("{"), "its manifest can't be read"),
        (lambda base: (base / "manifest.json").unlink(), "its manifest can't be read"),
    ],
)
def test_a_base_that_is_not_what_it_was_is_told(spoil, why: str, shop: Shop):
    """Also where there was a hole."""
    base = shop.publish("b1")
    spoil(base)
    with pytest.raises(BadBase, match=why):
        verify(base, INPUTS)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("cpu", "another", "its cpu was a processor, now it is another"),
        ("firecracker", "1.17.1", "its firecracker was 1.17.0, now it is 1.17.1"),
        ("host_kernel", "6.2.0", "its host kernel was 6.1.0"),
        ("rootfs", Fingerprint(1, 2, 4, "4"), "its rootfs was"),
        ("kernel", Fingerprint(1, 9, 3, "4"), "its kernel was"),
        ("boot_args", "loud", "its boot args was quiet, now it is loud"),
    ],
)
def test_a_base_made_of_something_else_is_told(field: str, value: object, why: str, shop: Shop):
    """P-13: each input is in the key, and in the manifest by name."""
    other = msgspec.structs.replace(INPUTS, **{field: value})
    assert other.key != KEY
    with pytest.raises(BadBase, match=why):
        verify(shop.publish("b1"), other)


def test_a_file_changed_in_place_is_another(tmp_path: Path):
    """So is one put in its place, though it may have the same size and date."""
    path = tmp_path / "rootfs"
    path.write_bytes(b"x" * 5000)
    first = Fingerprint.of(path)
    assert Fingerprint.of(path) == first
    os.utime(path, ns=(0, 0))
    assert Fingerprint.of(path) != first
    dated = Fingerprint.of(path)
    (tmp_path / "other").write_bytes(b"x" * 5000)
    os.utime(tmp_path / "other", ns=(0, 0))
    (tmp_path / "other").rename(path)
    assert Fingerprint.of(path) != dated


# Sweeping.


def test_a_sweep_removes_replaced_bases_and_keeps_the_one_that_counts(shop: Shop):
    """P-14: what nothing refers to is gone with the next start at the latest."""
    shop.publish("b1")
    shop.publish("b2")
    assert shop.bundles.sweep(never, now_s=0.0) == []
    assert shop.names() == {KEY, "b2", "current"}


def test_a_sweep_tells_why_a_whole_base_is_removed(shop: Shop):
    """And removes it whole."""
    shop.publish("b1")
    reasons = shop.bundles.sweep(lambda manifest: f"{manifest.base_id} was made elsewhere", now_s=0.0)
    assert reasons == ["base b1 is removed: b1 was made elsewhere"]
    assert shop.names() == set()


def test_a_base_that_nobody_used_for_long_is_removed(shop: Shop):
    """Verifying it counts as using it."""
    base = shop.publish("b1")
    os.utime(base, (0, 0))
    used_s = 15 * 86_400.0
    assert shop.bundles.sweep(never, now_s=used_s - 2 * 86_400) == []
    assert shop.bundles.sweep(never, now_s=used_s) == ["base b1 is removed: nobody used it for 15 days"]


def test_a_current_that_leads_nowhere_is_no_obstacle(shop: Shop):
    """It is removed, and a new base can be published there."""
    (shop.root / KEY).mkdir()
    (shop.root / KEY / "current").symlink_to("gone")
    (reason,) = shop.bundles.sweep(never, now_s=0.0)
    assert "its manifest can't be read" in reason
    verify(shop.publish("b1"), INPUTS)


# Sparse files.


@given(st.lists(st.tuples(st.integers(0, 9), st.binary(min_size=1, max_size=9)), max_size=6), st.integers(0, 3 * 4096))
def test_settling_changes_no_byte_and_its_sum_is_the_checksum(tmp_path_factory, writes, odd_bytes):
    """Wherever there is data, and whatever the length."""
    path = tmp_path_factory.mktemp("sparse") / "memory"
    data = bytearray(5 * MIB + odd_bytes)
    for place, piece in writes:
        data[place * MIB // 2 : place * MIB // 2 + len(piece)] = piece
    path.write_bytes(data)
    before = checksum(path)
    assert settle(path) == checksum(path) == before
    assert path.read_bytes() == data
    path.with_name("holes").touch()
    os.truncate(path.with_name("holes"), len(data))
    if not any(data):
        assert checksum(path.with_name("holes")) == before


def test_a_file_system_without_holes_keeps_its_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And any other failure is one."""
    path = tmp_path / "memory"
    path.write_bytes(bytes(MIB))
    for number, raises in ((95, False), (28, True)):  # EOPNOTSUPP, ENOSPC
        monkeypatch.setattr(sparse.ctypes, "get_errno", lambda number=number: number)
        monkeypatch.setattr(sparse, "_libc", type("Libc", (), {"fallocate": staticmethod(lambda *_: -1)}))
        if raises:
            with pytest.raises(OSError, match="No space left"):
                settle(path)
        else:
            assert settle(path).size_bytes == MIB


def _shorten(path: Path, size: int) -> None:
    path.chmod(0o600)
    os.truncate(path, size)


def _overwrite(path: Path, offset: int, data: bytes) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
