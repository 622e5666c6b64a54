"""Weights, gradients, optimiser state and EMA in parts, one on every rank: FSDP2
(`torch.distributed.fsdp.fully_shard`), which is ZeRO's third stage (arXiv 1910.02054).

A tensor in parts is a DTensor, which has the whole one's shape. `whole` and `part_of` lead from one
to the other. A checkpoint is written from parts, `share_of`, and read as wholes or as other parts.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from flowray.config.errors import InputError
from flowray.config.recipe import Recipe
from flowray.config.train import ResourceConfig
from flowray.losses.gradients import DTYPES
from flowray.losses.total import Objective
from flowray.model.assemble import FlowModel
from flowray.model.text import TextModel
from flowray.store.tensorfile import Stored
from flowray.train.group import WAITS, Group

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Shards:
    """That the ranks hold parts. whole: what shows the weights in one piece (see `twin_of`). lead:
    whether this rank is the one that writes them.
    """

    whole: FlowModel
    lead: bool


def is_sharded(resources: ResourceConfig, group: Group) -> bool:
    """Whether the ranks of `group` are to hold parts; a rank alone holds all."""
    return resources.shard != "none" and group.world > 1


def shard(objective: Objective, recipe: Recipe, group: Group) -> None:
    """Leave this rank's part of the weights in the objective's parameters, in place, on the group's
    device: of each block of the velocity network, of each layer of the frozen text model if
    `resources.shard_text`, and of all the rest together.

    Every rank has the same whole weights before; what is frozen stays whole, but for that text
    model. Numbers without a dimension, such as a logit scale, stay whole too: FSDP has no parts of
    them, so that `average_whole` has to average their gradients.

    A block's weights are gathered in train.precision, and its gradients added in fp32; the parts
    are fp32.
    """
    # of the objective's outputs, which nobody writes to
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    model, mesh = objective.model, _mesh(recipe.resources, group)
    half = None if recipe.train.velocity_fp32 else DTYPES.get(recipe.train.precision)
    policy = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.velocity.blocks_in_order():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if recipe.resources.shard_text:
        for layer in _layers(model.text):
            fully_shard(layer, mesh=mesh)
        fully_shard(model.text.backbone, mesh=mesh)
    held_whole = {p for p in model.parameters() if not p.requires_grad or p.ndim == 0}
    fully_shard(objective, mesh=mesh, ignored_params=held_whole)
    with torch.no_grad():
        for kept in held_whole:
            if not isinstance(kept, DTensor):  # of a sharded text model they have moved
                kept.data = kept.data.to(group.device)


def _layers(text: TextModel) -> nn.ModuleList:
    """The layers of a text model: the list with the most parameters."""
    lists = [each for each in text.backbone.modules() if isinstance(each, nn.ModuleList)]
    if not lists:
        raise InputError(
            "resources.shard_text: this text model has no list of layers; type"
            " resources.shard_text=false"
        )
    return max(lists, key=lambda each: sum(p.numel() for p in each.parameters()))


def _mesh(resources: ResourceConfig, group: Group) -> DeviceMesh:
    """One dimension of all ranks, or for `hybrid` two: nodes, and the ranks of a node, which are
    neighbours in number and LOCAL_WORLD_SIZE many (torchrun and Ray Train both say it).
    """
    kind, world = group.device.type, group.world
    if resources.shard == "hybrid":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        of_ranks = [0] * world
        dist.all_gather_object(of_ranks, here)
        if len(set(of_ranks)) > 1 or world % here:
            raise InputError(
                "resources.shard: hybrid wants as many workers on every node, got"
                f" {', '.join(map(str, sorted(set(of_ranks))))} of {world}; type"
                " resources.shard=full"
            )
        if here < world:
            names = ("nodes", "ranks")
            mesh = init_device_mesh(kind, (world // here, here), mesh_dim_names=names)
            for each in mesh.get_all_groups():
                each.set_timeout(WAITS)
            return mesh
    return init_device_mesh(kind, (world,), mesh_dim_names=("ranks",))


def twin_of(model: FlowModel, device: torch.device, *, shard_text: bool) -> FlowModel:
    """A model to show whole weights with, of one that is not in parts yet: it shares what is frozen
    and takes no memory for the rest until `holding` lends it values.

    shard_text: the frozen text model is lent to it as well.
    """
    lent = {id(p) for p in model.parameters() if p.requires_grad}
    if shard_text:
        lent |= {id(p) for p in model.text.backbone.parameters()}
    shared = {
        id(each): each
        for each in (*model.parameters(), *model.buffers(), model.text.prompts, model.text.kept)
    }
    empty = {
        id(p): nn.Parameter(
            torch.zeros((), dtype=p.dtype, device=device).expand(p.shape),
            requires_grad=p.requires_grad,
        )
        for p in model.parameters()
        if id(p) in lent
    }
    return copy.deepcopy(model, {**shared, **empty})


def average_whole(objective: nn.Module, group: Group) -> None:
    """After the last backward pass of a step: the gradients of what trains and is held whole beside
    parts, averaged over ranks.
    """
    parameters = [p for p in objective.parameters() if p.requires_grad]
    if any(isinstance(p, DTensor) for p in parameters):
        for p in parameters:
            if not isinstance(p, DTensor) and p.grad is not None:
                group.mean_(p.grad)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, itself where it is whole; writing to it writes to the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The whole tensors on the CPU, {} unless `keep`; every rank has to call it.

    They are gathered one by one, so a rank needs memory for one of them on its device.
    """
    kept = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if keep:
            kept[name] = tensor.detach().cpu()
    return kept


