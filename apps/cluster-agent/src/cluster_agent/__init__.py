"""The control plane as a daemon of its own."""
