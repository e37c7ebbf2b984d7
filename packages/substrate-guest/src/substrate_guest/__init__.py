"""The inside of a guest: serves a Python callable or ASGI app over vsock."""

from substrate_guest.app import App, Request, Response
from substrate_guest.identity import Identity

__all__ = ["App", "Identity", "Request", "Response"]
