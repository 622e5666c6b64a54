"""What a frozen text model makes of each token, kept so that no caption is run through it twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from flowray.config.errors import Notice
from flowray.model.layers import to_device

GIB = 2**30


class _Key(NamedTuple):
    """What the states of a prompt hang on beside the weights, which are frozen."""

    device: torch.device
    tokens: tuple[int, ...]


class TokenStates:
    """States (L, size) of every prompt seen, on the model's device, up to `gib` GiB of them.

    Full, it takes no more: each epoch has the captions in another order, so that throwing out what
    was used longest ago would lose most of them before they come again. A copy of it is empty.
    """

    def __init__(self, gib: float):
        self.gib, self.nbytes, self._full = gib, 0, False
        self._kept: dict[_Key, Tensor] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, _: object) -> TokenStates:
        return TokenStates(self.gib)

    def clear(self) -> None:
        """Forget all of them: of a model with other weights they are wrong."""
        self._kept.clear()
        self.nbytes, self._full = 0, False

    def __call__(
        self, ids: Tensor, mask: Tensor, compute: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """States (B, L, size) of right-padded ids (B, L) with their mask, zero at the padding.

        compute: the same from ids and mask alone, asked for the prompts that are not kept, each
        once and together, as long as the longest of them.
        """
        keys = self._keys(ids, mask)
        new: dict[_Key, int] = {}
        for i, key in enumerate(keys):
            if key not in self._kept:
                new.setdefault(key, i)
        made = self._made(ids, mask, new, compute) if new else {}
        rows = [self._kept[key] if key in self._kept else made[key] for key in keys]
        states = pad_sequence(rows, batch_first=True)
        return F.pad(states, (0, 0, 0, ids.shape[1] - states.shape[1]))

    def _keys(self, ids: Tensor, mask: Tensor) -> list[_Key]:
        counts = mask.sum(1).tolist()
        return [
            _Key(ids.device, tuple(row[:count]))
            for row, count in zip(ids.tolist(), counts, strict=True)
        ]

    def _made(
        self,
        ids: Tensor,
        mask: Tensor,
        new: dict[_Key, int],
        compute: Callable[[Tensor, Tensor], Tensor],
    ) -> dict[_Key, Tensor]:
        rows = to_device(torch.tensor(list(new.values())), ids.device)
        length = max(1, *(len(key.tokens) for key in new))
        states = compute(ids[rows, :length], mask[rows, :length])
        if states.shape[:2] != (len(rows), length):
            got, want = tuple(states.shape[:2]), (len(rows), length)
            raise ValueError(f"want a state of each token, {want}, got {got}")
        made = {
            key: state[: len(key.tokens)].clone() for key, state in zip(new, states, strict=True)
        }
        for key, state in made.items():
            self._keep(key, state)
        return made

    def _keep(self, key: _Key, state: Tensor) -> None:
        if self.nbytes + state.nbytes <= self.gib * GIB:
            self._kept[key] = state
            self.nbytes += state.nbytes
        elif not self._full:
            self._full = True
            full = f"{len(self)} captions fill {self.gib:g} GiB; more are computed each time"
            warnings.warn(f"model.text.cache_gib: {full}", Notice, stacklevel=2)
