"""`python -m flowray.assets`, as `flowray assets`."""

from flowray.cli.main import run

if __name__ == "__main__":
    run("assets")
