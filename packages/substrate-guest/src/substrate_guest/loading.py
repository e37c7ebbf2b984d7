"""From `module:attribute` to a workload."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import TYPE_CHECKING

from substrate_guest.app import App

if TYPE_CHECKING:
    from substrate_guest.workload import Workload

HANDLER, ASGI = 1, 3
"""How many arguments each kind of callable takes."""


class NotAWorkload(Exception):
    """There is nothing to serve; the message says what was found and what is accepted."""


def load(target: str) -> Workload:
    """The workload that `target`, written `module:attribute`, names.

    Raises `NotAWorkload`; when the module itself failed, that is its cause.
    """
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise NotAWorkload(f"found {target!r}, accepted is module:attribute, for example handlers:app")
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise NotAWorkload(f"module {module_name!r} needs {error.name!r}, which is not installed") from error
        raise NotAWorkload(f"no module {error.name!r} in {', '.join(path for path in sys.path if path)}") from None
    except (Exception, SystemExit) as error:
        raise NotAWorkload(f"module {module_name!r} failed: {type(error).__name__}: {error}") from error
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise NotAWorkload(f"module {module_name!r} has no {attribute!r}") from None
    return adapted(found)


def adapted(found: object) -> Workload:
    """`found` as a workload: an `App`, a callable that takes a request, or an ASGI application.

    Raises `NotAWorkload`.
    """
    from substrate_guest.callables import CallableWorkload

    if isinstance(found, App):
        if not found.handlers:
            raise NotAWorkload("the App has no handler: give it one, as App(handler) or with @app.handler")
        return CallableWorkload(found)
    if not callable(found):
        raise NotAWorkload(f"found {type(found).__name__}, accepted is an App, a callable or an ASGI application")
    if _takes(found, HANDLER):
        return CallableWorkload(App(found))
    if _takes(found, ASGI):
        from substrate_guest.asgi import AsgiWorkload

        return AsgiWorkload(found)
    raise NotAWorkload(
        f"{getattr(found, '__name__', found)!r} takes neither one argument (a request) nor three (an ASGI application)"
    )


def _takes(function: object, count: int) -> bool:
    assert callable(function)
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # something written in C without a signature: let it be called
        return count == HANDLER
    return True
