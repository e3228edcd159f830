"""``python -m resnext``, run for real on small data: training, tables, help, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from commands import SMALL, Run, cells, one_line, rows
from PIL import Image

from resnext import checkpoint
from resnext.config import Network


def test_train_writes_all_that_it_says(run: Run, tmp_path: Path) -> None:
    code, out, err = run("train", *SMALL, "--name", "first")
    assert (code, err) == (0, "")
    assert "device    cpu" in out and "backend   aten: gconv has no kernels for cpu" in out
    assert "mnist5k: 300 images to train on, 100 held out, 10 classes, 1 x 28 x 28" in out
    assert "64 images in 2 passes: batch norm sees 32 at a time" in out and "written to runs/first" in out
    folder = tmp_path / "runs" / "first"
    assert {path.name for path in folder.iterdir()} == {
        *("checkpoint.pt", "previous.pt", "config.json", "steps.csv", "summary.csv"),
        *("curves.png", "confusion.png", "mistakes.png", "samples"),
    }
    table = rows(folder / "summary.csv")
    assert [row["epoch"] for row in table] == ["1", "2"]
    for row in table:
        assert abs(float(row["images_per_second"]) * float(row["seconds"]) / 256 - 1) < 0.01
        assert float(row["train_loss"]) > 1 and float(row["test_loss"]) > 0
        assert all(0 <= float(row[f"{kind}_accuracy"]) <= 100 for kind in ("train", "test"))
    assert [row["step"] for row in rows(folder / "steps.csv")] == [str(step) for step in range(1, 9)]
    config = json.loads((folder / "config.json").read_text())
    assert config["network"]["repeats"] == [1, 1, 0, 0] and config["recipe"]["epochs"] == 2
    for picture in ("curves.png", "confusion.png", "mistakes.png"):
        with Image.open(folder / picture) as image:
            assert image.width > 600 and image.height > 200
    assert len(list((folder / "samples").iterdir())) == 10


def test_every_option_reaches_the_run(run: Run, tmp_path: Path) -> None:
    datasets.photographs(tmp_path / "photos")
    arguments = (
        *("--data", "folder", "photos", "--image-size", "32", "--skip-corrupt", "--workers", "1"),
        *("--network", "resnext29_8x64d", "--repeats", "1,0,0,0", "--cardinality", "2", "--base-width", "3"),
        *("--stem-width", "4", "--fused", "--epochs", "1", "--batch-size", "12", "--optimizer", "adamw"),
        *("--learning-rate", "0.01", "--weight-decay", "0.1", "--schedule", "cosine", "--ema", "0.9"),
        *("--warmup-epochs", "0.5", "--label-smoothing", "0.1", "--mixup", "0.2", "--cutmix", "1"),
        *("--seed", "3", "--micro-batch", "6", "--precision", "bfloat16", "--no-channels-last"),
    )
    code, _, err = run("train", *arguments)
    assert code == 0, err
    config = json.loads(Path("runs/demo/config.json").read_text())
    assert config["source"] == {"name": "folder", "path": str(tmp_path / "photos"), "image_size": 32}
    assert config["network"] == {
        "repeats": [1, 0, 0, 0], "cardinality": 2, "base_width": 3, "stem_width": 4, "stem": "small",
        "fused": True,
    }  # fmt: skip
    assert config["recipe"] == {
        "epochs": 1, "batch_size": 12, "micro_batch": 6, "optimizer": "adamw", "learning_rate": 0.01,
        "weight_decay": 0.1, "schedule": "cosine", "milestones": [1 / 3, 2 / 3], "warmup_epochs": 0.5,
        "label_smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0, "ema": 0.9, "precision": "bfloat16",
        "sync_batch_norm": False, "seed": 3,
    }  # fmt: skip


def test_unreadable_photographs_end_it_or_are_counted(run: Run, tmp_path: Path) -> None:
    photos = datasets.photographs(tmp_path / "photos")
    for broken in (photos / "train" / "colour1" / "3.jpg", photos / "val" / "colour2" / "0.png"):
        broken.write_bytes(broken.read_bytes()[:200])
    arguments = ("train", "--data", "folder", "photos", "--image-size", "16", "--workers", "0", *SMALL)
    code, _, err = run(*arguments, "--batch-size", "36")
    assert code == 2
    one_line(err, "3.jpg: not an image that can be read", "--skip-corrupt")
    code, out, err = run(*arguments, "--batch-size", "36", "--overwrite", "--skip-corrupt")
    assert (code, err) == (0, "") and "2 images could not be read: others take their place" in out
    assert len(Path("runs/demo/unreadable.txt").read_text().splitlines()) == 2
    shutil.copy(photos / "train" / "colour1" / "4.jpg", photos / "train" / "colour1" / "3.jpg")
    code, _, err = run(*arguments, "--batch-size", "36", "--overwrite")
    assert code == 2
    one_line(err, "0.png: not an image that can be read", "--skip-corrupt")
    assert checkpoint.load(Path("runs/demo")).epochs == 1, "the epoch was lost with the test"
    code, out, _ = run("train", "--resume", "--workers", "0", "--skip-corrupt")
    assert code == 0 and "1 images could not be read" in out
    for path in (photos / "train").rglob("*.jpg"):
        path.write_text("no image")
    code, _, err = run(*arguments, "--batch-size", "36", "--overwrite", "--skip-corrupt")
    assert code == 2
    one_line(err, "no training image could be read; the first: ")


@pytest.mark.long
def test_same_seed_trains_the_same_network(run: Run, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run("train", *SMALL, "--name", name, "--seed", seed)
    a, b, c = (checkpoint.load(tmp_path / "runs" / name).weights for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["fc.weight"], c["fc.weight"])


def test_a_run_is_not_overwritten_unasked(run: Run, trained: Path) -> None:
    kept = trained / "kept"
    kept.touch()
    code, _, err = run("train", *SMALL)
    assert code == 2
    one_line(
        err,
        "runs/demo: already exists; continue it with --resume, choose another --name, or pass --overwrite",
    )
    for bad in (
        ("--repeats", "1,1"), ("--device", "abacus"), ("--seed", "-1"), ("--resume",),
        ("--batch-size", "1000"), ("--data", "folder", "nowhere"), ("--data", "cifar10"),
    ):  # fmt: skip
        assert run("train", *SMALL, *bad, "--overwrite")[0] == 2
    assert kept.exists(), "removed for a run that could not start"
    assert run("train", *SMALL, "--overwrite")[0] == 0
    assert not kept.exists()


def test_only_a_run_is_ever_removed(run: Run, tmp_path: Path) -> None:
    kept = tmp_path / "runs" / "thesis" / "kept"
    kept.parent.mkdir(parents=True)
    kept.touch()
    for name in ("thesis", ".", "..", "", "../runs", "a/b", str(tmp_path)):
        code, _, err = run("train", *SMALL, "--overwrite", "--name", name)
        assert code == 2
        one_line(err, "not a run" if name == "thesis" else f"--name {name}: not the name of a folder")
    assert kept.exists()


def test_resume_says_what_does_not_go_together(run: Run, trained: Path) -> None:
    Path("runs/other").mkdir()
    for arguments, *parts in (
        (("--epochs", "5"), "a resumed run keeps its settings: its epochs is 2, not 5"),
        (("--cardinality", "4"), "its cardinality is 2, not 4", "choose another --name"),
        (("--name", "other"), "runs/other: not a run, so there is nothing to resume"),
    ):
        code, _, err = run("train", "--resume", *arguments)
        assert code == 2
        one_line(err, *parts)
    code, out, err = run("train", "--resume")
    assert (code, err) == (0, "") and "nothing is left to train" in out and "written to runs/demo" in out
    assert rows(trained / "summary.csv")[-1]["epoch"] == "2", "trained beyond its end"


def test_what_a_person_can_mend_is_one_line_and_exit_code_2(run: Run, trained: Path) -> None:
    Path("text.png").write_text("no image")
    Image.new("F", (28, 28)).save("float.tiff")
    Image.new("L", (40, 30)).save("wide.png")
    Path("empty").mkdir()
    fine = "runs/demo/samples/3.png"
    new = ("train", "--name", "x")
    cases = [
        ((*new, "--repeats", "1,1,1"), "--repeats 1,1,1", "four entries", "got 3"),
        ((*new, "--repeats", "1,a,1,1"), "--repeats must be integers separated by commas", "got 1,a,1,1"),
        ((*new, "--device", "cuda"), "--device cuda", "try --device auto"),
        ((*new, "--device", "abacus"), "--device abacus", "try --device auto"),
        ((*new, "--out", "text.png"), "text.png"),
        ((*new, "empty"), "empty: --data mnist5k comes with gconv and takes no path"),
        ((*new, "--data", "cifar10"), "--data cifar10: needs its archive"),
        ((*new, "--data", "folder", "empty"), "empty/train: no such folder"),
        ((*new, "--image-size", "32"), "--image-size"),
        ((*new, "--batch-size", "1000"), "--batch-size 1000: there are 300 training images"),
        ((*new, "--mixup", "inf"), "--mixup must be a finite number of at least 0, got inf"),
        ((*new, "--learning-rate", "1e30", *SMALL), "diverged", "a lower --learning-rate"),
        (("evaluate", "runs/none"), "runs/none: no such checkpoint", "resnext train"),
        (("evaluate", "text.png"), "text.png: cut short, damaged, or no checkpoint"),
        (("evaluate", "--path", "empty"), "--data mnist5k comes with gconv"),
        (("export", "-o", "network.exe"), "network.exe: write to a file that ends in .pt2"),
        (("export", "-o", "/proc/network.pt2"), "/proc/"),
        (("export", "-o", "/proc/network.safetensors"), "/proc/"),
        (("export", "-o", "none/network.pt2"), "none/network.pt2: there is no folder none"),
        (("predict", "none.png"), "none.png: no such image"),
        (("predict", "text.png"), "text.png: not an image that can be read"),
        (("predict", "wide.png"), "wide.png: 40 x 30 pixels", "takes 28 x 28", "--resize"),
        (("predict", "empty"), "empty: no image in this folder"),
        (("predict", "float.tiff"), "float.tiff: not an image that can be read"),
        (("predict", "-c", "runs/none", fine), "runs/none: no such checkpoint"),
        (("complexity", "--cardinality", "1000"), "cardinality must be from 1 to 134, got 1000"),
        (("summary", "resnext51"), "resnext51: no such variant; choose from resnet50"),
        (("traffic", "resnext51"), "resnext51: no such variant"),
        (("cardinality", "--data", "cifar10"), "--data cifar10: the preset of digits has no other"),
        (("cardinality", "--preset", "cifar"), "--data cifar10: needs its archive"),
        (("cardinality", "empty"), "empty: --data digits comes with gconv"),
    ]
    for arguments, *parts in cases:
        code, _, err = run(*arguments)
        assert code == 2, arguments
        one_line(err, *parts)


def test_what_one_process_alone_meets_it_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    code, _, err = run("train", "--device", "cuda:7")
    assert code == 2
    one_line(err, "--device cuda:7")


def test_names_with_brackets_are_printed_as_they_are(run: Run) -> None:
    code, out, err = run("train", *SMALL, "--name", "warm[-1] [red]")
    assert (code, err) == (0, "") and "written to runs/warm[-1] [red]:" in out
    code, out, err = run("predict", "-c", "runs/warm[-1] [red]", "runs/warm[-1] [red]/samples/1.png")
    assert (code, err) == (0, "") and "runs/warm[-1] [red]/samples/1.png" in out


@pytest.mark.long
def test_few_steps_and_narrow_terminals(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for epochs in ("1", "6"):
        code, out, _ = run("train", *SMALL, "--epochs", epochs, "--batch-size", "300", "--overwrite")
        assert code == 0 and "in 10 passes: batch norm sees 30 at a time" in out and "note" not in out
    monkeypatch.setenv("COLUMNS", "50")
    _, out, _ = run("complexity")
    assert "…" not in out


def test_summary_and_complexity_print_the_papers_tables(run: Run) -> None:
    code, out, _ = run("summary")
    assert code == 0
    for text in ("resnet50", "resnext50_32x4d", "3x3, 128, C=32  x 3", "25,557,032", "25,028,904", "4.230"):
        assert text in out
    code, out, _ = run("summary", "resnext29_8x64d", "resnext50_32x4d", "--image-size", "64")
    assert code == 0 and "34,426,698" in out and out.count("64 x 64 pixels") == 2
    code, out, _ = run("complexity", "--cardinality", "16")
    assert code == 0
    table = {row[0]: row[1:] for row in cells(out) if row[0].isdigit()}
    assert table["1"] == ["64", "64", "69,632", "0.218", "25.6 M", "4.09", "23.9%", "22.0%"]
    assert table["8"] == ["14", "112", "71,456", "0.224", "25.6 M", "4.27", "22.3%", "21.3%"]
    assert table["16"] == ["8", "128", "74,752", "0.234", "26.4 M", "4.46", "", ""]
    assert table["32"] == ["4", "128", "70,144", "0.220", "25.0 M", "4.23", "22.2%", "21.2%"]


def test_traffic_prints_bytes_fused_and_unfused(run: Run) -> None:
    code, out, _ = run("traffic", "resnext50_32x4d", "--device", "cpu")
    assert code == 0 and "no GPU here: nothing was measured" in out
    assert ["total", "202.8", "180.7", "11%", "602.0", "507.9", "16%"] in cells(out)


def test_the_named_networks_are_those_of_the_package() -> None:
    assert Network.of_variant("resnext101_32x8d") == Network((3, 4, 23, 3), 32, 8, 64, "imagenet")


def test_a_backend_that_cannot_run_here_is_refused_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gconv.dispatch.TRITON_INSTALLED", False)
    code, _, err = run("train", "--name", "x", "--backend", "triton", *SMALL)
    assert code == 2 and err == "error: --backend triton: Triton is not installed; pip install triton\n"
    assert not Path("runs/x").exists()
