"""Training from the first step, or a checkpoint, to the last: the loop, and what it prints and writes."""

from __future__ import annotations

import math
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import gconv
from resnext import checkpoint, plots
from resnext.announcement import announce
from resnext.checkpoint import Checkpoint
from resnext.config import DEFAULT_OPTIONS, Options, Settings
from resnext.data import Data
from resnext.data.images import write_image
from resnext.errors import UserError, brief, explained, keeping
from resnext.evaluation import Evaluation, evaluate
from resnext.interruption import Interrupted, Interruption
from resnext.logs import Logs, require_tensorboard
from resnext.names import file_stems, shown, to_json
from resnext.training import Training, learning_rate
from resnext.world import World

LOG_STEPS = 10  # steps whose losses are read at once: reading one waits for the GPU
SAMPLES = 10


def train(
    settings: Settings,
    data: Data,
    folder: Path,
    world: World,
    console: Console,
    *,
    options: Options = DEFAULT_OPTIONS,
    resumed: Checkpoint | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Trains a network and leaves in ``folder`` all that is worth keeping.

    Writes ``config.json``; as it goes, ``checkpoint.pt`` (and ``previous.pt``, the one before), ``steps.csv``
    and ``summary.csv``; at the end ``curves.png``, ``mistakes.png``, ``confusion.png`` and ``samples/``.

    Args:
        settings: of the run.
        data: what ``settings.source`` names.
        folder: of the run; made where it is missing.
        world: the processes that share the work. The first one prints and writes.
        console: where to.
        options: how the run is carried out.
        resumed: where to go on, to the bit; else from the start.
        overwrite: remove ``folder``, once it is known that this training can start.
        progress: where to show it; by default a bar of its own.

    Returns:
        The evaluation of the trained network on the held-out images.

    Raises:
        UserError: the loss is no longer a number; an image cannot be read; a file cannot be written; memory
            runs out, or the system ends a worker; testing or drawing fails. It says what is kept.
        Interrupted: by Ctrl-C or SIGTERM; the step was ended, and a checkpoint written.
    """
    with Interruption() as interruption, _progress(console, progress) as bars:
        run = world.each_does(
            lambda: _Run(settings, data, folder, world, console, options, interruption, bars, resumed)
        )
        try:
            return run.to_the_end(overwrite)
        except Exception as error:
            what = explained(error)
            if what is None:
                raise
            raise UserError(f"{what}; {run.kept}") from error
        finally:
            run.close()


class _Run:
    """A training with its files."""

    def __init__(
        self,
        settings: Settings,
        data: Data,
        folder: Path,
        world: World,
        console: Console,
        options: Options,
        interruption: Interruption,
        progress: Progress,
        resumed: Checkpoint | None,
    ) -> None:
        self.settings, self.data, self.folder, self.world = settings, data, folder, world
        self.console, self.options = console, options
        self.interruption, self.progress = interruption, progress
        self.training = Training(settings, data, world, options)
        self.rows: list[dict[str, float]] = []
        self.pending: list[tuple[int, int, float, torch.Tensor]] = []
        self.sums, self.seconds, self.since = [0.0, 0.0, 0.0], 0.0, time.perf_counter()
        self.kept = "nothing is kept yet"
        self.logs: Logs | None = None
        if options.tensorboard:
            require_tensorboard(folder)
        if resumed:
            self._resume(resumed)

    def _resume(self, resumed: Checkpoint) -> None:
        """Goes on from there."""
        state = resumed.training
        for what, number in self.data.fingerprint.items():
            if state["data"][what] != number:
                raise UserError(
                    f"{resumed.path}: its {what} were {state['data'][what]:,}, here {number:,}: "
                    "a run can go on with its own data alone"
                )
        self.training.load_state_dict(state["state"])
        self.rows, self.sums, self.seconds = list(state["rows"]), list(state["sums"]), state["seconds"]
        self.kept = self._in_words()

    def to_the_end(self, overwrite: bool) -> Evaluation:
        """Trains what is left, and tests."""
        training, recipe = self.training, self.settings.recipe
        self.world.first_does(lambda: self._begin(overwrite))
        if self.world.first:
            announce(training, self.data, self.console)
        steps = recipe.epochs * training.steps_per_epoch
        self.task = self.progress.add_task("", total=steps, completed=training.step_number, status="")
        self.console.print(_HEADER, style="bold")
        for row in self.rows:
            self.console.print(_ROW.format(**row))
        if training.epoch == recipe.epochs:
            self.console.print("nothing is left to train; tested and drawn again")
        result = None
        while training.epoch < recipe.epochs:
            self._epoch()
            self._save()  # testing may meet an image that cannot be read
            result = self._test(f"testing after epoch {training.epoch + 1}")
            training.epoch, training.step_of_epoch = training.epoch + 1, 0
            self._end_of_epoch(result)
        self.progress.remove_task(self.task)
        result = result or self._test("testing")
        self.world.first_does(lambda: self._draw(result))
        if any(self.world.gather(self.interruption.asked)):  # too late for this training, not for a study
            raise Interrupted(self.interruption.asked or signal.SIGTERM, self.kept)
        return result

    def _begin(self, overwrite: bool) -> None:
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
        (self.folder / "config.json").write_text(to_json(config) + "\n", "utf-8")
        self.logs = Logs(self.folder, self.training.step_number, self.options.tensorboard)
        if self.rows:
            self.logs.summary(self.rows, self.training.step_number)

    def _epoch(self) -> None:
        """What is left of the epoch."""
        training, every = self.training, self.options.checkpoint_steps
        self.since = time.perf_counter()
        for batches in training.loader.epoch(training.epoch, training.step_of_epoch):
            rate = learning_rate(training.recipe, training.step_number, training.steps_per_epoch)
            counts = training.step(batches)
            self.pending.append((training.step_number, training.epoch + 1, rate, counts))
            self.progress.update(self.task, completed=training.step_number)
            asked = self.interruption.asked if self.world.size == 1 else 0
            last = training.step_of_epoch == training.steps_per_epoch
            due = every and training.step_number % every == 0 and not last
            if training.step_number % LOG_STEPS == 0 or last or due or asked:
                asked = self._log()
            if due or asked:
                self._save()
            if asked:
                raise Interrupted(asked, self.kept)

    def _log(self) -> int:
        """Reads the losses of the last steps; the signal that asked any process to stop, 0 if none did."""
        counts = [counts for *_, counts in self.pending] or [torch.zeros(3, device=self.world.device)]
        signals = torch.zeros_like(counts[0])
        signals[0] = self.interruption.asked
        *values, (asked, _, _) = self.world.sum(torch.stack([*counts, signals])).tolist()
        rows = []
        for (step, epoch, rate, _), (loss, right, seen) in zip(self.pending, values, strict=False):
            if not math.isfinite(loss):
                raise self.world.agreed(_diverged(f"the loss of step {step} is {loss}"))
            rows.append((step, epoch, loss / seen, rate))
            self.sums = [a + b for a, b in zip(self.sums, (loss, right, seen), strict=True)]
        self.pending.clear()
        if self.logs:
            self.logs.steps(rows)
        self.progress.update(self.task, description=self._place(), status=_STATUS.format(**self._meter()))
        return (self.interruption.asked or signal.SIGTERM) if asked else 0

    def _meter(self) -> dict[str, float]:
        """The epoch so far, as a part of ``summary.csv``."""
        seconds = self.seconds + time.perf_counter() - self.since
        loss, right, seen = self.sums
        return {
            "train_loss": loss / seen,
            "train_accuracy": 100 * right / seen,
            "images_per_second": seen / seconds,
            "seconds": seconds,
        }

    def _place(self) -> str:
        return f"epoch {self.training.epoch + 1}/{self.settings.recipe.epochs}"

    def _test(self, what: str) -> Evaluation:
        task = self.progress.add_task(what, total=len(self.data.test), status="")
        with keeping("testing failed", self.kept):
            result = evaluate(
                self.training.tested,
                self.data.test,
                self.data.format,
                self.world,
                workers=self.options.workers,
                skip_corrupt=self.options.skip_corrupt,
                advance=lambda images: self.progress.advance(task, images * self.world.size),
            )
        self.progress.remove_task(task)
        return result

    def _end_of_epoch(self, result: Evaluation) -> None:
        training = self.training
        self.rows.append({"epoch": training.epoch, **self._meter(), **result.row()})
        self.sums, self.seconds, self.since = [0.0, 0.0, 0.0], 0.0, time.perf_counter()
        self.console.print(_ROW.format(**self.rows[-1]))
        training.unreadable.update(result.unreadable)
        self._save()
        self.world.first_does(self._write)

    def _write(self) -> None:
        self.logs.summary(self.rows, self.training.step_number)
        if unreadable := self.training.unreadable:
            path = self.folder / "unreadable.txt"
            path.write_text("\n".join(sorted(unreadable)) + "\n", "utf-8")
            self.console.print(
                f"{len(unreadable)} images could not be read: others take their place in training, tests do "
                f"without; see {shown(path)}",
                soft_wrap=True,
            )

    def _save(self) -> None:
        """Writes a checkpoint; after that, this is where a resumed run goes on."""
        training = self.training
        if not training.is_finite:
            raise self.world.agreed(_diverged(f"step {training.step_number} left weights of nan"))
        training.unreadable = set().union(*self.world.gather(training.unreadable))
        seconds = self.seconds + time.perf_counter() - self.since if any(self.sums) else 0.0
        state = {
            "state": training.state_dict(),
            "data": self.data.fingerprint,
            "rows": self.rows,
            "sums": self.sums,
            "seconds": seconds,
        }

        def write() -> None:
            checkpoint.save(
                self.folder / checkpoint.FILE_NAME,
                self.settings,
                self.data.classes,
                self.data.format,
                training.tested.state_dict(),
                training.epochs,
                state,
            )

        self.world.first_does(write)
        self.kept = self._in_words()

    def _in_words(self) -> str:
        path = self.folder / checkpoint.FILE_NAME
        return f"{shown(path)} is whole ({self.training.epochs:.3g} epochs), and --resume goes on from it"

    def _draw(self, result: Evaluation) -> None:
        """The pictures of the run, and held-out images to try ``predict`` on; each, whatever fails."""
        data, title = self.data, f"ResNeXt on {len(self.data.train):,} images"
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
            raise UserError(f"not written: {', '.join(failed)}; {self.kept}")

    def close(self) -> None:
        """Ends the logs."""
        if self.logs:
            self.logs.close()


def _write_samples(folder: Path, result: Evaluation, data: Data) -> None:
    """A held-out image of each of the first classes."""
    folder.mkdir(exist_ok=True)
    labels = result.labels.tolist()
    for label, stem in enumerate(file_stems(data.classes[:SAMPLES])):
        if label in labels:
            image = data.test.read(int(result.indices[labels.index(label)]))
            write_image(folder / f"{stem}.png", image)


_HEADER = "epoch   train loss   train acc   test loss   test acc   images/s   seconds"
_ROW = (
    "{epoch:5d}   {train_loss:10.4f}   {train_accuracy:8.2f}%   {test_loss:9.4f}   {test_accuracy:7.2f}%   "
    "{images_per_second:8,.0f}   {seconds:7.1f}"
)
_STATUS = "loss {train_loss:.3f}  accuracy {train_accuracy:.1f}%  {images_per_second:,.0f} images/s"


def _diverged(what: str) -> UserError:
    return UserError(
        f"training diverged, {what}: start anew, with a lower --learning-rate and another --name"
    )


@contextmanager
def _progress(console: Console, given: Progress | None) -> Iterator[Progress]:
    if given is not None:
        yield given
        return
    with progress_bar(console) as own:
        yield own


def progress_bar(console: Console, **options: Any) -> Progress:
    """Bars with what is done, how it goes, and the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        **options,
    )
