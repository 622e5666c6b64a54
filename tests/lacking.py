"""Run a command that lacks some operations of the file system, as a mounted bucket or drive does.

`python tests/lacking.py link,symlink COMMAND ...`: the kernel refuses them (EPERM, and ENOSYS for
flock) to the command and all that it starts. Linux on x86-64 and arm64; no root needed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

_CALLS = {  # name -> (numbers on x86-64, numbers on arm64, how it fails)
    "link": ((86, 265), (37,), errno.EPERM),
    "symlink": ((88, 266), (36,), errno.EPERM),
    "flock": ((73,), (32,), errno.ENOSYS),
}
_MACHINES = {"x86_64": 0, "aarch64": 1}
KNOWN = sys.platform == "linux" and platform.machine() in _MACHINES
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF instructions
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2


def give_up(*names: str) -> None:
    """From now on this process and its children lack the operations."""
    program = [struct.pack("HBBI", _LOAD, 0, 0, 0)]  # the call's number
    for name in names:
        calls = _CALLS[name]
        for number in calls[_MACHINES[platform.machine()]]:
            program.append(struct.pack("HBBI", _EQUAL, 0, 1, number))
            program.append(struct.pack("HBBI", _RETURN, 0, 0, _FAIL | calls[2]))
    program.append(struct.pack("HBBI", _RETURN, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_NO_NEW_PRIVILEGES, 1, 0), (_SECCOMP, _FILTER, header)):
        if libc.prctl(*arguments, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    give_up(*sys.argv[1].split(","))
    os.execvp(sys.argv[2], sys.argv[2:])
