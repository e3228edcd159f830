"""Any name that a file system allows: printed, plotted, written, or rejected before training."""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from commands import SMALL, Run, cells, one_line
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from safetensors import safe_open

from resnext import checkpoint, plots
from resnext.data import Data, load_data
from resnext.errors import UserError
from resnext.evaluation import Evaluation
from resnext.names import file_stems, quoted, shown, to_json

# A class name of each kind: some look like a formula, markup, an option, or several cells or lines, some have
# letters that no font has, and some aren't text.
KINDS = {
    "mathtext": "$5_to_$10",
    "broken mathtext": r"$\frac{_^",
    "percent": "100%",
    "format": "{status}{0}",
    "line": "new\nline",
    "tab": "tab\tand\rreturn",
    "colour": "\x1b[31mred",
    "dash": "--name",
    "markup": "[bold]a",
    "emoji code": ":dog:",
    "formula": "=1+1",
    "cells": "a,\"b\",c;'d'",
    "backslash": "back\\slash",
    "chinese": "猫と犬",
    "emoji": "👩‍👧",
    "accents": "e\u0301\u0300",
    "right to left": "חתול",
    "turned": "\u202egnp.exe",
    "separator": "a\u2028b",
    "bytes": os.fsdecode(b"caf\xe9"),
    "bytes at the length of any name": os.fsdecode(b"\xff" * 255),
    "long": "x" * 255,
}
ODD = os.fsdecode(b"$o_d [red]:dog:\n'\\\xff")  # for folders and runs


def photographs(folder: Path, classes: list[str], size: int = 16) -> Path:
    """Write train/CLASS and val/CLASS with an image in each, whose name is odd too."""
    for part in ("train", "val"):
        for i, name in enumerate(classes):
            place = folder / part / name
            place.mkdir(parents=True)
            Image.new("RGB", (size, size), (10 * i, 0, 0)).save(place / f"{ODD}.png")
    return folder


def is_printable(text: str) -> bool:
    """Return whether ``text`` is UTF-8 and no line contains control characters."""
    text.encode()
    return all(shown(line) == line for line in text.split("\n"))


def test_any_name_is_shown_in_one_line_of_utf8() -> None:
    everything = "".join(map(chr, range(0x110000)))
    text = shown(everything)
    assert len(text.splitlines()) == 1 and shown(text) == text
    text.encode()
    assert shown(KINDS["bytes"]) == r"caf\xe9" and shown("a\n\x1b\u202e\ud800") == r"a\n\x1b\u202e\ud800"
    assert shown("\x85") != shown("\udc85"), "a control character and a byte"
    for name in ("猫 👩‍👧 e\u0301 חתול $_^\\%[/]:dog:", "\u200f\u200d"):
        assert shown(name) == name
    assert json.loads(to_json({"a": ["\udcff", 1, None]})) == {"a": [r"\xff", 1, None]}


def test_a_shell_reads_back_what_is_quoted() -> None:
    names = [name for kind, name in KINDS.items() if kind != "bytes at the length of any name"]
    names += [ODD, "a b", "a\x85b", os.fsdecode(b"a\x85b")]
    script = " ".join(["printf", r"'%s\0'", *map(quoted, names)])
    assert "\n" not in script
    out = subprocess.run(
        ["bash", "-c", script], env={"LC_ALL": "C.UTF-8"}, capture_output=True, check=True
    ).stdout
    read = [os.fsdecode(name) for name in out.split(b"\0")[:-1]]
    assert [name.removeprefix("./") for name in read] == names
    assert quoted("runs/demo") == "runs/demo" and shlex.split(quoted("-a b")) == ["./-a b"]


def test_file_names_of_classes_are_possible_and_differ(tmp_path: Path) -> None:
    names = [*KINDS.values(), "../up", ".hidden", "a/b", "a_b", "猫" * 50, "猫" * 51, "x" * 200, ""]
    stems = file_stems(names)
    for stem in stems:
        (tmp_path / f"{stem}.png").touch()
    assert len(list(tmp_path.iterdir())) == len(names)
    assert file_stems(["cat", "[a]"]) == ["cat", "[a]"]
    assert len(set(file_stems([".a", "_a-2", "_a"]))) == 3, "a name with a suffix equals another name"


