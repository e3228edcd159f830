"""The plots of a run, of an evaluation and of the study of cardinality."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator, PercentFormatter

from resnext import complexity
from resnext.comparison import Compared
from resnext.data import Data
from resnext.evaluation import Evaluation
from resnext.names import escape

# Sizes in inches. READMEs show plots about 700 pixels wide, where text of a 7.5 inch plot stays legible.
WIDTH, DPI = 7.5, 160
ACROSS, DOWN = 1.2, 1.75  # distance between misclassified images, in units of an image's side
MOST_NAMES = 30  # with more classes, their names don't fit next to a confusion matrix
LITERAL: dict[str, Any] = {"parse_math": False, "usetex": False}  # names may contain dollar signs


def training_curves(path: Path, rows: Sequence[dict[str, float]], title: str) -> None:
    """Plot loss and accuracy of training and held-out images by epoch, from the rows of ``summary.csv``."""
    epochs = [row["epoch"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4), layout="constrained")
    for kind, label in (("train", "training (augmented)"), ("test", "held-out")):
        left.plot(epochs, [row[f"{kind}_loss"] for row in rows], marker="o", markersize=3, label=label)
        right.plot(epochs, [row[f"{kind}_accuracy"] for row in rows], marker="o", markersize=3, label=label)
    left.set(xlabel="epoch", ylabel="cross-entropy loss", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    right.set(xlabel="epoch", ylabel="accuracy (%)")
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
    """Plot the misclassified held-out images with class and guess, the most confident guesses first."""
    columns, most = 6, 60
    wrong = (~result.correct).nonzero().squeeze(1)
    order = wrong[result.confidence[wrong].argsort(descending=True)][:most]
    title = f"{len(wrong):,} of {len(result.labels):,} held-out images misclassified"
    if len(wrong) > most:
        title += f" (the {most} most confident)"
    rows = max(1, -(-len(order) // columns))
    # One axes for all images: laying out one for each takes seconds.
    unit = WIDTH / (columns * ACROSS + ACROSS - 1)
    figure, axes = plt.subplots(figsize=(WIDTH, rows * DOWN * unit + 0.2), layout="constrained")
    for place, i in enumerate(order.tolist()):
        x, y = place % columns * ACROSS, place // columns * DOWN
        image = data.test.read(int(result.indices[i])).permute(1, 2, 0).numpy()
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(x, x + 1, y + 1, y))
        label, guess = (_short(data.classes[n]) for n in (int(result.labels[i]), int(result.guesses[i, 0])))
        text = f"true {label}\nguess {guess}\n{result.confidence[i]:.0%} sure"
        axes.text(x + 0.5, y - 0.05, text, ha="center", va="bottom", fontsize=8.5, **LITERAL)
    axes.set(xlim=(1 - ACROSS, columns * ACROSS), ylim=(rows * DOWN - 0.7, 1.1 - DOWN), aspect="equal")
    axes.axis("off")
    figure.suptitle(title)
    _write(figure, path)


def _short(name: str, most: int = 12) -> str:
    """Return the start of ``name``, with escapes for characters missing from matplotlib's font."""
    text = "".join(c if ord(c) in _characters() else escape(c) for c in name)
    return text if len(text) <= most else f"{text[: most - 1]}…"


@cache
def _characters() -> frozenset[int]:
    """Return the code points in the fonts of matplotlib's ``font.family``."""
    families = matplotlib.rcParams["font.family"]
    fonts = (get_font(findfont(FontProperties(family=[family]))) for family in families)
    return frozenset().union(*(font.get_charmap() for font in fonts))


def confusion(path: Path, result: Evaluation, classes: Sequence[str]) -> None:
    """Plot the confusion matrix: a row for each class, a column for each guess."""
    counts = result.confusion(len(classes))
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    named = len(classes) <= MOST_NAMES
    side = 2.2 + 0.42 * len(classes) if named else 7.0
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    # A power below 1 makes small shares visible: 1% must differ from 0.
    picture = axes.imshow(shares, cmap="Blues", norm=matplotlib.colors.PowerNorm(0.4, 0, 1))
    figure.colorbar(
        picture,
        label="share of the class",
        shrink=0.8,
        ticks=[0, 0.01, 0.1, 0.5, 1],
        format=PercentFormatter(1, 0),
    )
    axes.set(xlabel="predicted class", ylabel="true class")
    if named:
        names = [_short(name) for name in classes]
        turned = 90 if max(map(len, names)) > 2 else 0
        axes.set_xticks(range(len(names)), names, rotation=turned, **LITERAL)
        axes.set_yticks(range(len(names)), names, **LITERAL)
        for row, column in counts.nonzero().tolist():
            color = "white" if shares[row, column] > 0.3 else "black"
            axes.text(
                column, row, str(int(counts[row, column])), ha="center", va="center", color=color, fontsize=9
            )
    axes.set_title(f"{result.accuracy:.2f}% of {len(result.labels):,} held-out images right")
    _write(figure, path)


def cardinality(path: Path, compared: Sequence[Compared], data: str) -> None:
    """Plot the errors of each network (points for seeds, mean, deviation) next to those of the paper."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4), layout="constrained")
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
    seeds = f"mean and std of {len(compared[0].errors)} seeds" if several else "one seed"
    left.set(title=f"{data}, {seeds}", ylabel="top-1 error (%)")
    left.set_xticks(places, [f"{pair.cardinality} x {pair.width}d" for pair in compared])
    published = complexity.EQUAL_COMPLEXITY
    for i, layers in enumerate((50, 101)):
        errors = [complexity.PAPER_ERRORS[c][i] for c in published]
        right.plot(range(len(errors)), errors, marker="s", color=f"C{i + 1}", label=f"{layers} layers")
    right.set_xticks(range(len(published)), [f"{c} x {d}d" for c, d in published.items()])
    right.set(title="ImageNet, from the paper", ylabel="top-1 error (%)")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("cardinality x width")
        axes.tick_params(axis="x", labelsize=9)
        axes.grid(alpha=0.3)
    _write(figure, path)


def _write(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
