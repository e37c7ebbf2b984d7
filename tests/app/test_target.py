"""A mistake in `module:attribute` is found by reading, if it can be; whatever only running shows is left to running."""

import pytest

from fc_invoke.target import mistakes

SOURCE = """
import os as system
from pathlib import Path
if True:
    def early(request): ...
for late in (print,):
    pass
class App: ...
app = App()
data = {"a": 1}
"""


@pytest.fixture
def here(tmp_path):
    (tmp_path / "app.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def app(:")
    (tmp_path / "hiding.py").write_text("globals()['made'] = print")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/__init__.py").write_text("from os import *")
    (tmp_path / "pack/web.py").write_text("app = print")
    return tmp_path


@pytest.mark.parametrize(
    "target",
    [
        "app:app", "app:app.deep", "app:system", "app:Path", "app:early", "app:late", "app:App", "broken:app",
        "hiding:made", "pack:getcwd", "pack.web:app", "json:dumps", "zlib:crc32", "time:time",
    ],
)  # fmt: skip
def test_what_may_be_right_is_left_to_running(here, target):
    assert mistakes(target, here) == []


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("app", "found 'app', accepted is MODULE:ATTRIBUTE, for example app:app"),
        ("app.py:app", "no module 'app.py' in {here}; the nearest is 'app'"),
        ("./app:app", "found './app:app', accepted is MODULE:ATTRIBUTE, for example app:app"),
        ("ap:app", "no module 'ap' in {here}; the nearest is 'app'"),
        ("pack.wep:app", "no module 'pack.wep' in {here}; the nearest is 'pack'"),
        ("app:ap", "{here}/app.py has no 'ap'; the nearest is 'app'"),
        ("app:data", "'data' of {here}/app.py is data; accepted is a function, an App or an ASGI application"),
    ],
)
def test_what_is_surely_wrong_is_one_line(here, target, said):
    assert mistakes(target, here) == [said.format(here=here)]


def test_a_directory_that_is_none_is_told_beside_a_malformed_target(tmp_path):
    assert len(mistakes("app", tmp_path / "nowhere")) == 2
