"""`python -m flowray.tune`, as `flowray tune`."""

from flowray.cli.main import run

if __name__ == "__main__":
    run("tune")
