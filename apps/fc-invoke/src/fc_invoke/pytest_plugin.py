"""The fixture `substrate`, for your own tests of a workload. pytest finds it where this wheel is installed.

    def test_it_greets(substrate):
        reply = substrate.serve("greeter:app").post(session="ada")
        assert reply.json() == {"greeting": "Hello, ada!"}
        assert reply.receipt.start == "warm"

Nothing outlives the test. With `substrate_scope = session` in the configuration what is served stays for all tests, and
still each call has a guest of its own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Literal, get_args

import pytest

if TYPE_CHECKING:
    from fc_invoke.testing import Substrate

Scope = Literal["function", "class", "module", "package", "session"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the configuration say how long what is served is kept."""
    parser.addini("substrate_scope", "how long the fixture `substrate` keeps what it serves", default="function")


def _scope(fixture_name: str, config: pytest.Config) -> Scope:
    found: str = config.getini("substrate_scope")
    for scope in SCOPES:
        if scope == found:
            return scope
    raise pytest.UsageError(f"substrate_scope: found {found!r}, accepted are {', '.join(SCOPES)}")


@pytest.fixture(scope=_scope)
def substrate(pytestconfig: pytest.Config) -> Iterator[Substrate]:
    """Serve your workloads: `substrate.serve("module:attribute").post(json=…)`, each call in a guest of its own."""
    from fc_invoke.testing import Substrate

    # Without a file of configuration pytest takes for its root whatever directory the tests have in common.
    root = pytestconfig.rootpath if pytestconfig.inipath is not None else pytestconfig.invocation_params.dir
    served = Substrate(root)
    try:
        yield served
    finally:
        served.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show beside a failure the calls of its test, and what their guests printed."""
    report = yield
    substrate: Substrate | None = getattr(item, "funcargs", {}).get("substrate")
    if substrate is None or not hasattr(substrate, "calls"):
        return report
    if report.failed and substrate.calls:
        report.sections.append(("calls of guests", "\n".join(map(str, substrate.calls))))
    if report.when == "teardown":
        substrate.calls.clear()
    return report
