"""The contract between the control plane and the nodes of the substrate."""
