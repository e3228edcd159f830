"""The command ``resnext evaluate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from resnext import checkpoint, evaluation, files, plots, tables
from resnext.cli.options import Parser, add_fields, add_machine, add_run, options_of
from resnext.cli.runtime import backend_of, console, data_of_run, device_of, print_table, say
from resnext.config import DEFAULT_OPTIONS, Options
from resnext.errors import keeping
from resnext.evaluation import TOP, Evaluation, standard_error
from resnext.names import shown
from resnext.progress import progress_bar
from resnext.world import World


def add_arguments(parser: Parser) -> None:
    """Add the options of ``evaluate``."""
    add_run(parser)
    data = parser.add_argument_group("data")
    data.add_argument("--path", type=Path, help="archive or folder of images, if it has moved since training")
    add_fields(data, Options, "workers", "skip_corrupt", defaults={"": DEFAULT_OPTIONS})
    add_machine(parser.add_argument_group("execution"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, help="folder for confusion.png and classes.csv (default: the folder of the run)"
    )


def evaluate(arguments: argparse.Namespace) -> None:
    """Test a trained network on its held-out images: top-1 and top-5 accuracy, and results by class.

    It prints a table of the classes (only the 30 with the lowest accuracy if there are more), and writes the
    complete table to classes.csv and the confusion matrix to confusion.png.

    Examples:
      resnext evaluate
      resnext evaluate runs/photos --path /data/photos --workers 4
    """
    device, run = device_of(arguments.device), arguments.run
    saved = checkpoint.load(run)
    data = data_of_run(saved, arguments.path)
    options = options_of(arguments, data)
    folder = arguments.out or (run if run.is_dir() else run.parent)
    folder.mkdir(parents=True, exist_ok=True)
    with backend_of(arguments.backend, device), progress_bar(console) as progress:
        task = progress.add_task("testing", total=len(data.test), status="")
        result = evaluation.evaluate(
            saved.network(device),
            data.test,
            data.format,
            World(device),
            workers=options.workers,
            skip_corrupt=options.skip_corrupt,
            advance=lambda images: progress.advance(task, images),
        )
    rows = class_rows(result, saved.classes)
    title = f"{shown(run)} (epochs: {saved.epochs:.3g}) on {len(result.labels):,} held-out images"
    print_table(tables.of_classes(title, rows))
    _print_scores(result, len(saved.classes))
    table, picture = folder / "classes.csv", folder / "confusion.png"
    files.write_csv(table, rows)
    with keeping(f"couldn't write {picture}", f"{table} is written"):
        plots.confusion(picture, result, saved.classes)
    say(f"wrote {shown(picture)} and {shown(table)}")


def _print_scores(result: Evaluation, classes: int) -> None:
    doubt = standard_error(result.accuracy, len(result.labels))
    top5 = f"top-5 {result.top5:.2f}%, " if classes > TOP else ""
    say(
        f"top-1 accuracy {result.accuracy:.2f}% (standard error {doubt:.2f}), {top5}"
        f"cross-entropy {result.loss:.4f}"
    )
    if result.unreadable:
        say(f"{len(result.unreadable)} images couldn't be read and aren't counted")


def class_rows(result: Evaluation, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return a row for each class: images, right guesses, accuracy, and the classes of the wrong guesses."""
    rows = []
    for label, counts in enumerate(result.confusion(len(classes))):
        images, right = int(counts.sum()), int(counts[label])
        wrong = sorted(
            ((int(n), i) for i, n in enumerate(counts) if n and i != label), key=lambda w: (-w[0], w[1])
        )
        rows.append(
            {
                "class": classes[label],
                "images": images,
                "right": right,
                "accuracy": round(100 * right / images, 2) if images else "",
                "mistaken for": ", ".join(f"{classes[i]} ({n})" for n, i in wrong),
            }
        )
    return rows
