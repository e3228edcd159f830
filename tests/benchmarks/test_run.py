"""``python -m benchmarks run``: no time for a wrong result, and runs that continue where they stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from measurements import RUN

from benchmarks import __main__ as command
from benchmarks import layers, peers, summary
from benchmarks.store import read_table
from gconv.measure.suites import SUITES

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("few_rounds")


def test_layers_are_measured_by_everyone_and_a_second_run_measures_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command.main([*RUN, "--out", str(tmp_path)]) == 0
    rows = read_table(tmp_path / "layers.jsonl", layers.LayerRow)
    assert len(rows) == 2 * 3 * 4, "layers, passes, contenders in two layouts"
    for row in rows:
        assert row["problem"] is None and row["error"] < 1e-5 and row["ran"] in ("aten", "F.conv2d")
        assert 0 < row["p20"] <= row["p50"] <= row["p80"] and row["floor"] > 0
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert facts["torch"] == torch.__version__ and facts["commit"]
    said = capsys.readouterr()
    assert "tiny   2      float32  weight_grad" in said.out
    assert command.main([*RUN, "--out", str(tmp_path)]) == 0
    assert f"6 cases: 6 already in {tmp_path}, 0 to measure" in capsys.readouterr().err
    assert read_table(tmp_path / "layers.jsonl", layers.LayerRow) == rows


def test_a_run_that_was_killed_in_the_middle_of_a_line_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command.main([*RUN, "--passes", "forward", "--out", str(tmp_path)]) == 0
    path = tmp_path / "layers.jsonl"
    text = path.read_text()
    path.write_text(text + '{"suite": "tiny", "layer": "16')
    capsys.readouterr()
    assert command.main([*RUN, "--passes", "forward", "input_grad", "--out", str(tmp_path)]) == 0
    assert f"4 cases: 2 already in {tmp_path}, 2 to measure" in capsys.readouterr().err
    assert path.read_text().startswith(text) and len(read_table(path, layers.LayerRow)) == 16


def test_a_wrong_answer_has_no_speed_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def wrong(problem: object) -> peers.Run:
        return lambda operands: problem.run_pytorch(operands) * 1.001

    monkeypatch.setitem(peers.RUNNERS, "auto", wrong)
    assert command.main([*RUN, "--passes", "forward", "--out", str(tmp_path)]) == 1
    for row in read_table(tmp_path / "layers.jsonl", layers.LayerRow):
        assert (row["p50"] is None) == (row["runner"] == "auto")
        assert (row["problem"] or "").startswith("wrong by") == (row["runner"] == "auto")
    assert "wrong by 1.0e-03" in capsys.readouterr().err
    (case, *_) = summary.comparisons(read_table(tmp_path / "layers.jsonl", layers.LayerRow))
    assert case.ours is None and case.speedup is None and case.best_peer is not None


def test_a_contender_that_fails_is_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(problem: object) -> peers.Run:
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setitem(peers.RUNNERS, "auto", failing)
    (case, problem), *_ = layers.cases({"tiny": SUITES["tiny"]}, [1], ["float32"], ["forward"])
    rows = layers.measure(case, problem, peers.contenders(["auto", "F.conv2d"]), CPU, 1e10)
    assert [row.problem for row in rows] == ["RuntimeError: no such thing"] * 2 + [None] * 2


def test_one_that_cannot_be_timed_leaves_the_others_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    together = layers.time_together

    def none_for_auto(calls: dict, device: torch.device) -> dict:
        if any(contender.runner == "auto" for contender in calls):
            raise RuntimeError("no capture")
        return together(calls, device)

    monkeypatch.setattr(layers, "time_together", none_for_auto)
    (case, problem), *_ = layers.cases({"tiny": SUITES["tiny"]}, [1], ["float32"], ["forward"])
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
    found = summary.comparisons(read_table(tmp_path / "layers.jsonl", layers.LayerRow))
    assert len(found) == 2
    for case in found:
        assert case.ours is not None and case.best_peer is not None
    capsys.readouterr()
    assert command.main([*first, "F.conv2d", "auto"]) == 0
    assert f"2 cases: 2 already in {tmp_path}, 0 to measure" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("environment.json", '{"gpu": nul', "environment.json, which is damaged: "),
        ("environment.json", "{}", "environment.json, which is damaged: "),
        ("layers.jsonl", '{"suite": "tiny"}\n', "layers.jsonl, which isn't a measurement: "),
        ("layers.jsonl", "nothing\n", "layers.jsonl, which isn't a measurement: "),
        ("networks.jsonl", "[]\n", "networks.jsonl, which isn't a measurement: "),
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
    assert len(read_table(tmp_path / "layers.jsonl", layers.LayerRow)) == 8


def test_time_is_up_between_two_cases(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command.main([*RUN, "--out", str(tmp_path), "--minutes", "1e-9"]) == 3
    assert "time is up" in capsys.readouterr().err and not read_table(
        tmp_path / "layers.jsonl", layers.LayerRow
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["report", "/nowhere"], "error: /nowhere has no results: run `python -m benchmarks run` first"),
        (
            ["run", "--suite", "tiny", "--batch", "0"],
            "--batch must be a positive integer, got '0'",
        ),
        (
            ["run", "--suite", "tiny", "--batch", "x"],
            "--batch must be a positive integer, got 'x'",
        ),
        (
            ["run", "--suite", "tiny", "--minutes", "-1"],
            "--minutes must be a positive number of minutes",
        ),
        (["run", "--suite", "tiny", "--out", __file__], "isn't a folder: choose a different --out"),
        (["networks", "--image", "31"], "--image must be at least 32, because the network"),
        (
            ["networks", "--network", "tiny", "--modes", "graphed"],
            "error: all chosen --modes need a GPU: choose from eager, compiled",
        ),
        (["run", "--suite", "resnet"], "--suite: invalid choice: 'resnet'"),
        (
            ["run", "--suite", "tiny", "--out", "/proc/nowhere"],
            "error: can't read or write /proc/nowhere: No such file",
        ),
        ([], "the following arguments are required: COMMAND"),
    ],
    ids=lambda part: part if isinstance(part, str) else " ".join(part),
)
def test_what_cannot_be_done_is_said(options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
