"""The pictures of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from resnext.data import CLASSES


def training_curves(path: Path, rows: Sequence[dict[str, float]], title: str) -> None:
    """Loss and accuracy, epoch by epoch, of training and held-out images; ``rows`` as in ``summary.csv``."""
    epochs = [row["epoch"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, label in (("train", "training, augmented"), ("test", "held out")):
        left.plot(epochs, [row[f"{kind}_loss"] for row in rows], marker="o", markersize=3, label=label)
        right.plot(epochs, [row[f"{kind}_accuracy"] for row in rows], marker="o", markersize=3, label=label)
    left.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    right.set(xlabel="epoch", ylabel="accuracy, %")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    right.annotate(
        f"{rows[-1]['test_accuracy']:.1f}%",
        (epochs[-1], rows[-1]["test_accuracy"]),
        textcoords="offset points",
        xytext=(0, -14),
        ha="right",
    )
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def mistakes(path: Path, images: Tensor, labels: Tensor, probabilities: Tensor, title: str) -> None:
    """The images that a network got wrong, what each is and what the network thought, the surest first.

    Args:
        path: where to write the PNG.
        images: (N, 1, H, W), uint8, those that it got wrong.
        labels: (N,), what they are.
        probabilities: (N, classes), what the network thought.
        title: above the picture.
    """
    columns, most = 8, 64
    order = probabilities.amax(1).argsort(descending=True)[:most]
    if len(images) > most:
        title += f"; the {most} that it was surest of"
    rows = max(1, -(-len(order) // columns))
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * 1.25, rows * 1.6 + 0.6), layout="constrained", squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, order.tolist(), strict=False):
        label, thought = int(labels[i]), probabilities[i]
        guess = int(thought.argmax())
        axis.imshow(images[i, 0].numpy(), cmap="gray", vmin=0, vmax=255)
        axis.set_title(f"a {CLASSES[label]}\nsaid {CLASSES[guess]}, {thought[guess]:.0%} sure", fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
