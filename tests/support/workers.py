"""Training in two processes, gloo on the CPU: what ``test_ecosystem`` starts in each."""

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
    """Two grouped convolutions and a dense one around group norm, which does not look at other images."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, groups=4)
        self.norm = nn.GroupNorm(2, channels)
        self.second = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=2, bias=False)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.second(self.norm(self.first(x)).relu()).relu())


def network() -> nn.Sequential:
    """The same float64 network each time; plain, 8 channels in, 3 classes out."""
    torch.manual_seed(1)
    return nn.Sequential(Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    """Four images and their classes."""
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
    """Runs each of ``RUNS`` as one of two processes; the first writes what they return."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        with gconv.backend("reference"):
            states = {run.__name__: run(rank) for run in RUNS}
        if rank == 0:
            torch.save(states, folder / "states.pt")
    finally:
        dist.destroy_process_group()
    # DTensor caches the group, so its threads run on, and one of them that lets go of a tensor while Python
    # shuts down aborts the process: end it here.
    os._exit(0)


def data_parallel(rank: int) -> dict[str, Tensor]:
    """DistributedDataParallel around a converted network, each process with its half of the images."""
    model = network()
    gconv.convert(model)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    images, labels = data()
    train(wrapped, images[rank::2], labels[rank::2])
    return model.state_dict()


def converted_when_wrapped(rank: int) -> dict[str, Tensor]:
    """The same, where the network was wrapped before it was converted."""
    wrapped = DistributedDataParallel(network())
    report = gconv.convert(wrapped.module)
    assert len(report.swapped) == 4 and "the layout that DistributedDataParallel found" in str(report)
    images, labels = data()
    train(wrapped, images[rank::2], labels[rank::2])
    return wrapped.module.state_dict()


def fully_sharded(rank: int) -> dict[str, Tensor]:
    """FSDP2: each block's parameters are spread over the processes, and gathered when it runs."""
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
    """FSDP2 on each convolution, converted after it: the sharding has made a class of its own for each."""
    model = network()
    mesh = init_device_mesh("cpu", (2,))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert len(gconv.convert(model).swapped) == 4
    images, labels = data()
    train(model, images[rank::2], labels[rank::2])
    assert len(gconv.revert(model)) == 4
    return {key: tensor.full_tensor() for key, tensor in model.state_dict().items()}


RUNS = (data_parallel, converted_when_wrapped, fully_sharded, sharded_alone)
