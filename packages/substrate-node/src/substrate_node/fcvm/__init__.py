"""MicroVMs: the guest contract in Firecracker's virtual machines, for code that nobody needs to trust."""

from substrate_node.fcvm.orphans import sweep as sweep_orphans
from substrate_node.fcvm.outfit import DEFAULT_BOOT_ARGS, MicroVmRules, Outfit, outfitted
from substrate_node.fcvm.vmm import FirecrackerVmm

__all__ = ["DEFAULT_BOOT_ARGS", "FirecrackerVmm", "MicroVmRules", "Outfit", "outfitted", "sweep_orphans"]
