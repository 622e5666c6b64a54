"""Checkpoints written beside training, which waits for a copy in memory alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from flowray.store.best import name_best
from flowray.store.checkpoint import rotate
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.state import Halted, Kept, write_kept
from flowray.train.uploading import Uploader

SMALL = 2**14  # bytes: tensors up to that are copied at once
Groups = dict[str, dict[str, Tensor]]


class Saver:
    """Writes this rank's share of the checkpoints in a thread, one at a time. The newest `keep`
    stay, beside them the best one by the probes' number `metric`, where one is named, and those
    that `uploader` sends, both of which the lead alone has.

    Every rank of `group` makes one, and calls `begin` and `wait` at the same steps. The threads
    meet by themselves, so that no rank waits for another one's disk while it trains.

    Training goes on with forward and backward passes while the thread copies; `settle` is to be
    called before anything changes what is saved. What goes wrong in a thread is raised by the next
    `begin` or `wait` of every rank: Halted, as from `write_kept`. The copies take the share's size
    in host memory, which is kept for the next one. A context manager: its end waits for the last
    checkpoint.
    """

    def __init__(
        self,
        run: RunDirectory,
        keep: int,
        group: Group,
        metric: str | None = None,
        uploader: Uploader | None = None,
    ):
        self._run, self._keep, self._group, self._device = run, keep, group, group.device
        self._writers = group.apart()
        self._metric, self._uploader = metric, uploader
        self._best: set[int] = set()
        self._written: int | None = None
        on_gpu = group.device.type == "cuda"
        self._stream = torch.cuda.Stream(group.device) if on_gpu else None
        # a thread begins on the first GPU
        chosen = (torch.cuda.set_device, (self._stream.device,)) if self._stream else (None, ())
        self._thread = ThreadPoolExecutor(1, "checkpoint", *chosen)
        self._flight: Future[None] | None = None
        self._enqueued = threading.Event()
        self._enqueued.set()
        self._copied: torch.cuda.Event | None = None
        self._host: Groups = {}
        self._wrong: Halted | None = None

    def begin(self, kept: Kept, flush: Callable[[], None] = lambda: None) -> None:
        """Begin to save; waits for the checkpoint before, where that is still being written.

        flush: has rows up to now on disk before the checkpoint is there, of which a run that goes
        on from it writes none again.
        """
        self.wait()
        self._host = {
            group: {key: self._room(group, key, tensor) for key, tensor in tensors.items()}
            for group, tensors in kept.groups.items()
        }
        large: list[tuple[Tensor, Tensor]] = []
        for group, tensors in kept.groups.items():
            for key, tensor in tensors.items():
                pair = self._host[group][key], tensor.detach()
                # a forward pass may cap a scale in place
                if tensor.nbytes <= SMALL:
                    pair[0].copy_(pair[1], non_blocking=True)
                else:
                    large.append(pair)
        made = torch.cuda.current_stream(self._device).record_event() if self._stream else None
        self._copied = None
        self._enqueued.clear()
        self._flight = self._thread.submit(self._save, kept, large, made, flush)

    def settle(self) -> None:
        """Wait until what is saved may change. On a GPU its stream waits and not the host."""
        self._enqueued.wait()
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def failed(self) -> bool:
        """Whether this rank knows by now that something went wrong: training is to halt."""
        try:
            if self._flight is not None and self._flight.done():
                self.wait()
            if self._uploader:
                self._uploader.check()
        except Halted as error:
            self._wrong = error
        return self._wrong is not None

    def failure(self) -> Halted:
        """What went wrong, the same on every rank; all have to ask, once one has `failed`."""
        return next(filter(None, self._group.gathered(self._wrong)))

    def resume(self, step: int) -> None:
        """Begin behind the checkpoint of `step`, 0 for none: it may have been cut off before it was
        judged or sent.
        """
        self.judge()
        if self._uploader and step:
            self._uploader.take(self._run.checkpoint(step))

    def leave(self) -> None:
        """The run goes on elsewhere, from what is on disk."""
        if self._uploader:
            self._uploader.leave()

    def judge(self) -> None:
        """Find the best one anew, as probe rows or checkpoints have come; none is being written."""
        if self._metric is not None:
            best = name_best(self._run, self._metric)
            self._best = set() if best is None else {best}
            if self._uploader:
                self._uploader.spare(self._best)

    def wait(self) -> None:
        """Wait until the checkpoint that was begun is on disk, with all ranks' shares."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.result()

    def tidy(self) -> None:
        """Remove what stayed on disk to be sent, or as the best one, and need not any more; nothing
        is written or sent.
        """
        if self._group.lead and self._written is not None:
            rotate(self._run.checkpoints, self._written, self._keep, self._best)

    def _room(self, group: str, key: str, tensor: Tensor) -> Tensor:
        """Host memory for the tensor, that of the checkpoint before where it fits."""
        room = self._host.get(group, {}).get(key)
        if room is not None and (room.shape, room.dtype) == (tensor.shape, tensor.dtype):
            return room
        pinned = tensor.device.type == "cuda"
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)

    def _save(
        self,
        kept: Kept,
        large: list[tuple[Tensor, Tensor]],
        begun: torch.cuda.Event | None,
        flush: Callable[[], None],
    ) -> None:
        try:
            if self._stream is None or begun is None:
                for room, tensor in large:
                    room.copy_(tensor)
            else:
                with torch.cuda.stream(self._stream):
                    self._stream.wait_event(begun)
                    for room, tensor in large:
                        room.copy_(tensor, non_blocking=True)
                    self._copied = self._stream.record_event()
        finally:
            self._enqueued.set()
        if self._copied is not None:
            self._copied.synchronize()
        with suppress(OSError):  # of a full disk the checkpoint tells
            flush()
        spare = self._best | (self._uploader.needed() if self._uploader else set())
        written = Kept(kept.step, self._host, kept.state)
        made = write_kept(self._run, written, self._keep, spare, self._writers)
        self._written = kept.step
        if self._uploader:
            self._uploader.take(made)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown()
        if kind is None or issubclass(kind, Exception):  # a checkpoint's error is the earlier one
            self.wait()
