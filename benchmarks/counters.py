"""``python -m benchmarks counters``: hardware counters of the kernels, read by Nsight Compute.

Nsight Compute runs this module as a program, which runs each pass once while it is watching.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.sources import ROOT
from gconv.geometry import ConvGeometry
from gconv.measure.problem import Problem

# By name in a row: the metric of Nsight Compute, and the factor that converts it from its base unit.
METRICS = {
    "microseconds": ("gpu__time_duration.sum", 1e-3),
    "registers": ("launch__registers_per_thread", 1),
    "programs": ("launch__grid_size", 1),
    "warps_resident": ("sm__warps_active.avg.per_cycle_active", 1),
    "issue_slots_percent": ("sm__inst_issued.avg.pct_of_peak_sustained_active", 1),
    "tensor_cores_percent": ("sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active", 1),
    "dram_read_mb": ("dram__bytes_read.sum", 1e-6),
    "dram_written_mb": ("dram__bytes_write.sum", 1e-6),
    "dram_percent": ("dram__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "l2_percent": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "l2_requests_m": ("lts__t_requests_srcunit_tex.sum", 1e-6),
    "l2_sectors_m": ("lts__t_sectors_srcunit_tex.sum", 1e-6),
    "l2_tags_percent": ("lts__t_tag_requests.avg.pct_of_peak_sustained_elapsed", 1),
    "l1_hit_percent": ("l1tex__t_sector_hit_rate.pct", 1),
    "l1_tags_a_cycle": ("l1tex__t_requests.avg.per_cycle_active", 1),
    "l1_wavefronts_percent": ("l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_active", 1),
    "shared_wavefronts_m": ("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum", 1e-6),
    "bank_conflicts_m": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", 1e-6),
}
ALWAYS_THERE = (
    "launch__"  # prefix of metrics of a launch: Nsight Compute always has them, but doesn't list them
)


@dataclass(frozen=True)
class CounterRow:
    """The counters of one kernel of a pass.

    Args:
        suite, layer, batch, type, pass_: the pass that was run, on gconv's kernels in channels_last.
        kernel: name of the kernel. A pass launches one or two.
        counts: the counters by their key in ``METRICS``, as far as this GPU and this version of Nsight
            Compute have them.
        problem: what went wrong, or None.
    """

    suite: str
    layer: str
    batch: int
    type: str
    pass_: str
    kernel: str
    counts: dict[str, float]
    problem: str | None = None


def find_profiler() -> str | None:
    """Return the path of Nsight Compute's ``ncu``, or None if it isn't installed."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "ncu"
    return shutil.which("ncu") or (str(toolkit) if toolkit.exists() else None)


def available(profiler: str) -> dict[str, tuple[str, float]]:
    """Return the ``METRICS`` that the profiler supports on this GPU: it fails if asked for others."""
    listed = subprocess.run([profiler, "--query-metrics"], capture_output=True, text=True).stdout
    known = {line.split()[0] for line in listed.splitlines() if line.strip()}
    return {
        name: (metric, factor)
        for name, (metric, factor) in METRICS.items()
        if metric.startswith(ALWAYS_THERE) or metric.partition(".")[0] in known
    }


def measure(
    cases: Sequence[tuple[tuple, Problem]], profiler: str, metrics: dict[str, tuple[str, float]]
) -> list[CounterRow]:
    """Read the counters of the kernels of several passes in one run of the profiler."""
    with tempfile.TemporaryDirectory() as folder:
        started, counted = Path(folder, "started.json"), Path(folder, "counted.csv")
        problems = json.dumps([asdict(problem) for _, problem in cases])
        command = [
            *(profiler, "--csv", "--page", "raw", "--print-units", "base", "--log-file", str(counted)),
            *("--profile-from-start", "off", "--clock-control", "none"),
            *("--metrics", ",".join(metric for metric, _ in metrics.values())),
            *(sys.executable, "-m", "benchmarks.counters", problems, str(started)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode or not started.exists():
            log = counted.read_text() if counted.exists() else ""
            problem = complaint(done.stdout + done.stderr + log) or f"exit code {done.returncode}"
            return [CounterRow(*case, "", {}, problem) for case, _ in cases]
        started_by = zip(cases, json.loads(started.read_text()), strict=True)
        kernels = [(case, name) for (case, _), names in started_by for name in names]
        rows = list(read_counts(counted.read_text().splitlines(), metrics))
        if [name for _, name in kernels] != [name for name, _ in rows]:
            return [
                CounterRow(*case, "", {}, "the profiler saw different kernels from those that were launched")
                for case, _ in cases
            ]
        return [
            CounterRow(*case, name, counts) for (case, name), (_, counts) in zip(kernels, rows, strict=True)
        ]


def read_counts(
    lines: Iterable[str], metrics: dict[str, tuple[str, float]]
) -> Iterable[tuple[str, dict[str, float]]]:
    """Yield each kernel in the profiler's table, in order, with its counters."""
    table = csv.DictReader(line for line in lines if line.startswith('"'))
    next(table, None)  # the row with the units
    for row in table:
        counts = {}
        for name, (metric, factor) in metrics.items():
            with suppress(KeyError, ValueError):  # a metric can be missing or "n/a"
                counts[name] = round(float(row[metric].replace(",", "")) * factor, 4)
        yield row["Kernel Name"].partition("(")[0], counts


def complaint(text: str) -> str:
    """Return the profiler's first error in ``text``, or the last line that isn't empty if there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("==ERROR==")), lines[-1] if lines else "")


def start_all(problems: Sequence[Problem], device: torch.device) -> list[list[str]]:
    """Run each pass once while the profiler is watching, and return the names of its kernels."""
    from triton import knobs

    names: list[list[str]] = []

    def note(metadata: Any) -> None:
        names[-1].append(metadata.get()["name"])

    for problem in problems:
        names.append([])
        with problem.precision():
            operands = problem.draw(device)
            problem.run(operands, "triton")  # compiles
            torch.cuda.synchronize()
            knobs.runtime.launch_enter_hook.add(note)
            torch.cuda.profiler.start()
            problem.run(operands, "triton")
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            knobs.runtime.launch_enter_hook.remove(note)
    return names


def _problem(fields: dict[str, Any]) -> Problem:
    """Return the problem with these fields, in which JSON has turned tuples into lists."""
    return Problem(fields["pass_"], ConvGeometry.of(**fields["geometry"]), fields["type"])


if __name__ == "__main__":
    problems = [_problem(fields) for fields in json.loads(sys.argv[1])]
    Path(sys.argv[2]).write_text(json.dumps(start_all(problems, torch.device("cuda"))))
