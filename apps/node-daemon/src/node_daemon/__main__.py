"""`python -m node_daemon` is `node-daemon`."""

from node_daemon.main import main

main()
