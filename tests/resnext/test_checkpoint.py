"""Checkpoints: written whole or not at all, the one before kept, nothing foreign or damaged read."""

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
    """What a full disk does: the system refuses what goes beyond."""
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
        assert not part_of(trained / FILE_NAME).exists(), "what is half written takes room on a full disk"


def test_training_on_a_full_disk_ends_in_a_line_that_says_what_is_kept(
    few: Data, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third checkpoint, in the middle of the second epoch, does not fit."""
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
    assert "checkpoint.pt is whole (1 epochs), and --resume continues from it" in str(error.value)
    assert checkpoint.load(folder).epochs == 1.0


@pytest.mark.parametrize("name", ["config.json", "steps.csv", "checkpoint.part"])
def test_a_folder_that_cannot_be_written_to_is_named(few: Data, tmp_path: Path, name: str) -> None:
    """A folder where a file is to be, since the tests may run as root, whom no mode stops."""
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
        *((how, "cut short, damaged, or no checkpoint") for how in ("cut", "empty", "flipped", "text")),
        ("foreign", "not a checkpoint of this program"),
        *((how, "its weights and its network do not fit together") for how in ("short", "other")),
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
    assert line.startswith(f"{path}: {message}") and "the one before it is whole (2 epochs)" in line
    command = line.partition("`")[2].partition("`")[0]
    subprocess.run(shlex.split(command), check=True)
    assert checkpoint.load(trained).epochs == 2.0, "from before the last test"
    damage(path, how)
    with pytest.raises(UserError, match="train one with `resnext train`"):
        checkpoint.load(trained)


def test_it_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"format": checkpoint.FORMAT, "settings": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cut short, damaged"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_it_is_on_the_disk_before_it_has_its_name(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which a power cut loses nothing: contents synced, renamed, the folder synced."""
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
    with pytest.raises(UserError, match="its held-out images were 100, here 90"):
        train(
            saved.settings,
            other,
            trained,
            World(torch.device("cpu")),
            Console(quiet=True),
            resumed=saved,
        )
