"""Training and evaluation on the digits: the whole loop, top to bottom."""

from __future__ import annotations

import csv
import json
import math
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import gconv
from resnext import checkpoint, plots
from resnext.data import CLASSES, IMAGE_SIZE, Digits, augment, load_mnist5k, normalize, write_image
from resnext.errors import UserError
from resnext.model import ResNeXt


@dataclass(frozen=True)
class Network:
    """The arguments of :class:`resnext.ResNeXt` for the digits."""

    repeats: tuple[int, ...] = (1, 1, 1, 1)
    cardinality: int = 8
    base_width: int = 4
    stem_width: int = 16
    num_classes: int = len(CLASSES)
    in_channels: int = 1
    stem: str = "small"
    fused: bool = False


@dataclass(frozen=True)
class Recipe:
    """How to train: AdamW, its rate rising for a fifth of the steps and falling for the rest (one cycle)."""

    epochs: int = 12
    batch_size: int = 50
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """How a network did on labelled images.

    Attributes:
        loss: mean cross-entropy.
        probabilities: (N, classes).
        correct: (N,), bool.
    """

    loss: float
    probabilities: Tensor
    correct: Tensor

    @property
    def accuracy(self) -> float:
        """Percent of the images that the network got right."""
        return 100 * self.correct.double().mean().item()

    def row(self) -> dict[str, float]:
        """As a part of ``summary.csv``."""
        return {"test_loss": self.loss, "test_accuracy": self.accuracy}


class Meter:
    """Loss, accuracy and speed over the batches so far."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.loss_sum = 0.0
        self.correct = self.seen = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch: its mean loss, its logits (N, classes), its labels (N,)."""
        if not math.isfinite(loss.item()):
            raise UserError(f"training diverged, the loss is {loss.item()}; try a lower --learning-rate")
        self.seen += len(labels)
        self.loss_sum += loss.item() * len(labels)
        self.correct += int((logits.argmax(1) == labels).sum())

    def row(self) -> dict[str, float]:
        """As a part of ``summary.csv``."""
        seconds = time.perf_counter() - self.start
        return {
            "train_loss": self.loss_sum / self.seen,
            "train_accuracy": 100 * self.correct / self.seen,
            "images_per_second": self.seen / seconds,
            "seconds": seconds,
        }

    def __str__(self) -> str:
        return (
            "loss {train_loss:.3f}  accuracy {train_accuracy:.1f}%  {images_per_second:,.0f} images/s".format(
                **self.row()
            )
        )


