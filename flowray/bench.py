"""`python -m flowray.bench`, as `flowray bench`."""

from flowray.cli.main import run

if __name__ == "__main__":
    run("bench")
