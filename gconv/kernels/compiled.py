"""What the compiler makes of the kernels, for any GPU, on any machine.

Nothing here runs a kernel or needs a GPU: Triton brings assembler and disassembler for NVIDIA's, LLVM for
AMD's.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from gconv.geometry import ConvGeometry, Padding
from gconv.kernels.device import Device
from gconv.kernels.forward import plan_forward
from gconv.kernels.input_grad import plan_input_grad
from gconv.kernels.launch import Launch, Operands
from gconv.kernels.weight_grad import plan_reduce, plan_weight_grad

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# Channels, groups, output size and kernel size of each grouped layer. 3x3 layers past the first stage come
# with stride 1 and 2, for the stage's first block.
NETWORKS = {
    "resnext50_32x4d": [(128 * 2**i, 32, 56 >> i, 3) for i in range(4)],
    "resnext101_32x8d": [(256 * 2**i, 32, 56 >> i, 3) for i in range(4)],
    "resnext101_64x4d": [(256 * 2**i, 64, 56 >> i, 3) for i in range(4)],
    "regnety": [(216, 9, 28, 3), (448, 8, 28, 3), (896, 8, 14, 3), (1232, 11, 14, 3)],
    "depthwise": [(96, 96, 28, 3), (384, 384, 14, 7)],
}
DTYPES = {"float16": "fp16", "bfloat16": "bf16", "tf32": "fp32", "float32": "fp32"}
PASSES = ("forward", "input_grad", "weight_grad")
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Kernel:
    """One kernel in one tile, as the compiler made it for one GPU.

    Args:
        target: a member of ``TARGETS``.
        name: of the kernel.
        dtype: a key of ``DTYPES``; "tf32" is float32 as ``F.conv2d`` multiplies it by default on NVIDIA's.
        tile: what it works in.
        layers: the layers and passes that run in it.
        registers: of a thread.
        spills: bytes of a thread's that did not fit into registers.
        shared: bytes of shared memory of a program.
        per_output: instructions of a warp in the main loop for each output, or for each element of dy in the
            weight gradient; None where there is no loop to count.
    """

    target: str
    name: str
    dtype: str
    tile: str
    layers: tuple[str, ...]
    registers: int
    spills: int
    shared: int
    per_output: float | None


class Job(NamedTuple):
    """Which launch to compile: the ``index``-th of a pass. Cheap to send to another process.

    ``epilogue``: with bias and ReLU, and with the bias gradient.
    """

    target: str
    dtype: str
    pass_: str
    geometry: ConvGeometry
    epilogue: bool
    index: int

    @property
    def launch(self) -> Launch:
        """The launch itself, planned for channels_last tensors and a GPU of 132 processors."""
        return _launches(*self[:-1])[self.index]


def grouped_layers(network: str, batch: int = 256) -> Iterator[tuple[str, ConvGeometry]]:
    """The distinct grouped convolutions of a network at 224 pixels, by name."""
    for width, groups, size, kernel in NETWORKS[network]:
        for stride in (1, 2) if kernel == 3 and size < 56 else (1,):
            geometry = ConvGeometry(
                input_size=(batch, width, size * stride, size * stride),
                weight_size=(width, width // groups, kernel, kernel),
                stride=(stride, stride),
                padding=Padding(*[kernel // 2] * 4),
                dilation=(1, 1),
                groups=groups,
            )
            name = f"{width}/{groups}, {size}x{size}" + (f", {kernel}x{kernel}" if kernel != 3 else "")
            yield name + (", stride 2" if stride == 2 else ""), geometry


def find_jobs(
    networks: Iterable[str], dtypes: Iterable[str], targets: Iterable[str], epilogue: bool = False
) -> dict[Job, tuple[str, ...]]:
    """The launches of the networks' grouped layers, each distinct binary once, with what runs in it."""
    found: dict[tuple, tuple[Job, list[str]]] = {}
    layers = dict(layer for network in networks for layer in grouped_layers(network))
    for target in targets:
        for dtype in dtypes:
            for name, geometry in layers.items():
                for pass_ in PASSES:
                    for index, launch in enumerate(_launches(target, dtype, pass_, geometry, epilogue)):
                        job = Job(target, dtype, pass_, geometry, epilogue, index)
                        key = (
                            target,
                            dtype,
                            launch.kernel.__name__,
                            launch.tile,
                            *map(str, _specialise(launch, dtype)),
                        )
                        found.setdefault(key, (job, []))[1].append(f"{name}: {pass_}")
    return {job: tuple(names) for job, names in found.values()}


