"""Everything that is wrong with an input, said at once."""

from dataclasses import asdict, dataclass

SHOWN_CHARS_MAX = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with an input: where, what was found, and what would have been accepted."""

    path: str
    found: str
    accepted: str

    def __str__(self) -> str:
        return f"{self.path}: found {self.found}, accepted is {self.accepted}"


class BadInput(ValueError):
    """The input cannot be used; `problems` has every reason, not only the first."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(map(str, problems)))

    def as_json(self) -> dict[str, object]:
        """The same, for a caller to read: `{"error": …, "problems": [{path, found, accepted}, …]}`."""
        return {"error": "the input cannot be used", "problems": [asdict(problem) for problem in self.problems]}


def shown(value: object) -> str:
    """`value` as a person would write it in JSON or Python, cut to `SHOWN_CHARS_MAX` characters."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'an array'} of {len(value)}"
    text = repr(value[:SHOWN_CHARS_MAX] if isinstance(value, str | bytes) else value)
    return text if len(text) <= SHOWN_CHARS_MAX else text[: SHOWN_CHARS_MAX - 1] + "…"


def parsed_object(body: bytes) -> dict[str, object]:
    """The JSON object in `body`, keys unique and numbers finite.

    Raises `BadInput`.
    """
    import json

    try:
        value = json.loads(body, object_pairs_hook=_unique, parse_constant=_not_finite)
    except BadInput:
        raise
    except (ValueError, RecursionError) as error:
        raise BadInput([Problem("body", f"{len(body)} bytes ({error})", "one JSON object in UTF-8")]) from None
    if not isinstance(value, dict):
        raise BadInput([Problem("body", shown(value), "one JSON object")])
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise BadInput([Problem("body", f"{shown(key)} more than once", "each key once") for key in twice])
    return members


def _not_finite(name: str) -> object:
    raise BadInput([Problem("body", name, "finite numbers")])
