"""Compile the kernels for any GPU, on any machine, and report registers, spills and instructions.

Nothing here runs a kernel or needs a GPU: Triton comes with an assembler and a disassembler for NVIDIA GPUs,
and with LLVM for AMD GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from typing import Any, NamedTuple, TypedDict

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from gconv.geometry import PASSES, ConvGeometry
from gconv.kernels.batch_norm import normalise_kernel, plan_gather, plan_norm, through_norm_kernel
from gconv.kernels.device import Device
from gconv.kernels.epilogue import plan_merge
from gconv.kernels.forward import PACKED, parts_of, plan_pass
from gconv.kernels.launch import PARTIALS, PLAIN, Fusion, Launch, OperandLayout
from gconv.kernels.plans import plan_pack
from gconv.kernels.tiles import Tile
from gconv.kernels.weight_grad import plan_reduce, plan_weight_grad
from gconv.measure.candidates import candidates
from gconv.measure.machine_code import (
    bytes_moved,
    copied_ahead,
    main_loop,
    read_machine_code,
    reads_shared_memory,
)
from gconv.measure.problem import TYPES
from gconv.measure.suites import SUITES, Layer
from gconv.measure.terminal import track

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
CORRELATIONS = PASSES[:2]
# What the kernels of each pass compute in addition to the convolution.
FORMS = {
    "plain": dict.fromkeys(PASSES, PLAIN),
    "epilogue": dict.fromkeys(CORRELATIONS, Fusion(True, "relu")) | {"weight_grad": Fusion(True)},
    "residual": dict.fromkeys(CORRELATIONS, Fusion(True, "silu", epilogue="residual")),
    "norm": {
        "forward": Fusion(prologue=True, epilogue="moments"),
        "input_grad": Fusion(epilogue="gradient"),
        "weight_grad": Fusion(prologue=True),
    },
}
PROCESSORS = 132  # launches are planned for a GPU with this many multiprocessors: an H100 or H200
CACHE_LINE = 128  # bytes
# Limits of one multiprocessor: KiB of shared memory, warps, and programs.
LIMITS_OF_A_PROCESSOR = {
    "sm_80": (164, 64, 32),
    "sm_90": (228, 64, 32),
    "sm_100": (228, 64, 32),
    "sm_120": (100, 48, 24),
}
FLOAT32 = ("p_norm", "p_parts", "p_result", "p_slope", "p_sums")  # always float32, in every type


@dataclass(frozen=True)
class Kernel:
    """One kernel with one tile, compiled for one GPU.

    ``per_output``, ``moved``, ``lines`` and ``operands`` are None for a kernel without a loop. The last three
    of them, ``holds`` and ``waves`` are None for AMD GPUs.

    Args:
        target: a member of ``TARGETS``.
        name: name of the kernel.
        dtype: a key of ``TYPES``. "tf32" is float32 multiplied in TF32, the default of ``F.conv2d`` on NVIDIA
            GPUs.
        tile: description of the tile.
        layers: the layers and passes that run this kernel; empty if they weren't looked up.
        registers: registers per thread.
        spills: bytes per thread that didn't fit in registers.
        shared: bytes of shared memory per program.
        ahead: "L1" if the main loop copies data for later iterations to shared memory through L1, "L2" if the
            copies bypass L1, "" if it loads to registers. Always "" for AMD GPUs.
        holds: programs that fit on a multiprocessor at the same time, given their registers, shared memory
            and warps.
        waves: programs in the launch, divided by the number that fits on ``PROCESSORS`` multiprocessors.
        per_output: warp instructions in the main loop per output, or per element of dy in the weight
            gradient.
        moved: bytes of global memory that the main loop loads and stores per output.
        lines: pieces of cache lines that the main loop touches per 1,024 outputs. A piece is the channels of
            one pixel in the tile, and takes one request to L1 and to L2.
        operands: warp reads of shared memory in the main loop per 1,024 outputs.
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
    """A launch to compile, described by values that are cheap to send to another process.

    Args:
        target: a member of ``TARGETS``, or another GPU in the same notation.
        dtype: a key of ``TYPES``.
        pass_: a member of ``PASSES``.
        geometry: the convolution's sizes and settings.
        form: a key of ``FORMS``.
        position: index of the launch among those of the pass, starting at 0.
        tile: the convolution's tile. Defaults to None, the tile that gconv chooses.
    """

    target: str
    dtype: str
    pass_: str
    geometry: ConvGeometry
    form: str
    position: int
    tile: Tile | None = None

    @property
    def launch(self) -> Launch:
        """The launch, planned for channels_last tensors and a GPU with ``PROCESSORS`` multiprocessors."""
        launches = _launches(self.target, self.dtype, self.pass_, self.geometry, self.form, self.tile)
        return launches[self.position]

    @property
    def binary(self) -> tuple[str, str, str]:
        """The identity of the compiled binary: target, hash of the source, and options."""
        _, source, options = _specialise(self.launch, self.target, self.dtype)
        return self.target, source.hash(), str(options)


