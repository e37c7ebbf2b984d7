"""An ASGI application runs unmodified."""

import asyncio
import http.client
from contextlib import asynccontextmanager

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from substrate_guest.asgi import AsgiWorkload


async def see(request: Request):
    """What an application sees of a request."""
    return JSONResponse(
        {
            "method": request.method,
            "path": request.url.path,
            "query": dict(request.query_params),
            "header": request.headers["x-a"],
            "body": (await request.body()).decode(),
            "state": request.state.warm,
        },
        headers={"x-b": "1"},
    )


def stream(request: Request):
    """A plain endpoint, which Starlette runs in a thread, with a plain iterator."""
    return StreamingResponse(iter([b"a", b"", b"b"]), media_type="text/plain")


@pytest.fixture
def app():
    @asynccontextmanager
    async def lifespan(app):
        yield {"warm": "yes"}

    routes = [Route("/see/{name}", see, methods=["GET", "POST"]), Route("/stream", stream)]
    return Starlette(routes=routes, lifespan=lifespan)


async def test_starlette_sees_the_request_and_its_lifespan_state(ask_of, app):
    async with ask_of(app) as ask:
        reply = await ask("POST", "/see/caf%C3%A9?q=1", b"in", [("x-a", "2")])
    assert (reply.status, reply.headers["x-b"]) == (200, "1")
    assert reply.headers["content-length"] == str(len(reply.body))
    seen = {
        "method": "POST",
        "path": "/see/café",
        "query": {"q": "1"},
        "header": "2",
        "body": "in",
        "state": "yes",
    }
    assert reply.json() == seen


async def test_starlette_streams(ask_of, app):
    async with ask_of(app) as ask:
        reply = await ask("GET", "/stream")
    assert (reply.body, reply.headers["transfer-encoding"]) == (b"ab", "chunked")


async def test_starlette_answers_head_and_unknown_paths(ask_of, app):
    async with ask_of(app) as ask:
        head, lost = await ask("HEAD", "/see/x", headers=[("x-a", "")]), await ask("GET", "/lost")
    assert (head.status, head.body, lost.status) == (200, b"", 404)


async def test_background_tasks_run_after_the_reply_is_complete(ask_of):
    done = []
    app = Starlette(routes=[Route("/", lambda _: PlainTextResponse("ok", background=BackgroundTask(done.append, 1)))])
    async with ask_of(app) as ask:
        assert (await ask("GET", "/")).text == "ok"
    assert done == [1]


async def test_the_scope_keeps_the_bytes_of_the_path(ask_of):
    scopes = []

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            raise NotImplementedError  # as an application says that has no lifespan
        scopes.append(scope)
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    async with ask_of(app) as ask:
        assert (await ask("GET", "/a%2Fb?c=%2F")).status == 200
    [scope] = scopes
    assert (scope["raw_path"], scope["path"], scope["query_string"]) == (b"/a%2Fb", "/a/b", b"c=%2F")


async def test_an_application_that_knows_no_lifespan_is_served_all_the_same(ask_of, capsys):
    async def app(scope, receive, send):
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    async with ask_of(app) as ask:
        assert (await ask("GET", "/")).text == "ok"
    assert "no lifespan" in capsys.readouterr().err


async def test_a_failed_startup_is_a_failed_start():
    @asynccontextmanager
    async def lifespan(app):
        raise ValueError("no model")
        yield

    workload = AsgiWorkload(Starlette(lifespan=lifespan))
    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match=r"startup failed: (.|\n)*no model")):
        async with asyncio.TaskGroup() as duties:
            await workload.start(duties)


async def sent(messages, ask_of):
    async def app(scope, receive, send):
        if scope["type"] == "http":
            for message in messages:
                await send(message)

    async with ask_of(app) as ask:
        return await ask("GET", "/")


START = {"type": "http.response.start", "status": 200, "headers": []}


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [START],
        [START, START],
        [{"type": "http.response.body", "body": b"no head"}],
        [{"type": "websocket.accept"}],
        [START | {"headers": [(b"content-length", b"9")]}, {"type": "http.response.body", "body": b"short"}],
    ],
)
async def test_half_a_reply_or_a_wrong_message_is_a_502(ask_of, capsys, messages):
    assert (await sent(messages, ask_of)).status == 502


async def test_a_stream_that_does_not_end_is_cut(ask_of, capsys):
    with pytest.RaisesGroup(http.client.IncompleteRead):
        await sent([START, {"type": "http.response.body", "body": b"half", "more_body": True}], ask_of)


async def test_receive_says_disconnect_once_the_reply_is_complete(ask_of):
    messages = []

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            return
        messages.append(await receive())
        await send(START)
        await send({"type": "http.response.body", "body": b"ok"})
        messages.append(await receive())

    async with ask_of(app) as ask:
        await ask("POST", "/", b"in")
    assert messages == [{"type": "http.request", "body": b"in", "more_body": False}, {"type": "http.disconnect"}]


async def test_an_application_waiting_for_its_caller_hears_that_it_left(exchange_pair):
    async def app(scope, receive, send):
        await receive()
        assert await receive() == {"type": "http.disconnect"}
        await send(START)
        with pytest.raises(OSError, match="pipe"):
            await send({"type": "http.response.body", "body": b"nobody"})
        raise LookupError("seen")

    from substrate_guest.app import Request as Whole

    peer, exchange = exchange_pair()
    peer.close()
    with pytest.raises(LookupError, match="seen"):
        await AsgiWorkload(app).respond(Whole("GET", "/"), exchange)
    exchange.close()


async def test_a_lifespan_that_breaks_after_startup_shows_its_traceback_and_is_served_on(ask_of, capsys):
    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await send({"type": "lifespan.startup.complete"})
            raise ValueError("a background duty died")
        await send(START)
        await send({"type": "http.response.body", "body": b"ok"})

    async with ask_of(app) as ask:
        assert (await ask("GET", "/")).text == "ok"
    console = capsys.readouterr().err
    assert "Traceback" in console
    assert "a background duty died" in console
