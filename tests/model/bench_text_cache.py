"""What the key-value cache saves: `python tests/model/bench_text_cache.py`, figures in
docs/benchmarks/text-cache.md.

A random Qwen2 (8 layers x 512, 8 heads, MLP 2048), 128-token prompts, 64 queries, fp32. Each pass
runs in a process of its own: growth of the peak resident set over forward and backward, bytes that
autograd keeps for the backward, median time of a step.
"""

from __future__ import annotations

import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

BATCH, PROMPT, QUERIES, LAYERS, WIDTH, ROUNDS = 8, 128, 64, 8, 512, 7


def kept_for_backward(model: Any, forward: Any, prompts: Any) -> tuple[int, Tensor]:
    """Bytes of the activations that autograd keeps, each storage once, weights and inputs left
    out; and the output.
    """
    known = {
        t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *prompts)
    }
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = forward(prompts).values
    return sum(kept.values()), out


def measure(name: str) -> dict[str, float]:
    from transformers import Qwen2Config, Qwen2Model

    from flowray.config.model import CausalText
    from flowray.model.text import CausalQueries, Prompts

    torch.manual_seed(0)
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
    }
    net = Qwen2Model(Qwen2Config(vocab_size=1000, num_key_value_heads=8, **sizes))
    model = CausalQueries(net, None, CausalText(queries=QUERIES, max_tokens=PROMPT))
    prompts = Prompts(
        torch.randint(1000, (BATCH, PROMPT)), torch.ones(BATCH, PROMPT, dtype=torch.bool)
    )
    forward = getattr(model, name)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward(prompts).values.square().mean().backward()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    kept, out = kept_for_backward(model, forward, prompts)
    del out
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        forward(prompts).values.square().mean().backward()
        times.append(time.process_time() - began)
    return {
        "peak_mib": peak,
        "kept_mib": kept / 2**20,
        "seconds": statistics.median(times),
        "least": min(times),
        "most": max(times),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        rows = {
            n: json.loads(subprocess.check_output([sys.executable, __file__, n]))
            for n in ("forward_plain", "forward")
        }
        for name, row in rows.items():
            print(name, {key: round(value, 3) for key, value in row.items()})
        print(
            "saved",
            {
                key: f"{1 - rows['forward'][key] / rows['forward_plain'][key]:.0%}"
                for key in ("peak_mib", "kept_mib", "seconds")
            },
        )
