from __future__ import annotations

import torch


def pytest_benchmark_update_machine_info(config: object, machine_info: dict) -> None:
    """Add what pytest-benchmark doesn't record, and remove the host's name, which is private."""
    del machine_info["node"]
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["onednn"] = torch.backends.mkldnn.is_available()


def pytest_benchmark_update_json(config: object, benchmarks: list, output_json: dict) -> None:
    """Save only the statistics, not every measured time."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
