"""`python -m cluster_agent` is `cluster-agent`."""

from cluster_agent.main import main

main()
