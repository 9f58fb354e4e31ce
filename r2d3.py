"""r2d3: align text-to-3D diffusion models with rewards that only see 2D renders.

This is the method of "Nabla-R2D3: Effective and Efficient 3D Diffusion Alignment with 2D Rewards"
(NeurIPS 2025, arXiv 2506.15684) in one file, to be read from top to bottom and copied from.

    python r2d3.py --reward aesthetic  # minutes on two CPU cores; nothing is downloaded
    python r2d3.py sample --prompts "a red cube" --run runs/shapes-aesthetic-seed0
    python r2d3.py evaluate --run runs/shapes-aesthetic-seed0
    torchrun --nproc-per-node 4 -- r2d3.py --reward hpsv2 --base diffsplat-pixart

1. What this is
---------------
A 3D-native diffusion model denoises the latent of an object; a reward judges pictures of the
object. The product of the two, p(x) proportional to p_base(x) exp(beta R(x)), is a distribution
of objects that the reward likes and that the base model could have made. Climbing the reward
alone would forget the base model. This method aims at the product instead: it moves the score of
every denoising step by a scaled gradient of the reward.

The equations. The noise schedule is alpha and sigma: x_t = alpha_t x_0 + sigma_t noise. A step of
the sampler goes from noise level t to the smaller level s, and h = log(alpha_s / sigma_s) -
log(alpha_t / sigma_t). The network predicts eps, the noise in x_t: eps_theta with its LoRA,
eps_ref with the LoRA switched off, and eps_old is what the network predicted when the trajectory
was sampled.

    x0(x_t)  = (x_t - sigma_t eps) / alpha_t       the clean latent, estimated in one step   (E1)
    x_s      ~ N(mean, std^2)                      a step of the sampler, with c0 =
    mean     = (sigma_s / sigma_t) e^-h x_t + c0 x0(x_t)             alpha_s (1 - e^-2h)      (E2)
    std      = sigma_s sqrt(1 - e^-2h)                                                        (E3)
    L_match  = average | grad log p_theta(x_s|x_t) - grad log p_ref(x_s|x_t) - beta w(s) g |^2
                                                                                              (E4)
    L_reg    = lambda average | eps_theta(x_t) - eps_old |^2                                  (E5)
    residual = -k (eps_theta - eps_ref) - beta w(s) g      what is squared in E4, as x_s and  (E6)
                                            x_t cancel; k = c0 sigma_t / (alpha_t std^2)
    g        = grad_{x_s} R(x0(x_s))               the reward's gradient, as published        (E7)
    g        = grad_{x_s} < x0(x_s), u >           the same from u = grad R(x_0), for which   (E8)
                                                   an object is judged only once, at the end

R is the reward of the decoded and rendered latent, averaged over cameras. p_theta and p_ref are
the Gaussian of E2 and E3 with eps_theta and eps_ref; w(s) is a weight per noise level
(--time-weight), lambda is --reg-weight. The sampler, E7 and E8 use predictions under
classifier-free guidance; E4 to E6 use the same or their conditional half (--branch). g is a
constant of the loss: it moves the target, and no gradient flows through it. So the loss is a
weighted regression of eps_theta to eps_ref - (beta w / k) g:

    for every epoch:
        sample trajectories x_T .. x_0 for drawn prompts with the current model       (rollout)
        pick some steps t -> s of every trajectory                           (pick_transitions)
        for every update, for the picked steps that are its share:
            g   = the reward's gradient at x_s, E7 or E8                      (reward_gradient)
            res = the residual E6: how far eps_theta is from the target            (nabla_loss)
            descend the average of |res|^2 + lambda |eps_theta - eps_old|^2 in the LoRA

What beta does. While eps_theta is far from its target, a noise level counts in the gradient of
the loss by c^2 / k, where --matching says what c is. With "score", as published, c is k, so that
the sampler's last step outweighs the others many times over. beta then sets the balance between
the reward on one side and eps_ref and lambda on the other, and how soon the target is reached.
Only where the target is reached does beta mean the tilt exp(beta R). log.csv says how far a run
is: `target` is the root mean square of beta w g / k, which is in units of eps, and `reached` the
share of it that the network has.

`grep "^# [0-9]" r2d3.py` lists the sections. Beside this file, kernels/ holds the rasteriser and the
fused loss, support/ what is not the method (files, published networks, metrics, pages), and bases/
two more base models, written as yours would be.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    # Threads that wait should sleep: spinning ones slow a busy machine down. Set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Ctrl-C while modules load should not print a traceback; `main` installs the real handler.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))


# ----------------------------------------------------------------------------------------------
# 2. The method
# Residual nabla-DB: the detailed balance of a GFlowNet, written for gradients of log-probabilities.
# As in the paper, only its forward term is used (arXiv 2506.15684, 2412.07775).
#
# Everything from here to "end of the block to copy" stands alone: copy it beside kernels/matching.py,
# in a folder kernels/. It knows neither 3D nor text. A network enters as a function predict(x, t)
# that returns the two halves of classifier-free guidance, (eps_uncond, eps_text), the first None
# where guidance is 1.
#
#     code       symbol                              code     symbol
#     x_t, x_s   a step's two ends                   g        the reward's gradient at x_s (E7, E8)
#     i          a step, from grid point i (level    c        what k is scaled to (match_weights)
#                t) to grid point i + 1 (level s)    weight   beta w(s), scaled alike: c beta w / k
#
# Letters in shapes: M transitions (or B objects), T steps of the sampler, *latent that of a latent.
# ----------------------------------------------------------------------------------------------
# ---- begin of the block to copy ----
import hashlib
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from kernels.matching import gradient_matching

Predict = Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor]]


class NoiseSchedule:
    """Noise levels of a sampler with T steps: timesteps (T,), alpha (T + 1,), sigma (T + 1,).

    First-order SDE-DPM-Solver++ and DDIM with eta = 1 are the same transition on different grids.
    Every method takes a grid point i: an int, or one per sample as a LongTensor (M,) on the CPU,
    where the tables are, in float64. The network predicts "eps", or "v" = eps - x0 of a rectified
    flow, where alpha = 1 - sigma and timesteps are 1000 sigma, not rounded. ValueError: lengths
    that do not fit, or a negative grid point.
    """

    def __init__(self, timesteps: Tensor, alpha: Tensor, sigma: Tensor,
                 prediction: Literal["eps", "v"] = "eps"):
        if len(timesteps) == 0 or not len(alpha) == len(sigma) == len(timesteps) + 1:
            raise ValueError("a noise schedule wants T timesteps and T + 1 levels of alpha and sigma,"
                             f" got {len(timesteps)}, {len(alpha)} and {len(sigma)}")
        self.timesteps = timesteps.cpu() if prediction == "v" else timesteps.long().cpu()
        self.alpha = alpha.double().cpu()
        self.sigma = sigma.double().cpu()
        self.prediction = prediction

    def __len__(self) -> int:
        return len(self.timesteps)

    @classmethod
    def from_diffusers(cls, sampler: str, steps: int, **betas) -> Self:
        """The grid of "dpm" (first-order SDE-DPM-Solver++, as in Nabla-R2D3) or "ddim".

        diffusers gives the numbers; `betas` are arguments of its schedulers. The grids end at the
        smallest noise level instead of at 0, so that the last step is a Gaussian too. ValueError:
        another sampler, or no steps.
        """
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
        if sampler not in ("dpm", "ddim") or steps < 1:
            raise ValueError("a model that is no rectified flow samples with dpm or ddim, in one step "
                             f"or more; got {sampler!r} and {steps}")
        if sampler == "dpm":
            scheduler = DPMSolverMultistepScheduler(
                algorithm_type="sde-dpmsolver++", solver_order=1, final_sigmas_type="sigma_min",
                **betas)
            scheduler.set_timesteps(steps)
            ratio = scheduler.sigmas.double()  # sigma / alpha, (T + 1,)
            alpha = (1 + ratio ** 2).rsqrt()
            return cls(scheduler.timesteps, alpha, ratio * alpha)
        scheduler = DDIMScheduler(set_alpha_to_one=False, timestep_spacing="trailing", **betas)
        scheduler.set_timesteps(steps)
        # For some numbers of steps diffusers adds one more timestep, -1.
        timesteps = scheduler.timesteps[:steps]
        squared = scheduler.alphas_cumprod.double()[timesteps.tolist() + [0]]
        return cls(timesteps, squared.sqrt(), (1 - squared).sqrt())

    def at(self, table: Tensor, i: int | Tensor) -> Tensor:
        """table[i]. Python would count negative i from the end, which is never meant here."""
        if torch.as_tensor(i).lt(0).any():
            raise ValueError(f"the sampler's grid has no point {i}; points are counted from 0")
        return table[i]

    def t(self, i: int | Tensor) -> Tensor:
        """The timestep of grid point i, which the network is told; 0 after the last step."""
        if self.prediction == "v":
            return (1000 * self.at(self.sigma, i)).float()
        return self.at(torch.cat([self.timesteps, torch.zeros(1, dtype=torch.long)]), i)

    def x0(self, x: Tensor, prediction: Tensor, i: int | Tensor) -> Tensor:
        """The clean latent, estimated from x at grid point i (E1)."""
        clean = x - per_sample(self.at(self.sigma, i), x) * prediction
        return clean if self.prediction == "v" else clean / per_sample(self.alpha[i], x)

    def step(self, i: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_x, c_0 and std of step i, which is x_s ~ N(c_x x_t + c_0 x0(x_t), std^2)."""
        alpha_t = self.at(self.alpha, i)
        sigma_t = self.sigma[i]
        alpha_s = self.alpha[i + 1]
        sigma_s = self.sigma[i + 1]
        # This is e^-h, written as a quotient: h itself is infinite where alpha_t or sigma_s is 0.
        decay = alpha_t * sigma_s / (alpha_s * sigma_t)
        c_x = sigma_s / sigma_t * decay                                               # (E2)
        c_0 = alpha_s * (1 - decay ** 2)                                              # (E2)
        std = sigma_s * (1 - decay ** 2).sqrt()                                       # (E3)
        return c_x, c_0, std

    def transition(self, x: Tensor, prediction: Tensor, i: int | Tensor) -> tuple[Tensor, Tensor]:
        """Mean (like x) and std (to broadcast against it) of x_s, given x and its prediction."""
        c_x, c_0, std = (per_sample(value, x) for value in self.step(i))
        return c_x * x + c_0 * self.x0(x, prediction, i), std                     # (E2, E3)

    def k(self, i: int | Tensor) -> Tensor:
        """How the score of step i depends on the prediction: score = const - k prediction (E6)."""
        # c_0 / std^2 is alpha_s / sigma_s^2. A flow's k has no 1 / alpha_t, because its E1 has none.
        k_v = self.at(self.sigma, i) * self.alpha[i + 1] / self.sigma[i + 1] ** 2
        return k_v if self.prediction == "v" else k_v / self.alpha[i]


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """A scalar, or one value per sample (M,), shaped to broadcast against x (M, ...)."""
    return value.to(x).reshape(-1, *[1] * (x.dim() - 1))


