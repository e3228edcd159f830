"""Export of trained networks to torch.export, ONNX and safetensors files, each checked before it is kept."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from importlib import import_module
from io import BytesIO, StringIO
from pathlib import Path

import torch
from torch import Tensor, nn

import gconv
from resnext.checkpoint import Checkpoint
from resnext.errors import UserError
from resnext.files import replacing
from resnext.names import to_json

# Relative to the largest output. Other libraries sum in another order.
TOLERANCE = 1e-4
BATCHES = (1, 3)


def export(saved: Checkpoint, path: Path) -> float:
    """Write a trained network to a .pt2 (torch.export), .onnx or .safetensors file.

    The exported network accepts batches of any size of normalized images (N, C, H, W). The file has a JSON
    entry "resnext" with the mean and standard deviation to normalize with, the image size and the class
    names.

    Args:
        saved: checkpoint of the network.
        path: file to write; its suffix selects the format.

    Returns:
        The largest difference between the outputs of the exported and the original network for random images,
            relative to the largest output.

    Raises:
        UserError: the suffix is unknown, a library is missing, or the outputs differ by more than
            ``TOLERANCE``. Nothing is written then.
        OSError: the file can't be written.
    """
    if path.suffix not in WRITERS:
        raise UserError(
            f"{path}: unknown format; choose a file name that ends in one of {', '.join(WRITERS)}"
        )
    if path.is_dir():
        raise UserError(f"{path} is a folder; pass the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: the folder {path.parent} doesn't exist; create it first")
    model = saved.network()
    about = to_json(
        {"classes": saved.classes, "images": asdict(saved.format), "settings": saved.settings.to_dict()}
    )
    part = path.with_name(
        f".{os.getpid()}.part"
    )  # short, since the file name may already have the maximum length
    with replacing(path, part=part):
        # With PyTorch's convolutions, so that the file loads without gconv.
        with gconv.backend("aten"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries warn about each other
            run = WRITERS[path.suffix](model, _images(saved, 2), about, part)
            differences = torch.tensor([_difference(model, run, _images(saved, n)) for n in BATCHES])
        difference = differences.max().item()  # NaN if any is
        if not difference <= TOLERANCE:
            raise UserError(
                f"{path}: not written, because its outputs differ from the network's by {difference:.1e} of "
                f"the largest output, more than {TOLERANCE:.0e}"
            )
    return difference


def _images(saved: Checkpoint, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    form = saved.format
    return torch.randn(count, form.channels, form.size, form.size, generator=generator)


def _difference(model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor) -> float:
    expected = model(images)
    return ((run(images) - expected).abs().max() / expected.abs().max()).item()


def _pt2(model: nn.Module, images: Tensor, about: str, path: Path) -> Callable[[Tensor], Tensor]:
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    written = BytesIO()  # if PyTorch writes to a file itself, it hides the cause of a failure
    torch.export.save(program, written, extra_files={"resnext": about})
    path.write_bytes(written.getbuffer())
    return torch.export.load(BytesIO(path.read_bytes())).module()


def _onnx(model: nn.Module, images: Tensor, about: str, path: Path) -> Callable[[Tensor], Tensor]:
    try:
        onnx, onnxruntime, _ = map(import_module, ("onnx", "onnxruntime", "onnxscript"))
    except ModuleNotFoundError as error:
        raise UserError(f"ONNX needs {error.name}: install gconv with its extra 'export'") from None
    with redirect_stdout(StringIO()), _quiet():  # it prints its steps and warns that torchvision is missing
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None  # it is None only without dynamo
    written = program.model_proto
    onnx.helper.set_model_props(written, {"resnext": about})
    onnx.save(written, path)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _safetensors(model: nn.Module, images: Tensor, about: str, path: Path) -> Callable[[Tensor], Tensor]:
    from safetensors.torch import load, save

    path.write_bytes(save({k: v.contiguous() for k, v in model.state_dict().items()}, {"resnext": about}))
    weights = load(path.read_bytes())
    return lambda x: torch.func.functional_call(model, weights, (x,))


WRITERS: dict[str, Callable[[nn.Module, Tensor, str, Path], Callable[[Tensor], Tensor]]] = {
    ".pt2": _pt2,
    ".onnx": _onnx,
    ".safetensors": _safetensors,
}
