"""A double of Firecracker's jailer: the same tree, the same refusals, then the program in the same process.

`program.py jailer --double CONFIG [the jailer's flags] -- [Firecracker's flags]`. It neither changes the root nor the
user, so that a program of this machine can run behind it; CONFIG's `cgroup_root` stands for the mounted control groups,
and its `version` is that of both programs.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

ONCE = ("--id", "--exec-file", "--uid", "--gid", "--chroot-base-dir", "--netns", "--parent-cgroup", "--cgroup-version")
MANY = ("--cgroup", "--resource-limit")
LIMITS = {"fsize": resource.RLIMIT_FSIZE, "no-file": resource.RLIMIT_NOFILE}


def main(argv: list[str]) -> None:
    """Make the jail, and become the program in it."""
    config = json.loads(Path(argv[1]).read_text())
    if argv[2:] == ["--version"]:
        sys.stdout.write(f"Jailer v{config.get('version', '1.17.0')}\n\n")
        return
    ours, theirs = argv[2 : argv.index("--")], argv[argv.index("--") + 1 :]
    once: dict[str, str] = {}
    many: dict[str, list[str]] = {flag: [] for flag in MANY}
    for flag, value in zip(ours[::2], ours[1::2], strict=True):
        if flag in many:
            many[flag].append(value)
        else:
            assert flag in ONCE, flag
            assert flag not in once, flag
            once[flag] = value
    program, uid = Path(once["--exec-file"]), int(once["--uid"])
    root = Path(once["--chroot-base-dir"]) / program.name / once["--id"] / "root"
    assert Path(once["--chroot-base-dir"]).is_dir()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chown(root, uid, int(once["--gid"]))
    copy = root / program.name
    assert not copy.is_symlink()
    shutil.copy(program, copy)
    os.chown(copy, uid, int(once["--gid"]))
    with Path(once["--netns"]).open("rb"):
        pass
    for limit in ["no-file=2048", *many["--resource-limit"]]:
        name, _, value = limit.partition("=")
        resource.setrlimit(LIMITS[name], (int(value), int(value)))
    if many["--cgroup"]:
        assert once["--cgroup-version"] == "2"
        group = Path(config["cgroup_root"]) / once["--parent-cgroup"] / once["--id"]
        group.mkdir(parents=True, exist_ok=True)
        for bound in many["--cgroup"]:
            file, _, value = bound.partition("=")
            assert f"+{file.split('.')[0]}" in (group.parent / "cgroup.subtree_control").read_text()
            config.setdefault("cgroups", {})[file] = value
        Path(f"{argv[1]}.cgroup-{once['--id']}").write_text(json.dumps(config["cgroups"]))
    for name in ("dev", "run"):
        (root / name).mkdir(mode=0o700, exist_ok=True)
        os.chown(root / name, uid, int(once["--gid"]))
    with (root / f"{program.name}.pid").open("x") as file:  # used before: no second time
        file.write(str(os.getpid()))
    os.chdir(root)
    started_us = str(int(time.monotonic() * 1e6))
    timing = ["--start-time-us", started_us, "--start-time-cpu-us", "0", "--parent-cpu-time-us", "0"]
    os.execv(copy, [str(copy), "--id", once["--id"], *timing, *theirs])
