"""``python -m benchmarks counters``: Nsight Compute's counters of the kernels that were launched."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks import counters, layers
from benchmarks.store import Store
from gconv.measure.suites import SUITES

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
    """A program called ncu on the PATH, which runs the code in ``body.py`` in its folder."""
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
    assert list(metrics) == ["microseconds", "registers", "programs", "dram_read_mb"], (
        "those of this profiler"
    )
    rows = counters.measure(CASES, found, metrics)
    assert [(row.pass_, row.kernel) for row in rows] == [
        ("forward", "pack_kernel"),
        ("forward", "strips_kernel"),
        ("input_grad", "strips_kernel"),
    ]
    assert all(row.counts == {"microseconds": 1.5, "registers": 96, "dram_read_mb": 2.0} for row in rows)
    assert not any(row.problem for row in rows)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "SEEN = 'reduce_kernel'\n" + COUNTS,
            "the profiler saw different kernels from those that were launched",
        ),
        (
            "print('==ERROR== ERR_NVGPUCTRPERM: no permission', 'Warning', sep=chr(10)); sys.exit(1)",
            "ERR_NVGPUCTRPERM: no permission",
        ),
        ("sys.exit(9)", "exit code 9"),
    ],
)
def test_a_profiler_that_fails_is_a_row_that_says_why(profiler: Path, body: str, message: str) -> None:
    profiler.write_text(PROFILER.replace("{body}", body))
    metrics = {name: counters.METRICS[name] for name in ("microseconds", "dram_read_mb")}
    rows = counters.measure(CASES, counters.find_profiler(), metrics)
    assert len(rows) == 2 and all(message in row.problem and row.counts == {} for row in rows)


def test_a_layer_that_could_not_be_counted_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"gpu": "NVIDIA Test", "cpu": "x86_64"}
    monkeypatch.setattr(command, "this_device", lambda: SimpleNamespace(type="cuda"))
    monkeypatch.setattr(command, "_store", lambda parsed: Store(tmp_path, facts))
    monkeypatch.setattr(counters, "find_profiler", lambda: "ncu")
    monkeypatch.setattr(counters, "available", lambda profiler: {})
    problems = iter(["no permission", None, None])

    def measure(cases: list, profiler: str, metrics: dict) -> list[counters.CounterRow]:
        problem = next(problems)
        return [counters.CounterRow(*case, "strips_kernel", {}, problem) for case, _ in cases]

    monkeypatch.setattr(counters, "measure", measure)
    tiny = ["counters", "--suite", "tiny", "--batch", "4"]
    assert command.main(tiny) == 1
    assert "no permission" in capsys.readouterr().err
    assert command.main(tiny) == 0
    assert f"2 cases: 1 already in {tmp_path}, 1 to measure" in capsys.readouterr().err
    assert command.main(tiny) == 0 and next(problems, "none left") == "none left"


def test_the_program_that_is_watched_gets_its_problems_back() -> None:
    for _, problem in CASES:
        assert counters._problem(json.loads(json.dumps(asdict(problem)))) == problem
