"""What the compiler makes of the kernels, for any GPU, on any machine.

Nothing here runs a kernel or needs a GPU: Triton brings assembler and disassembler for NVIDIA's, LLVM for
AMD's.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from gconv.geometry import PASSES, ConvGeometry
from gconv.kernels.batch_norm import input_grad_kernel, normalise_kernel, plan_gather, plan_norm
from gconv.kernels.device import Device
from gconv.kernels.epilogue import plan_merge
from gconv.kernels.forward import parts_of, plan_forward
from gconv.kernels.input_grad import plan_input_grad
from gconv.kernels.launch import PARTIALS, PLAIN, Fusion, Launch, OperandLayout
from gconv.kernels.strips import plan_pack
from gconv.kernels.tiles import Tile
from gconv.kernels.weight_grad import plan_reduce, plan_weight_grad
from gconv.measure.candidates import candidates
from gconv.measure.problem import TYPES
from gconv.measure.suites import SUITES

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# What runs in the kernels of each pass beside the convolution.
FORMS = {
    "plain": dict.fromkeys(PASSES, PLAIN),
    "epilogue": {"forward": Fusion(True, "relu"), "weight_grad": Fusion(True)},
    "residual": {"forward": Fusion(True, "silu", epilogue="residual")},
    "norm": {
        "forward": Fusion(prologue=True, epilogue="moments"),
        "input_grad": Fusion(epilogue="gradient"),
        "weight_grad": Fusion(prologue=True),
    },
}
COUNT = 132  # processors of the GPU that launches are planned for: an H100, an H200
LINE = 128  # bytes of a cache line
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # of NVIDIA's loads and stores; else 4
# KiB of shared memory, warps and programs of a processor.
PROCESSOR = {
    "sm_80": (164, 64, 32),
    "sm_90": (228, 64, 32),
    "sm_100": (228, 64, 32),
    "sm_120": (100, 48, 24),
}
FLOAT32 = ("p_norm", "p_parts", "p_result", "p_slope", "p_sums")  # pointers, whatever the convolution's type
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Kernel:
    """One kernel in one tile, as the compiler made it for one GPU.

    Args:
        target: a member of ``TARGETS``.
        name: of the kernel.
        dtype: a key of ``TYPES``; "tf32" is float32 as ``F.conv2d`` multiplies it by default on NVIDIA's.
        tile: what it works in.
        layers: the layers and passes that run in it.
        registers: of a thread.
        spills: bytes of a thread's that did not fit into registers.
        shared: bytes of shared memory of a program.
        ahead: "L1" where the main loop copies to shared memory what it needs later, through L1; "L2" where
            past L1; "" where loads go to registers, and on AMD's.
        holds: programs that a processor holds at once, by registers, shared memory and its limits on warps.
        waves: programs of the first of ``layers``, over those that ``COUNT`` processors hold.
        per_output: instructions of a warp in the main loop for each output, or for each element of dy in the
            weight gradient; None where there is no loop to count.
        moved: bytes of global memory that the main loop's loads and stores ask for, for each output.
        lines: pieces of cache lines that they touch, for each 1,024 outputs. A piece is a pixel's channels in
            the tile: L1 and L2 answer one request for each.
        operands: reads of shared memory by a warp in the main loop, for each 1,024 outputs.

    The last four are None where there is no loop to count; for AMD's the last three, ``holds`` and ``waves``.
    """

    target: str
    name: str
    dtype: str
    tile: str
    layers: tuple[str, ...]
    registers: int
    spills: int
    shared: int
    ahead: str
    holds: int | None = None
    waves: float | None = None
    per_output: float | None = None
    moved: float | None = None
    lines: float | None = None
    operands: float | None = None


class Job(NamedTuple):
    """Which launch to compile: the ``index``-th of a pass. Cheap to send to another process.

    ``form``: a key of ``FORMS``. ``tile``: None for the one that is chosen.
    """

    target: str
    dtype: str
    pass_: str
    geometry: ConvGeometry
    form: str
    index: int
    tile: Tile | None = None

    @property
    def launch(self) -> Launch:
        """The launch itself, planned for channels_last tensors and a GPU of ``COUNT`` processors."""
        launches = _launches(self.target, self.dtype, self.pass_, self.geometry, self.form, self.tile)
        return launches[self.index]

    @property
    def binary(self) -> tuple:
        """What tells its binary from others."""
        _, source, options = _specialise(self.launch, self.target, self.dtype)
        return self.target, source.hash(), str(options)


def find_jobs(
    suites: Iterable[str],
    dtypes: Iterable[str],
    targets: Iterable[str],
    form: str = "plain",
    tuning: bool = False,
) -> dict[Job, tuple[str, ...]]:
    """The launches of the suites' layers at batch 256, each distinct binary once, with what runs in it.

    With ``tuning`` in all the tiles that tuning would measure, else in those of the rules.
    """
    found: dict[tuple, tuple[Job, list[str]]] = {}
    layers = {layer.name: layer.geometry(256) for suite in suites for layer in SUITES[suite]}
    for target, dtype, (name, geometry), pass_ in product(targets, dtypes, layers.items(), FORMS[form]):
        precision, device = _precision_and_device(target, dtype)
        tiles = candidates(pass_, geometry, TYPES[dtype][0], precision, device) if tuning else [None]
        for tile in tiles:
            for index in range(len(_launches(target, dtype, pass_, geometry, form, tile))):
                job = Job(target, dtype, pass_, geometry, form, index, tile)
                found.setdefault(job.binary, (job, []))[1].append(f"{name}: {pass_}")
    return {job: tuple(names) for job, names in found.values()}


def jobs_of(
    target: str, dtype: str, pass_: str, geometry: ConvGeometry, tile: Tile | None = None
) -> list[Job]:
    """All launches of a pass: the convolution, and what packs its weights or adds up its parts."""
    launches = _launches(target, dtype, pass_, geometry, "plain", tile)
    return [Job(target, dtype, pass_, geometry, "plain", index, tile) for index in range(len(launches))]


def compile_job(job: Job, layers: tuple[str, ...] = ()) -> Kernel:
    """Compiles a job's launch and reads what came of it."""
    launch, cuda = job.launch, job.target.startswith("sm_")
    gpu, source, options = _specialise(launch, job.target, job.dtype)
    compiled = triton.compile(source, gpu, options)
    resources, listing = _read_cubin(compiled) if cuda else _read_amdgcn(compiled)
    loop = main_loop(listing)
    stride = f", stride {launch.arguments['STRIDE']}" if "STRIDE" in launch.arguments else ""
    return Kernel(
        job.target,
        launch.kernel.__name__ + stride,
        job.dtype,
        str(launch.tile),
        layers,
        **resources,
        shared=compiled.metadata.shared,
        ahead=_copied_ahead(loop),
        **(_waves(job.target, launch, resources["registers"], compiled.metadata.shared) if cuda else {}),
        **_loop_counts(loop, launch, TYPES[job.dtype][0].itemsize, cuda),
    )


