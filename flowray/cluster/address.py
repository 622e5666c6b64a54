"""Is a cluster there? Asked within seconds, before Ray is, which would go on asking without end."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import ray

from flowray.cluster.ray_private import gcs_channel, gcs_messages, gcs_stubs, services
from flowray.config.cluster import ADDRESS
from flowray.config.errors import InputError

PROBE_S = 5.0  # for an answer
PORT = 6379  # on which heads listen where nothing else is said
_NOT_RAY = "what listens there is not the head of a Ray"
_OTHER_TOKEN = "it wants another token than this one, see RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token"
_WHY = {
    grpc.StatusCode.UNAUTHENTICATED: _OTHER_TOKEN,
    grpc.StatusCode.PERMISSION_DENIED: _OTHER_TOKEN,
    grpc.StatusCode.DEADLINE_EXCEEDED: f"no answer of a Ray head in {PROBE_S:.0f} s",
    grpc.StatusCode.UNAVAILABLE: _NOT_RAY,
    grpc.StatusCode.UNIMPLEMENTED: _NOT_RAY,
    grpc.StatusCode.INTERNAL: _NOT_RAY,
    grpc.StatusCode.UNKNOWN: _NOT_RAY,
}


def refuse_unreachable() -> None:
    """InputError where RAY_ADDRESS names no cluster that this process can take part in.

    A name of this machine (localhost) stands for its address on the network, as Ray has it.
    """
    given = os.environ[ADDRESS].strip()
    unset = f"type `unset {ADDRESS}` for a Ray of this command's own"
    if "://" in given:
        kind, _, rest = given.partition("://")
        submit = given if kind.startswith("http") else f"http://{rest.partition(':')[0]}:8265"
        raise InputError(
            f"{ADDRESS}={given}: want HOST:PORT, the address of a head's GCS; to have that cluster "
            f"do it, type `ray job submit --address {submit} -- python -m flowray...`, or {unset}"
        )
    try:
        found = services.canonicalize_bootstrap_address(given if given == "auto" else _own(given))
    except ConnectionError:
        raise InputError(f"{ADDRESS}={given}: no Ray runs on this machine; {unset}") from None
    host, port = host_and_port(found or given)
    where = given if found in (given, None) else f"{given} ({found})"
    if problem := problem_at(host, port):
        raise InputError(f"{ADDRESS}={where}: {problem}; type another address, or {unset}")
    if not _runs_here(host, port):
        raise InputError(
            f"{ADDRESS}={where}: this machine is no node of that cluster; type "
            f"`python -m flowray.cluster join {address_of(host, port)}` to make it one, "
            f"`ray job submit` to have the cluster do it, or {unset}"
        )
    os.environ[ADDRESS] = given  # as Ray takes it: without blanks


def _own(given: str) -> str:
    """The address as it is, if it is one."""
    try:
        host_and_port(given)
    except InputError as error:
        raise InputError(f"{ADDRESS}: {error}") from None
    return given


def host_and_port(address: str) -> tuple[str, int]:
    """Of `HOST:PORT`; an IPv6 host stands in brackets. InputError for anything else."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise InputError(f"got {address!r}, want HOST:PORT, as 10.0.0.10:{PORT}")
    bare = host.removeprefix("[").removesuffix("]")
    if "/" in host or (":" in bare and bare == host):
        raise InputError(f"got {address!r}, want HOST:PORT, as 10.0.0.10:{PORT}")
    return bare, int(port)


def address_of(host: str, port: int) -> str:
    """`HOST:PORT`, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def _channel(host: str, port: int) -> Iterator[grpc.Channel]:
    channel = gcs_channel(address_of(host, port))
    try:
        yield channel
    finally:
        channel.close()


def problem_at(host: str, port: int) -> str:
    """Why a Ray of this version cannot be used at host:port, '' where it can. Within 2 PROBE_S."""
    try:
        with socket.create_connection((host, port), PROBE_S):
            pass
    except socket.gaierror:
        return f"no host has the name {host}"
    except TimeoutError:
        return f"no answer in {PROBE_S:.0f} s"
    except OSError as error:
        return f"nothing listens there: {error.strerror}"
    try:
        with _channel(host, port) as channel:
            ask = gcs_stubs.NodeInfoGcsServiceStub(channel).CheckAlive
            reply = ask(gcs_messages.CheckAliveRequest(), timeout=PROBE_S)
    except grpc.RpcError as error:
        return _WHY.get(error.code(), str(error.details()))
    if reply.ray_version != ray.__version__:
        return f"it runs Ray {reply.ray_version}, this machine has {ray.__version__}"
    return ""


def session_at(host: str, port: int) -> str:
    """The name of the session of the Ray whose head answers there."""
    with _channel(host, port) as channel:
        asked = gcs_messages.InternalKVGetRequest(key=b"session_name", namespace=b"session")
        reply = gcs_stubs.InternalKVGcsServiceStub(channel).InternalKVGet(asked, timeout=PROBE_S)
    return str(reply.value.decode())


def _runs_here(host: str, port: int) -> bool:
    """Whether a node of the Ray whose head answers there is on this machine; one may be coming."""
    deadline = time.monotonic() + PROBE_S
    while True:
        here = {bytes.fromhex(node) for node in services.find_node_ids()}
        with _channel(host, port) as channel:
            ask = gcs_stubs.NodeInfoGcsServiceStub(channel).GetAllNodeInfo
            try:
                nodes = ask(gcs_messages.GetAllNodeInfoRequest(), timeout=PROBE_S).node_info_list
            except grpc.RpcError as error:  # it has ended since it answered, or is overloaded
                why = _WHY.get(error.code(), str(error.details()))
                raise InputError(f"{ADDRESS}={address_of(host, port)}: {why}") from None
        if any(node.node_id in here and node.state == node.ALIVE for node in nodes):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
