"""Run inside a clean room: what one wheel holds, what it borrows, and which packages can be imported from there.

Arguments are the name of the distribution and the packages to look for; the answer is one JSON object.
"""

import ast
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from importlib import metadata


def borrowed(source: str) -> Iterator[str]:
    """The top-level packages that a source imports, early or late."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]


def module_of(file: metadata.PackagePath) -> str:
    """What a source is imported as."""
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def failure(module: str) -> str | None:
    """Why a module can't be imported; None if it can."""
    try:
        importlib.import_module(module)
    except BaseException as error:  # noqa: BLE001  # whatever it is, it is the answer
        return f"{type(error).__name__}: {error}"
    return None


def look_around(name: str, packages: list[str]) -> dict[str, object]:
    """What is to be seen of the distribution `name`, and which of `packages`.

    A plugin of pytest's is imported by pytest alone, so no room without it needs to be able to.
    """
    files = metadata.files(name) or []
    of_pytest = {point.module for point in metadata.distribution(name).entry_points if point.group == "pytest11"}
    sources = [file for file in files if file.suffix == ".py" and module_of(file) not in of_pytest]
    modules = [
        module_of(file)
        for file in sources
        if file.name != "__main__.py"  # a program: importing it would run it
    ]
    foreign = {root for file in sources for root in borrowed(file.read_text())} - sys.stdlib_module_names
    provided = metadata.packages_distributions()
    return {
        "files": [str(file) for file in files],
        "modules": modules,
        "failures": {module: why for module in modules if (why := failure(module))},
        "lenders": {
            root: [re.sub(r"[-_.]+", "-", lender).lower() for lender in provided.get(root, [])] for root in foreign
        },
        "importable": [package for package in packages if importlib.util.find_spec(package)],
    }


if __name__ == "__main__":
    print(json.dumps(look_around(sys.argv[1], sys.argv[2:])))  # noqa: T201  # its reader is a test
