"""Which node a call runs on: a pure choice over what nodes report, and the executor that tries it."""
