"""Workloads that every guest can run without bringing code of its own."""
