"""What the author of a callable workload can rely on."""

import asyncio
import http.client
import threading

import pytest

from substrate_guest import App, Request, Response
from substrate_guest.app import Request as AppRequest


def returning(result):
    return App(lambda request: result)


async def agen(*pieces):
    for piece in pieces:
        yield piece


@pytest.mark.parametrize(
    ("target", "path", "query", "session"),
    [
        ("/invoke", "/invoke", "", None),
        ("/invoke/", "/invoke/", "", None),
        ("/invoke/a", "/invoke/a", "", "a"),
        ("/invoke/a/b?c=/invoke/d", "/invoke/a/b", "c=/invoke/d", "a/b"),
        ("/invoke/caf%C3%A9%20x", "/invoke/café x", "", "café x"),
        ("/invoke/%ff", "/invoke/\udcff", "", "\udcff"),
        ("/other/a?q?r", "/other/a", "q?r", None),
    ],
)
def test_a_target_says_path_query_and_session(target, path, query, session):
    request = Request("GET", target)
    assert (request.path, request.query, request.session) == (path, query, session)


def test_a_header_is_found_in_any_case_and_the_body_read_as_json():
    request = Request("POST", "/", (("content-type", "a"), ("x", "1"), ("x", "2")), b'{"a": 1}')
    assert (request.header("Content-Type"), request.header("X"), request.header("y")) == ("a", "1", None)
    assert request.json() == {"a": 1}


@pytest.mark.parametrize(
    ("result", "body", "content_type"),
    [
        (b"\x00\xff", b"\x00\xff", "application/octet-stream"),
        (bytearray(b"ab"), b"ab", "application/octet-stream"),
        ("h\u00e9", "h\u00e9".encode(), "text/plain; charset=utf-8"),
        ({"a": [1, None]}, b'{"a":[1,null]}', "application/json"),
        ([1], b"[1]", "application/json"),
        (Response("x", headers={"Content-Type": "text/html"}), b"x", "text/html"),
        (
            Response({"a": 1}, headers=[("content-type", "application/problem+json")]),
            b'{"a":1}',
            "application/problem+json",
        ),
    ],
)
async def test_a_result_known_at_once_gets_its_length_and_type(ask_of, result, body, content_type):
    async with ask_of(returning(result)) as ask:
        reply = await ask()
    assert (reply.status, reply.body, reply.headers["content-type"]) == (200, body, content_type)
    assert reply.headers["content-length"] == str(len(body))


async def test_status_and_headers_are_the_handlers(ask_of):
    async with ask_of(returning(Response("gone", 410, [("x-a", "1")]))) as ask:
        reply = await ask()
    assert (reply.status, reply.headers["x-a"]) == (410, "1")


@pytest.mark.parametrize("made", [lambda: iter([b"a", b"", bytearray(b"b")]), lambda: agen(b"a", b"b")])
@pytest.mark.parametrize("wrap", [lambda body: body, Response])
async def test_an_iterator_is_streamed(ask_of, made, wrap):
    async with ask_of(App(lambda request: wrap(made()))) as ask:
        reply = await ask()
    assert (reply.status, reply.body, reply.headers["transfer-encoding"]) == (200, b"ab", "chunked")


async def test_async_and_plain_functions_of_every_kind_are_handlers(ask_of):
    class Plain:
        def __call__(self, request):
            return request.body

    class Async:
        async def __call__(self, request):
            return request.body

    async def coroutine(request):
        return request.body

    def generator(request):
        yield request.body

    async def async_generator(request):
        yield request.body

    def plain_that_returns_a_coroutine(request):
        return coroutine(request)

    for handler in (Plain(), Async(), coroutine, generator, async_generator, plain_that_returns_a_coroutine):
        async with ask_of(handler) as ask:
            assert (await ask(body=b"in")).body == b"in"


async def test_plain_functions_run_in_one_thread_of_their_exchange(ask_of):
    """A hook can leave something in thread-local storage; the thread ends with the exchange."""
    threads = []

    def note(_):
        threads.append(threading.current_thread())

    def handler(request):
        note(request)
        note((yield b"a"))

    async with ask_of(App(handler, before=[note], after=[note])) as ask:
        await ask()
    assert len(threads) == 4
    assert len(set(threads)) == 1
    assert threads[0] is not threading.main_thread()
    assert not threads[0].is_alive()


async def test_async_functions_run_in_the_loop(ask_of):
    async def handler(request):
        return threading.current_thread().name

    async with ask_of(handler) as ask:
        assert (await ask()).text == threading.main_thread().name


