"""The fixture `substrate` in somebody's own tests: real guests, receipts, and consoles beside what failed."""

import asyncio
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from e2e.system import processes_marked, until
from real_parts import needs

ROOT = Path(__file__).parents[2]

pytestmark = needs("user-namespaces", "pidfd")

APP = """
import os, time
from substrate_guest import Response

def app(request):
    print("asked for", request.session)
    match request.session:
        case "fail":
            raise ValueError("on purpose")
        case "late":
            time.sleep(30)
        case "pieces":
            return iter([b"one ", b"two"])
    made = os.path.exists("/tmp/made")
    open("/tmp/made", "w").close()
    return {"made": made, "body": request.body.decode(), "given": os.environ.get("GIVEN"), "at": request.target}
"""

TESTS = """
import pytest
from fc_invoke.testing import NotStarted

@pytest.fixture(scope="module")
def app(substrate):
    return substrate.serve("app:app", timeout_s=1, env={"GIVEN": "1"})

def test_each_call_has_a_guest_of_its_own(app):
    one, two = app.post(json={"a": 1}), app.post(session="s/t", content=b"x")
    assert one.json() == {"made": False, "body": '{"a":1}', "given": "1", "at": "/invoke"}
    assert two.json() == {"made": False, "body": "x", "given": "1", "at": "/invoke/s/t"}
    assert one.receipt.guest != two.receipt.guest
    assert app.get("/any?q=1").json()["at"] == "/any?q=1"

def test_a_receipt_says_what_a_call_took(app):
    reply = app.post()
    assert (reply.receipt.start, reply.receipt.isolation) == ("warm", "process")
    assert reply.receipt.total_ms >= reply.receipt.guest_ms > 0
    assert reply.console == "asked for None"

def test_errors_are_replies_too(app):
    failed = app.post(session="fail")
    assert (failed.status_code, failed.error) == (502, None)
    late = app.post(session="late")
    assert (late.status_code, late.error, late.ran) == (504, "guest-timeout", "maybe")

def test_a_reply_can_be_read_as_it_comes(app):
    with app.stream("POST", session="pieces") as response:
        assert b"".join(response.iter_bytes()) == b"one two"
    assert app.calls[-1].receipt.guest is not None

def test_what_is_served_stays_for_as_long_as_was_asked_for(app, substrate):
    assert substrate.serve("app:app", timeout_s=1, env={"GIVEN": "1"}) is app

def test_what_does_not_start_is_an_error_with_its_traceback(substrate):
    with pytest.raises(NotStarted, match="ZeroDivisionError"):
        substrate.serve("broken:app").post()

def test_what_is_not_there_is_an_error_at_once(substrate):
    with pytest.raises(NotStarted, match="no module 'ap'"):
        substrate.serve("ap:app")
"""

FAILS = """
import httpx, pytest

def test_wrong(substrate):
    global url
    served = substrate.serve("app:app")
    url = served.url
    assert served.post(session="fail").status_code == 200

def test_what_the_test_before_served_is_gone():
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)
"""


@pytest.fixture
def project(pytester):
    """A project of somebody's, whose tests run in a process of their own, with this one's plugins but ours alone."""
    home = pytester.path
    home.parent.chmod(0o755)
    home.chmod(0o755)
    pytester.makeini("[pytest]")  # so that this is its root
    (home / "app.py").write_text(APP)
    (home / "broken.py").write_text("app = 1 / 0")

    def run(tests, *options):
        (home / "test_it.py").write_text(tests)
        return pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options)

    return run


def test_somebodys_tests_pass(project):
    """The story of the fixture, as the tests above tell it."""
    project(TESTS, "-o", "substrate_scope=module").assert_outcomes(passed=7)


def test_a_failure_shows_what_the_guests_printed_and_nothing_outlives_the_test(project):
    """With the author's traceback, and the id to ask more about."""
    result = project(FAILS)
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(
        [
            "*calls of guests*",
            "POST /invoke/app/fail -> 502, warm start, *",
            "  | asked for fail",
            '  |   File "*app.py", line *, in app',
            "  | ValueError: on purpose",
        ]
    )


async def test_what_is_served_ends_with_who_asked_for_it_even_if_that_was_killed(tmp_path):
    """Daemon, zygote and files: nothing can be cleaned up by whoever is killed."""
    tmp_path.chmod(0o755)
    home, place = tmp_path / "own", tmp_path / "tmp"
    home.mkdir(mode=0o755)
    place.mkdir()
    (home / "app.py").write_text(APP)
    code = (
        "import pathlib, signal\n"
        "from fc_invoke.testing import Served\n"
        "with Served('app:app', path=pathlib.Path.cwd()) as app:\n"
        "    print(app.post().status_code, flush=True)\n"
        "    signal.pause()\n"
    )
    asked = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        env={"PATH": os.environ["PATH"], "TMPDIR": str(place)},
        cwd=home,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert await asked.stdout.readline() == b"200\n"
        assert len(processes_marked(f"TMPDIR={place}")) > 1
        assert list(place.iterdir())
    finally:
        asked.kill()
        await asked.wait()
    await until(lambda: not processes_marked(f"TMPDIR={place}"), within_s=30)
    assert list(place.iterdir()) == []


def test_the_example_of_the_readme_passes(project, pytester):
    """As it stands there, with the greeter of the examples."""
    readme = (ROOT / "apps/fc-invoke/README.md").read_text()
    [example] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    shutil.copy(ROOT / "examples/greeter/greeter.py", pytester.path)
    project(example).assert_outcomes(passed=1)


def test_a_scope_that_is_none_is_told_with_what_is_accepted(project):
    result = project("def test(substrate): ...", "-o", "substrate_scope=forever")
    assert "found 'forever', accepted are function, class" in result.stdout.str() + result.stderr.str()
