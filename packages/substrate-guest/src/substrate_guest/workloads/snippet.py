"""What the `python` workload accepts, decided without running anything."""

from binascii import Error as NotBase64
from binascii import a2b_base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from substrate_guest.problems import BadInput, Problem, parsed_object, shown

TIMEOUT_S = 20.0
TIMEOUT_S_MAX = 25.0
FILE_BYTES_MAX = 2 * 1024 * 1024
FILES_BYTES_MAX = 5 * 1024 * 1024
FILES_MAX = 1000
PATH_BYTES_MAX = 1024
NAME_BYTES_MAX = 255
DEPTH_MAX = 32

MEMBERS = ("code", "files", "timeout_seconds")
FILE_MEMBERS = ("path", "content_b64")
PATH_ACCEPTED = (
    f"a relative path of at most {DEPTH_MAX} names and {PATH_BYTES_MAX} bytes, without '.', '..', empty names or NUL"
)


@dataclass(frozen=True, slots=True)
class Snippet:
    """Python source to run beside some files, for at most `timeout_s` seconds."""

    code: str
    files: dict[str, bytes]
    timeout_s: float


def parse_snippet(body: bytes) -> Snippet:
    """The snippet in a request's JSON body.

    Raises `BadInput` with every problem there is.
    """
    members = parsed_object(body)
    problems = list(_unknown(members, MEMBERS, ""))
    code = _text(members, "code", "Python source", problems)
    timeout_s = _timeout_s(members, problems)
    files = _files(members, problems)
    if problems:
        raise BadInput(problems)
    return Snippet(code, files, timeout_s)


def path_problem(path: str) -> str | None:
    """Why `path`, which is Unicode text, cannot name a file in the working directory; `None` when it can."""
    names = path.split("/")
    if path.startswith("/"):
        return "it is absolute"
    if "\0" in path:
        return "it holds NUL"
    if any(name in ("", ".", "..") for name in names):
        return "it holds an empty name, '.' or '..'"
    if len(names) > DEPTH_MAX or len(path.encode()) > PATH_BYTES_MAX:
        return "it is too long"
    if any(len(name.encode()) > NAME_BYTES_MAX for name in names):
        return f"a name in it has more than {NAME_BYTES_MAX} bytes"
    return None


def _unknown(members: dict[str, object], known: tuple[str, ...], within: str) -> Iterator[Problem]:
    for name in members:
        if name not in known:
            yield Problem(f"{within}{shown(name)}", "an unknown member", ", ".join(known))


def _text(members: dict[str, object], name: str, accepted: str, problems: list[Problem], within: str = "") -> str:
    value = members.get(name)
    if not isinstance(value, str):
        problems.append(Problem(within + name, shown(value) if name in members else "nothing", accepted))
        return ""
    try:
        value.encode()
    except UnicodeEncodeError:
        problems.append(Problem(within + name, "a lone surrogate", "Unicode text"))
        return ""
    return value


def _timeout_s(members: dict[str, object], problems: list[Problem]) -> float:
    value = members.get("timeout_seconds")
    if value is None:
        return TIMEOUT_S
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= TIMEOUT_S_MAX:
        accepted = f"a number of seconds above 0, at most {TIMEOUT_S_MAX:g} (default {TIMEOUT_S:g})"
        problems.append(Problem("timeout_seconds", shown(value), accepted))
        return TIMEOUT_S
    return float(value)


def _files(members: dict[str, object], problems: list[Problem]) -> dict[str, bytes]:
    entries = members.get("files")
    if entries is None:
        return {}
    if not isinstance(entries, list) or len(entries) > FILES_MAX:
        accepted = f"an array of at most {FILES_MAX} objects with {' and '.join(FILE_MEMBERS)}"
        problems.append(Problem("files", shown(entries), accepted))
        return {}
    files: dict[str, bytes] = {}
    for index, entry in enumerate(entries):
        at = f"files[{index}]"
        if not isinstance(entry, dict):
            problems.append(Problem(at, shown(entry), f"an object with {' and '.join(FILE_MEMBERS)}"))
            continue
        problems += _unknown(entry, FILE_MEMBERS, f"{at}.")
        path = _path(entry, at, files, problems)
        files[path] = _content(entry, at, problems)
    problems += _collisions(files)
    if (total_bytes := sum(map(len, files.values()))) > FILES_BYTES_MAX:
        problems.append(Problem("files", f"{total_bytes} bytes together", f"at most {FILES_BYTES_MAX}"))
    return files


def _path(entry: dict[str, object], at: str, earlier: dict[str, bytes], problems: list[Problem]) -> str:
    count = len(problems)
    path = _text(entry, "path", PATH_ACCEPTED, problems, f"{at}.")
    if len(problems) == count and (why := path_problem(path)):
        problems.append(Problem(f"{at}.path", f"{shown(path)} ({why})", PATH_ACCEPTED))
    elif path and path in earlier:
        problems.append(Problem(f"{at}.path", f"{shown(path)} again", "each path once"))
    return path


def _content(entry: dict[str, object], at: str, problems: list[Problem]) -> bytes:
    count = len(problems)
    encoded = _text(entry, "content_b64", "base64", problems, f"{at}.")
    if len(problems) > count:
        return b""
    try:
        content = a2b_base64(encoded.encode(), strict_mode=True)
    except NotBase64 as error:
        problems.append(Problem(f"{at}.content_b64", f"{shown(encoded)} ({error})", "base64"))
        return b""
    if len(content) > FILE_BYTES_MAX:
        problems.append(Problem(f"{at}.content_b64", f"{len(content)} bytes", f"at most {FILE_BYTES_MAX} bytes"))
        return b""
    return content


def _collisions(files: dict[str, bytes]) -> Iterator[Problem]:
    for path in files:
        for parent in PurePosixPath(path).parents:
            if str(parent) in files:
                yield Problem("files", f"{shown(str(parent))} and {shown(path)}", "no file that is also a directory")
