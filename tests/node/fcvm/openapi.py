"""Firecracker's own description of its API, and whether a request or an answer agrees with it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_DESCRIPTION = Path(__file__).parent / "data" / "firecracker-api.yaml"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The quick one, where it was built."""
_TYPES = {"object": dict, "string": str, "integer": int, "boolean": bool, "array": list, "number": (int, float)}


class Disagreement(AssertionError):
    """What was said is not in the description."""


@cache
def description() -> dict[str, Any]:
    """The file, with words that YAML takes for booleans left alone."""

    class Words(LOADER):
        pass

    Words.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:bool" or first in "tf"]
        for first, resolvers in LOADER.yaml_implicit_resolvers.items()
    }
    return yaml.load(_DESCRIPTION.read_text(), Words)


def check_exchange(method: str, path: str, body: Any, status: int, answer: Any) -> None:
    """Raise `Disagreement` unless a request and its answer are as described. One that was refused may be anything."""
    operation = _operation(method, path)
    responses = operation["responses"]
    response = responses.get(status, responses.get("default"))
    if response is None:
        raise Disagreement(f"{method} {path} never answers {status}")
    if "schema" in response:
        check(answer, response["schema"], f"answer to {method} {path}")
    elif answer is not None:
        raise Disagreement(f"{method} {path} answers {status} with a body: {answer!r}")
    if status < 400:
        check_request(method, path, body)


def check_request(method: str, path: str, body: Any) -> None:
    """Raise `Disagreement` unless a request is as described."""
    wanted = [each for each in _operation(method, path).get("parameters", ()) if each["in"] == "body"]
    if not wanted:
        if body is not None:
            raise Disagreement(f"{method} {path} takes no body")
        return
    check(body, wanted[0]["schema"], f"{method} {path}")


def check(value: Any, schema: dict[str, Any], where: str) -> None:
    """Raise `Disagreement` unless a value is of a schema; fields that it does not name are refused, as the API does."""
    schema = _resolved(schema)
    kind = schema.get("type", "object")
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind in ("integer", "number")):
        raise Disagreement(f"{where}: {value!r} is no {kind}")
    if "enum" in schema and value not in schema["enum"]:
        raise Disagreement(f"{where}: {value!r} is none of {schema['enum']}")
    if kind == "integer" and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        raise Disagreement(f"{where}: {value} is out of bounds")
    if kind == "array":
        for number, item in enumerate(value):
            check(item, schema["items"], f"{where}[{number}]")
    if kind == "object":
        _check_members(value, schema, where)


def _check_members(value: dict[str, Any], schema: dict[str, Any], where: str) -> None:
    missing = set(schema.get("required", ())) - value.keys()
    if missing:
        raise Disagreement(f"{where}: {sorted(missing)} are missing")
    properties = schema.get("properties")
    for name, member in value.items() if properties is not None else ():
        if name not in properties:
            raise Disagreement(f"{where}: there is no {name!r}")
        if member is not None:
            check(member, properties[name], f"{where}.{name}")


def _operation(method: str, path: str) -> dict[str, Any]:
    for template, operations in description()["paths"].items():
        if re.fullmatch(re.sub(r"\{[^}]*\}", "[^/]+", template), path) and method.lower() in operations:
            return operations[method.lower()]
    raise Disagreement(f"there is no {method} {path}")


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = description()["definitions"][schema["$ref"].rpartition("/")[2]]
    return schema
