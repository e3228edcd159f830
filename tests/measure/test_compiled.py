"""Compiling kernels for GPUs that aren't there: a sample matches the committed tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import triton
from compiled_tables import PINNED, ROOT, RUN_MATRIX, kept, read_table, spilling

from gconv.measure import compiled, machine_code

# One tile of each kernel in each form and type, for the five GPUs in turn (or the next one that runs the
# kernel). Then the command itself, on three kernels. Without fusion only float16: the tables have all types.
SAMPLE = """
import json
import sys
from itertools import cycle
from gconv.measure import compiled
from gconv.commands.kernels import main, table
from gconv.measure.problem import TYPES
from gconv.measure.suites import QUICK, REAL

targets, tables = cycle(compiled.TARGETS), {}
for form in compiled.FORMS:
    suites, types = (REAL, ["float16"]) if form == "plain" else (QUICK, list(TYPES))
    found = {}
    for job in compiled.find_jobs(suites, types, compiled.TARGETS, form):
        found.setdefault((job.dtype, job.launch.kernel.__name__), {}).setdefault(job.target, job)
    jobs = [next(by_target[t] for t in targets if t in by_target) for by_target in found.values()]
    tables[form] = table([compiled.compile_job(job) for job in jobs])
print(json.dumps(tables))
# Tuning compiles like this on a GPU that isn't among the targets.
other = compiled.compile_job(next(iter(compiled.find_jobs(["tiny"], ["float16"], ["sm_89"]))))
assert other.registers and other.lines and other.holds is None
options = "--suite tiny --targets sm_90 --form residual --json --processes 1"
sys.argv = ["python -m gconv kernels", *options.split()]
sys.exit(main())
"""

STRIPS, WEIGHT = (f"{name}_kernel, stride" for name in ("strips", "strips_weight"))


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
            other = [row for row in rows if row["type"] == "float16" and row not in table]
            assert not other, f"{form}: {other}; {RUN_MATRIX}"
    found = json.loads(by_command)
    assert found["triton"] == triton.__version__
    layers = [(kernel["name"], kernel["layers"]) for kernel in found["kernels"]]
    one, two = "16/4, 6x6: forward", "16/4, 3x3, stride 2: forward"
    assert layers == [("pack_kernel", [one, two]), (f"{STRIPS} 1", [one]), (f"{STRIPS} 2", [two])]


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
