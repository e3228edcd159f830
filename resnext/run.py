"""A run: everything the training loop prints, measures, writes and saves."""

from __future__ import annotations

import math
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import gconv
from resnext import checkpoint, files, plots
from resnext.announcement import announce
from resnext.checkpoint import Checkpoint
from resnext.config import Options, Settings
from resnext.data import Data
from resnext.data.images import write_image
from resnext.engine import Engine
from resnext.errors import UserError, brief, keeping
from resnext.evaluation import Evaluation, evaluate
from resnext.logs import Logs, require_tensorboard
from resnext.names import file_stems, shown, to_json
from resnext.world import World

SAMPLES = 10
HEADER = "epoch   train loss   train acc   test loss   test acc   images/s   seconds"
ROW = (
    "{epoch:5d}   {train_loss:10.4f}   {train_accuracy:8.2f}%   {test_loss:9.4f}   {test_accuracy:7.2f}%   "
    "{images_per_second:8,.0f}   {seconds:7.1f}"
)
STATUS = "loss {train_loss:.3f}  accuracy {train_accuracy:.1f}%  {images_per_second:,.0f} images/s"


class Meter:
    """Sums and time of the current epoch so far, which continue after an interruption."""

    def __init__(self, sums: list[float] | None = None, seconds: float = 0.0) -> None:
        self.loss, self.right, self.images = sums or (0.0, 0.0, 0.0)
        self.before, self.since = seconds, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock inside, so that saving and testing don't count as time of the steps."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.since += time.perf_counter() - start

    def add(self, loss: float, right: float, images: float) -> None:
        """Add the sums of a step."""
        self.loss, self.right, self.images = self.loss + loss, self.right + right, self.images + images

    @property
    def sums(self) -> list[float]:
        """Sum of losses, number of correctly classified images, number of images."""
        return [self.loss, self.right, self.images]

    @property
    def seconds(self) -> float:
        """Time of the steps in seconds; 0 before the first."""
        return self.before + time.perf_counter() - self.since if any(self.sums) else 0.0

    def row(self) -> dict[str, float]:
        """Return the columns of ``summary.csv`` that come from training."""
        seconds = self.seconds
        return {
            "train_loss": self.loss / self.images,
            "train_accuracy": 100 * self.right / self.images,
            "images_per_second": self.images / seconds,
            "seconds": seconds,
        }


@dataclass(frozen=True)
class _Pending:
    """A step whose losses haven't been read yet."""

    step: int
    epoch: int
    rate: float
    counts: Tensor


