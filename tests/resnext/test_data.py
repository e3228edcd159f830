"""Data sets: digits from packages, CIFAR archives, folders of photographs, and errors about each."""

from __future__ import annotations

import io
import pickle
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from resnext.data import Data, ImageFormat, load_data
from resnext.data.augment import Augmentation, RandomCrop, seed_of
from resnext.data.folder import image_files
from resnext.data.images import centre, open_image
from resnext.data.loader import TrainLoader, held_out_batches, micro_batch
from resnext.errors import UserError


@pytest.mark.parametrize(
    ("name", "train", "test", "size"), [("mnist5k", 4000, 1000, 28), ("digits", 1000, 797, 8)]
)
def test_digits_are_real_balanced_and_always_the_same(name: str, train: int, test: int, size: int) -> None:
    data = load_data(name)
    assert (len(data.train), len(data.test), data.format.size) == (train, test, size)
    counts = torch.stack([data.train.labels.bincount() / train, data.test.labels.bincount() / test])
    assert (counts - counts.mean(0)).abs().max() < 0.002, "not stratified"
    images = data.train.images
    assert images.dtype == torch.uint8 and images.shape == (train, 1, size, size)
    assert images.amin() == 0 and images.amax() == 255
    assert len(set(data.train.labels[:20].tolist())) > 5, "still in label order"
    everything = torch.cat([images, data.test.images]).numpy()
    assert len({image.tobytes() for image in everything}) == train + test, "an image is in both sets"
    assert torch.equal(load_data(name).test.images, data.test.images)
    normal = data.format.normalize(images)
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03


def test_cifar_reads_both_versions_packed_and_unpacked(tmp_path: Path) -> None:
    binary = datasets.cifar10_binary(tmp_path / "binary" / "cifar-10-binary.tar.gz")
    python = datasets.cifar10_python(tmp_path / "renamed.tar.gz")
    with tarfile.open(python) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    unpacked = tmp_path / "unpacked"
    places = (binary, binary.parent, python, unpacked, unpacked / "cifar-10-batches-py")
    sets = [load_data("cifar10", place) for place in places]
    for data in sets:
        assert data.classes == tuple(datasets.CIFAR10)
        assert (len(data.train), len(data.test)) == (200, 50)
        for part in ("train", "test"):
            assert torch.equal(getattr(data, part).images, getattr(sets[0], part).images)
            assert torch.equal(getattr(data, part).labels, getattr(sets[0], part).labels)
    pixels, labels = datasets.cifar_pixels(40, seed=1)
    assert sets[0].train.labels[40:80].tolist() == labels.tolist(), "the second batch comes second"
    assert np.array_equal(sets[0].train.images[43, 1].numpy(), pixels[3, 1024:2048].reshape(32, 32)), "green"


@pytest.mark.parametrize("binary", [True, False])
def test_cifar100_has_the_fine_labels(tmp_path: Path, binary: bool) -> None:
    data = load_data("cifar100", datasets.cifar100(tmp_path / "c.tar.gz", binary))
    assert len(data.classes) == 100 and data.classes[42] == "class42"
    assert data.train.labels.tolist() == [i % 100 for i in range(200)]


def repack(archive: Path, changed: str, content: bytes | None) -> Path:
    """Return a copy of an archive with one file changed or removed."""
    path = archive.with_name("repacked.tar.gz")
    with tarfile.open(archive) as old, tarfile.open(path, "w:gz") as new:
        for member in old:
            if not member.name.endswith(changed):
                datasets.add(new, member.name, old.extractfile(member).read())
        if content is not None:
            datasets.add(new, f"x/{changed}", content)
    return path


def test_a_damaged_archive_is_named_in_one_line(tmp_path: Path) -> None:
    binary = datasets.cifar10_binary(tmp_path / "cifar-10-binary.tar.gz")
    python = datasets.cifar10_python(tmp_path / "cifar-10-python.tar.gz")
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(binary.read_bytes()[:-4000])
    text = tmp_path / "text.tar.gz"
    text.write_text("no archive")
    (tmp_path / "empty").mkdir()

    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    cases = [
        ("cifar10", cut, "cut.tar.gz: it is truncated, damaged or not a .tar.gz archive"),
        ("cifar10", text, "text.tar.gz: it is truncated, damaged or not a .tar.gz archive"),
        ("cifar10", tmp_path / "none", "none: no such file or folder"),
        ("cifar10", tmp_path / "empty", "empty isn't cifar10: data_batch_1 is missing"),
        ("cifar100", binary, "cifar-10-binary.tar.gz isn't cifar100"),
        ("cifar10", None, "--data cifar10 needs a path: download"),
        ("mnist5k", binary, "the images of --data mnist5k come with an installed package; drop the path"),
        ("cifar10", lambda: repack(binary, "data_batch_3.bin", None), "data_batch_3.bin is missing"),
        ("cifar10", lambda: repack(binary, "data_batch_3.bin", b"x" * 3000), "data_batch_3.bin is truncated"),
        (
            "cifar10",
            lambda: repack(binary, "test_batch.bin", b"\x0b" + b"x" * 3072),
            "labels must be below 10, got 11",
        ),
        ("cifar10", lambda: repack(python, "data_batch_2", b"junk"), "data_batch_2 is truncated or damaged"),
        (
            "cifar10",
            lambda: repack(python, "data_batch_2", pickle.dumps({b"data": Evil()})),
            "data_batch_2 is truncated",
        ),
    ]
    for name, place, message in cases:
        with pytest.raises(UserError) as error:
            load_data(name, place() if callable(place) else place)
        assert message in str(error.value) and "\n" not in str(error.value), str(error.value)
    assert not (tmp_path / "ran").exists(), "a pickle ran code"


