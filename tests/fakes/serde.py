"""Reads a JSON body as Firecracker does: into fields that are described, with the same words about what is wrong.

The double of Firecracker loads it at its start, so it imports little.
"""

from __future__ import annotations

import json
import re
from json.decoder import scanstring

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")
_BLANK = " \t\r\n"


class Refused(Exception):
    """The body is not what is wanted; the message says why, and where."""


class Whole:
    """A whole number of `bits`."""

    def __init__(self, name: str, bits: int) -> None:
        self.expected, self.last = name, (1 << bits) - 1

    def check(self, value: object) -> str | None:
        """What is wrong with a value of the wrong kind or size; None if nothing is."""
        if type(value) is not int:
            return f"invalid type: {_described(value)}, expected {self.expected}"
        return None if 0 <= value <= self.last else f"invalid value: integer `{value}`, expected {self.expected}"


class Plain:
    """A value of one of Python's own types."""

    def __init__(self, expected: str, kind: type) -> None:
        self.expected, self.kind = expected, kind

    def check(self, value: object) -> str | None:
        """See `Whole.check`."""
        right = type(value) is self.kind
        return None if right else f"invalid type: {_described(value)}, expected {self.expected}"


class Anything:
    """Whatever it is."""

    expected = "anything"

    def check(self, _value: object) -> str | None:
        """See `Whole.check`."""
        return None


class Optional:
    """A value or null."""

    def __init__(self, inner: object) -> None:
        self.inner = inner


class OneOf:
    """A string among some."""

    def __init__(self, *variants: str) -> None:
        self.variants = variants


class Level:
    """A level of the log: a string whose fault is found when its object is read."""


class Record:
    """An object with fields in the order in which they are told; a name with `*` is required."""

    def __init__(self, name: str, fields: dict[str, object], *, others: bool = False) -> None:
        self.name = name
        self.fields = {field.lstrip("*"): kind for field, kind in fields.items()}
        self.required = [field[1:] for field in fields if field.startswith("*")]
        self.others = others
        """Whether further fields are ignored."""


U8, U32, USIZE = Whole("u8", 8), Whole("u32", 32), Whole("usize", 64)
TEXT, FLAG, ANY = Plain("a string", str), Plain("a boolean", bool), Anything()


def read(text: str, record: Record) -> dict:
    """The fields of a body. Raises `Refused`."""
    reader = _Reader(text)
    value = reader.value(record)
    if reader.peek():
        reader.refuse("trailing characters", reader.at + 1)
    return value


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def refuse(self, words: str, end: int) -> None:
        """`end` is how much of the text was taken."""
        end = min(end, len(self.text))
        line_start = self.text.rfind("\n", 0, end) + 1
        line = self.text.count("\n", 0, end) + 1
        raise Refused(f"{words} at line {line} column {end - line_start}")

    def peek(self) -> str:
        while self.text[self.at : self.at + 1] and self.text[self.at] in _BLANK:
            self.at += 1
        return self.text[self.at : self.at + 1]

    def value(self, kind: object) -> object:
        match kind:
            case Optional():
                if self.peek() == "n":
                    return self._any()
                return self.value(kind.inner)
            case Record():
                return self._record(kind)
            case OneOf() | Level():
                if self.peek() != '"':
                    self.refuse("expected value" if self.peek() else "EOF while parsing a value", self.at + 1)
                value = self._string()
                if isinstance(kind, OneOf) and value not in kind.variants:
                    self.refuse(f"unknown variant `{value}`, expected {_listed(list(kind.variants))}", self.at)
                return value
        start = self.at + len(self.text[self.at :]) - len(self.text[self.at :].lstrip(_BLANK))
        value = self._any()
        wrong = kind.check(value)
        if wrong is not None:
            self.refuse(wrong, start if isinstance(value, (list, dict)) else self.at)
        return value

    def _record(self, record: Record) -> dict:
        if self.peek() != "{":
            return self._no_record(record)
        self.at += 1
        found: dict = {}
        while True:
            mark = self.peek()
            if not mark:
                self.refuse("EOF while parsing an object", self.at)
            if mark == "}":
                self.at += 1
                break
            if found:
                if mark != ",":
                    self.refuse("expected `,` or `}`", self.at + 1)
                self.at += 1
                if self.peek() == "}":
                    self.refuse("trailing comma", self.at + 1)
            self._field(record, found)
        for name in record.required:
            if name not in found:
                self.refuse(f"missing field `{name}`", self.at)
        return found

    def _field(self, record: Record, found: dict) -> None:
        if self.peek() != '"':
            self.refuse("key must be a string", self.at + 1)
        name = self._string()
        if name in found:
            self.refuse(f"duplicate field `{name}`", self.at)
        if name not in record.fields and not record.others:
            self.refuse(f"unknown field `{name}`, expected {_listed(list(record.fields))}", self.at)
        if self.peek() != ":":
            self.refuse("expected `:`" if self.peek() else "EOF while parsing an object", self.at + 1)
        self.at += 1
        kind = record.fields.get(name, ANY)
        found[name] = self.value(kind)
        inner = kind.inner if isinstance(kind, Optional) else kind
        if isinstance(inner, Level) and found[name] is not None and found[name].lower() not in LEVELS:
            self.refuse("Invalid LevelFilter", self.at + (self.peek() == "}"))

    def _no_record(self, record: Record) -> dict:
        value = self._any()
        if isinstance(value, list):
            expected = f"struct {record.name} with {len(record.fields)} elements"
            self.refuse(f"invalid length {len(value)}, expected {expected}", self.at)
        self.refuse(f"invalid type: {_described(value)}, expected struct {record.name}", self.at)
        raise AssertionError

    def _string(self) -> str:
        try:
            value, self.at = scanstring(self.text, self.at + 1)
        except json.JSONDecodeError:
            self.refuse("EOF while parsing a string", len(self.text))
        return value

    def _any(self) -> object:
        mark = self.peek()
        if not mark:
            self.refuse("EOF while parsing a value", self.at)
        if mark == '"':
            return self._string()
        number = _NUMBER.match(self.text, self.at)
        if number:
            self.at = number.end()
            return json.loads(number[0])
        try:
            value, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
        except json.JSONDecodeError:
            if self.text[self.at :].strip(_BLANK) == "[":
                self.refuse("EOF while parsing a list", len(self.text))
            self.refuse("expected value", self.at + 1)
        return value


LEVELS = ("off", "error", "warn", "warning", "info", "debug", "trace")


def _described(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return f"boolean `{str(value).lower()}`"
        case int():
            return f"integer `{value}`"
        case float():
            return f"floating point `{value}`"
        case str():
            return f'string "{value}"'
        case list():
            return "sequence"
    return "map"


def _listed(names: list[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    if len(quoted) > 2:
        return f"one of {', '.join(quoted)}"
    return " or ".join(quoted)
