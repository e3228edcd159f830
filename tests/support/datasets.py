"""Small datasets on disk, created for each test: archives like CIFAR's, folders like ImageNet's."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

COLOURS = ((220, 40, 40), (40, 200, 60), (50, 60, 220), (210, 200, 40), (200, 60, 200))
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar_pixels(count: int, classes: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (count, 3072) and labels (count,): noise around a brightness that shows the class."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    noise = generator.normal(0, 20, (count, 3072))
    return np.clip(noise + 25 + labels[:, None] * 200 / classes, 0, 255).astype(np.uint8), labels


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def cifar10_binary(path: Path, each: int = 40, test: int = 50) -> Path:
    """Write cifar-10-binary.tar.gz with five batches of ``each`` images, and ``test`` test images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
            pixels, labels = cifar_pixels(test if name == "test_batch" else each, seed=seed)
            records = np.concatenate([labels[:, None].astype(np.uint8), pixels], 1)
            add(tar, f"cifar-10-batches-bin/{name}.bin", records.tobytes())
        add(tar, "cifar-10-batches-bin/batches.meta.txt", ("\n".join(CIFAR10) + "\n").encode())
    return path


class Python2Pickler(pickle._Pickler):
    """A pickler that writes text and bytes as Python 2 did, as in the published archives."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value: str | bytes) -> None:
        content = value.encode() if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2(value: object) -> bytes:
    """Return a pickle as Python 2 and NumPy 1 write it."""
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar10_python(path: Path, each: int = 40, test: int = 50) -> Path:
    """Write the same images as cifar-10-python.tar.gz."""
    with tarfile.open(path, "w:gz") as tar:
        for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
            pixels, labels = cifar_pixels(test if name == "test_batch" else each, seed=seed)
            batch = {b"data": pixels, b"labels": labels.tolist(), b"batch_label": b"a batch"}
            add(tar, f"cifar-10-batches-py/{name}", python2(batch))
        names = {b"label_names": [name.encode() for name in CIFAR10], b"num_vis": 3072}
        add(tar, "cifar-10-batches-py/batches.meta", pickle.dumps(names, protocol=2))
    return path


def cifar100(path: Path, binary: bool, count: int = 200) -> Path:
    """Write cifar-100-binary.tar.gz or cifar-100-python.tar.gz; coarse labels are fine labels // 5."""
    names = [f"class{i}" for i in range(100)]
    with tarfile.open(path, "w:gz") as tar:
        for seed, part in enumerate(("train", "test")):
            pixels, labels = cifar_pixels(count, 100, seed)
            if binary:
                columns = [(labels // 5)[:, None], labels[:, None], pixels]
                add(
                    tar, f"cifar-100-binary/{part}.bin", np.concatenate(columns, 1).astype(np.uint8).tobytes()
                )
            else:
                batch = {
                    b"data": pixels,
                    b"fine_labels": labels.tolist(),
                    b"coarse_labels": (labels // 5).tolist(),
                }
                add(tar, f"cifar-100-python/{part}", python2(batch))
        if binary:
            add(tar, "cifar-100-binary/fine_label_names.txt", "\n".join(names).encode())
        else:
            meta = {b"fine_label_names": [name.encode() for name in names]}
            add(tar, "cifar-100-python/meta", pickle.dumps(meta, protocol=2))
    return path


def photographs(folder: Path, classes: int = 3, train: int = 12, test: int = 6) -> Path:
    """Write train/CLASS/*.jpg and val/CLASS/*.png of several sizes; each class is a color."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", test)):
        for label in range(classes):
            place = folder / part / f"colour{label}"
            place.mkdir(parents=True)
            for i in range(count):
                wide, high = generator.integers(40, 90, 2)
                pixels = generator.normal(COLOURS[label], 25, (high, wide, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / (f"{i}.jpg" if part == "train" else f"{i}.png"))
    return folder
