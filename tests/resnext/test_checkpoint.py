"""Checkpoints: writes are atomic, the previous one is kept, damaged and foreign files are rejected."""

from __future__ import annotations

import errno
import os
import resource
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from resnext import checkpoint
from resnext.checkpoint import FILE_NAME, PREVIOUS, Checkpoint
from resnext.config import Options, Settings
from resnext.data import Data, Images
from resnext.errors import UserError
from resnext.files import part_of
from resnext.loop import train
from resnext.world import World


def save_again(saved: Checkpoint, path: Path, **changed: object) -> None:
    checkpoint.save(replace(saved, path=path, **changed))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system reject larger files, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_saved_is_loaded_and_the_one_before_is_kept(trained: Path, tmp_path: Path) -> None:
    saved = checkpoint.load(trained)
    path = tmp_path / FILE_NAME
    for epochs in (1.0, 2.5, 3.0):
        save_again(saved, path, epochs=epochs)
    again = checkpoint.load(path)
    assert (again.epochs, checkpoint.load(tmp_path / PREVIOUS).epochs) == (3.0, 2.5)
    assert again.settings == saved.settings and again.format == saved.format
    assert all(torch.equal(again.weights[key], value) for key, value in saved.weights.items())
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {FILE_NAME, PREVIOUS}
    assert not again.network().training


def test_a_full_disk_leaves_the_last_good_one(trained: Path) -> None:
    saved, size = checkpoint.load(trained), (trained / FILE_NAME).stat().st_size
    before = {name: (trained / name).read_bytes() for name in (FILE_NAME, PREVIOUS)}
    for part in (0.1, 0.5, 0.95):
        with files_of_at_most(int(size * part)), pytest.raises(OSError) as error:
            save_again(saved, trained / FILE_NAME, epochs=9.0)
        assert error.value.errno in (errno.EFBIG, errno.ENOSPC)
        assert error.value.filename == str(trained / FILE_NAME)
        assert before == {name: (trained / name).read_bytes() for name in before}
        assert not part_of(trained / FILE_NAME).exists(), "the unfinished file takes space on a full disk"


def test_training_on_a_full_disk_ends_in_a_line_that_says_what_is_kept(
    few: Data, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third checkpoint, in the middle of the second epoch, doesn't fit on the disk."""
    calls, save = [], checkpoint.save

    def filling(saved: Checkpoint) -> None:
        calls.append(saved)
        with files_of_at_most(20_000 if len(calls) == 3 else 2**30):
            save(saved)

    monkeypatch.setattr(checkpoint, "save", filling)
    settings = checkpoint.load(trained).settings
    folder, world, quiet = trained.parent / "full", World(torch.device("cpu")), Console(quiet=True)
    with pytest.raises(UserError) as error:
        train(settings, few, folder, world, quiet, options=Options(checkpoint_steps=10))
    assert str(error.value).startswith(f"{folder / FILE_NAME}: ") and "\n" not in str(error.value)
    assert "checkpoint.pt is saved (1 epochs); pass --resume to continue from it" in str(error.value)
    assert checkpoint.load(folder).epochs == 1.0


@pytest.mark.parametrize("name", ["config.json", "steps.csv", "checkpoint.part"])
def test_a_folder_that_cannot_be_written_to_is_named(few: Data, tmp_path: Path, name: str) -> None:
    """A folder is in the place of a file, because file modes don't stop root, who may run the tests."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "x").touch()
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        train(Settings(), few, tmp_path, World(torch.device("cpu")), Console(quiet=True))
    assert "nothing has been saved yet" in str(error.value) and "\n" not in str(error.value)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[:-2000])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        weights = torch.load(path)["weights"]["conv1.weight"].contiguous().numpy().tobytes()
        place = content.index(weights) + len(weights) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    elif how == "text":
        path.write_text("no checkpoint")
    elif how == "foreign":
        torch.save({"weights": {}}, path)
    elif how == "short":
        torch.save({"format": checkpoint.FORMAT}, path)
    else:
        kept = torch.load(path)
        kept["settings"]["network"]["cardinality"] = 4
        torch.save(kept, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        *(
            (how, "it is truncated, damaged or not a checkpoint")
            for how in ("cut", "empty", "flipped", "text")
        ),
        ("foreign", "it isn't a checkpoint of this version of resnext"),
        *((how, "its weights don't fit its network") for how in ("short", "other")),
    ],
)
def test_a_damaged_one_is_refused_by_name_and_the_one_before_offered(
    trained: Path, how: str, message: str
) -> None:
    path = trained / FILE_NAME
    damage(path, how)
    with pytest.raises(UserError) as error:
        checkpoint.load(trained)
    line = str(error.value)
    assert line.startswith(f"can't read {path}: {message}; the previous checkpoint is intact (2 epochs)")
    command = line.partition("`")[2].partition("`")[0]
    subprocess.run(shlex.split(command), check=True)
    assert checkpoint.load(trained).epochs == 2.0, "the one from before the last test"
    damage(path, how)
    with pytest.raises(
        UserError, match="train a network with `resnext train`, or pass the path of another checkpoint"
    ):
        checkpoint.load(trained)


def test_no_advice_would_replace_another_file(trained: Path) -> None:
    picture = trained / "curves.png"
    picture.write_text("a picture")
    with pytest.raises(UserError, match="or pass the path of another checkpoint"):
        checkpoint.load(picture)


def test_it_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"format": checkpoint.FORMAT, "settings": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="it is truncated, damaged or not a checkpoint"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_it_is_on_the_disk_before_it_has_its_name(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order a power cut loses nothing: sync the content, rename the file, sync the folder."""
    done, fsync, move = [], os.fsync, Path.replace

    def noting_sync(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    def noting_move(self: Path, target: Path) -> Path:
        done.append((self.name, target.name))
        return move(self, target)

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(Path, "replace", noting_move)
    save_again(checkpoint.load(trained), trained / FILE_NAME)
    part, other = part_of(Path(FILE_NAME)).name, part_of(Path(PREVIOUS)).name
    assert done == [part, (other, PREVIOUS), (part, FILE_NAME), trained.name]


def test_a_run_goes_on_with_its_own_data_alone(few: Data, trained: Path) -> None:
    saved = checkpoint.load(trained)
    other = replace(few, test=Images(few.test.images[:90], few.test.labels[:90]))
    with pytest.raises(
        UserError, match="with other data: held-out images must be 100, got 90; pass the images"
    ):
        train(
            saved.settings,
            other,
            trained,
            World(torch.device("cpu")),
            Console(quiet=True),
            resumed=saved,
        )