async def test_hooks_run_around_the_handler_in_order(ask_of):
    events = []
    app = App()

    @app.prime
    def prime():
        events.append("prime")

    @app.before
    async def first(request):
        events.append("before 1")

    @app.before
    def second(request):
        events.append("before 2")

    @app.after
    def after(request):
        events.append(f"after {request.target}")

    @app.handler
    def handle(request):
        events.append("handler")
        return "ok"

    async with ask_of(app) as ask:
        assert (await ask(target="/x")).text == "ok"
    assert events == ["prime", "before 1", "before 2", "handler", "after /x"]


def failing(error):
    def hook(_):
        raise error

    return hook


async def test_the_first_failing_before_hook_skips_the_handler_but_no_after_hook(ask_of, capsys):
    ran = []
    app = App(
        lambda request: ran.append("handler"),
        before=[failing(KeyError("first")), lambda request: ran.append("second")],
        after=[lambda request: ran.append("after")],
    )
    async with ask_of(app) as ask:
        reply = await ask()
    assert (reply.status, reply.text) == (502, "the workload failed: KeyError: 'first'\n")
    assert ran == ["after"]


async def test_all_after_hooks_run_and_their_errors_join_the_handlers(ask_of, capsys):
    app = App(failing(ValueError("a")), after=[failing(KeyError("b")), failing(OSError("c"))])
    async with ask_of(app) as ask:
        reply = await ask()
    assert (reply.status, reply.text) == (502, "the workload failed: ValueError: a; KeyError: 'b'; OSError: c\n")


async def test_a_failing_after_hook_alone_fails_the_call(ask_of, capsys):
    async with ask_of(App(lambda request: "fine", after=[failing(ValueError("a"))])) as ask:
        assert (await ask()).status == 502


@pytest.mark.parametrize(
    "result",
    [
        None,
        7,
        object(),
        ("a",),
        Response(7),
        {"a": object()},
        Response("x", 999_999),
        Response("x", headers={"a": "\r\n"}),
    ],
)
async def test_a_result_that_cannot_be_a_reply_is_a_502_that_names_it(ask_of, capsys, result):
    async with ask_of(returning(result)) as ask:
        reply = await ask()
    assert reply.status == 502
    assert "Error: " in reply.text


@pytest.mark.parametrize("error", [ValueError("secret\n" * 500), SystemExit(3), RecursionError()])
async def test_a_traceback_goes_to_the_console_and_never_to_the_caller(ask_of, capsys, error):
    async with ask_of(failing(error)) as ask:
        reply = await ask()
    assert reply.status == 502
    assert "Traceback" not in reply.text
    assert len(reply.text) < 600
    assert "Traceback" in capsys.readouterr().err


async def test_an_error_before_the_first_piece_is_still_a_502(ask_of, capsys):
    def handler(request):
        raise ValueError("early")
        yield b""

    async with ask_of(handler) as ask:
        assert (await ask()).status == 502


@pytest.mark.parametrize("bad", [ValueError("late"), None])
async def test_an_error_after_the_head_cuts_the_reply(ask_of, capsys, bad):
    """A truncated reply never looks complete, whether the handler raises or yields what is not bytes."""

    def handler(request):
        yield b"half"
        if bad:
            raise bad
        yield "text"

    with pytest.RaisesGroup(http.client.IncompleteRead):
        async with ask_of(handler) as ask:
            await ask()


async def test_a_failing_after_hook_cuts_a_streamed_reply(ask_of, capsys):
    with pytest.RaisesGroup(http.client.IncompleteRead):
        async with ask_of(App(lambda request: iter([b"a"]), after=[failing(ValueError("late"))])) as ask:
            await ask()


async def test_a_generator_is_closed_when_its_reader_has_gone(ask_of, exchange_pair):
    closed = threading.Event()

    def handler(request):
        try:
            while True:
                yield bytes(65536)
        finally:
            closed.set()

    from substrate_guest.loading import adapted

    peer, exchange = exchange_pair()
    peer.close()
    with pytest.raises(OSError, match="pipe"):
        await adapted(handler).respond(AppRequest("GET", "/"), exchange)
    assert closed.is_set()


async def test_a_head_request_does_not_wait_for_an_endless_body(ask_of):
    def handler(request):
        while True:
            yield b"x"

    async with ask_of(handler) as ask:
        assert (await ask("HEAD")).body == b""


async def test_exchanges_run_beside_each_other(ask_of):
    """One that blocks its thread does not hold up another."""
    meeting = threading.Barrier(2, timeout=10)
    async with ask_of(lambda request: str(meeting.wait())) as ask, asyncio.TaskGroup() as tasks:
        both = [tasks.create_task(ask()) for _ in range(2)]
    assert {task.result().text for task in both} == {"0", "1"}


def test_an_app_has_one_handler():
    with pytest.raises(ValueError, match="has one handler"):
        App(lambda request: b"").handler(lambda request: b"")
