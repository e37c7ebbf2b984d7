"""A developer saves, and the next call runs what was saved; what is wrong is told there and to callers."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from e2e.system import process, started, until
from fc_invoke.files import seen
from real_parts import needs

pytestmark = needs("user-namespaces", "pidfd")


@pytest.fixture
def home(tmp_path):
    """A directory that root's guests may read too."""
    tmp_path.chmod(0o755)
    (tmp_path / "own").mkdir(mode=0o755)
    return tmp_path / "own"


@pytest.fixture
async def serve(home, tmp_path):
    """Serve a source as `app.py`; a client of the daemon that `fc-invoke dev` is, and its process."""
    (tmp_path / "tmp").mkdir()
    environment = {"TMPDIR": str(tmp_path / "tmp"), "SECRET": "of mine"}

    class Serving:
        def __init__(self, source):
            self.save(source)

        def save(self, source, name="app.py"):
            (home / f".{name}").write_text(source)
            (home / f".{name}").rename(home / name)

        async def __aenter__(self):
            arguments = ("dev", "app:app", "--json", "--port=0", "--admin-port=0", "--env=SECRET", "--env=GIVEN=1")
            self._running = process("fc-invoke", *arguments, env=environment, cwd=home)
            self.process = await self._running.__aenter__()
            await started(self.process)
            self.client = httpx.AsyncClient(base_url=self.process.url, timeout=60.0, trust_env=False)
            return self

        async def __aexit__(self, *_):
            await self.client.aclose()
            self.process.signal(signal.SIGINT)
            try:
                assert await self.process.ended() == 0
            finally:
                await self._running.__aexit__(None, None, None)
            assert list((tmp_path / "tmp").iterdir()) == []

        async def call(self, **options):
            return await self.client.post("/invoke/app", **options)

    return Serving


async def test_the_next_call_after_a_save_runs_what_was_saved_warm(serve):
    """However soon it comes; a module that the workload imports counts as much as its own."""
    async with serve("from other import word\ndef app(request):\n    return word") as dev:
        dev.save("word = 'one'", "other.py")
        replies = [await dev.call()]
        for word in ("two", "three"):
            dev.save(f"word = {word!r}", "other.py")
            replies.append(await dev.call())
    assert [reply.text for reply in replies] == ["one", "two", "three"]
    assert {reply.headers["fc-start"] for reply in replies} == {"warm"}


async def test_a_call_that_runs_finishes_on_the_old_code(serve):
    source = "import time\ndef app(request):\n    yield b'old '\n    time.sleep(1)\n    yield b'still old'"
    async with serve(source) as dev, dev.client.stream("POST", "/invoke/app") as running:
        pieces = running.aiter_bytes()
        first = await anext(pieces)
        dev.save("def app(request):\n    return 'new'")
        assert (await dev.call()).text == "new"
        rest = b"".join([piece async for piece in pieces])
    assert first + rest == b"old still old"


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("import nothing_of_the_kind\n", "module 'app' needs 'nothing_of_the_kind', which is not installed"),
        ("def app(request:\n", "SyntaxError: '(' was never closed"),
        (
            "def load():\n    {}['model']\nfrom substrate_guest import App\napp = App(print, prime=load)",
            "KeyError: 'model'",
        ),
        ("app = None", "found NoneType, accepted is an App, a callable or an ASGI application"),
    ],
)
async def test_what_is_broken_is_told_to_terminal_and_callers_and_the_good_version_is_not_used(serve, broken, said):
    """With the author's own traceback and nothing of ours; the next save is served again."""
    async with serve("def app(request):\n    return 'good'") as dev:
        assert (await dev.call()).text == "good"
        dev.save(broken)
        reply = await dev.call()
        dev.save("def app(request):\n    return 'good again'")
        assert (await dev.call()).text == "good again"
    assert (reply.status_code, reply.headers["fc-error"], reply.headers["fc-ran"]) == (503, "boot-failed", "no")
    [told] = {str(event["message"]) for event in dev.process.seen("base.failed")}
    for text in (told, reply.text):
        assert said in text
        assert "substrate_guest/" not in text
        assert "importlib" not in text


