"""What the compiler makes of the kernels, for GPUs that need not be there: no spills, few instructions.

``make matrix`` compiles them all, in fifteen minutes, and keeps the tables that these tests read. A sample,
compiled here, comes out as the tables say.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton

from benchmarks import matrix, stamps
from gconv.commands import kernels as command
from gconv.measure import compiled, machine_code

ROOT = Path(__file__).parents[2]
PINNED = re.search(r"^triton==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
OLDEST = re.search(r"triton==([\d.]+)", (ROOT / "Makefile").read_text())[1]
KEPT = [(version, name) for version in (PINNED, OLDEST) for name in matrix.TABLES]
RUN_MATRIX = "run `make matrix` and commit what it writes"

# One tile of each kernel in each form, for the five GPUs in turn, or the next that runs it; then the command
# itself, on three kernels.
SAMPLE = """
import json
import sys
from itertools import cycle
from gconv.measure import compiled
from gconv.commands.kernels import main, table
from gconv.measure.suites import REAL

targets, tables = cycle(compiled.TARGETS), {}
for form in compiled.FORMS:
    found = {}
    for job in compiled.find_jobs(REAL, ["float16"], compiled.TARGETS, form):
        found.setdefault(job.launch.kernel.__name__, {}).setdefault(job.target, job)
    jobs = [next(by_target[t] for t in targets if t in by_target) for by_target in found.values()]
    tables[form] = table([compiled.compile_job(job) for job in jobs])
