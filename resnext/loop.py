"""The loop of a training: from the first step, or a checkpoint, to the last."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from resnext.checkpoint import Checkpoint
from resnext.config import DEFAULT_OPTIONS, Options, Settings
from resnext.data import Data
from resnext.errors import UserError, explained
from resnext.evaluation import Evaluation
from resnext.interruption import Interrupted, Interruption
from resnext.progress import progress_bar
from resnext.run import Run
from resnext.world import World

LOG_STEPS = 10  # steps whose losses are read at once: reading one waits for the GPU


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
    """Train a network and keep everything of the run in a folder.

    Writes ``config.json``; during the training ``checkpoint.pt`` (and ``previous.pt``, the one before),
    ``steps.csv`` and ``summary.csv``; at the end ``curves.png``, ``mistakes.png``, ``confusion.png`` and
    ``samples/``.

    Args:
        settings: of the run.
        data: the images that ``settings.source`` names.
        folder: of the run; made if it isn't there.
        world: the processes that share the work. The first one prints and writes.
        console: where to print.
        options: how the run is carried out.
        resumed: the checkpoint to continue from, to the bit. By default the training starts from scratch.
        overwrite: whether to remove ``folder``, once it is known that this training can start.
        progress: shows the progress. Defaults to a bar of its own.

    Returns:
        The evaluation of the trained network on the held-out images.

    Raises:
        UserError: the loss is infinite or NaN; an image cannot be read; a file cannot be written; memory runs
            out, or the system ends a worker; testing or drawing fails. The message says what to do, and
            what has been saved if that helps.
        Interrupted: by Ctrl-C or SIGTERM; the step was ended and a checkpoint written.
    """
    bar = nullcontext(progress) if progress else progress_bar(console)
    with Interruption() as interruption, bar as bars:
        run = world.each_does(lambda: Run(settings, data, folder, world, console, options, bars, resumed))
        try:
            run.begin(overwrite)
            return _train(run, interruption)
        except Exception as error:
            what = explained(error)
            if what is None:
                raise
            raise UserError(f"{what}; {run.kept}") from error
        finally:
            run.close()


def _train(run: Run, interruption: Interruption) -> Evaluation:
    """Train what is left of a run, and test the network after each epoch."""
    engine, world, epochs = run.engine, run.world, run.settings.recipe.epochs
    result = None
    while engine.epoch < epochs:
        run.begin_epoch()
        for batches in engine.batches():
            rate = engine.learning_rate
            run.note(rate, engine.step(batches))

            last = engine.step_of_epoch == engine.steps_per_epoch
            save = not last and _is_due(engine.step_number, run.options.checkpoint_steps)
            stop = interruption.asked if world.size == 1 else 0  # many processes stop together, in log
            if stop or save or last or _is_due(engine.step_number, LOG_STEPS):
                stop = run.log(interruption.asked)
            if stop or save:
                run.save()
            if stop:
                raise Interrupted(stop, run.kept)
        run.save()  # before testing, which may meet an image that cannot be read
        result = run.test(f"testing after epoch {engine.epoch + 1}")
        run.end_epoch(result)
    result = result or run.test("testing")
    run.end(result)
    if any(world.gather(interruption.asked)):  # too late for this training, but not for a study
        raise Interrupted(interruption.asked or signal.SIGTERM, run.kept)
    return result


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
