"""`python -m flowray.models`, as `flowray models`."""

from flowray.cli.main import run

if __name__ == "__main__":
    run("models")
