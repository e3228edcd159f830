"""``python -m benchmarks first``: what the first half hour on a GPU runs and saves."""

from __future__ import annotations

import json
from pathlib import Path

import on_gpu
import pytest

from benchmarks import __main__ as command
from benchmarks import first
from benchmarks.first import Part
from gconv.commands import check, tune

SHOW = "import os, sys; print(os.environ['GCONV_CACHE'], *sys.argv[1:])"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Part, ...]]:
    """A step of two parts: one prints, the other ends with the exit code in the folder's file ``code``."""
    ends = "import sys; sys.exit(int(open(sys.argv[1] + '/code').read()))"
    parts = (
        Part("shows", ("-c", SHOW, "{out}"), output="shown.txt", once=True),
        Part("ends", ("-c", ends, "{out}"), share=0.5),
    )
    monkeypatch.setattr(first, "STEPS", {"right": parts})
    monkeypatch.setattr(first, "commit", lambda: "one")
    return first.STEPS


def test_parts_run_and_what_is_done_stays_done(
    steps: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "code").write_text("1")
    assert first.run("right", tmp_path, 2.0) == 1
    assert (tmp_path / "shown.txt").read_text() == f"{tmp_path / 'tuned'} {tmp_path}\n"
    assert [(p["part"], p["code"]) for p in json.loads((tmp_path / "first.json").read_text())] == [
        ("shows", 0),
        ("ends", 1),
    ]
    assert ["right", "ends", "1"] in [line.split()[:3] for line in capsys.readouterr().out.splitlines()]

    (tmp_path / "code").write_text("0")
    (tmp_path / "shown.txt").unlink()
    assert first.run("right", tmp_path, 2.0) == 0
    assert not (tmp_path / "shown.txt").exists(), "it has already succeeded"
    for other in ("another", "another-dirty", "another-dirty"):
        monkeypatch.setattr(first, "commit", lambda other=other: other)
        assert first.run("right", tmp_path, 2.0) == 0
        assert (tmp_path / "shown.txt").exists(), "that was another commit"
        (tmp_path / "shown.txt").unlink()


def test_a_step_that_is_stopped_or_has_no_time_left_says_so(steps: dict, tmp_path: Path) -> None:
    (tmp_path / "code").write_text(str(first.STOPPED))
    assert first.run("right", tmp_path, 2.0) == first.STOPPED
    (tmp_path / "code").write_text("0")
    assert first.run("right", tmp_path, 1e-9) == first.STOPPED
    assert json.loads((tmp_path / "first.json").read_text())[-1]["code"] == first.STOPPED


def test_every_part_is_a_command_that_there_is(tmp_path: Path) -> None:
    for part in (part for parts in first.STEPS.values() for part in parts):
        arguments = [argument.format(out=tmp_path) for argument in part.arguments]
        arguments += ["--minutes", "2.5"] if part.share else []
        if arguments[0] != "-m":
            assert on_gpu.parse(arguments[1:]).minutes == 2.5
        elif arguments[1] == "benchmarks":
            assert not part.share or command._parser().parse_args(arguments[2:]).minutes == 2.5
        elif arguments[2] == "tune":
            assert tune._parser("").parse_args(arguments[3:]).minutes == 2.5
        else:
            assert arguments[:2] == ["-m", "gconv"] and check._parser("", {}).parse_args(arguments[2:]).json


def test_without_a_gpu_nothing_starts(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["first", "right"], ["counters"]):
        with pytest.raises(SystemExit, match="2"):
            command.main(arguments)
        assert f"{arguments[0]} needs a GPU, but this machine has none" in capsys.readouterr().err
