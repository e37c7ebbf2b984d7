"""`fc-invoke image build`: a container image in, a root file system for microVMs out."""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from msgspec import Struct

from fc_invoke.credentials import LoginUnusable, docker_config_path, login_for
from fc_invoke.registry import Reference, RegistryUnavailable, pulled
from substrate_guest.tree import NoTree, guest_tree
from substrate_node.images import ARCHITECTURES, Built, Image, ImageStore, ImageUnusable, Limits, Progress, opened
from substrate_node.state import default_state_root

_REFRESH_S = 0.1

Report = Callable[[Progress], None]
LayInit = Callable[[Path], object]
"""Puts what guests start with into an empty directory, which becomes `/.substrate`."""


class ImageRequest(Struct, frozen=True, kw_only=True):
    """What to build of which image. `init` None means: of ours only the description of the image is added."""

    image: str
    name: str | None
    init: Path | None
    size_bytes: int | None
    state_root: Path
    docker_config: Path
    plain_http: bool
    limits: Limits = Limits()


def build(request: ImageRequest, *, report: Report) -> Built:
    """The root file system of an image, built unless it is there.

    Raises `ImageUnusable`, `RegistryUnavailable`, `LoginUnusable` and `OSError`; nothing is left behind then but, of a
    registry's image, the layers that were fetched: the next attempt uses them.
    """
    images = request.state_root / "images"
    request.state_root.mkdir(mode=0o700, parents=True, exist_ok=True)
    images.mkdir(mode=0o700, exist_ok=True)
    with _found(request, images / "pulls", report) as image:
        return ImageStore(images / "sha256").build(
            image, extra=request.init, size_bytes=request.size_bytes, limits=request.limits, report=report
        )


def _found(request: ImageRequest, pulls: Path, report: Report) -> AbstractContextManager[Image]:
    """The image at a path if there is one, else in a registry."""
    architecture = ARCHITECTURES.get(platform.machine())
    if architecture is None:
        accepted = ", ".join(sorted(set(ARCHITECTURES.values())))
        raise ImageUnusable(f"this machine is a {platform.machine()}; images are built for {accepted}")
    path = Path(request.image)
    if path.exists() or request.image.startswith(("/", "./", "../")):
        return opened(path, architecture=architecture, name=request.name, limits=request.limits)
    if request.name is not None:
        raise ImageUnusable(
            "--name chooses among the images at a path; a registry's image has its name in its reference"
        )
    reference = Reference.of(request.image)
    return pulled(
        reference,
        into=pulls,
        architecture=architecture,
        login=login_for(reference.registry, request.docker_config),
        limits=request.limits,
        report=report,
        plain_http=request.plain_http,
    )


def run(chosen: argparse.Namespace, environ: Mapping[str, str], *, lay_init: LayInit = guest_tree) -> int:
    """Do what the command line says; the exit status. `lay_init` provides our init, unless the caller names another."""
    began_s = time.monotonic()
    with ExitStack() as stack:
        try:
            report = stack.enter_context(_watched(sys.stderr, quiet=chosen.quiet))
            init = chosen.init or stack.enter_context(_laid(lay_init))
            built = build(_request(chosen, init, environ), report=report)
        except (ImageUnusable, RegistryUnavailable, LoginUnusable, NoTree) as error:
            stack.close()
            print(f"fc-invoke: {error}", file=sys.stderr)
            return 1
        except OSError as error:
            stack.close()
            print(f"fc-invoke: {error}. A build takes twice the room of the unpacked image.", file=sys.stderr)
            return 1
    manifest, took_s = built.manifest, time.monotonic() - began_s
    how = "was there already" if built.reused else f"built in {took_s:.1f} s"
    print(f"{manifest.image} {how}: {_shown(manifest.size_bytes)}, {manifest.architecture}", file=sys.stderr)
    print(built.rootfs)
    return 0


def _request(chosen: argparse.Namespace, init: Path | None, environ: Mapping[str, str]) -> ImageRequest:
    named = chosen.state_root or environ.get("FC_INVOKE_STATE_ROOT")
    return ImageRequest(
        image=chosen.image,
        name=chosen.name,
        init=init,
        size_bytes=chosen.size,
        state_root=Path(named) if named else default_state_root("fc-invoke", environ),
        docker_config=docker_config_path(environ),
        plain_http=chosen.plain_http,
        limits=Limits(unpacked_bytes=chosen.limit) if chosen.limit is not None else Limits(),
    )


@contextmanager
def _laid(lay_init: LayInit) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fc-invoke-init-") as directory:
        lay_init(Path(directory))
        yield Path(directory)


@contextmanager
def _watched(screen: TextIO, *, quiet: bool) -> Iterator[Report]:
    """Show progress in one line, which is gone afterwards; off a terminal, nothing."""
    if quiet or not screen.isatty():
        yield lambda _: None
        return
    try:
        yield ProgressLine(screen, clock=time.monotonic)
    finally:
        screen.write("\r\x1b[K")
        screen.flush()


class ProgressLine:
    """Progress as one line of a terminal, renewed at most ten times a second."""

    def __init__(self, screen: TextIO, *, clock: Callable[[], float]) -> None:
        self._screen = screen
        self._clock = clock
        self._shown_s = float("-inf")
        self._at: tuple[str, str] | None = None
        self._began_s = 0.0
        self._began_bytes = 0

    def __call__(self, progress: Progress) -> None:
        """Show it, unless the last was shown just now."""
        now_s = self._clock()
        if self._at != (progress.step, progress.item):
            self._at = progress.step, progress.item
            self._began_s, self._began_bytes = now_s, progress.done_bytes
        elif now_s - self._shown_s < _REFRESH_S:
            return
        self._shown_s = now_s
        self._screen.write(f"\r\x1b[K{self._line(progress, now_s)}")
        self._screen.flush()

    def _line(self, progress: Progress, now_s: float) -> str:
        words = [progress.step, progress.item]
        if progress.done_bytes:
            of = f" of {_shown(progress.total_bytes)}" if progress.total_bytes is not None else ""
            words.append(f"{_shown(progress.done_bytes)}{of}")
        if now_s > self._began_s:
            words.append(f"{_shown(int((progress.done_bytes - self._began_bytes) / (now_s - self._began_s)))}/s")
        return "  ".join(words)


def _shown(size_bytes: int) -> str:
    """A size as people read it."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes} B"
