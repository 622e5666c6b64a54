"""The network that ranks on different hosts meet on: the one on which Ray's nodes know each
other.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import sys
from contextlib import suppress
from typing import Any

import ray
from ray.train.torch import TorchConfig

from flowray.cluster.ray_private import TorchBackend, train_context
from flowray.train.stopping import Sigterm

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # Linux: the address of an interface


def interface_of(address: str) -> str | None:
    """Name of the network interface that has this IPv4 address here; None where none has, or the
    system has no such question.
    """
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def bind_gloo() -> None:
    """Have gloo talk through the interface of this node's address in Ray, unless GLOO_SOCKET_IFNAME
    says otherwise.

    Left to itself it announces what the host's name resolves to. On Debian that is 127.0.1.1
    (/etc/hosts), on a host with several networks perhaps the wrong one, and ranks on different
    hosts wait in vain: `connectFullMesh failed ... Connection refused`. NCCL chooses by itself
    among the interfaces that lead out, and several for speed: it is left alone.
    """
    if GLOO_INTERFACE not in os.environ and (name := interface_of(ray.util.get_node_ip_address())):
        os.environ[GLOO_INTERFACE] = name


def note_sigterm() -> None:
    """In a worker's main thread: SIGTERM no longer ends it, but is left to the training to hear.

    Ray's handler would end the worker at the next poll of its controller, in the midst of a step.
    What has to be gone is killed a moment after its SIGTERM, by Ray as by any machine.
    """
    with suppress(ValueError):  # not the main thread
        Sigterm().install()


def told_to_go() -> bool:
    """In a worker: whether it has had a SIGTERM, or a node of the run is to be drained. False where
    nobody has called `note_sigterm`, as in Ray Train's local mode.

    Ray Train tells all workers of a drain; its `get_preemption_info` would have them wait for each
    other at every step, over its controller.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if not isinstance(handler, Sigterm):
        return False
    return handler.came() or train_context().preemption_context.preemption_info is not None


class _Bound(TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(bind_gloo)
        worker_group.execute(note_sigterm)
        super().on_start(worker_group, backend_config)


class NodeNetwork(TorchConfig):
    """Ray Train's process group on the network of Ray's nodes."""

    @property
    def backend_cls(self) -> type[_Bound]:
        return _Bound