async def test_a_mistake_is_told_when_it_is_saved(serve):
    """Nobody has to call for it."""
    async with serve("def app(request):\n    return 'good'") as dev:
        await until(lambda: dev.process.seen("base.built"))
        dev.save("1 / 0")
        await until(lambda: dev.process.seen("base.failed"))


def test_what_it_says_into_a_file_there_is_no_change(home):
    """Or each line of its own would bring about the next."""
    (home / "app.py").write_text("def app(request):\n    return b''")
    with (home / "nohup.out").open("w") as out:
        before = seen(str(home))
        code = f"import sys; from fc_invoke.files import seen; print(len(seen({str(home)!r})), flush=True)"
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert set(before) == {str(home / "app.py"), str(home / "nohup.out")}
    assert (home / "nohup.out").read_text() == "1\n"


async def test_a_log_of_its_own_in_the_folder_it_serves_costs_no_priming(home, tmp_path):
    """Neither its lines nor the calls that they tell of; a save does, once."""
    (tmp_path / "tmp").mkdir()
    (home / "app.py").write_text("def app(request):\n    return 'one'")
    said = home / "dev.log"

    def told(name):
        return [event for event in map(json.loads, said.read_text().split("\n")[:-1]) if event["event"] == name]

    with said.open("w") as log:
        arguments = ["dev", "app:app", "--json", "--port=0", "--admin-port=0"]
        environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
        running = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fc_invoke", *arguments), stdout=log, stderr=log, cwd=home, env=environment
        )
        try:
            await until(lambda: told("daemon.started"), within_s=60)
            url = f"http://{told('daemon.started')[0]['listen']}"
            async with httpx.AsyncClient(base_url=url, timeout=60.0, trust_env=False) as client:
                answers = [(await client.post("/invoke/app")).text for _ in range(3)]
                assert len(told("base.built")) == 1
                (home / "app.py").write_text("def app(request):\n    return 'two'")
                answers += [(await client.post("/invoke/app")).text for _ in range(3)]
                assert len(told("base.built")) == 2
        finally:
            running.send_signal(signal.SIGINT)
            assert await running.wait() == 0
    assert answers == ["one"] * 3 + ["two"] * 3
    assert len(said.read_text().splitlines()) > 12


def test_what_a_daemon_says_into_a_file_of_a_workload_makes_no_other_base(home):
    """A reload would prime anew all that have its log below their `path`; what others write there counts."""
    (home / "app.py").write_text("def app(request):\n    return b''")
    code = (
        "import sys\nfrom substrate_node.procvm.inputs import Inputs\n"
        "inputs, about = Inputs(), {'interpreter': sys.executable, 'argv': (), 'env': {}, 'memory_mib': 64}\n"
        "for _ in range(2):\n    print(inputs.key(sys.argv[1], **about), flush=True)\n"
        "open(sys.argv[1] + '/other.log', 'w').close()\nprint(inputs.key(sys.argv[1], **about))"
    )
    with (home / "nohup.out").open("w") as out:
        subprocess.run([sys.executable, "-c", code, str(home)], stdout=out, check=True)
    before, after, with_another = (home / "nohup.out").read_text().split()
    assert before == after != with_another


async def test_a_file_that_changes_all_the_time_is_told(serve, home):
    async with serve("def app(request):\n    return 'good'") as dev:
        primed = 0

        def write_and_look():
            nonlocal primed
            if len(dev.process.seen("base.built")) > primed:
                primed = len(dev.process.seen("base.built"))
                (home / "log").write_text(str(primed))
            return [event for event in dev.process.seen("warning.raised") if "changes all the time" in str(event)]

        await until(write_and_look, within_s=60)
        [told] = write_and_look()
        assert str(home / "log") in told["message"]
        assert (await dev.call()).text == "good"


async def test_guests_have_the_variables_that_were_asked_for_and_no_others(serve):
    source = "import os\ndef app(request):\n    return [os.environ.get(n) for n in ('SECRET', 'GIVEN', 'TMPDIR')]"
    async with serve(source) as dev:
        assert (await dev.call()).json() == ["of mine", "1", "/tmp"]