def find_jobs(
    suites: Iterable[str],
    dtypes: Iterable[str],
    targets: Iterable[str],
    form: str = "plain",
    tuning: bool = False,
) -> dict[Job, tuple[str, ...]]:
    """Find the launches of the suites' layers at batch size 256.

    Args:
        suites: keys of ``SUITES``.
        dtypes: keys of ``TYPES``.
        targets: members of ``TARGETS``, or other GPUs in the same notation.
        form: a key of ``FORMS``. Defaults to "plain".
        tuning: whether to include all tiles that tuning measures. Defaults to False, only the tiles that the
            rules choose.

    Returns:
        One job per distinct binary, with the names of the layers and passes that run it.
    """
    found: dict[tuple, tuple[Job, list[str]]] = {}
    layers = {layer.name: layer for suite in suites for layer in SUITES[suite]}
    for target, dtype, (name, layer), pass_ in product(targets, dtypes, layers.items(), FORMS[form]):
        if not _happens(form, layer, pass_):
            continue
        geometry, (precision, device) = layer.geometry(256), _precision_and_device(target, dtype)
        tiles = candidates(pass_, geometry, TYPES[dtype][0], precision, device) if tuning else [None]
        for tile in tiles:
            for job in jobs_of(target, dtype, pass_, geometry, form, tile):
                found.setdefault(job.binary, (job, []))[1].append(f"{name}: {pass_}")
    return {job: tuple(names) for job, names in found.values()}


def _happens(form: str, layer: Layer, pass_: str) -> bool:
    """Whether gconv ever runs this pass of a layer in this form: gradients have no bias, norms are 2-d."""
    if form == "norm":
        return layer.dims == 2 and not layer.transposed
    if form == "plain":
        return True
    return pass_ == "input_grad" if layer.transposed else pass_ != "input_grad"


def jobs_of(
    target: str, dtype: str, pass_: str, geometry: ConvGeometry, form: str = "plain", tile: Tile | None = None
) -> list[Job]:
    """Return a job for each launch of a pass: the convolution, and the launches that prepare or finish it.

    Args:
        target, dtype, pass_, geometry, form, tile: see ``Job``.
    """
    launches = _launches(target, dtype, pass_, geometry, form, tile)
    return [Job(target, dtype, pass_, geometry, form, i, tile) for i in range(len(launches))]


def compile_all(
    jobs: Sequence[Job], processes: int | None = None
) -> Iterator[tuple[Job, Kernel | BaseException]]:
    """Compile jobs into Triton's cache in several processes.

    Args:
        jobs: the launches to compile.
        processes: number of processes. Defaults to None, one per core.

    Yields:
        Each job with its kernel, or with the compiler's error, in the order in which they finish.
    """
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        running = {pool.submit(compile_job, job): job for job in jobs}
        for future in track(as_completed(running), "compiling", len(running)):
            yield running[future], future.exception() or future.result()


def compile_job(job: Job) -> Kernel:
    """Compile a launch, and read the registers, spills and instructions from the result."""
    launch, on_nvidia = job.launch, job.target.startswith("sm_")
    gpu, source, options = _specialise(launch, job.target, job.dtype)
    compiled = triton.compile(source, gpu, options)
    code, shared = read_machine_code(compiled), compiled.metadata.shared
    loop = main_loop(code.listing)
    stride = f", stride {launch.arguments['STRIDE']}" if "STRIDE" in launch.arguments else ""
    return Kernel(
        job.target,
        launch.kernel.__name__ + stride,
        job.dtype,
        str(launch.tile),
        (),
        code.registers,
        code.spills,
        shared,
        ahead=copied_ahead(loop),
        **_occupancy(job.target, launch, code.registers, shared),
        **_loop_counts(loop, launch, TYPES[job.dtype][0].itemsize, on_nvidia),
    )


class _LoopCounts(TypedDict, total=False):
    per_output: float
    moved: float
    lines: float
    operands: float


class _Occupancy(TypedDict, total=False):
    holds: int
    waves: float | None


def _loop_counts(loop: list[str], launch: Launch, itemsize: int, on_nvidia: bool) -> _LoopCounts:
    """Count what the main loop does per output, or per 1,024 outputs."""
    if not loop:
        return {}
    tile, outputs = launch.tile, _outputs_a_turn(launch)
    counts: _LoopCounts = {"per_output": round(len(loop) * tile.warps / outputs, 3)}
    if on_nvidia:
        moved = sum(map(bytes_moved, loop)) * 32 * tile.warps
        channels = tile.outputs if tile.depthwise else tile.inputs * tile.packs
        counts["moved"] = round(moved / outputs, 2)
        counts["lines"] = round(1024 * moved / outputs / min(CACHE_LINE, channels * itemsize), 1)
        reads = sum(map(reads_shared_memory, loop)) * tile.warps
        counts["operands"] = round(1024 * reads / outputs, 1)
    return counts


