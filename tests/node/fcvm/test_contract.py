"""The monitor of microVMs keeps the promises of `vmm_contract`, over the double of Firecracker."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from node.fcvm.rig import microvm_rig
from node.vmm_contract import PROMISES, Promise
from real_parts import needs

each_promise = pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)


@each_promise
async def test_microvms_keep_the_contract(promise: Promise, tmp_path: Path):
    """Each in a directory of its own."""
    async with microvm_rig(tmp_path) as rig, asyncio.timeout(60):
        await promise(rig)


@needs("root")
@each_promise
async def test_jailed_microvms_keep_the_contract(promise: Promise, tmp_path: Path):
    """Each in a jail of its own."""
    async with microvm_rig(tmp_path, jail="on") as rig, asyncio.timeout(60):
        await promise(rig)