def compile_job(job: Job, layers: tuple[str, ...] = ()) -> Kernel:
    """Compiles a job's launch and reads what came of it."""
    launch, cuda = job.launch, job.target.startswith("sm_")
    compiled = _compile(launch, job)
    resources, listing = _read_cubin(compiled) if cuda else _read_amdgcn(compiled)
    turn = len(main_loop(listing))
    stride = f", stride {launch.arguments['STRIDE']}" if "STRIDE" in launch.arguments else ""
    return Kernel(
        job.target,
        launch.kernel.__name__ + stride,
        job.dtype,
        str(launch.tile),
        layers,
        **resources,
        shared=compiled.metadata.shared,
        per_output=round(turn * launch.tile.warps / _outputs_a_turn(launch), 3) if turn else None,
    )


def main_loop(listing: list[str]) -> list[str]:
    """The instructions of the longest innermost loop of a listing, whose labels end in a colon."""
    labels: dict[str, int] = {}
    loops = []
    for i, line in enumerate(listing):
        if line.endswith(":"):
            labels[line[:-1]] = i
        elif re.search(r"\bBRA\b|s_cbranch|s_branch", line):
            target = re.search(r"(\.?L[\w.$]+)\)?$", line)
            if target and target[1] in labels and i - labels[target[1]] > 1:
                loops.append((labels[target[1]], i + 1))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    start, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    return [line for line in listing[start:end] if not line.endswith(":")]


def _launches(target: str, dtype: str, pass_: str, geometry: ConvGeometry, epilogue: bool) -> list[Launch]:
    """What a pass launches, in order."""
    kind = "cuda" if target.startswith("sm_") else "hip"
    precision = "tf32" if dtype == "tf32" and kind == "cuda" else "ieee"
    torch_dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    x, w, y = geometry.input_size, geometry.weight_size, geometry.output_size

    def operands(first: tuple[int, ...], second: tuple[int, ...]) -> Operands:
        device = Device(kind, target, 132)
        return Operands(_strides(first), _strides(second), torch_dtype, precision, device)

    if pass_ == "forward":
        return [plan_forward(geometry, operands(x, w), epilogue, epilogue)]
    if pass_ == "input_grad":
        return [plan_input_grad(geometry, operands(y, w))]
    partial, splits, size = plan_weight_grad(geometry, operands(y, x), epilogue)
    return [partial, plan_reduce(geometry, splits, size, _strides(w))]


def _strides(size: tuple[int, ...]) -> tuple[int, ...]:
    """Of a channels_last tensor."""
    _, c, h, w = size
    return h * w * c, 1, w * c, c


def _specialise(launch: Launch, dtype: str) -> tuple[dict[str, str], dict[str, Any], dict[tuple, list]]:
    """Signature, constants and attributes, as Triton derives them from the arguments when it launches."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments.get(parameter.name)
        if name.startswith("p_"):
            signature[name] = "*fp32" if name == "p_sums" else f"*{DTYPES[dtype]}"
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
            continue
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if not parameter.do_not_specialize and (name.startswith("p_") or value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _compile(launch: Launch, job: Job) -> CompiledKernel:
    signature, constants, attributes = _specialise(launch, job.dtype)
    if job.target.startswith("sm_"):
        target = GPUTarget("cuda", int(job.target[3:]), 32)
    else:
        target = GPUTarget("hip", job.target, 64)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target, launch.tile.options)


def _outputs_a_turn(launch: Launch) -> float:
    """Outputs, or elements of dy, that one turn of the main loop stands for."""
    tile, values = launch.tile, launch.arguments
    if tile.kernel == "taps" and "p_y" in launch.kernel.arg_names:
        return (
            tile.pixels
            * tile.outputs
            / (values["R"] * values["S"] * -(-tile.groups * values["CI"] // tile.inputs))
        )
    return tile.pixels * tile.outputs * (4 if tile.kernel == "residue" else 1)


def _read_cubin(compiled: CompiledKernel) -> tuple[dict[str, int], list[str]]:
    """Resources and listing of NVIDIA machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    labels_and_code = re.findall(r"^(\.L_x_\d+:)|^\s+/\*[0-9a-f]{4,}\*/\s+([^;]*?)\s*;", code, re.MULTILINE)
    listing = [label or instruction.replace("`", "") for label, instruction in labels_and_code]
    return {"registers": int(registers), "spills": int(stack)}, listing


def _read_amdgcn(compiled: CompiledKernel) -> tuple[dict[str, int], list[str]]:
    """Resources and listing of AMD assembly."""
    text = compiled.asm["amdgcn"]
    registers, bytes_ = (
        int(re.search(rf"^\s+\.{field}:\s+(\d+)", text, re.MULTILINE)[1])
        for field in ("vgpr_count", "private_segment_fixed_size")
    )
    labels_and_code = re.findall(r"^(\.L\w+:)|^\t([a-z]\w*_.*?)\s*(?:;.*)?$", text, re.MULTILINE)
    return {"registers": registers, "spills": bytes_}, [label or line for label, line in labels_and_code]


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([BINARIES / tool, *arguments], capture_output=True, text=True, check=True).stdout
