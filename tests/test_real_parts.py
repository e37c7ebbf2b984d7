"""A run tells honestly which parts of the machine it lacked, and a full run insists on them."""

from itertools import islice

import hypothesis
import pytest

import real_parts
from real_parts import Part, needs

ONE_TEST = """
from real_parts import needs

@needs("unobtainium")
def test_that_needs_it():
    pass

def test_that_needs_nothing():
    pass
"""
SAID = "absent: unobtainium; tests left out: 1; to have them, look elsewhere"


@pytest.fixture
def machine(monkeypatch, pytester):
    """A run of two tests on a machine that lacks unobtainium, unless it is given."""
    monkeypatch.delenv("SUBSTRATE_TESTS", raising=False)
    monkeypatch.delenv("SUBSTRATE_TESTS_EXCUSED", raising=False)
    monkeypatch.delenv("SUBSTRATE_SEED", raising=False)
    monkeypatch.setitem(real_parts.PARTS, "unobtainium", Part(lambda: False, "look elsewhere", "unobtainium-dev"))
    pytester.makeini("[pytest]")  # so that it looks for no other
    pytester.makepyfile(ONE_TEST)
    profile, budget = hypothesis.settings.get_current_profile_name(), hypothesis.settings.default

    def run(*, given=False, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if given:
            monkeypatch.setitem(real_parts.PARTS, "unobtainium", Part(lambda: True, ""))
        real_parts.is_present.cache_clear()
        return pytester.runpytest_inprocess("-p", "real_parts", "-p", "no:asyncio")

    yield run
    real_parts.is_present.cache_clear()
    hypothesis.settings.register_profile(profile, budget)
    hypothesis.settings.load_profile(profile)


def test_a_plain_run_leaves_out_what_it_cannot_do_and_says_so_last(machine):
    result = machine()
    result.assert_outcomes(passed=1, skipped=1)
    *_, absent, seeds, totals = filter(None, result.outlines)
    assert absent == SAID
    assert seeds == "simulation seeds: 300 (a full run has 10000)"
    assert "1 passed, 1 skipped" in totals


def test_a_full_run_fails_without_its_parts(machine):
    result = machine(SUBSTRATE_TESTS="full")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*this machine lacks unobtainium: look elsewhere*", SAID])


def test_an_excused_part_is_left_out_even_of_a_full_run_and_told(machine):
    result = machine(SUBSTRATE_TESTS="full", SUBSTRATE_TESTS_EXCUSED="unobtainium,root")
    result.assert_outcomes(passed=1, skipped=1)
    assert SAID in result.outlines
    assert "simulation seeds: 10000" in result.outlines


def test_nothing_is_left_out_where_every_part_is(machine):
    result = machine(given=True)
    result.assert_outcomes(passed=2)
    assert "none was absent" in result.outlines


def test_a_kind_of_run_that_nobody_knows_is_refused(machine):
    result = machine(SUBSTRATE_TESTS="ful")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*SUBSTRATE_TESTS is 'ful'; accepted are 'full' and nothing*"])


def test_a_part_that_nobody_described_is_refused_where_it_is_asked_for():
    with pytest.raises(KeyError, match="no such part: dilithium; add it to PARTS"):
        needs("root", "dilithium")


def test_absent_parts_name_the_packages_that_bring_them(machine):
    assert "unobtainium-dev" in real_parts.absent_packages()


def test_a_failing_seed_can_be_replayed_alone(monkeypatch):
    monkeypatch.setenv("SUBSTRATE_SEED", "4711")
    assert list(real_parts.simulation_seeds()) == [4711]


@pytest.mark.parametrize(("said", "seeds", "examples"), [("", 300, 40), ("full", 10_000, 1000)])
def test_a_full_run_simulates_and_fuzzes_more(said, seeds, examples, monkeypatch):
    monkeypatch.delenv("SUBSTRATE_SEED", raising=False)
    monkeypatch.setenv("SUBSTRATE_TESTS", said)
    assert len(real_parts.simulation_seeds()) == seeds
    assert real_parts.fuzz_examples(40) == examples


@pytest.mark.parametrize(("said", "first"), [("", [1, 4, 7]), ("full", [1, 2, 3])])
def test_a_full_run_leaves_out_no_step(said, first, monkeypatch):
    monkeypatch.setenv("SUBSTRATE_TESTS", said)
    assert list(islice(real_parts.steps(3), 3)) == first
