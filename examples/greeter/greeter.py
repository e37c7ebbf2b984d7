"""The smallest workload: a function from a request to an answer."""

from substrate_guest import Request


def app(request: Request) -> dict[str, str]:
    """Greet whoever the session names."""
    return {"greeting": f"Hello, {request.session or 'stranger'}!"}
