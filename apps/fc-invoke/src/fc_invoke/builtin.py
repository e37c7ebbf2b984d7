"""The workloads that are there with no configuration at all, written as a user would write them."""

from __future__ import annotations

import json

SOURCE = "the built-in workloads"

_SERVE = ["python", "-m", "substrate_guest", "serve"]

# Without a pool: a call gets a clone of the base, a parked guest would hold memory all the while, and
# parking the next one beside each call took from calls in a row what it gave to single ones.
TABLE = json.dumps(
    {
        "echo": {
            "command": [*_SERVE, "substrate_guest.workloads.echo:app"],
            "memMib": 64,
            "warmBase": True,
            "requestTimeout": "30s",
        },
        "python": {
            "command": [*_SERVE, "substrate_guest.workloads.python:app"],
            "memMib": 256,
            "warmBase": True,
            "requestTimeout": "30s",
        },
    }
)

WELCOME = """\
Try it, from another terminal:

  {curl} -d '{{"code": "print(6*7)"}}' {url}/invoke/python
  {curl} -d hello {url}/invoke/echo

Each call runs in a process guest of its own. That keeps calls apart; it is no security boundary (see README.md).
Watch it: {admin} in a browser, or `fc-invoke top`  ·  Ctrl-C drains and stops.
"""
"""What `serve` prints for a person, with the addresses filled in."""
