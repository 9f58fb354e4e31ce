"""What an evaluation measures: metrics of renders, their intervals, and the networks that evaluations see with.

r2d3.py fills a `Measurement` in `measure` and compares two with `compare`; `paper_protocol` makes the three columns of
the paper's tables from the same measurements. Nothing here knows of diffusion.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from support import UserError, fetching, processes, say, say_too_long, to_bytes, write_atomic
from support.scorers import too_long

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
    too_long: Callable[[list[str]], int] = lambda prompts: 0        # of how many prompts `text` does not see the end


@fetching("the networks that measure", "0.7 GB")
def load_features(tower: nn.Module | None, device: torch.device | str) -> Features:
    """The embedded tower for `shapes`; else CLIP ViT-B/32, FID's Inception, and DreamSim where it is installed."""
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

    title, diverse = "CLIP ViT-B/32, Inception (FID)", image
    if importlib.util.find_spec("dreamsim"):
        from dreamsim import dreamsim
        model, _ = dreamsim(pretrained=True, device=str(device))
        title += ", DreamSim (diversity)"

        def diverse(pictures: Tensor) -> Tensor:
            return F.normalize(model.embed(F.interpolate(pictures, (224, 224), mode="bicubic")), dim=-1)
    return Features(title, image, text, diverse, inception(device), too_long)