def _occupancy(target: str, launch: Launch, registers: int, shared: int) -> _Occupancy:
    """Return how many programs fit on a multiprocessor, and how often the grid fills all of them."""
    if target not in LIMITS_OF_A_PROCESSOR:
        return {}
    kibibytes, most_warps, most_programs = LIMITS_OF_A_PROCESSOR[target]
    warps = launch.tile.warps
    by_registers = 65536 // (warps * -(-registers * 32 // 256) * 256)
    holds = min(by_registers, kibibytes * 1024 // (shared + 1024), most_warps // warps, most_programs)
    return {"holds": holds, "waves": round(launch.programs / (holds * PROCESSORS), 2) if holds else None}


def target_of(device: torch.device) -> str:
    """Return the target to compile for to run on ``device``, a GPU of this machine."""
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
    """Return the launches of a pass, in order."""
    precision, device = _precision_and_device(target, dtype)
    x, w, y = geometry.input_size, geometry.weight_size, geometry.output_size

    def operands(first: tuple[int, ...], second: tuple[int, ...]) -> OperandLayout:
        return OperandLayout(_strides(first), _strides(second), TYPES[dtype][0], precision, device)

    fusion = FORMS[form][pass_]
    if pass_ == "weight_grad":
        partial, splits, _ = plan_weight_grad(geometry, operands(y, x), fusion, tile)
        return [partial, plan_reduce(geometry, splits, fusion.bias, _strides(w))]
    first = x if pass_ == "forward" else y
    launch = plan_pass(pass_, geometry, operands(first, w), fusion, tile)
    channels = geometry.weight_size[0] if pass_ == "forward" else geometry.input_size[1]
    launches = [launch]
    if launch.tile.kernel in PACKED:
        launches.append(plan_pack(geometry, pass_ == "input_grad", _strides(w), launch.tile)[0])
    if fusion.epilogue not in PARTIALS:
        return launches
    # The separate kernels of the norms. Forward: the moments of x, and the norm of y. Backward: the gradient
    # through the norm.
    kernel, tensor = (normalise_kernel, x) if pass_ == "forward" else (through_norm_kernel, y)
    pixels = math.prod(tensor) // tensor[1]
    alone = [plan_norm(kernel, pixels, tensor[1]), plan_gather(pixels, tensor[1], fusion.epilogue, device)]
    return [*launches, plan_merge(parts_of(launch), channels, fusion.epilogue), *alone]


def _precision_and_device(target: str, dtype: str) -> tuple[str, Device]:
    """Return how a target multiplies float32, and a device with that target."""
    if not target.startswith("sm_"):
        return "ieee", Device("hip", target, PROCESSORS)
    return ("tf32" if dtype == "tf32" else "ieee"), Device("cuda", target, PROCESSORS, int(target[3:]))


def _strides(size: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a channels_last tensor of the given size."""
    _, c, h, w = size
    return h * w * c, 1, w * c, c


def _specialise(launch: Launch, target: str, dtype: str) -> tuple[GPUTarget, ASTSource, dict[str, Any]]:
    """Return what Triton compiles at a launch.

    This uses Triton's code, so that a later launch finds the compiled kernel in Triton's cache.
    """
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
    """Return how many outputs, or elements of dy, one iteration of the main loop accounts for."""
    tile, values = launch.tile, launch.arguments
    if tile.kernel == "taps" and "p_y" in launch.kernel.arg_names:
        return (
            tile.pixels
            * tile.outputs
            / (values["R"] * values["S"] * -(-tile.groups * values["CI"] // tile.inputs))
        )
    if "p_dy" in launch.kernel.arg_names and "G" in values:  # each block of inputs reads all of dy
        taps = values["R"] * values["S"] if tile.kernel == "taps" else 1
        blocks = -(-tile.groups * values["CI"] // tile.inputs)
        return tile.pixels * tile.columns * tile.outputs * tile.packs / (taps * blocks)
    if "BR" in values:  # each block of taps goes over all outputs
        blocks = -(-values["R"] // values["BR"]) * -(-values["S"] // values["BS"])
        return tile.pixels * tile.rows * tile.columns * tile.outputs * values.get("TURNS", 1) / blocks
    of_pixel = 4 if tile.kernel in ("pairs", "residue") else 1
    return tile.pixels * tile.columns * tile.outputs * tile.packs * of_pixel