@torch.no_grad()
def share_of(groups: Mapping[str, Mapping[str, Tensor]], group: Group) -> dict[str, Tensors]:
    """What this rank writes of the tensors of a state, so that the ranks together write each once:
    the rows that it alone holds, and of what several hold alike so much that all of these write as
    many bytes, as nearly as whole tensors allow.
    """
    share: dict[str, Tensors] = {name: {} for name in groups}
    written: dict[int, list[int]] = {}  # bytes, by how many hold the same, of each of them
    named = [(name, key, each) for name, of in groups.items() for key, each in of.items()]
    # the largest first; every rank comes to the same
    for name, key, tensor in sorted(named, key=lambda each: -_bytes(each[2])):
        mine, holders = _place(tensor, group)
        of_each = written.setdefault(holders, [0] * holders)
        least = of_each.index(min(of_each))
        of_each[least] += _bytes(tensor)
        here = local(tensor)
        if least == mine and (here.numel() or not tensor.numel()):
            share[name][key] = here
    return share


def _bytes(tensor: Tensor) -> int:
    """Of the whole."""
    return tensor.numel() * tensor.element_size()


def _place(tensor: Tensor, group: Group) -> tuple[int, int]:
    """This rank's place among those that hold the same of it, and how many they are."""
    if not isinstance(tensor, DTensor):
        return group.rank, group.world
    place, holders, mesh = 0, 1, tensor.device_mesh
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            place = place * mesh.size(dim) + mesh.get_local_rank(dim)
            holders *= mesh.size(dim)
    return place, holders


def part_of(tensor: Tensor | Stored, like: Tensor) -> Tensor:
    """This rank's part, on the device of `like`, of a whole tensor that every rank has or can read,
    cut as `like` is; all of it, where it is, where `like` is not in parts or of another shape.
    Nothing is sent.
    """
    if not isinstance(like, DTensor) or tuple(tensor.shape) != tuple(like.shape):
        return tensor if isinstance(tensor, Tensor) else tensor.whole()
    begin, end, mesh = 0, like.shape[0], like.device_mesh
    for dim, placement in enumerate(like.placements):
        if placement.is_shard(0):  # as Tensor.chunk cuts
            rows = -(-(end - begin) // mesh.size(dim))
            begin = min(begin + rows * mesh.get_local_rank(dim), end)
            end = min(begin + rows, end)
    own = tensor[begin:end] if isinstance(tensor, Tensor) else tensor.rows(begin, end)
    return DTensor.from_local(
        own.to(like.device),
        mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
