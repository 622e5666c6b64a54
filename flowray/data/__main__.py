"""`python -m flowray.data`, as `flowray data`."""

from flowray.cli.main import run

if __name__ == "__main__":
    run("data")
