"""Evaluation of a network on labeled images."""

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
    """Results of an evaluation of N images.

    Attributes:
        indices: (N,), positions of the images in their set.
        labels: (N,), true classes.
        guesses: (N, min(5, classes)), predicted classes, the most probable first.
        confidence: (N,), probability of the first guess.
        losses: (N,), cross-entropy of each image.
        unreadable: an error for each image that couldn't be read and isn't counted.
    """

    indices: Tensor
    labels: Tensor
    guesses: Tensor
    confidence: Tensor
    losses: Tensor
    unreadable: tuple[str, ...] = ()

    @property
    def correct(self) -> Tensor:
        """Whether the first guess for each image is right: (N,), bool."""
        return self.guesses[:, 0] == self.labels

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return self.losses.double().mean().item()

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * self.correct.double().mean().item()

    @property
    def top5(self) -> float:
        """Top-5 accuracy in percent."""
        return 100 * (self.guesses == self.labels[:, None]).any(1).double().mean().item()

    def confusion(self, num_classes: int) -> Tensor:
        """Return the confusion matrix (num_classes, num_classes): row for the class, column for the guess."""
        pairs = self.labels * num_classes + self.guesses[:, 0]
        return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)

    def row(self) -> dict[str, float]:
        """Return the columns of ``summary.csv`` that come from the evaluation."""
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
    """Evaluate a network on labeled images, and leave it in evaluation mode.

    Args:
        model: network whose input is normalized images of format ``form``.
        source: the images.
        form: format of the images that the network accepts.
        world: processes that share the work; all of them get the same result.
        workers: number of processes that decode images. Defaults to 0, which decodes in this process.
        skip_corrupt: whether to skip images that can't be read. Defaults to False.
        advance: called with the number of images done since its last call. Defaults to doing nothing.

    Raises:
        UserError: an image can't be read, or with ``skip_corrupt``, none can.
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
            # Copied, because a worker's tensors keep shared memory and a file descriptor open.
            parts.append((batch.indices.clone(), *_judge(logits, batch.labels.to(device, non_blocking=True))))
            advance(len(batch.indices) + len(batch.unreadable))
        unreadable = [line for lines in world.gather(unreadable) for line in lines]
        if unreadable and not skip_corrupt:
            raise world.agreed(UserError(f"{unreadable[0]}, or skip it with --skip-corrupt"))
        table = _together(parts, n, world)
    indices = table[:, 2].nonzero().squeeze(1)
    if not len(indices):
        raise world.agreed(UserError(f"none of the {n} images could be read; first error: {unreadable[0]}"))
    rows = table[indices]
    confidence, losses, guesses = rows[:, 0], rows[:, 1], rows[:, 3:].long()
    return Evaluation(indices, source.labels[indices], guesses, confidence, losses, tuple(unreadable))


def _together(parts: list[tuple[Tensor, ...]], images: int, world: World) -> Tensor:
    """Return (images, 3 + guesses): confidence, loss, 1 and guesses of each image, or zeros if unreadable."""
    # Each process fills in the rows of its own images, so the sum has all of them.
    count = max((guesses.shape[1] for _, guesses, *_ in parts), default=1)
    width = max(world.gather(count))
    # float32 is available on every device and represents guesses exactly.
    table = torch.zeros(images, width + 3, device=world.device)
    for places, guesses, confidence, losses in parts:
        columns = (confidence[:, None], losses[:, None], torch.ones_like(losses)[:, None], guesses)
        table[places.to(world.device)] = torch.cat([c.float() for c in columns], 1)
    return world.sum(table).cpu()


def _judge(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first guesses, the probability of the first guess, and the loss of each image."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    best = logits.topk(min(TOP, logits.shape[1]))
    return best.indices, (best.values[:, 0] - logits.logsumexp(1)).exp(), losses


def standard_error(percent: float, images: int) -> float:
    """Return the standard error of an accuracy in percent, for ``images`` independent images."""
    return 100 * math.sqrt(percent / 100 * (1 - percent / 100) / images)
