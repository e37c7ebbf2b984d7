"""An application like any other: routes, a lifespan, JSON."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[dict[str, object]]:
    """Open the shop."""
    yield {"prices": {"tea": 3, "coffee": 4}}


async def item(request: Request) -> JSONResponse:
    """One price, or 404."""
    name = request.path_params["name"]
    prices = request.state.prices
    if name not in prices:
        return JSONResponse({"error": f"no {name}"}, status_code=404)
    return JSONResponse({"item": name, "price": prices[name] * int(request.query_params.get("count", 1))})


app = Starlette(routes=[Route("/items/{name}", item)], lifespan=lifespan)
