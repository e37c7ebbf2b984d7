"""The data plane as a daemon of its own."""
