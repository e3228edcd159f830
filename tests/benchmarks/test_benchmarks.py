"""``python -m benchmarks``: no speed for a wrong answer, runs that go on, reports that tell what rows say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import gconv
from benchmarks import __main__ as command
from benchmarks import layers, networks, peers, summary
from benchmarks.store import read_table
from gconv.geometry import PASSES
from gconv.measure.problem import Problem
from gconv.measure.suites import Layer
from gconv.networks import rewrite

CPU = torch.device("cpu")
RUN = ["run", "--suite", "tiny", "--batch", "2", "--dtypes", "float32", "--contenders", "auto", "F.conv2d"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few rounds; the speed of a copy measured once is enough."""
    monkeypatch.setattr("gconv.measure.timing.LEAST_ROUNDS", 2)
    monkeypatch.setattr("gconv.measure.timing.SECONDS", 0)
    monkeypatch.setattr(networks, "wall_time", lambda step, device: layers.Times.of([step() is None or 0.5]))
    yield
    torch.compiler.reset()


def test_layers_are_measured_by_everyone_and_a_second_run_measures_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command.main([*RUN, "--out", str(tmp_path)]) == 0
    rows = read_table(tmp_path / "layers.jsonl", layers.Row)
    assert len(rows) == 2 * 3 * 4, "layers, passes, contenders in two layouts"
    for row in rows:
        assert row["problem"] is None and row["error"] < 1e-5 and row["ran"] in ("aten", "F.conv2d")
        assert 0 < row["p20"] <= row["p50"] <= row["p80"] and row["floor"] > 0
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert facts["torch"] == torch.__version__ and facts["commit"]
    said = capsys.readouterr()
    assert "tiny   2      float32  weight_grad" in said.out
    assert command.main([*RUN, "--out", str(tmp_path)]) == 0
    assert "6 cases, 6 of them in" in capsys.readouterr().err
    assert read_table(tmp_path / "layers.jsonl", layers.Row) == rows


def test_a_run_that_was_killed_in_the_middle_of_a_line_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command.main([*RUN, "--passes", "forward", "--out", str(tmp_path)]) == 0
    path = tmp_path / "layers.jsonl"
    text = path.read_text()
    path.write_text(text + '{"suite": "tiny", "layer": "16')
    capsys.readouterr()
    assert command.main([*RUN, "--passes", "forward", "input_grad", "--out", str(tmp_path)]) == 0
    assert "4 cases, 2 of them in" in capsys.readouterr().err
    assert path.read_text().startswith(text) and len(read_table(path, layers.Row)) == 16


def test_a_wrong_answer_has_no_speed_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def wrong(problem: object) -> peers.Run:
        return lambda operands: problem.run_pytorch(operands) * 1.001

    monkeypatch.setitem(peers.RUNNERS, "auto", wrong)
    assert command.main([*RUN, "--passes", "forward", "--out", str(tmp_path)]) == 1
    for row in read_table(tmp_path / "layers.jsonl", layers.Row):
        assert (row["p50"] is None) == (row["runner"] == "auto")
        assert (row["problem"] or "").startswith("wrong by") == (row["runner"] == "auto")
    assert "wrong by 1.0e-03" in capsys.readouterr().err
    (case, *_) = summary.cases(read_table(tmp_path / "layers.jsonl", layers.Row))
    assert case.ours is None and case.speedup is None and case.best_peer is not None


def layers_of(suite: str) -> tuple:
    from gconv.measure.suites import SUITES

    return SUITES[suite]


def test_a_contender_that_fails_is_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(problem: object) -> peers.Run:
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setitem(peers.RUNNERS, "auto", failing)
    (case, problem), *_ = layers.cases({"tiny": layers_of("tiny")}, [1], ["float32"], ["forward"])
    rows = layers.measure(case, problem, peers.contenders(["auto", "F.conv2d"]), CPU, 1e10)
    assert [row.problem for row in rows] == ["RuntimeError: no such thing"] * 2 + [None] * 2


def test_one_that_cannot_be_timed_leaves_the_others_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    together = layers.time_together

    def none_for_auto(calls: dict, device: torch.device) -> dict:
        if any(contender.runner == "auto" for contender in calls):
            raise RuntimeError("no capture")
        return together(calls, device)

    monkeypatch.setattr(layers, "time_together", none_for_auto)
    (case, problem), *_ = layers.cases({"tiny": layers_of("tiny")}, [1], ["float32"], ["forward"])
    rows = layers.measure(case, problem, peers.contenders(["auto", "F.conv2d"]), CPU, 1e10)
    assert [row.problem for row in rows] == ["RuntimeError: no capture"] * 2 + [None] * 2
    assert [row.p50 is None for row in rows] == [True, True, False, False]


