"""The pictures of a run, of an evaluation, and of the study of cardinality."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

from resnext import complexity
from resnext.comparison import Compared
from resnext.data import Data
from resnext.evaluation import Evaluation
from resnext.names import escape

ACROSS, DOWN = 1.2, 1.6  # from one mistaken image to the next, in sides of an image
MOST_NAMES = 30  # classes whose names fit beside a confusion matrix
LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}  # a name may hold dollars


def training_curves(path: Path, rows: Sequence[dict[str, float]], title: str) -> None:
    """Draw loss and accuracy of training and held-out images by epoch; ``rows`` as in ``summary.csv``."""
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
    _write(figure, path)


def mistakes(path: Path, result: Evaluation, data: Data) -> None:
    """Draw the held-out images that a network got wrong, with class and guess, the surest first."""
    columns, most = 8, 64
    wrong = (~result.correct).nonzero().squeeze(1)
    order = wrong[result.confidence[wrong].argsort(descending=True)][:most]
    title = f"{len(wrong):,} of {len(result.labels):,} held-out images were mistaken"
    if len(wrong) > most:
        title += f"; the {most} that it was surest of"
    rows = max(1, -(-len(order) // columns))
    # One axes for all: one for each image would take seconds to lay out.
    figure, axes = plt.subplots(figsize=(columns * 1.25, rows * 1.65 + 0.5), layout="constrained")
    for place, i in enumerate(order.tolist()):
        x, y = place % columns * ACROSS, place // columns * DOWN
        image = data.test.read(int(result.indices[i])).permute(1, 2, 0).numpy()
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(x, x + 1, y + 1, y))
        label, guess = (_short(data.classes[n]) for n in (int(result.labels[i]), int(result.guesses[i, 0])))
        text = f"{label}\nsaid {guess}, {result.confidence[i]:.0%} sure"
        axes.text(x + 0.5, y - 0.05, text, ha="center", va="bottom", fontsize=7, **LITERAL)
    axes.set(xlim=(1 - ACROSS, columns * ACROSS), ylim=(rows * DOWN - 0.5, 1 - DOWN), aspect="equal")
    axes.axis("off")
    figure.suptitle(title)
    _write(figure, path)


def _short(name: str, most: int = 12) -> str:
    """Return the start of ``name``, with escapes for characters that matplotlib's font lacks."""
    text = "".join(c if ord(c) in _characters() else escape(c) for c in name)
    return text if len(text) <= most else f"{text[: most - 1]}…"


@cache
def _characters() -> frozenset[int]:
    """Return the code points of matplotlib's fonts: ``font.family`` in its matplotlibrc."""
    families = matplotlib.rcParams["font.family"]
    fonts = (get_font(findfont(FontProperties(family=[family]))) for family in families)
    return frozenset().union(*(font.get_charmap() for font in fonts))


def confusion(path: Path, result: Evaluation, classes: Sequence[str]) -> None:
    """Draw for each class, a row, the share of its images that was taken for each other class."""
    counts = result.confusion(len(classes))
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    named = len(classes) <= MOST_NAMES
    side = 2.2 + 0.42 * len(classes) if named else 9.0
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    # Lighter than in proportion: a mistake of one in a hundred is to be seen.
    picture = axes.imshow(shares, cmap="Blues", norm=matplotlib.colors.PowerNorm(0.4, 0, 1))
    figure.colorbar(picture, label="share of the class's images", shrink=0.8, ticks=[0, 0.01, 0.1, 0.5, 1])
    axes.set(xlabel="what the network said", ylabel="what it is")
    if named:
        names = [_short(name) for name in classes]
        turned = 90 if max(map(len, names)) > 2 else 0
        axes.set_xticks(range(len(names)), names, rotation=turned, **LITERAL)
        axes.set_yticks(range(len(names)), names, **LITERAL)
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.3 else "black"
            axes.text(
                column, row, str(int(counts[row, column])), ha="center", va="center", color=colour, fontsize=7
            )
    axes.set_title(f"{result.accuracy:.2f}% of {len(result.labels):,} images right")
    _write(figure, path)


def cardinality(path: Path, compared: Sequence[Compared], data: str) -> None:
    """Draw the errors of each pair, a point per seed, mean and deviation, next to the paper's."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    places = range(len(compared))
    for place, pair in zip(places, compared, strict=True):
        errors = list(pair.errors.values())
        left.plot([place] * len(errors), errors, "o", color="C0", alpha=0.4, markersize=5)
    several = len(compared[0].errors) > 1
    left.errorbar(
        places,
        [pair.mean for pair in compared],
        [pair.deviation for pair in compared] if several else None,
        marker="s",
        capsize=4,
        color="C0",
    )
    spread = "mean and deviation of the seeds" if several else "one seed"
    left.set(title=f"here: {data}, {spread}", ylabel="error, %")
    left.set_xticks(places, [f"{pair.cardinality} x {pair.width}d" for pair in compared])
    published = complexity.EQUAL_COMPLEXITY
    for i, layers in enumerate((50, 101)):
        errors = [complexity.PAPER_ERRORS[c][i] for c in published]
        right.plot(range(len(errors)), errors, marker="s", color=f"C{i + 1}", label=f"{layers} layers")
    right.set_xticks(range(len(published)), [f"{c} x {d}d" for c, d in published.items()])
    right.set(title="the paper: ImageNet", ylabel="top-1 error, %")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("cardinality x width")
        axes.grid(alpha=0.3)
    _write(figure, path)


def _write(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