def test_a_run_with_any_names_is_trained_resumed_evaluated_and_used(run: Run) -> None:
    """Odd names of folders, images, classes and the run, in every command."""
    photos, home = photographs(Path(ODD), list(KINDS.values())), f"runs/{ODD}"
    classes = sorted(map(shown, sorted(KINDS.values())))
    once = ("--epochs", "1", "--batch-size", str(len(KINDS)), "--micro-batch", str(len(KINDS)))
    train = ("train", "--data", "folder", ODD, "--name", ODD, "--image-size", "16", "--workers", "0")
    outputs = []
    for arguments in (
        (*train, *SMALL, *once),
        ("train", "--name", ODD, "--resume", "--workers", "0"),
        ("evaluate", home, "--workers", "0"),
        ("predict", "-c", home, f"{home}/samples"),
    ):
        code, out, err = run(*arguments)
        assert (code, err) == (0, ""), (arguments, out, err)
        assert is_printable(out), out
        outputs.append(out)
    assert f"written to {shown(home)}:" in outputs[0] and f"resnext evaluate {quoted(home)}" in outputs[0]
    assert {shown(name) for name in KINDS.values() if len(name) < 12} <= {row[0] for row in cells(outputs[2])}
    with Path(home, "classes.csv").open(newline="", encoding="utf-8") as file:
        assert sorted(row["class"] for row in csv.DictReader(file)) == classes
    config = json.loads(Path(home, "config.json").read_text("utf-8"))
    assert config["source"]["path"] == shown(photos.absolute())
    for name in ("curves.png", "mistakes.png", "confusion.png"):
        Image.open(Path(home, name)).load()
    code, out, err = run("predict", "-c", home, str(photos / "val"), "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert [entry["image"] for entry in told] == [
        shown(photos / "val" / name / f"{ODD}.png") for name in sorted(KINDS.values())
    ]
    assert {guess["class"] for entry in told for guess in entry["guesses"]} <= set(classes)


def test_pictures_show_names_letter_by_letter(
    tmp_path: Path, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names aren't parsed as formulas, and letters that the font lacks become escapes."""
    drawn: list[Text] = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: drawn.extend(texts_of(figure)))
    classes = (
        "$5_to_$1",
        "a_$b",
        r"\$",
        "猫",
        "e\u0301",
        "👩\u200d👧",
        "long names are cut",
        "99%",
        "{x}",
        "z",
    )
    labels = torch.arange(10)
    result = Evaluation(labels, labels, labels.roll(1)[:, None], torch.ones(10), torch.zeros(10))
    plots.confusion(tmp_path / "c.png", result, classes)
    plots.mistakes(tmp_path / "m.png", result, replace(digits, classes=classes))
    expected = [
        "$5_to_$1",
        "a_$b",
        r"\$",
        r"\u732b",
        "e\u0301",
        "\\U0001f469\u200d…",
        "long names …",
        "99%",
        "{x}",
        "z",
    ]
    names = [text for text in drawn if text.get_text() in expected and text.get_visible()]
    assert [text.get_text() for text in names] == expected * 2, "on both axes of the matrix"
    said = [text for text in drawn if "\nguess " in text.get_text()]
    assert sorted(text.get_text().split("\n")[0] for text in said) == sorted(
        f"true {name}" for name in expected
    )
    assert not any(text.get_parse_math() or text.get_usetex() for text in names + said)


def texts_of(figure: Figure) -> list[Text]:
    """Return the texts in ``figure``, drawn once, because matplotlib parses formulas when it draws."""
    figure.canvas.draw()
    return figure.findobj(Text)


@pytest.mark.parametrize("name", [f"{ODD}.pt2", f"{ODD}.onnx", f"{ODD}.safetensors", "x" * 251 + ".pt2"])
def test_a_network_is_exported_under_any_name(run: Run, trained: Path, name: str) -> None:
    saved = checkpoint.load(trained)
    classes = (*list(map(shown, KINDS.values()))[-9:], "z")
    settings = replace(saved.settings, source=replace(saved.settings.source, path=ODD))
    checkpoint.save(replace(saved, settings=settings, classes=classes))
    Path(ODD).mkdir()
    path = Path(ODD, name)
    code, out, err = run("export", "-o", str(path))
    assert (code, err) == (0, "") and is_printable(out) and f"wrote {shown(path)}: its outputs match" in out
    assert os.listdir(ODD) == [path.name]
    about = {
        ".pt2": lambda: pt2_metadata(path),
        ".onnx": lambda: onnx.load(path).metadata_props[0].value,
        ".safetensors": lambda: safe_open_bytes(path),
    }[path.suffix]()
    assert json.loads(about)["classes"] == list(classes)
    assert json.loads(about)["settings"]["source"]["path"] == shown(ODD)


