"""The layers that gconv is measured on: 1-d and transposed layers."""

from __future__ import annotations

import pytest

from gconv.geometry import ConvGeometry, Padding
from gconv.measure import compiled
from gconv.measure.suites import SUITES, Layer


@pytest.mark.parametrize(
    ("layer", "name", "geometry"),
    [
        (
            Layer(768, 16, 500, kernel=128, dims=1),
            "768/16, length 500, kernel 128",
            ConvGeometry((2, 768, 1, 500), (768, 48, 1, 128), (1, 1), Padding(0, 0, 64, 64), (1, 1), 16),
        ),
        (
            Layer(64, 4, 14, kernel=4, stride=2, transposed=True),
            "64/4, 14x14, 4x4, stride 2, transposed",
            ConvGeometry((2, 64, 28, 28), (64, 16, 4, 4), (2, 2), Padding(1, 1, 1, 1), (1, 1), 4),
        ),
        (
            Layer(64, 4, 14, kernel=2, stride=2, transposed=True),
            "64/4, 14x14, 2x2, stride 2, transposed",
            ConvGeometry((2, 64, 28, 28), (64, 16, 2, 2), (2, 2), Padding(0, 0, 0, 0), (1, 1), 4),
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Layer) else "",
)
def test_a_layer_describes_its_convolution(layer: Layer, name: str, geometry: ConvGeometry) -> None:
    assert (layer.name, layer.geometry(2)) == (name, geometry)


def test_a_transposed_layer_doubles_the_size_of_its_input() -> None:
    for layer in SUITES["transposed"]:
        geometry = layer.geometry(1)
        assert geometry.output_size[2:] == (layer.size,) * 2
        assert geometry.input_size[2:] == (layer.size * layer.stride,) * 2


def test_layers_have_names_of_their_own() -> None:
    for suite, layers in SUITES.items():
        assert len({layer.name for layer in layers}) == len(layers), suite


def test_no_kernel_is_compiled_that_nothing_starts() -> None:
    """A gradient has no bias and no activation, and batch norms are only around 2-d convolutions."""
    (plain,), (flat,), (transposed,) = (
        [layer for layer in SUITES[suite] if layer.kernel == kernel][:1]
        for suite, kernel in (("large_depthwise", 31), ("audio", 31), ("transposed", 4))
    )
    for form in ("epilogue", "residual"):
        assert compiled._happens(form, flat, "forward") and not compiled._happens(form, flat, "input_grad")
        assert compiled._happens(form, transposed, "input_grad")
        assert not compiled._happens(form, transposed, "forward")
    assert [compiled._happens("norm", layer, "forward") for layer in (plain, flat, transposed)] == [
        True, False, False
    ]  # fmt: skip
