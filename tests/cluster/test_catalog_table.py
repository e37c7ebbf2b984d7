"""The workload table is checked whole: every mistake is named with its place, and a good table means one thing."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from substrate_cluster.catalog import TableInvalid, WorkloadEntry, parse_table
from substrate_cluster.catalog.findings import MOST_PROBLEMS
from substrate_cluster.catalog.table import READERS
from substrate_seam.invocation import Isolation
from substrate_seam.workload import FEATURES, EgressRules

UPSTREAM = Path(__file__).parent / "data" / "upstream-table.json"
PROCESS = {"command": ["serve", "handlers:app"]}
MICROVM = {"rootfsPath": "/images/agent.ext4"}


def parse(table, *, directory=None):
    """Check a table given as plain data."""
    return parse_table(json.dumps(table).encode(), source="table.json", directory=directory)


def parse_one(**fields):
    """Check a table of one workload `w`, and give its entry."""
    return parse({"w": fields}).entries["w"]


def problems_of(table):
    """What is wrong with a table, as sentences that begin with the place."""
    with pytest.raises(TableInvalid) as refused:
        parse(table)
    assert all(str(problem) in str(refused.value) for problem in refused.value.problems)
    return [str(problem) for problem in refused.value.problems]


def problems_if_any(table):
    """What is wrong with a table; nothing if it is accepted."""
    try:
        parse(table, directory="/srv")
    except TableInvalid as refused:
        return refused.problems
    return ()


def warnings_of(**fields):
    """What is said about a workload that is accepted."""
    return [str(warning) for warning in parse({"w": fields}).warnings]


# What Go wrote still works.


def test_the_table_of_the_go_daemon_is_accepted_as_it_is():
    """Nobody has to rewrite a table to move here; the one thing that never had an effect is said."""
    table = parse_table(UPSTREAM.read_bytes(), source=str(UPSTREAM))
    semgrep, agent, sandbox = (table.entries[name] for name in ("semgrep", "agent", "sandbox"))
    assert (semgrep.request_timeout_s, agent.request_timeout_s, sandbox.request_timeout_s) == (90, 600, 30)
    assert semgrep.workload.spec.harness_init == "/usr/local/bin/semgrep-init"
    assert (semgrep.workload.spec.vcpus, semgrep.workload.spec.memory_mib, semgrep.workload.spec.concurrency) == (
        1,
        1536,
        15,
    )
    assert {entry.workload.spec.guest for entry in table.entries.values()} == {"go-shim"}
    assert agent.workload.spec.sessioned
    assert agent.workload.spec.egress_enabled
    assert agent.workload.spec.requires == ("egress", "sessioned")
    assert [warning.path for warning in table.warnings] == ["agent.egressSecrets"]


def test_what_is_left_out_has_the_defaults_of_go():
    """2 vCPUs, 2 GiB, 4 at once, 90 seconds, `/shim/ready`; anybody may call."""
    entry = parse_one(**MICROVM)
    spec = entry.workload.spec
    assert (spec.vcpus, spec.memory_mib, spec.concurrency, spec.ready_path) == (2, 2048, 4, "/shim/ready")
    assert (spec.egress_enabled, spec.warm_base, spec.sessioned, spec.harness_init) == (False, False, False, None)
    assert (entry.request_timeout_s, entry.start_timeout_s, entry.callers) == (90, 30, None)
    assert (spec.queue, spec.pool, spec.isolation, spec.egress, spec.requires) == (256, 0, None, None, ())


def test_numbers_of_0_or_less_mean_the_default_and_one_warning_says_so():
    """Go did that silently."""
    table = parse({"a": {**MICROVM, "vcpus": 0, "memMib": -1}, "b": {**MICROVM, "concurrency": 0}})
    assert table.entries["a"].workload == parse({"a": MICROVM}).entries["a"].workload
    assert [str(warning) for warning in table.warnings] == [
        "numbers of 0 or less mean the default: "
        "a.vcpus (0 means 2), a.memMib (-1 means 2048), b.concurrency (0 means 4)"
    ]


@pytest.mark.parametrize("empty", [None, ""])
@pytest.mark.parametrize("field", ["image", "harnessInit", "readyPath", "requestTimeout", "path", "python"])
def test_an_empty_string_or_null_leaves_the_default(field, empty):
    """As an absent key does; so a chart may render values that nobody set."""
    assert parse_one(**PROCESS, **{field: empty}) == parse_one(**PROCESS)


@pytest.mark.parametrize("empty", ["null", "{}", " {} \n", "---\nnull\n"])
def test_a_table_may_be_empty_if_it_says_so(empty):
    """The daemon then serves its health and no workload."""
    assert parse_table(empty.encode(), source="FC_INVOKE_WORKLOADS").entries == {}


# What a good table means.


def test_every_field_arrives_where_it_belongs():
    """Nodes get what they need; timeouts and callers stay with the cluster."""
    table = parse(
        {
            "w": {
                "command": ["serve", "handlers:app"],
                "path": "/srv/app",
                "python": "/usr/bin/python3",
                "env": {"MODE": "fast"},
                "vcpus": 1,
                "memMib": 64,
                "concurrency": 8,
                "queue": 0,
                "pool": 2,
                "warmBase": True,
                "readyPath": "/ready",
                "sessioned": True,
                "isolation": "process",
                "egressEnabled": True,
                "primeEgress": True,
                "egress": {"allow": ["B.example:443", "*.a.example", "b.example:443"], "deny": ["[2001:DB8::1]:80"]},
                "requestTimeout": "1m30s",
                "startTimeout": "300ms",
                "callers": ["ci", "system:serviceaccount:prod:web"],
            }
        }
    )
    entry = table.entries["w"]
    assert (entry.request_timeout_s, entry.start_timeout_s) == (90, pytest.approx(0.3))
    assert entry.callers == {"ci", "system:serviceaccount:prod:web"}
    spec = entry.workload.spec
    assert (spec.name, spec.command) == ("w", ("serve", "handlers:app"))
    assert (spec.path, spec.python) == ("/srv/app", "/usr/bin/python3")
    assert spec.env == {"MODE": "fast"}
    assert (spec.vcpus, spec.memory_mib, spec.concurrency, spec.queue, spec.pool) == (1, 64, 8, 0, 2)
    assert (spec.warm_base, spec.sessioned, spec.egress_enabled, spec.prime_egress) == (True, True, True, True)
    assert (spec.ready_path, spec.isolation, spec.guest) == ("/ready", Isolation.PROCESS, "substrate")
    assert spec.egress == EgressRules(allow=("*.a.example", "b.example:443"), deny=("[2001:db8::1]:80",))
    assert spec.requires == ("egress", "egress-rules", "pool", "sessioned")
    assert table.warnings == ()


@pytest.mark.parametrize(
    ("fields", "features"),
    [
        ({"sessioned": True}, ["sessioned"]),
        ({"pool": 1}, ["pool"]),
        ({"egressEnabled": True}, ["egress"]),
        ({"egressEnabled": True, "egress": {"allow": ["a.example"]}}, ["egress", "egress-rules"]),
    ],
)
def test_a_safeguard_is_required_of_nodes(fields, features):
    """A node that does not know it refuses the workload, instead of running it without."""
    assert parse_one(**PROCESS, **fields).workload.spec.requires == tuple(features)


def test_nodes_know_what_this_version_can_do_and_no_more():
    """Nothing reaches the network from a guest of this version, so no node claims to."""
    assert {"sessioned", "pool"} == FEATURES


@pytest.mark.parametrize(
    ("fields", "guest"),
    [(MICROVM, "go-shim"), ({**MICROVM, "guest": "substrate"}, "substrate"), (PROCESS, "substrate")],
)
def test_a_rootfs_is_taken_for_a_guest_of_the_go_shim(fields, guest):
    """The tables that exist name no guest, and their images hold that shim."""
    assert parse_one(**fields).workload.spec.guest == guest


def test_relative_paths_are_those_beside_the_table():
    """So an example can be a directory that is moved as a whole; without a directory they are refused."""
    table = {
        "p": {**PROCESS, "path": "app/../code", "python": "./venv/bin/python"},
        "m": {"rootfsPath": "rootfs.ext4"},
    }
    entries = parse(table, directory="/srv/tables").entries
    assert entries["p"].workload.spec.path == "/srv/tables/code"
    assert entries["p"].workload.spec.python == "/srv/tables/venv/bin/python"
    assert entries["m"].workload.spec.rootfs_path == "/srv/tables/rootfs.ext4"
    assert [problem.partition(":")[0] for problem in problems_of(table)] == ["p.path", "p.python", "m.rootfsPath"]


# What is refused, and in which words.


def test_everything_that_is_wrong_is_said_at_once():
    """One look at the output is enough to mend the table."""
    found = problems_of(
        {
            "a": {"rootfsPath": "/r", "memMib": "512", "requestTimeout": 90, "timeot": "9s"},
            "b": {"sessioned": 1, "vcpus": 2.5},
            "c d": {"command": []},
            "e": 7,
        }
    )
    assert found == [
        'a.memMib: found the string "512"; accepted is a whole number from 32 to 1,048,576 (without the quotes)',
        "a.requestTimeout: found the number 90; accepted is a duration longer than 0 and at most 24h in Go syntax, "
        'such as 90s, 1m30s, 300ms or 1.5h (write "90s" if you mean seconds)',
        "a.timeot: found the unknown key 'timeot'; did you mean startTimeout or requestTimeout?",
        "b.sessioned: found the number 1; accepted is true or false",
        "b.vcpus: found the number 2.5; accepted is a whole number from 1 to 32",
        "b: found neither command nor rootfsPath; accepted is exactly one: command for a process guest, rootfsPath for "
        "a microVM",
        '"c d": found the string "c d"; accepted is a name of 1 to 63 letters, digits, dots, underscores and dashes, '
        "beginning with a letter or digit",
        '"c d".command: found an empty list; accepted is a list of 1 to 1,024 arguments',
        "e: found the number 7; accepted is an object",
    ]


@pytest.mark.parametrize(
    ("typed", "advice"),
    [
        ("rootfspath", "keys are exact: write rootfsPath"),
        ("MEMMIB", "keys are exact: write memMib"),
        ("mem_mib", "did you mean memMib?"),
        ("requestTimeOut", "keys are exact: write requestTimeout"),
        ("warmbases", "did you mean warmBase?"),
        ("egressEnable", "did you mean egressEnabled"),
        ("zzz", "accepted are image, rootfsPath"),
    ],
)
def test_an_unknown_key_is_refused_with_the_one_that_was_meant(typed, advice):
    """Go took any case and ignored what it did not know, so a typo stayed unseen."""
    [problem] = problems_of({"w": {**PROCESS, typed: None}})
    assert problem.startswith(f"w.{typed}: found the unknown key {typed!r}; {advice}")


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("vcpus", 33, "a whole number from 1 to 32"),
        ("vcpus", True, "a whole number from 1 to 32"),
        ("vcpus", "2", "a whole number from 1 to 32 (without the quotes)"),
        ("memMib", 31, "a whole number from 32 to"),
        ("memMib", 10**30, "a whole number from 32 to"),
        ("concurrency", 1e3, "a whole number from 1 to 4,096"),
        ("queue", -1, "a whole number from 0 to 65,536"),
        ("pool", -1, "a whole number from 0 to 1,024"),
        ("sessioned", "true", "true or false (without the quotes)"),
        ("warmBase", 0, "true or false"),
        ("requestTimeout", "90", "a duration longer than 0"),
        ("requestTimeout", "1 minute", "a duration longer than 0"),
        ("requestTimeout", "0s", "a duration longer than 0"),
        ("requestTimeout", "-1s", "a duration longer than 0"),
        ("requestTimeout", "24h1s", "at most 24h"),
        ("startTimeout", "61m", "at most 1h"),
        ("readyPath", "shim/ready", "a path that begins with /"),
        ("readyPath", "/a b", "a path that begins with /"),
        ("readyPath", "/a\r\nHost: x", "a path that begins with /"),
        ("path", "/a\nb", "the path of a directory"),
        ("python", "python3", "the path of an interpreter, with a slash in it"),
        ("command", "serve app", "arguments (write a list, even of one)"),
        ("env", ["A=b"], "an object of strings by variable name"),
        ("guest", "firecracker", "substrate or go-shim"),
        ("isolation", "vm", "process or microvm or microvm-jailed"),
        ("callers", "ci", "names of callers (write a list, even of one)"),
        ("egress", ["a.example"], "an object with allow and deny"),
        ("image", 5, "a string (quote it)"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_accepted(field, value, accepted):
    """The message has the place, what was found and what to write."""
    [problem] = problems_of({"w": {**PROCESS, field: value}})
    assert problem.startswith(f"w.{field}: found ")
    assert accepted in problem


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"command": ["serve", 5]}, "w.command[1]"),
        ({"command": ["a\x00b"]}, "w.command[0]"),
        ({"command": ["\ud800"]}, "w.command[0]"),
        ({"command": ["x" * 200_000]}, "w.command[0]"),
        ({**PROCESS, "env": {"A": 1}}, "w.env.A"),
        ({**PROCESS, "env": {"A": None}}, "w.env.A"),
        ({**PROCESS, "env": {"A-B": "x"}}, "w.env.A-B"),
        ({**PROCESS, "env": {"SUBSTRATE_LISTEN_FD": "3"}}, "w.env.SUBSTRATE_LISTEN_FD"),
        ({**PROCESS, "env": {"A": "x" * 100_000, "B": "x" * 100_000}}, "w.env"),
        ({**PROCESS, "callers": ["a b"]}, "w.callers[0]"),
        ({**PROCESS, "callers": [None]}, "w.callers[0]"),
        ({**PROCESS, "egress": {"allow": ["a.example"], "Deny": []}}, "w.egress.Deny"),
        ({**PROCESS, "egress": {"deny": ["a.example"]}}, "w.egress"),
        ({**PROCESS, "egress": {}}, "w.egress"),
    ],
)
def test_a_problem_inside_a_field_is_named_with_its_own_place(fields, place):
    """Down to the item of a list."""
    assert [problem.partition(": found")[0] for problem in problems_of({"w": fields})] == [place]


@pytest.mark.parametrize(
    "host",
    ["https://a.example", "a.example/x", "a.example:0", "a.example:65536", "a.example:", "*a.example", "a..b", "", ".a"]
    + ["2001:db8::1", "[2001:db8::1", "[nonsense]", "[fe80::1%eth0]", "a.*", "a b", "a.example.", "ä.example", 5, None],
)
def test_an_egress_pattern_that_could_be_misread_is_refused(host):
    """A rule that never matches, or matches more than it says, is worse than none."""
    [problem] = problems_of({"w": {**PROCESS, "egressEnabled": True, "egress": {"allow": [host]}}})
    assert problem.startswith("w.egress.allow[0]: found ")


@pytest.mark.parametrize(
    "host", ["*", "*:443", "*.a.example", "a.example:443", "10.0.0.1:80", "[::1]:8080", "a_b.example"]
)
def test_egress_patterns_are_hosts_with_or_without_a_port(host):
    """Names, names below a name, addresses, and everything."""
    spec = parse_one(**PROCESS, egressEnabled=True, egress={"allow": [host]}).workload.spec
    assert spec.egress == EgressRules(allow=(host,))


def test_the_first_generation_of_secrets_is_refused_with_the_way_out():
    """Swapping placeholders put real values into URLs and logs; the proxy sets headers instead."""
    secret = {"env": "TOKEN", "placeholder": "PLACEHOLDER", "egressTo": ["api.example"], "value": "s3cret"}
    [problem] = problems_of({"w": {**MICROVM, "egressSecrets": ["fine", secret]}})
    assert problem.startswith("w.egressSecrets[1]: found a secret of the first generation")
    assert "EGRESS_SECRETS of the egress proxy as an object of header, valuePrefix, env and egressTo" in problem
    assert "s3cret" not in problem


def test_a_secret_in_the_table_is_refused_without_repeating_it():
    """A later generation does not belong here either."""
    [problem] = problems_of({"w": {**MICROVM, "egressSecrets": [{"header": "authorization", "value": "s3cret"}]}})
    assert "the table holds none" in problem
    assert "s3cret" not in problem


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({**PROCESS, **MICROVM}, "w"),
        ({}, "w"),
        ({**PROCESS, "guest": "go-shim"}, "w.guest"),
        ({**PROCESS, "isolation": "microvm"}, "w.isolation"),
        ({**PROCESS, "isolation": "microvm-jailed"}, "w.isolation"),
        ({**MICROVM, "env": {"A": "b"}}, "w.env"),
        ({**MICROVM, "path": "/srv"}, "w.path"),
        ({**MICROVM, "python": "/usr/bin/python3"}, "w.python"),
    ],
)
def test_what_cannot_be_together_is_refused(fields, place):
    """A field that would be ignored is a promise that nobody keeps."""
    assert [problem.partition(": ")[0] for problem in problems_of({"w": fields})] == [place]


def test_a_bad_command_is_still_a_command():
    """One mistake gives one message, not also the one about neither command nor rootfsPath."""
    assert len(problems_of({"w": {"command": "serve"}})) == 1


def test_endless_problems_end():
    """A file that is no table at all does not fill the terminal, or the log, with itself."""
    found = problems_of({f"w{n}": 0 for n in range(5_000)})
    assert len(found) == MOST_PROBLEMS + 1
    assert found[-1] == "1,000 problems are enough: the rest was not read"


# What is accepted with a warning.


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({**MICROVM, "egressSecrets": ["github"]}, "w.egressSecrets: names of secrets have no effect"),
        ({**PROCESS, "image": "x"}, "w.image: this has no effect on a process guest"),
        ({**PROCESS, "harnessInit": "/init"}, "w.harnessInit: this has no effect on a process guest"),
        ({**PROCESS, "egress": {"allow": ["*"]}}, "w.egress: this has no effect without egressEnabled: true"),
        ({**PROCESS, "primeEgress": True}, "w.primeEgress: this has no effect without egressEnabled: true"),
        ({**PROCESS, "callers": []}, "w.callers: an empty list lets nobody call"),
        ({**PROCESS, "pool": 5}, "w.pool: more guests are parked than can ever run at once"),
    ],
)
def test_what_is_probably_not_meant_is_said(fields, warning):
    """Accepted, because it does no harm; said, because it surprises."""
    [said] = warnings_of(**fields)
    assert said.startswith(warning)


def test_an_empty_list_of_callers_admits_nobody():
    """It is not the same as no list."""
    assert parse_one(**PROCESS, callers=[]).callers == frozenset()


# Properties.

DURATIONS = st.sampled_from(["90s", "1m30s", "300ms", "1.5h", "1ns", "24h"])
SAFE = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
COMMON = {
    "vcpus": st.integers(1, 32),
    "memMib": st.integers(32, 4096),
    "concurrency": st.integers(1, 64),
    "queue": st.integers(0, 64),
    "pool": st.integers(0, 8),
    "egressEnabled": st.booleans(),
    "warmBase": st.booleans(),
    "sessioned": st.booleans(),
    "primeEgress": st.booleans(),
    "readyPath": st.just("/ready"),
    "requestTimeout": DURATIONS,
    "startTimeout": st.just("30s"),
    "callers": st.lists(st.sampled_from(["ci", "web"])),
    "egress": st.fixed_dictionaries(
        {"allow": st.lists(st.sampled_from(["a.example", "*:443"]), min_size=1)},
        optional={"deny": st.lists(st.just("b.example"))},
    ),
}
WORKLOADS = st.fixed_dictionaries(
    {"command": st.lists(SAFE, min_size=1, max_size=3)},
    optional={**COMMON, "path": st.just("/srv"), "env": st.dictionaries(st.sampled_from("ABC"), SAFE)},
) | st.fixed_dictionaries(
    {"rootfsPath": st.just("/r.ext4")},
    optional={**COMMON, "isolation": st.sampled_from([str(one) for one in Isolation]), "image": SAFE},
)
TABLES = st.dictionaries(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True), WORKLOADS, max_size=3)


def shuffled(value, order):
    """The same data with the keys of every object in another order."""
    if not isinstance(value, dict):
        return value
    items = [(key, shuffled(inner, order)) for key, inner in value.items()]
    order.shuffle(items)
    return dict(items)


@given(TABLES, st.randoms())
def test_a_table_means_the_same_in_any_order_and_in_both_formats(table, order):
    """JSON, YAML, and either with its keys shuffled, give equal entries with equal digests."""
    entries = parse(table).entries
    assert set(entries) == set(table)
    assert parse(shuffled(table, order)).entries == entries
    as_yaml = yaml.safe_dump(table, sort_keys=False).encode()
    assert parse_table(as_yaml, source="table.yaml").entries == entries


DEFAULTS = {
    "image": "",
    "vcpus": 2,
    "memMib": 2048,
    "concurrency": 4,
    "egressEnabled": False,
    "warmBase": False,
    "readyPath": "/shim/ready",
    "sessioned": False,
    "pool": 0,
    "queue": 256,
    "primeEgress": False,
    "requestTimeout": "90s",
    "startTimeout": "30s",
    "callers": None,
    "egress": None,
    "isolation": None,
    "env": None,
}


@given(WORKLOADS)
def test_a_default_spelled_out_changes_nothing(fields):
    """The digest is that of the meaning, so tidying a table rebuilds no base."""
    guest = "go-shim" if "rootfsPath" in fields else "substrate"
    assert parse_one(**{**DEFAULTS, "guest": guest, **fields}) == parse_one(**fields)


@given(WORKLOADS, DURATIONS, st.none() | st.just(["ci"]))
def test_what_only_the_cluster_needs_changes_no_digest(fields, request_timeout, callers):
    """Letting in another caller, or waiting longer, rebuilds no base either."""
    changed = {**fields, "requestTimeout": request_timeout, "startTimeout": "1s", "callers": callers}
    assert parse_one(**changed).workload.digest == parse_one(**fields).workload.digest


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*READERS, "90s", "/x", "allow", "deny", "placeholder", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*READERS, "allow", "x"]), inner, max_size=6)
    ),
    max_leaves=30,
)


@given(
    JSON
    | st.dictionaries(st.sampled_from(["w", "v", "\ud800", ""]), st.dictionaries(st.sampled_from([*READERS]), JSON))
)
def test_whatever_json_comes_in_a_table_or_a_list_of_problems_comes_out(value):
    """No input is answered with a traceback, and every problem can be printed."""
    assert all(str(problem).encode() for problem in problems_if_any(value))


@given(st.dictionaries(st.sampled_from([*READERS]), JSON, min_size=1))
def test_each_problem_says_where_it_is(fields):
    """Its place begins with the workload, and names one of the fields that were written or the workload itself."""
    paths = [problem.path for problem in problems_if_any({"w": fields})]
    assert {re.split(r"[.\[]", path)[1] for path in paths if path != "w"} <= set(fields)


def test_the_readers_are_exactly_the_fields_of_an_entry():
    """What people may write is said in one place, and read in another; they are the same."""
    assert list(READERS) == list(WorkloadEntry.__annotations__)
