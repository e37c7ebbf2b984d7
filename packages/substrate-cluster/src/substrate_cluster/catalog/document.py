"""Bytes to a tree, from JSON or YAML, keeping what both formats usually lose: duplicate keys and line numbers.

YAML here is the part of it that means the same to everybody. What YAML 1.1 would silently turn into something
else (`on`, `0755`, `1:30`, a date), and anchors, aliases and tags, become `Odd` values that no field accepts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import yaml

from substrate_cluster.catalog.findings import refused, shortened

MOST_BYTES = 4 * 1024 * 1024
DEEPEST = 32

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is several times faster, and optional
_RESOLVER: Any = yaml.resolver.Resolver()
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[-+]?[0-9]+\.[0-9]+")
_LONGEST_INTEGER = 18
_UNAMBIGUOUS = {
    "bool": "write true or false, or quote it if it is a string",
    "int": "write a plain decimal number, or quote it if it is a string",
    "float": "write a plain decimal number, or quote it if it is a string",
}


class Odd(NamedTuple):
    """A value that no field accepts: what was found, and what to write instead."""

    found: str
    hint: str


class Key(NamedTuple):
    """One entry of an object. `line` counts from 1 and is None where the format does not tell."""

    key: str | Odd
    value: Value
    line: int | None = None


class Mapping(NamedTuple):
    """An object as written: every entry in order, duplicates included."""

    entries: tuple[Key, ...]


Value: TypeAlias = "bool | int | float | str | Odd | list[Value] | Mapping | None"


def read_document(raw: bytes, *, source: str) -> Value:
    """The tree of a JSON or YAML document; a name in `.json`, `.yaml` or `.yml` decides, else a leading `{` is JSON.

    Raises `TableInvalid` when the bytes are too many, not UTF-8, nested too deeply, or not of their format.
    """
    if len(raw) > MOST_BYTES:
        raise refused(source, f"found more than {MOST_BYTES:,} bytes; accepted are at most so many")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise refused(source, f"found the byte 0x{raw[error.start]:02x}; accepted is UTF-8", line) from None
    if not text.strip():
        raise refused(source, "found nothing; write {} for a table without workloads")
    if source.endswith(".json") or (text.lstrip().startswith("{") and not source.endswith((".yaml", ".yml"))):
        return _from_json(text, source)
    return _from_yaml(text, source)


def found(value: Value) -> str:
    """A value as an error message shows it, short and in the terms of JSON."""
    match value:
        case Odd():
            return value.found
        case Mapping(entries):
            return "an object" if entries else "an empty object"
        case list():
            return "a list" if value else "an empty list"
        case str():
            return f"the string {json.dumps(shortened(value), ensure_ascii=False)}"
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case _:
            return f"the number {value}"


def _from_json(text: str, source: str) -> Value:
    try:
        tree: Value = json.loads(
            text,
            object_pairs_hook=lambda pairs: Mapping(tuple(Key(key, value) for key, value in pairs)),
            parse_int=_integer,
            parse_constant=lambda name: Odd(name, "JSON has no such number"),
        )
    except json.JSONDecodeError as error:
        message = f"this is not JSON: {error.msg} (column {error.colno})"
        if not source.endswith(".json"):
            message += "; it was read as JSON because it begins with {: to have it read as YAML, name it .yaml"
        raise refused(source, message, error.lineno) from None
    except RecursionError:
        raise refused(source, f"found too many levels; accepted are at most {DEEPEST}") from None
    return tree


def _integer(digits: str) -> int | Odd:
    count = len(digits.lstrip("-+"))
    if count > _LONGEST_INTEGER:
        return Odd(f"a number of {count:,} digits", "that is more than any field holds")
    return int(digits)


class _Open:
    """An object or a list whose end has not been read yet."""

    def __init__(self, event: yaml.CollectionStartEvent, odd: Odd | None) -> None:
        self.is_mapping = isinstance(event, yaml.MappingStartEvent)
        self.odd = odd
        self.values: list[tuple[Value, int]] = []

    def closed(self) -> Value:
        if self.odd is not None:
            return self.odd
        if not self.is_mapping:
            return [value for value, _ in self.values]
        return Mapping(
            tuple(
                Key(_key(key), value, line)
                for (key, line), (value, _) in zip(self.values[::2], self.values[1::2], strict=True)
            )
        )


def _from_yaml(text: str, source: str) -> Value:
    try:
        return _tree(yaml.parse(text, Loader=_LOADER), source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise refused(source, f"this is not YAML: {what}", None if mark is None else mark.line + 1) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # an escape beyond Unicode is a ValueError of `chr`
        raise refused(source, f"this is not YAML: {shortened(str(error), 200)}") from None


def _tree(events: Iterator[Any], source: str) -> Value:
    """Build the one document of the stream without recursion, so that depth is ours to bound."""
    nested: list[_Open] = []
    documents: list[Value] = []
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent) and documents:
            raise refused(source, "found a second document; accepted is one", line)
        if isinstance(event, yaml.CollectionStartEvent):
            if len(nested) == DEEPEST:
                raise refused(source, f"found too many levels; accepted are at most {DEEPEST}", line)
            nested.append(_Open(event, _odd_node(event)))
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            value = nested.pop().closed()
        elif isinstance(event, yaml.AliasEvent):
            value = Odd(f"the alias *{shortened(str(event.anchor))}", "write the value out")
        elif isinstance(event, yaml.ScalarEvent):
            value = _odd_node(event) or _scalar(event)
        else:
            continue
        if nested:
            nested[-1].values.append((value, line))
        else:
            documents.append(value)
    if not documents:
        raise refused(source, "found nothing but comments; write {} for a table without workloads")
    return documents[0]


def _odd_node(event: yaml.ScalarEvent | yaml.CollectionStartEvent) -> Odd | None:
    """Why a node is not taken for what it says: it has an anchor or a tag."""
    if event.anchor is not None:
        return Odd(f"the anchor &{shortened(event.anchor)}", "leave it out: aliases are not accepted")
    if event.tag is not None:
        return Odd(f"the tag {shortened(event.tag)}", "leave it out: a value is what it looks like")
    return None


def _scalar(event: yaml.ScalarEvent) -> Value:
    """The value of a scalar if all YAML readers agree about it, else an `Odd` that says how to make them agree."""
    text = event.value
    plain = event.implicit[0]  # otherwise quoted or a block: a string whatever it looks like
    kind = _RESOLVER.resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2] if plain else "str"
    match kind:
        case "str":
            return text
        case "null":
            return None
        case "bool" if text.lower() in {"true", "false"}:
            return text.lower() == "true"
        case "int" if _INTEGER.fullmatch(text):
            return _integer(text)
        case "float" if _DECIMAL.fullmatch(text):
            return float(text)
    return Odd(f"{shortened(text)} (in YAML 1.1: {kind})", _UNAMBIGUOUS.get(kind, "quote it"))


def _key(key: Value) -> str | Odd:
    """A key as a string; whatever else YAML makes of one is odd."""
    if isinstance(key, str | Odd):
        return key
    return Odd(found(key), "a key is a string: quote it")
