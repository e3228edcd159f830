"""The processes that train together (one, or those that torchrun started) and how they communicate."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from resnext.errors import ToldError, UserError
from resnext.interruption import Interrupted

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them.

    Attributes:
        device: device of this process.
        rank: rank of this process, from 0.
        size: number of processes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` over all processes, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return the ``value`` of each process, ordered by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first_does(self, action: Callable[[], T]) -> T:
        """Run ``action`` in the first process; return its result, or raise its error, in all processes."""
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.first:
            outcome = _outcome(action)
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise self.agreed(outcome[1])
        return outcome[0]

    def each_does(self, action: Callable[[], T]) -> T:
        """Run ``action`` in each process and return its result; if one fails, raise its error in all."""
        result, error = _outcome(action) if self.size > 1 else (action(), None)
        for failure in self.gather(error):
            if failure is not None:
                raise self.agreed(failure)
        return result

    def agreed(self, error: Exception) -> Exception:
        """Return the error to raise in this process, so that only the first process prints it."""
        return error if self.first else ToldError(str(error))


def _outcome(action: Callable[[], Any]) -> list[Any]:
    """Run ``action`` and return [result, None], or [None, error] for an error that a user can fix."""
    try:
        return [action(), None]
    except (UserError, OSError) as error:
        return [None, error]


def rank() -> int:
    """Return the rank of this process among all processes that ``torchrun`` started."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Return the rank of this process on this machine, which is also the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """Return the number of processes that ``torchrun`` started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, if any, and leave them at the end.

    Args:
        device: device of this process.

    Raises:
        UserError: another process has ended.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # If DistributedDataParallel imports it later, default arguments keep the group alive until the end.
    import_module("torch.distributed.nn")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(device, dist.get_rank(), size)
    except (RuntimeError, UserError) as error:
        if device.type == "cpu":  # with NCCL, leaving would wait for processes that may be gone
            _leave()
        cause = str(error.__cause__ or error)
        if "closed by peer" in cause or "reset by peer" in cause:
            raise UserError("another process has failed; see its error above") from None
        raise
    except Interrupted:
        _leave()
        raise
    _leave()


def _leave() -> None:
    """Leave the group and end its threads.

    If a gloo thread releases a tensor while Python shuts down, the process aborts (pytorch/pytorch pull
    request 179291). The threads end with the last reference to the group, and DistributedDataParallel has one
    in a reference cycle, so collect garbage.
    """
    dist.destroy_process_group()
    gc.collect()
