"""The built-in echo, in a zygote that forks plainly: its clones share namespaces, file tree and filter with it.

What is measured beside it is then the price of isolating a clone, and nothing else. For the benchmark alone.
"""

from __future__ import annotations

from substrate_guest import cloning
from substrate_guest.workloads.echo import app

__all__ = ["app"]

cloning.NAMESPACES = 0
cloning.Mould.become_guest = lambda _mould, _identity: None
