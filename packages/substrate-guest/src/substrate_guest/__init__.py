"""The inside of a guest: serves a Python callable or ASGI app over vsock."""
