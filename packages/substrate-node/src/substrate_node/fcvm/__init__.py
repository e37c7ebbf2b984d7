"""MicroVMs: the guest contract in Firecracker's virtual machines, for code that nobody needs to trust."""

from substrate_node.fcvm.outfit import MicroVmRules, Outfit, outfitted
from substrate_node.fcvm.vmm import FirecrackerVmm

__all__ = ["FirecrackerVmm", "MicroVmRules", "Outfit", "outfitted"]
