"""Training on a GPU, ``pytest -m gpu``: the same losses as on the CPU in each precision, and the commands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import SMALL, Run
from engines import NETWORK, SGD, losses
from marks import needs_gpu

from resnext import checkpoint
from resnext.config import Options, Settings, Source
from resnext.data import Data
from resnext.engine import Engine
from resnext.world import World

pytestmark = [pytest.mark.gpu, needs_gpu, pytest.mark.usefixtures("however_small", "no_tables")]
DEVICE = "cuda"


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize(("precision", "bound"), [("float32", 0.01), ("bfloat16", 0.05), ("float16", 0.02)])
def test_a_gpu_trains_as_the_cpu_does(digits: Data, precision: str, bound: float, fused: bool) -> None:
    settings = Settings(Source("digits"), replace(NETWORK, fused=fused), replace(SGD, ema=0.9))
    expected = losses(Engine(settings, digits, World(torch.device("cpu")), Options()), 4)
    settings = replace(settings, recipe=replace(settings.recipe, precision=precision))
    made = Engine(settings, digits, World(torch.device(DEVICE)), Options())
    found = losses(made, 2)
    again = Engine(settings, digits, World(torch.device(DEVICE)), Options())
    again.load_state_dict(made.state_dict())
    found += losses(again, 2)
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) < bound, (expected, found)


def test_the_commands_run_on_a_gpu(run: Run) -> None:
    code, out, err = run("train", *SMALL, "--device", DEVICE, "--precision", "bfloat16", "--mixup", "0.2")
    assert (code, err) == (0, "") and f"device    {DEVICE}" in out
    assert checkpoint.load(Path("runs/demo")).epochs == 2
    for command in (("evaluate",), ("predict", "runs/demo/samples"), ("export",)):
        device = () if command == ("export",) else ("--device", DEVICE)
        assert run(*command, *device)[0] == 0, command
