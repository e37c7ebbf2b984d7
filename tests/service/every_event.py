"""One event of every kind that the seam knows, made up from its field types."""

import enum
import types
import typing

from substrate_seam import events

KINDS = sorted(events.Event.__subclasses__(), key=lambda kind: kind.__name__)


def made_up(kind, **fields):
    """An event of this kind: what is not given is made up."""
    hints = typing.get_type_hints(kind)
    return kind(**{name: fields.get(name, _value(hints[name], name)) for name in kind.__struct_fields__})


def _value(hint, name):
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = typing.get_args(hint)[0]
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return next(iter(hint))
    if hint is str:
        return f"some {name}"
    return hint(3)
