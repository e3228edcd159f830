"""``resnext evaluate``, ``predict`` and ``export``: what a trained network is good for."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from resnext import checkpoint, plots
from resnext import export as exporting
from resnext.checkpoint import Checkpoint
from resnext.cli.options import (
    DEMO,
    Backend,
    BackendOption,
    DeviceOption,
    RunArgument,
    SkipCorruptOption,
    WorkersOption,
    backend_of,
    console,
    data_of_run,
    device_of,
    print_table,
)
from resnext.cli.training import default_workers
from resnext.data.folder import image_files
from resnext.data.images import read_image
from resnext.errors import UserError, brief, keeping
from resnext.evaluation import TOP, Evaluation, standard_error
from resnext.evaluation import evaluate as run_evaluation
from resnext.names import shown, to_json
from resnext.train import progress_bar
from resnext.world import World

MOST_CLASSES = 30  # in a table on the screen
BATCH = 64


def evaluate(
    run: RunArgument = DEMO,
    path: Annotated[
        Path | None, typer.Option(help="Where the images lie, if they have moved since the training.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for confusion.png and classes.csv. By default that of the run."),
    ] = None,
    skip_corrupt: SkipCorruptOption = False,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.auto,
) -> None:
    """Test a trained network on its held-out images: top-1, top-5, class by class.

    Writes `confusion.png`, which classes were taken for which, and `classes.csv`, the table in full. Of many
    classes the screen shows those that the network knows least.
    """
    where = device_of(device)
    saved = checkpoint.load(run)
    data = data_of_run(saved, path)
    folder = out or (run if run.is_dir() else run.parent)
    folder.mkdir(parents=True, exist_ok=True)
    with backend_of(backend, where), progress_bar(console) as progress:
        task = progress.add_task("testing", total=len(data.test), status="")
        result = run_evaluation(
            saved.network(where),
            data.test,
            data.format,
            World(where),
            workers=default_workers(data) if workers is None else workers,
            skip_corrupt=skip_corrupt,
            advance=lambda images: progress.advance(task, images),
        )
    rows = _class_rows(result, saved.classes)
    print_table(
        _class_table(
            f"{shown(run)}, epochs: {saved.epochs:.3g}, on {len(result.labels):,} held-out images", rows
        )
    )
    doubt = standard_error(result.accuracy, len(result.labels))
    top5 = f"top-5 {result.top5:.2f}%, " if len(saved.classes) > TOP else ""
    console.print(
        f"top-1 accuracy {result.accuracy:.2f}% (standard error {doubt:.2f}), {top5}"
        f"cross-entropy {result.loss:.4f}",
        soft_wrap=True,
    )
    if result.unreadable:
        console.print(
            f"{len(result.unreadable)} images could not be read and are not counted", soft_wrap=True
        )
    table, picture = folder / "classes.csv", folder / "confusion.png"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with keeping(f"{picture}: not written", f"{table} is written"):
        plots.confusion(picture, result, saved.classes)
    console.print(f"written: {shown(picture)}, {shown(table)}", soft_wrap=True)


def _class_rows(result: Evaluation, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """For each class: images, how many were right, what the others were taken for, most often first."""
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


def _class_table(title: str, rows: list[dict[str, Any]]) -> Table:
    if len(rows) > MOST_CLASSES:
        title += f"; the {MOST_CLASSES} worst of {len(rows)} classes"
        known = [row for row in rows if row["images"]]
        rows = sorted(known, key=lambda row: row["accuracy"])[:MOST_CLASSES]
    table = Table(title=title)
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading in ("class", "mistaken for") else "right")
    for row in rows:
        share = f"{row['accuracy']:.1f}%" if row["images"] else ""
        table.add_row(*(share if key == "accuracy" else str(value) for key, value in row.items()))
    return table


def predict(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE...", help="Image files, PNG, JPEG, what Pillow reads; or folders of them."
        ),
    ],
    run: Annotated[
        Path, typer.Option("--checkpoint", "-c", help="A checkpoint, or the folder of a run.")
    ] = DEMO,
    top: Annotated[int, typer.Option(min=1, max=100, help="Guesses for each image.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    resize: Annotated[
        bool,
        typer.Option(
            "--resize", help="Scale whole images to what the network takes, black beside what is not square."
        ),
    ] = False,
    invert: Annotated[bool, typer.Option("--invert", help="For dark digits on a light ground.")] = False,
    skip_corrupt: SkipCorruptOption = False,
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.auto,
) -> None:
    """Say what is on each IMAGE, and how sure the network is.

    A network that was trained on a folder of photographs takes any size and looks at the middle; the others
    take the size that they were trained on, as in RUN/samples: digits light on dark. Colours become grey
    where the network knows only grey; what is transparent becomes the ground.
    """
    where = device_of(device)
    saved = checkpoint.load(run)
    paths = _image_paths(images)
    told = []
    with backend_of(backend, where), torch.inference_mode():
        network = saved.network(where)
        for start in range(0, len(paths), BATCH):
            told += _guesses(
                network, saved, paths[start : start + BATCH], top, resize, invert, skip_corrupt, where
            )
    if as_json:
        print(to_json(told))
        return
    width = min(top, len(saved.classes))
    table = Table("image", *(heading for _ in range(width) for heading in ("class", "sure")))
    for entry in told:
        cells = [
            cell for guess in entry["guesses"] for cell in (guess["class"], f"{guess['probability']:.1%}")
        ]
        table.add_row(entry["image"], *(cells or [entry["error"]]))
    print_table(table)


def _image_paths(given: list[Path]) -> list[Path]:
    """The files among ``given``, and those in its folders."""
    paths = []
    for path in given:
        found = image_files(path) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path}: no image in this folder")
        paths += found
    return paths


def _guesses(
    network: torch.nn.Module,
    saved: Checkpoint,
    paths: list[Path],
    top: int,
    resize: bool,
    invert: bool,
    skip_corrupt: bool,
    device: torch.device,
) -> list[dict[str, Any]]:
    """For each path the network's guesses, the surest first; none, and an error, where it cannot be read."""
    pixels: list[Tensor | str] = []
    for path in paths:
        try:
            pixels.append(read_image(path, saved.format, resize=resize, invert=invert))
        except UserError as error:
            if not skip_corrupt:
                raise
            pixels.append(str(error))
    readable = [image for image in pixels if isinstance(image, Tensor)]
    shares = iter(())
    if readable:
        logits = network(saved.format.normalize(torch.stack(readable).to(device)))
        shares = iter(logits.softmax(1).cpu())
    told = []
    for path, image in zip(paths, pixels, strict=True):
        if isinstance(image, str):
            told.append({"image": shown(path), "guesses": [], "error": image})
            continue
        best = next(shares).topk(min(top, len(saved.classes)))
        guesses = [
            {"class": saved.classes[i], "probability": round(p, 6)}
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        told.append({"image": shown(path), "guesses": guesses})
    return told


def export(
    run: RunArgument = DEMO,
    out: Annotated[
        list[Path] | None,
        typer.Option(
            "--out",
            "-o",
            help="A file that ends in .pt2 (torch.export), .onnx or .safetensors; can be repeated. By "
            "default network.pt2 and network.onnx in the folder of the run.",
        ),
    ] = None,
) -> None:
    """Write a trained network for other programs, each file checked against the network before it is there.

    The files take normalised images (N, C, H, W), as many as one likes; what to normalise by and the names of
    the classes are printed, and stand in the file under "resnext". ONNX needs the extra 'export'. A
    .safetensors holds the weights alone, for load_state_dict, or `weights=` of a named network.
    """
    saved = checkpoint.load(run)
    folder = run if run.is_dir() else run.parent
    form = saved.format
    failed = []
    for path in out or [folder / "network.pt2", folder / "network.onnx"]:
        try:
            difference = exporting.export(saved, path)
        except Exception as error:
            failed.append(
                brief(error)
                if isinstance(error, UserError)
                else f"{path}: not written ({brief(error)}); {saved.path} is as it was"
            )
            continue
        exact = f"to {difference:.0e} of the largest output" if difference else "to the bit"
        console.print(
            f"written: {shown(path)}, which gives what the network gives {exact}",
            soft_wrap=True,
        )
    if failed:
        raise UserError("; ".join(failed))
    size = " x ".join(map(str, ("N", form.channels, form.size, form.size)))
    console.print(
        f"input     {size}, float32: (pixels / 255 - {list(form.mean)}) / {list(form.std)}", soft_wrap=True
    )
    console.print(f"output    logits of {len(saved.classes)} classes: {_some(saved.classes)}", soft_wrap=True)


def _some(names: tuple[str, ...], most: int = 10) -> str:
    more = ", ..." if len(names) > most else ""
    return ", ".join(names[:most]) + more
