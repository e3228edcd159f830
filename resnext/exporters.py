"""Trained networks for other programs: torch.export, ONNX, safetensors; each checked before it is written."""

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

# Of the largest output: other libraries sum in another order.
TOLERANCE = 1e-4
BATCHES = (1, 3)


def export(saved: Checkpoint, path: Path) -> float:
    """Write the network to ``path``, in the format of its suffix: .pt2, .onnx or .safetensors.

    The file takes any number of normalised images (N, C, H, W). The mean and deviation to normalise by, the
    names of the classes and the size stand in the file, as JSON under "resnext".

    Returns:
        The largest difference between the outputs of the file and of the network for random images, relative
        to the largest output.

    Raises:
        UserError: the suffix is unknown, a library is missing, or the file would give other outputs than the
            network; nothing is written.
        OSError: the file cannot be written.
    """
    if path.suffix not in WRITERS:
        raise UserError(f"{path}: write to a file that ends in {', '.join(WRITERS)}")
    if path.is_dir():
        raise UserError(f"{path}: a folder")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    model = saved.network()
    about = to_json(
        {"classes": saved.classes, "images": asdict(saved.format), "settings": saved.settings.to_dict()}
    )
    part = path.with_name(f".{os.getpid()}.part")  # the name of the file may be as long as any can be
    with replacing(path, part=part):
        # PyTorch's own operators, so that the file loads without gconv.
        with gconv.backend("aten"), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the libraries, about each other
            run = WRITERS[path.suffix](model, _images(saved, 2), about, part)
            differences = torch.tensor([_difference(model, run, _images(saved, n)) for n in BATCHES])
        difference = differences.max().item()  # nan where one is
        if not difference <= TOLERANCE:
            raise UserError(
                f"{path}: not written: its outputs would differ from the network's by {difference:.1e} of "
                f"the largest, more than {TOLERANCE:.0e}"
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
    written = BytesIO()  # PyTorch's own writing to a file hides why it failed
    torch.export.save(program, written, extra_files={"resnext": about})
    path.write_bytes(written.getbuffer())
    return torch.export.load(BytesIO(path.read_bytes())).module()


def _onnx(model: nn.Module, images: Tensor, about: str, path: Path) -> Callable[[Tensor], Tensor]:
    try:
        onnx, onnxruntime, _ = map(import_module, ("onnx", "onnxruntime", "onnxscript"))
    except ModuleNotFoundError as error:
        raise UserError(f"ONNX needs {error.name}: install gconv with its extra 'export'") from None
    with redirect_stdout(StringIO()), _quiet():  # it reports its steps, and misses torchvision
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None  # it is with dynamo
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
