"""How the processes of one run share its work, and what it takes: seconds by phase, parameters, memory."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn as nn

from support import UserError, brief

# How long processes wait for each other. They meet after every update and every batch of an evaluation, which takes
# minutes at most; while they load, one may be downloading. Whoever does not come by then has stopped.
WAIT, LOADING_WAIT = timedelta(minutes=30), timedelta(hours=6)
GROUPS: dict[timedelta, object] = {}        # through which objects are exchanged, by how long they wait


def start_processes(device: str) -> tuple[str, int, int]:
    """Join the other processes if torchrun started us. Returns our device, our rank, and how many we are."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return device, 0, 1
    rank, on_gpu = int(os.environ["RANK"]), device.startswith("cuda")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=WAIT)
    if not GROUPS:                          # on CPUs, also beside GPUs: there a missing process is an exception
        for wait in (WAIT, LOADING_WAIT):
            GROUPS[wait] = torch.distributed.new_group(backend="gloo", timeout=wait)
    if on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return device, rank, world


def gather(value: object, world: int, wait: timedelta = WAIT) -> list:
    """Every process's `value`, in the order of their ranks. UserError: one does not come within `wait`, or is gone."""
    everyone = [value] * world
    if world > 1:
        try:
            torch.distributed.all_gather_object(everyone, value, GROUPS[wait])
        except RuntimeError as error:
            raise UserError(f"process {os.environ['RANK']} waited in vain for the others: one has ended, or stood "
                            f"still for {wait} ({brief(error, 120)}); end them all, and go on with --resume") from None
    return everyone


def mean(values: torch.Tensor, world: int) -> float:
    """The mean of all processes' values, of which each has as many."""
    return sum(gather(values.mean().item(), world)) / world


def add_up(weights: list[torch.Tensor], totals: dict[str, float], world: int) -> dict[str, float]:
    """Sum gradients over processes, in place, and the logged totals. A process may have had no part in an update."""
    shares = [share for share in gather(totals, world) if share]        # first: it tells if a process is missing
    if world > 1:
        for weight in weights:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            torch.distributed.all_reduce(weight.grad)
    return {name: sum(share[name] for share in shares) for name in shares[0]}


SECONDS: dict[str, float] | None = None     # by phase; the command `cost` makes it a dict, else nothing is measured


@contextlib.contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Inside, weights need no gradients: for them every LoRA layer would keep its input, most of the memory,
    though only the gradient with respect to x_s is wanted.
    """
    trained = [weight for weight in net.parameters() if weight.requires_grad]
    try:
        net.requires_grad_(False)
        yield
    finally:
        for weight in trained:
            weight.requires_grad_()


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Adds the time that its body takes to SECONDS."""
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()        # else only the launch of the work would be timed
        return time.perf_counter()

    if SECONDS is None:
        yield
        return
    begun = now()
    yield
    SECONDS[name] = SECONDS.get(name, 0) + now() - begun


def count_parameters(base) -> dict[str, int]:
    """Parameters of every network that is an attribute of the base, and of the LoRA on `net`."""
    def count(part: nn.Module, trained: bool | None = None) -> int:
        return sum(weight.numel() for weight in part.parameters() if trained in (None, weight.requires_grad))

    parts = {name: count(part) for name, part in vars(base).items() if isinstance(part, nn.Module)}
    return parts | {"net": count(base.net, False), "LoRA, trained": count(base.net, True)}


def peak_memory_GB(device: str) -> float | None:
    """The most memory that this process has held: of the GPU, or of the machine where its system tells (Linux)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9
    return None