def _loop_counts(loop: list[str], launch: Launch, itemsize: int, cuda: bool) -> dict[str, float]:
    """What the main loop does for each output, or each 1,024."""
    if not loop:
        return {}
    tile, outputs = launch.tile, _outputs_a_turn(launch)
    counts = {"per_output": round(len(loop) * tile.warps / outputs, 3)}
    if cuda:
        moved = sum(map(_bytes_moved, loop)) * 32 * tile.warps
        channels = tile.outputs if tile.depthwise else tile.inputs * tile.packs
        counts["moved"] = round(moved / outputs, 2)
        counts["lines"] = round(1024 * moved / outputs / min(LINE, channels * itemsize), 1)
        reads = sum(bool(re.search(r"\bLDSM?\b", line)) for line in loop) * tile.warps
        counts["operands"] = round(1024 * reads / outputs, 1)
    return counts


def _bytes_moved(instruction: str) -> int:
    """Bytes that a thread loads from global memory, or stores to it."""
    match = re.search(r"\b(?:LDGSTS|LDG|STG)(\.\S+)", instruction)
    if match is None:
        return 0
    return next((size for name, size in WIDTHS.items() if f".{name}." in f"{match[1]}."), 4)


def _waves(target: str, launch: Launch, registers: int, shared: int) -> dict[str, float]:
    """How many programs a processor holds at once, and how many times the grid fills all."""
    if target not in PROCESSOR:
        return {}
    capacity, most_warps, most = PROCESSOR[target]
    warps = launch.tile.warps
    by_registers = 65536 // (warps * -(-registers * 32 // 256) * 256)
    holds = min(by_registers, capacity * 1024 // (shared + 1024), most_warps // warps, most)
    return {"holds": holds, "waves": round(launch.programs / (holds * COUNT), 2) if holds else None}


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


def _copied_ahead(loop: list[str]) -> str:
    copies = [line for line in loop if "LDGSTS" in line]
    return ("L2" if all("BYPASS" in line for line in copies) else "L1") if copies else ""


def target_of(device: torch.device) -> str:
    """What to compile for to run on a GPU that is here."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _launches(
    target: str,
    dtype: str,
    pass_: str,
    geometry: ConvGeometry,
    form: str,
    tile: Tile | None = None,
) -> list[Launch]:
    """What a pass launches, in order."""
    precision, device = _precision_and_device(target, dtype)
    x, w, y = geometry.input_size, geometry.weight_size, geometry.output_size

    def operands(first: tuple[int, ...], second: tuple[int, ...]) -> OperandLayout:
        return OperandLayout(_strides(first), _strides(second), TYPES[dtype][0], precision, device)

    fusion = FORMS[form][pass_]
    if pass_ == "weight_grad":
        partial, splits, _ = plan_weight_grad(geometry, operands(y, x), fusion, tile)
        return [partial, plan_reduce(geometry, splits, fusion.bias, _strides(w))]
    plan, first = (plan_forward, x) if pass_ == "forward" else (plan_input_grad, y)
    launch = plan(geometry, operands(first, w), fusion, tile)
    channels = geometry.weight_size[0] if pass_ == "forward" else geometry.input_size[1]
    launches = [launch]
    if launch.tile.kernel in ("strips", "pairs"):
        launches.append(plan_pack(geometry, pass_ == "input_grad", _strides(w), launch.tile)[0])
    if fusion.epilogue not in PARTIALS:
        return launches
    # The norms by themselves: forward the moments of x and the norm of y, backward the way through that.
    kernel, tensor = (normalise_kernel, x) if pass_ == "forward" else (input_grad_kernel, y)
    pixels = math.prod(tensor) // tensor[1]
    alone = [plan_norm(kernel, pixels, tensor[1]), plan_gather(pixels, tensor[1], fusion.epilogue, device)]
    return [*launches, plan_merge(parts_of(launch), channels, fusion.epilogue), *alone]


def _precision_and_device(target: str, dtype: str) -> tuple[str, Device]:
    """How float32 is multiplied for a target, and a GPU of it."""
    if not target.startswith("sm_"):
        return "ieee", Device("hip", target, COUNT)
    return ("tf32" if dtype == "tf32" else "ieee"), Device("cuda", target, COUNT, int(target[3:]))


def _strides(size: tuple[int, ...]) -> tuple[int, ...]:
    """Of a channels_last tensor."""
    _, c, h, w = size
    return h * w * c, 1, w * c, c


def _specialise(launch: Launch, target: str, dtype: str) -> tuple[GPUTarget, ASTSource, dict[str, Any]]:
    """What Triton compiles when it launches, by its own code: it finds in its cache what is made here."""
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target.startswith("sm_") else GPUTarget("hip", target, 64)
    kernel, backend = launch.kernel, make_backend(gpu)
    types = {name: torch.float32 if name in FLOAT32 else TYPES[dtype][0] for name in kernel.arg_names}
    tensors = {
        name: None if name in launch.absent else torch.empty(1, dtype=type_)
        for name, type_ in types.items()
        if name.startswith("p_")
    }
    arguments = {**launch.arguments, **launch.tile.options}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = binder(**tensors, **arguments)
    _, signature, constants, attributes = kernel._pack_args(
        backend, arguments, bound, specialisation, options
    )
    return gpu, ASTSource(kernel, signature, constants, attributes), launch.tile.options


def _outputs_a_turn(launch: Launch) -> float:
    """Outputs, or elements of dy, that one turn of the main loop stands for."""
    tile, values = launch.tile, launch.arguments
    if tile.kernel == "taps" and "p_y" in launch.kernel.arg_names:
        return (
            tile.pixels
            * tile.outputs
            / (values["R"] * values["S"] * -(-tile.groups * values["CI"] // tile.inputs))
        )
    if "p_dy" in launch.kernel.arg_names and "G" in values:  # every block of inputs takes all of dy
        taps = values["R"] * values["S"] if tile.kernel == "taps" else 1
        blocks = -(-tile.groups * values["CI"] // tile.inputs)
        return tile.pixels * tile.columns * tile.outputs * tile.packs / (taps * blocks)
    of_pixel = 4 if tile.kernel in ("pairs", "residue") else 1
    return tile.pixels * tile.columns * tile.outputs * tile.packs * of_pixel


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
