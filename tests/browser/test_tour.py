"""The guided tour shows what there is: its pictures look like the page, and its terminal reads like `top`."""

import re

import pytest
import pytest_asyncio

from browser import tour
from browser.chromium import chromium
from real_parts import needs

HOW = "run `PYTHONPATH=tests uv run python tests/browser/tour.py`, and look at the pictures"
ALIKE = 3.0
"""On the average of all cells, of 255: other proportional letters come to 2.1 at most, another scene to 9 at least."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser(tmp_path_factory):
    async with chromium(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shown(browser):
    """What the pictures of the tour look like."""
    tab = await browser.tab()
    return {each: await tour.look(tab, (tour.PICTURES / f"{each}.png").read_bytes()) for each in tour.SHOTS}


@needs("chromium")
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", tour.SHOTS)
async def test_a_picture_of_the_tour_looks_like_the_page_and_like_no_other_picture(name, browser, shown):
    """In width, nearly in height, and from afar; what letters a machine has is its own business."""
    picture = await tour.shoot(browser, tour.SHOTS[name])
    async with browser.stranger() as tab:
        now = await tour.look(tab, picture)
    assert now.width == shown[name].width
    assert now.height == pytest.approx(shown[name].height, rel=0.05), HOW
    apart = {each: now.differs_from(other) for each, other in shown.items()}
    assert apart.pop(name) < ALIKE, HOW
    assert min(apart.values()) > ALIKE, f"{apart}: the pictures can't be told apart"


def test_the_terminal_in_the_tour_is_what_top_draws():
    assert tour.shown() == tour.terminal(), HOW


def test_the_tour_shows_every_picture_and_every_picture_is_small():
    shown = set(re.findall(r"\]\(tour/(\w+)\.png\)", tour.TOUR.read_text()))
    assert shown == set(tour.SHOTS) == {picture.stem for picture in tour.PICTURES.iterdir()}
    assert max(picture.stat().st_size for picture in tour.PICTURES.iterdir()) < 100_000
