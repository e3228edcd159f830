"""``python -m resnext`` on small data: training, tables, help and errors."""

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
    assert "mnist5k: 300 training images, 100 held out, 10 classes, 1 x 28 x 28" in out
    assert (
        "64 images in 2 forward passes: batch norm sees 32 at a time" in out
        and "written to runs/first" in out
    )
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
    one_line(
        err, "3.jpg: it is damaged or not an image; use a PNG or JPEG file, or skip it with --resume --skip"
    )
    code, out, err = run(*arguments, "--batch-size", "36", "--overwrite", "--skip-corrupt")
    assert (code, err) == (0, "") and "2 images couldn't be read: training uses others in their place" in out
    assert len(Path("runs/demo/unreadable.txt").read_text().splitlines()) == 2
    shutil.copy(photos / "train" / "colour1" / "4.jpg", photos / "train" / "colour1" / "3.jpg")
    code, _, err = run(*arguments, "--batch-size", "36", "--overwrite")
    assert code == 2
    one_line(err, "0.png: it is damaged or not an image", "or skip it with --skip-corrupt")
    assert checkpoint.load(Path("runs/demo")).epochs == 1, "the epoch was lost with the test"
    code, out, _ = run("train", "--resume", "--workers", "0", "--skip-corrupt")
    assert code == 0 and "1 images couldn't be read" in out
    for path in (photos / "train").rglob("*.jpg"):
        path.write_text("no image")
    code, _, err = run(*arguments, "--batch-size", "36", "--overwrite", "--skip-corrupt")
    assert code == 2
    one_line(err, "none of the training images could be read; first error: can't read ")


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
        "runs/demo already exists: pass --resume to continue it or --overwrite to replace it, "
        "or choose another --name",
    )
    for bad in (
        ("--repeats", "1,1"), ("--device", "abacus"), ("--seed", "-1"), ("--resume",),
        ("--batch-size", "1000"), ("--data", "folder", "nowhere"), ("--data", "cifar10"),
    ):  # fmt: skip
        assert run("train", *SMALL, *bad, "--overwrite")[0] == 2
    assert kept.exists(), "removed for a run that couldn't start"
    assert run("train", *SMALL, "--overwrite")[0] == 0
    assert not kept.exists()


def test_only_a_run_is_ever_removed(run: Run, tmp_path: Path) -> None:
    kept = tmp_path / "runs" / "thesis" / "kept"
    kept.parent.mkdir(parents=True)
    kept.touch()
    for name in ("thesis", ".", "..", "", "../runs", "a/b", str(tmp_path)):
        code, _, err = run("train", *SMALL, "--overwrite", "--name", name)
        assert code == 2
        one_line(
            err,
            "thesis: it isn't a run (no config.json)"
            if name == "thesis"
            else f"--name must be the name of a folder, got '{name}'; use --out",
        )
    assert kept.exists()


def test_resume_says_what_does_not_go_together(run: Run, trained: Path) -> None:
    Path("runs/other").mkdir()
    for arguments, *parts in (
        (
            ("--epochs", "5"),
            "can't change settings of runs/demo/checkpoint.pt: epochs is 2, got 5; drop the option",
        ),
        (("--cardinality", "4"), "cardinality is 2, got 4", "choose another --name"),
        (("--name", "other"), "can't resume runs/other: it isn't a run (no config.json)"),
    ):
        code, _, err = run("train", "--resume", *arguments)
        assert code == 2
        one_line(err, *parts)
    code, out, err = run("train", "--resume")
    assert (
        (code, err) == (0, "")
        and "all epochs are done; testing and plotting again" in out
        and "written to runs/demo" in out
    )
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
        (
            (*new, "empty"),
            "unexpected path",
            "empty: the images of --data mnist5k come with an installed package",
        ),
        ((*new, "--data", "cifar10"), "--data cifar10 needs a path: download cifar-10-python.tar.gz or"),
        ((*new, "--data", "folder", "empty"), "empty/train: no such folder"),
        ((*new, "--image-size", "32"), "--image-size"),
        (
            (*new, "--batch-size", "1000"),
            "--batch-size must be at most 300, the number of training images, got 1000",
        ),
        ((*new, "--mixup", "inf"), "--mixup must be a finite number of at least 0, got inf"),
        ((*new, "--learning-rate", "1e30", *SMALL), "diverged", "a lower --learning-rate"),
        (("evaluate", "runs/none"), "runs/none: no checkpoint found", "resnext train"),
        (("evaluate", "text.png"), "can't read text.png: it is truncated, damaged or not a checkpoint"),
        (("evaluate", "--path", "empty"), "unexpected path empty: the images of --data mnist5k"),
        (
            ("export", "-o", "network.exe"),
            "network.exe: unknown format; choose a file name that ends in one of .pt2",
        ),
        (("export", "-o", "/proc/network.pt2"), "/proc/"),
        (("export", "-o", "/proc/network.safetensors"), "/proc/"),
        (
            ("export", "-o", "none/network.pt2"),
            "none/network.pt2: the folder none doesn't exist; create it first",
        ),
        (("predict", "none.png"), "none.png: no such file; pass the path of a PNG or JPEG image"),
        (("predict", "text.png"), "can't read text.png: it is damaged or not an image"),
        (("predict", "wide.png"), "wide.png: this network needs 28 x 28 pixels, got 40 x 30; pass --resize"),
        (("predict", "empty"), "empty: no images in this folder"),
        (("predict", "float.tiff"), "can't read float.tiff: it is damaged or not an image"),
        (("predict", "-c", "runs/none", fine), "runs/none: no checkpoint found"),
        (
            ("complexity", "--cardinality", "1000"),
            "--cardinality must be from 1 to 134, got 1000; with more groups, even one channel",
        ),
        (("summary", "resnext51"), "unknown variant 'resnext51': choose from resnet50"),
        (("traffic", "resnext51"), "unknown variant 'resnext51': choose from resnet50"),
        (
            ("cardinality", "--data", "cifar10"),
            "--data cifar10 needs --preset cifar; --preset small always uses digits",
        ),
        (("cardinality", "--preset", "cifar"), "--data cifar10 needs a path: download"),
        (("cardinality", "empty"), "unexpected path", "empty: the images of --data digits"),
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
        assert code == 0 and "in 10 forward passes: batch norm sees 30 at a time" in out and "note" not in out
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
    assert code == 0 and "stages weren't timed: that needs a CUDA GPU" in out
    assert ["total", "202.8", "180.7", "11%", "602.0", "507.9", "16%"] in cells(out)


def test_the_named_networks_are_those_of_the_package() -> None:
    assert Network.of_variant("resnext101_32x8d") == Network((3, 4, 23, 3), 32, 8, 64, "imagenet")


def test_a_backend_that_cannot_run_here_is_refused_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gconv.dispatch.TRITON_INSTALLED", False)
    code, _, err = run("train", "--name", "x", "--backend", "triton", *SMALL)
    assert code == 2 and err == "error: --backend triton: Triton isn't installed: pip install triton\n"
    assert not Path("runs/x").exists()
