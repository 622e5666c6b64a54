"""`python -m flowray.cluster`, as `flowray cluster`."""

from flowray.cli.main import run

if __name__ == "__main__":
    run("cluster")
