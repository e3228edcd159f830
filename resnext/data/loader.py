"""Batches of images, which are the same for any number of processes and of workers that decode files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from resnext.data.augment import RandomCrop, seed_of
from resnext.data.sets import ImageFiles, Images
from resnext.errors import UserError
from resnext.interruption import unheard


@dataclass(frozen=True)
class Batch:
    """A batch of images with their labels.

    Attributes:
        indices: (N,), positions of the images in their set.
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
        seed: seed of the random draws for the batch.
        unreadable: an error for each image that couldn't be read.
    """

    indices: Tensor
    images: Tensor
    labels: Tensor
    seed: int = 0
    unreadable: tuple[str, ...] = ()

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory, which a GPU can read asynchronously."""
        return Batch(
            self.indices, self.images.pin_memory(), self.labels.pin_memory(), self.seed, self.unreadable
        )


@dataclass(frozen=True)
class _Wanted:
    """A batch to read: the positions of its images and the seed of its random draws."""

    indices: Sequence[int]
    seed: int


class _Reader(Dataset):
    """Reads complete batches in a worker.

    Args:
        source: the images.
        random: whether to crop photographs at random, as in training, instead of in the center.
        replace: whether to replace an unreadable image by the next readable one.
    """

    def __init__(self, source: Images | ImageFiles, random: bool, replace: bool) -> None:
        self.source, self.random, self.replace = source, random, replace

    def __getitem__(self, wanted: _Wanted) -> Batch:
        if isinstance(self.source, Images):
            indices = torch.as_tensor(wanted.indices)
            return Batch(indices, self.source.images[indices], self.source.labels[indices], wanted.seed)
        read, unreadable = [], []
        for index in wanted.indices:
            seed = seed_of(wanted.seed, index)
            for candidate in self._candidates(index):
                try:
                    scale = {"scale": RandomCrop(seed)} if self.random else {}
                    read.append((candidate, self.source.read(candidate, **scale)))
                    break
                except UserError as error:
                    unreadable.append(str(error))
            else:
                if self.replace:
                    break  # all images were tried
        if not read:
            form = self.source.format
            none = torch.empty(0, form.channels, form.size, form.size, dtype=torch.uint8)
            return Batch(
                torch.empty(0, dtype=torch.int64), none, none.new_empty(0).long(), 0, tuple(unreadable)
            )
        indices = torch.tensor([index for index, _ in read])
        images = torch.stack([image for _, image in read])
        return Batch(indices, images, self.source.labels[indices], wanted.seed, tuple(unreadable))

    def _candidates(self, index: int) -> Iterator[int]:
        for step in range(len(self.source) if self.replace else 1):
            yield (index + step) % len(self.source)


def micro_batch(batch_size: int, largest: int, processes: int) -> int:
    """Return the number of images per pass, at most ``largest``, so that all passes have the same size.

    Raises:
        UserError: the processes can't share a batch evenly, or each pass would have a single image.
    """
    if batch_size % processes:
        raise UserError(f"--batch-size must be a multiple of the {processes} processes, got {batch_size}")
    share = batch_size // processes
    size = next(n for n in range(min(largest, share), 0, -1) if share % n == 0)
    if size == 1 < min(largest, share):
        raise UserError(
            f"--batch-size {batch_size}: {share} images per process can't be split into equal passes of 2 to "
            f"{largest} images; choose a batch size with more divisors, or another --micro-batch"
        )
    return size


class TrainLoader:
    """Loads the training batches of one process, step by step.

    The order of images depends on the seed and the epoch, and the random draws of a pass also on its position
    in the epoch. They don't depend on which process makes a pass, or on where an epoch is resumed.

    Args:
        source: the images.
        batch_size: number of images per step, over all processes. Images left over at the end of an epoch are
            skipped.
        micro: number of images per pass.
        seed: seed of the order and the random draws.
        rank: rank of this process. Defaults to 0.
        processes: number of processes. Defaults to 1.
        workers: number of processes that read images. Defaults to 0, which reads in this process.
        skip_corrupt: whether to replace unreadable images by others. Defaults to False.
        pin: whether to use pinned memory, for a GPU. Defaults to False.
    """

    def __init__(
        self,
        source: Images | ImageFiles,
        batch_size: int,
        micro: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
        workers: int = 0,
        skip_corrupt: bool = False,
        pin: bool = False,
    ) -> None:
        self.size, self.batch_size, self.micro, self.seed = len(source), batch_size, micro, seed
        self.steps = len(source) // batch_size
        passes = batch_size // micro
        self.own = range(rank * passes // processes, (rank + 1) * passes // processes)
        reader = _Reader(source, random=True, replace=skip_corrupt)
        self.load = partial(_load, reader, workers=workers, pin=pin)

    def epoch(self, number: int, start: int = 0) -> Iterator[list[Batch]]:
        """Yield this process's batches of each step of epoch ``number``, from step ``start`` on."""
        order = np.random.default_rng(seed_of(self.seed, number)).permutation(self.size)
        wanted = [
            _Wanted(
                order[step * self.batch_size + i * self.micro :][: self.micro].tolist(),
                seed_of(self.seed, number, step, i),
            )
            for step in range(start, self.steps)
            for i in self.own
        ]
        batches = self.load(wanted)
        for _ in range(start, self.steps):
            yield [next(batches) for _ in self.own]


def held_out_batches(
    source: Images | ImageFiles,
    batch_size: int,
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """Yield this process's batches for testing, in order, without images that can't be read."""
    batches = [range(i, min(i + batch_size, len(source))) for i in range(0, len(source), batch_size)]
    wanted = [_Wanted(list(indices), 0) for indices in batches[rank::processes]]
    yield from _load(_Reader(source, random=False, replace=False), wanted, workers=workers, pin=pin)


def _load(reader: _Reader, wanted: list[_Wanted], workers: int, pin: bool) -> Iterator[Batch]:
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=wanted,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),  # without it, it would draw from the network's generator
    )
    # Ctrl-C and SIGTERM also reach workers, which must continue until the process has finished its step.
    with unheard():
        return iter(loader)
