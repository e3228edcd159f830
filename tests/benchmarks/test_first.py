"""``python -m benchmarks first`` and ``counters``: what a first half hour on a GPU runs and keeps."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import on_gpu
import pytest

from benchmarks import __main__ as command
from benchmarks import counters, first, layers
from benchmarks.first import Part
from benchmarks.store import Store, read_table
from gconv.commands import check, tune
from gconv.measure.suites import SUITES

SHOW = "import os, sys; print(os.environ['GCONV_CACHE'], *sys.argv[1:])"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Part, ...]]:
    """Steps of two parts: one that prints, one that ends as the file ``code`` in the folder says."""
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
    assert not (tmp_path / "shown.txt").exists(), "it was done before"
    for other in ("another", "another-dirty", "another-dirty"):
        monkeypatch.setattr(first, "commit", lambda other=other: other)
        assert first.run("right", tmp_path, 2.0) == 0
        assert (tmp_path / "shown.txt").exists(), "by other code"
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
            assert arguments[1] == "gconv" and check._parser("", {}).parse_args(arguments[2:]).json


def test_without_a_gpu_nothing_starts(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["first", "right"], ["counters"]):
        with pytest.raises(SystemExit, match="2"):
            command.main(arguments)
        assert "there is none here" in capsys.readouterr().err


CASES = list(layers.cases({"tiny": SUITES["tiny"]}, [4], ["bfloat16"], ["forward", "input_grad"]))[:2]
PROFILER = """\
import json, sys
if "--query-metrics" in sys.argv:
    print("Device Test", "", "gpu__time_duration  Counter", "dram__bytes_read  Counter", sep="\\n")
    sys.exit()
option = lambda name: sys.argv[sys.argv.index(name) + 1]
problems, started = json.loads(sys.argv[-2]), sys.argv[-1]
metrics = option("--metrics").split(",")
assert sys.argv[-4:-2] == ["-m", "benchmarks.counters"] and option("--profile-from-start") == "off"
{body}
"""
COUNTS = """\
names = [["pack_kernel", "strips_kernel"], ["strips_kernel"]]
json.dump(names, open(started, "w"))
values = {"gpu__time_duration.sum": "1,500", "launch__registers_per_thread": "96"}
values |= {"dram__bytes_read.sum": "2000000", "launch__grid_size": "n/a"}
row = lambda cells: ",".join(f'"{cell}"' for cell in cells) + "\\n"
with open(option("--log-file"), "w") as log:
    log.write("==PROF== Connected to process 1\\n")
    log.write(row(["ID", "Kernel Name", *metrics]) + row(["", "", *["unit"] * len(metrics)]))
    for name in [name for of_one in names for name in of_one]:
        log.write(row(["0", SEEN or name, *[values[metric] for metric in metrics]]))
"""


@pytest.fixture
def profiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program called ncu on the PATH, which does what ``body.py`` beside it says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ncu").write_text(f"#!{sys.executable}\nexec(open({str(folder / 'body.py')!r}).read())\n")
    (folder / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "body.py"


def test_counters_are_those_of_the_kernels_that_were_started(profiler: Path) -> None:
    profiler.write_text(PROFILER.replace("{body}", "SEEN = None\n" + COUNTS))
    found = counters.find_profiler()
    metrics = counters.available(found)
    assert list(metrics) == ["microseconds", "registers", "programs", "dram_read_mb"], "what this one has"
    rows = counters.measure(CASES, found, metrics)
    assert [(row.pass_, row.kernel) for row in rows] == [
        ("forward", "pack_kernel"),
        ("forward", "strips_kernel"),
        ("input_grad", "strips_kernel"),
    ]
    assert all(row.counts == {"microseconds": 1.5, "registers": 96, "dram_read_mb": 2.0} for row in rows)
    assert not any(row.problem for row in rows)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("SEEN = 'reduce_kernel'\n" + COUNTS, "the profiler saw other kernels than were started"),
        (
            "print('==ERROR== ERR_NVGPUCTRPERM: no permission', 'Warning', sep=chr(10)); sys.exit(1)",
            "ERR_NVGPUCTRPERM: no permission",
        ),
        ("sys.exit(9)", "exit code 9"),
    ],
)
def test_a_profiler_that_fails_is_a_row_that_says_why(profiler: Path, body: str, told: str) -> None:
    profiler.write_text(PROFILER.replace("{body}", body))
    metrics = {name: counters.METRICS[name] for name in ("microseconds", "dram_read_mb")}
    rows = counters.measure(CASES, counters.find_profiler(), metrics)
    assert len(rows) == 2 and all(told in row.problem and row.counts == {} for row in rows)


def test_a_layer_that_could_not_be_counted_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"gpu": "NVIDIA Test", "cpu": "x86_64"}
    monkeypatch.setattr(command, "this_device", lambda: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(command, "_store", lambda parsed: Store(tmp_path, facts))
    monkeypatch.setattr(counters, "find_profiler", lambda: "ncu")
    monkeypatch.setattr(counters, "available", lambda profiler: {})
    problems = iter(["no permission", None, None])

    def measure(cases: list, profiler: str, metrics: dict) -> list[counters.Row]:
        problem = next(problems)
        return [counters.Row(*case, "strips_kernel", {}, problem) for case, _ in cases]

    monkeypatch.setattr(counters, "measure", measure)
    tiny = ["counters", "--suite", "tiny", "--batch", "4"]
    assert command.main(tiny) == 1
    assert "no permission" in capsys.readouterr().err
    assert command.main(tiny) == 0
    assert "2 cases, 1 of them in" in capsys.readouterr().err
    assert command.main(tiny) == 0 and next(problems, "none left") == "none left"


def test_the_program_that_is_watched_gets_its_problems_back() -> None:
    for _, problem in CASES:
        assert counters._problem(json.loads(json.dumps(asdict(problem)))) == problem


def test_the_report_tells_what_the_first_half_hour_found(tmp_path: Path) -> None:
    from benchmarks.report import write_report

    facts = {"gpu": "NVIDIA Test", "cpu": "x86_64"}
    (tmp_path / "environment.json").write_text(json.dumps(facts))
    tests = {"counts": {"passed": 700, "failed": 1}, "sanitizer": {"outcome": "passed"}}
    (tmp_path / "tests.json").write_text(json.dumps(tests))
    answers = [{"problem": None}, {"problem": "off"}]
    (tmp_path / "check.json").write_text(json.dumps({"answers": answers, "verdict": "1 of 2 is WRONG."}))
    row = counters.Row(*CASES[0][0], "strips_kernel", {"microseconds": 112.4, "l2_percent": 77.0})
    (tmp_path / "counters.jsonl").write_text(json.dumps(row.__dict__) + "\n")
    assert read_table(tmp_path / "counters.jsonl", counters.Row)
    text = write_report(tmp_path)[0].read_text()
    assert "Tests on this GPU: 1 failed, 700 passed; compute-sanitizer: passed." in text
    assert "`python -m gconv`: 1 of 2 results right. 1 of 2 is WRONG." in text
    assert "microseconds" in text and "l2 %" in text and "112.4" in text


def test_without_matplotlib_a_report_has_tables_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import report

    run = ["run", "--suite", "tiny", "--batch", "2", "--dtypes", "float32", "--passes", "forward"]
    assert command.main([*run, "--contenders", "auto", "F.conv2d", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    monkeypatch.setattr(report, "plots", None)
    assert command.main(["report", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'report.md'}\n" and "no pictures" in said.err
    assert "## Layers in short" in (tmp_path / "report.md").read_text()
