"""What the guided tour shows, made from the code: `PYTHONPATH=tests uv run python tests/browser/tour.py` writes it."""

from __future__ import annotations

import asyncio
import base64
import re
import struct
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC
from pathlib import Path
from typing import NamedTuple

from browser.chromium import Browser, Tab, chromium
from browser.scene import FAILED, Scene
from fc_invoke.drawing import drawn
from service.loopback import served

TOUR = Path(__file__).parents[2] / "docs" / "tour.md"
PICTURES = TOUR.with_name("tour")
_TERMINAL = re.compile(r"(?<=<!-- top: begin -->\n).*?(?=<!-- top: end -->)", re.DOTALL)
_GRID = 48


class Shot(NamedTuple):
    """A scene, how its reader likes it, and what they do before they look."""

    scene: Callable[[], Scene]
    scheme: str
    act: tuple[str, str] | None = None


SHOTS = {
    "fleet": Shot(Scene, "light"),
    "trouble": Shot(lambda: Scene(trouble=True), "dark"),
    "story": Shot(
        lambda: Scene(trouble=True),
        "light",
        (f"document.querySelector('[aria-label$=\"{FAILED}\"]').click()", "at('story-events').children.length > 3"),
    ),
    "laptop": Shot(lambda: Scene(alone=True), "light"),
}


async def shoot(browser: Browser, shot: Shot) -> bytes:
    """The page of a scene as PNG, 1180 pixels wide."""
    async with served(shot.scene().app()) as site:
        tab = await browser.tab()
        await tab.prefer(shot.scheme)
        await tab.open(f"http://127.0.0.1:{site.port}/")
        await tab.until("!at('main').hidden && at('state').innerText === 'ready' && turn > 0 && !asking")
        if shot.act is not None:
            await tab.value(shot.act[0])
            await tab.until(shot.act[1])
        picture = await tab.picture()
        assert tab.complaints == []
        await tab.do("Page.close")
        return picture


class Look(NamedTuple):
    """What a picture looks like from afar: its size in pixels, and a grid of its colours."""

    width: int
    height: int
    grid: list[int]

    def differs_from(self, other: Look) -> float:
        """How far the two are apart, from 0 to 255, on the average of all cells."""
        return sum(abs(a - b) for a, b in zip(self.grid, other.grid, strict=True)) / len(self.grid)


async def look(tab: Tab, picture: bytes) -> Look:
    """Look at a PNG from afar."""
    return Look(*await tab.value(_drawn(picture, f"""
        const small = new OffscreenCanvas({_GRID}, {_GRID}).getContext('2d');
        small.imageSmoothingQuality = 'high';
        small.drawImage(image, 0, 0, {_GRID}, {_GRID});
        return [image.width, image.height, [...small.getImageData(0, 0, {_GRID}, {_GRID}).data]];
    """)))  # fmt: skip


async def small(tab: Tab, picture: bytes) -> bytes:
    """The same picture as a PNG of few bytes: it has at most 256 colours."""
    pixels = await tab.value(_drawn(picture, """
        const whole = new OffscreenCanvas(image.width, image.height).getContext('2d');
        whole.drawImage(image, 0, 0);
        const blob = new Blob([whole.getImageData(0, 0, image.width, image.height).data]);
        const url = await new Promise(done => {
          const reader = new FileReader();
          reader.onload = () => done(reader.result);
          reader.readAsDataURL(blob);
        });
        return url.split(',')[1];
    """))  # fmt: skip
    width, height = struct.unpack_from(">II", picture, 16)
    return _png(width, height, memoryview(base64.b64decode(pixels)).cast("I"))


def _drawn(picture: bytes, then: str) -> str:
    return f"""(async () => {{
        const image = new Image();
        image.src = 'data:image/png;base64,{base64.b64encode(picture).decode()}';
        await image.decode();
        {then}
    }})()"""


def _png(width: int, height: int, pixels: memoryview) -> bytes:
    """A PNG with a palette of the commonest colours; the others become the nearest of these."""
    counts = Counter(pixels)
    palette = [colour for colour, _ in counts.most_common(256)]
    place_of = {colour: place for place, colour in enumerate(palette)}
    for colour in counts.keys() - place_of.keys():
        place_of[colour] = min(range(256), key=lambda place, colour=colour: _distance(palette[place], colour))
    places = bytes(map(place_of.__getitem__, pixels))
    rows = b"".join(b"\0" + places[y * width : (y + 1) * width] for y in range(height))
    colours = b"".join(colour.to_bytes(4, "little")[:3] for colour in palette)
    head = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"PLTE", colours), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def _distance(one: int, other: int) -> int:
    return sum(abs(a - b) for a, b in zip(one.to_bytes(4, "little"), other.to_bytes(4, "little"), strict=True))


def terminal() -> str:
    """`fc-invoke top` beside the page in trouble, as a block of Markdown."""
    lines = drawn(Scene(trouble=True).snapshot(), columns=110, lines=40, zone=UTC)
    return "\n".join(["```text", *lines, "```", ""])


def shown() -> str:
    """The block that the tour has now."""
    (block,) = _TERMINAL.findall(TOUR.read_text())
    return str(block)


async def _shots(directory: Path) -> Iterator[tuple[str, bytes]]:
    async with chromium(directory) as browser:
        tab = await browser.tab()
        return iter([(name, await small(tab, await shoot(browser, shot))) for name, shot in SHOTS.items()])


def main() -> None:
    """Write the pictures and the block."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        for name, picture in asyncio.run(_shots(Path(directory))):
            (PICTURES / f"{name}.png").write_bytes(picture)
    TOUR.write_text(_TERMINAL.sub(lambda _: terminal(), TOUR.read_text()))


if __name__ == "__main__":
    main()