def test_contenders_that_were_not_measured_or_could_not_run_are_measured_in_a_second_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def failing(problem: object) -> peers.Run:
        raise RuntimeError("not yet")

    first = [*RUN[:-3], "--passes", "forward", "--out", str(tmp_path), "--contenders"]
    with monkeypatch.context() as patch:
        patch.setitem(peers.RUNNERS, "auto", failing)
        assert command.main([*first, "auto"]) == 0
    assert command.main([*first, "auto", "F.conv2d"]) == 0
    found = summary.cases(read_table(tmp_path / "layers.jsonl", layers.Row))
    assert len(found) == 2
    for case in found:
        assert case.ours is not None and case.best_peer is not None
    capsys.readouterr()
    assert command.main([*first, "F.conv2d", "auto"]) == 0
    assert "2 cases, 2 of them in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("environment.json", '{"gpu": nul', "environment.json is damaged"),
        ("environment.json", "{}", "environment.json is damaged"),
        ("layers.jsonl", '{"suite": "tiny"}\n', "layers.jsonl, line 1, is no measurement"),
        ("layers.jsonl", "nothing\n", "layers.jsonl, line 1, is no measurement"),
        ("networks.jsonl", "[]\n", "networks.jsonl, line 1, is no measurement"),
    ],
)
def test_damaged_results_are_named(
    name: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"gpu": None, "cpu": "a"}))
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        command.main(["report", str(tmp_path)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_torch_compile_is_a_peer_that_gives_the_same(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, compile = [], torch.compile

    def noting(function: Callable, options: dict, dynamic: bool) -> Callable:
        told.append(options)
        chosen = {"options": options} if backend == "inductor" else {"backend": backend}
        return compile(function, dynamic=dynamic, **chosen)

    monkeypatch.setattr(torch, "compile", noting)
    options = ["--passes", "forward", "weight_grad", "--contenders", "torch.compile", "--out", str(tmp_path)]
    assert command.main([*RUN, *options]) == 0
    assert all(row["problem"] is None for row in read_table(tmp_path / "layers.jsonl", layers.Row))
    assert told and all(options["max_autotune"] for options in told)
    assert not any(options.get("triton.cudagraphs") for options in told)


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
    """On a CPU by the functions of the same meaning."""

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
    assert found == [True] * 5 + [False] * 13, "cuDNN's weight gradient cannot be asked for"
    options = ["--passes", "forward", "--out", str(tmp_path), "--contenders", "F.conv2d", "native-depthwise"]
    assert command.main([*RUN[:-3], *options]) == 0
    runners = {row["runner"] for row in read_table(tmp_path / "layers.jsonl", layers.Row)}
    assert runners == {"F.conv2d"}


@pytest.mark.parametrize("name", ["commit", "gpu", "torch"])
def test_another_commit_or_machine_needs_another_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = [*RUN, "--passes", "forward", "--out", str(tmp_path)]
    assert command.main(run) == 0
    path = tmp_path / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: "another"}))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command.main(run)
    assert stopped.value.code == 2 and f"was measured with {name} another" in capsys.readouterr().err
    assert command.main([*run, "--overwrite"]) == 0
    assert len(read_table(tmp_path / "layers.jsonl", layers.Row)) == 8


