"""`check` tells people whether a table may be used, in words for a terminal."""

import pytest

from substrate_cluster.catalog import Kind, check_table, kind_on_host, table_in_text


def source(text):
    """A table by the name of `t.yaml`."""
    return table_in_text(text, label="t.yaml")


TABLE = """
thumbnail:
  command: [serve, "handlers:app"]
  path: /srv/thumbnail
  python: /usr/bin/python3
  pool: 2
  callers: [ci, web]
agent: {rootfsPath: /images/agent.ext4, requestTimeout: 600s, primeEgress: true}
"""


def test_a_good_table_is_shown_as_a_small_table():
    """One line per workload with what it will cost, then the warnings."""
    ok, report = check_table(source(TABLE))
    assert ok
    assert report == (
        "t.yaml: OK, 2 workloads\n"
        "  NAME       GUEST              VCPUS  MEM MIB  CONCURRENCY  QUEUE  POOL  TIMEOUT  CALLERS\n"
        "  thumbnail  process            2      2048     4            256    2     1m30s    2\n"
        "  agent      microvm (go-shim)  2      2048     4            256    0     10m      all\n"
        "warning: agent.primeEgress (line 8): this has no effect without egressEnabled: true"
    )


def test_an_empty_table_is_good_and_shows_no_table():
    """The daemon then has nothing to run, which is said plainly."""
    assert check_table(source("{}")) == (True, "t.yaml: OK, 0 workloads")


def test_a_bad_table_is_shown_as_its_problems():
    """All of them, and nothing else."""
    ok, report = check_table(source("a: {command: [x], vcpus: 99}\nb: {}\n"))
    assert not ok
    assert report.splitlines()[0] == "t.yaml is refused: 2 problems"
    assert [line.partition(": ")[0] for line in report.splitlines()[1:]] == ["  - a.vcpus (line 1)", "  - b (line 2)"]


def test_the_host_is_only_asked_on_request():
    """A table can be checked where it is written, far from where it runs."""
    asked = []
    check_table(source(TABLE))
    ok, _ = check_table(source(TABLE), kind_of=lambda path: asked.append(path) or ALL_THERE[path])
    assert ok
    assert asked == ["/srv/thumbnail", "/usr/bin/python3", "/images/agent.ext4"]


ALL_THERE = {"/srv/thumbnail": Kind.DIRECTORY, "/usr/bin/python3": Kind.PROGRAM, "/images/agent.ext4": Kind.FILE}


@pytest.mark.parametrize(
    ("path", "kind", "said"),
    [
        ("/srv/thumbnail", Kind.FILE, "thumbnail.path: found a file at /srv/thumbnail; accepted is a directory"),
        (
            "/usr/bin/python3",
            Kind.FILE,
            "thumbnail.python: found a file at /usr/bin/python3; accepted is an executable",
        ),
        (
            "/images/agent.ext4",
            Kind.NOTHING,
            "agent.rootfsPath: found nothing at /images/agent.ext4; accepted is a file",
        ),
        ("/images/agent.ext4", Kind.DIRECTORY, "agent.rootfsPath: found a directory at /images/agent.ext4"),
    ],
)
def test_what_the_host_lacks_is_a_problem_of_its_field(path, kind, said):
    """The same words as any other problem."""
    ok, report = check_table(source(TABLE), kind_of={**ALL_THERE, path: kind}.__getitem__)
    assert not ok
    assert f"  - {said}" in report


def test_a_path_of_the_host_is_looked_up_for_what_it_leads_to(tmp_path):
    """Through symlinks, and without an exception for anything strange."""
    file, program, link = tmp_path / "file", tmp_path / "program", tmp_path / "link"
    file.touch(mode=0o644)
    program.touch(mode=0o755)
    link.symlink_to(program)
    assert [kind_on_host(str(path)) for path in (file, program, link, tmp_path, tmp_path / "none")] == [
        Kind.FILE,
        Kind.PROGRAM,
        Kind.PROGRAM,
        Kind.DIRECTORY,
        Kind.NOTHING,
    ]
    assert kind_on_host("/dev/null") is Kind.OTHER
    assert kind_on_host(str(file / "below")) is Kind.NOTHING
    assert kind_on_host("a\x00b") is Kind.NOTHING
