"""``on_gpu.py``: every test runs once in one of the processes, failures show, passed tests are recorded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import gpu_record
import on_gpu
import pytest
import sanitize
from families import FAMILIES, geometry_of

from gconv.geometry import PASSES, ConvGeometry
from gconv.kernels import rules
from gconv.kernels.device import Device
from gconv.measure.problem import TYPES

HEAD = "import os\nimport pytest\n\npytestmark = pytest.mark.gpu\n\n\n"
FACTS = {"commit": "012345", "gpu": "a", "torch": "2", "triton": "3"}
SIX = """
@pytest.mark.parametrize("number", range(6))
def test_of_six(number: int) -> None:
    open("ran.txt", "a").write(f"{os.getpid()} {number}\\n")
"""
WAITING = """
    import subprocess
    import sys
    import time

    if number > 2:
        sleeping = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open("ran.txt", "a").write(f"{sleeping.pid} sleeping\\n")
        time.sleep(60)
"""
TIMING = """
@pytest.mark.timing
def test_alone() -> None:
    open("ran.txt", "a").write(f"{os.getpid()} timing\\n")
"""
FAILING = "def test_fails() -> None:\n    assert os.path.exists('fixed.txt'), 'not fixed'\n"
CRASHING = "def test_crashes() -> None:\n    os._exit(7)\n"
LOSING = """
def test_loses_the_gpu() -> None:
    open("ran.txt", "a").write(f"{os.getpid()} lost\\n")
    import sys
    from types import SimpleNamespace

    def synchronize() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    sys.modules["torch"] = SimpleNamespace()
    sys.modules["torch"].cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    raise AssertionError("wrong numbers")
