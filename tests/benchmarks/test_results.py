"""The committed results: their stamps, whether their code has changed, and that the documents quote them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import documents
import pytest
from commands import Run, rows
from rich.console import Console

from benchmarks import accuracy, stamps
from benchmarks.store import read_table
from gconv.kernels import choice
from gconv.measure.tuner import write_entries
from resnext import tables
from resnext.comparison import Compared, verdict

ROOT = Path(__file__).parents[2]
CPU = stamps.RESULTS_FOLDER / "cpu"
DOCUMENTS = documents.site_text()
BENCHMARKS = stamps.README.read_text()


def test_every_result_has_a_stamp_made_of_its_files() -> None:
    files = [path for path in stamps.RESULTS_FOLDER.rglob("*") if path.is_file() and path != stamps.STAMPS]
    names = {path.relative_to(stamps.RESULTS_FOLDER).as_posix() for path in files}
    for name in names:
        known = any(f"{name}/".startswith(f"{result}/") for result in stamps.results())
        assert known, f"{name} belongs to no result of benchmarks/stamps.py"
    for result in stamps.results():
        stamp = stamps.read_stamps().get(result, stamps.NO_STAMP)
        command = "make matrix" if result == "compiled" else f"python -m benchmarks.stamps {result}"
        assert stamp["files"] == stamps.digest_of_files(result), f"{result} has changed: run `{command}`"


def test_the_table_says_which_results_are_of_older_code() -> None:
    start, end = (BENCHMARKS.index(mark) for mark in stamps.MARKS)
    said = BENCHMARKS[start + len(stamps.MARKS[0]) : end]
    assert said == stamps.table(), "benchmarks/README.md: run `python -m benchmarks.stamps`"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with only results of a GPU and a tuned table, with the commit that made it."""
    monkeypatch.setattr(stamps, "RESULTS_FOLDER", tmp_path)
    monkeypatch.setattr(stamps, "STAMPS", tmp_path / "stamps.json")
    monkeypatch.setattr(stamps, "README", tmp_path / "README.md")
    monkeypatch.setattr(stamps, "RESULTS", {})
    monkeypatch.setattr(stamps, "ON_A_GPU", stamps.Result("make measure", ("gconv.activation",)))
    monkeypatch.setattr(choice, "SHIPPED", tmp_path / "measured")
    (tmp_path / "README.md").write_text("before\n" + "".join(stamps.MARKS) + "after\n")
    (tmp_path / "nvidia-h200").mkdir()
    (tmp_path / "nvidia-h200" / "layers.jsonl").write_text("{}\n")
    (tmp_path / "nvidia-h200" / "environment.json").write_text(json.dumps({"commit": "HEAD"}))
    write_entries(tmp_path / "measured" / "nvidia-h200.json", [], {"commit": "abcdef123456"})
    return tmp_path


