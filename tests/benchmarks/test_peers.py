"""The peers of a layer: torch.compile, cuDNN and PyTorch's own depthwise kernels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from measurements import RUN

from benchmarks import __main__ as command
from benchmarks import layers, peers
from benchmarks.store import read_table
from gconv.geometry import PASSES
from gconv.measure.problem import Problem
from gconv.measure.suites import SUITES, Layer

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("few_rounds")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_torch_compile_is_a_peer_that_gives_the_same(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, compile = [], torch.compile

    def noting(function: Callable, options: dict, dynamic: bool) -> Callable:
        seen.append(options)
        chosen = {"options": options} if backend == "inductor" else {"backend": backend}
        return compile(function, dynamic=dynamic, **chosen)

    monkeypatch.setattr(torch, "compile", noting)
    options = ["--passes", "forward", "weight_grad", "--contenders", "torch.compile", "--out", str(tmp_path)]
    assert command.main([*RUN, *options]) == 0
    assert all(row["problem"] is None for row in read_table(tmp_path / "layers.jsonl", layers.LayerRow))
    assert seen and all(options["max_autotune"] for options in seen)
    assert not any(options.get("triton.cudagraphs") for options in seen)


def test_torch_compile_may_use_templates_in_all_passes_where_it_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(torch, "compile", lambda function, options, dynamic: options)
    problem = Problem("input_grad", Layer(8, 4, 5).geometry(1), "float16")
    known = [name for name in peers.TEMPLATES if hasattr(config, name)]
    assert "max_autotune_conv_backends" in known
    options = peers.RUNNERS["torch.compile"](problem)
    assert {name: options.get(name) for name in known} == dict.fromkeys(known, "ATEN,TRITON")
    monkeypatch.setattr(peers, "TEMPLATES", ("an_option_of_another_version",))
    assert "an_option_of_another_version" not in peers.RUNNERS["torch.compile"](problem)


@pytest.mark.parametrize("stride", [1, 3])
def test_cudnn_is_called_with_the_sizes_of_a_depthwise_layer(
    stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked on a CPU, with equivalent functions in place of cuDNN's."""

    def forward(x, w, padding, stride, dilation, groups, search, deterministic, tf32):
        assert (search, deterministic, tf32) == (True, False, False)
        return F.conv2d(x, w, None, stride, padding, dilation, groups)

    def transposed(dy, w, padding, beyond, stride, dilation, groups, search, deterministic, tf32):
        assert (search, deterministic, tf32) == (True, False, False)
        return F.conv_transpose2d(dy, w, None, stride, padding, beyond, groups, dilation)

    monkeypatch.setattr(torch, "cudnn_convolution", forward)
    monkeypatch.setattr(torch, "cudnn_convolution_transpose", transposed)
    for pass_ in ("forward", "input_grad"):
        problem = Problem(pass_, Layer(6, 6, 5, kernel=5, stride=stride).geometry(2), "float32")
        operands = problem.draw(CPU)
        result = peers.RUNNERS["cudnn-depthwise"](problem)(operands)
        assert problem.matches(problem.error(result, problem.truth(operands)))


def test_native_depthwise_runs_without_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, seen = Problem("forward", Layer(6, 6, 5).geometry(2), "float32"), []
    monkeypatch.setattr(Problem, "run_pytorch", lambda *_: seen.append(torch._C._get_cudnn_enabled()))
    peers.RUNNERS["native-depthwise"](problem)(problem.draw(CPU))
    assert seen == [False] and torch._C._get_cudnn_enabled()


def test_depthwise_kernels_are_peers_of_depthwise_layers_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, found = torch.device("cuda"), []
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        for layer, device in ((Layer(6, 6, 5), gpu), (Layer(6, 3, 5), gpu), (Layer(6, 6, 5), CPU)):
            for pass_, runner in product(PASSES, peers.DEPTHWISE):
                contender = peers.Contender(runner, "contiguous")
                found.append(peers.applies(contender, Problem(pass_, layer.geometry(2), "float32"), device))
    assert found == [True] * 5 + [False] * 13, "no function runs cuDNN's weight gradient"
    options = ["--passes", "forward", "--out", str(tmp_path), "--contenders", "F.conv2d", "native-depthwise"]
    assert command.main([*RUN[:-3], *options]) == 0
    runners = {row["runner"] for row in read_table(tmp_path / "layers.jsonl", layers.LayerRow)}
    assert runners == {"F.conv2d"}


def test_runners_are_who_they_say() -> None:
    (_, problem), *_ = layers.cases({"tiny": SUITES["tiny"]}, [2], ["float32"], ["forward"])
    operands = problem.draw(CPU)
    ours, forced = (peers.Contender(runner, "channels_last") for runner in ("auto", "triton"))
    with problem.precision():
        assert peers.who_runs(ours, problem, operands) == "aten"
        assert peers.who_runs(forced, problem, operands).startswith("triton: taps, 64 pixels")
    for runner in ("auto", "reference", "F.conv2d"):
        result = peers.RUNNERS[runner](problem)(operands)
        assert problem.matches(problem.error(result, problem.truth(operands)))
