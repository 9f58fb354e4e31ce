"""DiffusionNFT (arXiv 2509.16117): training on finished samples and rewards without a gradient.

For rewards that autograd cannot follow: a count, another program's or a language model's answer.
It trains on the forward process. A sample x_0 of the old policy gets new noise, which makes x_t, and
its reward decides how far the prediction should go towards x_0 or away from it (E1 is r2d3.py's):

    r      = 1/2 + clip(A, -5, 5) / 10              A: the reward less the mean of its prompt's   (E9)
                                                    group, over the deviation of all of these
    eps_+- = eps_old +- b (eps_theta - eps_old)     the implicit positive and negative policy     (E10)
    L      = 5/b average(r m(eps_+) + (1-r) m(eps_-))     m(eps) = |x0(x_t; eps) - x_0|^2 / a,    (E11)
                                                    a: mean |x0(x_t; eps) - x_0|, a constant
    L_kl   = lambda average | eps_theta - eps_ref |^2     eps_ref: without the LoRA               (E12)

Without a, the best eps_theta is eps_old + (2/b) E[r | x_t] (eps_good - eps_old), where eps_good is
that of the old policy's samples weighted by r; so a smaller b goes further. b is --beta, lambda is
--reg-weight. A network may predict eps or a flow's v; E10 and E12 are in what it predicts. The old
policy follows slowly: its weights are a moving average of the policy's. The average's decay grows
by 0.001 in every epoch, up to 0.5.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CLIP = 5.0      # advantages beyond it count as it (E9)
GROUP = 4       # objects of one prompt, which are compared with each other
GROW, HOLD = 0.001, 0.5     # the decay of the old policy grows by this each epoch, up to that


def nft_loss(predict: Callable, predict_ref: Callable, schedule, x_t: Tensor, i: Tensor,
             x_0: Tensor, eps_old: Tensor, r: Tensor, *, beta: float = 1.0,
             adaptive: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """policy (E11), kl (E12, without lambda) and the squared gap to the old policy, (M,) each.

    predict(x, t) and predict_ref, the same without its LoRA, return the prediction that the sampler
    uses. x_0 are samples, x_t the samples with the noise of grid points i (M,), and eps_old the old
    policy's prediction there, (M, *latent) each; r is (M,) in [0, 1]. schedule has t(i) and
    x0(x, prediction, i), as r2d3.NoiseSchedule. `adaptive` divides by a. The gap has no gradient.
    """
    t = schedule.t(i)
    with torch.no_grad():
        eps_ref = predict_ref(x_t, t)
    eps = predict(x_t, t)

    def miss(prediction: Tensor) -> Tensor:
        away = (schedule.x0(x_t, prediction, i) - x_0).flatten(1)
        scale = away.detach().abs().mean(1).clamp(min=1e-5) if adaptive else 1.0
        return away.square().mean(1) / scale

    step = beta * (eps - eps_old)                                                           # (E10)
    policy = CLIP / beta * (r * miss(eps_old + step) + (1 - r) * miss(eps_old - step))      # (E11)
    kl = (eps - eps_ref).square().flatten(1).mean(1)                                        # (E12)
    return policy, kl, (eps - eps_old).detach().square().flatten(1).mean(1)


def weights_of(rewards: list[float], prompts: list[str]) -> Tensor:
    """r (B,) of B objects and their prompts (E9)."""
    reward = torch.tensor(rewards, dtype=torch.float64)
    names = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
    group = torch.tensor([names[prompt] for prompt in prompts])
    total = torch.zeros(len(names), dtype=torch.float64).index_add(0, group, reward)
    apart = reward - (total / group.bincount())[group]
    advantage = apart / (apart.square().mean().sqrt() + 1e-6)
    return (0.5 + advantage.clamp(-CLIP, CLIP) / (2 * CLIP)).float()


@contextlib.contextmanager
def old_policy(weights: list[Tensor], history: dict, epoch: int) -> Iterator[None]:
    """Inside, the network acts with the old policy's weights; `history` keeps them from epoch to epoch."""
    now = [weight.detach().clone() for weight in weights]
    before = history.get("old policy", now)
    decay = min(GROW * (epoch + 1), HOLD)
    history["old policy"] = [old.to(new).lerp(new, 1 - decay) for old, new in zip(before, now)]
    put(weights, history["old policy"])
    try:
        yield
    finally:
        put(weights, now)


@torch.no_grad()
def put(weights: list[Tensor], values: list[Tensor]) -> None:
    """Give parameters these values, in place."""
    for weight, value in zip(weights, values):
        weight.copy_(value)