def test_a_folder_is_read_as_imagenet_is(tmp_path: Path) -> None:
    folder = datasets.photographs(tmp_path / "photos")
    (folder / "train" / "colour0" / ".hidden.jpg").write_text("")
    (folder / "train" / "colour0" / "notes.txt").write_text("")
    data = load_data("folder", folder, 32)
    assert data.classes == ("colour0", "colour1", "colour2")
    assert data.train.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12 and len(data.test) == 18
    image = data.test.read(7)
    assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
    means = image.float().mean((1, 2))
    assert (means - torch.tensor(datasets.COLOURS[1])).abs().max() < 10, (
        "the channels are red, green and blue, in this order"
    )
    (folder / "val").rename(folder / "test")
    assert len(load_data("folder", folder).test) == 18 and load_data("folder", folder).format.size == 224


def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path) -> None:
    folder = datasets.photographs(tmp_path / "photos")
    for problem, message in (
        (lambda: (folder / "val" / "new").mkdir(), "val/new: no such class in"),
        (lambda: (folder / "train" / "new").mkdir(), "train/new: no images found"),
        (
            lambda: Image.new("RGB", (9, 9)).save(folder / "train" / "new" / "a.png"),
            "val/new: no images found",
        ),
        (lambda: (folder / "val").rename(folder / "elsewhere"), "photos/val: no such folder"),
        (lambda: (folder / "train").rename(folder / "gone"), "photos/train: no such folder"),
        (lambda: folder.rename(tmp_path / "moved"), "photos: no such folder"),
    ):
        problem()
        with pytest.raises(UserError) as error:
            load_data("folder", folder)
        assert message in str(error.value) and "\n" not in str(error.value), str(error.value)
    with pytest.raises(UserError, match="--data folder needs a path: a folder with train/CLASS"):
        load_data("folder")
    with pytest.raises(UserError, match="--image-size needs --data folder, got --data digits"):
        load_data("digits", None, 32)


def test_random_crops_are_parts_of_8_percent_or_more() -> None:
    """On an image whose colors are the coordinates of the pixels."""
    wide, high = 200, 120
    columns, rows = np.meshgrid(np.arange(wide), np.arange(high))
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], 2).astype(np.uint8))
    areas, ratios = [], []
    for seed in range(300):
        crop = np.array(RandomCrop(seed)(image, 32)).astype(float)
        assert np.array_equal(crop, np.array(RandomCrop(seed)(image, 32)))
        side = [(crop[..., i].max() - crop[..., i].min()) * 32 / 31 for i in (0, 1)]
        areas.append(side[0] * side[1] / (wide * high))
        ratios.append(side[0] / side[1])
    assert min(areas) < 0.15 and max(areas) > 0.75 and min(areas) > 0.06 and max(areas) < 1.02
    assert min(ratios) < 0.85 and max(ratios) > 1.2 and min(ratios) > 0.7 and max(ratios) < 1.45


def test_the_middle_of_a_photograph_is_tested_on() -> None:
    columns, rows = np.meshgrid(np.arange(160), np.arange(128))
    image = np.array(centre(Image.fromarray(np.stack([columns, rows, 0 * rows], 2).astype(np.uint8)), 112))
    assert image.shape == (112, 112, 3), "7/8 of 128 pixels, not scaled"
    assert np.array_equal(image[0, 0], (24, 8, 0)) and np.array_equal(image[-1, -1], (135, 119, 0))