def train(
    network: Network, recipe: Recipe, folder: Path, console: Console, device: torch.device
) -> Evaluation:
    """Trains a network on the 4,000 digits and leaves in ``folder`` all that is worth keeping.

    Writes ``config.json``, after each epoch ``checkpoint.pt`` and ``summary.csv``, at the end ``curves.png``,
    ``mistakes.png`` and ``samples/``. Ctrl-C saves the checkpoint before it goes on to the caller.

    Returns:
        The evaluation of the trained network on the 1,000 held-out digits.

    Raises:
        UserError: the loss is no longer a number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "gconv": gconv.__version__}
    settings = {
        "network": asdict(network),
        "recipe": asdict(recipe),
        "device": str(device),
        "versions": versions,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    train_set, test_set = load_mnist5k()
    torch.manual_seed(recipe.seed)
    model = ResNeXt(**asdict(network)).to(device, memory_format=torch.channels_last)
    _announce(model, train_set, test_set, console, device)

    steps = recipe.epochs * (len(train_set) // recipe.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    # With 5 steps OneCycleLR would divide by zero.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=max(steps, 6), pct_start=0.2
    )
    rows, done = [], 0
    try:
        console.print(_HEADER, style="bold")
        with _progress(console) as progress:
            task = progress.add_task("", total=steps, status="")
            for epoch in range(1, recipe.epochs + 1):
                batches = _batches(train_set, recipe, epoch, device)
                for meter in _epoch(model, optimizer, schedule, batches):
                    done += 1
                    name = f"epoch {epoch}/{recipe.epochs}"
                    progress.update(task, completed=done, description=name, status=str(meter))
                result = evaluate(model, test_set, device)
                rows.append({"epoch": epoch, **meter.row(), **result.row()})
                console.print(_ROW.format(**rows[-1]))
                _write_summary(folder / "summary.csv", rows)
                checkpoint.save(folder / checkpoint.FILE_NAME, model, settings["network"], epoch)
    except KeyboardInterrupt:
        epochs = done / steps * recipe.epochs
        checkpoint.save(folder / checkpoint.FILE_NAME, model, settings["network"], epochs)
        raise
    _draw(folder, rows, test_set, result)
    return result


def evaluate(model: ResNeXt, digits: Digits, device: torch.device, batch_size: int = 250) -> Evaluation:
    """Runs ``model`` on ``digits``; leaves it in evaluation mode."""
    model.eval()
    with torch.inference_mode():
        parts = [model(normalize(images.to(device))).cpu() for images in digits.images.split(batch_size)]
    logits = torch.cat(parts)
    loss = F.cross_entropy(logits, digits.labels).item()
    return Evaluation(loss, logits.softmax(1), logits.argmax(1) == digits.labels)


def _batches(
    digits: Digits, recipe: Recipe, epoch: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The epoch's batches, shuffled and augmented; an incomplete last one is left out."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
    order = torch.randperm(len(digits), generator=generator)
    for chosen in order.split(recipe.batch_size):
        if len(chosen) == recipe.batch_size:
            images = normalize(digits.images[chosen].to(device))
            yield augment(images, generator), digits.labels[chosen].to(device)


def _epoch(
    model: ResNeXt,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> Iterator[Meter]:
    """One pass over ``batches``; after each update, how the epoch goes so far."""
    meter = Meter()
    model.train()
    for images, labels in batches:
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        meter.add(loss, logits, labels)
        yield meter


_HEADER = "epoch   train loss   train acc   test loss   test acc   images/s   seconds"
_ROW = (
    "{epoch:5d}   {train_loss:10.4f}   {train_accuracy:8.2f}%   {test_loss:9.4f}   {test_accuracy:7.2f}%   "
    "{images_per_second:8,.0f}   {seconds:7.1f}"
)


def _announce(
    model: ResNeXt, train_set: Digits, test_set: Digits, console: Console, device: torch.device
) -> None:
    conv = model.layer1[0].conv2
    choice = gconv.explain(conv, torch.empty(1, conv.in_channels, IMAGE_SIZE, IMAGE_SIZE, device=device))
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"device    {device}{threads}")
    console.print(f"backend   {choice.backend}: {choice.reason}")
    console.print(f"data      {len(train_set):,} digits to train on, {len(test_set):,} held out")
    name = f"ResNeXt {model.repeats}, {model.cardinality} x {model.base_width}d"
    console.print(f"network   {name}, {parameters:,} parameters\n")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        transient=True,
    )


def _write_summary(path: Path, rows: list[dict[str, float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: v if k == "epoch" else f"{v:.4f}" for k, v in row.items()} for row in rows)


def _draw(folder: Path, rows: list[dict[str, float]], test_set: Digits, result: Evaluation) -> None:
    """The pictures of the run, and one held-out image of each class to try ``predict`` on."""
    plots.training_curves(folder / "curves.png", rows, "ResNeXt on 4,000 digits")
    wrong = ~result.correct
    title = f"{int(wrong.sum())} of {len(test_set):,} held-out digits were mistaken"
    plots.mistakes(
        folder / "mistakes.png",
        test_set.images[wrong],
        test_set.labels[wrong],
        result.probabilities[wrong],
        title,
    )
    samples = folder / "samples"
    samples.mkdir(exist_ok=True)
    for label, name in enumerate(CLASSES):
        first = int((test_set.labels == label).nonzero()[0])
        write_image(samples / f"digit-{name}.png", test_set.images[first])