def test_results_of_a_gpu_name_their_commit_and_age(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stamps.main(["nvidia-h200"]) == 0
    commit = stamps.read_stamps()["nvidia-h200"]["commit"]
    assert re.fullmatch("[0-9a-f]{12}", commit)
    stamps.stamp("nvidia-h200", None)  # HEAD may be older than the working tree
    assert "| `nvidia-h200` | `make measure` |  | unchanged |" in stamps.table()
    assert "| `measured/nvidia-h200.json` | `python -m gconv tune` | abcdef1 | unchanged |" in stamps.table()
    monkeypatch.setitem(choice.KERNELS, "forward", 0)
    monkeypatch.setattr(stamps, "ON_A_GPU", stamps.Result("make measure", ("gconv.measure.suites",)))
    assert stamps.main([]) == 0
    text = (gpu / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and text.count("**changed**") == 2


@pytest.mark.parametrize(
    ("commit", "message"),
    [
        ("0123456789ab-dirty", "at 0123456789ab-dirty, which can't be looked up: commit the code"),
        (None, "an unknown commit, which can't be looked up: commit the code"),
        ("0123456789ab", "can't find commit 0123456789ab in this repository"),
    ],
)
def test_a_result_of_no_known_commit_gets_no_stamp(
    gpu: Path, commit: str | None, message: str, capsys: pytest.CaptureFixture
) -> None:
    (gpu / "nvidia-h200" / "environment.json").write_text(json.dumps({"commit": commit}))
    with pytest.raises(SystemExit):
        stamps.main(["nvidia-h200"])
    assert message in capsys.readouterr().err and stamps.read_stamps() == {}


def lines(text: str) -> set[str]:
    """The lines of ``text``, with single spaces between words."""
    return {" ".join(line.split()) for line in text.splitlines()}


@pytest.mark.parametrize("command", ["traffic resnext50_32x4d", "complexity"])
def test_the_readme_quotes_what_is_counted(run: Run, command: str) -> None:
    code, out, _ = run(*command.split())
    table = {line for line in lines(out) if line.startswith("│")}
    assert code == 0 and len(table) > 4 and table <= lines(DOCUMENTS)


def test_the_readme_quotes_the_demo() -> None:
    epochs = rows(CPU / "demo" / "summary.csv")
    for row in epochs:
        value = {name: float(text) for name, text in row.items()}
        quoted = (
            "{epoch:.0f} {train_loss:.4f} {train_accuracy:.2f}% {test_loss:.4f} {test_accuracy:.2f}% "
            "{images_per_second:.0f} {seconds:.1f}"
        ).format(**value)
        assert quoted in lines(DOCUMENTS), quoted
    assert f"{float(epochs[-1]['test_accuracy']):.2f}% of 1,000 held-out images right" in DOCUMENTS


def test_the_readme_quotes_the_study_of_cardinality() -> None:
    pairs: dict[tuple[int, ...], Compared] = {}
    for row in rows(CPU / "cardinality" / "study.csv"):
        key = tuple(int(row[name]) for name in ("cardinality", "width", "parameters", "flops"))
        pairs.setdefault(key, Compared(*key)).errors[int(row["seed"])] = float(row["error"])
    compared, console = [*pairs.values()], Console(width=110)
    with console.capture() as capture:
        console.print(tables.of_study("digits, 30 epochs, 3 seeds", compared))
    assert lines(capture.get()) <= lines(DOCUMENTS)
    held_out = int(re.search(r"With (\d+) images a single error", DOCUMENTS)[1])
    how_sure = verdict(compared, held_out).partition(", but seeds of one network already")[2]
    assert how_sure and how_sure in " ".join(DOCUMENTS.split())


def test_the_readmes_quote_the_fused_trainings() -> None:
    table = accuracy.accuracy_table(read_table(CPU / "fused" / "accuracy.jsonl", accuracy.AccuracyRow))[1:]
    assert [row[0] for row in table] == ["unfused", "fused"]
    for name, _, _, of_seeds, mean, deviation, loss in table:
        assert f"| {name} | {of_seeds} | {mean} | {deviation} | {loss} |" in DOCUMENTS
        assert f"{mean} (deviation {deviation}) {name}" in " ".join(BENCHMARKS.split())


def test_the_readme_quotes_the_profile_of_a_network() -> None:
    start = DOCUMENTS.index("53 convolutions in a forward pass")
    block = DOCUMENTS[start : DOCUMENTS.index("```", start)]
    assert len(lines(block)) > 8 and lines(block) - {"..."} <= lines((CPU / "profile.txt").read_text())


def test_the_readmes_quote_the_host_times() -> None:
    benchmarks = {row["name"]: row for row in json.loads((CPU / "bench.json").read_text())["benchmarks"]}
    added = benchmarks["test_auto_costs_little_over_conv2d"]["extra_info"]["microseconds over F.conv2d"]
    expected = {
        "`F.conv2d` on tensors of a few bytes, on the CPU": "test_call[F.conv2d]",
        'a call with `backend="triton"` up to the launch, without gradients': (
            "test_kernels_up_to_the_launch[call, no_grad]"
        ),
        "the same with gradients": "test_kernels_up_to_the_launch[call]",
        "of which: the kernel's launcher in Python, with the plan and memory for the result": (
            "test_kernels_up_to_the_launch[forward]"
        ),
        "a launch through Triton": "test_launch[Triton's]",
        "a launch of the cached kernel": "test_launch[kept]",
    }
    times = {label: benchmarks[name]["stats"]["min"] * 1e6 for label, name in expected.items()}
    times["added by `auto` on the CPU, where it calls `F.conv2d`"] = added["fastest rounds"]
    layer = "a converted layer on the kernels, with launches, minus `nn.Conv2d` on the CPU: without gradients"
    for label, what in ((layer, "no_grad"), ("the same, forward and backward", "forward and backward")):
        info = benchmarks[f"test_kernels_cost_little_over_conv2d[{what}]"]["extra_info"]
        times[label] = info["microseconds over F.conv2d"]
    for label, time in times.items():
        assert f"| {label} | {time:.1f} |" in BENCHMARKS, label
    in_short = f"adds {added['fastest rounds']:.0f} us to an eager call of `F.conv2d`, which takes "
    assert f"{in_short}{benchmarks['test_call[F.conv2d]']['stats']['min'] * 1e6:.0f} us" in " ".join(
        DOCUMENTS.split()
    )
    kept, through = (benchmarks[f"test_launch[{way}]"]["stats"]["min"] * 1e6 for way in ("kept", "Triton's"))
    kernels = " ".join((ROOT / "docs" / "kernels.md").read_text().split())
    assert f"in {kept:.1f} us" in kernels and f"{through:.0f} us of the host's time" in kernels
