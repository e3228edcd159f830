"""The kernels on a GPU, ``pytest -m gpu``: the interpreter's checks, and sizes that need a GPU."""

from __future__ import annotations

import copy

import pytest
import sanitize
import torch
import torch.nn.functional as F
from families import DTYPES, FAMILIES, LARGE, Place, aligned, check_kernels, inside_nan, kernel_results
from marks import ON_A_GPU
from oracle import OTHERS, Case, bounds, check, expected

import gconv
from gconv import dispatch
from gconv.geometry import PASSES, ConvGeometry
from gconv.measure.problem import cudnn_precision

pytestmark = [pytest.mark.gpu, *ON_A_GPU, pytest.mark.usefixtures("full_float32")]
LAYERS = [
    *LARGE,
    Case("216 x 28, width 24", (8, 216, 28, 28), (216, 24, 3, 3), {"padding": 1, "groups": 9}),
    Case("384 x 14, depthwise 7x7", (8, 384, 14, 14), (384, 1, 7, 7), {"padding": 3, "groups": 384}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FAMILIES + LAYERS, ids=lambda case: case.name)
@pytest.mark.parametrize("place", [aligned, inside_nan])
def test_every_family_matches_float64(place: Place, case: Case, dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        check_kernels(case, dtype, device="cuda", place=place)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_every_kind_of_convolution_matches_float64(case: Case, dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        check(case, "triton", dtype, device="cuda")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", FAMILIES + LAYERS, ids=lambda case: case.name)
@pytest.mark.parametrize("place", [aligned, inside_nan])
def test_tf32_is_as_close_as_tf32_can_be(place: Place, case: Case) -> None:
    """Operands have 11 bits and sums are in float32: the bound is that of float16 for rounded operands."""
    with cudnn_precision("tf32"):
        results = kernel_results(case, torch.float32, device="cuda", place=place)
    for name, (result, truth, _) in results.items():
        scale = truth.abs().mean() + 1
        assert (result.double() - truth).abs().max() <= 2**-8 * scale * 4, name


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_two_runs_are_bit_equal(case: Case) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(kernel_results(case, torch.bfloat16, device="cuda"))
    for name, (result, _, _) in runs[0].items():
        assert torch.equal(result, runs[1][name][0]), name


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_auto_matches_float64_forward_and_backward(case: Case) -> None:
    tensors = [t.detach().cuda() for t in case.tensors(torch.bfloat16)]
    tensors = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]
    tensors = [t.requires_grad_() for t in tensors]
    y = gconv.group_conv2d(*tensors, **case.settings)
    dy = torch.randn_like(y)
    results = [y.detach(), *torch.autograd.grad(y, tensors, dy)]
    truth = expected(case, tuple(tensors), dy)
    # cuDNN may have run some of the passes, and it computes some sums in 16 bits.
    for result, right, bound in zip(results, truth, bounds(case, truth, torch.bfloat16), strict=True):
        assert ((result.double() - right).abs() <= 4 * bound + 0.02 * right.abs().mean()).all()


@pytest.mark.parametrize("type_", sanitize.TYPES)
@pytest.mark.parametrize("name", sanitize.LAYERS)
def test_what_the_sanitizer_watches_runs(name: str, type_: str) -> None:
    """This also compiles the kernels, so that compute-sanitizer doesn't have to wait for that."""
    sanitize.start_kernels(sanitize.LAYERS[name], type_, torch.device("cuda"))
    torch.cuda.synchronize()


def test_auto_takes_the_kernels_for_resnext() -> None:
    """By the rules, if there is no tuned table."""
    x = torch.randn(8, 128, 56, 56, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    geometry = ConvGeometry.of(x.shape, (128, 4, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 32)
    for pass_ in PASSES:
        assert (
            dispatch.decide_by_auto(pass_, x.device, "channels_last", x.dtype, geometry).backend == "triton"
        )


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_network_is_the_eager_one(mode: str) -> None:
    layer = gconv.GroupConv2d(128, 128, 3, padding=1, groups=32, activation="relu").cuda().bfloat16()
    net = torch.nn.Sequential(layer, copy.deepcopy(layer)).to(memory_format=torch.channels_last)
    x = torch.randn(4, 128, 28, 28, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    compiled = torch.compile(net, fullgraph=True, mode=mode)
    for _ in range(3):
        results = []
        for run in (net, compiled):
            y = run(x)
            results.append(
                [y.clone(), *(g.clone() for g in torch.autograd.grad(y.sum(), list(net.parameters())))]
            )
    torch.testing.assert_close(*results)


def converted_network() -> torch.nn.Module:
    """Grouped convolutions of stride 1 and 2 around batch norm, converted, in bfloat16 and channels_last."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(64, 64, 3, padding=1, groups=16, bias=False),
        torch.nn.BatchNorm2d(64),
        torch.nn.ReLU(),
        torch.nn.Conv2d(64, 128, 3, stride=2, padding=1, groups=16),
    )
    assert len(gconv.convert(net).converted) == 2
    return net.cuda().bfloat16().to(memory_format=torch.channels_last)


def image(batch: int = 8) -> torch.Tensor:
    x = torch.randn(batch, 64, 28, 28, device="cuda", dtype=torch.bfloat16)
    return x.to(memory_format=torch.channels_last)


def test_inference_in_a_cuda_graph() -> None:
    net, x = converted_network().eval(), image()
    with torch.inference_mode(), gconv.backend("triton"):
        net(x)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        for _ in range(2):
            x.copy_(image())
            graph.replay()
            assert torch.equal(y, net(x))


# make_graphed_callables warms up on another stream, and keeps autograd nodes that remember this stream.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_training_step_in_a_cuda_graph() -> None:
    """Forward and backward captured by ``torch.cuda.make_graphed_callables``, compared with eager steps."""
    results = []
    for graphed in (False, True):
        torch.manual_seed(0)
        net = converted_network().train()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        with gconv.backend("triton"):
            run = torch.cuda.make_graphed_callables(net, (image(),)) if graphed else net
            net[1].reset_running_stats()
            torch.manual_seed(1)
            for _ in range(3):
                optimizer.zero_grad()
                run(image()).float().square().mean().backward()
                optimizer.step()
        results.append({key: value.float() for key, value in net.state_dict().items()})
    for key in results[0]:
        torch.testing.assert_close(results[1][key], results[0][key], atol=1e-2, rtol=1e-2)


def test_a_scaled_autocast_step_follows_the_original() -> None:
    original = converted_network().float()
    converted = copy.deepcopy(original)
    gconv.revert(original)
    losses = []
    for net in (original, converted):
        scaler, optimizer = torch.amp.GradScaler("cuda"), torch.optim.SGD(net.parameters(), 0.1)
        torch.manual_seed(1)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = net(image().float()).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and losses[1][-1] < losses[1][0]


def test_exported_program_decomposes_to_standard_convolutions() -> None:
    net, x = converted_network().eval(), image()
    with torch.no_grad():
        program = torch.export.export(net, (x,))
        standard = program.run_decompositions(gconv.decompositions())
        assert any("gconv" in str(node.target) for node in program.graph.nodes)
        assert not any("gconv" in str(node.target) for node in standard.graph.nodes)
        torch.testing.assert_close(standard.module()(x), net(x), atol=5e-2, rtol=5e-2)


def test_a_kept_kernel_starts_on_the_stream_of_the_call() -> None:
    layer = gconv.GroupConv2d(128, 128, 3, padding=1, groups=32, bias=False).cuda().bfloat16()
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(64, 128, 56, 56, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad(), gconv.backend("triton"):
        truth = layer(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # a kernel on the default stream wouldn't wait for this
            y = layer(x * 1)
        stream.synchronize()
    torch.testing.assert_close(y, truth)


def test_tensors_on_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    x, w = torch.randn(2, 8, 9, 9, device="cuda:1"), torch.randn(8, 4, 3, 3, device="cuda:1")
    y = gconv.group_conv2d(x, w, padding=1, groups=2, backend="triton")
    torch.testing.assert_close(y, F.conv2d(x, w, padding=1, groups=2), atol=1e-4, rtol=1e-4)


def test_more_than_two_to_the_31_elements() -> None:
    """The offsets of the last image of the batch need 64 bits."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    n, c, size = 43_000, 64, 28
    x = torch.zeros(n, size, size, c, device="cuda", dtype=torch.float16).permute(0, 3, 1, 2)
    x[-1].normal_()
    w = torch.randn(c, 4, 3, 3, device="cuda", dtype=torch.float16)
    y = gconv.group_conv2d(x, w, padding=1, groups=16, backend="triton")
    truth = F.conv2d(x[-1:].double(), w.double(), padding=1, groups=16)
    torch.testing.assert_close(y[-1:].double(), truth, atol=1e-2, rtol=1e-2)
    assert not y[:-1].any()
