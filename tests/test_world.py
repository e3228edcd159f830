"""The group of processes that train together: leaving it."""

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
    """The names of this process's threads."""
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def train_and_leave(rank: int, folder: Path, fails: bool) -> None:
    """Joins as one of two processes, takes a step, leaves, and writes down which threads of gloo are left."""
    os.environ["WORLD_SIZE"] = "2"
    init, meeting = torch.distributed.init_process_group, f"file://{folder}/meeting"
    torch.distributed.init_process_group = lambda backend: init(backend, meeting, rank=rank, world_size=2)
    try:
        with world.join(CPU):
            assert any("gloo" in name for name in threads())
            if fails:
                raise UserError("no such file")
            model = DistributedDataParallel(nn.Linear(2, 2))
            model(torch.ones(1, 2)).sum().backward()
            model.itself = [model]  # a cycle, as the trainer's is in
            del model
    except UserError:
        assert fails
    (folder / str(rank)).write_text(" ".join(name for name in threads() if "gloo" in name))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_of_a_group_that_was_left_runs_on(tmp_path: Path, fails: bool) -> None:
    """One that lets go of a tensor while Python shuts down would abort the process."""
    torch.multiprocessing.spawn(train_and_leave, (tmp_path, fails), nprocs=2)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["", ""]