def test_time_is_up_between_two_cases(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command.main([*RUN, "--out", str(tmp_path), "--minutes", "1e-9"]) == 3
    assert "time is up" in capsys.readouterr().err and not read_table(tmp_path / "layers.jsonl", layers.Row)


@pytest.mark.long
def test_networks_are_measured_with_and_without_gconv(tmp_path: Path) -> None:
    run = ["networks", "--network", "tiny", "--image", "32", "--batch", "2", "--modes", "eager", "graphed"]
    assert command.main([*run, "--out", str(tmp_path)]) == 0
    rows = read_table(tmp_path / "networks.jsonl", networks.Row)
    assert {(row["runner"], row["layout"]) for row in rows} == {
        ("gconv", "channels_last"), ("fused", "channels_last"),
        ("F.conv2d", "channels_last"), ("F.conv2d", "contiguous"),
    }  # fmt: skip
    assert {row["task"] for row in rows} == {"inference", "training"} and len(rows) == 8
    for row in rows:
        assert row["problem"] is None and row["images_per_second"] > 0
        assert 0 < row["grouped_share"] < 1 and 1e-4 < row["error"] < 0.05, "bfloat16"
    # Of most rows: a busy machine may stop any one of them in the middle of a convolution.
    assert sorted(row["grouped_share"] for row in rows)[len(rows) // 2] < 0.6


@pytest.mark.parametrize("task", networks.TASKS)
def test_a_wrong_network_has_no_speed(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = gconv.GroupConv2d.forward
    monkeypatch.setattr(gconv.GroupConv2d, "forward", lambda self, x: forward(self, x) * 3)
    ours, _, theirs, _ = networks.contenders(["tiny"])
    for contender, right in ((ours, False), (theirs, True)):
        row = networks.measure(contender, task, "eager", 2, 16, CPU)
        assert (row.p50 is not None) == (row.problem is None) == right


@pytest.mark.parametrize("task", networks.TASKS)
def test_a_graph_that_leaves_nan_has_no_speed(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "_graph", lambda step: (step, torch.tensor(torch.nan)))
    row = networks.measure(networks.contenders(["tiny"])[0], task, "graphed", 2, 32, CPU)
    assert row.p50 is None and row.problem == "wrong by nan, graphed against eager"


def test_the_peer_network_has_no_layer_of_ours() -> None:
    ours, _, theirs, _ = networks.contenders(["tiny"])
    torch.manual_seed(0)
    first, _ = networks._build(ours, "training", CPU)
    torch.manual_seed(0)
    second, _ = networks._build(theirs, "training", CPU)
    assert any(isinstance(module, gconv.GroupConv2d) for module in first.modules())
    assert not any(isinstance(module, gconv.GroupConv2d) for module in second.modules())
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize("task", networks.TASKS)
def test_the_fused_network_is_fused_and_compared_with_the_plain_one(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, contender, *_ = networks.contenders(["tiny"])
    torch.manual_seed(0)
    model, exact = networks._build(contender, task, CPU)
    if task == "training":
        assert model.layer1[0].fused and not exact.layer1[0].fused
    else:
        assert model.get_submodule("layer1.0.conv2").activation == "relu"
    fold = rewrite.fold
    monkeypatch.setattr(rewrite, "fold", lambda conv, norm: (fold(conv, norm), conv.bias.data.add_(1)))
    monkeypatch.setattr("resnext.model.conv_between_norms", lambda x, b, c, a: -a(c(b(x))))
    row = networks.measure(contender, task, "eager", 2, 16, CPU)
    assert row.p50 is None and row.problem.startswith("wrong by")


def test_a_profiler_that_sees_no_time_tells_no_share() -> None:
    assert networks._grouped_share(lambda: None, CPU) is None


def test_grouped_share_counts_grouped_convolutions_once() -> None:
    def event(name: str, *shapes: list[int], parent: str | None = None) -> SimpleNamespace:
        above = None if parent is None else SimpleNamespace(name=parent, cpu_parent=None)
        above = above and SimpleNamespace(name="aten::conv2d", cpu_parent=above)
        return SimpleNamespace(name=name, input_shapes=list(shapes), cpu_parent=above)

    x, dense, grouped = [2, 8, 5, 5], [8, 8, 3, 3], [8, 2, 3, 3]
    assert networks._is_grouped(event("aten::convolution", x, grouped))
    assert networks._is_grouped(event("aten::convolution_backward", x, x, grouped))
    assert networks._is_grouped(event("gconv::weight_grad", x, x))
    assert not networks._is_grouped(event("aten::convolution", x, dense))
    assert not networks._is_grouped(event("aten::convolution_backward", x, x, dense))
    assert not networks._is_grouped(event("aten::relu", x))
    assert not networks._is_grouped(event("aten::convolution", x, grouped, parent="gconv::forward"))


def test_runners_are_who_they_say() -> None:
    (_, problem), *_ = layers.cases({"tiny": layers_of("tiny")}, [2], ["float32"], ["forward"])
    operands = problem.draw(CPU)
    ours, forced = (peers.Contender(runner, "channels_last") for runner in ("auto", "triton"))
    with problem.precision():
        assert peers.who_runs(ours, problem, operands) == "aten"
        assert peers.who_runs(forced, problem, operands).startswith("triton: taps, 64 pixels")
    for runner in ("auto", "reference", "F.conv2d"):
        result = peers.RUNNERS[runner](problem)(operands)
        assert problem.matches(problem.error(result, problem.truth(operands)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["report", "/nowhere"], "error: /nowhere: no results there"),
        (
            ["run", "--suite", "tiny", "--batch", "0"],
            "argument --batch: must be a positive integer, got '0'",
        ),
        (
            ["run", "--suite", "tiny", "--batch", "x"],
            "argument --batch: must be a positive integer, got 'x'",
        ),
        (
            ["run", "--suite", "tiny", "--minutes", "-1"],
            "--minutes: must be a positive number of minutes",
        ),
        (["run", "--suite", "tiny", "--out", __file__], "is no folder"),
        (["networks", "--image", "31"], "argument --image: 31 is less than 32"),
        (["networks", "--network", "tiny", "--modes", "graphed"], "error: --modes: none is left"),
        (["run", "--suite", "resnet"], "argument --suite: invalid choice: 'resnet'"),
        (["run", "--suite", "tiny", "--out", "/proc/nowhere"], "error: /proc/nowhere: No such file"),
        ([], "the following arguments are required: COMMAND"),
    ],
    ids=lambda part: part if isinstance(part, str) else " ".join(part),
)
def test_what_cannot_be_done_is_said(options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
