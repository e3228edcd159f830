"""``resnext export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext import checkpoint, exporters
from resnext.checkpoint import Checkpoint
from resnext.cli.options import Parser, add_run
from resnext.cli.runtime import say
from resnext.errors import UserError, brief
from resnext.names import shown

MOST_CLASSES = 10  # whose names are printed


def add_arguments(parser: Parser) -> None:
    """Add the options of ``export``."""
    add_run(parser)
    parser.add_argument(
        "--out",
        "-o",
        action="append",
        type=Path,
        metavar="FILE",
        help="A file that ends in .pt2 (torch.export), .onnx or .safetensors; can be repeated. "
        "[default: network.pt2 and network.onnx in the folder of the run]",
    )


def export(arguments: argparse.Namespace) -> None:
    """Write a trained network for other programs; each file is compared with the network before it is kept.

    The files take any number of normalised images (N, C, H, W). How to normalise them and the names of the
    classes are printed, and stand in the file under "resnext". ONNX needs the extra 'export'. A .safetensors
    file holds only the weights, for load_state_dict or `weights=` of a named network.
    """
    run = arguments.run
    saved = checkpoint.load(run)
    folder = run if run.is_dir() else run.parent
    failed = []
    for path in arguments.out or [folder / "network.pt2", folder / "network.onnx"]:
        try:
            difference = exporters.export(saved, path)
        except Exception as error:
            failed.append(
                brief(error)
                if isinstance(error, UserError)
                else f"{path}: not written ({brief(error)}); {saved.path} is as it was"
            )
            continue
        exact = f"to {difference:.0e} of the largest output" if difference else "to the bit"
        say(f"written: {shown(path)}, which gives what the network gives {exact}")
    if failed:
        raise UserError("; ".join(failed))
    _print_interface(saved)


def _print_interface(saved: Checkpoint) -> None:
    """Say what the files take and return."""
    form = saved.format
    size = " x ".join(map(str, ("N", form.channels, form.size, form.size)))
    say(f"input     {size}, float32: (pixels / 255 - {list(form.mean)}) / {list(form.std)}")
    more = ", ..." if len(saved.classes) > MOST_CLASSES else ""
    names = ", ".join(saved.classes[:MOST_CLASSES]) + more
    say(f"output    logits of {len(saved.classes)} classes: {names}")