def seeded(*numbers: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on all of the arguments.

    Random numbers belong to an object here, not to a batch. So an object is the same whatever is
    sampled with it; sizes of batches and numbers of processes change no result beyond rounding.
    """
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def noise_like(x: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Standard normal noise like x (B, ...), on its device; row b comes from generators[b]."""
    shape = x.shape[1:]
    rows = [torch.randn(shape, generator=each, dtype=torch.float32) for each in generators]
    return torch.stack(rows).to(x)


def guide(eps_uncond: Tensor | None, eps_text: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance."""
    return eps_text if eps_uncond is None else eps_uncond + guidance * (eps_text - eps_uncond)


class Trajectory(NamedTuple):
    """What sampling leaves for the loss."""

    x: Tensor           # (B, T + 1, *latent)
    eps: Tensor         # (B, T, *latent) the guided prediction, which the sampler used
    eps_text: Tensor    # (B, T, *latent) its conditional half


@torch.no_grad()
def rollout(predict: Predict, schedule: NoiseSchedule, start: Tensor,
            generators: list[torch.Generator], *, guidance: float = 1.0, progress: Callable = iter,
            keep: bool = True) -> Trajectory | Tensor:
    """Sample from `start`, standard normal noise (B, *latent), with a CPU generator per row of it.

    `progress` wraps the range of steps, as tqdm does. Returns all that the loss needs or, without
    `keep` and for a fraction of the memory, the samples (B, *latent) alone.
    """
    x = start
    xs, guided, texts = [x], [], []
    for i in progress(range(len(schedule))):
        eps_uncond, eps_text = predict(x, schedule.t(i).expand(len(x)))
        eps = guide(eps_uncond, eps_text, guidance)
        mean, std = schedule.transition(x, eps, i)
        x = mean + std * noise_like(x, generators)
        if keep:
            xs.append(x)
            guided.append(eps)
            texts.append(eps_text)
    if not keep:
        return x
    return Trajectory(torch.stack(xs, 1), torch.stack(guided, 1), torch.stack(texts, 1))


def pick_transitions(steps: int, fraction: float, last_step: str,
                     generator: torch.Generator) -> list[int]:
    """The steps of one trajectory to train: `fraction` of them, the last one as `last_step` says.

    "always" takes the last step in every trajectory, "stratified" as often as any other, "never"
    leaves it out. The others are drawn without replacement, in turn from four equal quarters of
    the steps, starting at a random quarter, so that every noise level is trained about equally
    often.
    """
    # 100 * 0.29 is 28.999..., which is meant to be 29.
    count = max(1, int(steps * fraction + 1e-9))
    always = [steps - 1] if last_step == "always" else []
    end = steps if last_step == "stratified" else steps - 1
    quarters = [part[torch.randperm(len(part), generator=generator)].tolist()
                for part in torch.arange(end).tensor_split(4)]
    first = int(torch.randint(4, (), generator=generator))
    in_turn = quarters[first:] + quarters[:first]
    rest = [quarter[n] for n in range(steps) for quarter in in_turn if n < len(quarter)]
    return always + rest[:count - len(always)]


def reward_gradient(predict: Predict, value: Callable[[Tensor], Tensor], schedule: NoiseSchedule,
                    x_s: Tensor, s: Tensor, *, guidance: float = 1.0) -> Tensor:
    """g (M, *latent): the gradient of value(x0(x_s)) with respect to x_s, through the network.

    x_s (M, *latent) lies at grid points s = i + 1 (M,). `predict` has the current weights;
    `guidance` is the sampler's. value(x0) -> (M,) is the reward itself for E7. For E8 it is the
    inner product < x0, u > with u, the reward's gradient at the end of the trajectory, which
    needs no further reward.
    """
    x_s = x_s.detach().requires_grad_()
    eps = guide(*predict(x_s, schedule.t(s)), guidance)
    values = value(schedule.x0(x_s, eps, s))                                     # (E1) at s
    g, = torch.autograd.grad(values.sum(), x_s)                                   # (E7, E8)
    return g


def match_weights(schedule: NoiseSchedule, i: Tensor, *, beta: float, matching: str = "eps",
                  time_weight: str = "squared") -> tuple[Tensor, Tensor]:
    """c and c beta w(s) / k of steps i (M,): k and beta w of the residual (E6), times c / k.

    The factor c / k says how much a noise level counts in the loss, not where the residual is
    zero. `matching` names c: "score" is E4 as published (c = k); "kl" is the Kullback-Leibler
    divergence of the two Gaussian steps (c = k std); "eps" and "v" compare predictions, and a
    change of v is one of eps divided by alpha_t. How much larger k is at the last step depends on
    the schedule: 1760 against 1 to 11 for 20 dpm steps of linear betas 1e-4 to 0.02.

    `time_weight` is w(s): alpha_s "squared" as published, alpha_s ("linear") or 1 ("none"). With
    1, beta means exactly the tilt exp(beta R), but a network that predicts eps may then run away:
    at high noise, 1 / alpha in E1 magnifies the error of its own Jacobian, and as g goes through
    the network that is being trained, the error feeds back. Keep "squared" unless you have
    checked it.
    """
    alpha_t = schedule.alpha[i]
    alpha_s = schedule.alpha[i + 1]
    k = schedule.k(i)
    w = alpha_s ** {"squared": 2, "linear": 1, "none": 0}[time_weight]
    if matching == "score":
        c = k
    elif matching == "kl":
        c = k * schedule.step(i)[2]
    elif matching == schedule.prediction:
        c = torch.ones_like(k)
    else:
        c = {"v": 1 / alpha_t, "eps": alpha_t}[matching]
    return c, c * (beta * w) / k


def nabla_loss(predict: Predict, predict_ref: Predict, schedule: NoiseSchedule, x_t: Tensor,
               i: Tensor, eps_old: Tensor, g: Tensor, *, beta: float, matching: str = "eps",
               time_weight: str = "squared", guidance: float = 1.0,
               backend: str | None = None) -> tuple[Tensor, Tensor]:
    """match (E4) and reg (E5, without lambda), both (M,); `predict` gets their gradients.

    predict_ref is the network without its LoRA. x_t, g and eps_old, the rollout's prediction, are
    (M, *latent), i (M,) the steps. With guidance 1 the conditional half alone is matched, and
    eps_old is the rollout's eps_text; otherwise its eps.
    """
    t = schedule.t(i)
    with torch.no_grad():
        ref_uncond, ref_text = predict_ref(x_t, t)
    eps_uncond, eps_text = predict(x_t, t)
    c, weight = match_weights(schedule, i, beta=beta, matching=matching, time_weight=time_weight)
    return gradient_matching(eps_uncond, eps_text, ref_uncond, ref_text, eps_old, g, guidance,
                             c.to(g), weight.to(g), backend=backend)             # (E4 - E6)


# ---- end of the block to copy ----
# The imports of everything below.
import contextlib
import dataclasses
import math
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch.nn as nn
import torch.nn.functional as F

from kernels import Render, rasterize
from support import (UserError, cli, costs, export, folders, inputs, metrics, presets, processes,
                     published, report, say_not_finite, scorers, shapes, to_json, write_atomic)
from support.cameras import (ELEVATION, FXFY, RADIUS, input_cameras, intrinsics, orbit,
                             plucker_rays)
from support.metrics import Features, Measurement
from support.processes import phase
from support.scorers import depth_normal_consistency

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    # A base of one's own imports r2d3. It should get this module, not a second copy of it.
    sys.modules["r2d3"] = sys.modules["__main__"]


# ----------------------------------------------------------------------------------------------
# 3. Cameras and splats
# World: +y up; azimuth 0 looks from +z, 90 from +x. Cameras have OpenCV axes (x right, y down, z
# forward), their matrices are camera-to-world, and intrinsics fx fy cx cy are divided by the size
# of the image; support/cameras.py makes them. Letters in shapes: B objects, V views, N splats per
# object, H W pixels, C h w one view of a latent.
# ----------------------------------------------------------------------------------------------


def sample_cameras(views: int, elevation_jitter: float, azimuth_jitter: float,
                   generators: list[torch.Generator], elevation: float = ELEVATION,
                   radius: float = RADIUS) -> tuple[Tensor, Tensor]:
    """The views of the reward: evenly spaced azimuths, one random elevation and offset per object.

    The offsets are uniform within plus or minus `elevation_jitter` degrees around `elevation`,
    and plus or minus `azimuth_jitter` degrees. With fewer than four views the first one starts at
    a random quarter turn, so that every side gets seen. Every object has a CPU generator. Returns
    c2w (B, V, 4, 4) and fxfycxcy (B, V, 4).
    """
    rows = [torch.rand(2, generator=generator, dtype=torch.float32) for generator in generators]
    offsets = 2 * torch.stack(rows) - 1  # (B, 2)
    azimuth = 360 / views * torch.arange(views) + azimuth_jitter * offsets[:, :1]  # (B, V)
    if views < 4:
        quarters = [torch.randint(4, (1,), generator=generator) for generator in generators]
        azimuth += 90 * torch.stack(quarters)
    c2w = orbit(elevation + elevation_jitter * offsets[:, 1:], azimuth, radius)
    return c2w, intrinsics(len(offsets), views)


class Gaussians(NamedTuple):
    """Splats in world space, activated: opacities are in [0, 1], colours at least 0."""

    means: Tensor      # (B, N, 3)
    scales: Tensor     # (B, N, 3) standard deviations
    quats: Tensor      # (B, N, 4) wxyz; not normalised, as published (RaDe-GS does not either)
    opacities: Tensor  # (B, N)
    colors: Tensor     # (B, N, 3)


def splat_grid_to_gaussians(grid: Tensor, c2w: Tensor, fxfycxcy: Tensor,
                            scale_range: tuple[float, float] = (0.0005, 0.02),
                            depth_scale: float = 1.0) -> Gaussians:
    """One Gaussian per pixel of 12-channel images in [-1, 1], which is how DiffSplat has objects.

    grid (B, V, 12, H, W): colour 0:3, scale 3:6 (+1 is the smallest of `scale_range`), rotation
    6:10 wxyz in world space, opacity 10, z-depth 11 relative to the camera's distance from the
    origin, in units of `depth_scale`. Pixel (i, j) is the ray through (j / (W - 1), i / (H - 1))
    of the image, as published. Returns N = V H W splats per object. ValueError: not 12 channels.
    """
    if grid.dim() != 5 or grid.shape[2] != 12:
        raise ValueError(f"grid: want (B, V, 12, H, W), got {tuple(grid.shape)}")
    H, W = grid.shape[-2:]
    channels = grid.permute(0, 1, 3, 4, 2)  # (B, V, H, W, 12)
    rgb, scale, quats, opacity, depth = channels.split([3, 3, 4, 1, 1], -1)
    small = scale / 2 + 0.5
    scales = scale_range[0] * small + scale_range[1] * (1 - small)
    z = depth_scale * depth + c2w[..., :3, 3].norm(dim=-1)[..., None, None, None]
    y, x = torch.meshgrid(torch.linspace(0, 1, H, dtype=torch.float32),
                          torch.linspace(0, 1, W, dtype=torch.float32), indexing="ij")
    fx, fy, cx, cy = fxfycxcy[..., None, None].unbind(-3)  # (B, V, 1, 1)
    u = (x.to(grid) - cx) / fx
    v = (y.to(grid) - cy) / fy
    rays = torch.stack([u, v, torch.ones_like(z[..., 0])], -1)
    from_camera = torch.einsum("bvij,bvhwj->bvhwi", c2w[..., :3, :3], rays * z)
    means = from_camera + c2w[..., None, None, :3, 3]
    return Gaussians(means.flatten(1, 3), scales.flatten(1, 3), quats.flatten(1, 3),
                     (opacity / 2 + 0.5).flatten(1), (rgb / 2 + 0.5).flatten(1, 3))


def render(gaussians: Gaussians, c2w: Tensor, fxfycxcy: Tensor, size: int,
           backend: str | None = None, dilation: float = 0.0) -> Render:
    """Square pictures of every object from its V cameras, on white.

    Returns a Render with image (B, V, 3, size, size) at least 0; alpha, depth and median_depth
    (B, V, 1, size, size); normal (B, V, 3, size, size) in camera space. Splats are widened on the
    screen by the variance `dilation`, in squared sides of the picture.
    """
    say_not_finite("the Gaussians of the base, which are left out of the pictures,", gaussians)
    means, scales, quats, opacities, colors = gaussians
    return rasterize(means, quats, scales, opacities, colors, c2w.to(means), fxfycxcy.to(means),
                     size, size, backend=backend, dilation=dilation * size ** 2)


# ----------------------------------------------------------------------------------------------
# 4. Bases
# A base is a frozen 3D diffusion model, and `Base` says what it must offer. DiffSplat is the
# paper's; `shapes`, the default, is DiffSplat with small weights that this repository brings along.
# Further bases are plug-ins: --base FILE.py:FUNCTION names a function of (config, device) that
# returns one. The two in bases/ import this file as everybody's would, and it does not import them.
# ----------------------------------------------------------------------------------------------


class Cond(NamedTuple):
    """Encoded prompts; what a network does not take is None."""

    embeds: Tensor                  # (B, L, D): L tokens of D features
    mask: Tensor | None             # (B, L) true where there is a word
    pooled: Tensor | None = None    # (B, D) one vector for the whole prompt

    def map(self, function: Callable, *others: Cond) -> Cond:
        """function(field, others' fields) of every field that is not None."""
        return Cond(*(None if fields[0] is None else function(*fields)
                      for fields in zip(self, *others)))

    def __getitem__(self, rows) -> Cond:
        """cond[rows] picks objects."""
        return self.map(lambda field: field[rows])


class Base(Protocol):
    """What a 3D diffusion model must offer.

    A protocol with defaults, so subclass it: set net, lora_targets and latent_shape, override
    encode, predict and decode; the rest is inherited. A LoRA stays on `net`, so every training
    wants a fresh base.
    """

    net: nn.Module                      # the frozen denoiser: the module that the LoRA goes on
    lora_targets: list[str]  # the layers of it that get one, by the ends of their names
    latent_shape: tuple[int, ...]       # of one object
    guidance: float = 1.0               # default scale of classifier-free guidance
    device: torch.device = torch.device("cpu")
    betas: dict = {}  # arguments of diffusers' schedulers, for the noise schedule
    elevation: float = ELEVATION        # degrees, around which the reward's cameras are drawn
    radius: float = RADIUS  # their distance from the origin, where objects are centred
    dilation: float = 0.0               # of its splats in pictures, see `render`
    eval_size: int = 128                # side in pixels of the pictures of an evaluation
    tower: nn.Module | None = None      # its own image-text network, where CLIP would not fit
    normals: nn.Module | None = None    # its own normal estimator, where Marigold would not fit

    @abstractmethod
    def encode(self, prompts: list[str]) -> Cond:
        """Prompts as `predict` takes them; [""] is the unconditional half of guidance."""

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The noise in x (B, *latent_shape), or v if `schedule` says so; t (B,) is on the CPU."""

    @abstractmethod
    def decode(self, x0: Tensor) -> Gaussians:
        """Clean latents (B, *latent_shape) as splats; differentiable."""

    def prepare(self, prompts: list[str]) -> None:
        """Called with all prompts of a run before it begins, to check or to encode them."""

    def schedule(self, sampler: str, steps: int) -> NoiseSchedule:
        """The noise levels that the sampler walks."""
        return NoiseSchedule.from_diffusers(sampler, steps, **self.betas)

    def cameras(self, num_objects: int) -> tuple[Tensor, Tensor]:
        """The views of an evaluation, all around: c2w (B, 4, 4, 4), fxfycxcy (B, 4, 4)."""
        azimuths = torch.arange(0.0, 360.0, 90.0, dtype=torch.float32)
        c2w = orbit(self.elevation, azimuths, self.radius)
        return c2w.expand(num_objects, 4, 4, 4), intrinsics(num_objects, 4)


class DiffSplat(Base):
    """DiffSplat: splat grids of four views as latents, which an image network denoises together.

    `net` predicts from [latent, Pluecker rays] of the four input cameras; `vae` has 12 channels,
    one splat grid per view; text(prompts) returns the fields of Cond. Follows
    chenguolin/DiffSplat.
    """

    views = 4

    def __init__(self, net: nn.Module, vae: nn.Module, text: Callable, settings: dict,
                 device: torch.device | str):
        """`settings` are what shapes.load and published.load know of the networks."""
        self.device = torch.device(device)
        self.net = net.to(self.device).eval().requires_grad_(False)
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self.text = text
        published.join_views(self.net, self.views)
        for name in ("image_size", "prediction_type", "guidance", "betas", "scale_range",
                     "depth_scale", "eval_size", "lora_targets"):
            setattr(self, name, settings[name])
        # Of latents: per channel, or one number for all.
        self.latent_mean = settings["latent_mean"].to(self.device).reshape(-1, 1, 1)
        self.latent_std = settings["latent_std"].to(self.device).reshape(-1, 1, 1)
        size = self.image_size // 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (self.views, vae.config.latent_channels, size, size)
        self.c2w, self.fxfycxcy = input_cameras(1, self.device)
        rays = plucker_rays(self.c2w, self.fxfycxcy, self.image_size, self.image_size,
                            settings["half_image_shift"])[0]
        self.plucker = F.interpolate(rays, (size, size), mode="bilinear")  # (V, 6, h, w)
        if self.prediction_type == "v_prediction":
            from diffusers import DDIMScheduler
            self.alpha_by_t = DDIMScheduler(**self.betas).alphas_cumprod.sqrt().to(self.device)

    def encode(self, prompts: list[str]) -> Cond:
        """Prompts as the network takes them."""
        return Cond(*self.text(prompts))

    def prepare(self, prompts: list[str]) -> None:
        """Check, and encode where that is slow, all prompts of a run before it begins."""
        getattr(self.text, "prepare", self.text)(prompts)

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """eps (B, V, C, h, w) in x at timesteps t (B,), whatever the network predicts."""
        B, V, C = x.shape[:3]
        dtype = next(self.net.parameters()).dtype
        t = t.to(self.device)
        rows = torch.cat([x, self.plucker.expand(B, -1, -1, -1, -1)], 2).flatten(0, 1).to(dtype)
        embeds = cond.embeds.to(self.device, dtype).repeat_interleave(V, 0)  # ((b v), L, D)
        mask = None if cond.mask is None else cond.mask.to(self.device).repeat_interleave(V, 0)
        # Sizes of pictures, which PixArt's class asks for and neither network uses.
        unused = {"resolution": None, "aspect_ratio": None}
        out = self.net(rows, encoder_hidden_states=embeds, timestep=t.repeat_interleave(V),
                       return_dict=False, encoder_attention_mask=mask, added_cond_kwargs=unused)[0]
        # The second half of PixArt's channels is a variance that the sampler does not use.
        out = out[:, :C].unflatten(0, (B, V)).float()
        if self.prediction_type != "v_prediction":
            return out
        # This is diffusers' v, which is alpha eps - sigma x0.
        alpha = per_sample(self.alpha_by_t[t], x)
        return alpha * out + (1 - alpha ** 2).sqrt() * x

    def decode(self, x0: Tensor) -> Gaussians:
        """Clean latents (B, V, C, h, w) -> B V H W splats, differentiable."""
        def decode_views(z: Tensor) -> Tensor:
            return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float().clamp(-1, 1)

        z = (x0 * self.latent_std + self.latent_mean).flatten(0, 1)
        if self.image_size > 64:
            # In parts, whose activations are computed again for gradients: they would fill a GPU.
            from torch.utils.checkpoint import checkpoint
            parts = z.split(self.views if z.is_cuda else 1)
            grid = torch.cat([checkpoint(decode_views, part, use_reentrant=False)
                              for part in parts])
        else:
            grid = decode_views(z)
        B = len(x0)
        return splat_grid_to_gaussians(grid.unflatten(0, (B, -1)), self.c2w.expand(B, -1, -1, -1),
                                       self.fxfycxcy.expand(B, -1, -1), self.scale_range,
                                       self.depth_scale)


# The bases that are plug-ins, by name.
PLUGINS = {"gaussiancube": f"{HERE / 'bases/gaussiancube.py'}:load",
           "diffsplat-sd35": f"{HERE / 'bases/diffsplat_sd35.py'}:load"}


def load_base(config: Config, device: torch.device | str) -> Base:
    """The base that `config.base` names, frozen. UserError: no such base, no whole weights."""
    plugin = PLUGINS.get(config.base, config.base)
    if ".py:" in plugin:
        load = inputs.load_function(plugin, "--base", inputs.BASE)
        base = load(config, device)
    elif config.base == "shapes":
        file = Path(config.weights or HERE / "support/shapes.safetensors")
        parts, tower, normals = shapes.load(file, device)
        base = DiffSplat(**parts, device=device)
        base.tower = tower
        base.normals = normals
    elif config.base in published.PUBLISHED:
        parts = published.load(config.base, config.weights, device, config.precision)
        base = DiffSplat(**parts, device=device)
    else:
        known = ", ".join(["shapes", *published.PUBLISHED, *PLUGINS, "FILE.py:FUNCTION"])
        raise UserError(f"there is no base {config.base!r}; --base takes {known}")
    if config.checkpoint:
        base.net.enable_gradient_checkpointing()
    return base


def add_lora(net: nn.Module, targets: list[str], rank: int, seed: int) -> nn.Module:
    """The network with a LoRA of scale 1 on the layers whose names end in one of `targets`."""
    from peft import LoraConfig, get_peft_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lora = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                          target_modules=targets)
        return get_peft_model(net, lora)


# ----------------------------------------------------------------------------------------------
# 5. Rewards
# A reward is a function of pictures and prompts: reward(render, prompts) -> value (B, V). Its
# gradient with respect to the render is all that the method sees of it. support/scorers.py has
# those that are known by name: a base with small networks of its own is judged by them, others by
# published ones.
# ----------------------------------------------------------------------------------------------

Reward = Callable[[Render, list[str]], Tensor]


def load_reward(spec: str, base: Base, device: torch.device | str, checkpoint: bool = False,
                untrained: bool = False) -> Reward:
    """The reward that `spec` names: "aesthetic", "aesthetic=1,dnc=0.3", "my_file.py:my_function".

    `checkpoint` saves memory in published scorers, `untrained` gives them random weights. The
    function's `.title` says what measures it. UserError: something that cannot be loaded.
    """
    terms = []
    for name, weight in inputs.reward_terms(spec):
        if ".py:" in name:
            function, title = inputs.load_function(name), name
        else:
            function, title = scorers.load(name, base, device, checkpoint, untrained)
        terms.append((float(weight or 1), function, title))

    def reward(render: Render, prompts: list[str]) -> Tensor:
        return sum(weight * inputs.call_reward(function, title, render, prompts)
                   for weight, function, title in terms)

    reward.functions = {title: function for _, function, title in terms}
    reward.title = " + ".join(title if weight == 1 else f"{weight:g} x {title}"
                              for weight, _, title in terms)
    return reward


# ----------------------------------------------------------------------------------------------
# 6. Settings and recipes
# Every setting of a run is a field of Config. The command line and --help are made from its source:
# a comment of the form "[commands] heading" begins a group, and what stands behind a field is its
# help. A default of None is filled in by `resolve`: from the recipe, and from support/presets.py.
# ----------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Align a text-to-3D diffusion model with a 2D reward (Nabla-R2D3, arXiv 2506.15684)."""

    # [train sample evaluate cost] The model
    base: str = "shapes"  # shapes is embedded; diffsplat-pixart, diffsplat-sd15, diffsplat-sd35 and
    #   gaussiancube are downloaded once; my_base.py:load is a function of yours,
    #   (config, device) -> r2d3.Base
    weights: str | None = None  # a folder laid out like the published repository; for shapes a file;
    #   "random": the full-size networks and scorers untrained, to measure what they cost
    precision: Literal["bf16", "float32"] = "bf16"  # number format of the frozen denoiser, on a GPU,
    #   of the diffsplat bases; the others are float32 always
    checkpoint: bool = False  # gradient checkpointing in denoiser and scorers: less memory, more time
    device: str | None = None  # cpu, cuda, cuda:1, mps; by default cuda where there is one, else cpu
    backend: Literal["torch", "triton"] | None = None  # implementation of the two kernels; by default
    #   triton on a GPU
    seed: int = 0  # everything random in a run follows from it
    # [train sample evaluate cost] Sampling
    sampler: Literal["dpm", "ddim", "euler"] | None = None  # which grid of noise levels is walked: that
    #   of first-order SDE-DPM-Solver++, or of DDIM with eta 1; euler, for a flow, draws no noise: sample
    #   with it, train with the others
    steps: int | None = None  # steps of the sampler
    guidance: float | None = None  # scale of classifier-free guidance, by default the base's own; the
    #   loss uses it with --branch guided only
    # [train sample cost] Prompts
    prompts: str | None = None  # what to train on or to make: a text file with one prompt a line, a
    #   prompt, or a style of the HPDv2 benchmark, such as hpdv2:photo
    # [train evaluate cost] The reward
    reward: str = "aesthetic"  # aesthetic, hpsv2 (agreement with the prompt), normal (rendered normals
    #   agree with estimated ones), dnc (rendered normals agree with the depth); for shapes the first
    #   three are small embedded stand-ins, aesthetic being colourfulness. Or a scorer by name: laion,
    #   hps-v2.1, hps-v2.0, marigold, colorfulness; a function of yours, my_file.py:my_function; a
    #   weighted sum, aesthetic=1,dnc=0.3
    # [train cost] How the reward sees objects during training
    views: int | None = None  # pictures per object each time it is judged
    view_size: int | None = None  # side of such a picture in pixels
    elevation_jitter: float = 20.0  # half-width: cameras are raised or lowered by up to so many degrees
    azimuth_jitter: float = 60.0  # half-width: cameras are turned by up to so many degrees either way
    # [train cost] Training
    method: Literal["nabla", "refl", "draft", "ddpo"] = "nabla"  # nabla-R2D3, or one that the paper
    #   compares with
    recipe: Literal["paper", "once", "fast"] | None = None  # defaults for the loss of nabla-R2D3: as
    #   published; the same, but objects are judged once; matching eps besides. What is given wins
    batch_size: int | None = None  # objects sampled per epoch and process
    updates_per_epoch: int | None = None  # optimiser steps per epoch, among which the steps of the
    #   sampler that are picked for training are dealt out
    micro_batch: int | None = None  # picked steps in one forward and backward pass: less takes less memory
    lr: float | None = None  # learning rate of AdamW
    lora_rank: int | None = None  # rank of the LoRA; its alpha is the same, so its scale is 1
    draft_steps: int = 1  # for --method draft: differentiate through so many steps of the sampler
    # [train cost] The loss of nabla-R2D3
    beta: float | str | None = None  # the dial: strength of the reward against the prior; it depends on
    #   base, reward and recipe, and is 1e6 to 1e7 in the paper. Or relative: 2sd aims two standard
    #   deviations of the reward higher, as it spreads within a prompt
    reg_weight: float | None = None  # lambda: penalty on moving away from what the rollout predicted
    estimator: Literal["step", "sample", "identity"] | None = None  # of the reward's gradient. step (E7):
    #   objects are judged at every trained step, as published; sample (E8): once, at the end, and the
    #   gradient is pulled back through the network; identity: the gradient at the end, unchanged
    matching: Literal["score", "kl", "eps", "v"] | None = None  # how the loss weighs noise levels: score
    #   as published, where the last step outweighs all others; kl, eps and v are more even
    branch: Literal["guided", "conditional"] | None = None  # match the guided prediction, as published,
    #   or the conditional one alone, at half the cost
    time_weight: Literal["squared", "linear", "none"] | None = None  # weight of the reward by noise
    #   level: alpha squared, alpha or 1; at high noise the gradient is poor
    fraction: float = 0.4  # share of each trajectory's steps that is trained
    last_step: Literal["always", "stratified", "never"] | None = None  # train the sampler's last step: in
    #   every trajectory, as often as any other, or never
    skip_below: float | None = None  # do without a reward gradient at noise levels where it would move
    #   the target by less than this share of the largest level's
    min_quantile: float | None = None  # leave out this share of the training prompts: those that the
    #   untouched base does worst on
    # [train] The run
    epochs: int | None = None  # rounds of sampling and updating
    resume: bool = False  # go on from the last checkpoint in --out; with more --epochs, train longer
    # [train evaluate] What is measured, before and after
    test_prompts: str | None = None  # prompts that are never trained on, given in the same ways
    eval_prompts: int | None = None  # use only the first so many of them
    # [train sample evaluate] Making objects
    out: str | None = None  # folder to write to; by default named after base, reward, method and seed in
    #   runs/, or inside the --run
    samples_per_prompt: int | None = None  # objects per prompt; by default 4, for evaluate 32
    eval_batch: int = 60  # objects sampled at once outside of training: less takes less memory
    # [sample evaluate] A fine-tuned model
    run: str | None = None  # a run's folder: its LoRA is used, and its settings but for output, prompts,
    #   seed and numbers of objects; or only a LoRA (file or folder), with the settings given here
    # [sample] Files beside the splats
    mesh: bool = False  # also a mesh, .glb; needs scikit-image and trimesh
    merge: bool = False  # also the whole denoiser with the LoRA merged, which --weights takes
    # [evaluate] Which metrics
    protocol: Literal["paper"] | None = None  # paper: also reward, multi-view FID and multi-view CLIP
    #   similarity as the paper averages them, beside its own numbers


# What a recipe sets. "paper" is the method as published in every choice. "once" differs in one: an
# object is judged once (E8). "fast" also matches eps, on the conditional half alone, and skips the
# reward's gradient where it hardly counts.
RECIPES = {
    "paper": {"estimator": "step", "matching": "score", "branch": "guided",
              "time_weight": "squared", "last_step": "always", "skip_below": 0.0},
    "once": {"estimator": "sample", "matching": "score", "branch": "guided",
             "time_weight": "squared", "last_step": "always", "skip_below": 0.0},
    "fast": {"estimator": "sample", "matching": "eps", "branch": "conditional",
             "time_weight": "squared", "last_step": "always", "skip_below": 0.25, "reg_weight": 1.0},
}
# lambda as published; it belongs to a match of scores.
PAPER_REG_WEIGHT = {"aesthetic": 3e3, "hpsv2": 5e3, "normal": 1e4, "dnc": 1e4}

WEIGHT_DECAY = 1e-4                 # of AdamW (paper)
MAX_GRAD_NORM = 1.0                 # of all LoRA gradients together (paper)
IMAGE_NOISE = 2e-3                  # standard deviation of noise on judged pictures (authors' code)
DDPO_CLIP = {"shapes": 1e-2}        # how far DDPO's likelihood ratio may leave 1; 1e-4 elsewhere


def defaults(config: Config) -> dict:
    """The settings of recipe, base, reward and method, by name. Later ones win.

    A sum of rewards takes the settings of the first, but leaves out as many prompts as any of
    them wants.
    """
    table = presets.of_base(PLUGINS.get(config.base, config.base))
    names = [presets.SAME.get(name, name) for name, _ in inputs.reward_terms(config.reward)]
    found = table[""] | table.get(names[0], {})
    found["recipe"] = config.recipe or found["recipe"]
    found["reg_weight"] = PAPER_REG_WEIGHT.get(names[0], 1e4)
    found |= RECIPES[found["recipe"]]
    by_reward = table.get(found["recipe"], {})
    found |= by_reward.get(names[0], by_reward.get("", {}))
    found |= table.get(config.method, {})
    found["min_quantile"] = max(table.get(name, {}).get("min_quantile", 0.0) for name in names)
    return found


def resolve(config: Config, command: str = "train") -> Config:
    """A new Config in which all that was not given has a value; only guidance waits for the base.

    UserError: settings that cannot work.
    """
    config = dataclasses.replace(config)
    found = defaults(config)
    kind = "shapes" if config.base == "shapes" else "objects"
    found["prompts"] = str(HERE / f"prompts/{kind}_train.txt")
    found["test_prompts"] = str(HERE / f"prompts/{kind}_test.txt")
    found["samples_per_prompt"] = 32 if command == "evaluate" else 4
    gpu = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    found["device"] = gpu if torch.cuda.is_available() else "cpu"
    name = inputs.run_name(config.base, config.reward, config.method, config.seed)
    found["out"] = f"runs/{name}"
    for name, value in found.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    # Full paths, so that a run finds its files from anywhere.
    config.reward = inputs.absolute_reward(config.reward)
    config.base = inputs.absolute_function(config.base)
    for name in ("prompts", "test_prompts", "weights"):
        setattr(config, name, inputs.absolute(getattr(config, name)))
    cli.check(config)
    return config


# ----------------------------------------------------------------------------------------------
# 7. Training steps
# Section 2 with a base, a reward and settings in place of its arguments; then the methods that
# the paper compares with, on the same base, rewards, views, LoRA and data. Each step function
# returns what is logged, (M,) each, the loss among it, and how many objects were judged.
# ----------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What stays the same during a run."""

    base: Base
    reward: Reward | None   # None where nothing will be judged
    schedule: NoiseSchedule
    null: Cond | None       # the encoded empty prompt; None until `prepare`
    config: Config
    rank: int = 0           # this process's number
    world: int = 1          # number of processes

    def prepare(self, prompts: list[str], *specs: str) -> Job:
        """The job with all prompts of a run, which were read from `specs`, and the empty one encoded.

        In one go, because a text encoder may be gigabytes, and is loaded for every call.
        """
        inputs.prepare(self.base, self.reward, prompts, *specs)
        return self._replace(null=self.base.encode([""]))

    def predict(self, x: Tensor, t: Tensor, cond: Cond,
                guidance: float) -> tuple[Tensor | None, Tensor]:
        """Both halves of classifier-free guidance in one batch, the first None if guidance is 1."""
        if guidance == 1:
            return None, self.base.predict(x, t, cond)
        both = cond.map(lambda text, null: torch.cat([null.expand_as(text), text]), self.null)
        return self.base.predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)

    def predict_guided(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The prediction that the sampler uses."""
        guidance = self.config.guidance
        return guide(*self.predict(x, t, cond, guidance), guidance)

    def rollout(self, prompts: list[str], generators: list[torch.Generator],
                **options) -> Trajectory | Tensor:
        """`rollout` of section 2 with this base: one object per prompt and generator."""
        guidance = self.config.guidance
        predict = partial(self.predict, cond=self.base.encode(prompts), guidance=guidance)
        start = torch.empty(len(prompts), *self.base.latent_shape, device=self.base.device)
        return rollout(predict, self.schedule, noise_like(start, generators), generators,
                       guidance=guidance, **options)

    def render(self, gaussians: Gaussians, c2w: Tensor, fxfycxcy: Tensor, size: int) -> Render:
        """`render` of section 3 with this base's splats."""
        return render(gaussians, c2w, fxfycxcy, size, self.config.backend, self.base.dilation)

    def judge(self, x0: Tensor, prompts: list[str],
              generators: list[torch.Generator]) -> tuple[Tensor, Render]:
        """Rewards (M,) of clean latents, and the pictures that were judged.

        The reward of an object is the mean over its views, whose cameras are drawn anew at every
        call.
        """
        config = self.config
        cameras = sample_cameras(config.views, config.elevation_jitter, config.azimuth_jitter,
                                 generators, self.base.elevation, self.base.radius)
        pictures = self.render(self.base.decode(x0), *cameras, config.view_size)
        noise = IMAGE_NOISE * noise_like(pictures.image, generators)
        pictures = pictures._replace(image=(pictures.image + noise).clamp(0, 1))
        return self.reward(pictures, prompts).mean(1), pictures


class Transitions(NamedTuple):
    """M steps of the sampler, objects and times mixed."""

    i: Tensor                   # (M,) steps, on the CPU: step i goes from grid point i to i + 1
    x_t: Tensor                 # (M, *latent) at grid point i
    x_s: Tensor                 # (M, *latent) at grid point i + 1
    eps_old: Tensor             # (M, *latent) the rollout's prediction, of the trained branch (E5)
    cond: Cond                  # M prompts, encoded
    prompts: list[str]          # M prompts
    generators: list[torch.Generator]   # M, for whatever is random in a transition's loss
    u: Tensor | None            # (M, *latent) the reward's gradient at the trajectory's end (E8)
    advantage: Tensor | None    # (M,) of the whole trajectory, for DDPO

    def at(self, rows: Tensor) -> Transitions:
        """Those of the numbers `rows`, or where the mask `rows` (M,) is true."""
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]

        def pick(field):
            if isinstance(field, list):
                return [field[n] for n in rows]
            return None if field is None else field[rows]
        return Transitions(*map(pick, self))


def gradient_of_reward(job: Job, batch: Transitions) -> tuple[Tensor, int]:
    """g (M, *latent) by the configured estimator, and how many objects were judged for it.

    g moves the target by beta w / k. Noise levels where that factor is small beside the largest
    one do without a gradient, to save passes of the network (skip_below); there g is 0.
    """
    config = job.config
    levels = torch.arange(len(job.schedule))
    _, factors = match_weights(job.schedule, levels, beta=config.beta,
                               matching=job.schedule.prediction,
                               time_weight=config.time_weight)  # (T,)
    wanted = (factors >= config.skip_below * factors.max())[batch.i]  # (M,)
    g = torch.zeros_like(batch.x_s)
    if not wanted.any():
        return g, 0
    part = batch.at(wanted)
    if config.estimator == "identity":
        g[wanted] = part.u
        return g, 0

    def value(x0: Tensor) -> Tensor:
        if config.estimator == "step":
            return job.judge(x0, part.prompts, part.generators)[0]                         # (E7)
        return (x0 * part.u).flatten(1).sum(1)                                              # (E8)

    predict = partial(job.predict, cond=part.cond, guidance=config.guidance)
    with phase("reward gradient"), processes.frozen(job.base.net):
        g[wanted] = reward_gradient(predict, value, job.schedule, part.x_s, part.i + 1,
                                    guidance=config.guidance)
    return g, len(part.i) if config.estimator == "step" else 0


def nabla_step(job: Job, batch: Transitions) -> tuple[dict[str, Tensor], int]:
    """Nabla-R2D3's: the reward's gradient, then the loss."""
    config = job.config
    g, judged = gradient_of_reward(job, batch)
    guidance = config.guidance if config.branch == "guided" else 1.0
    predict = partial(job.predict, cond=batch.cond, guidance=guidance)

    def predict_ref(x: Tensor, t: Tensor) -> tuple[Tensor | None, Tensor]:
        # The reference is the same network with its LoRA switched off.
        with job.base.net.disable_adapter():
            return predict(x, t)

    weights = {"beta": config.beta, "matching": config.matching, "time_weight": config.time_weight}
    with phase("matching"):
        match, reg = nabla_loss(predict, predict_ref, job.schedule, batch.x_t, batch.i,
                                batch.eps_old, g, guidance=guidance, backend=config.backend,
                                **weights)
    c, weight = match_weights(job.schedule, batch.i, **weights)
    g_squared = g.square().flatten(1).mean(1)
    logged = {"reward_gradient": g_squared.sqrt(),
              "loss": match + config.reg_weight * reg, "match": match, "reg": reg,
              # For `dial`: what match is for the untouched base, and its scale.
              "match_of_base": weight.to(g) ** 2 * g_squared, "c_squared": c.to(g) ** 2}
    return logged, judged


def dial(row: dict[str, float]) -> dict[str, float]:
    """The log's row of an update with `target` and `reached`, instead of what they are made from.

    target: the root mean square of beta w g / k, by which eps is to change, in units of eps; over
    the noise levels as the loss weighs them. reached: how much of it the network has. That is 0
    in the beginning, 1 where the match is perfect, and negative where the base is closer to the
    target.
    """
    match_of_base = row.pop("match_of_base")
    row["target"] = (match_of_base / row.pop("c_squared")) ** 0.5
    row["reached"] = 1 - row["match"] / match_of_base if match_of_base else 0.0
    return row


def refl_step(job: Job, batch: Transitions) -> tuple[dict[str, Tensor], int]:
    """ReFL (ImageReward, arXiv 2304.05977): minus the reward of the estimate E1 at a late step."""
    eps = job.predict_guided(batch.x_t, job.schedule.t(batch.i), batch.cond)
    x0 = job.schedule.x0(batch.x_t, eps, batch.i)
    reward, _ = job.judge(x0, batch.prompts, batch.generators)
    return {"loss": -reward}, len(reward)


def draft_step(job: Job, batch: Transitions) -> tuple[dict[str, Tensor], int]:
    """DRaFT-K (arXiv 2309.17400): minus the reward at the end of the sampler's last K steps.

    They start at grid point T - K of the rollout and draw new noise.
    """
    x = batch.x_t
    for i in range(len(job.schedule) - job.config.draft_steps, len(job.schedule)):
        eps = job.predict_guided(x, job.schedule.t(i).expand(len(x)), batch.cond)
        mean, std = job.schedule.transition(x, eps, i)
        x = mean + std * noise_like(x, batch.generators)
    reward, _ = job.judge(x, batch.prompts, batch.generators)
    return {"loss": -reward}, len(reward)


def log_prob(schedule: NoiseSchedule, batch: Transitions, eps: Tensor) -> Tensor:
    """log N(x_s; mean, std^2), averaged over the latent as in Nabla-R2D3's code: (M,)."""
    mean, std = schedule.transition(batch.x_t, eps, batch.i)
    density = -((batch.x_s - mean) / std) ** 2 / 2 - std.log() - math.log(2 * math.pi) / 2
    return density.flatten(1).mean(1)


def ddpo_step(job: Job, batch: Transitions) -> tuple[dict[str, Tensor], int]:
    """DDPO (arXiv 2305.13301): PPO's clipped policy gradient; the policy is the step E2."""
    eps = job.predict_guided(batch.x_t, job.schedule.t(batch.i), batch.cond)
    old = log_prob(job.schedule, batch, batch.eps_old)
    ratio = (log_prob(job.schedule, batch, eps) - old).exp()
    clip = DDPO_CLIP.get(job.config.base, 1e-4)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return {"loss": -torch.minimum(batch.advantage * ratio, batch.advantage * clipped)}, 0


def advantages(rewards: list[float], prompts: list[str],
               history: dict[str, list[float]]) -> Tensor:
    """DDPO's (B,): (reward - mean) / std, over the last 32 rewards of the same prompt.

    While a prompt has fewer than 8 of them, the epoch's rewards take their place. `history`, the
    rewards by prompt, is brought up to date.
    """
    for prompt, reward in zip(prompts, rewards):
        history[prompt] = [*history.get(prompt, []), reward][-32:]
    peers = [history[prompt] if len(history[prompt]) >= 8 else rewards for prompt in prompts]
    mean = torch.tensor([math.fsum(peer) / len(peer) for peer in peers], dtype=torch.float32)
    std = torch.stack([torch.tensor(peer, dtype=torch.float32).std(correction=0)
                       for peer in peers])
    return (torch.tensor(rewards, dtype=torch.float32) - mean) / (std + 1e-6)


def pick_steps(config: Config, generator: torch.Generator) -> list[int]:
    """The steps of one trajectory that the configured method trains."""
    if config.method == "refl":
        # One of the last quarter.
        quarter = math.ceil(config.steps / 4)
        return [config.steps - 1 - int(torch.randint(quarter, (), generator=generator))]
    if config.method == "draft":
        return [config.steps - config.draft_steps]
    return pick_transitions(config.steps, config.fraction, config.last_step, generator)


METHODS = {"nabla": nabla_step, "refl": refl_step, "draft": draft_step, "ddpo": ddpo_step}


# ----------------------------------------------------------------------------------------------
# 8. Training
# One loop for all methods. Every epoch draws its randomness from (seed, epoch, object), so that a
# resumed run continues as if it had never stopped, without stored random states.
# ----------------------------------------------------------------------------------------------


def judge_samples(job: Job, x0: Tensor, prompts: list[str], generators: list[torch.Generator],
                  gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards (B,), alpha coverage (B,) and, with `gradient`, u (B, *latent) of clean latents."""
    parts = []
    for rows in torch.arange(len(x0)).split(job.config.micro_batch):
        part = x0[rows].requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            reward, pictures = job.judge(part, [prompts[n] for n in rows],
                                     [generators[n] for n in rows])
        u = torch.zeros_like(part)
        if gradient:
            u = inputs.gradient(job.config.reward, reward, part)
        parts.append((reward.detach(), pictures.alpha.detach().mean((1, 2, 3, 4)), u))
    reward, coverage, u = (torch.cat(tensors) for tensors in zip(*parts))
    inputs.check_finite(job.config.reward, reward, u)
    return reward, coverage, u


def draw_prompts(prompts: list[str], count: int, generator: torch.Generator) -> list[str]:
    """So many of the prompts in random order; each comes once before any comes twice."""
    order = []
    while len(order) < count:
        order += torch.randperm(len(prompts), generator=generator).tolist()
    return [prompts[n] for n in order[:count]]


def sample_epoch(job: Job, prompts: list[str], epoch: int, pairs: Tensor,
                 history: dict[str, list[float]]) -> tuple[Transitions, dict]:
    """Sample and judge an object for each prompt drawn; what is trained, and what is logged.

    `prompts` are those of all processes, whose objects are numbered through; this process samples
    its part of them. `pairs` (M, 2) are the objects and steps to train that belong to it.
    `history` holds the rewards by prompt that DDPO normalises with. "judged" counts objects that
    were judged because training needs it; otherwise the rewards are for the log.
    """
    config = job.config
    first = job.rank * config.batch_size
    numbers = range(first, first + config.batch_size)
    named = prompts[numbers.start:numbers.stop]
    generators = [seeded(config.seed, epoch, n, "object") for n in numbers]
    with phase("rollout"):
        trajectory = job.rollout(named, generators)
    # With E8 the reward's gradient is asked for here, and nowhere else.
    at_end = config.method == "nabla" and config.estimator != "step"
    with phase("reward gradient" if at_end else "rollout"):
        reward, coverage, u = judge_samples(job, trajectory.x[:, -1], named, generators, at_end)
    advantage = None
    if config.method == "ddpo":
        rewards = sum(processes.gather(reward.tolist(), job.world), [])
        advantage = advantages(rewards, prompts, history)[numbers.start:numbers.stop].to(reward)

    n, i = (pairs - torch.tensor([first, 0])).unbind(1)
    guided = config.method == "ddpo" or config.branch == "guided"
    eps_old = trajectory.eps if guided else trajectory.eps_text
    transitions = Transitions(
        i=i, x_t=trajectory.x[n, i], x_s=trajectory.x[n, i + 1], eps_old=eps_old[n, i],
        cond=job.base.encode(named)[n], prompts=[named[row] for row in n],
        generators=[seeded(config.seed, epoch, *pair) for pair in pairs.tolist()],
        u=u[n] if at_end else None, advantage=None if advantage is None else advantage[n])
    logged = {"reward": processes.mean(reward, job.world),
              "coverage": processes.mean(coverage, job.world),
              "judged": len(prompts) if at_end or config.method == "ddpo" else 0}
    return transitions, logged


def train_epoch(job: Job, prompts: list[str], optimizer: torch.optim.Optimizer, epoch: int,
                history: dict[str, list[float]]) -> Iterator[dict]:
    """Sample, then descend. Yields one row of the log per update.

    All processes know all pairs of object and step that the epoch trains, in one shuffled order,
    and how they are dealt out among the updates. Each computes what belongs to its own objects.
    """
    config = job.config
    total = job.world * config.batch_size
    named = draw_prompts(prompts, total, seeded(config.seed, epoch, "prompts"))
    pairs = torch.tensor([(n, i) for n in range(total)
                          for i in pick_steps(config, seeded(config.seed, epoch, n, "steps"))])
    pairs = pairs[torch.randperm(len(pairs), generator=seeded(config.seed, epoch, "pairs"))]
    own = pairs[:, 0] // config.batch_size == job.rank
    transitions, logged = sample_epoch(job, named, epoch, pairs[own], history)
    start = 0
    for number, update in enumerate(own.tensor_split(min(config.updates_per_epoch, len(pairs)))):
        rows = torch.arange(start, start + int(update.sum()))
        start += len(rows)
        when = f"epoch {epoch}, update {number}"
        row = descend(job, transitions, rows, len(update), optimizer, when)
        logged["judged"] += row.pop("judged")
        # "reward" is that of the epoch's samples.
        yield {"epoch": epoch, **row, **logged}
        logged["judged"] = 0


def descend(job: Job, transitions: Transitions, rows: Tensor, count: int,
            optimizer: torch.optim.Optimizer, when: str) -> dict:
    """One optimiser step on these rows, of `count` in all processes. Returns averages, to log."""
    config = job.config
    weights = optimizer.param_groups[0]["params"]
    totals = {}
    for part in rows.split(config.micro_batch) if len(rows) else ():
        batch = transitions.at(part)
        values, judged = METHODS[config.method](job, batch)
        totals["judged"] = totals.get("judged", 0) + judged
        for name, value in values.items():
            if not value.isfinite().all():
                step = batch.i[~value.isfinite().cpu()][0]
                folders.stop_diverged(f"{name} at sampler step {step}", when, config)
            totals[name] = totals.get(name, 0) + value.detach().sum().item() / count
        with phase("backward"):
            (values["loss"].sum() / count).backward()
    totals = processes.add_up(weights, totals, job.world)
    norm = nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    if not all(weight.isfinite().all() for weight in weights):
        folders.stop_diverged("LoRA weights after the step", when, config)
    row = dial(totals) if config.method == "nabla" else totals
    return row | {"grad_norm": norm.item()}


def start_job(config: Config, base: Base | None, rank: int = 0, world: int = 1,
              judged: bool = True) -> Job:
    """Load what `config` names: base, LoRA if there is a run, and the reward if it will be asked.

    `base` is one of the caller's own, in place of the one that is named.
    """
    # The LoRA is looked for before anything is fetched.
    lora = inputs.find_lora(config.run) if config.run else None
    base = base or load_base(config, config.device)
    if lora:
        folders.warn_if_changed(config.run, base, config.reward)
        base.net = inputs.load_lora(base.net, lora).to(base.device).eval()
    config.guidance = config.guidance or base.guidance
    try:
        schedule = base.schedule(config.sampler, config.steps)
    except ValueError as error:
        raise UserError(f"--sampler {config.sampler}, --steps {config.steps}: {error}") from error
    reward = None
    if judged:
        untrained = config.weights == "random"
        reward = load_reward(config.reward, base, config.device, config.checkpoint, untrained)
    return Job(base, reward, schedule, None, config, rank, world)


def check_training(job: Job, prompts: list[str]) -> None:
    """UserError, before the work: the reward cannot be trained, or no step of the sampler can."""
    cli.check_steps(job.config, job.schedule, pick_steps(job.config, seeded(0)))
    empty = torch.empty(1, *job.base.latent_shape, device=job.base.device)
    trial = noise_like(empty, [seeded("trial")])
    judge_samples(job, trial, prompts[:1], [seeded("trial")], gradient=job.config.method != "ddpo")


def start_lora(job: Job) -> torch.optim.Optimizer:
    """Put a new LoRA on the base, and an optimiser on the LoRA."""
    config = job.config
    job.base.net = add_lora(job.base.net, job.base.lora_targets, config.lora_rank, config.seed)
    weights = [weight for weight in job.base.net.parameters() if weight.requires_grad]
    return torch.optim.AdamW(weights, config.lr, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY)


@dataclass
class Training:
    """What `begin` opens, and `train` goes on with."""

    job: Job
    features: Features          # what evaluations see with
    prompts: list[str]
    test_prompts: list[str]
    out: Path
    state: dict | None          # the checkpoint that it goes on from
    digest: str                 # of both prompt lists and the number of processes
    identity: dict              # hashes of the base's weights and of the reward's files


def begin(config: Config, base: Base | None) -> Training:
    """Load everything, check before the work what can be checked, say what will be done."""
    if base is not None:
        config = dataclasses.replace(config, base=type(base).__name__)
    config = resolve(config)
    config.run = None
    config.device, rank, world = processes.start_processes(config.device)
    prompts = inputs.load_prompts(config.prompts)
    test_prompts = inputs.load_prompts(config.test_prompts)
    digest = hashlib.sha256(repr((prompts, test_prompts, world)).encode()).hexdigest()
    settings, state = folders.open_run(dataclasses.asdict(config), Config, digest,
                                       folders.FREE_ON_RESUME, rank, world)
    config = Config(**settings)
    out = Path(config.out)
    test_prompts = test_prompts[:config.eval_prompts]
    job = start_job(config, base, rank, world)
    job = job.prepare([*prompts, *test_prompts], config.prompts, config.test_prompts)
    check_training(job, prompts)
    identity = folders.check_identity(job.base, config.reward, out, state, world)
    features = metrics.load_features(job.base.tower, config.device)
    if rank == 0:
        about = report.describe(vars(config), job.reward.title) | {"identity": identity}
        print(report.plan(about, world, len(pick_steps(config, seeded(0))), len(prompts),
                          len(test_prompts), state and state["epoch"]))
        folders.begin(out, HERE, about, state)
    if config.min_quantile:
        score = partial(score_prompts, job)
        prompts = folders.without_lowest(prompts, config, score, identity, rank, world)
    if isinstance(config.beta, str) and config.method == "nabla":
        config.beta = beta_in_deviations(job, features, prompts)
    return Training(job, features, prompts, test_prompts, out, state, digest, identity)


@torch.no_grad()
def score_prompts(job: Job, prompts: list[str]) -> Tensor:
    """The reward (P,) of one object of each prompt, by which --min-quantile leaves prompts out."""
    generators = [seeded("filter", prompt) for prompt in prompts]
    x0 = job.rollout(prompts, generators, keep=False)
    return job.judge(x0, prompts, generators)[0]


def beta_in_deviations(job: Job, features: Features, prompts: list[str]) -> float:
    """beta from "2sd": two over the standard deviation of the base's reward within a prompt.

    exp(beta R) moves the mean of R by beta times its variance within a prompt, which then is two
    deviations. Eight objects of each of twelve prompts tell the deviation.
    """
    twelve = prompts[::max(1, len(prompts) // 12)][:12]
    eight = job._replace(config=dataclasses.replace(job.config, samples_per_prompt=8))
    measured = measure(eight, features, twelve, job.config.seed, "spread")
    return metrics.beta_of(job.config.beta, measured, quiet=job.rank > 0)


@folders.unlocking()
def train(config: Config, base: Base | None = None) -> dict:
    """Fine-tune, measure before and after, and leave everything in --out. Returns the summary.

    `base` is one of the caller's own, in place of the one that `config` names.
    """
    from tqdm import tqdm
    started = time.perf_counter()
    training = begin(config, base)
    job = training.job
    config = job.config
    before = measure_base(training, "before", config.seed)
    # A second draw of the base shows how large an FID is by chance.
    other = measure_base(training, "before, other seeds", config.seed + 1)

    optimizer = start_lora(job)
    rows, history, first = [], {}, 0
    if training.state:
        folders.restore(job.base.net, optimizer, training.state, training.out)
        rows, history, first = (training.state[name] for name in ("rows", "history", "epoch"))
    progress = tqdm(total=config.epochs * config.updates_per_epoch, initial=len(rows),
                    desc="fine-tuning", disable=job.rank > 0)
    for epoch in range(first, config.epochs):
        begun = time.perf_counter()
        for row in train_epoch(job, training.prompts, optimizer, epoch, history):
            row["judged"] += rows[-1]["judged"] if rows else 0
            rows.append({"update": len(rows) + 1, **row, "seconds": time.perf_counter() - begun})
            begun = time.perf_counter()
            progress.update()
            progress.set_postfix({name: f"{row[name]:.3f}" for name in ("reward", "coverage")})
        if job.rank == 0:
            folders.save_checkpoint(training.out, job.base.net, optimizer, rows, epoch + 1,
                                    training.digest, history, training.identity)
    progress.close()

    after = measure(job, training.features, training.test_prompts, config.seed, "after")
    if job.rank > 0:
        return {}
    summary = {"scorer": job.reward.title, "base": config.base, "method": config.method,
               "epochs": config.epochs, "updates": len(rows), "judged": rows[-1]["judged"],
               "beta": config.beta, "features": training.features.title,
               **metrics.compare(before, after, other), "seconds": time.perf_counter() - started}
    write_report(job, training.test_prompts, before, after, rows, summary, training.out)
    print(f"open {training.out / 'report.html'}, or make new objects: python r2d3.py sample "
          f"--prompts \"{training.test_prompts[0]}\" --run {training.out}")
    return summary


def measure_base(training: Training, label: str, seed: int) -> Measurement:
    """A measurement of the untouched base; made once, and read again when the run goes on."""
    job = training.job
    prompts = training.test_prompts
    make = partial(measure, job, training.features, prompts, seed, label)
    path = training.out / f"checkpoint/{label}.pt"
    shape = len(prompts), job.config.samples_per_prompt
    return metrics.kept(path, make, shape, bool(training.state), job.rank, job.world)


def cost(config: Config, base: Base | None = None) -> dict:
    """What one epoch takes: parameters, seconds by phase, peak memory. Prints it, saves nothing.

    On a CPU a big base does one step of one object; random weights above 1e9 are only counted.
    """
    config = costs.reduced(resolve(config))
    counted = costs.count(config, partial(add_lora, rank=config.lora_rank, seed=0))
    if counted and base is None:
        return counted
    prompts = inputs.load_prompts(config.prompts)[:config.batch_size]
    job = start_job(config, base).prepare(prompts, config.prompts)
    check_training(job, prompts)
    optimizer = start_lora(job)
    return costs.measure(lambda: [*train_epoch(job, prompts, optimizer, 0, {})], job.base, config)


# ----------------------------------------------------------------------------------------------
# 9. Measuring, sampling, command line
# As in the paper: prompts that were never trained on, the same seeds and views before and after.
# ----------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(job: Job, features: Features, prompts: list[str], seed: int, label: str) -> Measurement:
    """Sample every prompt `samples_per_prompt` times and judge the objects. Same seed, same noise.

    Processes share the chunks of objects, which are the same chunks for any number of them. Of an
    object its numbers and features are kept, and the latent only if the report shows it.
    """
    from tqdm import tqdm
    base = job.base
    per_prompt = job.config.samples_per_prompt
    total = len(prompts) * per_prompt
    shown = metrics.shown(len(prompts))
    texts = metrics.text_features(features, prompts)

    def measure_chunk(chunk: range) -> tuple[Tensor, ...]:
        named = [prompts[n // per_prompt] for n in chunk]
        generators = [seeded(seed, prompt, n % per_prompt) for prompt, n in zip(named, chunk)]
        bar = partial(tqdm, desc=f"{label}, {chunk.start} of {total}", leave=False,
                      disable=job.rank > 0)
        x0 = job.rollout(named, generators, progress=bar, keep=False)
        pictures = job.render(base.decode(x0), *base.cameras(len(chunk)), base.eval_size)
        # Splats may be brighter than white.
        pictures = pictures._replace(image=pictures.image.clamp(0, 1))
        reward = job.reward(pictures, named).mean(1)
        dnc = depth_normal_consistency(pictures, named).mean(1)
        kept = [row for row, n in enumerate(chunk)
                if n % per_prompt == 0 and n // per_prompt in shown]
        return *metrics.look(pictures, named, texts, features, reward, dnc), x0[kept].cpu()

    size = job.config.eval_batch
    chunks = [range(total)[n:n + size] for n in range(0, total, size)]
    parts = []
    # All processes go round equally often, because they meet at the end of each round.
    for n in range(job.rank, job.rank + len(chunks), job.world):
        part = measure_chunk(chunks[n]) if n < len(chunks) else None
        parts += [each for each in processes.gather(part, job.world) if each]
    return metrics.join(parts, len(prompts), per_prompt, label)


def draw(job: Job, gaussians: Gaussians, elevation: float, azimuths: Tensor, size: int) -> Tensor:
    """Pictures (B, V, 3, size, size) from azimuths (V,) all looking at the origin, in degrees."""
    B = len(gaussians.means)
    c2w = orbit(elevation, azimuths, job.base.radius).expand(B, -1, 4, 4)
    return job.render(gaussians, c2w, intrinsics(B, len(azimuths)), size).image


@torch.no_grad()
def write_report(job: Job, prompts: list[str], before: Measurement, after: Measurement,
                 rows: list[dict], summary: dict, out: Path) -> None:
    """summary.json, samples/, curves.png and report.html, a page that needs no network."""
    base = job.base
    objects = [base.decode(each.latents.to(base.device)) for each in (before, after)]
    captions = [prompts[n] for n in metrics.shown(len(prompts))]
    report.write(out, partial(draw, job), objects, captions, rows, summary, vars(job.config),
                 (base.radius, FXFY, base.dilation))
    metrics.print_summary(summary)


@torch.no_grad()
def sample(config: Config, base: Base | None = None) -> list[Path]:
    """Make objects: of each a .ply, an .html to turn it, a .png, a .gif; and one samples.json.

    An object depends on seed, prompt and its number among the prompt's samples, not on the other
    prompts. Returns the paths of the .ply files.
    """
    from tqdm import tqdm
    if not config.prompts:
        raise UserError("sample needs --prompts, a text file or a prompt; "
                        "try --prompts \"a red cube\"")
    prompts = [*dict.fromkeys(inputs.load_prompts(config.prompts))]
    folder = export.begin(config)
    config = resolve(config, "sample")
    job = start_job(config, base, judged=False).prepare(prompts, config.prompts)
    base = job.base
    index = export.Index(folder, vars(config), folders.identify(base, "")["weights"])
    mesh_cameras = None
    if config.mesh:
        elevations, azimuths = export.mesh_angles(base.elevation)
        mesh_cameras = orbit(elevations, azimuths, base.radius), intrinsics(len(azimuths))
    objects = [(prompt, s) for prompt in prompts for s in range(config.samples_per_prompt)]
    written = []
    for start in range(0, len(objects), config.eval_batch):
        chunk = objects[start:start + config.eval_batch]
        generators = [seeded(config.seed, prompt, s) for prompt, s in chunk]
        bar = partial(tqdm, desc=f"objects {start + 1} to {start + len(chunk)}", leave=False)
        x0 = job.rollout([prompt for prompt, _ in chunk], generators, progress=bar, keep=False)
        gaussians = base.decode(x0)
        pictures = job.render(gaussians, *base.cameras(len(chunk)), 256).image
        for n, (prompt, s) in enumerate(chunk):
            path, about = index.claim(prompt, s)
            one = Gaussians(*(tensor[n:n + 1] for tensor in gaussians))
            report.save_object(path, one, pictures[n:n + 1], partial(draw, job), about,
                               (base.radius, FXFY, base.dilation), mesh_cameras, config.backend)
            index.add(path, about)
            print(path)
            written.append(path)
    if config.merge:
        merged = export.save_merged(base, config.base, config.weights, index)
        print(f"--weights {merged}")
    return written


@folders.unlocking()
def evaluate(config: Config, base: Base | None = None) -> dict:
    """Measure as the paper does, 32 objects a prompt, a run beside the base. Returns the summary."""
    started = time.perf_counter()
    given = config.out
    config = resolve(config, "evaluate")
    config.device, rank, world = processes.start_processes(config.device)
    config.out = folders.begin_evaluation(given, config, rank)
    job = start_job(config, base, rank, world)
    features = metrics.load_features(job.base.tower, config.device)
    prompts = inputs.load_prompts(config.test_prompts)[:config.eval_prompts]
    job = job.prepare(prompts, config.test_prompts)
    processes.gather(None, world, processes.LOADING_WAIT)
    out = Path(config.out)
    if rank == 0:
        write_atomic(out / "config.json", to_json(report.describe(vars(config), job.reward.title)))
    tuned = bool(config.run)
    label = "the fine-tuned model" if tuned else "the base"
    after = measure(job, features, prompts, config.seed, label)
    before = after
    with job.base.net.disable_adapter() if tuned else contextlib.nullcontext():
        if tuned:
            before = measure(job, features, prompts, config.seed, "the base")
        other = measure(job, features, prompts, config.seed + 1, "the base once more, for FID")
    if rank > 0:
        return {}
    summary = {"scorer": job.reward.title, "base": config.base, "run": config.run,
               "seed": config.seed, "features": features.title,
               **metrics.compare(before, after, other), "seconds": time.perf_counter() - started}
    if config.protocol:
        method = config.method if tuned else "base"
        summary["paper_protocol"] = metrics.paper_protocol(
            before, after, other, base=config.base, reward=config.reward, method=method)
    write_report(job, prompts, before, after, [], summary, out)
    print(f"open {out / 'report.html'}")
    return summary


def run_config(folder: str) -> Config:
    """The settings of a run, from its config.json; `run` is that folder."""
    settings = folders.read_settings(Path(folder), Config)
    return Config(**settings | {"run": folder, "resume": False})


def parse(arguments: list[str]) -> tuple[Callable[[Config], object], Config]:
    """The command and its Config; with --run, what is not given is as it was in that run."""
    commands = {"train": train, "sample": sample, "evaluate": evaluate, "cost": cost}
    name = arguments.pop(0) if arguments and arguments[0] in commands else "train"
    config = cli.parse(Config, name, arguments)
    if config.run and (Path(config.run) / "config.json").is_file():
        settings = run_config(config.run)
        for field in ("out", "prompts", "device", "samples_per_prompt", "eval_prompts"):
            setattr(settings, field, None)
        settings.seed = 0
        config = cli.parse(Config, name, arguments, settings)
    return commands[name], config


def main() -> int:
    """Exit codes: 0 done, 2 the caller can mend it (one sentence on stderr), 130 Ctrl-C."""
    def work() -> None:
        command, config = parse(sys.argv[1:])
        command(config)
    return cli.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
