"""The logs of a run: ``steps.csv``, ``summary.csv`` (a row for each epoch) and TensorBoard events."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from resnext.errors import UserError
from resnext.files import write_text

STEPS, SUMMARY = "steps.csv", "summary.csv"
FIELDS = ("step", "epoch", "loss", "learning_rate")


class Logs:
    """The logs of a run.

    Args:
        folder: folder of the run.
        steps: number of steps that the run has made. Rows of later steps, which a killed process left, are
            dropped. Defaults to 0.
        tensorboard: whether to write TensorBoard event files too; see `require_tensorboard`. Defaults to
            False.
    """

    def __init__(self, folder: Path, steps: int = 0, tensorboard: bool = False) -> None:
        self.folder = folder
        self.events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(str(folder), purge_step=steps + 1)
        path = folder / STEPS
        kept = path.read_text("utf-8").splitlines()[1 : steps + 1] if steps and path.exists() else []
        _write(path, [",".join(FIELDS), *kept])

    def steps(self, rows: Sequence[tuple[int, int, float, float]]) -> None:
        """Append rows with the columns ``FIELDS`` to ``steps.csv``."""
        with (self.folder / STEPS).open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        if self.events:
            for step, _, loss, rate in rows:
                self.events.add_scalar("loss/step", loss, step)
                self.events.add_scalar("learning_rate", rate, step)

    def summary(self, rows: Sequence[dict[str, Any]], steps: int) -> None:
        """Rewrite ``summary.csv`` with a row for each epoch, after ``steps`` steps."""
        cells = [{k: v if k == "epoch" else f"{v:.4f}" for k, v in row.items()} for row in rows]
        _write(self.folder / SUMMARY, [",".join(cells[0]), *(",".join(map(str, c.values())) for c in cells)])
        if self.events:
            for name, value in rows[-1].items():
                kind, _, what = name.rpartition("_")
                self.events.add_scalar(f"{what}/{kind}" if kind in ("train", "test") else name, value, steps)
            self.events.flush()

    def close(self) -> None:
        """Close the TensorBoard event file."""
        if self.events:
            self.events.close()


def require_tensorboard(folder: Path) -> None:
    """Check that TensorBoard can write to ``folder``.

    Raises:
        UserError: TensorBoard isn't installed, or the name of ``folder`` isn't UTF-8.
    """
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"--tensorboard needs a folder whose name is UTF-8, got {folder}; choose another --name or --out"
        ) from None
    try:
        import_module("torch.utils.tensorboard")
    except ImportError:
        raise UserError(
            "--tensorboard needs TensorBoard, which isn't installed: pip install tensorboard"
        ) from None


def _write(path: Path, lines: Sequence[str]) -> None:
    write_text(path, "\n".join(lines) + "\n")