def inception(device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """FID's Inception-v3 as torchmetrics has it: pictures (N, 3, H, W) in [0, 1] -> pooled features (N, 2048).

    Weights: those of the original TensorFlow network, converted by torch-fidelity. Pictures are rounded to 8 bits, so
    that they count the same here and after they have been stored.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device)
    return lambda pictures: network((pictures.clamp(0, 1) * 255).round().byte())


class Measurement(NamedTuple):
    """P prompts x S objects each, seen from the four input cameras."""

    reward: Tensor         # (P, S)
    alignment: Tensor      # (P, S) cosine of the object's pictures and its prompt
    retrieved: Tensor      # (P, S) 1 where its own prompt is the closest of all P (R@1)
    coverage: Tensor       # (P, S) mean alpha: the share of the picture that the object covers
    dnc: Tensor            # (P, S) depth-normal consistency
    features: Tensor       # (P, S, V, D) of the pictures, unit length
    fid_features: Tensor   # (P, S, V, D)
    latents: Tensor        # (n, *latent) of the n prompts that the report shows, the first object of each


def kept(path: Path, make: Callable[[], Measurement], shape: tuple[int, int], resumed: bool, rank: int,
         world: int) -> Measurement:
    """make(), a measurement of `shape` (P, S); its file where a run goes on from one. Processes go the same way."""
    found = processes.gather(load_measurement(path, *shape) if resumed else None, world)[0]
    if found:
        return found
    made = make()
    if rank == 0:
        write_atomic(path, to_bytes(partial(torch.save, made._asdict())))
    return made


def load_measurement(path: Path, prompts: int, samples: int) -> Measurement | None:
    """A measurement that was kept; None if there is none, or the file holds anything else."""
    try:
        kept = Measurement(**torch.load(path, weights_only=True))
        whole = all(tensor.shape[:2] == (prompts, samples) for tensor in kept[:-1])
        return kept if whole and len(kept.latents) == len(shown(prompts)) else None
    except Exception:                                           # torch.load has many ways to fail
        return None


def shown(prompts: int) -> list[int]:
    """Which of so many prompts the report shows: at most twelve, evenly spread."""
    return [n * prompts // 12 for n in range(12)] if prompts > 12 else [*range(prompts)]


def text_features(features: Features, prompts: list[str]) -> tuple[dict[str, int], Tensor]:
    """The different prompts' places, and what `features` sees in them (n, D): a list may have a prompt twice."""
    texts = [*dict.fromkeys(prompts)]
    say_too_long("the alignment", features.too_long(texts), len(texts))
    embeds = [features.text(texts[n:n + 256]) for n in range(0, len(texts), 256)]
    return {prompt: n for n, prompt in enumerate(texts)}, torch.cat(embeds)


def look(pictures, prompts: list[str], texts: tuple[dict[str, int], Tensor], features: Features, reward: Tensor,
         dnc: Tensor) -> tuple[Tensor, ...]:
    """What a Measurement holds of B objects, each in its row, without the latents, on the CPU.

    pictures is a kernels.Render of them; texts are all prompts' features, among which an object should find its own.
    """
    B, images = len(prompts), pictures.image.flatten(0, 1)
    seen = {see: see(images).unflatten(0, (B, -1)) for see in {features.image, features.diversity, features.fid}}
    similar = seen[features.image].mean(1) @ texts[1].T         # (B, texts)
    own = similar[range(B), [texts[0][prompt] for prompt in prompts]]
    closest = (own >= similar.amax(1) - 1e-6).float()           # beside one that means the same to `features`, too
    found = reward, own, closest, pictures.alpha.mean((1, 2, 3, 4)), dnc, seen[features.diversity], seen[features.fid]
    return tuple(tensor.cpu() for tensor in found)


def join(parts: list[tuple[Tensor, ...]], prompts: int, samples: int, label: str) -> Measurement:
    """All objects' rows as a Measurement; one line each says how many are not finite, and how many are empty."""
    *numbers, latents = (torch.cat(tensors) for tensors in zip(*parts))
    measured = Measurement(*(tensor.unflatten(0, (prompts, samples)) for tensor in numbers), latents)
    total = measured.reward.numel()
    for name in ("reward", "alignment", "coverage", "dnc"):
        if bad := int((~getattr(measured, name).isfinite()).sum()):
            say(f"{label}: {METRICS[name]} is not finite for {bad} of {total} objects, and cannot be averaged")
    if empty := int((measured.coverage == 0).sum()):
        say(f"{label}: {empty} of {total} objects are empty, their pictures are white")
    return measured


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


def entry(old: Tensor, new: Tensor, old_draws: Tensor, new_draws: Tensor, normal: bool = False) -> dict:
    """A metric (a number) before and after, with 95% intervals from what it is on resampled prompts (n,).

    With `normal` the draws tell only the spread around the values. What cannot be measured is None: a number that is
    not finite, and all intervals where the draws are NaN.
    """
    change, changes = (new - old).item(), new_draws - old_draws
    error, exact = changes.std().item(), 1e-6 * max(abs(old.item()), abs(new.item()))

    def ends(value: Tensor, draws: Tensor) -> list[float | None]:
        if normal:
            return [number(value.item() + side * draws.std().item()) for side in (-1.96, 1.96)]
        return [*map(number, draws.quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist())]

    errors = 0.0 if change == 0 else change / error if error > exact else math.nan      # else it is rounding
    return {"before": number(old.item()), "after": number(new.item()), "after_ci95": ends(new, new_draws),
            "change": number(change), "ci95": ends(new - old, changes),
            "standard_errors": number(errors + 0 * error)}


def number(value: float) -> float | None:
    """None for what is not finite, which JSON does not know."""
    return value if math.isfinite(value) else None


def resample(values: Tensor, draws: Tensor) -> Tensor:
    """Values of prompts (P,) -> their mean over each of the draws (n, P); NaN for one prompt, which has no spread."""
    return values[draws].mean(1) if len(values) > 1 else torch.full(draws.shape[:1], math.nan)


def compare(before: Measurement, after: Measurement, reference: Measurement) -> dict:
    """Each metric before and after, its change, and 95% intervals by a bootstrap over prompts; and P and S.

    "ci95" is that of the change. fid_to_base compares with a second draw of the base (`reference`): "before"
    is the noise floor, not 0; resamples have fewer different prompts and larger distances, so their spread is
    put around the value. What cannot be measured is None.
    """
    (P, S), generator = before.reward.shape, torch.Generator().manual_seed(0)
    draws = torch.randint(P, (1000, P), generator=generator)
    result = {"prompts": P, "samples_per_prompt": S}
    for name in ("reward", "alignment", "retrieved", "coverage", "dnc", "diversity"):
        old, new = (diversity(m.features) if name == "diversity" else getattr(m, name).mean(1) for m in (before, after))
        result[name] = entry(old.mean(), new.mean(), resample(old, draws), resample(new, draws))
    values, spread = torch.full((2,), math.nan), torch.full((2, 2), math.nan)
    if all(m.fid_features.isfinite().all() for m in (before, after, reference)):
        far = reference.fid_features.flatten(0, 2)
        values = torch.stack([frechet_distance(m.fid_features.flatten(0, 2), far) for m in (before, after)])
        spread = fid_draws(before, after, reference, draws) if P > 1 else spread
    result["fid_to_base"] = entry(*values, *spread, normal=True)
    result["fid_to_base"] |= {"images": before.reward.numel() * before.features.shape[2], "resamples": spread.shape[1]}
    return result


FID_DRAWS, FID_DRAWS_WIDE, WIDE = 100, 16, 512      # resamples for FID's interval; fewer for more than 512 features


def fid_draws(before: Measurement, after: Measurement, reference: Measurement, draws: Tensor) -> Tensor:
    """FID to the reference, before and after, on resampled prompts: (2, n).

    Only the spread of these numbers is used. So up to 512 features there are 100 resamples in float64, and with more,
    of which Inception has 2,048, 16 in float32, on the GPU where there is one: a spread from 16 draws is known to about
    a fifth of itself, and each takes seconds.
    """
    from tqdm import tqdm
    P, D = len(before.reward), before.fid_features.shape[-1]
    draws = draws[:FID_DRAWS if D <= WIDE else FID_DRAWS_WIDE]
    center = reference.fid_features.mean((0, 1, 2))
    how = {"dtype": torch.float64 if D <= WIDE else torch.float32,
           "device": "cuda" if D > WIDE and torch.cuda.is_available() else "cpu"}
    sets = [(m.fid_features - center).flatten(1, 2).to(**how) for m in (before, after, reference)]      # (P, n, D) each
    # A prompt's part of a second moment is made once where all of them fit into memory.
    moments = [x.mT @ x if P * D * D <= 2 ** 25 else None for x in sets]

    def gaussian(x: Tensor, moment: Tensor | None, counts: Tensor) -> tuple[Tensor, Tensor]:
        n, weights = x.shape[1] * P, counts.to(x)
        mean = weights @ x.sum(1) / n
        if moment is None:
            rows = (weights.sqrt()[:, None, None] * x)[weights > 0].flatten(0, 1)
            second = rows.T @ rows
        else:
            second = torch.tensordot(weights, moment, 1)
        return mean, (second - n * torch.outer(mean, mean)) / (n - 1)

    result = torch.empty(2, len(draws), dtype=torch.float64)
    for k, rows in enumerate(tqdm(draws, "FID's interval", leave=False, delay=2)):
        counts = torch.bincount(rows, minlength=P)
        gaussians = [gaussian(x, moment, counts) for x, moment in zip(sets, moments)]
        far_mean, far = gaussians.pop()
        size, axes = torch.linalg.eigh(far)
        root = axes * size.clamp(min=0).sqrt()                  # root root^T = far
        for row, (mean, covariance) in zip(result, gaussians):
            cross = torch.linalg.eigvalsh(root.T @ covariance @ root).clamp(min=0).sqrt().sum()
            row[k] = (mean - far_mean).square().sum() + covariance.trace() + far.trace() - 2 * cross
    return result


# ---- the paper's protocol ----------------------------------------------------------------------------------
# Nabla-R2D3 (arXiv 2506.15684) reports the reward, the multi-view FID and the multi-view CLIP similarity: per prompt
# and view, averaged over views, then over prompts (60 unseen prompts, 32 objects each). It does not say which FID
# library, which reference set or which CLIP. Here: torchmetrics' Inception; a second draw of the untouched base, with
# other seeds and as many objects; open_clip's ViT-B/32. So the base's own FID is the noise floor of this protocol and
# not zero: 32 pictures span 31 of 2,048 dimensions, and two draws of one distribution are far apart by this measure.

PAPER_METRICS = {"reward": "reward", "multi_view_fid": "multi-view FID",
                 "multi_view_clip_similarity": "multi-view CLIP similarity x 100"}
PAPER_TIMES_100 = ("hpsv2", "normal", "dnc")    # rewards that the paper's tables give times 100

# Tables 1, 2 and 4: reward / multi-view FID / multi-view CLIP similarity x 100, by base, reward and method.
PAPER = {
    ("diffsplat-pixart", "aesthetic"): {
        "base": (4.72, 55.26, 34.58), "refl": (5.82, 352.97, 21.89), "ddpo": (4.54, 172.95, 32.64),
        "draft": (5.51, 337.77, 22.89), "nabla": (6.44, 217.89, 25.86)},
    ("diffsplat-pixart", "hpsv2"): {
        "base": (22.86, 55.26, 34.58), "refl": (24.92, 274.44, 32.40), "ddpo": (22.23, 69.59, 34.35),
        "draft": (32.65, 224.64, 33.99), "nabla": (27.85, 131.38, 35.35)},
    ("diffsplat-pixart", "normal"): {
        "base": (89.48, 55.26, 34.58), "refl": (90.60, 112.06, 33.99), "ddpo": (89.45, 63.93, 34.56),
        "draft": (91.11, 296.23, 28.36), "nabla": (92.03, 104.45, 34.18)},
    ("diffsplat-pixart", "dnc"): {
        "base": (87.81, 55.26, 34.58), "refl": (89.15, 158.19, 32.74), "ddpo": (87.99, 69.12, 34.48),
        "draft": (88.13, 74.82, 34.52), "nabla": (89.53, 99.01, 34.08)},
    ("diffsplat-sd15", "aesthetic"): {
        "base": (4.81, 67.76, 34.66), "refl": (6.08, 396.79, 20.66), "ddpo": (4.80, 54.79, 34.61),
        "draft": (6.40, 395.84, 19.08), "nabla": (6.02, 154.61, 30.95)},
    ("gaussiancube", "aesthetic"): {
        "base": (4.40, 64.22, 28.60), "refl": (5.50, 296.46, 17.31), "ddpo": (4.06, 230.48, 18.90),
        "draft": (6.04, 352.16, 15.52), "nabla": (5.92, 234.96, 22.57)},
}


def multi_view_fid(features: Tensor, reference: Tensor) -> Tensor:
    """Features (P, S, V, D) of pictures, twice -> (P,): FID of one prompt's S pictures from one view, mean over views.

    S must be at least 2. With S < D the covariances are singular, which frechet_distance does not mind.
    """
    def one_prompt(a: Tensor, b: Tensor) -> Tensor:             # (S, V, D) each
        return torch.stack([frechet_distance(*views) for views in zip(a.unbind(1), b.unbind(1))]).mean()

    if not (features.isfinite().all() and reference.isfinite().all()):
        return torch.full((len(features),), math.nan)
    return torch.stack([one_prompt(*prompt) for prompt in zip(features, reference)])


def multi_view_clip_similarity(alignment: Tensor) -> Tensor:
    """Cosines of pictures and their prompt, averaged over views, (P, S) -> (P,): times 100, averaged over objects."""
    return 100 * alignment.mean(1)


def paper_protocol(before: Measurement, after: Measurement, reference: Measurement, *, base: str, reward: str,
                   method: str) -> dict:
    """The paper's three columns before and after, with 95% intervals by a bootstrap over prompts, and the paper's own.

    `reference` is the second draw of the base that FID is measured to. `base`, `reward` (one name, or a sum, which no
    table has) and `method` ("base" where nothing was fine-tuned) find the published numbers: "paper" is
    {"before": ..., "after": ...} of three numbers each, or None. At least two objects a prompt are needed.
    """
    P, S = before.reward.shape
    reward = {"laion": "aesthetic", "hps-v2.1": "hpsv2"}.get(reward, reward)    # the same scorers by name
    times = 100 if reward in PAPER_TIMES_100 else 1
    draws = torch.randint(P, (1000, P), generator=torch.Generator().manual_seed(0))
    columns = {"reward": lambda m: times * m.reward.mean(1),
               "multi_view_fid": lambda m: multi_view_fid(m.fid_features, reference.fid_features),
               "multi_view_clip_similarity": lambda m: multi_view_clip_similarity(m.alignment)}
    result = {}
    for name, column in columns.items():
        old, new = column(before), column(after)                # (P,) each
        result[name] = entry(old.mean(), new.mean(), resample(old, draws), resample(new, draws))
    rows = PAPER.get((base, reward))
    result["paper"] = rows and {"before": rows["base"], "after": rows[method]}
    result["pictures"] = f"{P} prompts x {S} objects x {before.fid_features.shape[2]} views"
    result["reward_times"] = times
    return result


def paper_table(result: dict) -> tuple[str, list[list[str]]]:
    """What was measured, in two sentences; rows of title, before, after, its interval, the paper's before and after."""
    about = (f"The paper's protocol on {result['pictures']}: per prompt and view, averaged. FID is to as many other "
             "objects of the base, so that the base's own FID (before) is the noise floor.")
    rows = []
    for number, (name, title) in enumerate(PAPER_METRICS.items()):
        row = result[name]
        low, high = row["after_ci95"]
        title += " x 100" if name == "reward" and result["reward_times"] == 100 else ""
        paper = [f"{numbers[number]:.2f}" for numbers in (result["paper"] or {}).values()]
        rows.append([title, *(show(value, ".2f") for value in (row["before"], row["after"])),
                     f"{show(low, '.2f')} .. {show(high, '.2f')}", *paper])
    return about, rows


def print_paper_protocol(result: dict, features: str) -> None:
    """The three columns under the paper's names, and the paper's own numbers where its tables have them."""
    about, rows = paper_table(result)
    print(f"\n{about}\nFeatures: {features}.\n{'':<34}{'before':>9}{'after':>9}   95% of after")
    for title, before, after, interval, *_ in rows:
        print(f"{title:<34}{before:>9}{after:>9}   {interval}")
    for when, numbers in (result["paper"] or {}).items():
        measured = " / ".join(f"{show(result[name][when], '.2f')}" for name in PAPER_METRICS)
        print(f"{when:<8}measured: {measured}   paper: {' / '.join(f'{number:.2f}' for number in numbers)}")


def beta_of(given: str, base: Measurement, quiet: bool) -> float:
    """beta from "2sd": that many standard deviations of the reward within a prompt, measured on the untouched base.

    exp(beta r) moves the mean of r by beta times its variance within a prompt, so that is a move by beta deviations.
    """
    spread = base.reward.std(1).mean().item()
    if not spread > 1e-9:
        raise UserError(f"--beta {given}: the reward is the same for all of a prompt's objects")
    beta = float(given.removesuffix("sd")) / spread
    if not quiet:
        print(f"beta is {beta:.4g}: within a prompt the reward spreads by {spread:.4g}")
    return beta


def titles(summary: dict) -> dict[str, str]:
    """The metrics that the summary tells something of: one object of a prompt has no diversity."""
    return {name: title for name, title in METRICS.items()
            if name != "diversity" or summary["samples_per_prompt"] > 1}


def show(value: float | None, how: str = ".3f") -> str:
    """A number in a table; "-" for what could not be measured."""
    return "-" if value is None else f"{value:{how}}"


def cells(row: dict) -> list[str]:
    """A metric in words: before, after, the interval of after, that of the change."""
    (low, high), (down, up) = row["after_ci95"], row["ci95"]
    return [show(row["before"]), show(row["after"]), f"{show(low)} .. {show(high)}",
            f"{show(down, '+.3f')} .. {show(up, '+.3f')}"]


def print_summary(summary: dict) -> None:
    """The before/after table, and what to think of it."""
    print(f"\n{'on unseen prompts':<32}{'before':>9}{'after':>9}   95% interval     of the change")
    for name, title in titles(summary).items():
        before, after, interval, change = cells(summary[name])
        print(f"{title:<32}{before:>9}{after:>9}   {interval}   {change}")
    errors = summary["reward"]["standard_errors"]
    print(f"\nreward: {summary['scorer']}, " + (f"{errors:+.1f} standard errors. " if errors is not None else "") +
          f"{summary['seconds']:.0f} seconds in all.")
    if "paper_protocol" in summary:
        print_paper_protocol(summary["paper_protocol"], summary["features"])
    if missing := [title for name, title in titles(summary).items() if summary[name]["change"] is None]:
        print(f"warning: could not be measured, as it is not finite for some objects: {', '.join(missing)}")
    if (summary["alignment"]["ci95"][1] or 0) < 0:
        print("warning: the objects fit their prompts less well; try a smaller --beta or fewer --epochs")
    before, after = (summary["coverage"][when] or 0 for when in ("before", "after"))
    if before == 0 or after == 0:
        print("warning: objects are empty, their pictures are white")
    elif abs(after / before - 1) > 0.1:
        print("warning: the coverage changed by more than a tenth; try a smaller --beta or fewer --epochs")
