"""The processes of one training run: this one or those that torchrun started, and their workers."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader

_DEVICES = "cpu, cuda, one of several such as cuda:1, or mps is allowed"


class FailedElsewhere(SystemExit):
    """Another rank met an error and reports it; this one leaves with its exit status and without a word."""


@dataclass(frozen=True)
class World:
    """This process among ``size``, and its device."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over the ranks, in float64."""
        return torch.tensor(self.gather(values), dtype=torch.float64).sum(0).tolist()

    def gather(self, values: list[float]) -> list[list[float]]:
        """``values`` of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [values]
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return [part.tolist() for part in parts]

    def on_main(self, function: Callable[[], Any]) -> Any:
        """``function()``, called on rank 0 only; its result on every rank. Its error leaves no rank waiting."""
        if self.size == 1:
            return function()
        result: list[Any] = [None, False]
        error = None
        if self.is_main:
            try:
                result = [function(), True]
            except Exception as raised:  # raised again below, once the other ranks know of it
                error = raised
        dist.broadcast_object_list(result, src=0, device=self.device)
        if error is not None:
            raise error
        if not result[1]:
            raise FailedElsewhere(2)
        return result[0]

    def on_all(self, function: Callable[[], Any]) -> Any:
        """``function()``, called on every rank; an error of any ends all of them, and is reported by one.

        What it calls must not wait for other ranks, or they would wait for ever for one that failed.
        """
        if self.size == 1:
            return function()
        result = error = None
        try:
            result = function()
        except Exception as raised:  # raised again below, by the first rank that has one
            error = raised
        failed = [rank for rank, (bad,) in enumerate(self.gather([float(error is not None)])) if bad]
        if failed and error is not None and self.rank == failed[0]:
            raise error
        if failed:
            raise FailedElsewhere(2)
        return result

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank those of rank 0, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def part(self) -> None:
        """The end of a run that went well, before :meth:`leave`; the caller has let go of its network.

        Gloo can wait for ever where a process takes down the reducer of its network after the group is gone.
        """
        if self.size > 1:
            gc.collect()  # networks hold on to themselves
            self.gather([0.0])

    def leave(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join_world(device: str | None = None) -> World:
    """The world that torchrun's environment variables describe, or this process alone.

    ``device``: default CUDA where there is any, else CPU; under torchrun CUDA means the device LOCAL_RANK.

    Raises:
        ValueError: the device is not known or not there.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; {_DEVICES}") from error
    if chosen.type not in ("cpu", "cuda", "mps"):  # torch knows more, which nothing here was run on
        raise ValueError(f"device is {device!r}; {_DEVICES}")
    size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        if size > 1:
            chosen = torch.device("cuda", local_rank)
        if (chosen.index or 0) >= count:
            raise ValueError(f"device is {chosen}; torch sees {count} CUDA devices")
        torch.cuda.set_device(chosen)
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is mps; torch sees no such device")
    if size == 1:
        return World(chosen)
    if not dist.is_initialized():
        # The other ranks wait while rank 0 looks through the images, which can take over ten minutes, the default.
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return World(chosen, dist.get_rank(), dist.get_world_size())


def outlive_signals(worker: int) -> None:
    """For a DataLoader's ``worker_init_fn``."""
    # A terminal or scheduler signals the whole group; the main process still needs its workers for the step at hand.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def stop_workers(loader: DataLoader) -> None:
    """End the persistent workers of ``loader`` now."""
    # An error's traceback keeps the iterator alive, and at exit Python would wait for its workers. What the iterator's
    # own destructor calls has no public name.
    iterator, loader._iterator = loader._iterator, None
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
