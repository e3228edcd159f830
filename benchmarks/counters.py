"""What the hardware counts while a kernel runs, by Nsight Compute: ``python -m benchmarks counters``.

Nsight Compute runs this module as a program of its own, which starts each pass once for it to watch.
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

# By what a row calls them: metrics of Nsight Compute in its base units, and what to multiply them by.
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
ALWAYS_THERE = "launch__"  # metrics that Nsight Compute knows of a launch, and doesn't list


@dataclass(frozen=True)
class CounterRow:
    """What was counted of one kernel of a pass.

    Args:
        suite, layer, batch, type, pass_: what was run, on gconv's kernels in channels_last.
        kernel: its name; a pass starts one or two.
        counts: by name of ``METRICS``, those that this GPU and this version of Nsight Compute have.
        problem: what went wrong, if anything did.
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
    """Return where Nsight Compute's program is, None if it isn't there."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "ncu"
    return shutil.which("ncu") or (str(toolkit) if toolkit.exists() else None)


def available(profiler: str) -> dict[str, tuple[str, float]]:
    """Return those of ``METRICS`` that the profiler has for the GPU that is here: it refuses others."""
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
    """Count what the kernels of some passes do, in one run of the profiler."""
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
                CounterRow(*case, "", {}, "the profiler saw other kernels than were started")
                for case, _ in cases
            ]
        return [
            CounterRow(*case, name, counts) for (case, name), (_, counts) in zip(kernels, rows, strict=True)
        ]


def read_counts(
    lines: Iterable[str], metrics: dict[str, tuple[str, float]]
) -> Iterable[tuple[str, dict[str, float]]]:
    """Yield each kernel in the profiler's table, in its order, with its counts."""
    table = csv.DictReader(line for line in lines if line.startswith('"'))
    next(table, None)  # the units
    for row in table:
        counts = {}
        for name, (metric, factor) in metrics.items():
            with suppress(KeyError, ValueError):  # a metric may be missing, or "n/a"
                counts[name] = round(float(row[metric].replace(",", "")) * factor, 4)
        yield row["Kernel Name"].partition("(")[0], counts


def complaint(text: str) -> str:
    """Return the profiler's first error in ``text``, else the last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("==ERROR==")), lines[-1] if lines else "")


def start_all(problems: Sequence[Problem], device: torch.device) -> list[list[str]]:
    """Start each pass on the kernels once for the profiler to see; return the names of the kernels."""
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
    """Make a problem of its fields, of which JSON made lists."""
    return Problem(fields["pass_"], ConvGeometry.of(**fields["geometry"]), fields["type"])


if __name__ == "__main__":
    problems = [_problem(fields) for fields in json.loads(sys.argv[1])]
    Path(sys.argv[2]).write_text(json.dumps(start_all(problems, torch.device("cuda"))))
