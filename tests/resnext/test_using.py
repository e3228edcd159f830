"""``evaluate``, ``predict`` and ``export``: every number is compared with that of the saved network."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from commands import Run, cells, one_line, rows
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import gconv
from resnext import checkpoint, evaluation, exporters
from resnext.config import Network, Recipe, Settings, Source, build
from resnext.data import Data, load_data
from resnext.data.images import read_image
from resnext.errors import UserError
from resnext.evaluation import Evaluation, evaluate, standard_error
from resnext.loop import train
from resnext.plots import confusion
from resnext.world import World

CPU = World(torch.device("cpu"))


def logits_of(trained: Path, data: Data) -> Tensor:
    with torch.no_grad():
        return checkpoint.load(trained).network()((data.test.images.float() / 255 - 0.1307) / 0.3081)


def test_evaluate_tells_what_the_network_does(
    run: Run, trained: Path, few: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = logits_of(trained, few), few.test.labels
    guesses = logits.argmax(1)
    loss, accuracy = F.cross_entropy(logits, labels).item(), (guesses == labels).double().mean().item()
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    last = rows(trained / "summary.csv")[-1]
    assert abs(float(last["test_loss"]) - loss) < 2e-4
    assert (float(last["test_accuracy"]), float(last["test_top5"])) == (100 * accuracy, 100 * top5)
    ran, original = [], gconv.GroupConv2d._conv_forward

    def spy(self: gconv.GroupConv2d, x: Tensor, *rest: object) -> Tensor:
        ran.append(gconv.explain(self, x).backend)
        return original(self, x, *rest)

    monkeypatch.setattr(gconv.GroupConv2d, "_conv_forward", spy)
    code, out, err = run("evaluate", "--backend", "reference")
    assert (code, err, set(ran)) == (0, "", {"reference"})
    doubt = 100 * (accuracy * (1 - accuracy) / 100) ** 0.5
    assert f"top-1 accuracy {100 * accuracy:.2f}% (standard error {doubt:.2f})" in out
    assert f"top-5 {100 * top5:.2f}%, cross-entropy {loss:.4f}" in out
    shown = [row for row in cells(out) if row[0].isdigit()]
    written = rows(trained / "classes.csv")
    assert [row[0] for row in shown] == [row["class"] for row in written] == list("0123456789")
    for digit, (_, images, right, percent, mistaken) in enumerate(shown):
        of_class = guesses[labels == digit]
        assert (int(images), int(right)) == (len(of_class), int((of_class == digit).sum()))
        assert percent == f"{100 * int(right) / int(images):.1f}%"
        wrong = of_class[of_class != digit].bincount(minlength=10)
        pairs = sorted((-n, i) for i, n in enumerate(wrong.tolist()) if n)
        assert mistaken == written[digit]["mistaken for"] == ", ".join(f"{i} ({-n})" for n, i in pairs)
    with Image.open(trained / "confusion.png") as picture:
        assert picture.width > 500


def test_the_confusion_matrix_counts_pairs(few: Data) -> None:
    labels, guesses = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([[0], [1], [1], [0], [0]])
    result = Evaluation(torch.arange(5), labels, guesses, torch.ones(5), torch.zeros(5))
    assert result.confusion(3).tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 0]]
    assert result.accuracy == 40 and standard_error(50, 100) == 5.0


def test_a_hundred_classes_fit_on_the_screen_and_in_the_picture(run: Run, tmp_path: Path) -> None:
    datasets.cifar100(tmp_path / "c.tar.gz", binary=True)
    network = ("--repeats", "1,0,0,0", "--stem-width", "4", "--cardinality", "2", "--base-width", "2")
    once = ("--epochs", "1", "--batch-size", "100", "--micro-batch", "100")
    assert run("train", "--data", "cifar100", "c.tar.gz", *network, *once)[0] == 0
    code, out, _ = run("evaluate")
    assert code == 0 and "the 30 worst of 100 classes" in " ".join(out.split()), (
        "the title is wrapped at 120 columns"
    )
    assert len([row for row in cells(out) if row[0].startswith("class")]) == 30
    assert len(rows(tmp_path / "runs" / "demo" / "classes.csv")) == 100
    (tmp_path / "c.tar.gz").rename(tmp_path / "moved.tar.gz")
    code, _, err = run("evaluate")
    assert code == 2
    one_line(err, "c.tar.gz: the images of this run are no longer there; pass their new location with --path")
    assert run("evaluate", "--path", "moved.tar.gz")[0] == 0


def test_evaluation_by_many_classes_draws_no_names(tmp_path: Path) -> None:
    labels = torch.arange(200)
    result = Evaluation(labels, labels, labels[:, None], torch.ones(200), torch.zeros(200))
    confusion(tmp_path / "c.png", result, [f"class {i}" for i in range(200)])
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width < 1500


def test_predict_says_what_the_network_thinks(run: Run, trained: Path, few: Data) -> None:
    paths = [f"runs/demo/samples/{digit}.png" for digit in range(10)]
    code, out, err = run("predict", "runs/demo/samples", "--json", "--top", "3")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert [entry["image"] for entry in told] == paths
    _, out, _ = run("predict", *paths)
    table = [row for row in cells(out) if "samples" in row[0]]
    logits = logits_of(trained, few)
    for digit, (entry, row) in enumerate(zip(told, table, strict=True)):
        index = int((few.test.labels == digit).nonzero()[0])
        thought, order = logits[index].softmax(0).sort(descending=True)
        assert [guess["class"] for guess in entry["guesses"]] == [str(int(i)) for i in order[:3]]
        sure = [guess["probability"] for guess in entry["guesses"]]
        assert sure == pytest.approx(thought[:3].tolist(), abs=2e-6)
        assert row[:2] == [paths[digit], str(int(order[0]))] and row[2] == f"{thought[0]:.1%}"


def test_predict_takes_options_anywhere_and_any_name_after_a_double_dash(run: Run, trained: Path) -> None:
    Path("-1.png").write_bytes((trained / "samples" / "1.png").read_bytes())
    for words in (
        ("runs/demo/samples/1.png", "--json", "runs/demo/samples/2.png"),
        ("--json", "--", "-1.png"),
    ):
        code, out, err = run("predict", *words)
        names = [word for word in words if word.endswith(".png")]
        assert (code, err) == (0, "") and [entry["image"] for entry in json.loads(out)] == names


def test_predict_skips_what_cannot_be_read_on_request(run: Run, trained: Path) -> None:
    (trained / "samples" / "4.png").write_text("no image")
    code, _, err = run("predict", "runs/demo/samples")
    assert code == 2
    one_line(err, "can't read runs/demo/samples/4.png: it is damaged or not an image")
    code, out, _ = run("predict", "runs/demo/samples", "--skip-corrupt", "--json")
    told = json.loads(out)
    assert code == 0 and [len(entry["guesses"]) for entry in told] == [2] * 4 + [0] + [2] * 5
    assert "4.png: it is damaged or not an image" in told[4]["error"]
    assert run("predict", "runs/demo/samples", "--skip-corrupt")[0] == 0


def test_predict_reads_colours_transparency_and_sixteen_bits(run: Run, trained: Path) -> None:
    form, digit = checkpoint.load(trained).format, trained / "samples" / "3.png"
    with Image.open(digit) as image:
        grey = image.copy()
    exact = read_image(digit, form)
    white, black = Image.new("L", grey.size, 255), Image.new("L", grey.size, 0)
    Image.merge("RGBA", (white, white, white, grey)).save("light.png")
    Image.merge("LA", (black, grey)).save("dark.png")
    Image.fromarray(exact[0].numpy().astype("uint16") * 257).save("deep.png")
    grey.convert("P").save("palette.png")
    for name, invert in (("light", False), ("dark", True), ("deep", False), ("palette", False)):
        told = read_image(Path(f"{name}.png"), form, invert=invert)
        assert (told.int() - exact.int()).abs().amax() <= 1, name


def test_predict_resizes_and_inverts_on_request(run: Run, trained: Path) -> None:
    form = checkpoint.load(trained).format
    with Image.open("runs/demo/samples/3.png") as image:
        large = image.resize((56, 56), Image.Resampling.NEAREST)
    large.point(lambda value: 255 - value).convert("RGB").save("paper.jpg")
    code, out, err = run("predict", "paper.jpg", "--resize", "--invert")
    assert (code, err) == (0, "") and "paper.jpg" in out
    told = read_image(Path("paper.jpg"), form, resize=True, invert=True).double()
    exact = read_image(Path("runs/demo/samples/3.png"), form).double()
    assert told.shape == (1, 28, 28) and (told - exact).abs().mean() < 10
    Image.new("L", (56, 14), 255).save("wide.png")
    told = read_image(Path("wide.png"), form, resize=True)[0]
    assert told[11:17].min() > 200 and told[:9].max() == 0 and told[19:].max() == 0, (
        "the aspect ratio changed"
    )


def test_photographs_of_any_size_are_predicted_on_their_middle(run: Run, tmp_path: Path) -> None:
    data = load_data("folder", datasets.photographs(tmp_path / "photos"), 16)
    settings = Settings(
        Source("folder", str(tmp_path / "photos"), 16),
        Network((1, 0, 0, 0), 2, 2, 4),
        Recipe(1, 12, 12, warmup_epochs=0.0),
    )
    train(settings, data, tmp_path / "runs" / "demo", CPU, Console(quiet=True))
    network = checkpoint.load(tmp_path / "runs" / "demo").network()
    with torch.no_grad():
        images = torch.stack([data.test.read(i) for i in range(len(data.test))])
        expected = network(data.format.normalize(images)).softmax(1)
    code, out, _ = run("predict", "photos/val", "--json", "--top", "3")
    assert code == 0
    told = json.loads(out)
    assert [entry["image"] for entry in told] == [
        f"photos/val/{p.parent.name}/{p.name}" for p in data.test.paths
    ]
    for entry, shares in zip(told, expected, strict=True):
        got = {guess["class"]: guess["probability"] for guess in entry["guesses"]}
        assert [got[name] for name in data.classes] == pytest.approx(shares.tolist(), abs=1e-5)


def test_processes_that_share_an_evaluation_would_add_up(few: Data, trained: Path) -> None:
    """Results are stored by the positions of images, so those of several processes can be added."""
    network = checkpoint.load(trained).network()
    whole = evaluate(network, few.test, few.format, CPU)
    assert whole.indices.tolist() == list(range(100)) and whole.labels.equal(few.test.labels)
    assert abs(whole.confidence - logits_of(trained, few).softmax(1).amax(1)).max() < 1e-6


def test_a_test_lets_go_of_the_images_that_workers_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that isn't released keeps shared memory and file descriptors open."""
    data = load_data("folder", datasets.photographs(tmp_path / "photos"), 16)
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 2)
    network = build(Network((1, 0, 0, 0), 2, 2, 4), 3, 3)
    opened = []

    def count(_: int) -> None:
        opened.append(len(list(Path("/proc/self/fd").iterdir())))

    evaluate(network, data.test, data.format, CPU, workers=1, advance=count)
    assert len(opened) == 9 and max(opened[3:]) <= opened[2], opened


