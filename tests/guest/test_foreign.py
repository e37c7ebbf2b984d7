"""A workload that another interpreter runs, with our shim before it."""

import asyncio
import sys
from pathlib import Path

import h11
import pytest

import substrate_guest
from guest.host import IDENTITY, read_reply, request_bytes
from substrate_guest.foreign import ForeignWorkload
from substrate_guest.identity import Identity
from substrate_guest.image import Image, served
from substrate_guest.shim import answering

HANDLERS = """
from substrate_guest import App
app, seen = App(), []
@app.handler
def handle(request):
    return {"body": request.body.decode(), "guest": seen}
@app.restored
def restored(identity):
    if identity.hostname == "bad":
        raise ValueError("not here")
    seen.append(identity.guest_id)
"""
IDENTITY_OF = Identity(**{name: value for name, value in IDENTITY.items() if name != "entropy_b64"}, entropy=bytes(64))


@pytest.fixture
def workload(tmp_path, monkeypatch):
    """What `python:handlers:app` makes of an image whose Python is this one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(sys.executable)
    (tmp_path / "site").mkdir()
    for package in (substrate_guest, h11):  # as in an image: only these, and not from where this Python has them
        (tmp_path / "site" / package.__name__).symlink_to(Path(package.__file__).parent)
    (tmp_path / "handlers.py").write_text(HANDLERS)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    image = Image(env={}, argv=(), directory=str(tmp_path), user="")
    made = served("python:handlers:app", image, None, str(tmp_path / "site"))
    assert isinstance(made, ForeignWorkload)
    return made


async def ask(workload, body):
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(request_bytes(body=body))
        reading = asyncio.get_running_loop().run_in_executor(None, read_reply, ours)
        await answering(workload.respond)(theirs, b"")
        theirs.close()
        return await reading


async def test_the_images_python_serves_the_workload_and_hears_of_its_identity(workload):
    await workload.prime()
    async with asyncio.TaskGroup() as duties:
        await workload.start(duties)
        await workload.restored(IDENTITY_OF)
        reply = await ask(workload, b"hello")
        assert reply.json() == {"body": "hello", "guest": [IDENTITY["guest_id"]]}
        with pytest.raises(RuntimeError, match="500: not restored: ValueError: not here"):
            await workload.restored(
                Identity(**{name: getattr(IDENTITY_OF, name) for name in IDENTITY_OF.__slots__} | {"hostname": "bad"})
            )
        for task in asyncio.all_tasks():
            if task.get_name() == "server":
                task.cancel()


async def test_a_workload_that_fails_to_load_fails_to_start(workload, tmp_path):
    (tmp_path / "handlers.py").write_text("raise ValueError('no')")
    async with asyncio.TaskGroup() as duties:
        with pytest.raises(RuntimeError, match="the server ended with exit status 2"):
            await workload.start(duties)
