"""PyTorch's private names are all in one file, and a missing one raises a clear error."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from gconv import torch_internals

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", ["_no_such_name", "nn._no_such_name", "_no_such_module.name"])
def test_a_missing_name_is_an_error_that_says_what_to_install(path: str) -> None:
    with pytest.raises(
        ImportError, match=rf"gconv needs torch\.{path}, which PyTorch .*install PyTorch 2\.11 to 2\.15, with"
    ):
        torch_internals._required(torch, path)


def test_functions_run_without_the_faster_way(monkeypatch: pytest.MonkeyPatch) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def setup_context(ctx: object, inputs: tuple, output: torch.Tensor) -> None: ...

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            return 2 * grad

    x = torch.ones(3, requires_grad=True)
    for _ in range(2):
        y = torch_internals.apply_function(Double, x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert y.tolist() == grad.tolist() == [2.0] * 3
        monkeypatch.setattr(torch_internals, "_unwrap_dead_wrappers", None)


def private_names(path: Path) -> list[str]:
    """Return the private names of PyTorch that a file imports or reads from ``torch`` and its modules."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            first, *parts = name.split(".")
            if first in ("torch", "nn", "F", "forward_ad") and any(part.startswith("_") for part in parts):
                found.append(name)
    return [name for name in found if not name.endswith("__")]


ALLOWED = ("nn.Conv2d._conv_forward", "torch._ops", "torch._ops.OpOverload")  # an overridden method; types


def test_no_other_file_uses_private_names() -> None:
    for path in sorted((ROOT / "gconv").rglob("*.py")):
        if path.name != "torch_internals.py":
            assert not [name for name in private_names(path) if name not in ALLOWED], path
