"""`fc-invoke check`: a workload table held against everything that can be wrong with one."""

from __future__ import annotations

import sys
from pathlib import Path

from substrate_cluster.catalog import check_table, kind_on_host, table_in_file, table_in_text


def check(file: str, *, host: bool) -> int:
    """Say what is in the table, or all that is wrong with it; 0 if it can be used. Only `host` looks at the machine."""
    if file == "-":
        source = table_in_text(sys.stdin.buffer.read().decode("utf-8", "surrogateescape"), label="standard input")
    else:
        source = table_in_file(Path(file))
    checked = check_table(source, kind_of=kind_on_host if host else None)
    print(checked.report, file=sys.stdout if checked.ok else sys.stderr)
    return 0 if checked.ok else 1
