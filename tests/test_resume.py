"""Killed at any moment, training goes on to the bit; a full disk leaves the last good checkpoint."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch

from resnext import checkpoint

ROOT = Path(__file__).parent.parent
# Ten images a step, 20 steps an epoch, on a network with something to write.
SMALL = (
    *(
        "--data",
        "cifar10",
        "--epochs",
        "3",
        "--batch-size",
        "10",
        "--device",
        "cpu",
        "--checkpoint-steps",
        "2",
    ),
    *("--repeats", "1,1,0,0", "--stem-width", "24", "--cardinality", "4", "--base-width", "8"),
    *("--ema", "0.9", "--mixup", "0.2", "--cutmix", "1"),
)
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "PATH": os.environ["PATH"],
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
}


def start(folder: Path, name: str, *more: str) -> subprocess.Popen:
    """``python -m resnext train`` on the archive in ``folder``."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "resnext",
            "train",
            *SMALL,
            str(folder / "cifar.tar.gz"),
            "--name",
            name,
            *more,
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Reads what it prints until ``text`` has come."""
    read = ""
    while text not in read:
        line = process.stdout.readline()
        assert line, read + process.stderr.read()
        read += line
    return read


def without_times(path: Path) -> list[dict[str, str]]:
    rows = csv.DictReader(path.read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def equal(a: object, b: object) -> bool:
    """To the bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    datasets.cifar10_binary(folder / "cifar.tar.gz")
    process = start(folder, "whole")
    _, err = process.communicate()
    assert process.returncode == 0, err
    return folder


def assert_the_same_run(folder: Path, name: str) -> None:
    whole, other = (checkpoint.load(folder / "runs" / run) for run in ("whole", name))
    for part in ("weights", "epochs", "classes", "format"):
        assert equal(getattr(whole, part), getattr(other, part)), part
    assert equal(whole.training["state"], other.training["state"]), (
        "optimiser, average, generators or position"
    )
    for file in ("steps.csv", "summary.csv"):
        paths = (folder / "runs" / run / file for run in ("whole", name))
        assert len(set(map(str, map(without_times, paths)))) == 1, file


def test_killed_at_ten_random_moments_it_goes_on_to_the_bit(uninterrupted: Path) -> None:
    folder, moments = uninterrupted / "runs" / "killed", random.Random(0)
    while_writing, positions = 0, set()
    for kill in range(10):
        process = start(uninterrupted, "killed", "--resume")
        wait_for(process, "train loss")
        time.sleep(moments.uniform(0, 0.25))
        if kill % 2:  # while a checkpoint is being written
            part = folder / checkpoint.PART
            while not part.exists() and process.poll() is None:
                pass
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the training ended before it was killed"
        process.communicate()
        while_writing += (folder / checkpoint.PART).exists()
        positions.add(checkpoint.load(folder).epochs if (folder / checkpoint.FILE_NAME).exists() else 0)
    assert while_writing >= 3 and len(positions) >= 4, (while_writing, positions)
    process = start(uninterrupted, "killed", "--resume")
    _, err = process.communicate()
    assert process.returncode == 0 and err == "", err
    assert_the_same_run(uninterrupted, "killed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_keeps_it(uninterrupted: Path, number: signal.Signals) -> None:
    process = start(uninterrupted, number.name)
    wait_for(process, "train loss")
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err == "", err
    assert f"interrupted: runs/{number.name}/checkpoint.pt is whole" in out and "--resume goes on" in out
    position = checkpoint.load(uninterrupted / "runs" / number.name).epochs
    assert 0 < position < 3
    process = start(uninterrupted, number.name, "--resume")
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert_the_same_run(uninterrupted, number.name)