async def test_what_a_killed_one_left_goes_at_the_next_start_and_nothing_else(home, tmp_path):
    """What is in use stays, and what has no lock yet, and whatever a link leads to."""
    (home / "app.py").write_text("def app(request):\n    return b''")
    place = tmp_path / "tmp"
    (place / "fc-invoke-dev-begun").mkdir(parents=True, mode=0o700)
    (tmp_path / "linked").mkdir(mode=0o700)
    (tmp_path / "linked" / "lock").write_text("1\n")
    (place / "fc-invoke-dev-link").symlink_to(tmp_path / "linked")

    def serving():
        arguments = ("dev", "app:app", "--json", "--port=0", "--admin-port=0")
        return process("fc-invoke", *arguments, env={"TMPDIR": str(place)}, cwd=home)

    async with serving() as used:
        await started(used)
        in_use = set(place.iterdir())
        async with serving() as killed:
            await until(lambda: killed.seen("base.built"), within_s=30)
        [left] = set(place.iterdir()) - in_use
        async with serving() as next_one:
            await started(next_one)
            there = set(place.iterdir())
            assert left not in there
            assert in_use < there
            assert (tmp_path / "linked" / "lock").exists()
            async with httpx.AsyncClient(timeout=60.0, trust_env=False) as client:
                assert (await client.post(f"{used.url}/invoke/app")).status_code == 200


def run(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "fc_invoke", "dev", *arguments],
        env={"PATH": os.environ["PATH"]},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stderr


def test_everything_that_is_wrong_is_told_at_once_one_line_each(home):
    """Before anything is started, and in no words of Python's."""
    (home / "app.py").write_text("def app(request):\n    return b''")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, told = run("ap:app", f"--port={port}", "--admin-port=70000", "--env=NOT_SET", "--name=a b", cwd=home)
    assert status == 2
    assert [line.removeprefix("fc-invoke dev: ") for line in told.splitlines()] == [
        f"no module 'ap' in {home}; the nearest is 'app'",
        "--name: found 'a b', accepted are letters, digits, '.', '_' and '-'",
        "--env: found 'NOT_SET', accepted is NAME=VALUE, or the name of a variable that is set here",
        f"--port: cannot listen on 127.0.0.1:{port}: another process listens there already. Stop it, or choose another "
        "address",
        "--admin-port: found 70000, accepted is a number up to 65535",
    ]


@needs("root")
def test_a_directory_that_guests_of_root_cannot_read_is_told_with_the_cure(home):
    (home / "app.py").write_text("def app(request):\n    return b''")
    home.chmod(0o700)
    status, told = run("app:app", "--port=0", "--admin-port=0", cwd=home)
    assert (status, f"Run `chmod o+rx {home}`" in told) == (2, True)


def test_a_terminal_shows_a_line_for_each_call_below_what_its_guest_printed(home):
    """Status, how the guest was started, milliseconds, and the id to ask more about."""
    (home / "app.py").write_text("def app(request):\n    print('from within')\n    return 1 / int(request.body)")
    with subprocess.Popen(
        [sys.executable, "-m", "fc_invoke", "dev", "app:app", "--port=0", "--admin-port=0"],
        env={"PATH": os.environ["PATH"]},
        cwd=home,
        stdout=subprocess.PIPE,
        text=True,
    ) as dev:
        try:
            url = next(word for line in dev.stdout for word in line.split() if word.startswith("http:"))
            reply = httpx.post(url, content=b"0", timeout=60.0, trust_env=False)
        finally:
            dev.send_signal(signal.SIGINT)
        shown = dev.stdout.read()
    assert dev.returncode == 0
    before, _, after = shown.partition("  | from within\n")
    assert "ready: calls start warm" in before
    assert after.splitlines()[-2].strip() == "| ZeroDivisionError: division by zero"
    status, start, _, ms, invocation_id = after.splitlines()[-1].split()
    assert (status, start, ms, invocation_id) == ("502", "warm", "ms", reply.headers["fc-invocation-id"])
