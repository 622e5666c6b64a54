"""Which interface gloo is told to use."""

import socket
import sys

import pytest

from flowray.cluster.network import interface_of


@pytest.mark.skipif(sys.platform != "linux", reason="the question is Linux's")
def test_the_interface_of_an_address():
    name = interface_of("127.0.0.1")
    assert name in [known for _, known in socket.if_nameindex()]
    assert name is not None
    assert name.startswith("lo")
    assert interface_of("192.0.2.77") is None  # TEST-NET-1: nobody has it