"""
SKIPPED = 'pytest.skip("needs kornia", allow_module_level=True)\n'


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in an empty folder, without compute-sanitizer."""
    monkeypatch.chdir(tmp_path)
    Path("pytest.ini").write_text("[pytest]\nmarkers =\n  gpu\n  timing\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in on_gpu.ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that main's changes are undone
    monkeypatch.setattr(gpu_record, "environment", lambda: FACTS)


def run(*options: str, **modules: str) -> tuple[int, dict[str, Any]]:
    """Run the tests in ``modules``; return the exit code and the results."""
    for name, text in modules.items():
        Path(f"test_{name}.py").write_text(HEAD + text)
    files = [f"test_{name}.py" for name in modules]
    code = on_gpu.main(["--processes", "3", "--out", "results.json", *options, *files])
    return code, json.loads(Path("results.json").read_text())


def ran() -> list[tuple[str, str]]:
    """The process and name of each test, in order."""
    return [tuple(line.split()) for line in Path("ran.txt").read_text().splitlines()]


def outcomes(results: dict[str, Any]) -> dict[str, str]:
    return {name.rpartition("/")[2]: test["outcome"] for name, test in results["tests"].items()}


def test_each_test_runs_once_in_turn_and_those_that_time_last() -> None:
    code, results = run(six=SIX, timing=TIMING)
    assert code == 0 and results["counts"] == {"passed": 7} and results["stopped"] is None
    assert results["environment"]["gpu"] == "a" and results["sanitizer"] == {"outcome": "not on PATH"}
    found = ran()
    assert sorted(name for _, name in found) == [*"012345", "timing"] and found[-1][1] == "timing"
    assert sorted(Counter(process for process, _ in found).values()) == [1, 2, 2, 2]
    by_name = {name: process for process, name in found}
    assert by_name["0"] == by_name["3"] != by_name["1"]


def test_failures_show_and_only_what_has_not_passed_runs_again(capsys: pytest.CaptureFixture) -> None:
    code, results = run(six=SIX, failing=FAILING, skipped=SKIPPED)
    assert code == 1 and results["counts"] == {"passed": 6, "failed": 1, "skipped": 1}
    said = capsys.readouterr().out
    assert re.search(r"FAILED \S*test_failing.py::test_fails\nE +AssertionError: not fixed", said)
    assert "skipped 1: needs kornia" in said
    Path("fixed.txt").touch()
    code, results = run(six=SIX, failing=FAILING)
    assert code == 0 and results["counts"] == {"passed": 7} and len(ran()) == 6


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [
        ({}, {}, True),
        ({"gpu": "b"}, {}, False),
        ({"commit": "543210"}, {}, False),
        ({"commit": "012345-dirty"}, {"commit": "012345-dirty"}, False),
        ({"commit": None}, {"commit": None}, False),
    ],
)
def test_what_has_passed_counts_for_its_commit_and_gpu(
    before: dict[str, str], now: dict[str, str], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, passed = Path("results.json"), {"outcome": "passed"}
    tests = {"one": passed, "two": {"outcome": "failed"}}
    path.write_text(json.dumps({"environment": FACTS | before, "tests": tests, "sanitizer": passed}))
    monkeypatch.setattr(gpu_record, "environment", lambda: FACTS | now)
    record = gpu_record.Record(path)
    assert (record.tests, record.sanitizer) == (({"one": passed}, passed) if kept else ({}, {}))


def test_a_crash_fails_its_test_and_the_others_run() -> None:
    """Including the tests in the same share, before and after the crash."""
    code, results = run("--processes", "1", a=SIX, b=CRASHING, c=SIX)
    assert code == 1 and results["counts"] == {"passed": 12, "failed": 1}
    assert outcomes(results)["test_b.py::test_crashes"] == "failed"
    (message,) = [test["message"] for test in results["tests"].values() if test["outcome"] == "failed"]
    assert "exit code 7" in message


def test_a_process_that_has_lost_the_gpu_runs_no_other_test() -> None:
    code, results = run("--processes", "1", a=LOSING, b=SIX)
    assert code == 1 and results["counts"] == {"passed": 6, "failed": 1} and results["problems"] == []
    (message,) = [test["message"] for test in results["tests"].values() if test["outcome"] == "failed"]
    assert "wrong numbers" in message and len({process for process, _ in ran()}) == 2


def test_a_module_that_cannot_be_collected_is_one_failure(capsys: pytest.CaptureFixture) -> None:
    code, results = run(six=SIX, broken="import nothing\n", timing=TIMING)
    assert code == 1 and results["counts"] == {"passed": 7, "failed": 1}
    assert capsys.readouterr().out.count("FAILED") == 1


def test_it_finds_the_files_with_marked_tests_and_starts_anywhere(tmp_path: Path) -> None:
    names = [path.name for path in on_gpu.marked_files()]
    assert names == [f"test_gpu_{what}.py" for what in ("fusion", "kernels", "measuring", "training")]
    command = [sys.executable, str(Path(on_gpu.__file__)), "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and done.stdout.startswith("usage: on_gpu.py"), done.stderr


def test_no_test_and_no_pytest_are_failures() -> None:
    assert run(empty="")[0] == 1
    code = on_gpu.main(["--processes", "1", "--out", "results.json", "nowhere.py"])
    assert code == 1 and "nowhere.py" in json.loads(Path("results.json").read_text())["problems"][0]


def test_it_stops_in_time_with_all_that_it_started_and_goes_on() -> None:
    code, results = run("--minutes", "0.05", six=SIX + WAITING)
    assert code == 3 and results["stopped"] == "stopped after 0.05 minutes"
    assert results["counts"].get("passed", 0) <= 3
    assert all(has_ended(int(process)) for process, _ in ran())
    code, results = run(six=SIX)
    assert code == 0 and results["counts"] == {"passed": 6} and results["stopped"] is None


def has_ended(process: int) -> bool:
    """Whether a process ends within five seconds. A zombie has ended."""
    stat, end = Path(f"/proc/{process}/stat"), time.monotonic() + 5
    while time.monotonic() < end:
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_file_of_something_else_is_left_as_it_is(capsys: pytest.CaptureFixture) -> None:
    Path("results.json").write_text("[1, 2]")
    with pytest.raises(SystemExit, match="2"):
        run(six=SIX)
    message = "error: results.json doesn't contain results of these tests: choose a different --out"
    assert capsys.readouterr().err.startswith(message)
    assert Path("results.json").read_text() == "[1, 2]"


@pytest.mark.parametrize("code", [0, 1])
def test_the_sanitizer_watches_without_the_cache(code: int, tmp_path: Path) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $@"\nexit {code}\n')
    program.chmod(0o755)
    exit_code, results = run(six=SIX)
    assert exit_code == code and results["sanitizer"]["outcome"] == ("failed" if code else "passed")
    assert results["sanitizer"]["message"].startswith("1 --error-exitcode 1 ")
    assert results["sanitizer"]["message"].endswith("tests/gpu/sanitize.py\n")


def test_the_sanitizer_is_stopped_in_time_with_what_it_watches(tmp_path: Path) -> None:
    sleeping = f"{sys.executable} -c 'import time; time.sleep(60)'"
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{sleeping} &\necho $! sleeping > ran.txt\nwait\n")
    program.chmod(0o755)
    with pytest.raises(subprocess.TimeoutExpired):
        on_gpu.sanitize(gpu_record.Record(None), time.monotonic() + 1)
    ((process, _),) = ran()
    assert has_ended(int(process))


def test_the_sanitizer_watches_every_kernel_in_every_pass() -> None:
    """All kernels that an H100 uses for the families, plain and with batch norms, in each type."""
    geometries = [geometry_of(case) for case in FAMILIES]
    assert kernels_of(sanitize.LAYERS.values()) >= kernels_of(geometries)


def kernels_of(geometries: Iterable[ConvGeometry]) -> set[tuple[str, str, str, str]]:
    """Return the rule, pass, type and kernel of each launch."""
    h100 = Device("cuda", "NVIDIA H100 80GB HBM3", 132, 90)
    return {
        (rule.__name__, pass_, type_, rule(pass_, geometry, *TYPES[type_], h100).kernel)
        for geometry, pass_, type_ in product(geometries, PASSES, sanitize.TYPES)
        for rule in (rules.tile_by_rule, rules.norm_tile)
    }
