"""What holds for every test: real parts are asked for, nothing outlives a test, and a run is shared out evenly."""

pytest_plugins = ["real_parts", "leaks", "shares", "pytester"]
