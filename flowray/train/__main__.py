"""`python -m flowray.train`, as `flowray train`."""

from flowray.cli.main import run

if __name__ == "__main__":
    run("train")
