"""Process guests: the guest contract without a virtual machine, for development, CI and trusted code."""

from substrate_node.procvm.probe import IsolationReport, Measure
from substrate_node.procvm.vmm import ProcessVmm
from substrate_node.vmm import Orphan

__all__ = ["IsolationReport", "Measure", "Orphan", "ProcessVmm"]
