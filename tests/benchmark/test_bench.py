"""The benchmark measures what it says, at a size that takes seconds; how fast anything is, is not tested here."""

import math
import xml.etree.ElementTree as ET

import msgspec
import pytest

from bench import __main__ as command
from bench import conditions, load, plot, results
from bench.results import Figure, Notebook, Outcome
from bench.scenarios import Size, all_scenarios
from real_parts import PARTS, needs

TINY = Size(repeats=2, calls=20, streams=10, workloads=5, waiting=20, clones=2, large_replies=1)
PART_OF = {"nginx": "nginx", "bwrap": "bubblewrap"}


def _each_scenario():
    for scenario in all_scenarios().values():
        marks = [needs(PART_OF[program]) for program in scenario.programs]
        if scenario.name in {"fresh", "parked"}:
            marks.append(needs("user-namespaces"))
        yield pytest.param(scenario, id=scenario.name, marks=marks)


@pytest.mark.parametrize("scenario", [*_each_scenario()])
def test_every_scenario_measures_both_sides(scenario, tmp_path):
    """Each figure has its samples, and none of them is out of this world."""
    outcome = scenario.run(tmp_path, TINY)
    assert outcome.scenario == scenario.name
    assert outcome.figures
    for figure in outcome.figures:
        assert figure.samples
        assert all(math.isfinite(sample) and abs(sample) < 1e6 for sample in figure.samples), figure
    for row in outcome.rows:
        assert len(row.samples) >= TINY.repeats
        assert row.quantity.rpartition(", ")[1], "a quantity has a unit"


def test_every_program_that_a_scenario_needs_can_be_installed_by_its_package():
    programs = {program for scenario in all_scenarios().values() for program in scenario.programs}
    assert programs <= command.PACKAGES.keys()
    assert {command.PACKAGES[program] for program in programs} == {PARTS[PART_OF[each]].package for each in programs}


def test_ratios_are_taken_repeat_by_repeat():
    """A disturbance of one repeat, which slows both sides, is none of the ratio."""
    notes = Notebook()
    for disturbed in (1.0, 9.0):
        notes.note("ours", {"p50, µs": 200.0 * disturbed})
        notes.note("theirs", {"p50, µs": 100.0 * disturbed})
    figure = notes.ratio("p50", "p50, µs", ("ours", "theirs"), at_most=1.8)
    assert figure.samples == [2.0, 2.0]
    assert figure.verdict == "missed"


@pytest.mark.parametrize(
    ("samples", "target", "at_most", "verdict"),
    [
        ([1.0, 2.0, 9.0], 2.0, True, "reached"),
        ([1.0, 2.1, 9.0], 2.0, True, "missed"),
        ([0.3, 0.2, 0.1], 0.2, False, "reached"),
        ([0.3, 0.2, 0.1], 0.25, False, "missed"),
        ([5.0], None, True, ""),
    ],
)
def test_a_figure_is_judged_by_its_median(samples, target, at_most, verdict):
    assert Figure("x", "x", samples, target=target, at_most=at_most).verdict == verdict


OUTCOME = Outcome(
    "exchange",
    "What & how.",
    [results.Row("ours", "p50, µs", [1234.0, 1200.0, 1300.0])],
    [Figure("p50 < nginx", "x", [1.5, 1.2, 2.5], target=1.8), Figure("rate", "x", [0.5])],
)


def test_a_reader_sees_median_spread_and_target():
    text = results.as_text(OUTCOME)
    assert "| p50 < nginx | 1.50 (1.20-2.50) x | ≤ 1.8 | reached |" in text
    assert "| ours | 1,234 (1,200-1,300) |" in text


def test_the_drawing_is_an_svg_with_a_bar_for_each_figure_and_a_mark_for_each_target():
    drawing = ET.fromstring(plot.drawn([OUTCOME]))
    tags = [element.tag.rpartition("}")[2] for element in drawing.iter()]
    assert tags.count("rect") == 1 + 2
    assert len([each for each in drawing.iter() if each.get("class") == "g"]) == 1
    assert "p50 < nginx" in [element.text for element in drawing.iter()]


@pytest.mark.parametrize(
    "reply",
    [b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\nfc-node: x\r\n\r\n"],
)
def test_a_server_that_fails_is_not_taken_for_a_fast_one(reply):
    with pytest.raises(load.Wrong):
        load._whole(reply)


def test_a_reply_is_whole_with_its_last_byte_and_not_before():
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
    assert [load._whole(reply[:cut]) for cut in range(1, len(reply) + 1)] == [False] * (len(reply) - 1) + [True]


def test_a_busy_machine_is_told_loudly(capsys):
    now = conditions.conditions()
    conditions.warn_if_loaded(msgspec.structs.replace(now, load_average=0.0))
    assert not capsys.readouterr().err
    conditions.warn_if_loaded(msgspec.structs.replace(now, load_average=2.0 * now.cores))
    assert "busy" in capsys.readouterr().err


def test_a_run_keeps_its_results_with_their_conditions_and_draws_them(tmp_path, capsys):
    """The command runs what it is asked to, and what it wrote can be read again."""
    assert command.main(["restore-microvm", "--clones", "2", "--repeats", "1", "--output", str(tmp_path)]) == 0
    kept = msgspec.json.decode((tmp_path / "results.json").read_bytes())
    assert kept["conditions"]["cores"] >= 1
    assert [outcome["scenario"] for outcome in kept["outcomes"]] == ["restore-microvm"]
    assert kept["size"]["clones"] == 2
    assert ET.parse(tmp_path / "results.svg").getroot().tag.endswith("svg")
    assert "## restore-microvm" in capsys.readouterr().out


def test_what_cannot_be_measured_here_is_said_and_fails_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command.main(["reply", "--output", str(tmp_path / "kept")]) == 1
    assert "apt-get install nginx-light" in capsys.readouterr().out
