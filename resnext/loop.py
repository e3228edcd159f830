"""The training loop, from the first step or a checkpoint to the last step."""

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

LOG_STEPS = 10  # how many steps to log together, since reading a loss waits for the GPU


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
    """Train a network and write the results to a folder.

    Writes ``config.json``; during training ``checkpoint.pt`` (and ``previous.pt``, the checkpoint before it),
    ``steps.csv`` and ``summary.csv``; at the end ``curves.png``, ``mistakes.png``, ``confusion.png`` and
    ``samples/``.

    Args:
        settings: settings of the run.
        data: the data set of ``settings.source``.
        folder: folder of the run; created if it doesn't exist.
        world: processes that share the work. Only the first one prints and writes.
        console: console to print to.
        options: options of the run. Defaults to ``DEFAULT_OPTIONS``.
        resumed: checkpoint to continue from, with identical bits. Defaults to None, which starts from
            scratch.
        overwrite: whether to remove an existing ``folder``, once it is clear that the training can start.
            Defaults to False.
        progress: progress bars to add to. Defaults to None, which creates new ones.

    Returns:
        The evaluation of the trained network on the held-out images.

    Raises:
        UserError: the loss is infinite or NaN, an image can't be read, a file can't be written, memory
            runs out, the system kills a worker, or testing or plotting fails. The message explains what to do
            and what is saved.
        Interrupted: if the process gets Ctrl-C or SIGTERM, after it has finished the step and written a
            checkpoint.
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
    """Train the remaining epochs of a run and test the network after each."""
    engine, world, epochs = run.engine, run.world, run.settings.recipe.epochs
    result = None
    while engine.epoch < epochs:
        run.begin_epoch()
        for batches in engine.batches():
            rate = engine.learning_rate
            run.note(rate, engine.step(batches))

            last = engine.step_of_epoch == engine.steps_per_epoch
            save = not last and _is_due(engine.step_number, run.options.checkpoint_steps)
            stop = interruption.asked if world.size == 1 else 0  # several processes agree on it in log
            if stop or save or last or _is_due(engine.step_number, LOG_STEPS):
                stop = run.log(interruption.asked)
            if stop or save:
                run.save()
            if stop:
                raise Interrupted(stop, run.kept)
        run.save()  # before testing, which may fail on an unreadable image
        result = run.test(f"testing after epoch {engine.epoch + 1}")
        run.end_epoch(result)
    result = result or run.test("testing")
    run.end(result)
    if any(world.gather(interruption.asked)):  # this training is done, but a study has more to come
        raise Interrupted(interruption.asked or signal.SIGTERM, run.kept)
    return result


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
