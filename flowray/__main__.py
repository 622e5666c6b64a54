"""`python -m flowray <verb>`, as `flowray <verb>`."""

from flowray.cli.main import main

main()
