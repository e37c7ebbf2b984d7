"""The tool that runs a command in an emulated machine: what it decides, without a machine."""

import importlib.util
import os
import shlex
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools/emulated_machine.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("emulated_machine", TOOL)
    module = sys.modules["emulated_machine"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["emulated_machine"]


@pytest.fixture
def machine(tool):
    return tool.Machine(Path("/cache/vmlinux"), ("qemu-system-x86_64",), 2048, 2, (Path("/work"), Path("/data")))


def value_after(arguments, option):
    return arguments[arguments.index(option) + 1]


def test_the_kernel_is_named_by_its_configuration(tool):
    """The same options give the same file, and a change of one another."""
    config = tool.kernel_config()
    assert tool.kernel_path(Path("/cache"), config) == tool.kernel_path(Path("/cache"), config)
    assert tool.kernel_path(Path("/cache"), config) != tool.kernel_path(Path("/cache"), config + "CONFIG_MORE=y\n")


def test_the_kernel_serves_the_machine_and_its_guests(tool):
    """It runs guests, mounts the host's files, and boots under Firecracker with disk, vsock, console and restart."""
    options = set(tool.kernel_config().split())
    for name in ("KVM_AMD", "9P_FS", "OVERLAY_FS", "VIRTIO_MMIO_CMDLINE_DEVICES", "VIRTIO_BLK", "EXT4_FS"):
        assert f"CONFIG_{name}=y" in options
    for name in ("VIRTIO_VSOCKETS", "SERIAL_8250_CONSOLE", "SERIO_I8042", "VMGENID", "KVM_GUEST", "DEVTMPFS_MOUNT"):
        assert f"CONFIG_{name}=y" in options
    assert "CONFIG_SERIAL_8250_NR_UARTS=1" in options
    assert "CONFIG_MODULES=y" not in options


def test_no_option_is_named_twice(tool):
    names = " ".join(tool.KERNEL_OPTIONS.values()).split()
    assert sorted(set(names)) == sorted(names)


def test_options_that_the_source_does_not_take_are_named(tool):
    wanted = "CONFIG_A=y\nCONFIG_B=1\nCONFIG_C=y\n"
    accepted = "CONFIG_A=y\nCONFIG_B=2\n# CONFIG_C is not set\n"
    assert tool.refused(wanted, accepted) == ["CONFIG_B=1", "CONFIG_C=y"]


def test_the_machine_has_the_asked_size_and_sees_this_ones_files(tool, machine):
    arguments = tool.qemu_arguments(machine, Path("/run/control"), tsc_khz=2_600_000)
    assert value_after(arguments, "-m") == "2048M"
    assert value_after(arguments, "-smp") == "2"
    assert value_after(arguments, "-kernel") == "/cache/vmlinux"
    shared = [word for word in arguments if word.startswith("local,")]
    assert [("path=/," in word, "readonly=on" in word) for word in shared] == [(True, True), *[(False, False)] * 3]
    for number, path in enumerate(("/run/control", "/work", "/data")):
        assert any(f"id=share{number},path={path}," in word for word in shared)


def test_what_is_written_goes_to_a_disk_that_is_thrown_away(tool, machine):
    arguments = tool.qemu_arguments(machine, Path("/run/control"), tsc_khz=1)
    assert value_after(arguments, "-drive").endswith("file=/run/control/disk")
    assert "lowerdir=/,upperdir=/mnt/upper" in tool.init_script(Path("/c"), [])


def test_the_machine_is_told_its_clock_and_its_init(tool, machine):
    line = value_after(tool.qemu_arguments(machine, Path("/run/control"), tsc_khz=2_600_000), "-append").split()
    assert "tsc_early_khz=2600000" in line
    assert "lpj=26000000" in line
    assert "init=/run/control/init" in line
    assert "ro" in line


def test_the_machine_never_outlives_its_tool(tool, machine):
    assert tool.qemu_arguments(machine, Path("/c"), tsc_khz=1)[:4] == [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "qemu-system-x86_64",
    ]


def test_a_path_with_a_comma_can_not_be_shared(tool, machine):
    with pytest.raises(tool.NotPossible, match="comma"):
        tool.qemu_arguments(machine, Path("/a,b"), tsc_khz=1)


def test_the_init_mounts_the_shares_where_they_are_outside(tool):
    lines = tool.init_script(Path("/c d"), [Path("/work")]).splitlines()
    mounts = [shlex.split(line)[-2:] for line in lines if line.startswith("mount -t 9p")]
    assert mounts == [["share0", "/c d"], ["share1", "/work"]]
    assert shlex.split(lines[-1]) == ["exec", sys.executable, str(TOOL), "inside", "/c d"]


def test_the_frequency_of_the_counter_is_measured_alike_twice(tool):
    first, second = tool.measured_tsc_khz(), tool.measured_tsc_khz()
    assert first == pytest.approx(second, rel=1e-3)


def test_the_command_line_keeps_the_commands_own_options(tool):
    asked = tool.parsed(
        ["run", "--memory", "512", "--share", "/work", "--timeout", "60", "--", "pytest", "-m", "firecracker"]
    )
    assert (asked.memory, asked.timeout, asked.share) == (512, 60.0, [Path("/work")])
    assert asked.command == ["pytest", "-m", "firecracker"]
    assert asked.cpus == os.cpu_count()


@pytest.mark.parametrize("arguments", [[], ["run"], ["start"], ["run", "--cpus", "many", "true"]])
def test_what_makes_no_sense_is_refused(tool, arguments):
    with pytest.raises(SystemExit, match="2"):
        tool.parsed(arguments)


def test_without_a_kernel_it_says_what_to_do(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EMULATED_MACHINE_CACHE", str(tmp_path))
    assert tool.main(["run", "true"]) == tool.FAILED
    assert "run `emulated_machine.py setup` first" in capsys.readouterr().err


def test_the_tests_of_real_microvms_are_one_command(tool, tmp_path, monkeypatch):
    """With the programs of a directory and the kernel that was built, in this project's own environment."""
    monkeypatch.setattr(tool, "ready", lambda directory: (directory / "vmlinux", ("qemu-system-x86_64",)))
    monkeypatch.setenv("EMULATED_MACHINE_CACHE", str(tmp_path))
    for name in ("firecracker", "jailer"):
        (tmp_path / name).touch(mode=0o755)
    asked = tool.parsed(["test", str(tmp_path), "--", "-k", "clones"])
    machine, command, environ = tool.tests(asked.firecracker, asked.pytest)
    assert command[1:3] == ["-m", "pytest"]
    assert command[command.index("firecracker") - 1] == "-m"
    assert command[-2:] == ["-k", "clones"]
    assert str(TOOL.parents[1] / "tests/node/fcvm/test_real.py") in command
    assert environ["FC_INVOKE_FIRECRACKER_BIN"] == str(tmp_path / "firecracker")
    assert environ["FC_INVOKE_KERNEL_IMAGE"] == str(machine.kernel) == str(tmp_path / "vmlinux")


def test_a_directory_without_both_programs_is_refused(tool, tmp_path):
    (tmp_path / "firecracker").touch(mode=0o755)
    with pytest.raises(tool.NotPossible, match="has no jailer to run: unpack a release"):
        tool.tests(tmp_path, [])


def test_the_kernel_tells_what_process_guests_take(tool):
    """Control groups with every bound, and the children of a process."""
    options = set(tool.kernel_config().split())
    for name in ("MEMCG", "CGROUP_PIDS", "CFS_BANDWIDTH", "PROC_CHILDREN", "USER_NS", "SECCOMP_FILTER"):
        assert f"CONFIG_{name}=y" in options
