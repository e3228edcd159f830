"""Import torchvision and timm, whose networks the tests convert.

``python tests/support/zoo.py SCRIPT ...`` runs a script that needs them, even if torchvision's operators
can't be loaded.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from types import ModuleType

import torch

_operators: list[torch.library.Library] = []


def load(name: str) -> ModuleType:
    """Import "timm", "torchvision", or one of their modules.

    torchvision's compiled operators can't be loaded with a CPU build of torch, but torchvision declares meta
    kernels for them. So define the missing operators here, without kernels; no network in the tests calls
    them.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if _operators or "torchvision::nms does not exist" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.append(library)  # its definitions are deleted with it
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
