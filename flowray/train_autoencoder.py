"""`python -m flowray.train_autoencoder`, as `flowray train_autoencoder`."""

from flowray.cli.main import run

if __name__ == "__main__":
    run("train_autoencoder")
