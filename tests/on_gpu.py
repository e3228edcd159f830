"""``make gpu``: all tests that need a GPU, in many processes, and the kernels under compute-sanitizer."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from shard import Collected, Finished, Share, Started, run_share

TESTS = Path(__file__).parent
DESCRIPTION = """\
Runs the tests that are marked `gpu` on the GPU of this machine, in three steps:

  1. all but those marked `timing`, shared out over processes: compiling the kernels takes most of the time
  2. those marked `timing`, one after the other, with nothing beside them
  3. tests/sanitize.py, which starts every kernel, under compute-sanitizer if that is on PATH

It needs torch, Triton, NumPy and pytest. Tests that need more are skipped and name the package. Failures are
printed as they come. --out keeps the result of each test in a file. The same command then goes on where it
was stopped: what has passed with the same commit, GPU, torch and Triton does not run again, unless files
differ from the commit.

  python3 tests/on_gpu.py --out runs/gpu.json
  python3 tests/on_gpu.py --out runs/gpu.json --minutes 8
  python3 tests/on_gpu.py tests/test_gpu_fusion.py

Exit code: 0 if everything passed or was skipped, 1 if something failed or no test ran, 3 if it was stopped.
"""
ENVIRONMENT = {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # none is needed, and they take a second to import
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # there are enough processes
}
SAME = ("commit", "gpu", "torch", "triton")  # with which a test passed that need not run again
INTERVAL = 10  # seconds between lines of progress
LINES = 6  # of a failure that are printed
KEPT = 4000  # characters of a failure that are written
DAY = 24 * 60  # minutes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parsed = parse(arguments)
    os.environ.update(ENVIRONMENT)
    paths, deadline = tuple(map(str, parsed.tests or marked_files())), time.monotonic() + 60 * parsed.minutes
    record = Record(parsed.out)
    try:
        run_tests(Share(paths, "gpu and not timing", 0, parsed.processes), record, deadline)
        run_tests(Share(paths, "gpu and timing"), record, deadline)
        sanitize(record, deadline)
        record.stopped = None
    except TimeoutError:
        record.stopped = f"stopped after {parsed.minutes:g} minutes"
    except KeyboardInterrupt:
        record.stopped = "interrupted"
    record.write()
    return record.conclude()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = max(1, len(os.sched_getaffinity(0)) - 2)
    parser.add_argument("tests", type=Path, nargs="*", metavar="FILE", help="of tests; default: all")
    parser.add_argument(
        "--processes",
        type=int,
        default=cores,
        metavar="N",
        help=f"of step 1; default: {cores}, the cores - 2",
    )
    parser.add_argument(
        "--minutes", type=float, default=DAY, metavar="M", help="stop after M; default: a day"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of all results; default: not kept")
    parsed = parser.parse_args(arguments)
    if parsed.processes < 1 or not parsed.minutes > 0:
        parser.error("--processes and --minutes must be positive")
    return parsed


def marked_files() -> list[Path]:
    """Return the files with tests marked `gpu`: collecting the others would take seconds in each process."""
    return [path for path in sorted(TESTS.glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]


@cache
def environment() -> dict[str, Any]:
    """Return what the results depend on, as :func:`gconv.environment.environment` tells it."""
    import torch  # late: the processes import it in the meantime

    from gconv.environment import environment

    return environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


class Record:
    """The results, printed and written to ``path`` as they come.

    Args:
        path: a file of JSON; what an earlier run has passed is taken from it. None: the results are not kept.

    Attributes:
        tests: outcome, seconds and message of each test, or module that was not collected, by its node id.
        problems: what went wrong outside of tests.
        sanitizer: outcome, seconds and message of compute-sanitizer.
        stopped: why not everything has run, None where it has.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.tests: dict[str, dict[str, Any]] = {}
        self.problems: list[str] = []
        self.sanitizer: dict[str, Any] = {}
        self.stopped: str | None = "stopped"
        self.start = self.shown = time.monotonic()
        if path is not None and path.exists():
            self._read(json.loads(path.read_text()))

    def _read(self, earlier: dict[str, Any]) -> None:
        facts, before = environment(), earlier["environment"]
        commit = facts["commit"] or "-dirty"
        if commit.endswith("-dirty") or any(facts[name] != before.get(name) for name in SAME):
            print(f"{self.path} is of other code or another machine: everything runs again", flush=True)
            return
        self.tests = {name: test for name, test in earlier["tests"].items() if test["outcome"] == "passed"}
        if earlier["sanitizer"].get("outcome") == "passed":
            self.sanitizer = earlier["sanitizer"]
        print(f"{len(self.tests)} tests have passed before, see {self.path}", flush=True)

    @property
    def counts(self) -> Counter[str]:
        """How many tests have which outcome."""
        return Counter(test["outcome"] for test in self.tests.values())

    def take(self, result: Finished) -> None:
        """Keep a result, and print it if it is a failure."""
        known = {"outcome": result.outcome, "seconds": result.seconds}
        again = result.test in self.tests  # a module that cannot be collected, say
        self.tests[result.test] = known | ({"message": result.message[-KEPT:]} if result.message else {})
        if result.outcome == "failed" and not again:
            lines = [line for line in result.message.splitlines() if line.startswith("E ")]
            lines = lines or result.message.splitlines()[-LINES:]
            print(f"FAILED {result.test}", *lines[:LINES], sep="\n", flush=True)

    def take_sanitizer(self, done: subprocess.CompletedProcess[str], seconds: float) -> None:
        """Keep what compute-sanitizer found, and print it unless it found nothing."""
        outcome, said = "failed" if done.returncode else "passed", done.stdout[-KEPT:]
        self.sanitizer = {"outcome": outcome, "seconds": round(seconds, 1), "message": said}
        if done.returncode:
            print(f"FAILED compute-sanitizer\n{said}", flush=True)

    def add_problem(self, problem: str) -> None:
        """Keep and print what went wrong outside of tests."""
        self.problems.append(problem)
        print(problem, flush=True)

    def show_progress(self, left: int) -> None:
        """Print and write how far the tests are, every ``INTERVAL`` seconds; ``left`` are still to do."""
        if time.monotonic() < self.shown + INTERVAL:
            return
        self.shown = time.monotonic()
        counts = self.counts
        done, seconds = counts.total(), self.shown - self.start
        print(f"{done} of {done + left} tests, {counts['failed']} failed, {seconds:.0f} s", flush=True)
        self.write()

    def write(self) -> None:
        """Write everything that is known."""
        if self.path is None:
            return
        known = {
            "environment": environment(),
            "seconds": round(time.monotonic() - self.start, 1),
            "stopped": self.stopped,
            "counts": self.counts,
            "problems": self.problems,
            "sanitizer": self.sanitizer,
            "tests": self.tests,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(known, indent=1) + "\n")
        part.replace(self.path)

    def conclude(self) -> int:
        """Print what it came to, and return the exit code."""
        reasons = Counter(t["message"] for t in self.tests.values() if t["outcome"] == "skipped")
        for reason, count in reasons.items():
            print(f"skipped {count}: {reason}")
        counts, seconds = self.counts, time.monotonic() - self.start
        told = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))
        sanitizer = self.sanitizer.get("outcome", "not started")
        print(
            f"{told}; compute-sanitizer: {sanitizer}; {seconds:.0f} s",
            *filter(None, [self.stopped]),
            sep="; ",
        )
        if counts["failed"] or self.problems or sanitizer == "failed":
            return 1
        if self.stopped:
            return 3
        if not counts["passed"]:
            print("no test has passed: is there a GPU that PyTorch can use?", flush=True)
        return 0 if counts["passed"] else 1


