"""`uv run python -m bench [SCENARIO …]`: measure, print, and keep the results and a drawing of them."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench import conditions, plot, results
from bench.scenarios import Scenario, Size, all_scenarios

PACKAGES = {"nginx": "nginx-light", "bwrap": "bubblewrap"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; 0 if all of it could be, 1 if something was left out."""
    scenarios = all_scenarios()
    chosen = _parser(scenarios).parse_args(arguments)
    size = Size(
        **{field: value for field in Size.__struct_fields__ if (value := getattr(chosen, field, None)) is not None}
    )
    now = conditions.conditions()
    conditions.warn_if_loaded(now)
    print(conditions.as_text(now))
    outcomes, left_out = [], False
    for name in chosen.scenarios or scenarios:
        if absent := [program for program in scenarios[name].programs if shutil.which(program) is None]:
            left_out = True
            packages = " ".join(PACKAGES[program] for program in absent)
            print(f"## {name}\n\nLeft out: it needs {', '.join(absent)} (Debian: apt-get install {packages}).\n")
            continue
        outcome = _run(scenarios[name], size)
        print(results.as_text(outcome))
        outcomes.append(outcome)
    _keep(chosen.output, now, size, outcomes)
    return int(left_out)


def _run(scenario: Scenario, size: Size) -> results.Outcome:
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        return scenario.run(Path(home), size)


def _keep(output: Path, now: conditions.Conditions, size: Size, outcomes: list[results.Outcome]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    everything = {"conditions": now, "size": size, "outcomes": outcomes}
    (output / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode(everything)) + b"\n")
    (output / "results.svg").write_text(plot.drawn(outcomes))
    print(f"Kept in {output / 'results.json'} and {output / 'results.svg'}.")


def _parser(scenarios: dict[str, Scenario]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(scenarios)}; default: all")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), help="a directory (default: %(default)s)")
    for field, default in zip(Size.__struct_fields__, Size.__struct_defaults__, strict=True):
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, metavar="N", help=f"(default: {default})")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of every `with`, so that no server is left
    sys.exit(main())
