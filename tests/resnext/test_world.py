"""The group of processes that train together: acting, failing and leaving."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resnext import world
from resnext.errors import UserError

CPU = torch.device("cpu")


def threads() -> list[str]:
    """Return the names of this process's threads."""
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def join_two(rank: int, folder: Path) -> None:
    """Make ``world.join`` connect two processes through ``folder``, without torchrun."""
    os.environ["WORLD_SIZE"] = "2"
    init, meeting = torch.distributed.init_process_group, f"file://{folder}/meeting"
    torch.distributed.init_process_group = lambda backend: init(backend, meeting, rank=rank, world_size=2)


def fail_in(here: world.World, rank: int) -> None:
    """Raise an error in the process of ``rank`` only."""
    if here.rank == rank:
        raise UserError("only the first is asked" if rank == 0 else "only the second fails")


def train_and_leave(rank: int, folder: Path, fails: bool) -> None:
    """Join as one of two processes, take a step, leave, and write the names of remaining gloo threads."""
    join_two(rank, folder)
    try:
        with world.join(CPU):
            assert any("gloo" in name for name in threads())
            if fails:
                raise UserError("no such file")
            model = DistributedDataParallel(nn.Linear(2, 2))
            model(torch.ones(1, 2)).sum().backward()
            model.itself = [model]  # a reference cycle, as in the trainer
            del model
    except UserError:
        assert fails
    (folder / str(rank)).write_text(" ".join(name for name in threads() if "gloo" in name))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_of_a_group_that_was_left_runs_on(tmp_path: Path, fails: bool) -> None:
    """A thread that releases a tensor while Python shuts down would abort the process."""
    torch.multiprocessing.spawn(train_and_leave, (tmp_path, fails), nprocs=2)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["", ""]


def agree(rank: int, folder: Path) -> None:
    """Join as one of two processes, run actions in both, and write which ran and what they returned."""
    join_two(rank, folder)
    with world.join(CPU) as both:
        acted: list[int] = []
        both.first_does(lambda: acted.append(both.rank))
        told = both.first_does(lambda: f"told by {both.rank}")
        each = both.each_does(lambda: both.rank)
        with pytest.raises(UserError, match="only the second fails"):
            both.each_does(lambda: fail_in(both, 1))
        with pytest.raises(UserError, match="only the first is asked"):
            both.first_does(lambda: fail_in(both, 0))
    (folder / str(rank)).write_text(f"{acted} {told} {each}")


def test_processes_act_together_and_fail_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(agree, (tmp_path,), nprocs=2)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["[0] told by 0 0", "[] told by 0 1"]
