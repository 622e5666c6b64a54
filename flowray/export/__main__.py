"""`python -m flowray.export`, as `flowray export`."""

from flowray.cli.main import run

if __name__ == "__main__":
    run("export")
