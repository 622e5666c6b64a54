"""`python -m flowray.dashboard`, as `flowray dashboard`."""

from flowray.cli.main import run

if __name__ == "__main__":
    run("dashboard")
