"""Images a second and their cost on many GPUs, by a simple model of one training step.

docs/scaling.md has the volumes that it counts with and the table that it prints. Nothing of it was
measured on more than one GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NODE = 8  # GPUs of a node, each with a network card of its own


@dataclass(frozen=True)
class Machine:
    """What the model assumes of a cluster.

    nvlink, network: bytes a second that a GPU sends within its node and between nodes, as reached;
    latency_s: of a collective, for each doubling of nodes; price: of a GPU hour, in dollars.
    """

    nvlink: float = 300e9
    network: float = 40e9  # of 400 Gbit/s a GPU
    latency_s: float = 50e-6
    price: float = 3.0


@dataclass(frozen=True)
class Work:
    """A training step of one GPU: `fixed_s` + images x `image_s` seconds.

    trained: weights, all of them counted as in blocks, of which there are `blocks`. The times are
    the two compiled ones of docs/benchmarks/gpu.md with data, 163 ms at 64 and 275 ms at 128 images
    on an H100.
    """

    trained: float = 0.67e9
    blocks: int = 28
    fixed_s: float = 0.051
    image_s: float = 0.00175

    def compute_s(self, images: float) -> float:
        """Seconds without any communication."""
        return self.fixed_s + images * self.image_s


@dataclass(frozen=True)
class Step:
    """compute_s, and what is sent: seconds in all, and those that compute does not cover."""

    gpus: int
    batch: int  # images of a GPU
    compute_s: float
    sent_s: float
    exposed_s: float

    @property
    def images_per_s(self) -> float:
        """Of all GPUs."""
        return self.gpus * self.batch / (self.compute_s + self.exposed_s)

    def cost(self, machine: Machine) -> float:
        """Dollars for a million images."""
        return 1e6 / self.images_per_s * self.gpus * machine.price / 3600


def sent_s(gpus: int, work: Work, machine: Machine, *, parts: bool) -> float:
    """Seconds of a step's collectives. parts: `resources.shard: full` in bf16; else DDP.

    Either sends about 2T bytes, T = 4 x trained (docs/scaling.md): within a node each GPU sends
    7/8 of them, between M nodes each card carries its eighth, (M - 1) / M of it.
    """
    volume = 2 * 4 * work.trained
    nodes = -(-gpus // NODE)
    here = min(gpus, NODE)
    within = volume * (here - 1) / here / machine.nvlink
    between = volume / NODE * (nodes - 1) / nodes / machine.network
    collectives = 3 * work.blocks if parts else work.blocks
    hops = max(1, (nodes - 1).bit_length() + 1)
    return within + between + collectives * machine.latency_s * hops


def step(gpus: int, batch: int, work: Work, machine: Machine, *, parts: bool = False) -> Step:
    """A step of `batch` images a GPU. DDP's sums run beside the backward pass, two thirds of the
    compute; the gathers and sums of parts beside all of it.
    """
    compute = work.compute_s(batch)
    sent = sent_s(gpus, work, machine, parts=parts) if gpus > 1 else 0.0
    cover = compute if parts else compute * 2 / 3
    return Step(gpus, batch, compute, sent, max(0.0, sent - cover))


SIZES = (8, 16, 32, 64, 128, 256, 512)
BATCH, WHOLE = 128, 2048  # images a GPU, and of all of them together


def compared(price: float) -> dict[str, Machine]:
    """The clusters of the tables, of `price` dollars a GPU hour."""
    return {
        "400 Gbit/s a GPU": Machine(price=price),
        "100 Gbit/s a node": Machine(network=10e9 / NODE, price=price),
    }


def page(price: float) -> str:
    """Two Markdown tables: BATCH images a GPU, and a global batch of WHOLE that the GPUs share."""
    same = [(gpus, BATCH) for gpus in SIZES]
    shared = [(gpus, WHOLE // gpus) for gpus in SIZES]
    return (
        f"{BATCH} images a GPU:\n\n{_table(same, price)}\n\n"
        f"A global batch of {WHOLE:,}:\n\n{_table(shared, price)}\n"
    )


def _table(sizes: Sequence[tuple[int, int]], price: float) -> str:
    machines = compared(price)
    heads = [f"{name}: {each}" for name in machines for each in ("images/s", "$ a million")]
    lines = [f"| GPUs | images a GPU | {' | '.join(heads)} |", f"|---:|---:|{'---:|' * len(heads)}"]
    for gpus, images in sizes:
        made = [(step(gpus, images, Work(), each), each) for each in machines.values()]
        cells = [f"{s.images_per_s:,.0f} | {s.cost(machine):.2f}" for s, machine in made]
        lines.append(f"| {gpus} | {images} | {' | '.join(cells)} |")
    return "\n".join(lines)
