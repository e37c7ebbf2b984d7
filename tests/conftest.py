"""What holds for every test: real parts are asked for, and nothing outlives a test."""

pytest_plugins = ["real_parts", "leaks", "pytester"]