def test_sixteen_bits_transparency_and_grey_become_colours(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.array(open_image(tmp_path / "deep.png", 3)).tolist()[0][0] == [128, 128, 128]
    assert np.array(open_image(tmp_path / "clear.png", 3, "white")).tolist()[0][0] == [255, 255, 255]


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_or_make_way_for_the_next(tmp_path: Path, workers: int) -> None:
    folder = datasets.photographs(tmp_path)
    truncated, empty = folder / "train" / "colour0" / "5.jpg", folder / "val" / "colour1" / "0.png"
    truncated.write_bytes(truncated.read_bytes()[:300])
    empty.write_bytes(b"")
    data = load_data("folder", folder, 16)
    index = list(data.train.paths).index(truncated)
    for skip in (False, True):
        loader = TrainLoader(data.train, 36, 12, 0, workers=workers, skip_corrupt=skip)
        (batches,) = loader.epoch(0)
        lines = [line for batch in batches for line in batch.unreadable]
        assert lines == [f"can't read {truncated}: it is damaged or not an image; use a PNG or JPEG file"]
        indices = sorted(torch.cat([batch.indices for batch in batches]).tolist())
        expected = [i for i in range(36) if i != index]
        assert indices == (sorted([*expected, index + 1]) if skip else expected)
    batches = list(held_out_batches(data.test, 4, workers=workers))
    assert [line for batch in batches for line in batch.unreadable] == [
        f"can't read {empty}: it is damaged or not an image; use a PNG or JPEG file"
    ]
    missing = list(data.test.paths).index(empty)
    assert torch.cat([b.indices for b in batches]).tolist() == [i for i in range(18) if i != missing]


def flat(steps: list) -> list[tuple]:
    return [
        (b.indices.tolist(), b.labels.tolist(), b.seed, b.images.sum().item()) for step in steps for b in step
    ]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_batches_do_not_depend_on_processes_workers_or_where_one_starts(
    tmp_path: Path, processes: int
) -> None:
    data = load_data("folder", datasets.photographs(tmp_path), 16)
    whole = [list(TrainLoader(data.train, 16, 4, seed=3).epoch(e)) for e in (0, 1)]
    assert len(whole[0]) == 2, "an incomplete batch is skipped"
    seen = [i for indices, *_ in flat(whole[0]) for i in indices]
    assert len(set(seen)) == 32 and seen != sorted(seen), "shuffled, each once"
    assert flat(whole[0]) != flat(whole[1]), "another order in another epoch"
    assert flat(whole[0]) != flat(list(TrainLoader(data.train, 16, 4, seed=4).epoch(0)))
    shares = [
        list(TrainLoader(data.train, 16, 4, 3, rank, processes, workers=rank % 2).epoch(1))
        for rank in range(processes)
    ]
    together = [[b for share in shares for b in share[step]] for step in range(2)]
    assert flat(together) == flat(whole[1])
    assert flat(list(TrainLoader(data.train, 16, 4, 3).epoch(1, start=1))) == flat(whole[1][1:])
    tests = [list(held_out_batches(data.test, 4, rank, processes)) for rank in range(processes)]
    assert sorted(i for share in tests for b in share for i in b.indices.tolist()) == list(range(18))


def test_a_batch_is_shared_in_passes_of_one_size() -> None:
    assert [micro_batch(64, 32, n) for n in (1, 2, 4)] == [32, 32, 16]
    assert micro_batch(50, 32, 1) == 25 and micro_batch(12, 100, 3) == 4
    with pytest.raises(UserError, match="--batch-size must be a multiple of the 3 processes, got 64"):
        micro_batch(64, 32, 3)


def test_digits_move_a_little_and_keep_the_ground_black(mnist: Data) -> None:
    augment = Augmentation("mnist5k", mnist.format, 10)
    images, labels = mnist.train.images[:64], mnist.train.labels[:64]
    moved, targets = augment(images, labels, seed=1)
    assert torch.equal(moved, augment(images, labels, seed=1)[0]) and torch.equal(targets, labels)
    assert not torch.equal(moved, augment(images, labels, seed=2)[0])
    plain = mnist.format.normalize(images)
    assert not torch.isclose(plain, moved).flatten(1).all(1).any(), "an image is unchanged"
    torch.testing.assert_close(moved[:, :, 0, 0], plain[:, :, 0, 0])
    ink = torch.stack([(x - x.amin()).sum((1, 2, 3)) for x in (plain, moved)])
    assert ((ink[1] / ink[0]).sqrt() - 1).abs().amax() < 0.15, "scaled by more than about 10%"
    for dim in (3, 2):
        centres = (
            torch.stack([(x - x.amin()).sum((1, dim)) @ torch.arange(28.0) for x in (plain, moved)]) / ink
        )
        assert 0.5 < (centres[1] - centres[0]).std() < 3, "shifted by some pixels in both directions"


def test_cifar_is_shifted_by_four_pixels_at_most_and_flipped() -> None:
    form = ImageFormat(1, 32, (0.0,), (1.0,))
    image = torch.zeros(200, 1, 32, 32, dtype=torch.uint8)
    image[:, :, 16, 8] = 255
    moved, _ = Augmentation("cifar10", form, 10)(image, torch.zeros(200).long(), seed=0)
    places = moved.squeeze(1).nonzero()[:, 1:]
    assert len(places) == 200, "one bright pixel each"
    assert set(places[:, 0].tolist()) == set(range(12, 21)), "shifted by -4 to 4"
    columns = set(places[:, 1].tolist())
    assert columns == set(range(4, 13)) | {31 - c for c in range(4, 13)}, "and flipped, or not"


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_targets_are_the_shares_of_the_mixed_images(mix: str) -> None:
    """Each class is a brightness, so the mean of an image is that of its targets."""
    form = ImageFormat(3, 16, (0.0,) * 3, (1.0,) * 3)
    labels = torch.arange(64) % 8
    images = (labels * 30).to(torch.uint8).view(-1, 1, 1, 1).expand(64, 3, 16, 16)
    mixed, targets = Augmentation("folder", form, 8, **{mix: 1.0})(images, labels, seed=5)
    assert torch.allclose(targets.sum(1), torch.ones(64)) and (targets > 0).sum(1).max() == 2
    assert ((targets > 0).sum(1) == 2).float().mean() > 0.7, "hardly any images are mixed"
    expected = targets @ (torch.arange(8.0) * 30 / 255)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected, atol=1e-5, rtol=0)
    patchy = mixed.flatten(1).std(1) > 1e-4
    assert patchy.any() == (mix == "cutmix")
    assert set(targets[:, :].argmax(1).tolist()) == set(range(8))


