"""`python -m flowray.eval`, as `flowray eval`."""

from flowray.cli.main import run

if __name__ == "__main__":
    run("eval")
