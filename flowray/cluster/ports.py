"""Ports for a node of Ray that runs beside whatever else is on the machine."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Sequence

from flowray.config.errors import InputError

NEAR = 20  # how many ports after a wanted one are tried
WORKERS = range(10002, 20000)  # `ray start` keeps these for its workers
DASHBOARD, AGENT = "--dashboard-port", "--dashboard-agent-listen-port"
CLIENTS = "--ray-client-server-port"

# Options of `ray start` -> the port that Ray wants, 0 for any. A raylet waits half a minute for
# each of its agents to name a port that was not given, and ends.
OF_A_NODE = {
    AGENT: 52365,
    "--dashboard-agent-grpc-port": 0,
    "--runtime-env-agent-port": 0,
    "--metrics-export-port": 0,
}
OF_A_HEAD = {"--port": 6379, DASHBOARD: 8265, CLIENTS: 10001, **OF_A_NODE}


def chosen(
    wanted: dict[str, int], options: Sequence[str], say: Callable[[str], None]
) -> dict[str, int]:
    """A free port for every option of `wanted`, none of them twice; those in `options` are kept.

    say: takes a line for each that Ray would have had and something else has. InputError where a
    port in `options` is none, or taken.
    """
    typed = {name: value for name in wanted if (value := value_of(options, name)) is not None}
    for name, value in typed.items():
        if not (value.isascii() and value.isdigit() and int(value) < 2**16):
            raise InputError(f"{name}={value}: want a port, 1 to 65535")
        if int(value) and not is_free(int(value)):
            raise InputError(f"{name}={value}: taken on this machine; leave it out for a free one")
    ports = {name: int(value) for name, value in typed.items()}
    for name, port in wanted.items():
        if name not in ports:
            ports[name] = _free_port(port, list(ports.values()))
            if port and ports[name] != port:
                say(f"port {port} is taken: {name}={ports[name]}")
    return ports


def value_of(options: Sequence[str], name: str) -> str | None:
    """What `--name=value` or `--name value` says among command line options; the last one holds."""
    value = None
    for i, option in enumerate(options):
        if option == name:
            value = options[i + 1] if i + 1 < len(options) else ""
        elif option.startswith(f"{name}="):
            value = option.partition("=")[2]
    return value


def is_free(port: int) -> bool:
    """Whether nothing listens on this port here, on any of the machine's addresses."""
    for family, everywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            probe = socket.socket(family)
        except OSError:  # a machine without this family
            continue
        with probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not those just closed
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((everywhere, port))
                probe.listen(1)
            except OSError:
                return False
    return True


def _free_port(wanted: int, taken: Collection[int]) -> int:
    near = range(wanted, wanted + NEAR) if wanted else ()
    for port in near:
        if port not in taken and port not in WORKERS and is_free(port):
            return port
    while True:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        if port not in taken and port not in WORKERS:
            return port
