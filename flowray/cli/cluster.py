"""`flowray.cluster`: is a Ray cluster fit for training; a Ray head that only the holder of its token can use."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flowray.cli.common import FINDINGS, GOOD
from flowray.cli.parser import Parser
from flowray.rayrun.cluster_verdict import Row, healthy, judge
from flowray.store.run import storage_folder

_COLOURS = {"ok": "green", "info": "dim", "warn": "yellow", "bad": "red"}


def _parser() -> Parser:
    parser = Parser(
        prog="flowray.cluster",
        description="Check the nodes of a Ray cluster, or start the head of one. Cluster files and which to choose: cluster/README.md.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="{check,head}")
    check = verbs.add_parser(
        "check",
        help="versions, GPUs, storage, network, clock and data set of every node; exit code 1 where something is wrong",
        description="Ask every node of the cluster named by RAY_ADDRESS (in a job: its own), without it this machine alone.",
    )
    check.add_argument("--storage", metavar="FOLDER", default="runs", help="the storage_path to test (default: runs, from FLOWRAY_STORAGE)")
    check.add_argument("--data", metavar="SHARDS", help="a data.shards folder or glob that every node must see")
    check.add_argument("--workers", type=int, default=0, metavar="N", help="have the autoscaler bring up N workers first (takes minutes)")
    check.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    head = verbs.add_parser(
        "head",
        help="start a Ray head with a token, its dashboard on loopback",
        description="Start a Ray head on this machine; prints how other nodes join, how to submit jobs and how to stop it.",
        epilog="What follows -- goes to `ray start`: flowray.cluster head --host 10.0.0.10 -- --num-cpus=0",
    )
    head.add_argument(
        "--host", default="127.0.0.1", help="the address at which other nodes find it (default: loopback, this machine alone)"
    )
    head.add_argument("--port", type=int, default=6379)
    head.add_argument("options", nargs=argparse.REMAINDER, metavar="-- OPTIONS", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_args(argv)
    if args.verb == "head":
        return _head(args.host, args.port, [option for option in args.options if option != "--"])
    return _check(storage_folder(args.storage), args.data, args.workers, as_json=args.json)


def _check(storage: Path, data: str | None, workers: int, *, as_json: bool) -> int:
    from flowray.rayrun.cluster_check import gather
    from flowray.rayrun.session import in_cluster, started

    if not in_cluster():
        _say("RAY_ADDRESS is not set: this machine alone")
    with started():
        facts = gather(storage, data, _say, workers)
    rows = judge(facts)
    good = healthy(rows)
    if as_json:
        print(json.dumps({"healthy": good, "nodes": [node.node for node in facts.nodes], "rows": [asdict(row) for row in rows]}))
        return GOOD if good else FINDINGS
    Console(highlight=False, width=None if sys.stdout.isatty() else 180).print(table(rows, len(facts.nodes)))
    return GOOD if good else FINDINGS


def table(rows: Sequence[Row], nodes: int) -> Table:
    """The rows for people: what was checked, where, what was found, and the fix beside what is wrong."""
    wrong = sum(row.severity in ("warn", "bad") for row in rows)
    sound = "fit for training" + (", the others not seen" if any(row.check == "nodes" for row in rows) else "")
    shown = Table(title=f"{nodes} node(s): {f'{wrong} finding(s)' if wrong else sound}")
    for column in ("check", "node", "", "found", "fix"):
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(row.check, escape(row.node), f"[{_COLOURS[row.severity]}]{row.severity}[/]", escape(row.found), escape(row.fix))
    return shown


def _head(host: str, port: int, options: list[str]) -> int:
    from flowray.rayrun.access import TOKEN_PATH, head_command, require_token

    command, environment = head_command(host, port, options)
    code = subprocess.run(command, env=environment, stdout=sys.stderr).returncode
    if code:
        _say(f"error: ray start ended with exit code {code}")
        return FINDINGS
    token = require_token()
    where = f"the token is in {token}" if token else "the token is in RAY_AUTH_TOKEN"
    variables = f"RAY_AUTH_MODE=token{f' {TOKEN_PATH}={token}' if os.environ.get(TOKEN_PATH) else ''}"
    dashboard = next((option.partition("=")[2] for option in options if option.startswith("--dashboard-port=")), "8265")
    print(f"Ray's head is up at {host}:{port}; {where}: copy it, and nothing else, to the other nodes")
    print(f"  join    {variables} ray start --address={host}:{port}")
    print(f"  check   {variables} RAY_ADDRESS={host}:{port} python -m flowray.cluster check")
    print(f"  submit  {variables} ray job submit --address http://127.0.0.1:{dashboard} -- python -m flowray.tune sweeps/head.yaml")
    print("  stop    ray stop   (every Ray of yours on this machine)")
    return GOOD


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
