"""What training is made of: the digits, their augmentation, batches, the meter, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnext import checkpoint, data, train
from resnext.data import Digits
from resnext.errors import UserError


def test_digits_are_real_balanced_and_always_the_same(digits: tuple[Digits, Digits]) -> None:
    training, held_out = digits
    assert training.labels.bincount().tolist() == [400] * 10
    assert held_out.labels.bincount().tolist() == [100] * 10
    assert training.images.dtype == torch.uint8 and training.images.shape == (4000, 1, 28, 28)
    assert training.images.amin() == 0 and training.images.amax() == 255
    assert len(set(training.labels[:20].tolist())) > 5, "still in label order"
    everything = torch.cat([training.images, held_out.images]).flatten(1)
    assert len(everything.unique(dim=0)) == 5000, "an image is in both halves"
    again = data.load_mnist5k()
    assert torch.equal(again[1].images, held_out.images)
    normal = data.normalize(training.images)
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02


def test_augmentation_moves_a_little_and_keeps_the_ground_black(digits: tuple[Digits, Digits]) -> None:
    images = data.normalize(digits[0].images[:64])
    moved = data.augment(images, torch.Generator().manual_seed(0))
    again = data.augment(images, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again) and not torch.equal(moved, images)
    torch.testing.assert_close(moved[:, :, 0, 0], images[:, :, 0, 0])
    ink, ink_moved = ((x - x.amin()).sum((1, 2, 3)) for x in (images, moved))
    assert ((ink_moved / ink).sqrt() - 1).abs().amax() < 0.15, "scaled by more than some 10%"


def test_meter_weighs_batches_by_their_size() -> None:
    meter = train.Meter()
    meter.add(torch.tensor(1.0), torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
    meter.add(torch.tensor(2.0), torch.tensor([[2.0, 1.0]] * 3), torch.tensor([0, 1, 1]))
    row = meter.row()
    assert (row["train_loss"], row["train_accuracy"]) == (1.75, 50.0)


def test_batches_are_shuffled_anew_each_epoch_and_augmented(digits: tuple[Digits, Digits]) -> None:
    few = Digits(digits[0].images[:100], torch.arange(100))
    recipe = train.Recipe(batch_size=30)
    epochs = [list(train._batches(few, recipe, epoch, torch.device("cpu"))) for epoch in (1, 2)]
    orders = [torch.cat([labels for _, labels in batches]) for batches in epochs]
    assert all(len(order) == 90 == len(order.unique()) for order in orders), "an incomplete batch is left out"
    assert not torch.equal(*orders) and not torch.equal(orders[0], torch.arange(90))
    plain = data.normalize(few.images[orders[0]])
    moved = torch.cat([images for images, _ in epochs[0]])
    assert not torch.isclose(plain, moved).flatten(1).all(1).any(), "an image came through as it was"
    rows, columns = (
        torch.stack([(x - x.amin()).sum((1, dim)) @ torch.arange(28.0) for x in (plain, moved)])
        for dim in (3, 2)
    )
    ink = torch.stack([(x - x.amin()).sum((1, 2, 3)) for x in (plain, moved)])
    for centre in (rows / ink, columns / ink):
        assert 0.5 < (centre[1] - centre[0]).std() < 3, "moved by some pixels in both directions"


def test_checkpoint_survives_a_death_while_the_next_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = {"repeats": (1, 0, 0, 0), "cardinality": 2, "stem_width": 8, "num_classes": 10}
    model = checkpoint.ResNeXt(**network)
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, model, network, 1)

    def half(content: dict, file: object) -> None:
        file.write(b"half a check")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, model, network, 2)
    assert checkpoint.load(path).epochs == 1


def test_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"format": checkpoint.FORMAT, "network": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cut short, damaged"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
