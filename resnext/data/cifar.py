"""CIFAR-10 and CIFAR-100 from the published archives: the python or the binary version, packed or unpacked.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The formats of both
versions are described at https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import codecs
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from resnext.data.images import ImageFormat
from resnext.data.sets import Data, Images
from resnext.errors import UserError
from resnext.names import shown

SIZE = 32
PIXELS = 3 * SIZE * SIZE


@dataclass(frozen=True)
class _Version:
    """The files of a published version, and the functions that parse them."""

    train: tuple[str, ...]
    test: str
    names: str
    parse: Callable[[bytes], tuple[np.ndarray, np.ndarray]]
    parse_names: Callable[[bytes], list[str]]


def load_cifar(name: str, path: Path | None) -> Data:
    """Load CIFAR-10 or CIFAR-100.

    Args:
        name: "cifar10" or "cifar100".
        path: the downloaded archive (.tar.gz), or a folder with the archive or its unpacked files.

    Raises:
        UserError: the archive is missing, truncated or damaged; the error names the path.
    """
    number = name.removeprefix("cifar")
    archives = [f"cifar-{number}-{version}.tar.gz" for version in ("python", "binary")]
    if path is None:
        raise UserError(
            f"--data {name} needs a path: download {' or '.join(archives)} from "
            "https://www.cs.toronto.edu/~kriz/cifar.html and pass the path of the archive or its folder"
        )
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; pass the path of {' or '.join(archives)}")
    packed = path if path.is_file() else next((path / a for a in archives if (path / a).is_file()), None)
    versions = _VERSIONS[name]
    wanted = {file for version in versions for file in (*version.train, version.test, version.names)}
    files = _unpack(packed, wanted) if packed else _gather(path, wanted)
    missing = [
        [file for file in (*version.train, version.test, version.names) if file not in files]
        for version in versions
    ]
    # The version with the fewest missing files.
    version, lacks = min(zip(versions, missing, strict=True), key=lambda pair: len(pair[1]))
    if lacks:
        raise UserError(
            f"{packed or path} isn't {name}: {lacks[0]} is missing; pass the path of {' or '.join(archives)}"
        )
    return _data(name, version, files, packed or path)


def _unpack(archive: Path, wanted: set[str]) -> dict[str, bytes]:
    """Return the contents of the ``wanted`` files in an archive, by name."""
    try:
        with tarfile.open(archive) as tar:
            named = ((PurePosixPath(member.name).name, member) for member in tar)
            opened = ((name, tar.extractfile(member)) for name, member in named if name in wanted)
            return {name: file.read() for name, file in opened if file is not None}
    except (tarfile.TarError, EOFError, OSError, zlib.error):
        raise UserError(
            f"can't read {archive}: it is truncated, damaged or not a .tar.gz archive; download it again"
        ) from None


def _gather(folder: Path, wanted: set[str]) -> dict[str, bytes]:
    """Return the contents of the ``wanted`` files in a folder and the folders in it, by name."""
    found = (path for path in sorted(folder.glob("*")) + sorted(folder.glob("*/*")) if path.is_file())
    return {path.name: path.read_bytes() for path in found if path.name in wanted}


def _data(name: str, version: _Version, files: dict[str, bytes], source: Path) -> Data:
    def images(file: str) -> Images:
        try:
            pixels, labels = version.parse(files[file])
            if len(pixels) != len(labels) or not len(labels) or pixels.dtype != np.uint8:
                raise ValueError("expected as many images as labels")
            return Images(
                torch.from_numpy(pixels.reshape(-1, 3, SIZE, SIZE).copy()),
                torch.from_numpy(labels.astype(np.int64)),
            )
        except Exception:  # damaged pickles raise all kinds of errors
            raise UserError(
                f"can't read {source}: {file} is truncated or damaged; download the archive again"
            ) from None

    try:
        classes = tuple(map(shown, version.parse_names(files[version.names])))
    except Exception:
        raise UserError(
            f"can't read {source}: {version.names} is damaged; download the archive again"
        ) from None
    parts = [images(file) for file in version.train]
    train = Images(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))
    test = images(version.test)
    highest = int(max(train.labels.max(), test.labels.max()))
    if highest >= len(classes):
        raise UserError(
            f"can't read {source}: labels must be below {len(classes)}, got {highest}; download it again"
        )
    return Data(name, classes, FORMATS[name], train, test)


FORMATS = {
    "cifar10": ImageFormat(3, SIZE, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "cifar100": ImageFormat(3, SIZE, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
}


_RECONSTRUCT = import_module("numpy._core.multiarray")._reconstruct  # what pickled arrays call


class _Unpickler(pickle.Unpickler):
    """Reads arrays, lists and strings, and rejects everything else, since a pickle can run any code."""

    def find_class(self, module: str, name: str) -> Any:
        # The names in the published files, which Python 2 and NumPy 1 wrote, and their present names.
        allowed = {
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": np.dtype,
            "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
            "numpy._core.multiarray._reconstruct": _RECONSTRUCT,
            "_codecs.encode": codecs.encode,
        }
        if (wanted := f"{module}.{name}") not in allowed:
            raise pickle.UnpicklingError(f"{wanted} isn't allowed in a data set")
        return allowed[wanted]


def _load(content: bytes) -> dict[bytes, Any]:
    return _Unpickler(io.BytesIO(content), encoding="bytes").load()


def _python(labels: bytes) -> Callable[[bytes], tuple[np.ndarray, np.ndarray]]:
    def parse(content: bytes) -> tuple[np.ndarray, np.ndarray]:
        batch = _load(content)
        return batch[b"data"], np.array(batch[labels])

    return parse


def _python_names(key: bytes) -> Callable[[bytes], list[str]]:
    return lambda content: [name.decode() for name in _load(content)[key]]


def _binary(labels: int) -> Callable[[bytes], tuple[np.ndarray, np.ndarray]]:
    """Return a parser of records of ``labels`` bytes, the last of which is the label, and the pixels."""

    def parse(content: bytes) -> tuple[np.ndarray, np.ndarray]:
        records = np.frombuffer(content, np.uint8).reshape(-1, labels + PIXELS)
        return records[:, labels:], records[:, labels - 1]

    return parse


def _binary_names(content: bytes) -> list[str]:
    return content.decode().split()


_BATCHES = range(1, 6)
_VERSIONS = {
    "cifar10": (
        _Version(
            tuple(f"data_batch_{i}" for i in _BATCHES),
            "test_batch",
            "batches.meta",
            _python(b"labels"),
            _python_names(b"label_names"),
        ),
        _Version(
            tuple(f"data_batch_{i}.bin" for i in _BATCHES),
            "test_batch.bin",
            "batches.meta.txt",
            _binary(1),
            _binary_names,
        ),
    ),
    "cifar100": (
        _Version(("train",), "test", "meta", _python(b"fine_labels"), _python_names(b"fine_label_names")),
        _Version(("train.bin",), "test.bin", "fine_label_names.txt", _binary(2), _binary_names),
    ),
}