class Shard:
    """A process that runs a share of the tests, from this side.

    Attributes:
        connection: where its messages come from.
        todo: tests that it has still to run.
    """

    def __init__(self, share: Share, record: Record, log: Path) -> None:
        self.share, self.record, self.log = share, record, log
        self.todo: set[str] = set()
        self.running: str | None = None
        self.settled: set[str] = set()
        self._start()

    def _start(self) -> None:
        self.collected = self.progressed = False
        self.connection, end = get_context("spawn").Pipe(duplex=False)
        share = replace(self.share, settled=frozenset(self.settled))
        self.process = get_context("spawn").Process(target=run_share, args=(share, end, self.log))
        self.process.start()
        end.close()  # the process holds the only one, which closes with it

    def listen(self) -> bool:
        """Handle a message; False once there will be no more."""
        try:
            message = self.connection.recv()
        except EOFError:
            return self._goes_on()
        match message:
            case Collected(tests):
                self.collected, self.todo = True, set(tests)
            case Started(test):
                self.running = test
            case Finished():
                self._settle(message)
        return True

    def _settle(self, result: Finished) -> None:
        self.progressed |= result.test in self.todo
        self.running = None
        self.todo.discard(result.test)
        self.settled.add(result.test)
        self.record.take(result)

    def _goes_on(self) -> bool:
        """Start another process if the last one has ended before its last test, and got somewhere."""
        self.process.join()
        self.connection.close()
        if self.collected and not self.todo:
            return False
        said = f"pytest ended with exit code {self.process.exitcode}\n{self.log.read_text()}"
        if self.running is not None:
            self._settle(Finished(self.running, "failed", 0.0, said))
        if not self.progressed:
            self.record.add_problem(said[-KEPT:])
            self.todo.clear()
        if self.todo:
            self._start()
        return bool(self.todo)

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.process.terminate()
        self.process.join()


def run_tests(share: Share, record: Record, deadline: float) -> None:
    """Run each of the ``share.count`` shares in a process of its own; TimeoutError at ``deadline``."""
    passed = frozenset(name for name, test in record.tests.items() if test["outcome"] == "passed")
    with tempfile.TemporaryDirectory() as folder:
        shards = [
            Shard(replace(share, number=i, passed=passed), record, Path(folder, f"{i}.log"))
            for i in range(share.count)
        ]
        running = list(shards)
        try:
            while running:
                ready = wait([shard.connection for shard in running], timeout=min(INTERVAL, _left(deadline)))
                running = [s for s in running if s.connection not in ready or s.listen()]
                record.show_progress(sum(len(shard.todo) for shard in shards))
        finally:
            for shard in running:
                shard.stop()


def sanitize(record: Record, deadline: float) -> None:
    """Run ``tests/sanitize.py`` under compute-sanitizer, if that is here; TimeoutError at ``deadline``."""
    program = shutil.which("compute-sanitizer")
    if record.sanitizer.get("outcome") == "passed":
        return
    if program is None:
        record.sanitizer = {"outcome": "not on PATH"}
        return
    start, timeout = time.monotonic(), _left(deadline)
    command = [program, "--error-exitcode", "1", sys.executable, str(TESTS / "sanitize.py")]
    paths = os.pathsep.join(filter(None, (str(TESTS.parent), os.environ.get("PYTHONPATH"))))
    uncached = {"PYTHONPATH": paths, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            env=os.environ | uncached,
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    record.take_sanitizer(done, time.monotonic() - start)


def _left(deadline: float) -> float:
    """Return the seconds until ``deadline``, and raise TimeoutError after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS.parent))  # gconv need not be installed
    sys.exit(main())
