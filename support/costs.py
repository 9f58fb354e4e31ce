"""What an epoch of training takes: the command `cost`. Nothing here knows how an epoch is made."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn as nn

from support import processes, published, to_json


def reduced(config):
    """The settings for one epoch that is only timed: a beta that need not be measured, and little work on a CPU."""
    config.epochs = 1
    if isinstance(config.beta, str):
        config.beta = 1.0
    if torch.device(config.device).type == "cpu" and config.base != "shapes":
        config.batch_size = 1
        config.updates_per_epoch = 1
        config.fraction = 1 / config.steps
        config.skip_below = 0.0
    return config


def count(config, add_lora: Callable[[nn.Module, list[str]], nn.Module]) -> dict | None:
    """Parameters of random networks that are too large for a CPU (above 1e9), printed; None for all others."""
    if torch.device(config.device).type == "cuda" or config.weights != "random":
        return None
    counted = published.count(config.base, add_lora)
    if counted:
        print(to_json(counted))
    return counted


def measure(epoch: Callable[[], list[dict]], base, config) -> dict:
    """Parameters, seconds by phase and peak memory of epoch(), which returns its log's rows. Printed, and returned."""
    parameters = processes.count_parameters(base)
    processes.SECONDS = {}
    begun = time.perf_counter()
    try:
        rows = epoch()
        seconds = processes.SECONDS | {"all": time.perf_counter() - begun}
    finally:
        processes.SECONDS = None
    on_gpu = torch.device(config.device).type == "cuda"
    result = {"device": torch.cuda.get_device_name(config.device) if on_gpu else "CPU", "objects": config.batch_size,
              "updates": len(rows), "judged": sum(row["judged"] for row in rows), "parameters": parameters,
              "seconds": seconds, "peak_GB": processes.peak_memory_GB(config.device)}
    print(to_json(result))
    return result