print(json.dumps(tables))
# As tuning does for a GPU that no table is of.
other = compiled.compile_job(next(iter(compiled.find_jobs(["tiny"], ["float16"], ["sm_89"]))))
assert other.registers and other.lines and other.holds is None
options = "--suite tiny --targets sm_90 --form residual --json --processes 1"
sys.argv = ["python -m gconv kernels", *options.split()]
sys.exit(main())
"""

# The lines of the tables in the kernels' README, and where their numbers come from: form, kernel, tile.
STRIPS, WEIGHT = (f"{name}_kernel, stride" for name in ("strips", "strips_weight"))
QUOTED = {
    "forward, input gradient, stride 1, Cg to 16": (
        "plain", f"{STRIPS} 1", "strips, 16 x 2 pixels x 16 -> 16 channels, 8 packs, 4 warps, 4 stages"
    ),
    "forward, input gradient, stride 1, Cg to 32": (
        "plain", f"{STRIPS} 1", "strips, 16 x 4 pixels x 32 -> 32 channels, 2 warps, 3 stages"
    ),
    "forward, stride 2, Cg to 16": (
        "plain", f"{STRIPS} 2", "strips, 16 pixels x 16 -> 16 channels, 8 packs, 4 warps, 3 stages"
    ),
    "input gradient, stride 2, Cg to 16": (
        "plain", "pairs_kernel", "pairs, 16 x 2 pixels x 16 -> 16 channels, 8 packs, 4 warps, 3 stages"
    ),
    "weight gradient, stride 1, Cg to 16": (
        "plain", f"{WEIGHT} 1", "strips, 16 pixels x 16 -> 16 channels, 2 packs, 1 warp, 3 stages"
    ),
    "weight gradient, stride 1, Cg to 32": (
        "plain", f"{WEIGHT} 1", "strips, 16 x 2 pixels x 32 -> 32 channels, 2 warps, 4 stages"
    ),
    "depthwise 3x3, forward, 144 channels": (
        "plain", "depthwise_slide_kernel", "depthwise-slide, 64 pixels x 16 channels, 4 warps"
    ),
    "depthwise 7x7, forward, 96 channels": (
        "plain", "depthwise_slide_kernel", "depthwise-slide, 16 pixels x 32 channels, 4 warps"
    ),
    "norm: forward, stride 1, Cg to 16": (
        "norm", f"{STRIPS} 1", "strips, 16 x 2 pixels x 16 -> 16 channels, 4 packs, 4 warps, 3 stages"
    ),
    "norm: input gradient, stride 1, Cg to 16": (
        "norm", f"{STRIPS} 1", "strips, 16 x 2 pixels x 16 -> 16 channels, 4 packs, 4 warps, 3 stages"
    ),
    "norm: weight gradient, stride 1, Cg to 16": (
        "norm", f"{WEIGHT} 1", "strips, 16 x 4 pixels x 16 -> 16 channels, 1 warp, 3 stages"
    ),
}  # fmt: skip


def read_table(text: str) -> list[dict[str, str]]:
    """The rows of a table of ``python -m gconv kernels`` by its headings."""
    head, rule, *lines = text.splitlines()
    spans = [match.span() for match in re.finditer("-+", rule)]
    names = [head[start:end].strip() for start, end in spans]
    return [dict(zip(names, [line[a:b].strip() for a, b in spans], strict=True)) for line in lines]


def kept(version: str, name: str) -> list[dict[str, str]]:
    return read_table((matrix.COMMITTED / f"triton-{version}" / f"{name}.txt").read_text())


def spilling(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if row["target"].startswith("sm_") and row["spills"] != "0"]


def test_the_tables_are_of_the_present_kernels() -> None:
    files = stamps.changed("compiled")
    assert not files, f"changed since the tables were made: {', '.join(files)}; {RUN_MATRIX}"
    assert stamps.RESULTS["compiled"].must_hold
    found = {path.relative_to(matrix.COMMITTED).as_posix() for path in matrix.COMMITTED.rglob("*.txt")}
    assert found == {f"triton-{version}/{name}.txt" for version, name in KEPT}, RUN_MATRIX


@pytest.mark.parametrize(("version", "name"), KEPT, ids=str)
def test_no_tile_spills_on_any_gpu_with_two_tritons(version: str, name: str) -> None:
    rows = kept(version, name)
    assert {row["target"] for row in rows} == set(compiled.TARGETS if version == PINNED else matrix.OLDER)
    assert not spilling(rows)


def test_rows_are_copied_ahead_past_l1() -> None:
    """Sixteen bytes at once: those of eight go through L1, and conflict in the banks of shared memory."""
    rows = [row for row in kept(PINNED, "plain") if (row["target"], row["type"]) == ("sm_90", "float16")]
    for kernel in ("strips", "pairs"):
        assert {row["ahead"] for row in rows if row["kernel"].startswith(kernel)} == {"L2"}, kernel


@pytest.mark.parametrize(
    ("kernel", "packs", "instructions", "moved", "lines", "operands"),
    [
        (f"{STRIPS} 1", 8, 0.25, 6, 48, 16),
        ("pairs_kernel", 8, 0.1, 3, 24, 8),
        (f"{WEIGHT} 1", 2, 0.4, 8, 128, 24),
    ],
)
def test_packs_cost_little_and_fill_a_gpu_once(
    kernel: str, packs: int, instructions: float, moved: float, lines: int, operands: int
) -> None:
    """Where weights or dy are reloaded for each row of x, or loads are narrow, it takes more."""
    found = [
        row for row in kept(PINNED, "plain")
        if (row["kernel"], row["target"], row["type"]) == (kernel, "sm_90", "float16")
        and f"{packs} packs" in row["tile"]
    ]  # fmt: skip
    most = {"per output": instructions, "moved": moved, "lines": lines, "operands": operands, "waves": 1}
    assert len(found) >= 2
    for row in found:
        assert all(float(row[name]) <= limit for name, limit in most.items()), row
        assert float(row["waves"]) >= 0.8, row


def test_a_sample_comes_out_as_the_tables_say() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    printed, by_command = done.stdout.split("\n", 1)
    sample = {form: read_table(text) for form, text in json.loads(printed).items()}
    assert sample.keys() == compiled.FORMS.keys() and all(sample.values())
    for form, rows in sample.items():
        assert not spilling(rows), form
        if triton.__version__ == PINNED:
            table = kept(PINNED, form)
            assert not (other := [row for row in rows if row not in table]), f"{form}: {other}; {RUN_MATRIX}"
    found = json.loads(by_command)
    assert found["triton"] == triton.__version__
    layers = [(kernel["name"], kernel["layers"]) for kernel in found["kernels"]]
    one, two = "16/4, 6x6: forward", "16/4, 3x3, stride 2: forward"
    assert layers == [("pack_kernel", [one, two]), (f"{STRIPS} 1", [one]), (f"{STRIPS} 2", [two])]


def quoted_lines() -> dict[str, dict[str, str]]:
    """The lines of the tables of instructions in the kernels' README, by their label."""
    lines, head, before = {}, None, ""
    for line in (ROOT / "gconv" / "kernels" / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = None
        elif cells[-1] == "instructions":
            head = cells
        elif head and not cells[0].startswith("---"):
            before = before if cells[0].startswith("the same") else cells[0]
            label = cells[0].replace("the same", before.rpartition(",")[0])
            label = f"norm: {label}" if head[0] == "with batch norm inside" else label
            lines[label] = dict(zip(head, cells, strict=True))
    return lines


def test_the_kernels_readme_quotes_the_tables() -> None:
    lines = quoted_lines()
    assert lines.keys() == QUOTED.keys()
    for label, (form, kernel, tile) in QUOTED.items():
        line = lines[label]
        rows = [
            row for row in kept(PINNED, form)
            if (row["target"], row["type"], row["kernel"]) == ("sm_90", "float16", kernel)
            and row["tile"] == tile and row["registers"] == line["registers"]
        ]  # fmt: skip
        said = line["instructions"].split()[0]
        rounding = 0.501 * 10.0 ** -len(said.partition(".")[2])
        assert any(abs(float(said) - float(row["per output"])) <= rounding for row in rows), label
        if shared := line.get("shared"):
            kilobytes = {f"{int(row['shared']) / 1000:.0f}" for row in rows}
            assert shared.removesuffix(" kB") in kilobytes, label
    text = (ROOT / "gconv" / "kernels" / "README.md").read_text()
    said = re.search(r"at ([\d.]+) each that is", text)[1]
    assert lines["forward, input gradient, stride 1, Cg to 16"]["instructions"] == f"{said} an output"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """``make matrix`` in an empty folder, with a compiler that is done at once; ``spills`` names tables."""
    state = SimpleNamespace(out=tmp_path / "compiled", runs=[], stamped=[], spills=set())

    def run(arguments: list[str], stdout: object, env: dict[str, str], cwd: Path) -> SimpleNamespace:
        name = Path(stdout.name).stem
        state.runs.append(name)
        stdout.write(f"table of {name}\n")
        return SimpleNamespace(returncode=int(name in state.spills))

    monkeypatch.setattr(matrix, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "COMMITTED", state.out)
    monkeypatch.setattr(stamps, "stamp", lambda name, commit: state.stamped.append(name))
    monkeypatch.setattr(stamps, "write_table", lambda: None)
    return state


def test_matrix_writes_all_tables_and_their_stamp_or_none(fake: SimpleNamespace) -> None:
    fake.out.mkdir()
    (fake.out / "old.txt").touch()
    fake.spills = {"norm"}
    assert matrix.main([]) == 1 and fake.stamped == []
    assert fake.runs == [*matrix.TABLES] and [*fake.out.iterdir()] == [fake.out / "old.txt"]
    fake.spills = set()
    assert matrix.main([]) == 0 and fake.stamped == ["compiled"]
    assert fake.runs == [*matrix.TABLES, "norm"], "what was made before is not made again"
    files = {path.relative_to(fake.out).as_posix() for path in fake.out.rglob("*") if path.is_file()}
    assert files == {f"triton-{triton.__version__}/{name}.txt" for name in matrix.TABLES}


def test_matrix_leaves_the_tables_where_only_a_part_is_compiled(
    fake: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        matrix.main(["--suite", "tiny"])
    assert "give --out DIR" in capsys.readouterr().err and fake.runs == []
    assert matrix.main(["--suite", "tiny", "--out", str(tmp_path / "part")]) == 0
    assert fake.stamped == [] and not fake.out.exists() and (tmp_path / "part").exists()


def test_a_kernel_that_spills_fails_the_command_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def kernel(target: str, spills: int) -> compiled.Kernel:
        return compiled.Kernel(target, "slide_kernel", "float16", "64 x 16", (), 255, spills, 0, "", 0.3)

    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    monkeypatch.setattr(sys, "argv", ["python -m gconv kernels"])
    monkeypatch.setattr(command, "_compile", lambda arguments: [kernel("sm_90", 0), kernel("gfx942", 8)])
    assert command.main() == 0
    monkeypatch.setattr(command, "_compile", lambda arguments: [kernel("sm_90", 0), kernel("sm_80", 8)])
    assert command.main() == 1
    said = capsys.readouterr().err
    assert "error: 1 of 2 kernels spill" in said and "sm_80" in said and "sm_90" not in said


def test_main_loop_is_the_longest_innermost_one() -> None:
    listing = [
        ".L_x_0:",
        "MOV",
        ".L_x_1:",
        "HMMA",
        "LDG",
        "@P0 BRA (.L_x_1)",
        ".L_x_2:",
        "@P1 BRA (.L_x_2)",
        "BRA (.L_x_0)",
    ]
    assert machine_code.main_loop(listing) == ["HMMA", "LDG", "@P0 BRA (.L_x_1)"]
    assert machine_code.main_loop(["MOV", "EXIT"]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--targets", "sm_91"], "invalid choice: 'sm_91'"),
        (["--dtypes", "float64"], "invalid choice: 'float64'"),
    ],
)
def test_wrong_names_are_refused(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m gconv kernels", *options])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_interpreter_compiles_nothing_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("triton.knobs.runtime.interpret", True)
    monkeypatch.setattr(sys, "argv", ["python -m gconv kernels"])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: TRITON_INTERPRET is set")
