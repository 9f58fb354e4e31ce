"""What an evaluation measures: metrics of renders, their intervals, and the networks that evaluations see with.

r2d3.py fills a `Measurement` in `measure` and compares two with `compare`. Nothing here knows of diffusion.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from support import fetching

METRICS = {"reward": "reward", "alignment": "alignment (image-text cosine)", "retrieved": "retrieval R@1",
           "coverage": "alpha coverage", "dnc": "geometry (dnc)", "diversity": "diversity",
           "fid_to_base": "FID to the base"}


class Features(NamedTuple):
    """What evaluations see with. The first two share a space; the functions of pictures take (N, 3, H, W)."""

    title: str
    image: Callable[[Tensor], Tensor]       # -> (N, D), unit length: alignment and retrieval
    text: Callable[[list[str]], Tensor]     # prompts -> (P, D), unit length
    diversity: Callable[[Tensor], Tensor]   # -> (N, D'), unit length
    fid: Callable[[Tensor], Tensor]         # -> (N, D'')


@fetching("the networks that measure", "0.6 GB")
def load_features(tower: nn.Module | None, device: torch.device | str) -> Features:
    """The embedded tower for `shapes`; else CLIP ViT-B/32, and DreamSim and Inception where installed."""
    if tower is not None:
        return Features("the embedded image-text tower", tower.image, tower.text, tower.image, tower.image)
    import open_clip
    clip = open_clip.create_model("ViT-B-32-quickgelu", pretrained="openai").to(device).eval()
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in
                 (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))

    def image(pictures: Tensor) -> Tensor:
        small = F.interpolate(pictures, clip.visual.image_size, mode="bicubic", antialias=True)
        return F.normalize(clip.encode_image((small.clamp(0, 1) - mean) / std), dim=-1)

    def text(prompts: list[str]) -> Tensor:
        return F.normalize(clip.encode_text(open_clip.tokenize(prompts).to(device)), dim=-1)

    title, diverse, fid = "CLIP ViT-B/32", image, image
    if importlib.util.find_spec("dreamsim"):
        from dreamsim import dreamsim
        model, _ = dreamsim(pretrained=True, device=str(device))
        title += ", DreamSim (diversity)"

        def diverse(pictures: Tensor) -> Tensor:
            return F.normalize(model.embed(F.interpolate(pictures, (224, 224), mode="bicubic")), dim=-1)

    if importlib.util.find_spec("pytorch_fid"):
        from pytorch_fid.inception import InceptionV3
        inception = InceptionV3([3]).to(device).eval()
        title += ", Inception (FID)"

        def fid(pictures: Tensor) -> Tensor:
            return inception(pictures)[0].flatten(1)
    return Features(title, image, text, diverse, fid)


class Measurement(NamedTuple):
    """P prompts x S objects each, seen from the four input cameras."""

    reward: Tensor         # (P, S)
    alignment: Tensor      # (P, S) cosine of the object's pictures and its prompt
    retrieved: Tensor      # (P, S) 1 where its own prompt is the closest of all P (R@1)
    coverage: Tensor       # (P, S) mean alpha: the share of the picture that the object covers
    dnc: Tensor            # (P, S) depth-normal consistency
    features: Tensor       # (P, S, V, D) of the pictures, unit length
    fid_features: Tensor   # (P, S, V, D)
    latents: Tensor        # (P, S, *latent)


def diversity(features: Tensor) -> Tensor:
    """(P, S, V, D) -> (P,): mean 1 - cosine of two objects of one prompt in one view; 0 if S = 1."""
    S = features.shape[1]
    apart = 1 - torch.einsum("psvd,ptvd->pvst", features, features)
    return apart.sum((-2, -1)).mean(1) / max(S * (S - 1), 1)


def frechet_distance(a: Tensor, b: Tensor) -> Tensor:
    """FID's distance of the Gaussians fitted to two sets of features (n, D); double precision.

    With centred features A, B / sqrt(n - 1), the trace of the square root of the covariances' product is the
    sum of the singular values of A B^T; of A and B their R factors suffice.
    """
    a, b = a.double(), b.double()
    A, B = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    cross = torch.linalg.svdvals(torch.linalg.qr(A, mode="r").R @ torch.linalg.qr(B, mode="r").R.T).sum()
    return (a.mean(0) - b.mean(0)).square().sum() + A.square().sum() + B.square().sum() - 2 * cross


def compare(before: Measurement, after: Measurement, reference: Measurement) -> dict:
    """Each metric before and after, its change, and 95% intervals by a bootstrap over prompts; and P and S.

    "ci95" is that of the change. fid_to_base compares with a second draw of the base (`reference`): "before"
    is the noise floor, not 0; resamples have fewer different prompts and larger distances, so their spread is
    put around the value.
    """
    (P, S), generator = before.reward.shape, torch.Generator().manual_seed(0)
    draws = torch.randint(P, (1000, P), generator=generator)

    def entry(old: Tensor, new: Tensor, old_draws: Tensor, new_draws: Tensor) -> dict:
        change, changes = (new - old).item(), new_draws - old_draws
        error, ends = changes.std().item(), torch.tensor([0.025, 0.975], dtype=changes.dtype)
        return {"before": old.item(), "after": new.item(), "after_ci95": new_draws.quantile(ends).tolist(),
                "change": change, "ci95": changes.quantile(ends).tolist(),
                "standard_errors": change / error if error > 1e-9 else 0.0}

    result = {"prompts": P, "samples_per_prompt": S}
    for name in ("reward", "alignment", "retrieved", "coverage", "dnc", "diversity"):
        old, new = (diversity(m.features) if name == "diversity" else getattr(m, name).mean(1)
                    for m in (before, after))
        result[name] = entry(old.mean(), new.mean(), old[draws].mean(1), new[draws].mean(1))

    def fid(measured: Measurement, rows: Tensor) -> Tensor:
        return frechet_distance(*(m.fid_features[rows].flatten(0, 2) for m in (measured, reference)))

    every = torch.arange(P)
    old, new = fid(before, every), fid(after, every)
    resampled = (torch.stack([fid(measured, rows) for rows in draws[:100]]) for measured in (before, after))
    centred = (drawn - drawn.mean() + value for drawn, value in zip(resampled, (old, new)))
    result["fid_to_base"] = entry(old, new, *centred)
    result["fid_to_base"]["images"] = before.reward.numel() * before.features.shape[2]
    return result


def titles(summary: dict) -> dict[str, str]:
    """The metrics that the summary tells something of: one object of a prompt has no diversity."""
    return {name: title for name, title in METRICS.items()
            if name != "diversity" or summary["samples_per_prompt"] > 1}


def print_summary(summary: dict) -> None:
    """The before/after table, and what to think of it."""
    print(f"\n{'on unseen prompts':<32}{'before':>9}{'after':>9}   95% interval     of the change")
    for name, title in titles(summary).items():
        row = summary[name]
        (low, high), (down, up) = row["after_ci95"], row["ci95"]
        print(f"{title:<32}{row['before']:>9.3f}{row['after']:>9.3f}   {low:.3f} .. {high:.3f}   "
              f"{down:+.3f} .. {up:+.3f}")
    print(f"\nreward: {summary['scorer']}, {summary['reward']['standard_errors']:+.1f} standard errors. "
          f"{summary['seconds']:.0f} seconds in all.")
    if summary["alignment"]["ci95"][1] < 0:
        print("warning: the objects fit their prompts less well; try a smaller --beta or fewer --epochs")
    if abs(summary["coverage"]["after"] / summary["coverage"]["before"] - 1) > 0.1:
        print("warning: the coverage changed by more than a tenth; try a smaller --beta or fewer --epochs")
