"""``python -m resnext``, run for real on small data."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import gconv
from resnext import checkpoint, cli, data, train
from resnext.__main__ import main
from resnext.data import Digits

ROOT = Path(__file__).parent.parent
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    digits: tuple[Digits, Digits],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """The command line in an empty folder, on 300 digits and 100 held out: (exit code, stdout, stderr)."""
    few = tuple(Digits(d.images[:n], d.labels[:n]) for d, n in zip(digits, (300, 100), strict=True))
    for module in (train, cli):
        monkeypatch.setattr(module, "load_mnist5k", lambda: few)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["resnext", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def summary(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))


SMALL = ("--epochs", "2", "--repeats", "1,1,0,0", "--cardinality", "2", "--base-width", "2")


def test_train_evaluate_predict(run: Run, tmp_path: Path) -> None:
    code, out, err = run("train", *SMALL, "--name", "first")
    assert (code, err) == (0, "")
    assert "device    cpu" in out and "backend   aten: gconv has no kernel for cpu" in out
    assert "300 digits to train on, 100 held out" in out and "written to runs/first" in out
    folder = tmp_path / "runs" / "first"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint.pt", "config.json", "curves.png", "mistakes.png", "samples", "summary.csv"
    }  # fmt: skip
    rows = summary(folder)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(float(row["test_loss"]) > 0 and 0 <= float(row["test_accuracy"]) <= 100 for row in rows)
    config = json.loads((folder / "config.json").read_text())
    assert config["network"]["repeats"] == [1, 1, 0, 0] and config["recipe"]["epochs"] == 2
    for picture in ("curves.png", "mistakes.png"):
        with Image.open(folder / picture) as image:
            assert image.width > 600 and image.height > 200

    for row in rows:
        assert abs(float(row["images_per_second"]) * float(row["seconds"]) / 300 - 1) < 0.01
        assert 0 < float(row["train_accuracy"]) <= 100 and float(row["train_loss"]) > 1

    samples = [f"runs/first/samples/digit-{digit}.png" for digit in range(10)]
    code, out, err = run("predict", "--checkpoint", "runs/first", *samples, "--backend", "reference")
    assert (code, err) == (0, "")
    assert all(sample in out for sample in samples)


def cells(out: str) -> list[list[str]]:
    """The rows of the tables in ``out``."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]


def test_every_number_is_that_of_the_network(run: Run, tmp_path: Path) -> None:
    """summary.csv, evaluate and predict against the saved weights, run by hand."""
    run("train", *SMALL, "--batch-size", "20", "--repeats", "1,1,0,0", "--learning-rate", "0.01")
    saved = checkpoint.load(Path("runs/demo"))
    assert saved.epochs == 2 and not saved.model.training
    _, held_out = cli.load_mnist5k()
    with torch.no_grad():
        logits = saved.model((held_out.images.float() / 255 - 0.1307) / 0.3081)
    guesses, labels = logits.argmax(1), held_out.labels
    loss, accuracy = F.cross_entropy(logits, labels).item(), (guesses == labels).double().mean().item()
    last = summary(tmp_path / "runs" / "demo")[-1]
    assert (
        abs(float(last["test_loss"]) - loss) < 2e-4
        and abs(float(last["test_accuracy"]) - 100 * accuracy) < 1e-9
    )

    ran = []
    original = gconv.GroupConv2d._conv_forward

    def spy(self: gconv.GroupConv2d, x: torch.Tensor, *rest: object) -> torch.Tensor:
        ran.append(gconv.explain(self, x).backend)
        return original(self, x, *rest)

    gconv.GroupConv2d._conv_forward = spy
    _, out, _ = run("evaluate", "--backend", "reference")
    gconv.GroupConv2d._conv_forward = original
    assert set(ran) == {"reference"}
    assert f"top-1 accuracy {100 * accuracy:.2f}%, cross-entropy {loss:.4f}" in out
    rows = [row for row in cells(out) if row[0].isdigit()]
    assert [row[0] for row in rows] == [str(digit) for digit in range(10)]
    for digit, (_, images, right, percent, mistaken) in enumerate(rows):
        of_class = guesses[labels == digit]
        assert (int(images), int(right)) == (len(of_class), int((of_class == digit).sum()))
        assert percent == f"{100 * int(right) / int(images):.1f}%"
        wrong = {
            guess: int((of_class == guess).sum()) for guess in of_class.unique().tolist() if guess != digit
        }
        assert mistaken == ", ".join(f"{guess} ({count})" for guess, count in wrong.items())

    paths = [f"runs/demo/samples/digit-{digit}.png" for digit in range(10)]
    _, out, _ = run("predict", *paths)
    for digit, (path, best, sure, second, less) in enumerate(
        row for row in cells(out) if "samples" in row[0]
    ):
        index = int((labels == digit).nonzero()[0])
        thought, order = logits[index].softmax(0).sort(descending=True)
        assert [path, best, second] == [paths[digit], str(int(order[0])), str(int(order[1]))]
        assert sure == f"{thought[0]:.1%}" and less == f"{thought[1]:.1%}"


