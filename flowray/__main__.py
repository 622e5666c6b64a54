"""`python -m flowray VERB`, as `flowray VERB`."""

from flowray.cli.main import main

if __name__ == "__main__":
    main()
