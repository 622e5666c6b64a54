"""Whether the GPUs of this machine compute and ranks meet: asked by a cluster check in a process
that sees all of them. No Ray.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from flowray.cluster.verdict import NO_CUDA, PAYLOAD_BYTES
from flowray.config.errors import last_line

PATIENCE_S = 100.0  # for an answer of that process, which has torch to load first


def cuda_problem() -> str:
    """Why torch cannot compute on every GPU of this process, '' where it can: the driver too
    old, an unknown kind of GPU, none there.
    """
    if torch.version.cuda is None:
        return NO_CUDA
    try:
        for index in range(torch.cuda.device_count() or 1):
            torch.ones(1, device=f"cuda:{index}").sum().item()
    except torch.OutOfMemoryError:  # in use, so it can be used
        pass
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().partition("\n")[0][:200]
    return ""


def reduced(backend: str, host: str, port: int, rank: int, world: int) -> float:
    """Seconds of an all-reduce of PAYLOAD_BYTES over `world` ranks that all call this, the second
    of two.

    RuntimeError where the sum is wrong.
    """
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.ones(1, device=device)  # says what is wrong where there is none
        torch.cuda.set_device(device)
    where = f"tcp://{host}:{port}"
    dist.init_process_group(
        backend, init_method=where, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        for _ in range(2):
            tensor = torch.full((PAYLOAD_BYTES // 4,), float(rank + 1), device=device)
            tensor[0].item()  # it is there before the clock starts
            start = time.perf_counter()
            dist.all_reduce(tensor)
            tensor[0].item()
            seconds = time.perf_counter() - start
        want = world * (world + 1) / 2
        if not bool((tensor == want).all()):
            raise RuntimeError(f"the sum over {world} ranks is {tensor[0].item():g}, not {want:g}")
        return seconds
    finally:
        dist.destroy_process_group()


def seeing_gpus(call: str) -> Any:
    """What `call` of this module comes to in a process that sees all GPUs of the node: from an
    actor that holds none Ray hides them.
    """
    environment = {
        name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"
    }
    code = f"""if True:
        import json
        from flowray.cluster import gpus
        try:
            print(json.dumps([gpus.{call}, ""]))
        except Exception as error:
            print(json.dumps([None, str(error) or type(error).__name__]))
    """
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    if done.returncode:
        raise RuntimeError(last_line(done.stderr)[:200])
    found, error = json.loads(done.stdout.splitlines()[-1])  # NCCL may have told its version before
    if error:
        raise RuntimeError(last_line(error)[:200])
    return found
