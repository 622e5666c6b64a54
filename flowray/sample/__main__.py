"""`python -m flowray.sample`, as `flowray sample`."""

from flowray.cli.main import run

if __name__ == "__main__":
    run("sample")