def test_same_seed_trains_the_same_network(run: Run, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run("train", *SMALL, "--name", name, "--seed", seed)
    a, b, c = (checkpoint.load(tmp_path / "runs" / name).model.state_dict() for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["fc.weight"], c["fc.weight"])


def test_training_learns(run: Run, tmp_path: Path) -> None:
    run("train", "--epochs", "8", "--repeats", "1,1,0,0", "--batch-size", "15")
    rows = summary(tmp_path / "runs" / "demo")
    assert float(rows[-1]["test_accuracy"]) > 35, "of 10 classes, guessing gets 10%"
    assert float(rows[-1]["train_loss"]) < 0.75 * float(rows[0]["train_loss"])


def test_a_run_is_not_overwritten_unasked(run: Run, tmp_path: Path) -> None:
    run("train", *SMALL)
    kept = tmp_path / "runs" / "demo" / "kept"
    kept.touch()
    code, _, err = run("train", *SMALL)
    assert (
        code == 2 and err == "error: runs/demo: exists already; choose another --name, or pass --overwrite\n"
    )
    assert kept.exists()
    for bad in (("--repeats", "1,1"), ("--device", "abacus"), ("--seed", "-1")):
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


def one_line(err: str, *parts: str) -> None:
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for part in parts:
        assert part in err, err


def test_what_a_person_can_mend_is_one_line_and_exit_code_2(run: Run, tmp_path: Path) -> None:
    run("train", *SMALL)
    Path("text.png").write_text("no image")
    Path("cut.pt").write_bytes(Path("runs/demo/checkpoint.pt").read_bytes()[:2000])
    Path("text.pt").write_text("no checkpoint")
    flipped = bytearray(Path("runs/demo/checkpoint.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    Path("flipped.pt").write_bytes(flipped)
    torch.save({"weights": {}}, "foreign.pt")
    content = torch.load("runs/demo/checkpoint.pt")
    torch.save({**content, "network": {**content["network"], "cardinality": 4}}, "other.pt")
    torch.save({"format": checkpoint.FORMAT}, "short.pt")
    Image.new("F", (28, 28)).save("float.tiff")
    Image.new("L", (40, 30)).save("wide.png")
    fine = "runs/demo/samples/digit-3.png"
    cases = [
        (("train", "--name", "x", "--repeats", "1,1,1"), "--repeats 1,1,1", "four entries", "got 3"),
        (("train", "--name", "x", "--repeats", "1,1,1,1,1"), "four entries", "got 5"),
        (("train", "--name", "x", "--repeats", "1,a,1,1"), "--repeats 1,a,1,1: not whole numbers"),
        (("train", "--name", "x", "--device", "cuda"), "--device cuda", "try --device auto"),
        (("train", "--name", "x", "--device", "abacus"), "--device abacus", "try --device auto"),
        (("train", "--name", "x", "--out", "text.png"), "text.png"),
        (("evaluate", "runs/none"), "runs/none: no such checkpoint", "resnext train"),
        (("evaluate", "cut.pt"), "cut.pt: cut short, damaged, or no checkpoint", "resnext train"),
        (("evaluate", "flipped.pt"), "flipped.pt: cut short, damaged, or no checkpoint"),
        (("evaluate", "text.pt"), "text.pt: cut short, damaged, or no checkpoint"),
        (("evaluate", "foreign.pt"), "foreign.pt: not a checkpoint of this program"),
        (("evaluate", "other.pt"), "other.pt: its weights and its network do not fit together"),
        (("evaluate", "short.pt"), "short.pt: its weights and its network do not fit together"),
        (("predict", "none.png"), "none.png: no such image"),
        (("predict", "text.png"), "text.png: not an image that can be read"),
        (("predict", "wide.png"), "wide.png: 40 x 30 pixels", "takes 28 x 28", "--resize"),
        (("predict", "runs"), "runs: not an image"),
        (("predict", "float.tiff"), "float.tiff: not an image that can be read"),
        (("complexity", "--cardinality", "1000"), "cardinality must be from 1 to 134, got 1000"),
        (("train", "--name", "x", "--learning-rate", "1e30", *SMALL), "diverged", "a lower --learning-rate"),
        (("predict", "-c", "runs/none", fine), "runs/none: no such checkpoint"),
        (("summary", "resnext51"), "resnext51: no such variant; choose from resnet50"),
    ]
    for arguments, *parts in cases:
        code, _, err = run(*arguments)
        assert code == 2, arguments
        one_line(err, *parts)
    for arguments in (("train", "--epochs", "0"), ("train", "--backend", "cudnn"), ("predict",), ("fly",)):
        code, out, err = run(*arguments)
        assert code == 2 and "Traceback" not in out + err


def test_predict_resizes_and_inverts_on_request(run: Run) -> None:
    run("train", *SMALL)
    with Image.open("runs/demo/samples/digit-3.png") as image:
        large = image.resize((56, 56), Image.Resampling.NEAREST)
    large.point(lambda value: 255 - value).convert("RGB").save("paper.jpg")
    code, out, err = run("predict", "paper.jpg", "--resize", "--invert")
    assert (code, err) == (0, "") and "paper.jpg" in out
    told = data.read_image(Path("paper.jpg"), resize=True, invert=True).double()
    exact = data.read_image(Path("runs/demo/samples/digit-3.png")).double()
    assert told.shape == (1, 28, 28) and (told - exact).abs().mean() < 10


def test_predict_reads_colours_transparency_and_sixteen_bits(run: Run) -> None:
    run("train", *SMALL)
    digit = Path("runs/demo/samples/digit-3.png")
    with Image.open(digit) as image:
        grey = image.copy()
    exact = data.read_image(digit)
    white, black = Image.new("L", grey.size, 255), Image.new("L", grey.size, 0)
    Image.merge("RGBA", (white, white, white, grey)).save("light.png")
    Image.merge("LA", (black, grey)).save("dark.png")
    Image.fromarray(exact[0].numpy().astype("uint16") * 257).save("deep.png")
    grey.convert("P").save("palette.png")
    for name, invert in (("light", False), ("dark", True), ("deep", False), ("palette", False)):
        told = data.read_image(Path(f"{name}.png"), invert=invert)
        assert (told.int() - exact.int()).abs().amax() <= 1, name


def test_predict_keeps_the_proportions_of_what_it_resizes(run: Run) -> None:
    Image.new("L", (56, 14), 255).save("wide.png")
    told = data.read_image(Path("wide.png"), resize=True)[0]
    assert told[11:17].min() > 200 and told[:9].max() == 0 and told[19:].max() == 0


def test_names_with_brackets_are_printed_as_they_are(run: Run) -> None:
    code, out, err = run("train", *SMALL, "--name", "warm[-1] [red]")
    assert (code, err) == (0, "") and "written to runs/warm[-1] [red]:" in out
    code, out, err = run("predict", "-c", "runs/warm[-1] [red]", "runs/warm[-1] [red]/samples/digit-1.png")
    assert (code, err) == (0, "") and "runs/warm[-1] [red]/samples/digit-1.png" in out


def test_few_steps_and_narrow_terminals(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for epochs in ("1", "5", "6"):
        arguments = ("--epochs", epochs, "--batch-size", "300", "--repeats", "1,0,0,0", "--overwrite")
        assert run("train", *arguments)[0] == 0
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
    rows = {row[0]: row[1:] for row in cells(out) if row[0].isdigit()}
    assert rows["1"] == ["64", "64", "69,632", "0.218", "25.6 M", "4.09", "23.9%", "22.0%"]
    assert rows["8"] == ["14", "112", "71,456", "0.224", "25.6 M", "4.27", "22.3%", "21.3%"]
    assert rows["16"] == ["8", "128", "74,752", "0.234", "26.4 M", "4.46", "", ""]
    assert rows["32"] == ["4", "128", "70,144", "0.220", "25.0 M", "4.23", "22.2%", "21.2%"]


def test_traffic_prints_bytes_fused_and_unfused(run: Run) -> None:
    code, out, _ = run("traffic", "resnext50_32x4d", "--device", "cpu")
    assert code == 0 and "no GPU here: nothing was measured" in out
    assert ["total", "202.8", "180.7", "11%", "602.0", "507.9", "16%"] in cells(out)
    code, _, err = run("traffic", "resnext51")
    assert code == 2
    one_line(err, "resnext51: no such variant")


def test_help_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("train", "evaluate", "predict", "summary", "complexity", "traffic"):
        assert command in out
        code, text, _ = run(command, "--help")
        assert code == 0 and "Usage" in text


def test_interrupted_training_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    """A real Ctrl-C to a real process, early in its training."""
    process = subprocess.Popen(
        [sys.executable, "-m", "resnext", "train", "--repeats", "1,1,0,0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
    )
    lines = []
    while not lines or "train loss" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], process.stderr.read()
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted: the network so far is in runs/demo/checkpoint.pt" in out and err == ""
    saved = checkpoint.load(tmp_path / "runs" / "demo")
    assert 0 <= saved.epochs < 12
    assert saved.model(torch.zeros(1, 1, 28, 28)).shape == (1, 10)


def test_a_backend_that_cannot_run_here_is_refused_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gconv.dispatch.TRITON_INSTALLED", False)
    code, _, err = run("train", "--name", "x", "--backend", "triton", *SMALL)
    assert code == 2 and err == "error: --backend triton: Triton is not installed; pip install triton\n"
    assert not Path("runs/x").exists()
