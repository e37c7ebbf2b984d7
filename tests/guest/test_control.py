"""What the node is told, and what happens when it does not wait for the answer."""

import socket

import pytest

from guest.host import request_bytes
from substrate_guest.control import Control, Readiness
from substrate_guest.identity import Identities
from substrate_guest.loading import adapted
from substrate_guest.shim import answering


@pytest.mark.parametrize("path", ["/shim/healthz", "/shim/ready", "/shim/nothing"])
async def test_an_answer_that_the_node_gave_up_on_leaves_no_word_on_the_console(path, capfd):
    """It asks again at once, and a machine that is slow would be kept from answering by telling of it."""
    readiness = Readiness()
    readiness.settle()
    control = Control(adapted(lambda request: ""), Identities(None, {}), readiness)
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        await answering(control.respond)(ours, request_bytes("GET", path))
    assert capfd.readouterr() == ("", "")
