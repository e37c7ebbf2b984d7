"""The workload table people write: read, checked whole, held and reloaded."""

from substrate_cluster.catalog.check import Checked, Kind, check_table, host_problems, kind_on_host
from substrate_cluster.catalog.findings import Finding, TableInvalid
from substrate_cluster.catalog.holder import Catalog, Change, TableSource, table_in_file, table_in_text
from substrate_cluster.catalog.table import Entry, ParsedTable, WorkloadEntry, parse_table

__all__ = [
    "Catalog",
    "Change",
    "Checked",
    "Entry",
    "Finding",
    "Kind",
    "ParsedTable",
    "TableInvalid",
    "TableSource",
    "WorkloadEntry",
    "check_table",
    "host_problems",
    "kind_on_host",
    "parse_table",
    "table_in_file",
    "table_in_text",
]