def pt2_metadata(path: Path) -> str:
    files = {"resnext": ""}
    torch.export.load(io.BytesIO(path.read_bytes()), extra_files=files)
    return files["resnext"]


def safe_open_bytes(path: Path) -> str:
    """Return the metadata of a file whose name safetensors can't read."""
    path.rename("plain.safetensors")
    with safe_open("plain.safetensors", "pt") as file:
        return file.metadata()["resnext"]


def test_names_that_would_be_shown_alike_are_refused(tmp_path: Path) -> None:
    photographs(tmp_path / "photos", [os.fsdecode(b"caf\xe9"), r"caf\xe9"])
    with pytest.raises(
        UserError, match=r"photos/train: the names of two folders are both shown as caf\\xe9; rename"
    ):
        load_data("folder", tmp_path / "photos")


def test_an_error_is_one_line_whatever_it_names(run: Run, trained: Path) -> None:
    Path(f"{ODD}.png").write_text("no image")
    Path("empty", ODD).mkdir(parents=True)
    damaged = Path(ODD)
    damaged.mkdir()
    for name in ("checkpoint.pt", "previous.pt"):
        (damaged / name).write_bytes((trained / name).read_bytes())
    (damaged / "checkpoint.pt").write_bytes(b"no checkpoint")
    for arguments in (
        ("predict", f"{ODD}.png"),
        ("predict", f"{ODD}.gif"),
        ("predict", f"empty/{ODD}"),
        ("evaluate", f"runs/{ODD}"),
        ("export", "-o", f"{ODD}.exe"),
        ("export", "-o", f"none/{ODD}.onnx"),
        ("train", "--data", "folder", f"empty/{ODD}"),
        ("train", ODD),
        ("train", "--name", f"a/{ODD}"),
        ("train", "--name", "x" * 256),
        ("train", "--name", ODD, "--tensorboard"),
        ("summary", ODD),
        ("train", "--device", ODD),
        ("train", "--repeats", ODD),
    ):
        code, _, err = run(*arguments)
        assert code == 2, arguments
        one_line(err)
        assert is_printable(err), arguments
    code, _, err = run("evaluate", ODD)
    assert code == 2
    one_line(
        err,
        f"to go back to it, run `mv {quoted(damaged / 'previous.pt')} {quoted(damaged / 'checkpoint.pt')}`",
    )
    code, out, _ = run("predict", "--skip-corrupt", "--json", f"{ODD}.png")
    assert code == 0 and shown(ODD) in json.loads(out)[0]["error"]
    for arguments in (("train", "--network", "[/]"), ("train", "[/]", "[/]"), ("--[/]",), ("[/]",)):
        code, out, err = run(*arguments)
        assert code == 2 and "Traceback" not in out + err, arguments


def test_files_are_utf8_and_terminals_get_what_they_can_show(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text files are UTF-8 even if the system's encoding lacks some letters, and nothing fails."""
    photographs(Path("photos"), ["猫", "à"])
    encoding = io.text_encoding
    monkeypatch.setattr(
        io, "text_encoding", lambda said, level=2: "ascii" if said is None else encoding(said)
    )
    train = ("train", "--data", "folder", "photos", "--name", "猫", "--image-size", "16", "--workers", "0")
    unreadable = Path("photos/train/猫", f"{ODD}b.png")
    unreadable.write_text("no image")
    code, out, err = run(*train, *SMALL, "--batch-size", "2", "--micro-batch", "2", "--skip-corrupt")
    assert (code, err) == (0, "") and "1 images couldn't be read" in out
    (line,) = Path("runs/猫/unreadable.txt").read_text("utf-8").splitlines()
    assert line.startswith(f"can't read {shown(unreadable.absolute())}: it is damaged or not an image")
    written = io.BytesIO()
    with monkeypatch.context() as terminal:
        stdout = io.TextIOWrapper(written, encoding="ascii", write_through=True)
        terminal.setattr(sys, "stdout", stdout)
        assert run("evaluate", "runs/猫", "--workers", "0")[0] == 0
    assert r"runs/\u732b/classes.csv" in written.getvalue().decode("ascii")
    assert "猫" in Path("runs/猫/classes.csv").read_text("utf-8")
