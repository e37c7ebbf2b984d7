"""`fc-invoke audit`: run the truth audit and tell what came of it."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

from fc_invoke.audit import Answer, AuditImpossible, Load, Violation, audit
from fc_invoke.client import Unreachable, check_url


def run(
    urls: Sequence[str],
    journals: Sequence[str],
    *,
    workload: str,
    calls: int,
    at_once: int,
    seed: int,
    token: str | None,
    admin_token: str | None,
) -> int:
    """Audit and report. 0 when every answer was the truth, 1 when one was not. Raises `Unreachable`."""
    for url in (*urls, *journals):
        check_url(url)
    load = Load(workload=workload, calls=calls, at_once=at_once, dice=Random(seed))  # noqa: S311  # a seed, to replay
    impossible: list[BaseException] = []
    try:
        answers, violations = asyncio.run(
            audit(urls, journals, load, token=token, admin_token=admin_token, progress=counting(calls, "calls"))
        )
    except* AuditImpossible as group:  # what is raised here would be wrapped again by Python before 3.11.4
        impossible += group.exceptions
    if impossible:
        raise Unreachable(str(impossible[0])) from None
    print(told(answers, violations))
    return 1 if violations else 0


def told(answers: Sequence[Answer], violations: Sequence[Violation]) -> str:
    """What callers did and were told, and every lie among it."""
    kinds = Counter((answer.behaviour, _outcome(answer)) for answer in answers)
    lines = [f"{count:>6}  {behaviour:<10} {outcome}" for (behaviour, outcome), count in sorted(kinds.items())]
    lines.append(f"{len(answers)} calls, {len(violations)} answers that were not the truth")
    lines += [f"  {violation.invocation_id}: {violation.words}" for violation in violations]
    return "\n".join(lines)


def _outcome(answer: Answer) -> str:
    if not answer.status:
        return "left before it was told anything"
    if answer.ran:
        return f"{answer.status}, ran: {answer.ran}"
    return f"{answer.status} from a guest" + ("" if answer.whole else ", cut short")


def counting(total: int, noun: str) -> Callable[[int], None]:
    """Show on a terminal how many of so many are done, in a line that is written over by what comes next."""

    def show(done: int) -> None:
        if sys.stderr.isatty() and (done % 10 == 0 or done == total):
            print(f"\r{done} of {total} {noun}", end="\r", file=sys.stderr, flush=True)

    return show
