"""`python -m fc_invoke` is `fc-invoke`."""

from fc_invoke.main import main

main()
