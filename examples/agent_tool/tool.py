"""An agent's tool: run Python that a model wrote, in a guest of its own, and say truthfully what came of it."""

import base64
import sys
import time

import httpx

ATTEMPTS = 3


class NothingRan(Exception):
    """The code did not run. Trying again, later or elsewhere, is safe."""


class MayHaveRun(Exception):
    """The code may have run, in part or as a whole, and there is no answer. Trying again may do things twice."""


def run_python(client: httpx.Client, code: str, files: dict[str, bytes] | None = None, *, timeout_s: int = 20) -> dict:
    """What the code printed (`stdout`, `stderr`), its `exit_code`, and the `files` it made or changed.

    Code that fails is a result like any other: the model wants to see it. Raises `NothingRan` and `MayHaveRun`.
    """
    given = [{"path": path, "content_b64": base64.b64encode(data).decode()} for path, data in (files or {}).items()]
    why = ""
    for attempt in range(ATTEMPTS):
        wait_s = 0.5 * 2**attempt
        try:
            reply = client.post("/invoke/python", json={"code": code, "files": given, "timeout_seconds": timeout_s})
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            why = f"the substrate can't be reached: {error}"  # no byte of the request has left
        except httpx.TransportError as error:
            raise MayHaveRun(f"the connection broke: {type(error).__name__} {error}") from error
        else:
            if "fc-error" not in reply.headers:  # the guest's own answer
                return _result(reply)
            why = reply.text.strip()
            if reply.headers.get("fc-ran") != "no":
                raise MayHaveRun(why)
            if reply.status_code not in {429, 503}:
                raise NothingRan(why)  # a mistake of ours: the same request would be refused again
            wait_s = float(reply.headers.get("retry-after", wait_s))
        if attempt + 1 < ATTEMPTS:
            time.sleep(wait_s)
    raise NothingRan(f"given up after {ATTEMPTS} attempts: {why}")


def _result(reply: httpx.Response) -> dict:
    if reply.status_code == 400:
        raise NothingRan(reply.text)  # the guest says what is wrong with code or files
    if reply.is_error:
        raise MayHaveRun(reply.text)
    result = reply.json()
    result["files"] = {file["path"]: base64.b64decode(file["content_b64"]) for file in result["files"]}
    return result


def main(url: str) -> None:
    """Show one success, and each kind of failure."""
    count = "words = open('in.txt').read().split()\nopen('out.txt', 'w').write(str(len(words)))\nprint('counted')"
    with httpx.Client(base_url=url, timeout=60.0) as client:
        result = run_python(client, count, {"in.txt": b"to be or not to be"})
        print("it ran:      ", result["stdout"].strip(), result["files"])
        result = run_python(client, "1 / 0")
        print("it failed:   ", f"exit code {result['exit_code']},", result["stderr"].splitlines()[-1])
        result = run_python(client, "while True: pass", timeout_s=1)
        print("it was late: ", result["error"])
        for title, code, path in (("not accepted:", "", "/etc/passwd"), ("too large:   ", "#" * 9_000_000, "in.txt")):
            try:
                run_python(client, code, {path: b""})
            except NothingRan as error:
                print(title, "nothing ran:", str(error).splitlines()[0])
        try:
            run_python(client, "import os, signal; os.kill(os.getppid(), signal.SIGTERM)")
        except MayHaveRun as error:
            print("it died:     ", "it may have run:", str(error).splitlines()[0])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080")
