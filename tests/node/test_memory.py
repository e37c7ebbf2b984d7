"""A node is as big as its machine or its container, less a reserve."""

import pytest

from substrate_node.memory import default_memory_mib

MIB = 1024 * 1024


def machine(root, *, total_mib, cgroup="0::/\n", limits=None):
    """A file tree with what the kernel would say."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal:       {total_mib * 1024} kB\nMemFree: 1 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for path, limit in (limits or {}).items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    return root


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected_mib"),
    [
        ("0::/\n", {}, 20_000 - 2_000),
        ("0::/a/b\n", {"a/memory.max": 10_000 * MIB, "a/b/memory.max": "max"}, 10_000 - 1_000),
        ("0::/a/b\n", {"a/memory.max": 10_000 * MIB, "a/b/memory.max": 2_000 * MIB}, 2_000 - 512),
        ("5:memory:/c\n0::/\n", {"memory/c/memory.limit_in_bytes": 4_000 * MIB}, 4_000 - 512),
        ("5:memory:/c\n", {"memory/c/memory.limit_in_bytes": 2**63 - 4096}, 20_000 - 2_000),
        ("0::/a\n", {"a/memory.max": 100 * MIB}, 0),
    ],
    ids=["no limit", "a limit above", "a limit of its own", "version 1", "version 1 without a limit", "too small"],
)
def test_the_least_of_all_limits_counts(tmp_path, cgroup, limits, expected_mib):
    """Of the machine, of the cgroup and of those above it, in either version; 10 % stay free, 512 MiB at least."""
    root = machine(tmp_path, total_mib=20_000, cgroup=cgroup, limits=limits)
    assert default_memory_mib(root=root) == expected_mib


def test_this_machine_has_some():
    """The real files can be read."""
    assert default_memory_mib() > 0
