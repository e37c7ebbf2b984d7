"""Who may call: tokens of which the daemon knows only hashes."""

import hashlib
import signal

from e2e.system import until
from real_parts import needs

pytestmark = needs("user-namespaces", "pidfd")


def line(name, token):
    """A caller as the token file has it."""
    return f"{name} sha256:{hashlib.sha256(token.encode()).hexdigest()}\n"


async def status(running, workload, token=None):
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return (await running.invoke(workload, body=b"x", headers=headers)).status_code


async def test_only_callers_with_a_token_reach_a_guest(start, table, tmp_path):
    """No token, a wrong one, a right one, and one that the workload's `callers` leaves out; a reload lets more in."""
    tokens = tmp_path / "tokens"
    tokens.write_text("# who may call\n" + line("ci", "secret-of-ci") + line("web", "secret-of-web"))
    table["parked"]["callers"] = ["ci"]
    async with start(TOKENS_FILE=str(tokens)) as running:
        assert await status(running, "echo") == 401
        assert await status(running, "echo", "guess") == 401
        assert await status(running, "echo", "secret-of-web") == 200
        assert await status(running, "parked", "secret-of-web") == 403
        assert await status(running, "parked", "secret-of-ci") == 200
        tokens.write_text(line("new", "secret-of-new"))
        loaded = len(running.front.seen("catalog.loaded"))
        running.front.signal(signal.SIGHUP)
        await until(lambda: len(running.front.seen("catalog.loaded")) > loaded)
        assert await status(running, "echo", "secret-of-ci") == 401
        assert await status(running, "echo", "secret-of-new") == 200
        tokens.write_text("nonsense")
        running.front.signal(signal.SIGHUP)
        await until(lambda: running.front.seen("warning.raised"))
        assert await status(running, "echo", "secret-of-new") == 200
        assert {caller for _, caller in acted(running)} == {"ci", "web", "new"}


def acted(running):
    """Which caller each invocation was accounted to."""
    return [(event["invocation_id"], event["caller"]) for event in running.front.seen("invocation.accepted")]
