"""`python -m dape_server` is `dape`."""

from dape_server.cli import main

main()
