"""`python -m flowray.report`, as `flowray report`."""

from flowray.cli.main import run

if __name__ == "__main__":
    run("report")
