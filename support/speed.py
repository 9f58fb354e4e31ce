"""Ways to make an epoch of a large base cheaper. None is a default: experiments/bench.py --only cost measures each.

Not among them: the two halves of guidance are one batch already. The reference prediction cannot join them, since its
LoRA is off and it keeps nothing for a backward pass; larger micro-batches fill the GPU as well. And a micro-batch by
free memory wants the memory of several sizes measured first: --micro-batch is its switch until then.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn as nn

BLOCKS = {"BasicTransformerBlock", "JointTransformerBlock"}     # diffusers' classes of which a denoiser has many


def compile_blocks(net: nn.Module, backend: str = "inductor") -> int:
    """torch.compile for each repeated block, in place, instead of the whole network: one block is compiled, and the
    others, which are alike, take its code. A LoRA can be put on the net before and after. Returns how many there are.
    """
    blocks = [module for module in net.modules() if type(module).__name__ in BLOCKS]
    for block in blocks:
        block.compile(backend=backend)
    return len(blocks)


def channels_last(module: nn.Module) -> nn.Module:
    """Weights of convolutions in the order that tensor cores read: no conversion in each of them, where it is bf16."""
    return module.to(memory_format=torch.channels_last)


def speed_up(base, ways: Iterable[str], backend: str = "inductor"):
    """The base with some of "compiled" (the denoiser's blocks) and "channels_last" (the decoder). ValueError: others."""
    for way in ways:
        if way == "compiled":
            compile_blocks(base.net, backend)
        elif way == "channels_last":
            channels_last(base.vae)
        else:
            raise ValueError(f"wanted compiled or channels_last, got {way!r}")
    return base
