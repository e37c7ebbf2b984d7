"""What `module:attribute` may name."""

import sys

import pytest

from substrate_guest import App
from substrate_guest.asgi import AsgiWorkload
from substrate_guest.callables import CallableWorkload
from substrate_guest.loading import NotAWorkload, adapted, load


async def asgi(scope, receive, send): ...


class AsgiInstance:
    async def __call__(self, scope, receive, send): ...


@pytest.mark.parametrize("found", [asgi, AsgiInstance()])
def test_three_arguments_make_an_asgi_application(found):
    assert isinstance(adapted(found), AsgiWorkload)


@pytest.mark.parametrize(
    "found", [lambda request: b"", lambda *args: b"", lambda request, flag=1: b"", App(print), bytes]
)
def test_one_argument_makes_a_handler(found):
    assert isinstance(adapted(found), CallableWorkload)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (7, "found int, accepted is an App, a callable or an ASGI application"),
        (App(), "no handler"),
        (lambda: b"", "neither one argument"),
        (lambda a, b: b"", "nor three"),
    ],
)
def test_what_cannot_be_served_says_what_can(found, says):
    with pytest.raises(NotAWorkload, match=says):
        adapted(found)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("handlers", "accepted is module:attribute"),
        (":app", "accepted is module:attribute"),
        ("handlers:", "accepted is module:attribute"),
        ("no_such_module_here:app", "no module 'no_such_module_here' in "),
        ("substrate_guest.nowhere:app", "no module 'substrate_guest.nowhere'"),
        ("substrate_guest.workloads.echo:nothing", "has no 'nothing'"),
        ("substrate_guest.workloads.echo:app.nothing", r"has no 'app\.nothing'"),
        ("broken_module:app", "failed: ZeroDivisionError"),
        ("exiting_module:app", "failed: SystemExit"),
        ("needy_module:app", "needs 'no_such_module_here', which is not installed"),
    ],
)
def test_a_target_that_names_nothing_says_so_in_one_line(target, says, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_module.py").write_text("1 / 0")
    (tmp_path / "exiting_module.py").write_text("raise SystemExit(3)")
    (tmp_path / "needy_module.py").write_text("import no_such_module_here")
    with pytest.raises(NotAWorkload, match=says) as refused:
        load(target)
    assert "\n" not in str(refused.value)


def test_an_attribute_may_be_inside_another(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "nested_module.py").write_text("class site:\n    @staticmethod\n    def app(request): return b''\n")
    assert isinstance(load("nested_module:site.app"), CallableWorkload)
    del sys.modules["nested_module"]
