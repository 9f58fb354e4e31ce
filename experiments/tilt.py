"""The optimum that every method is measured against: the prior tilted by exp(beta r).

Among all distributions with a given mean reward, p(x) exp(beta r(x)) / Z is the one that is closest to the prior p in
KL divergence; beta says which mean. Samples of the untouched base with weights proportional to exp(beta r), within
their prompt, are samples of it, as long as enough of them carry the weight (effective sample size). So all metrics of
the optimum follow from one large draw of the base, for every beta, without training.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.metrics import Measurement  # noqa: E402

FEWEST = 8.0                                # effective samples; the curve ends where a tenth of the prompts has fewer


def tilt_weights(reward: Tensor, beta: float) -> Tensor:
    """Rewards (P, S) of S samples of the base for each of P prompts -> weights (P, S), which sum to 1 per prompt."""
    return (beta * reward.double()).softmax(1)


def effective_sample_size(weights: Tensor) -> Tensor:
    """How many equally weighted samples are worth as much (Kish): (P, S) -> (P,), from 1 to S."""
    return 1 / weights.square().sum(1)


def divergence(weights: Tensor) -> Tensor:
    """KL divergence of the tilted prior from the prior, in nats: (P, S) -> (P,)."""
    return (weights * (weights * weights.shape[1]).clamp(min=1e-300).log()).sum(1)


def weighted_diversity(features: Tensor, weights: Tensor) -> Tensor:
    """support.metrics.diversity of a weighted draw: features (P, S, V, D) of unit length, weights (P, S) -> (P,).

    The mean 1 - cosine of two different samples, drawn by their weights.
    """
    features, squared = features.double(), weights.square()
    mean = torch.einsum("ps,psvd->pvd", weights, features)
    itself = torch.einsum("ps,psvd->pv", squared, features.square())
    same = squared.sum(1, keepdim=True)
    return 1 - ((mean.square().sum(-1) - itself) / (1 - same)).mean(1)


def weighted_frechet_distance(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """support.metrics.frechet_distance of a weighted set, a (n, D) and weights (n,) of sum 1, and a plain b (m, D).

    The weighted covariance is divided by 1 - sum w^2, which for equal weights is the usual n / (n - 1).
    """
    a, b, weights = a.double(), b.double(), weights.double()[:, None]
    mean = (weights * a).sum(0)
    A = (weights / (1 - weights.square().sum())).sqrt() * (a - mean)
    B = (b - b.mean(0)) / (len(b) - 1) ** 0.5
    cross = torch.linalg.svdvals(torch.linalg.qr(A, mode="r").R @ torch.linalg.qr(B, mode="r").R.T).sum()
    return (mean - b.mean(0)).square().sum() + A.square().sum() + B.square().sum() - 2 * cross


def weighted_histogram(labels: Sequence[Sequence[str]], weights: Tensor, among: Sequence[str]) -> dict[str, float]:
    """Share of every label in `among`; labels[p][s] names sample s of prompt p, every prompt counts the same."""
    shares = dict.fromkeys(among, 0.0)
    for names, row in zip(labels, weights.tolist()):
        for name, weight in zip(names, row):
            shares[name] += weight / len(labels)
    return shares


def total_variation(a: dict[str, float], b: dict[str, float]) -> float:
    """Half the sum of the absolute differences of two histograms with the same labels, 0 to 1."""
    return sum(abs(share - b[name]) for name, share in a.items()) / 2


def effective(weights: Tensor) -> float:
    """How many effective samples all but a tenth of the prompts have. weights (P, S)."""
    return effective_sample_size(weights).quantile(0.1).item()


def shuffled(weights: Tensor, times: int = 4) -> list[Tensor]:
    """The same weights (P, S) on other samples of the same prompt: what only chance makes of a metric."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.rand(weights.shape, generator=generator).argsort(1) for _ in range(times)]
    return [weights.gather(1, order) for order in orders]


def tilted(draw: Measurement, reference: Measurement, beta: float) -> dict[str, float]:
    """What an evaluation would measure of the optimum at `beta`; `draw` and `reference` are two draws of the base.

    Returns the means over prompts of reward, alignment, retrieved, coverage, dnc, diversity, and gain (of reward), kl,
    effective samples (see `effective`) and beta; fid_to_base, and fid_by_chance, which is what the same weights on
    other samples give: with fewer effective samples a distance grows that is none.
    """
    weights = tilt_weights(draw.reward.cpu(), beta)
    P, S = weights.shape
    views = draw.fid_features.shape[2]

    def fid(of: Tensor) -> float:
        per_picture = of[:, :, None].expand(P, S, views).flatten() / (P * views)
        return weighted_frechet_distance(draw.fid_features.cpu().flatten(0, 2),
                                         reference.fid_features.cpu().flatten(0, 2), per_picture).item()

    row = {name: (weights * getattr(draw, name).cpu()).sum(1).mean().item()
           for name in ("reward", "alignment", "retrieved", "coverage", "dnc")}
    by_chance = [fid(of) for of in shuffled(weights)]
    return row | {"beta": beta, "gain": row["reward"] - draw.reward.double().mean().item(),
                  "diversity": weighted_diversity(draw.features.cpu(), weights).mean().item(),
                  "fid_to_base": fid(weights), "fid_by_chance": sum(by_chance) / len(by_chance),
                  "kl": divergence(weights).mean().item(), "effective": effective(weights)}


def optimum(draw: Measurement, reference: Measurement, points: int = 12) -> list[dict[str, float]]:
    """The curve "exact tilt": from beta = 0 to where a tenth of the prompts has fewer than FEWEST effective samples."""
    reward = draw.reward.cpu()
    if not (reward.std(1) > 0).any() or reward.shape[1] <= FEWEST:
        return [tilted(draw, reference, 0.0)]                       # nothing to choose from
    low, high = 0.0, 1.0 / reward.double().std(1).mean().item()
    while effective(tilt_weights(reward, high)) > FEWEST and high < 1e12:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if effective(tilt_weights(reward, middle)) > FEWEST else (low, middle)
    return [tilted(draw, reference, low * n / (points - 1)) for n in range(points)]


def at_gain(curve: list[dict[str, float]], gain: float) -> dict[str, float] | None:
    """The optimum with this gain of reward, between the curve's points; None beyond its ends."""
    for left, right in zip(curve, curve[1:]):
        if left["gain"] <= gain <= right["gain"] and right["gain"] > left["gain"]:
            share = (gain - left["gain"]) / (right["gain"] - left["gain"])
            return {name: value + share * (right[name] - value) for name, value in left.items()}
    return None
