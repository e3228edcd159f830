"""Import torchvision and timm, whose networks the tests convert.

``python tests/support/zoo.py SCRIPT ...`` runs a script that needs them, even if torchvision's operators
don't load.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from types import ModuleType

import torch

_operators: list[torch.library.Library] = []


def load(name: str) -> ModuleType:
    """Import "timm" or "torchvision", or a module of theirs.

    torchvision's compiled operators don't load with a CPU build of torch, but it declares meta kernels for
    them. Define missing operators here, without kernels; no network in the tests calls one.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if _operators or "torchvision::nms does not exist" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.append(library)  # what it defines goes with it
    return importlib.import_module(name)


def main() -> None:
    """Run the script that the command line names, with the arguments that follow."""
    if len(sys.argv) < 2:
        sys.exit("usage: python tests/support/zoo.py SCRIPT ...")
    load("torchvision")
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
