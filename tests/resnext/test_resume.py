"""Resumed trainings: after a kill or a signal at any moment, they end with identical bits."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import datasets
import pytest
import torch

from resnext import checkpoint
from resnext.__main__ import main
from resnext.files import part_of

# Ten images per step and 20 steps per epoch, on a network that takes some time to write.
SMALL = (
    *("--epochs", "3", "--batch-size", "10", "--device", "cpu"),
    *("--repeats", "1,1,0,0", "--stem-width", "24", "--cardinality", "4", "--base-width", "8"),
    *("--checkpoint-steps", "2", "--ema", "0.9", "--mixup", "0.2", "--cutmix", "1"),
)
# Processes start with everything imported, because imports take longer than the tests.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["resnext.cli", "kornia.augmentation", "torch._dynamo"])


def command_line(folder: Path, log: Path, arguments: tuple[str, ...]) -> None:
    """Run ``resnext ARGUMENTS`` in ``folder`` and write its output to ``log``; runs in a new process."""
    os.setsid()  # a new group, so that a signal can be sent to its workers too
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    torch.set_num_threads(1)
    sys.argv = ["resnext", *arguments]
    main()


def start(
    folder: Path, name: str, *more: str, data: str = "cifar10", where: str = "cifar.tar.gz"
) -> ForkServerProcess:
    """Start ``resnext train`` on data in ``folder``, in a process that SIGKILL ends without cleanup."""
    arguments = ("train", "--data", data, str(folder / where), *SMALL, "--name", name, *more)
    process = SERVER.Process(target=command_line, args=(folder, folder / f"{name}.log", arguments))
    (folder / f"{name}.log").unlink(missing_ok=True)
    process.start()
    return process


def wait_for_the_table(process: ForkServerProcess, folder: Path, name: str) -> None:
    log = folder / f"{name}.log"
    while not log.exists() or "train loss" not in log.read_text():
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)


def ended(process: ForkServerProcess, folder: Path, name: str) -> tuple[int, str]:
    """Wait for the process, and return its exit code and output."""
    process.join(120)
    return process.exitcode, (folder / f"{name}.log").read_text()


def without_times(path: Path) -> list[dict[str, str]]:
    rows = csv.DictReader(path.read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def equal(a: object, b: object) -> bool:
    """Return whether nested dictionaries and lists of tensors are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("resume")
    datasets.cifar10_binary(folder / "cifar.tar.gz")
    code, printed = ended(start(folder, "whole"), folder, "whole")
    assert code == 0, printed
    return folder


def assert_the_same_run(folder: Path, name: str) -> None:
    whole, other = (checkpoint.load(folder / "runs" / run) for run in ("whole", name))
    for part in ("weights", "epochs", "classes", "format"):
        assert equal(getattr(whole, part), getattr(other, part)), part
    assert equal(whole.training["state"], other.training["state"]), (
        "optimizer, average, generators or position differ"
    )
    for file in ("steps.csv", "summary.csv"):
        paths = (folder / "runs" / run / file for run in ("whole", name))
        assert len(set(map(str, map(without_times, paths)))) == 1, file


@pytest.mark.long
def test_killed_at_ten_random_moments_it_goes_on_to_the_bit(uninterrupted: Path) -> None:
    folder, moments = uninterrupted / "runs" / "killed", random.Random(0)
    part, while_writing, positions = part_of(folder / checkpoint.FILE_NAME), 0, set()
    for kill in range(10):
        part.unlink(missing_ok=True)  # the killed process left it
        process = start(uninterrupted, "killed", "--resume")
        wait_for_the_table(process, uninterrupted, "killed")
        time.sleep(moments.uniform(0, 0.6))
        while kill % 2 and not part.exists() and process.is_alive():
            pass  # wait until a checkpoint is being written
        process.kill()
        code, printed = ended(process, uninterrupted, "killed")
        assert code == -signal.SIGKILL, printed
        while_writing += part.exists()
        positions.add(checkpoint.load(folder).epochs if (folder / checkpoint.FILE_NAME).exists() else 0)
    assert while_writing >= 3 and len(positions) >= 4, (while_writing, positions)
    code, printed = ended(start(uninterrupted, "killed", "--resume"), uninterrupted, "killed")
    assert code == 0 and "error" not in printed, printed
    assert_the_same_run(uninterrupted, "killed")


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_signal_ends_the_step_and_keeps_it(uninterrupted: Path, number: signal.Signals) -> None:
    folder, name = uninterrupted, number.name
    process = start(folder, name)
    wait_for_the_table(process, folder, name)
    time.sleep(0.3)
    os.kill(process.pid, number)
    code, printed = ended(process, folder, name)
    assert code == 128 + number, printed
    assert f"interrupted: runs/{name}/checkpoint.pt is saved" in printed and "; pass --resume to" in printed
    assert 0 < checkpoint.load(folder / "runs" / name).epochs < 3
    code, printed = ended(start(folder, name, "--resume"), folder, name)
    assert code == 0, printed
    assert_the_same_run(folder, name)


def test_a_signal_to_the_whole_group_leaves_the_workers_to_end_with_the_step(tmp_path: Path) -> None:
    """As torchrun and SLURM do it, the signal also reaches the processes that decode images."""
    datasets.photographs(tmp_path / "photos", train=40)
    more = ("--image-size", "32", "--workers", "1", "--epochs", "50")
    process = start(tmp_path, "group", *more, data="folder", where="photos")
    wait_for_the_table(process, tmp_path, "group")
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)
    code, printed = ended(process, tmp_path, "group")
    assert code == 128 + signal.SIGTERM and "checkpoint.pt is saved" in printed, printed
    assert 0 < checkpoint.load(tmp_path / "runs" / "group").epochs < 50
