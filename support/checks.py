"""First contact with weights: does an untouched base behave as any working base does?

`faults` looks at measurements that r2d3.py has made of a few prompts. Nothing here samples or renders.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from support import say
from support.metrics import Measurement, diversity

# What any base that works stays inside, in units of the whole picture, of 1, and of the world, where objects
# are about 1 across. The numbers are wide: they catch weights or channels that do not belong together.
COVERAGE = 0.01, 0.60
MEDIAN_SCALE = 1e-4, 0.2
VISIBLE = 0.05          # splats that are less opaque are hardly seen
STRAY = 0.01            # share of splats that may lie outside
SAME = 1e-4             # 1 - cosine of two pictures, below which they are the same


class Splats(NamedTuple):
    """What is checked of decoded objects."""

    scales: Tensor      # (B, N, 3) standard deviations, activated
    opacities: Tensor   # (B, N), activated


def faults(guided: Measurement, unguided: Measurement, splats: Splats) -> list[str]:
    """One sentence for each thing that no working base does, with its likely cause; [] if all is well.

    Both measurements are of the same P prompts and S >= 2 objects each, with the same noise; `unguided` has a
    scale of classifier-free guidance of 1. splats are decoded from samples of the base.
    """
    broken = about_splats(splats)
    # What follows from broken splats is not told a second time.
    return broken or [*about_coverage(guided.coverage), *about_seeds(guided), *about_text(guided.retrieved),
                      *about_guidance(guided.alignment - unguided.alignment)]


def about_splats(splats: Splats) -> list[str]:
    """Are scales and opacities numbers that a splat can have?"""
    scales = splats.scales.flatten().float()
    opacities = splats.opacities.flatten().float()
    if not (scales.isfinite().all() and opacities.isfinite().all()):
        return ["the decoder returns numbers that are not finite; probably it runs in a number format "
                "too small for it (try --precision float32), or its weights are damaged"]
    outside = ((opacities < -1e-3) | (opacities > 1 + 1e-3)).float().mean().item()
    if outside > STRAY:
        return [f"{outside:.0%} of the opacities lie outside of 0 to 1; probably the decoder's channels are "
                "laid out otherwise than this base reads them, or an activation is missing"]
    low, high = MEDIAN_SCALE
    negative = (scales <= 0).float().mean().item()
    median = scales.median().item()
    if negative > STRAY or not low <= median <= high:
        return [f"the splats' scales are off (median {median:.2g}, wanted {low:g} to {high:g}; "
                f"{negative:.0%} are not positive); probably the decoder's channels are laid out "
                "otherwise, or scales have another range"]
    if (opacities > VISIBLE).float().mean().item() < STRAY:
        return [f"hardly any splat is more opaque than {VISIBLE:.0%}; probably the decoder's channels are "
                "laid out otherwise, or the latents are not scaled as it wants them"]
    return []


def about_coverage(coverage: Tensor) -> list[str]:
    """Is there an object in the picture, and is there room around it?"""
    low, high = COVERAGE
    mean = coverage.mean().item()
    if mean < low:
        return [f"objects cover {mean:.1%} of the picture (wanted {low:.0%} to {high:.0%}); probably depths "
                "have another scale or cameras another distance than the weights were trained with"]
    if mean > high:
        return [f"objects cover {mean:.0%} of the picture (wanted {low:.0%} to {high:.0%}), as noise does; "
                "probably the denoiser's weights are not those of this decoder, or the latents are scaled "
                "otherwise"]
    return []


def about_seeds(guided: Measurement) -> list[str]:
    """Do two seeds make two objects?"""
    apart = diversity(guided.features).mean().item()
    if apart >= SAME:
        return []
    return [f"objects of different seeds look the same (1 - cosine is {apart:.1g}); probably the denoiser's "
            "weights were not read, or its input has another scale, so that it does not see the noise"]


def about_text(retrieved: Tensor) -> list[str]:
    """Are the prompts told apart, by two standard deviations more than by guessing?"""
    total = retrieved.numel()
    chance = 1 / len(retrieved)
    wanted = min(1.0, chance + 2 * (chance * (1 - chance) / total) ** 0.5)
    found = retrieved.mean().item()
    if len(retrieved) < 2 or found >= wanted:
        return []
    return [f"objects are not those of their prompts (R@1 is {found:.0%} for {len(retrieved)} prompts, "
            f"wanted at least {wanted:.0%}, guessing has {chance:.0%}); probably the text encoder is not "
            "the one that the denoiser was trained with, or the denoiser's weights are others"]


def about_guidance(gain: Tensor) -> list[str]:
    """Does guidance raise the alignment (P, S) with the prompt?"""
    by_prompt = gain.mean(1)
    error = by_prompt.std().item() / len(by_prompt) ** 0.5 if len(by_prompt) > 1 else 0.0
    if by_prompt.mean().item() + error > 0:
        return []
    return ["classifier-free guidance does not raise the alignment with the prompt "
            f"({by_prompt.mean().item():+.3f}); probably the empty prompt is encoded otherwise than in "
            "training, or the two halves are swapped"]


def tell(title: str, found: list[str]) -> None:
    """Print what `faults` found, a line each, or that all is well."""
    for fault in found:
        say(f"{title}: {fault}")
    if not found:
        say(f"{title} behaves as a working base does: splats, coverage, seeds, text and guidance")
