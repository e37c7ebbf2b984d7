"""Runs a double as a program: `program.py MODULE ARGUMENTS`.

Python compiles the file that it is started with each time, and a double is much to compile for each microVM.
"""

import sys
from importlib import import_module

if __name__ == "__main__":
    sys.path.append(__file__.rpartition("/fakes/")[0])  # it is started without any path
    import_module(f"fakes.{sys.argv[1]}").main(sys.argv[2:])