def test_alpha_says_how_far_images_are_mixed() -> None:
    form = ImageFormat(1, 8, (0.0,), (1.0,))
    images, labels = torch.zeros(64, 1, 8, 8, dtype=torch.uint8), torch.arange(64)
    least = {}
    for alpha in (0.2, 10.0):
        targets = [
            Augmentation("folder", form, 64, mixup=alpha)(images, labels, seed)[1] for seed in range(20)
        ]
        least[alpha] = 1 - torch.cat(targets).amax(1).mean()
    # The mean of the smaller share is 0.11 for Beta(0.2, 0.2) and 0.41 for Beta(10, 10).
    assert 0.08 < least[0.2] < 0.15 and 0.37 < least[10.0] < 0.45, least


def test_with_both_mixes_each_has_its_turn_and_nothing_else_is_drawn_from() -> None:
    form = ImageFormat(1, 16, (0.0,), (1.0,))
    labels = torch.arange(16) % 8
    images = (labels * 30).to(torch.uint8).view(-1, 1, 1, 1).expand(16, 1, 16, 16)
    augment = Augmentation("folder", form, 8, mixup=1.0, cutmix=1.0)
    before = torch.get_rng_state()
    patchy = [bool((augment(images, labels, seed)[0].flatten(1).std(1) > 1e-4).any()) for seed in range(30)]
    assert 5 < sum(patchy) < 25
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_depend_on_every_number() -> None:
    seeds = {seed_of(*numbers) for numbers in ((0,), (1,), (0, 1), (1, 0), (0, 0, 1), (2**31, 5))}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)


def test_images_survive_a_round_trip_through_a_file(tmp_path: Path, mnist: Data) -> None:
    from resnext.data.images import read_image, write_image

    colours = torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8)
    for image, form in (
        (mnist.test.images[0], mnist.format),
        (colours, ImageFormat(3, 9, (0.0,) * 3, (1.0,) * 3)),
    ):
        write_image(tmp_path / "image.png", image)
        assert torch.equal(read_image(tmp_path / "image.png", form), image)
    assert io.BytesIO((tmp_path / "image.png").read_bytes()).read(4) == b"\x89PNG"


def test_what_is_hidden_is_ignored_everywhere(tmp_path: Path) -> None:
    """Names that start with a dot and __MACOSX, a folder of macOS, are not classes or images."""
    folder = datasets.photographs(tmp_path / "photos", classes=2, train=2, test=1)
    before = load_data("folder", folder)
    image = next((folder / "val" / "colour0").iterdir())
    for part in ("train", "val"):
        for place in (".ipynb_checkpoints", "__MACOSX", "colour0/.thumbnails", "colour1/__MACOSX/colour1"):
            (folder / part / place).mkdir(parents=True)
            shutil.copy(image, folder / part / place / "a.png")
        shutil.copy(image, folder / part / "colour0" / "._a.png")
        for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
            (folder / part / name).write_bytes(b"no image")
            (folder / part / "colour0" / name).write_bytes(b"no image")
    after = load_data("folder", folder)
    assert after.classes == before.classes == ("colour0", "colour1")
    assert (after.train.paths, after.test.paths) == (before.train.paths, before.test.paths)
    assert image_files(folder / "val") == before.test.paths
    hidden = folder.rename(tmp_path / ".photos")
    assert load_data("folder", hidden).classes == before.classes, (
        "a hidden folder that is passed explicitly is read"
    )
