"""The command ``resnext export``."""

from __future__ import annotations

import argparse
from pathlib import Path

from resnext import checkpoint, exporters
from resnext.checkpoint import Checkpoint
from resnext.cli.options import Parser, add_run
from resnext.cli.runtime import say
from resnext.errors import UserError, brief
from resnext.names import shown

MOST_CLASSES = 10  # class names to print


def add_arguments(parser: Parser) -> None:
    """Add the options of ``export``."""
    add_run(parser)
    parser.add_argument(
        "--out",
        "-o",
        action="append",
        type=Path,
        metavar="FILE",
        help="file to write, which ends in .pt2 (torch.export), .onnx or .safetensors; can be repeated "
        "(default: network.pt2 and network.onnx in the folder of the run)",
    )


def export(arguments: argparse.Namespace) -> None:
    """Export a trained network to torch.export, ONNX or safetensors files.

    Each file is loaded and compared with the network before it is kept. The exported network accepts batches
    of any size of normalized images (N, C, H, W). The command prints how to normalize them and the names of
    the classes, which are also in the file under "resnext". ONNX needs gconv's extra 'export'. A .safetensors
    file contains only the weights, for load_state_dict or for `weights=` of a named network.

    Examples:
      resnext export runs/demo -o digits.onnx -o digits.pt2
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
                else f"couldn't write {path} ({brief(error)}); {saved.path} is unchanged"
            )
            continue
        exact = f"to within {difference:.0e} of the largest" if difference else "bit for bit"
        say(f"wrote {shown(path)}: its outputs match the network's {exact}")
    if failed:
        raise UserError("; ".join(failed))
    _print_interface(saved)


def _print_interface(saved: Checkpoint) -> None:
    """Print the inputs and outputs of the exported network."""
    form = saved.format
    size = " x ".join(map(str, ("N", form.channels, form.size, form.size)))
    say(f"input     {size}, float32: (pixels / 255 - {list(form.mean)}) / {list(form.std)}")
    more = ", ..." if len(saved.classes) > MOST_CLASSES else ""
    names = ", ".join(saved.classes[:MOST_CLASSES]) + more
    say(f"output    logits of {len(saved.classes)} classes: {names}")
