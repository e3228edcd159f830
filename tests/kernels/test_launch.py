"""What reaches the driver: cached kernels start exactly as Triton's launcher starts them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from marks import interpreted
from oracle import Case

import gconv
from gconv.geometry import ConvGeometry
from gconv.kernels import launch
from gconv.kernels.batch_norm import normalise_kernel
from gconv.kernels.forward import norm_forward
from gconv.kernels.launch import Launch
from gconv.kernels.tiles import Tile
from gconv.kernels.weight_grad import norm_weight_grad

ROOT = Path(__file__).parents[2]
Run = Callable[[str], str]

# A process with a stub driver without a GPU, and without the interpreter. It runs each piece of code that it
# gets in a fork of itself, which has imported everything and cached nothing.
SERVER = """
import json, os, pathlib, sys, torch, traceback
import stub_gpu
from gconv.geometry import ConvGeometry
from gconv.measure import candidates, compiled, tuner
from gconv.kernels import launch
from gconv.kernels.device import Device
from gconv.kernels.forward import forward
from gconv.kernels.weight_grad import weight_grad
from gconv.measure.problem import Problem
from gconv.measure.suites import SUITES

gpu = Device("cuda", "none", 132)
launch.device_of = lambda _: gpu
stub_gpu.install()
layer = SUITES["tiny"][0]
launches = stub_gpu.LAUNCHES

for line in sys.stdin:
    code, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ["TRITON_CACHE_DIR"] = folder
        printed = os.open(folder + "/printed", os.O_WRONLY | os.O_CREAT)
        os.dup2(printed, 1), os.dup2(printed, 2)
        status = 1
        try:
            exec(code, globals())
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT / "tests" / "support")}
    command, pipe = [sys.executable, "-c", SERVER], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=ROOT) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(server: subprocess.Popen, tmp_path: Path) -> Run:
    """Run code with a cache for this call only, and return what it prints."""

    def call(code: str) -> str:
        print(json.dumps([code, str(tmp_path)]), file=server.stdin, flush=True)
        status = server.stdout.readline()
        printed = (tmp_path / "printed").read_text()
        assert status == "0\n", printed
        return printed

    return call


def test_a_kept_kernel_starts_with_the_same_arguments(run: Run) -> None:
    code = """
problem = Problem("weight_grad", layer.geometry(2), "float16")
x, _, dy = problem.draw(torch.device("cpu"))
for _ in range(3):
    weight_grad(dy, x, problem.geometry, True)

def comparable(launched):
    name, grid, arguments = launched
    return name, grid, [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in arguments]

assert len(launches) == 6 and launches[0][0] != launches[1][0]
assert [comparable(one) for one in launches[:2]] == [comparable(one) for one in launches[2:4]]
assert launches[2][2][0] is dy and launches[2][2][1] is x
print("kept")
"""
    assert run(code) == "kept\n"


def test_a_kept_kernel_does_not_go_through_the_jit_again(run: Run) -> None:
    code = """
problem = Problem("forward", layer.geometry(2), "float16")
x, w, _ = problem.draw(torch.device("cpu"))
forward(x, w, None, problem.geometry, None)
from triton.runtime.jit import JITFunction
JITFunction.run = None
forward(x, w, None, problem.geometry, None)
print(*[name for name, _, _ in launches])
"""
    assert run(code) == "pack_kernel strips_kernel pack_kernel strips_kernel\n"


def test_a_hook_around_launches_sees_kept_kernels_too(run: Run) -> None:
    """Profilers add hooks and remove them again."""
    code = """
from triton import knobs
problem = Problem("forward", layer.geometry(2), "float16")
x, w, _ = problem.draw(torch.device("cpu"))
seen, seen_after = [], []
run = lambda: forward(x, w, None, problem.geometry, None)
for chain, into in ((knobs.runtime.launch_enter_hook, seen), (knobs.runtime.launch_exit_hook, seen_after)):
    hook = lambda metadata: into.append(metadata.get()["name"])
    run()
    chain.add(hook)
    run()
    chain.remove(hook)
    run()
print(len(launches), seen, seen_after)
"""
    assert run(code) == "12 ['pack_kernel', 'strips_kernel'] ['pack_kernel', 'strips_kernel']\n"


def test_another_alignment_or_type_gets_a_kernel_of_its_own(run: Run) -> None:
    """A tensor that isn't aligned to 16 bytes; then a reduction to float32 after one to float16."""
    code = """
from triton.runtime.jit import JITFunction
through = []
run = JITFunction.run
JITFunction.run = lambda self, *a, **k: (through.append(self.__name__), run(self, *a, **k))[1]

problem = Problem("forward", layer.geometry(2), "float16")
x, w, _ = problem.draw(torch.device("cpu"))
apart = torch.empty(x.numel() + 8, dtype=x.dtype)[1 : 1 + x.numel()].as_strided(x.shape, x.stride(), 1)
apart.copy_(x)
for tensor in (apart, x, apart, x, x):
    forward(tensor, w, None, problem.geometry, None)
print(*through)  # packed once; apart, x, apart; the rest is kept

through.clear()
for type_ in ("float16", "tf32", "float16", "tf32"):
    problem = Problem("weight_grad", layer.geometry(2), type_)
    x, _, dy = problem.draw(torch.device("cpu"))
    weight_grad(dy, x, problem.geometry, False)
print(len(through), [arguments[1].dtype for name, _, arguments in launches if name == "reduce_kernel"])
"""
    types = "[torch.float16, torch.float32, torch.float16, torch.float32]"
    strips = "strips_kernel strips_kernel strips_kernel"
    assert run(code) == f"pack_kernel {strips}\n4 {types}\n"


