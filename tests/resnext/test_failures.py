"""Failures: before training nothing is written; during and after it, the error explains what is saved."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from commands import SMALL, Run, one_line, rows
from PIL import Image
from torch.utils.data import get_worker_info

from resnext import checkpoint, plots
from resnext.config import Network, Options, Recipe, Settings, Source, build
from resnext.data import Data, ImageFiles, ImageFormat
from resnext.engine import Engine
from resnext.errors import UserError
from resnext.world import World

CPU = World(torch.device("cpu"))
ONE_BY_ONE = Network((1, 1, 1, 1), 2, 2, 4)  # shrinks 8 x 8 pixels to 1 x 1
LARGER = replace(ONE_BY_ONE, repeats=(1, 1, 0, 0))  # shrinks them to 4 x 4
KEPT = "checkpoint.pt is saved (2 epochs); pass --resume to continue from it"


def fails(error: Exception) -> Callable[..., None]:
    def failing(*arguments: object, **options: object) -> None:
        raise error

    return failing


FAILURES = (
    ValueError("\n5_to_\n     ^\nParseException"),
    OSError(errno.ENOSPC, "No space left on device", "picture.png"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory\nframe #0"),
)


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write empty files instead of plots, which take a second each."""
    for name in ("training_curves", "mistakes", "confusion"):
        monkeypatch.setattr(plots, name, lambda path, *rest: path.touch())


@pytest.mark.parametrize("stem", ["small", "imagenet"])
@pytest.mark.parametrize("repeats", [(1, 0, 0, 0), (1, 1, 1, 1)])
@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("fused", [False, True])
def test_a_training_is_refused_exactly_where_a_step_would_fail(
    digits: Data, stem: str, repeats: tuple[int, ...], size: int, fused: bool
) -> None:
    """Batch norm needs at least two values per channel."""
    network = replace(ONE_BY_ONE, stem=stem, repeats=repeats, fused=fused)
    data = replace(digits, format=ImageFormat(1, size, (0.5,), (0.5,)))

    def refused(images: int) -> bool:
        try:
            Engine(Settings(Source("digits"), network, Recipe(1, 4, images)), data, CPU, Options())
        except UserError:
            return True
        return False

    def would_fail(images: int) -> bool:
        try:
            build(network, 10, 1).train()(torch.rand(images, 1, size, size))
        except ValueError:
            return True
        return False

    shrinks = (4 if stem == "imagenet" else 1) * (8 if repeats[-1] else 1)
    assert refused(1) == would_fail(1) == (size <= shrinks)
    assert not refused(2) and not would_fail(2)


def test_a_training_that_cannot_work_is_refused_before_anything_is_written(run: Run, trained: Path) -> None:
    kept = trained / "kept"
    kept.touch()
    datasets.photographs(Path("photos"), train=2, test=1)
    small = ("--cardinality", "2", "--base-width", "2", "--stem-width", "4", "--epochs", "1")
    digits = ("train", "--data", "digits", *small)
    photos = ("train", "--data", "folder", "photos", "--image-size", "32", "--workers", "0", *small)
    for arguments, *parts in (
        ((*digits, "--micro-batch", "1"), "--batch-size 64, --micro-batch 1: ", "8 x 8 pixels to 1 x 1"),
        ((*digits, "--micro-batch", "1", "--fused"), "--micro-batch 1: ", "at least 2 images per pass"),
        ((*photos, "--batch-size", "2", "--micro-batch", "1"), "--micro-batch 1: ", "32 x 32 pixels to"),
    ):
        for more in (("--overwrite",), ("--name", "new")):
            code, _, err = run(*arguments, *more)
            assert code == 2, arguments
            one_line(err, *parts)
    assert kept.exists() and os.listdir("runs") == ["demo"]
    assert (
        run(*digits, "--repeats", "1,0,0,0", "--batch-size", "300", "--micro-batch", "100", "--overwrite")[0]
        == 0
    )


