"""The network that ranks on different hosts meet on: the one on which Ray's nodes know each
other.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from typing import Any

import ray
from ray.train.torch import TorchConfig

from flowray.cluster.ray_private import TorchBackend

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


class _Bound(TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(bind_gloo)
        super().on_start(worker_group, backend_config)


class NodeNetwork(TorchConfig):
    """Ray Train's process group on the network of Ray's nodes."""

    @property
    def backend_cls(self) -> type[_Bound]:
        return _Bound
