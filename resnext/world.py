"""One process or many: what torchrun starts, and what they have to agree on."""

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
    """The processes that train together.

    Attributes:
        device: of this process.
        rank: which it is.
        size: how many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """``tensor``, summed in place over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The ``value`` of each process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first_does(self, action: Callable[[], T]) -> T:
        """What ``action`` gives in the first process, which alone runs it; what it raises, all raise."""
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
        """What ``action`` gives in this process; where it fails in any of them, all raise that error."""
        result, error = _outcome(action) if self.size > 1 else (action(), None)
        for failure in self.gather(error):
            if failure is not None:
                raise self.agreed(failure)
        return result

    def agreed(self, error: Exception) -> Exception:
        """What to raise for an error that all processes have come to: the first one prints it."""
        return error if self.first else ToldError(str(error))


def _outcome(action: Callable[[], Any]) -> list[Any]:
    """What ``action`` gives, and what a person can mend if it failed."""
    try:
        return [action(), None]
    except (UserError, OSError) as error:
        return [None, error]


def rank() -> int:
    """The number of this process among those that ``torchrun`` started."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """The number of this process among those on this machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """How many processes ``torchrun`` started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def join(device: torch.device) -> Iterator[World]:
    """The world that this process is in: those that ``torchrun`` started, else itself alone.

    Args:
        device: of this process.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Imported later, by DistributedDataParallel, its functions' defaults would hold the group to the end.
    import_module("torch.distributed.nn")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(device, dist.get_rank(), size)
    except (RuntimeError, UserError) as error:
        if device.type == "cpu":  # NCCL would wait for processes that may never come
            _leave()
        cause = str(error.__cause__ or error)
        if "closed by peer" in cause or "reset by peer" in cause:
            raise UserError("another process has ended, see above") from None
        raise
    except Interrupted:
        _leave()
        raise
    _leave()


def _leave() -> None:
    """Leaves the group, and ends its threads.

    A thread of gloo that lets go of a tensor while Python shuts down aborts the process (PyTorch's pull
    request 179291). The threads end with the last reference to the group, and DistributedDataParallel's is
    in a cycle.
    """
    dist.destroy_process_group()
    gc.collect()