def test_processes_that_get_one_image_each_are_refused(digits: Data) -> None:
    settings = Settings(Source("digits"), ONE_BY_ONE, Recipe(1, 2, 2))
    with pytest.raises(UserError, match=r"^--batch-size 2, --micro-batch 2, 2 processes: "):
        Engine(settings, digits, replace(CPU, size=2), Options())


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_what_fails_after_training_costs_only_itself(
    run: Run, trained: Path, sketched: None, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """If a plot or the samples fail, the others are written, and --resume writes the missing one."""
    files = {"curves.png", "mistakes.png", "confusion.png", "samples"}
    places = {
        "resnext.plots.training_curves": "curves.png",
        "resnext.plots.mistakes": "mistakes.png",
        "resnext.plots.confusion": "confusion.png",
        "resnext.run.write_image": "samples",
    }
    for place, name in places.items():
        for path in trained.glob("*.png"):
            path.unlink()
        with monkeypatch.context() as broken:
            broken.setattr(place, fails(error))
            code, _, err = run("train", "--resume")
        assert code == 2
        one_line(err, f"couldn't write {name} (", KEPT)
        assert {path.name for path in trained.iterdir()} >= files - {name}
    assert checkpoint.load(trained).epochs == 2
    code, out, err = run("train", "--resume")
    assert (code, err) == (0, "") and "written to runs/demo" in out
    assert {path.name for path in trained.iterdir()} >= files


def test_the_network_is_kept_before_it_is_drawn_or_tested(
    run: Run, sketched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        for name in ("training_curves", "mistakes", "confusion"):
            broken.setattr(plots, name, fails(ValueError("broken")))
        code, _, err = run("train", *SMALL)
    assert code == 2
    one_line(
        err, "couldn't write curves.png (ValueError: broken), mistakes.png (ValueError: broken), conf", KEPT
    )
    assert checkpoint.load(Path("runs/demo")).epochs == 2
    for error in FAILURES[0], FAILURES[3]:
        with monkeypatch.context() as broken:
            broken.setattr("resnext.run.evaluate", fails(error))
            code, _, err = run("train", *SMALL, "--overwrite")
        assert code == 2
        one_line(err, "testing", "checkpoint.pt is saved (1 epochs); pass --resume to continue from it")
        assert checkpoint.load(Path("runs/demo")).epochs == 1
    code, _, err = run("train", "--resume")
    assert (code, err) == (0, "") and len(rows(Path("runs/demo/summary.csv"))) == 2


def test_what_fails_of_an_evaluation_or_an_export_costs_only_itself(
    run: Run, trained: Path, sketched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (trained / "checkpoint.pt").read_bytes()
    for error in FAILURES:
        (trained / "classes.csv").unlink(missing_ok=True)
        with monkeypatch.context() as broken:
            broken.setattr(plots, "confusion", fails(error))
            code, out, err = run("evaluate")
        assert code == 2 and "top-1 accuracy" in out and len(rows(trained / "classes.csv")) == 10
        one_line(err, "couldn't write runs/demo/confusion.png (", "classes.csv is written")
        with monkeypatch.context() as broken:
            broken.setattr(torch.export, "export", fails(error))
            code, out, err = run("export", "-o", "a.pt2", "-o", "b.safetensors")
        assert code == 2 and "wrote b.safetensors" in out and Path("b.safetensors").exists()
        one_line(err, "couldn't write a.pt2 (", "runs/demo/checkpoint.pt is unchanged")
        assert not Path("a.pt2").exists() and not list(Path().glob(".*"))
    assert (trained / "checkpoint.pt").read_bytes() == before


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("end", "how"),
    [
        (lambda: kill(signal.SIGKILL), "Killed"),
        (lambda: kill(signal.SIGBUS), "Bus error"),
        (lambda: os._exit(1), "exit code 1"),
    ],
    ids=["killed", "bus error", "exit"],
)
def test_a_worker_that_the_system_ends_is_one_line(
    run: Run, sketched: None, monkeypatch: pytest.MonkeyPatch, end: Callable[[], None], how: str
) -> None:
    """As when memory runs out: before the first checkpoint, after it, and in ``evaluate``."""
    datasets.photographs(Path("photos"), classes=2, train=4, test=2)
    photos = ("--data", "folder", "photos", "--image-size", "16", "--batch-size", "4", "--micro-batch", "4")
    read, kept = ImageFiles.read, Path("runs/demo/checkpoint.pt").absolute()

    def ended(after: bool) -> Callable:
        def reading(self: ImageFiles, *arguments: object, **options: object) -> torch.Tensor:
            if get_worker_info() and kept.exists() == after:
                end()
            return read(self, *arguments, **options)

        return reading

    for after, says in (
        (False, "nothing has been saved yet"),
        (True, "checkpoint.pt is saved (1 epochs); pass --res"),
    ):
        monkeypatch.setattr(ImageFiles, "read", ended(after))
        code, _, err = run("train", *photos, *SMALL, "--workers", "1", "--overwrite")
        assert code == 2
        one_line(err, how, "memory", "--workers", says)
    code, _, err = run("evaluate", "--workers", "1")
    assert code == 2
    one_line(err, how, "memory", "--workers")
    monkeypatch.setattr(ImageFiles, "read", read)
    code, _, err = run("train", "--resume", "--workers", "1")
    assert (code, err) == (0, "") and checkpoint.load(kept).epochs == 2


@pytest.mark.parametrize(
    "error",
    [*FAILURES[2:], torch.OutOfMemoryError("CUDA out of memory.\nTried")],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_is_one_line(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """While a network is built, trained or used."""
    for arguments, place, *parts in (
        (("train", "--name", "x"), "resnext.engine._optimizer", "--micro-batch"),
        (
            ("train", "--name", "x"),
            "resnext.engine.Engine.step",
            "--micro-batch",
            "nothing has been saved yet",
        ),
        (("evaluate",), "resnext.evaluation._judge", "network"),
        (("predict", "runs/demo/samples"), "resnext.model.ResNeXt.forward", "network"),
    ):
        with monkeypatch.context() as broken:
            broken.setattr(place, fails(error))
            code, _, err = run(*arguments)
        assert code == 2
        one_line(err, "out of memory", *parts)


def test_a_worker_without_memory_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.photographs(Path("photos"), classes=2, train=4, test=2)
    monkeypatch.setattr(Image.Image, "resize", fails(MemoryError()))
    photos = ("--data", "folder", "photos", "--image-size", "16", "--batch-size", "4", "--micro-batch", "4")
    for workers in ("0", "1"):
        code, _, err = run("train", *photos, *SMALL, "--workers", workers, "--overwrite")
        assert code == 2
        one_line(err, "out of memory", "nothing has been saved yet")
