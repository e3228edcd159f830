"""Training in two processes, with gloo on the CPU: the functions that ``test_ecosystem`` runs in each."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gconv

STEPS = 3


class Block(nn.Module):
    """Two grouped convolutions and a dense one around group norm, which doesn't mix images."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(2, channels)
        self.second = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=2, bias=False)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.second(self.norm(self.first(x)).relu()).relu())


def network() -> nn.Sequential:
    """Return the same float64 network each time, not converted, with 8 input channels and 3 classes."""
    torch.manual_seed(1)
    return nn.Sequential(Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    """Return four images and their classes."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(4, 8, 9, 10, generator=generator, dtype=torch.float64)
    return images, torch.tensor([0, 2, 1, 2])


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def in_a_group(rank: int, folder: Path) -> None:
    """Run each of ``RUNS`` as one of two processes; the first saves the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        with gconv.backend("reference"):
            states = {run.__name__: run(rank) for run in RUNS}
        if rank == 0:
            torch.save(states, folder / "states.pt")
    finally:
        dist.destroy_process_group()
    # DTensor caches the group, so its threads keep running, and one that frees a tensor while Python shuts
    # down aborts the process. So end it here.
    os._exit(0)


def data_parallel(rank: int) -> dict[str, Tensor]:
    """Train a converted network in DistributedDataParallel, each process on half of the images."""
    model = network()
    gconv.convert(model)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    images, labels = data()
    train(wrapped, images[rank::2], labels[rank::2])
    return model.state_dict()


def converted_when_wrapped(rank: int) -> dict[str, Tensor]:
    """Train the same way, but wrap the network before converting it."""
    wrapped = DistributedDataParallel(network())
    report = gconv.convert(wrapped.module)
    assert len(report.converted) == 4 and "layout, which DistributedDataParallel relies on" in str(report)
    images, labels = data()
    train(wrapped, images[rank::2], labels[rank::2])
    return wrapped.module.state_dict()


def fully_sharded(rank: int) -> dict[str, Tensor]:
    """Train with FSDP2: the parameters of each block are sharded, and gathered when it runs."""
    model = network()
    gconv.convert(model, channels_last=False)
    mesh = init_device_mesh("cpu", (2,))
    for block in model[:2]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    images, labels = data()
    train(model, images[rank::2], labels[rank::2])
    return {key: tensor.full_tensor() for key, tensor in model.state_dict().items()}


def sharded_alone(rank: int) -> dict[str, Tensor]:
    """Train with FSDP2 on each convolution and convert afterwards, when each has a class created by FSDP2."""
    model = network()
    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert len(gconv.convert(model).converted) == 4
    images, labels = data()
    train(model, images[rank::2], labels[rank::2])
    assert len(gconv.revert(model)) == 4
    return {key: tensor.full_tensor() for key, tensor in model.state_dict().items()}


RUNS = (data_parallel, converted_when_wrapped, fully_sharded, sharded_alone)
