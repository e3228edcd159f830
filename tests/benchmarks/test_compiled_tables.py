"""The committed tables of compiled kernels: no spills, few instructions, and documentation that quotes them.

``make matrix`` compiles every kernel, which takes fifteen minutes, and writes the tables.
"""

from __future__ import annotations

import re

import pytest
from compiled_tables import PINNED, ROOT, RUN_MATRIX, kept, spilling

from benchmarks import matrix, stamps
from gconv.measure import compiled

OLDEST = re.search(r"triton==([\d.]+)", (ROOT / "Makefile").read_text())[1]
KEPT = [(version, name) for version in (PINNED, OLDEST) for name in matrix.TABLES]

# The lines of the tables in docs/kernels.md, and the source of their numbers: form, kernel, tile.
STRIPS, WEIGHT = (f"{name}_kernel, stride" for name in ("strips", "strips_weight"))
QUOTED = {
    "forward, input gradient, stride 1, Cg up to 16": (
        "plain", f"{STRIPS} 1", "strips, 16 x 4 pixels x 16 -> 16 channels, 8 packs, 8 warps, 4 stages"
    ),
    "forward, input gradient, stride 1, Cg up to 32": (
        "plain", f"{STRIPS} 1", "strips, 16 x 4 pixels x 32 -> 32 channels, 2 warps, 3 stages"
    ),
    "forward, stride 2, Cg up to 16": (
        "plain", f"{STRIPS} 2", "strips, 16 pixels x 16 -> 16 channels, 8 packs, 4 warps, 3 stages"
    ),
    "input gradient, stride 2, Cg up to 16": (
        "plain", "pairs_kernel", "pairs, 16 x 2 pixels x 16 -> 16 channels, 8 packs, 4 warps, 3 stages"
    ),
    "weight gradient, stride 1, Cg up to 16": (
        "plain", f"{WEIGHT} 1", "strips, 16 x 4 pixels x 16 -> 16 channels, 4 packs, 4 warps, 3 stages"
    ),
    "weight gradient, stride 1, Cg up to 32": (
        "plain", f"{WEIGHT} 1", "strips, 16 x 2 pixels x 32 -> 32 channels, 2 warps, 4 stages"
    ),
    "depthwise 3x3, forward, 144 channels": (
        "plain", "depthwise_slide_kernel", "depthwise-slide, 64 pixels x 16 channels, 4 warps"
    ),
    "depthwise 7x7, forward, 96 channels": (
        "plain", "depthwise_slide_kernel", "depthwise-slide, 16 pixels x 32 channels, 4 warps"
    ),
    "norm: forward, stride 1, Cg up to 16": (
        "norm", f"{STRIPS} 1", "strips, 16 x 4 pixels x 16 -> 16 channels, 4 packs, 4 warps, 3 stages"
    ),
    "norm: input gradient, stride 1, Cg up to 16": (
        "norm", f"{STRIPS} 1", "strips, 16 x 4 pixels x 16 -> 16 channels, 4 packs, 4 warps, 3 stages"
    ),
    "norm: weight gradient, stride 1, Cg up to 16": (
        "norm", f"{WEIGHT} 1", "strips, 16 x 4 pixels x 16 -> 16 channels, 4 packs, 4 warps, 3 stages"
    ),
}  # fmt: skip


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
    """16 bytes at a time. Copies of 8 bytes go through L1, and conflict in the banks of shared memory."""
    rows = [row for row in kept(PINNED, "plain") if (row["target"], row["type"]) == ("sm_90", "float16")]
    for kernel in ("strips", "pairs"):
        assert {row["ahead"] for row in rows if row["kernel"].startswith(kernel)} == {"L2"}, kernel


@pytest.mark.parametrize(
    ("kernel", "packs", "instructions", "moved", "lines", "operands"),
    [
        (f"{STRIPS} 1", 8, 0.23, 5, 40, 13),
        ("pairs_kernel", 8, 0.1, 3, 24, 8),
        (f"{WEIGHT} 1", 4, 0.3, 5, 40, 13),
    ],
)
def test_packs_cost_little_and_fill_a_gpu_once(
    kernel: str, packs: int, instructions: float, moved: float, lines: int, operands: int
) -> None:
    """Reloading weights or dy for each row of x, or narrow loads, would exceed these limits."""
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


def quoted_lines() -> dict[str, dict[str, str]]:
    """The lines of the tables of instructions in docs/kernels.md, by label."""
    lines, head, before = {}, None, ""
    for line in (ROOT / "docs" / "kernels.md").read_text().splitlines():
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


def test_the_documentation_quotes_the_tables() -> None:
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
    text = " ".join((ROOT / "docs" / "kernels.md").read_text().split())
    said = re.search(r"outputs: at ([\d.]+) each", text)[1]
    assert lines["forward, input gradient, stride 1, Cg up to 16"]["instructions"] == f"{said} per output"
