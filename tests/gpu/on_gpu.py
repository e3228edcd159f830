"""``make gpu``: run all tests that need a GPU in many processes, and the kernels under compute-sanitizer."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

from gpu_record import INTERVAL, Record
from shard import Collected, Finished, Share, Started, run_share

TESTS = Path(__file__).parents[1]
DESCRIPTION = """\
Run the tests marked `gpu` on the GPU of this machine, in three steps:

  1. the tests that aren't marked `timing`, in parallel, because compiling kernels takes most of the time
  2. the tests marked `timing`, one after the other, with nothing else running
  3. tests/gpu/sanitize.py, which runs every kernel, under compute-sanitizer if that is on the PATH

Examples:

  python3 tests/gpu/on_gpu.py --out runs/gpu.json
  python3 tests/gpu/on_gpu.py --out runs/gpu.json --minutes 8
  python3 tests/gpu/on_gpu.py tests/gpu/test_gpu_fusion.py

This needs torch, Triton, NumPy and pytest. Tests that need another package are skipped and name it. Failures
are printed as they come. With --out, run the same command again to continue where it stopped: tests that have
passed with the same commit, GPU, torch and Triton don't run again, unless files differ from the commit.

Exit code: 0 if all tests passed or were skipped, 1 if one failed or none ran, 3 if it was stopped.
"""
ENVIRONMENT = {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # no plugin is needed, and importing them takes a second
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # there are enough processes already
}
DAY = 24 * 60  # minutes
MARKED = re.compile(r"^(pytestmark = \[?\s*|@)pytest\.mark\.gpu\b", re.MULTILINE)
ENDED = (0, 1, 5)  # exit codes of a complete pytest run: all passed, some failed, no tests


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
    except (TimeoutError, subprocess.TimeoutExpired):
        record.stopped = f"stopped after {parsed.minutes:g} minutes"
    except KeyboardInterrupt:
        record.stopped = "interrupted"
    record.write()
    return record.conclude()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = max(1, len(os.sched_getaffinity(0)) - 2)
    parser.add_argument(
        "tests", type=Path, nargs="*", metavar="FILE", help="files with tests to run (default: all)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=cores,
        metavar="N",
        help=f"number of processes for step 1 (default: {cores}, the number of cores - 2)",
    )
    parser.add_argument(
        "--minutes", type=float, default=DAY, metavar="M", help="stop after M minutes (default: a day)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON file for the results (default: they aren't saved)"
    )
    parsed = parser.parse_args(arguments)
    if parsed.processes < 1:
        parser.error(f"--processes must be a positive integer, got {parsed.processes}")
    if not parsed.minutes > 0:
        parser.error(f"--minutes must be a positive number of minutes, got {parsed.minutes:g}")
    return parsed


def marked_files() -> list[Path]:
    """Return the files with tests marked `gpu`. Collecting all files would take each process seconds."""
    return [path for path in sorted(TESTS.rglob("test_*.py")) if MARKED.search(path.read_text())]


class Shard:
    """This process's view of a process that runs a share of the tests.

    Attributes:
        connection: receives its messages.
        todo: the tests that it hasn't run yet.
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
        end.close()  # so that only the other process has it open, and it closes when that process ends

    def listen(self) -> bool:
        """Handle a message; return False if it was the last."""
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
        """Start another process if this one ended before its last test, but made progress."""
        self.process.join()
        self.connection.close()
        message = f"pytest ended with exit code {self.process.exitcode}\n{self.log.read_text()}"
        if self.running is not None:
            self._settle(Finished(self.running, "failed", 0.0, message))
        elif self.process.exitcode not in ENDED or (self.todo and not self.progressed):
            self.record.add_problem(message)
        if not self.progressed:
            self.todo.clear()
        if self.todo:
            self._start()
        return bool(self.todo)

    def stop(self) -> None:
        """Kill the process and those that it has started."""
        with suppress(ProcessLookupError):  # it might not lead a process group yet
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def run_tests(share: Share, record: Record, deadline: float) -> None:
    """Run each of the ``share.count`` shares in its own process.

    Raises:
        TimeoutError: at ``deadline``.
    """
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
    """Run ``sanitize.py`` under compute-sanitizer, if that is installed.

    Raises:
        TimeoutError, subprocess.TimeoutExpired: at ``deadline``.
    """
    program = shutil.which("compute-sanitizer")
    if record.sanitizer.get("outcome") == "passed":
        return
    if program is None:
        record.sanitizer = {"outcome": "not on PATH"}
        return
    start = time.monotonic()
    command = [program, "--error-exitcode", "1", sys.executable, str(TESTS / "gpu" / "sanitize.py")]
    paths = os.pathsep.join(filter(None, (str(TESTS.parent), os.environ.get("PYTHONPATH"))))
    options = {"env": os.environ | {"PYTHONPATH": paths, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}}
    with tempfile.TemporaryFile("w+") as log:
        options |= {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        with subprocess.Popen(command, **options) as process:
            try:
                process.wait(_left(deadline))
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)  # kills the sanitizer and the program that it runs
                raise
        log.seek(0)
        record.take_sanitizer(process.returncode, log.read(), time.monotonic() - start)


def _left(deadline: float) -> float:
    """Return the seconds until ``deadline``; raise TimeoutError if it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS.parent))  # so that gconv doesn't have to be installed
    sys.exit(main())
