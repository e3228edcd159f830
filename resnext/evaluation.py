"""Tests of a network on labelled images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnext.data.images import ImageFormat
from resnext.data.loader import held_out_batches
from resnext.data.sets import ImageFiles, Images
from resnext.errors import UserError
from resnext.world import World

BATCH_SIZE = 250
TOP = 5


@dataclass(frozen=True)
class Evaluation:
    """The results of a test.

    Attributes:
        indices: (N,), of the images in their set.
        labels: (N,), their classes.
        guesses: (N, 5 or the number of classes), what the network said, the surest first.
        confidence: (N,), the probability of the first guess.
        losses: (N,), cross-entropies.
        unreadable: a line for each image that could not be read, and is not counted.
    """

    indices: Tensor
    labels: Tensor
    guesses: Tensor
    confidence: Tensor
    losses: Tensor
    unreadable: tuple[str, ...] = ()

    @property
    def correct(self) -> Tensor:
        """Whether each first guess is right (N,), bool."""
        return self.guesses[:, 0] == self.labels

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.losses.double().mean().item()

    @property
    def accuracy(self) -> float:
        """Top-1: percent of the images that the network got right."""
        return 100 * self.correct.double().mean().item()

    @property
    def top5(self) -> float:
        """Percent of the images whose class is among the first five guesses."""
        return 100 * (self.guesses == self.labels[:, None]).any(1).double().mean().item()

    def confusion(self, num_classes: int) -> Tensor:
        """Count images of the row's class that were taken for the column's (num_classes, num_classes)."""
        pairs = self.labels * num_classes + self.guesses[:, 0]
        return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)

    def row(self) -> dict[str, float]:
        """Return the test's part of a row of ``summary.csv``."""
        return {"test_loss": self.loss, "test_accuracy": self.accuracy, "test_top5": self.top5}


def evaluate(
    model: nn.Module,
    source: Images | ImageFiles,
    form: ImageFormat,
    world: World,
    *,
    workers: int = 0,
    skip_corrupt: bool = False,
    advance: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Test ``model`` on ``source``, shared among the processes, and leave it in evaluation mode.

    Args:
        model: takes normalised images of ``form``.
        source: the images.
        form: what the network takes.
        world: the processes; all get the same result.
        workers: processes that decode images.
        skip_corrupt: whether to leave out images that cannot be read.
        advance: called with the number of images done since its last call.

    Raises:
        UserError: an image cannot be read, or none can.
    """
    model.eval()
    n, device = len(source), world.device
    parts: list[tuple[Tensor, ...]] = []
    unreadable: list[str] = []
    with torch.inference_mode():
        for batch in held_out_batches(
            source, BATCH_SIZE, world.rank, world.size, workers, device.type == "cuda"
        ):
            unreadable += batch.unreadable
            images = form.normalize(batch.images.to(device, non_blocking=True))
            logits = model(images.contiguous(memory_format=torch.channels_last)).float()
            # Copied: a worker's tensors hold shared memory and a file descriptor.
            parts.append((batch.indices.clone(), *_judge(logits, batch.labels.to(device, non_blocking=True))))
            advance(len(batch.indices) + len(batch.unreadable))
        unreadable = [line for lines in world.gather(unreadable) for line in lines]
        if unreadable and not skip_corrupt:
            raise world.agreed(UserError(f"{unreadable[0]}, or skip it: --skip-corrupt"))
        table = _together(parts, n, world)
    indices = table[:, 2].nonzero().squeeze(1)
    if not len(indices):
        raise world.agreed(UserError(f"none of {n} images could be read; the first: {unreadable[0]}"))
    rows = table[indices]
    confidence, losses, guesses = rows[:, 0], rows[:, 1], rows[:, 3:].long()
    return Evaluation(indices, source.labels[indices], guesses, confidence, losses, tuple(unreadable))


def _together(parts: list[tuple[Tensor, ...]], images: int, world: World) -> Tensor:
    """Return confidence, loss, 1 and guesses for each image (images, 3 + guesses), 0 for unreadable ones."""
    # Each process fills in its own images: the sum is all of them.
    count = max((guesses.shape[1] for _, guesses, *_ in parts), default=1)
    width = max(world.gather(count))
    # In float32, which every device has and which holds guesses exactly.
    table = torch.zeros(images, width + 3, device=world.device)
    for places, guesses, confidence, losses in parts:
        columns = (confidence[:, None], losses[:, None], torch.ones_like(losses)[:, None], guesses)
        table[places.to(world.device)] = torch.cat([c.float() for c in columns], 1)
    return world.sum(table).cpu()


def _judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first guesses, the probability of the first, and the loss of each image."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    best = logits.topk(min(TOP, logits.shape[1]))
    return best.indices, (best.values[:, 0] - logits.logsumexp(1)).exp(), losses


def standard_error(percent: float, images: int) -> float:
    """Return the standard error of a percentage of ``images``, each right or wrong independently."""
    return 100 * math.sqrt(percent / 100 * (1 - percent / 100) / images)
