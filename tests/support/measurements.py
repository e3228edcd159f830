"""Arguments for a quick run of the benchmarks, and result rows for ResNeXt-50."""

from __future__ import annotations

from dataclasses import asdict

from benchmarks import layers, networks

RUN = ["run", "--suite", "tiny", "--batch", "2", "--dtypes", "float32", "--contenders", "auto", "F.conv2d"]


def layer_row(runner: str, layout: str, p50: float | None, **changes: object) -> dict:
    """Return a row of the first layer of ResNeXt-50, with a memory floor of 90 us."""
    fields = {
        "suite": "resnext50_32x4d", "layer": "128/32, 56x56", "batch": 256, "type": "bfloat16",
        "pass_": "forward", "runner": runner, "layout": layout, "ran": runner, "floor": 90.0,
        "p20": p50, "p50": p50, "p80": p50, "host": 20.0, "extra_bytes": 0, "error": 1e-3,
    }  # fmt: skip
    return asdict(layers.LayerRow(**{**fields, **changes}))


LAYER_ROWS = [
    layer_row("auto", "channels_last", 100.0, p20=98.0, p80=103.0, host=24.0, extra_bytes=2**20),
    layer_row("auto", "contiguous", 300.0),
    layer_row("F.conv2d", "channels_last", 3000.0),
    layer_row("F.conv2d", "contiguous", 294.0),
    layer_row("torch.compile", "channels_last", 250.0),
    layer_row("torch.compile", "contiguous", None, problem="wrong by 1.0e+00"),
]


def network_row(network: str, runner: str, mode: str, speed: float | None) -> dict:
    """Return a row of a training step at ``speed`` images/s, or of a failed one if None."""
    fields = {"network": network, "runner": runner, "layout": "channels_last", "task": "training"}
    fields |= {"mode": mode, "batch": 256, "image": 224, "images_per_second": speed, "error": 1e-3}
    time = speed and 256e3 / speed
    fields |= {
        "p20": time,
        "p50": time,
        "p80": time,
        "problem": None if speed else "OutOfMemoryError: too large",
    }
    return asdict(networks.NetworkRow(**fields))