def test_what_tuning_compiles_is_what_is_launched(run: Run) -> None:
    """Otherwise each candidate would be compiled again, one after the other, when it is measured."""
    code = """
import os
cache = pathlib.Path(os.environ["TRITON_CACHE_DIR"])
for layer in (SUITES["tiny"][1], SUITES["depthwise"][2]):
    for pass_ in compiled.PASSES:
        problem = Problem(pass_, layer.geometry(2), "bfloat16")
        operands = problem.draw(torch.device("cpu"))
        for tile in candidates.candidates(pass_, problem.geometry, problem.dtype, "ieee", gpu)[:1]:
            job = compiled.Job("sm_90", "bfloat16", pass_, problem.geometry, "plain", 0, tile)
            compiled.compile_job(job)
            if pass_ == "weight_grad" or tile.kernel == "strips":  # the reduction, the weights' packing
                compiled.compile_job(job._replace(position=1))
            before = len(list(cache.rglob("*.cubin")))
            tuner._run(problem, operands, tile, torch.channels_last)
            assert len(list(cache.rglob("*.cubin"))) == before, (problem, tile)
print(before)
"""
    assert int(run(code)) > 5


def test_a_launch_takes_what_its_kernel_knows_and_nothing_else() -> None:
    arguments = {"pixels": 6, "channels": 16, "blocks": 1, "BM": 4, "BC": 16}
    tile = Tile("batch_norm", 1, 4, 16, 16, warps=1)
    plan = Launch.of(normalise_kernel, 2, dict(reversed(arguments.items())), tile, ["p_norm", "p_bias"])
    assert list(plan.arguments) == list(arguments), "in the kernel's order"
    assert plan.absent == {"p_norm"}, "of the tensors that it has"
    for wrong in (arguments | {"rows": 1}, {name: arguments[name] for name in list(arguments)[1:]}):
        with pytest.raises(TypeError, match=r"expects .*missing or unknown: \[.(rows|pixels)"):
            Launch.of(normalise_kernel, 2, wrong, tile)


def test_depthwise_kernels_refuse_a_norm_that_they_would_leave_out() -> None:
    x, weight, norm = torch.ones(1, 16, 4, 4), torch.ones(16, 1, 3, 3), torch.ones(3, 16)
    geometry = ConvGeometry.of(x.shape, weight.shape, (1, 1), (1, 1, 1, 1), (1, 1), 16)
    tile = Tile("depthwise-slide", 1, 4, 16, 16, warps=1)
    message = "depthwise kernels don't support batch norm: pass a tile of the taps kernel"
    with pytest.raises(ValueError, match=message):
        norm_forward(x, norm, weight, None, geometry, tile=tile)
    with pytest.raises(ValueError, match=message):
        norm_weight_grad(x, x, norm, geometry, False, tile=tile)


def test_kernels_read_every_argument() -> None:
    for path in sorted((ROOT / "gconv" / "kernels").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, decorators(node)):
                read = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                assert not {argument.arg for argument in node.args.args} - read, f"{path.name}: {node.name}"


def decorators(node: ast.FunctionDef) -> list[ast.expr]:
    return [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Return a function that lists what gconv has logged since the test began."""
    launch.note_untested_triton.cache_clear()
    yield lambda: [record.getMessage() for record in caplog.records if record.name == "gconv"]
    launch.note_untested_triton.cache_clear()


@pytest.mark.parametrize(
    ("version", "untested"),
    [("3.6.1", False), (f"{launch.NEWEST_TRITON}.9", False), ("3.10.0rc1", True), ("4.0.0+git1a2b3c", True)],
)
def test_an_untested_newer_triton_is_logged_in_one_line(
    version: str, untested: bool, logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.__version__", version)
    launch.note_untested_triton()
    assert len(logged()) == untested
    assert all(f"not been tested with Triton {version}" in line and "\n" not in line for line in logged())


@interpreted
def test_an_untested_newer_triton_is_logged_once(
    logged: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time that a kernel starts, even in a compiled graph. A warning would fail users' tests."""
    monkeypatch.setattr("triton.__version__", "99.0.0")
    x, w, _ = Case("", (1, 2, 3, 3), (2, 1, 1, 1), {}).tensors(torch.float32)

    def call(x: torch.Tensor) -> torch.Tensor:
        return gconv.group_conv2d(x, w, groups=2, backend="triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(x)
        call(x)
    assert len(logged()) == 1
    torch._dynamo.reset()
