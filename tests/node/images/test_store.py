"""A file system is built once, appears whole or not at all, and holds what an init needs."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import pytest

from fakes.images import FakeImage, file, folder, layer, symlink, write_layout
from node.images.disk import checked, content_of, names_in, stat_of
from node.images.rig import LIMITS, built
from real_parts import needs
from substrate_node.images import ImageStore, ImageUnusable, Progress, locked, opened

LAYER = layer(folder("etc"), file("etc/hostname", b"image\n"))


@pytest.fixture
def init(tmp_path) -> Path:
    """What some other part wants below `/.substrate`."""
    init = tmp_path / "init"
    (init / "lib").mkdir(parents=True)
    (init / "run").write_text("#!/bin/sh\n")
    (init / "run").chmod(0o755)
    (init / "lib" / "data").write_bytes(os.urandom(5000))
    (init / "lib" / "link").symlink_to("data")
    return init


def left(images: Path) -> list[str]:
    """What is in the store, hidden parts included."""
    return sorted(path.name for path in images.iterdir())


def test_the_same_image_is_not_built_twice(tmp_path, init):
    first, second = built(tmp_path, LAYER, extra=init), built(tmp_path, LAYER, extra=init)
    assert (first.reused, second.reused) == (False, True)
    assert first.rootfs == second.rootfs
    assert first.manifest == second.manifest
    assert left(tmp_path / "images") == [first.manifest.key]


def test_another_image_another_init_and_another_size_are_other_file_systems(tmp_path, init):
    keys = [built(tmp_path, LAYER, extra=init).manifest.key, built(tmp_path, layer(), extra=init).manifest.key]
    keys += [built(tmp_path, LAYER).manifest.key, built(tmp_path, LAYER, extra=init, size_bytes=32 << 20).manifest.key]
    (init / "run").chmod(0o644)
    keys.append(built(tmp_path, LAYER, extra=init).manifest.key)
    (init / "lib" / "link").unlink()
    keys.append(built(tmp_path, LAYER, extra=init).manifest.key)
    (init / "lib" / "data").write_bytes(b"x")
    keys.append(built(tmp_path, LAYER, extra=init).manifest.key)
    assert len(set(keys)) == 7


def test_who_owns_the_init_and_when_it_was_made_change_nothing(tmp_path, init):
    first = built(tmp_path, LAYER, extra=init)
    os.utime(init / "run", (1, 1))
    (init / "lib" / "data").chmod(0o600)
    assert built(tmp_path, LAYER, extra=init).manifest.key == first.manifest.key


@needs("debugfs", "e2fsck")
def test_our_part_lies_below_its_own_directory_and_belongs_to_root(tmp_path, init):
    rootfs = checked(built(tmp_path, LAYER, extra=init).rootfs)
    assert names_in(rootfs, "/.substrate") == {"run", "lib", "image.json"}
    for name, mode in [("", 0o040755), ("/run", 0o100755), ("/lib/data", 0o100644), ("/lib/link", 0o120777)]:
        found = stat_of(rootfs, f"/.substrate{name}")
        assert (found.mode, found.uid, found.gid, found.mtime_ns) == (mode, 0, 0, 0)
    assert content_of(rootfs, "/.substrate/lib/data") == (init / "lib" / "data").read_bytes()


@needs("debugfs")
def test_an_image_can_not_put_anything_in_the_place_of_our_part(tmp_path, init):
    hostile = layer(symlink(".substrate", "/etc"), folder("etc"), file("etc/run", b"evil"))
    rootfs = built(tmp_path, hostile, extra=init).rootfs
    assert content_of(rootfs, "/.substrate/run") == b"#!/bin/sh\n"
    assert content_of(rootfs, "/etc/run") == b"evil"


@needs("debugfs")
def test_the_init_is_told_what_the_image_wants_to_run(tmp_path):
    process = {"Env": ["A=1"], "Cmd": ["serve"], "Entrypoint": ["/app"], "WorkingDir": "/srv", "User": "7"}
    rootfs = built(tmp_path, image=FakeImage(LAYER, process=process | {"Labels": {"a": "b"}})).rootfs
    assert json.loads(content_of(rootfs, "/.substrate/image.json")) == process
    rootfs = built(tmp_path, image=FakeImage(LAYER, process=None)).rootfs
    empty = {"Env": [], "Cmd": [], "Entrypoint": [], "WorkingDir": "", "User": ""}
    assert json.loads(content_of(rootfs, "/.substrate/image.json")) == empty


@needs("debugfs", "e2fsck")
def test_an_image_of_a_single_file_has_what_an_init_mounts_upon(tmp_path):
    rootfs = checked(built(tmp_path, layer(file("app", b"\x7fELF", mode=0o755), folder("tmp", mode=0o700))).rootfs)
    assert names_in(rootfs, "/") == {"app", "dev", "etc", "proc", "run", "sys", "tmp", ".substrate", "lost+found"}
    assert stat_of(rootfs, "/proc").mode == 0o040555
    assert stat_of(rootfs, "/tmp").mode == 0o040700  # the image's own stays as it is


@needs("debugfs")
def test_an_image_without_them_gets_the_files_that_a_container_engine_would_provide(tmp_path):
    rootfs = built(tmp_path, layer(file("app"))).rootfs
    assert content_of(rootfs, "/etc/hosts") == b"127.0.0.1 localhost\n::1 localhost\n"
    assert content_of(rootfs, "/etc/machine-id") == b""
    own = layer(folder("etc"), file("etc/hosts", b"10.0.0.1 db\n"), file("etc/machine-id", b"uninitialized\n"))
    rootfs = built(tmp_path, own).rootfs
    assert content_of(rootfs, "/etc/hosts") == b"10.0.0.1 db\n"
    assert content_of(rootfs, "/etc/machine-id") == b"uninitialized\n"
    built(tmp_path, layer(symlink("etc", "elsewhere")))


def test_what_is_no_file_can_not_be_laid_in(tmp_path, init):
    os.mkfifo(init / "pipe")
    with pytest.raises(ImageUnusable, match=r"init/pipe can't be laid into an image"):
        built(tmp_path, LAYER, extra=init)


def test_the_file_system_can_be_read_by_a_jails_user_and_changed_by_nobody(tmp_path):
    found = built(tmp_path, LAYER)
    assert stat.S_IMODE(found.rootfs.stat().st_mode) == 0o444
    assert stat.S_IMODE((tmp_path / "images").stat().st_mode) == 0o700


def test_builds_of_one_key_at_once_are_one_build(tmp_path):
    image = FakeImage(layer(file("large", os.urandom(2 << 20))))
    write_layout(tmp_path / f"layout-{image.digest[7:19]}", image)
    start = Barrier(4)

    def build() -> bool:
        start.wait(timeout=30)
        return built(tmp_path, image=image).reused

    with ThreadPoolExecutor(4) as threads:
        reused = [future.result(timeout=60) for future in [threads.submit(build) for _ in range(4)]]
    assert sorted(reused) == [False, True, True, True]
    assert len(left(tmp_path / "images")) == 1


def test_who_waits_for_another_build_is_told_so(tmp_path):
    image = FakeImage(LAYER)
    path = write_layout(tmp_path / "layout", image)
    key = built(tmp_path, image=image).manifest.key
    told: list[Progress] = []
    waited = Event()
    lock = tmp_path / "images" / f".lock-{key}"
    with opened(path, architecture="amd64", name=None, limits=LIMITS) as found, ThreadPoolExecutor(1) as threads:
        with locked(lock, waiting=None) as ours:
            assert ours

            def report(progress: Progress) -> None:
                told.append(progress)
                waited.set()

            store = ImageStore(tmp_path / "images")
            build = threads.submit(store.build, found, extra=None, size_bytes=None, limits=LIMITS, report=report)
            assert waited.wait(timeout=30)
            assert not build.done()
        assert build.result(timeout=30).reused
    assert [progress.step for progress in told] == ["wait"]


def test_a_lock_is_gone_when_it_is_given_back_and_is_nobody_elses(tmp_path):
    path = tmp_path / "lock"
    with locked(path, waiting=None) as first:
        with locked(path, waiting=None) as second:
            assert (first, second) == (True, False)
        assert path.exists()
    assert not path.exists()


class Interrupted(Exception):
    """The build is broken off."""


@pytest.mark.parametrize("step", ["unpack", "write"])
def test_a_build_that_is_broken_off_leaves_nothing(tmp_path, step):
    def report(progress: Progress) -> None:
        if progress.step == step:
            raise Interrupted

    path = write_layout(tmp_path / "layout", FakeImage(LAYER))
    with opened(path, architecture="amd64", name=None, limits=LIMITS) as found, pytest.raises(Interrupted):
        ImageStore(tmp_path / "images").build(found, extra=None, size_bytes=None, limits=LIMITS, report=report)
    assert left(tmp_path / "images") == []


def test_what_a_killed_build_has_left_is_removed_by_the_next(tmp_path):
    path = write_layout(tmp_path / "layout", FakeImage(LAYER))
    program = """
        import os, signal, sys
        from pathlib import Path
        from substrate_node.images import ImageStore, Limits, opened

        def report(progress):
            if progress.step == "write":
                os.kill(os.getpid(), signal.SIGKILL)

        with opened(Path(sys.argv[1]), architecture="amd64", name=None, limits=Limits()) as image:
            store = ImageStore(Path(sys.argv[2]))
            store.build(image, extra=None, size_bytes=None, limits=Limits(), report=report)
    """
    argv = [sys.executable, "-c", textwrap.dedent(program), str(path), str(tmp_path / "images")]
    assert subprocess.run(argv, timeout=60, check=False).returncode == -signal.SIGKILL
    assert [name[:10] for name in left(tmp_path / "images")] == [
        ".building-",
        ".lock-" + left(tmp_path / "images")[1][6:10],
    ]
    other = built(tmp_path, layer(file("other")))
    assert left(tmp_path / "images") == [other.manifest.key]


def test_what_another_build_is_at_is_left_alone(tmp_path):
    images = tmp_path / "images"
    (images / ".building-aa").mkdir(parents=True)
    with (images / ".lock-aa").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ImageStore(images).sweep()
        assert left(images) == [".building-aa", ".lock-aa"]
    ImageStore(images).sweep()
    assert left(images) == []


@pytest.mark.parametrize("damage", ["rootfs.ext4", "manifest.json"])
def test_a_file_system_that_is_not_whole_is_built_again(tmp_path, damage):
    first = built(tmp_path, LAYER)
    damaged = first.rootfs.parent / damage
    damaged.chmod(0o600)
    os.truncate(damaged, 10)
    again = built(tmp_path, LAYER)
    assert not again.reused
    assert again.manifest == first.manifest


def test_progress_says_which_layer_and_how_far(tmp_path):
    told: list[Progress] = []
    path = write_layout(tmp_path / "layout", FakeImage(LAYER, layer(file("large", bytes(3 << 20)))))
    with opened(path, architecture="amd64", name=None, limits=LIMITS) as found:
        ImageStore(tmp_path / "images").build(found, extra=None, size_bytes=None, limits=LIMITS, report=told.append)
    assert list(dict.fromkeys((one.step, one.item) for one in told)) == [
        ("unpack", "1/2"),
        ("unpack", "2/2"),
        ("write", "rootfs.ext4"),
    ]
    assert told[-1].done_bytes == told[-1].total_bytes


def test_a_full_disk_is_reported_and_nothing_is_left(tmp_path):
    """A limit on the size of files stands in for it: the same calls fail, in the same way."""
    path = write_layout(tmp_path / "layout", FakeImage(layer(file("large", os.urandom(1 << 20)))))
    program = """
        import resource, signal, sys
        from pathlib import Path
        from substrate_node.images import ImageStore, Limits, opened

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with opened(Path(sys.argv[1]), architecture="amd64", name=None, limits=Limits()) as image:
            try:
                ImageStore(Path(sys.argv[2])).build(
                    image, extra=None, size_bytes=None, limits=Limits(), report=lambda _: None
                )
            except OSError as error:
                print(error.strerror)
    """
    argv = [sys.executable, "-c", textwrap.dedent(program), str(path), str(tmp_path / "images")]
    done = subprocess.run(argv, timeout=60, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "File too large"
    assert left(tmp_path / "images") == []
