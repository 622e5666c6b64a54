"""`flowray.cluster`: is a Ray cluster fit for training; a Ray head that only the holder of its
token can use.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flowray.cli.common import FINDINGS, GOOD
from flowray.cli.parser import JSON, Parser
from flowray.cli.progress import IMPORTING, ConsoleProgress
from flowray.cluster.verdict import Row, healthy, judge
from flowray.config.cluster import in_cluster
from flowray.config.errors import InputError
from flowray.config.paths import expand, storage_folder, storage_place
from flowray.data.shards import find_shards

_COLOURS = {"ok": "green", "info": "dim", "warn": "yellow", "bad": "red"}


def _parser() -> Parser:
    parser = Parser(
        prog="flowray.cluster",
        description=(
            "Check the nodes of a Ray cluster; start a head, join one, stop them. "
            "Cluster files and which to choose: cluster/README.md."
        ),
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{check,head,join,stop}")
    check = verbs.add_parser(
        "check",
        help=(
            "versions, GPUs, storage, network, clock and data set of every node; exit code 1 where"
            " something is wrong"
        ),
        description=(
            "Ask every node of the cluster named by RAY_ADDRESS (in a job: its own), without it"
            " this machine alone."
        ),
    )
    check.add_argument(
        "--storage",
        metavar="FOLDER",
        default="runs",
        help="the storage_path to test (default: runs, from FLOWRAY_STORAGE)",
    )
    check.add_argument(
        "--data",
        type=expand,
        metavar="SHARDS",
        help="a data.shards folder or glob that every node must see",
    )
    check.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="have the autoscaler bring up N workers first (takes minutes)",
    )
    check.add_argument("--json", action="store_true", help=JSON)
    head = verbs.add_parser(
        "head",
        help="start a Ray head with a token, its dashboard on loopback",
        description=(
            "Start a Ray head on this machine, beside whatever runs there; prints how other nodes"
            " join, how to submit jobs and how to stop it. Ports that are taken are passed over."
        ),
        usage="%(prog)s [-h] [--host HOST] [--port PORT]\n       [-- OPTIONS of `ray start`]",
        epilog="Example: flowray.cluster head --host 10.0.0.10 -- --num-cpus=0",
    )
    head.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address at which other nodes find it (default: loopback, this machine alone)",
    )
    head.add_argument("--port", type=int, help="of its GCS (default: 6379, or the next free one)")
    join = verbs.add_parser(
        "join",
        help="make this machine a node of the cluster with that head",
        description="Start a Ray node on this machine that belongs to the head at HOST:PORT.",
        usage="%(prog)s [-h] HOST:PORT [-- OPTIONS of `ray start`]",
        epilog="Example: flowray.cluster join 10.0.0.10:6379 -- --num-gpus=1",
    )
    join.add_argument("address", metavar="HOST:PORT", help="as `flowray.cluster head` printed it")
    stop = verbs.add_parser(
        "stop",
        help="end what head and join have started on this machine, and nothing else",
        description=(
            "End the heads and nodes that `flowray.cluster head` and `join` have started "
            "on this machine, with their workers and files. Other Rays of yours go on."
        ),
    )
    stop.add_argument("address", metavar="HOST:PORT", nargs="?", help="of one head (default: all)")
    return parser


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    dashes = argv.index("--") if "--" in argv else len(argv)
    args, options = _parser().parse_args(argv[:dashes]), argv[dashes + 1 :]
    if options and args.verb not in ("head", "join"):
        raise InputError(f"command line: {args.verb} starts no Ray and takes nothing after --")
    if "--block" in options:
        raise InputError("command line: --block: the command returns when Ray is up, leave it out")
    match args.verb:
        case "head":
            return _head(args.host, args.port, options)
        case "join":
            return _join(args.address, options)
        case "stop":
            return _stop(args.address)
    return _check(Path(storage_folder(args.storage)), args.data, args.workers, as_json=args.json)


def _check(storage: Path, data: str | None, workers: int, *, as_json: bool) -> int:
    progress = ConsoleProgress()
    with progress.task(IMPORTING):
        from flowray.cluster.session import started

    if storage_place(storage) != storage:
        progress.say(f"{storage} is not there yet, and is not made by this check")
    if data:
        find_shards(data)  # before Ray starts
    if not in_cluster():
        progress.say("RAY_ADDRESS is not set: this machine alone")
    with started(progress=progress):
        # torch: seconds that a cluster which does not answer need not cost
        with progress.task(IMPORTING):
            from flowray.cluster.check import gather
        facts = gather(storage, data, progress, workers)
    rows = judge(facts)
    good = healthy(rows)
    if as_json:
        print(
            json.dumps(
                {
                    "healthy": good,
                    "nodes": [node.node for node in facts.nodes],
                    "rows": [asdict(row) for row in rows],
                }
            )
        )
        return GOOD if good else FINDINGS
    Console(highlight=False, width=None if sys.stdout.isatty() else 180).print(
        table(rows, len(facts.nodes))
    )
    return GOOD if good else FINDINGS


def table(rows: Sequence[Row], nodes: int) -> Table:
    """The rows for people: what was checked, where, what was found, and the fix beside what is
    wrong.
    """
    wrong = sum(row.severity in ("warn", "bad") for row in rows)
    sound = "fit for training" + (
        ", the others not seen" if any(row.check == "nodes" for row in rows) else ""
    )
    shown = Table(title=f"{nodes} node(s): {f'{wrong} finding(s)' if wrong else sound}")
    for column in ("check", "node", "", "found", "fix"):
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(
            row.check,
            escape(row.node),
            f"[{_COLOURS[row.severity]}]{row.severity}[/]",
            escape(row.found),
            escape(row.fix),
        )
    return shown


def _head(host: str, port: int | None, options: list[str]) -> int:
    progress = ConsoleProgress()
    with progress.task(IMPORTING):
        from flowray.cluster.access import LOOPBACK, TOKEN_PATH, require_token
        from flowray.cluster.nodes import start_head

    token = require_token()
    address, dashboard = start_head(host, port, options, progress)
    where = f"the token is in {token}" if token else "the token is in RAY_AUTH_TOKEN"
    path = f"{TOKEN_PATH}={shlex.quote(str(token))} " if os.environ.get(TOKEN_PATH) else ""
    variables = f"RAY_AUTH_MODE=token {path}"
    print(f"Ray's head is up at {address}; {where}: copy it, and nothing else, to the other nodes")
    if host == LOOPBACK:
        print("  join    from this machine alone; with --host ADDRESS others join too")
    else:
        print(f"  join    {path}python -m flowray.cluster join {address}")
    print(f"  check   {variables}RAY_ADDRESS={address} python -m flowray.cluster check")
    if dashboard:
        submit = f"ray job submit --address http://{LOOPBACK}:{dashboard}"
        print(f"  submit  {variables}{submit} -- python -m flowray.tune sweeps/head.yaml")
    print(f"  stop    python -m flowray.cluster stop {address}")
    return GOOD


def _join(address: str, options: list[str]) -> int:
    progress = ConsoleProgress()
    with progress.task(IMPORTING):
        from flowray.cluster.nodes import join

    join(address, options, progress)
    print(f"this machine is a node of the cluster at {address}")
    print(f"  stop    python -m flowray.cluster stop {address}")
    return GOOD


def _stop(address: str | None) -> int:
    progress = ConsoleProgress()
    with progress.task(IMPORTING):
        from flowray.cluster.nodes import end, running

    nodes = running(address)
    if address and not nodes:
        known = ", ".join(sorted({node.address for node in running()})) or "nothing"
        raise InputError(f"{address}: nothing of it was started on this machine; there is {known}")
    for node in nodes:
        with progress.task(f"ending the {node.kind} of {node.address}"):
            ended = end(node)
        print(f"ended the {node.kind} of {node.address}: {ended} processes")
    if not nodes:
        print("nothing to end: no head or node that flowray.cluster has started runs here")
    return GOOD
