"""The control plane: who may call, what exists, where a call runs."""
