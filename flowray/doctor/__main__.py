"""`python -m flowray.doctor`, as `flowray doctor`."""

from flowray.cli.main import run

if __name__ == "__main__":
    run("doctor")
