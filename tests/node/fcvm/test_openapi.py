"""What our client asks, and what the double answers, agrees with Firecracker's own description of its API."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from node.fcvm.openapi import Disagreement, check_exchange, check_request, description
from node.fcvm.rig import microvm_rig
from substrate_node.fcvm import api
from substrate_node.fcvm.release import Release

REQUESTS = [
    api.MachineConfig(vcpu_count=2, mem_size_mib=256),
    api.BootSource(kernel_image_path="kernel", boot_args="quiet", initrd_path="initrd"),
    api.RootDrive(path_on_host="rootfs"),
    api.Vsock(guest_cid=3, uds_path="v.sock"),
    api.Entropy(),
    api.Start(),
    api.Pause(),
    api.CreateSnapshot(snapshot_path="state", mem_file_path="memory"),
    api.LoadSnapshot(
        snapshot_path="state",
        mem_backend=api.MemoryBackend(backend_path="memory"),
        resume_vm=True,
        vsock_override=api.VsockOverride(uds_path="other.sock"),
        clock_realtime=True,
        huge_pages="None",
    ),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: type(request).__name__)
def test_every_request_of_our_client_is_in_the_description(request_: api.Request):
    """With all of its optional fields."""
    check_request(request_.method, request_.path, msgspec.json.decode(msgspec.json.encode(request_)))


def test_every_request_of_our_client_is_in_the_list_above():
    """A new one cannot be forgotten."""
    assert {type(request) for request in REQUESTS} == set(api.Request.__subclasses__())


async def test_all_that_a_life_of_guest_base_and_clone_says_is_in_the_description(tmp_path: Path):
    """Requests as they arrived, and the answers of the double."""
    async with microvm_rig(tmp_path) as rig:
        source = await rig.vmm.boot(rig.workload, "g1", {})
        base = await rig.vmm.capture(rig.workload, source, "b1")
        await rig.vmm.discard("g1")
        await rig.vmm.restore(rig.workload, base, "c1", {})
        client = api.Api(rig.run / "c1" / "api.sock", Release(1, 17, 0))
        for path in ("/", "/version", "/machine-config", "/vm/config"):
            await client.get(path)
        with pytest.raises(api.ApiError):
            await client.send(api.Start())
        client.close()
        await rig.vmm.discard("c1")
        await rig.vmm.discard_base(base)
    exchanges = rig.double.requests()
    assert len(exchanges) == 14
    for exchange in exchanges:
        check_exchange(*(exchange[part] for part in ("method", "path", "body", "status", "answer")))


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/machine-config", {"vcpu_count": 1}),
        ("PUT", "/machine-config", {"vcpu_count": 33, "mem_size_mib": 1}),
        ("PUT", "/machine-config", {"vcpu_count": True, "mem_size_mib": 1}),
        ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 1, "memory": 1}),
        ("PUT", "/actions", {"action_type": "Reboot"}),
        ("PUT", "/nothing", {}),
        ("GET", "/version", {}),
    ],
)
def test_the_check_tells_what_is_not_described(method: str, path: str, body: object):
    """Or the tests above would prove nothing."""
    with pytest.raises(Disagreement):
        check_request(method, path, body)


def test_words_that_yaml_takes_for_booleans_are_words():
    """The level `Off` of the logger is one."""
    assert "Off" in description()["definitions"]["Logger"]["properties"]["level"]["enum"]
