"""The daemon `fc-invoke` over the doubles of Firecracker and its jailer, which need no KVM.

`FC_INVOKE_FIRECRACKER_BIN` is a double; control groups are made in the directory `cgroup` beside it.
"""

import os
from functools import partial
from pathlib import Path

from fc_invoke.main import main
from substrate_node import host

if __name__ == "__main__":
    groups = Path(os.environ["FC_INVOKE_FIRECRACKER_BIN"]).with_name("cgroup")
    host.MicroVmRules = partial(host.MicroVmRules, cgroup_root=groups, kvm=Path(os.devnull))
    host.NodeTimes = partial(host.NodeTimes, restore_within_s=60.0)  # the machine may be busy with other tests
    main([])