@pytest.mark.parametrize("suffix", [".pt2", ".onnx", ".safetensors"])
def test_an_export_gives_what_the_network_gives(run: Run, trained: Path, few: Data, suffix: str) -> None:
    path = trained / f"network{suffix}"
    code, out, err = run("export", "-o", str(path.relative_to(Path.cwd())))
    assert (code, err) == (
        0,
        "",
    ) and f"wrote runs/demo/network{suffix}: its outputs match the network's " in out
    assert "N x 1 x 28 x 28, float32: (pixels / 255 - [0.1307]) / [0.3081]" in out
    images = (few.test.images[:7].float() / 255 - 0.1307) / 0.3081
    if suffix == ".pt2":
        files = {"resnext": ""}
        logits = torch.export.load(path, extra_files=files).module()(images)
        about = files["resnext"]
    elif suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        model = onnx.load(path)
        about = model.metadata_props[0].value
        assert {node.op_type for node in model.graph.node} >= {"Conv"}
        assert all(node.domain in ("", "ai.onnx") for node in model.graph.node), "operators of gconv"
    else:
        network = build(checkpoint.load(trained).settings.network, 10, 1)
        network.load_state_dict(load_file(path))
        logits = network.eval()(images)
        with safe_open(path, "pt") as file:
            about = file.metadata()["resnext"]
    expected = logits_of(trained, few)[:7]
    assert np.abs((logits - expected).detach().numpy()).max() < 1e-4 * expected.abs().max()
    assert json.loads(about)["classes"] == list("0123456789")
    assert json.loads(about)["images"]["mean"] == [0.1307]


@pytest.mark.parametrize("suffix", [".pt2", ".safetensors"])
def test_an_export_that_differs_is_not_written(
    trained: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path, write = trained / f"network{suffix}", exporters.WRITERS[suffix]

    def wrong(*arguments: object) -> object:
        run = write(*arguments)
        return lambda x: run(x) * 1.01

    monkeypatch.setitem(exporters.WRITERS, suffix, wrong)
    before = set(trained.iterdir())
    with pytest.raises(UserError, match="not written, because its outputs differ from the network's by"):
        exporters.export(checkpoint.load(trained), path)
    assert set(trained.iterdir()) == before