class Run:
    """A training with its files. Nothing is written before `begin`.

    The arguments are those of `resnext.loop.train`, with the progress bars as ``bars``.

    Raises:
        UserError: the training can't work, or can't continue with this data.
    """

    def __init__(
        self,
        settings: Settings,
        data: Data,
        folder: Path,
        world: World,
        console: Console,
        options: Options,
        bars: Progress,
        resumed: Checkpoint | None,
    ) -> None:
        self.settings, self.data, self.folder, self.world = settings, data, folder, world
        self.console, self.options, self.bars = console, options, bars
        self.engine = Engine(settings, data, world, options)
        self.rows: list[dict[str, Any]] = []
        self.pending: list[_Pending] = []
        self.meter = Meter()
        self.logs: Logs | None = None  # begin opens them, in the first process
        self.kept = "nothing has been saved yet"
        if options.tensorboard:
            require_tensorboard(folder)
        if resumed:
            self._resume(resumed)

    def _resume(self, resumed: Checkpoint) -> None:
        state = resumed.training
        for what, number in self.data.fingerprint.items():
            if state["data"][what] != number:
                raise UserError(
                    f"can't resume {resumed.path} with other data: {what} must be {state['data'][what]:,}, "
                    f"got {number:,}; pass the images that it was trained on"
                )
        self.engine.load_state_dict(state["state"])
        self.rows, self.meter = list(state["rows"]), Meter(list(state["sums"]), state["seconds"])
        self.kept = self._kept()

    def begin(self, overwrite: bool) -> None:
        """Create the folder with ``config.json`` and the logs so far, and print what is about to run."""
        self.world.first_does(lambda: self._open_folder(overwrite))
        if self.world.first:
            announce(self.engine, self.data, self.console)
        steps = self.settings.recipe.epochs * self.engine.steps_per_epoch
        self.bar = self.bars.add_task("", total=steps, completed=self.engine.step_number, status="")
        self.console.print(HEADER, style="bold")
        for row in self.rows:
            self.console.print(ROW.format(**row))
        if self.engine.epoch == self.settings.recipe.epochs:
            self.console.print("all epochs are done; testing and plotting again")

    def _open_folder(self, overwrite: bool) -> None:
        if overwrite and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gconv": gconv.__version__,
        }
        config = {
            **self.settings.to_dict(),
            "device": str(self.world.device),
            "processes": self.world.size,
            "versions": versions,
        }
        files.write_text(self.folder / "config.json", to_json(config) + "\n")
        self.logs = Logs(self.folder, self.engine.step_number, self.options.tensorboard)
        if self.rows:
            self.logs.summary(self.rows, self.engine.step_number)

    def begin_epoch(self) -> None:
        """Start the clock."""
        self.meter.since = time.perf_counter()

    def note(self, rate: float, counts: Tensor) -> None:
        """Remember a step. `log` reads its losses later, since that makes the host wait for the GPU."""
        engine = self.engine
        self.pending.append(_Pending(engine.step_number, engine.epoch + 1, rate, counts))
        self.bars.update(self.bar, completed=engine.step_number)

    def log(self, asked: int) -> int:
        """Log the losses of the last steps, and agree with the other processes on whether to stop.

        Args:
            asked: number of the signal that this process received, or 0.

        Returns:
            The number of the signal to stop for, or 0. Either all processes stop or none.

        Raises:
            UserError: a loss is infinite or NaN.
        """
        counts = [step.counts for step in self.pending]
        signals = torch.zeros_like(counts[0])
        signals[0] = asked
        *values, (asked_of_any, _, _) = self.world.sum(torch.stack([*counts, signals])).tolist()
        rows = []
        for step, (loss, right, images) in zip(self.pending, values, strict=False):
            if not math.isfinite(loss):
                raise self.world.agreed(_diverged(f"the loss of step {step.step} is {loss}"))
            rows.append((step.step, step.epoch, loss / images, step.rate))
            self.meter.add(loss, right, images)
        self.pending.clear()
        if self.logs:
            self.logs.steps(rows)
        place = f"epoch {self.engine.epoch + 1}/{self.settings.recipe.epochs}"
        self.bars.update(self.bar, description=place, status=STATUS.format(**self.meter.row()))
        return (asked or signal.SIGTERM) if asked_of_any else 0

    def test(self, what: str) -> Evaluation:
        """Evaluate the network on the held-out images, with a progress bar labeled ``what``."""
        bar = self.bars.add_task(what, total=len(self.data.test), status="")
        with keeping("testing failed", self.kept), self.meter.paused():
            result = evaluate(
                self.engine.tested,
                self.data.test,
                self.data.format,
                self.world,
                workers=self.options.workers,
                skip_corrupt=self.options.skip_corrupt,
                advance=lambda images: self.bars.advance(bar, images * self.world.size),
            )
        self.bars.remove_task(bar)
        return result

    def end_epoch(self, result: Evaluation) -> None:
        """Print, log and save the epoch, and advance to the next one."""
        engine = self.engine
        engine.epoch, engine.step_of_epoch = engine.epoch + 1, 0
        self.rows.append({"epoch": engine.epoch, **self.meter.row(), **result.row()})
        self.meter = Meter()
        self.console.print(ROW.format(**self.rows[-1]))
        engine.unreadable.update(result.unreadable)
        self.save()
        self.world.first_does(self._write_summary)

    def _write_summary(self) -> None:
        if self.logs:
            self.logs.summary(self.rows, self.engine.step_number)
        if unreadable := self.engine.unreadable:
            path = self.folder / "unreadable.txt"
            files.write_text(path, "\n".join(sorted(unreadable)) + "\n")
            self.console.print(
                f"{len(unreadable)} images couldn't be read: training uses others in their place, and tests "
                f"skip them; see {shown(path)}",
                soft_wrap=True,
            )

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            UserError: a number of the network is infinite or NaN. The last good checkpoint is kept.
        """
        engine = self.engine
        if not engine.is_finite:
            raise self.world.agreed(_diverged(f"step {engine.step_number} made weights infinite or NaN"))
        seconds = self.meter.seconds
        with self.meter.paused():
            engine.unreadable = set().union(*self.world.gather(engine.unreadable))
            saved = Checkpoint(
                self.folder / checkpoint.FILE_NAME,
                self.settings,
                self.data.classes,
                self.data.format,
                engine.tested.state_dict(),
                engine.epochs,
                {
                    "state": engine.state_dict(),
                    "data": self.data.fingerprint,
                    "rows": self.rows,
                    "sums": self.meter.sums,
                    "seconds": seconds,
                },
            )
            self.world.first_does(lambda: checkpoint.save(saved))
        self.kept = self._kept()

    def _kept(self) -> str:
        """Describe what is saved and how to continue."""
        path = self.folder / checkpoint.FILE_NAME
        return f"{shown(path)} is saved ({self.engine.epochs:.3g} epochs); pass --resume to continue from it"

    def end(self, result: Evaluation) -> None:
        """Write the plots of the run, and some held-out images to try ``predict`` on."""
        self.bars.remove_task(self.bar)
        self.world.first_does(lambda: self._draw(result))

    def _draw(self, result: Evaluation) -> None:
        """Write each plot, even if another one fails."""
        data, title = self.data, f"ResNeXt trained on {len(self.data.train):,} images"
        failed = []
        for name, draw in {
            "curves.png": lambda path: plots.training_curves(path, self.rows, title),
            "mistakes.png": lambda path: plots.mistakes(path, result, data),
            "confusion.png": lambda path: plots.confusion(path, result, data.classes),
            "samples": lambda path: _write_samples(path, result, data),
        }.items():
            try:
                draw(self.folder / name)
            except Exception as error:
                failed.append(f"{name} ({brief(error)})")
        if failed:
            raise UserError(f"couldn't write {', '.join(failed)}; {self.kept}")

    def close(self) -> None:
        """Close the logs."""
        if self.logs:
            self.logs.close()


def _write_samples(folder: Path, result: Evaluation, data: Data) -> None:
    """Write a held-out image of each of the first ``SAMPLES`` classes."""
    folder.mkdir(exist_ok=True)
    labels = result.labels.tolist()
    for label, stem in enumerate(file_stems(data.classes[:SAMPLES])):
        if label in labels:
            image = data.test.read(int(result.indices[labels.index(label)]))
            write_image(folder / f"{stem}.png", image)


def _diverged(what: str) -> UserError:
    return UserError(
        f"training diverged: {what}; start again with a lower --learning-rate and another --name"
    )
