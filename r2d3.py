"""r2d3: align text-to-3D diffusion models with rewards that only see 2D renders.

This is the method of "Nabla-R2D3: Effective and Efficient 3D Diffusion Alignment with 2D Rewards" (NeurIPS
2025, arXiv 2506.15684) in one file, to be read from top to bottom and copied from.

1. What this is
---------------
A 3D-native diffusion model denoises the latent of an object; a reward judges pictures of the object.
Sampling from the product of the two, p(x) proportional to p_base(x) exp(beta R(x)), gives objects that the
reward likes and that the base model could have made. The method gets there by moving the score of every
denoising step by a scaled gradient of the reward, instead of climbing the reward alone, which would forget
the prior:

    for every epoch:
        draw prompts and sample trajectories x_T .. x_0 with the current model                  (rollout)
        pick some steps t -> s of every trajectory                                     (pick_transitions)
        for every update, for the transitions (x_t, x_s) of its share:
            g   = gradient of the reward at x_s, through decoder and renderer           (reward_gradient)
            res = how far the score is from the base's score + beta w(s) g                   (nabla_loss)
            descend the average of |res|^2 + lambda |eps_theta - eps_old|^2 in the LoRA weights

The equations. alpha and sigma are the noise schedule: x_t = alpha_t x_0 + sigma_t noise. t and s are the
noise levels at a step's two ends, and h = log(alpha_s / sigma_s) - log(alpha_t / sigma_t). eps_theta is the
network with its LoRA, eps_ref the same network with the LoRA switched off, eps_old what eps_theta predicted
during the rollout; eps in E1 is any of the three. p_theta and p_ref are the Gaussian of E2 with eps_theta and
eps_ref. The sampler, E7 and E8 use predictions under classifier-free guidance, E4 to E6 the same or their
conditional half (--branch). lambda is --reg-weight, w(s) depends on --time-weight.

    x0(x_t)  = (x_t - sigma_t eps) / alpha_t                one-step estimate of the clean latent       (E1)
    mean     = (sigma_s / sigma_t) e^-h x_t + c0 x0(x_t)    a step of the sampler: x_s ~ N(mean, std^2) (E2)
    std      = sigma_s sqrt(1 - e^-2h)                      c0 = alpha_s (1 - e^-2h)                    (E3)
    L_match  = average | grad log p_theta(x_s|x_t) - grad log p_ref(x_s|x_t) - beta w(s) g |^2          (E4)
    L_reg    = lambda average | eps_theta(x_t) - eps_old |^2                                            (E5)
    residual = -k_t (eps_theta - eps_ref) - beta w(s) g     inside E4, where x_s and x_t cancel;        (E6)
                                                            k_t = c0 sigma_t / (alpha_t std^2)
    g        = grad_{x_s} R(x0(x_s))                        estimator "step": as published              (E7)
    g        = grad_{x_s} < x0(x_s), u >                    estimator "sample": u = grad R at the       (E8)
                                                            trajectory's end, asked for once per object

R is the reward of decoded, rendered latents, averaged over cameras; w(s) is a weight per noise level. g is a
constant of the loss: no gradient flows through it to theta, it only moves the target. So the loss is a
weighted regression of eps_theta(x_t) to eps_ref(x_t) - (beta w / k) g, and `nabla_step` is the whole method.

Each section below (`grep "^# [0-9]" r2d3.py` lists them) says what it needs, so that it can be lifted.
kernels/ holds the two fused operators (rasteriser and loss), support/ what is not the method (files,
published networks, metrics, pages). To copy the loss alone, take NoiseSchedule, per_sample, reward_gradient,
match_weights, nabla_loss and kernels/matching.py; the README shows it on twenty lines of a user's own code.

    python r2d3.py --reward aesthetic             # minutes on two CPU cores, no weights are downloaded
    python r2d3.py sample --prompts "a red cube" --run runs/shapes-aesthetic-seed0
    python r2d3.py evaluate --run runs/shapes-aesthetic-seed0
    torchrun --nproc-per-node 4 -- r2d3.py --reward hpsv2 --base diffsplat-pixart
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import signal
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

if __name__ == "__main__":      # Threads that wait should sleep: spinning ones slow a busy machine down.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))      # no traceback from an import; see `main`

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels import Render, gradient_matching, rasterize
from support import (UserError, check_writable, cli, export, folders, gaussiancube, inputs, metrics, presets,
                     processes, published, report, say_not_finite, scorers, shapes, to_bytes, to_json,
                     write_atomic)
from support.export import SH_C0, write_ply as save_ply
from support.metrics import Features, Measurement
from support.published import join_views
from support.inputs import load_lora, load_prompts
from support.processes import frozen, phase

# Letters in shapes: B objects, V views, N Gaussians per object, M transitions in a micro-batch, T steps of
# the sampler, P prompts, S objects per prompt, C h w one view of the latent (h in E2 and E3 is another), H W
# pixels, L tokens, D features, G the side of a grid. `i` is a point on the sampler's grid: step i goes from i
# (noise level t) to i + 1 (level s). The network is told a noise level's timestep, schedule.t(i).

HERE = Path(__file__).resolve().parent


# -----------------------------------------------------------------------------------------------------------
# 2. Config
# Every setting of a run. The command line and --help are made from this text: a comment of the form
# "[commands] heading" begins a group, and what stands behind a field is its help. A default of None is filled
# in by `resolve` from support/presets.py, by base, recipe and reward. Needs: support's cli, presets and run.
# -----------------------------------------------------------------------------------------------------------

BaseName = Literal["shapes", "diffsplat-pixart", "diffsplat-sd15", "diffsplat-sd35", "gaussiancube"]


@dataclass
class Config:
    """Align a text-to-3D diffusion model with a 2D reward (Nabla-R2D3, arXiv 2506.15684)."""

    # [train sample evaluate cost] The model
    base: BaseName = "shapes"  # the 3D diffusion model; shapes is embedded in this repository, the others are
    #   downloaded once
    weights: str | None = None  # a folder laid out like the published repository; for shapes a file; "random"
    #   builds the full-size networks untrained, the scorers as well, to measure what they cost
    precision: Literal["bf16", "float32"] = "bf16"  # number format of the frozen denoiser, on a GPU and for
    #   the diffsplat bases; the others are float32 always
    checkpoint: bool = False  # gradient checkpointing in denoiser and scorers: less memory, more time
    device: str | None = None  # cpu, cuda, cuda:1, mps; by default cuda where there is one, else cpu
    backend: Literal["torch", "triton"] | None = None  # which implementation of the two kernels to use; by
    #   default triton on a GPU
    seed: int = 0  # everything random in a run follows from it
    # [train sample evaluate cost] Sampling
    sampler: Literal["dpm", "ddim", "euler"] | None = None  # which grid of noise levels is walked: SDE-DPM-
    #   Solver++'s of first order, or DDIM's with eta 1; euler draws no noise: a rectified flow samples with
    #   it, and trains with the others
    steps: int | None = None  # steps of the sampler
    guidance: float | None = None  # scale of classifier-free guidance, by default the base's own; the loss
    #   uses it with --branch guided only
    # [train sample cost] Prompts
    prompts: str | None = None  # what to train on or to make: a text file with one prompt a line, a prompt,
    #   or a style of the HPDv2 benchmark, such as hpdv2:photo
    # [train evaluate cost] The reward
    reward: str = "aesthetic"  # aesthetic, hpsv2 (agreement with the prompt), normal (rendered normals agree
    #   with estimated ones), dnc (rendered normals agree with the depth); for shapes the first three are
    #   small embedded stand-ins, aesthetic being colourfulness. Or a scorer by name: laion, hps-v2.1,
    #   hps-v2.0, marigold, colorfulness; your own, my_file.py:my_function; a weighted sum,
    #   aesthetic=1,dnc=0.3
    # [train cost] How the reward sees objects during training
    views: int | None = None  # pictures per object each time the reward is asked
    view_size: int | None = None  # side of such a picture in pixels
    elevation_jitter: float = 20.0  # half-width: cameras are raised or lowered by up to this many degrees
    azimuth_jitter: float = 60.0  # half-width: cameras are turned by up to this many degrees either way
    # [train cost] Training
    method: Literal["nabla", "refl", "draft", "ddpo"] = "nabla"  # nabla-R2D3, or one of the paper's baselines
    recipe: Literal["paper", "fast"] | None = None  # defaults for estimator, matching, branch, time weight,
    #   last step, skip-below and reg-weight: as in the paper, or what worked best on shapes; what is given
    #   wins
    batch_size: int | None = None  # objects sampled per epoch and process
    updates_per_epoch: int | None = None  # optimiser steps per epoch; the steps of the sampler that are
    #   picked for training are dealt out among them
    micro_batch: int | None = None  # picked steps in one forward and backward pass: less takes less memory
    lr: float | None = None  # learning rate of AdamW
    lora_rank: int | None = None  # rank of the LoRA; its alpha is the same, so its scale is 1
    draft_steps: int = 1  # for --method draft: differentiate through the last K steps of the sampler; 0 is
    #   DRaFT-LV, the last step with several noises
    # [train cost] The loss of nabla-R2D3
    beta: float | str | None = None  # the dial: strength of the reward against the prior; hundreds for
    #   shapes, 1e6 to 1e7 for the paper's bases. Or relative: 2sd aims two standard deviations of the reward
    #   higher, as it spreads within a prompt
    reg_weight: float | None = None  # lambda: penalty on moving away from what the epoch's rollout predicted
    estimator: Literal["step", "sample", "identity"] | None = None  # of the reward gradient. step: the reward
    #   is asked at every trained step (as published); sample: once per object, and pulled back through the
    #   network; identity: the sample's gradient, unchanged
    matching: Literal["score", "kl", "eps", "v"] | None = None  # how the loss weighs noise levels: score as
    #   published, where the last step outweighs all others; kl, eps and v are more even
    branch: Literal["guided", "conditional"] | None = None  # match the guided prediction, as published, or
    #   the conditional one alone, at half the cost
    time_weight: Literal["squared", "linear", "none"] | None = None  # weight of the reward by noise level:
    #   alpha squared, alpha or 1; at high noise the one-step estimate, and so the gradient, is poor
    fraction: float = 0.4  # share of each trajectory's steps that is trained
    last_step: Literal["always", "stratified", "never"] | None = None  # train the sampler's last step: in
    #   every trajectory, as often as any other, or never
    skip_below: float | None = None  # do without a reward gradient at noise levels where it would move the
    #   target by less than this share of the largest level's; saves passes of the network
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
    samples_per_prompt: int | None = None  # objects per prompt, when measuring too; by default 4, for
    #   evaluate 32
    eval_batch: int = 60  # objects sampled at once outside of training: less takes less memory
    # [sample evaluate] A fine-tuned model
    run: str | None = None  # a run's folder: its LoRA is used, and its settings but for output, prompts, seed
    #   and numbers of objects; or only a LoRA (file or folder), with the settings given here
    # [sample] Files beside the splats
    mesh: bool = False  # also a mesh, .glb; needs scikit-image and trimesh
    merge: bool = False  # also the whole denoiser with the LoRA merged, which --weights takes
    # [evaluate] Which metrics
    protocol: Literal["paper"] | None = None  # paper: also reward, multi-view FID and multi-view CLIP
    #   similarity as the paper averages them, beside its own numbers


WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 1.0     # of AdamW, and of all LoRA gradients together (paper)
DDPO_CLIP = {"shapes": 1e-2}                # how far DDPO's likelihood ratio may leave 1; 1e-4 elsewhere


def resolve(config: Config, command: str = "train") -> Config:
    """A new Config with the defaults that depend on base, recipe and reward filled in.

    Raises UserError for settings that cannot work. The guidance stays None if it is the base's own.
    """
    rewards = [name for name, _ in inputs.reward_terms(config.reward)]
    defaults = presets.defaults(config.base, config.recipe, rewards, config.method)
    rewards = "-".join(Path(reward.rpartition(":")[0] or reward).stem for reward in rewards)
    method = "" if config.method == "nabla" else f"-{config.method}"
    kind = "shapes" if config.base == "shapes" else "objects"
    gpu = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    defaults |= {"prompts": str(HERE / f"prompts/{kind}_train.txt"),
                 "test_prompts": str(HERE / f"prompts/{kind}_test.txt"),
                 "samples_per_prompt": 32 if command == "evaluate" else 4,
                 "device": gpu if torch.cuda.is_available() else "cpu",
                 "out": f"runs/{config.base}-{rewards}{method}-seed{config.seed}"}
    config = dataclasses.replace(config, **{name: value for name, value in defaults.items()
                                            if getattr(config, name) is None})
    files = {name: inputs.absolute(getattr(config, name)) for name in ("prompts", "test_prompts", "weights")}
    config = dataclasses.replace(config, reward=inputs.absolute_reward(config.reward), **files)
    cli.check(config)
    return config


# -----------------------------------------------------------------------------------------------------------
# 3. Cameras
# World: +y up; azimuth 0 looks from +z, 90 from +x. Cameras: OpenCV axes (x right, y down, z forward),
# matrices are camera-to-world, intrinsics fx fy cx cy are divided by the image size.
# Needs: nothing. Follows: DiffSplat's src/utils/geo_util.py, checked against its recorded output.
# -----------------------------------------------------------------------------------------------------------

FXFY = 1422.222 / 1024     # focal length in image widths: a field of view of 39.6 degrees (DiffSplat)
RADIUS = 1.4               # distance of the cameras from the origin (DiffSplat)
ELEVATION = 10.0           # degrees above the horizon (DiffSplat)


def orbit(elevation: Tensor | float, azimuth: Tensor | float, radius: Tensor | float = RADIUS) -> Tensor:
    """Camera-to-world matrices of cameras that look at the origin.

    elevation, azimuth in degrees (positive elevation: camera above), radius in world units; they broadcast.
    Returns (..., 4, 4), OpenCV axes.
    """
    tensors = [v if torch.is_tensor(v) else torch.tensor(float(v)) for v in (elevation, azimuth, radius)]
    elev, azim, rad = torch.broadcast_tensors(*tensors)
    elev, azim, zero = torch.deg2rad(elev), torch.deg2rad(azim), torch.zeros_like(rad)
    back = torch.stack([elev.cos() * azim.sin(), elev.sin(), elev.cos() * azim.cos()], -1)  # to the camera
    right = torch.stack([azim.cos(), zero, -azim.sin()], -1)
    down = torch.cross(right, back, dim=-1)
    c2w = torch.eye(4, dtype=rad.dtype, device=rad.device).repeat(*rad.shape, 1, 1)
    c2w[..., :3, :] = torch.stack([right, down, -back, rad[..., None] * back], -1)
    return c2w


def intrinsics(*shape: int) -> Tensor:
    """fx, fy, cx, cy of every camera of this project: (*shape, 4)."""
    return torch.tensor([FXFY, FXFY, 0.5, 0.5]).expand(*shape, 4)


def input_cameras(num_objects: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The four views in which DiffSplat represents an object: c2w (B, 4, 4, 4), fxfycxcy (B, 4, 4)."""
    c2w = orbit(ELEVATION, torch.tensor([0.0, 90.0, 180.0, 270.0])).expand(num_objects, 4, 4, 4)
    return c2w.to(device), intrinsics(num_objects, 4).to(device)


def sample_cameras(views: int, elevation_jitter: float, azimuth_jitter: float,
                   generators: list[torch.Generator], elevation: float = ELEVATION,
                   radius: float = RADIUS) -> tuple[Tensor, Tensor]:
    """The views of the reward: evenly spaced azimuths, one random elevation and azimuth offset per object.

    The offsets are uniform within plus or minus `elevation_jitter` degrees around `elevation`, and plus or
    minus `azimuth_jitter` degrees. With fewer than four views the first one starts at a random quarter turn,
    so that every side gets seen. Every object has a CPU generator. Returns c2w (B, V, 4, 4) and
    fxfycxcy (B, V, 4).
    """
    u = 2 * torch.stack([torch.rand(2, generator=generator) for generator in generators]) - 1       # (B, 2)
    azimuth = 360 / views * torch.arange(views) + azimuth_jitter * u[:, :1]                         # (B, V)
    if views < 4:
        azimuth += 90 * torch.stack([torch.randint(4, (1,), generator=generator) for generator in generators])
    return orbit(elevation + elevation_jitter * u[:, 1:], azimuth, radius), intrinsics(len(u), views)


def plucker_rays(c2w: Tensor, fxfycxcy: Tensor, height: int, width: int,
                 half_image_shift: bool = False) -> Tensor:
    """Pluecker coordinates of the pixels' rays: (B, V, 6, height, width) = [origin x direction, direction].

    `half_image_shift` reproduces the convention that the published DiffSplat weights were trained with: pixel
    positions run over [0.5, 1.5] of the image instead of its [0, 1], so the rays are off by half an image.
    """
    h, w = torch.arange(height, device=c2w.device), torch.arange(width, device=c2w.device)
    if half_image_shift:
        v, u = h / max(height - 1, 1) + 0.5, w / max(width - 1, 1) + 0.5
    else:
        v, u = (h + 0.5) / height, (w + 0.5) / width
    fx, fy, cx, cy = fxfycxcy[..., None, None].unbind(-3)  # (B, V, 1, 1)
    x = ((u - cx) / fx).expand(*c2w.shape[:2], height, width)
    y = ((v[:, None] - cy) / fy).expand_as(x)
    rays = torch.einsum("bvij,bvjhw->bvihw", c2w[..., :3, :3], torch.stack([x, y, torch.ones_like(x)], 2))
    rays = F.normalize(rays, dim=2)
    origin = c2w[..., :3, 3, None, None].expand_as(rays)
    return torch.cat([torch.cross(origin, rays, dim=2), rays], 2)


# -----------------------------------------------------------------------------------------------------------
# 4. Gaussians
# Needs: kernels' Render and rasterize, support's say_not_finite. save_ply is write_ply of support/export.py.
# -----------------------------------------------------------------------------------------------------------


class Gaussians(NamedTuple):
    """Splats in world space, activated: scales are standard deviations, opacities in [0, 1], colours >= 0."""

    means: Tensor      # (B, N, 3)
    scales: Tensor     # (B, N, 3)
    quats: Tensor      # (B, N, 4) wxyz; not normalised, as published (RaDe-GS does not either)
    opacities: Tensor  # (B, N)
    colors: Tensor     # (B, N, 3)


def splat_grid_to_gaussians(grid: Tensor, c2w: Tensor, fxfycxcy: Tensor,
                            scale_range: tuple[float, float] = (0.0005, 0.02),
                            depth_scale: float = 1.0) -> Gaussians:
    """One Gaussian per pixel of 12-channel images in [-1, 1] (DiffSplat's representation of an object).

    grid (B, V, 12, H, W): colour 0:3, scale 3:6 (+1 is the smallest of `scale_range`), rotation 6:10 wxyz in
    world space, opacity 10, z-depth 11 relative to the camera's distance from the origin in units of
    `depth_scale`. Pixel (i, j) is the ray through (j / (W - 1), i / (H - 1)) of the image, as published.
    Returns N = V H W splats per object.
    """
    B, V, _, H, W = grid.shape
    if grid.shape[2] != 12:
        raise ValueError(f"grid: want (B, V, 12, H, W), got {tuple(grid.shape)}")
    channels = grid.permute(0, 1, 3, 4, 2)  # (B, V, H, W, 12)
    rgb, scale, quats, opacity, depth = channels.split([3, 3, 4, 1, 1], -1)
    small = scale / 2 + 0.5
    scales = scale_range[0] * small + scale_range[1] * (1 - small)
    z = depth_scale * depth + c2w[..., :3, 3].norm(dim=-1)[..., None, None, None]
    y, x = torch.meshgrid(torch.linspace(0, 1, H), torch.linspace(0, 1, W), indexing="ij")
    fx, fy, cx, cy = fxfycxcy[..., None, None].unbind(-3)  # (B, V, 1, 1)
    rays = torch.stack([(x.to(grid) - cx) / fx, (y.to(grid) - cy) / fy, torch.ones_like(z[..., 0])], -1)
    means = torch.einsum("bvij,bvhwj->bvhwi", c2w[..., :3, :3], rays * z) + c2w[..., None, None, :3, 3]
    return Gaussians(means.flatten(1, 3), scales.flatten(1, 3), quats.flatten(1, 3),
                     (opacity / 2 + 0.5).flatten(1), (rgb / 2 + 0.5).flatten(1, 3))


def render(gaussians: Gaussians, c2w: Tensor, fxfycxcy: Tensor, size: int, backend: str | None = None,
           dilation: float = 0.0) -> Render:
    """Square pictures of every object from its V cameras, on white: a Render with image (B, V, 3, size, size)
    at least 0; alpha, depth and median_depth (B, V, 1, size, size); normal (B, V, 3, size, size) in camera
    space. Splats are widened on the screen by the variance `dilation`, in squared sides of the picture.
    """
    g = gaussians
    say_not_finite("the Gaussians that the base makes, which are left out of the pictures,", g)
    return rasterize(g.means, g.quats, g.scales, g.opacities, g.colors, c2w.to(g.means), fxfycxcy.to(g.means),
                     size, size, backend=backend, dilation=dilation * size ** 2)


# -----------------------------------------------------------------------------------------------------------
# 5. NoiseSchedule
# Every step of the sampler is one Gaussian transition; this class is all that the method knows of diffusion.
# Needs: torch, UserError; from_diffusers also diffusers, whose schedulers give timesteps and noise levels.
#     x_t = alpha_t x0 + sigma_t eps,   h = log(alpha_s / sigma_s) - log(alpha_t / sigma_t)
# A rectified flow is the case alpha = 1 - sigma, whose network predicts v = eps - x0.
# -----------------------------------------------------------------------------------------------------------


class NoiseSchedule:
    """Noise levels of a sampler with T steps: timesteps (T,), alpha (T + 1,), sigma (T + 1,).

    First-order SDE-DPM-Solver++ and DDIM with eta = 1 are the same transition on different grids. Every
    method takes a grid point i: an int, or one per sample as a LongTensor (M,). Tables: float64, CPU.
    `prediction` is "eps", or "v" for a rectified flow, whose timesteps are 1000 sigma, not rounded. With
    `ode` a step draws no noise, as Euler's of a flow and DDIM with eta = 0.
    """

    def __init__(self, timesteps: Tensor, alpha: Tensor, sigma: Tensor,
                 prediction: Literal["eps", "v"] = "eps", ode: bool = False):
        self.timesteps = timesteps.cpu() if prediction == "v" else timesteps.long().cpu()
        self.alpha, self.sigma = alpha.double().cpu(), sigma.double().cpu()
        self.prediction, self.ode = prediction, ode
        if not len(alpha) == len(sigma) == len(timesteps) + 1:
            raise ValueError(f"want T timesteps and T + 1 levels; got {len(timesteps)} and {len(alpha)}")

    def __len__(self) -> int:
        return len(self.timesteps)

    @classmethod
    def from_diffusers(cls, sampler: str, steps: int, flow_shift: float = 0.0, **betas) -> NoiseSchedule:
        """The grid of "dpm" (sde-dpmsolver++ of order 1, Nabla-R2D3's) or "ddim", with diffusers' numbers.

        Both end at the smallest noise level instead of at 0, so that the last step is a Gaussian too. With
        `flow_shift` they are a rectified flow's, and end at sigma = 0, as published: "dpm" starts just below
        sigma = 1, "ddim" walks the grid of diffusers' flow sampler, and so does "euler", without noise.
        """
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
        dpm = partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++", solver_order=1)
        if flow_shift:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=flow_shift) if sampler != "dpm" else dpm(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
            scheduler.set_timesteps(steps)
            sigma = scheduler.sigmas.double()
            return cls(1000 * sigma[:-1], 1 - sigma, sigma, prediction="v", ode=sampler == "euler")
        if sampler == "euler":
            raise UserError("--sampler euler is for a rectified flow; this base samples with dpm or ddim")
        if sampler == "dpm":
            scheduler = dpm(final_sigmas_type="sigma_min", **betas)
            scheduler.set_timesteps(steps)
            ratio = scheduler.sigmas.double()                                       # sigma / alpha, (T + 1,)
            alpha = (1 + ratio ** 2).rsqrt()
            return cls(scheduler.timesteps, alpha, ratio * alpha)
        scheduler = DDIMScheduler(set_alpha_to_one=False, timestep_spacing="trailing", **betas)
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps[:steps]                 # for some numbers diffusers adds one, -1
        squared = scheduler.alphas_cumprod.double()[timesteps.tolist() + [0]]
        return cls(timesteps, squared.sqrt(), (1 - squared).sqrt())

    def t(self, i: int | Tensor) -> Tensor:
        """What the network is told at grid point i; after the last step timestep 0, in a flow 1000 sigma."""
        if self.prediction == "v":
            return (1000 * self.sigma[i]).float()
        return torch.cat([self.timesteps, torch.zeros(1, dtype=torch.long)])[i]

    def x0(self, x: Tensor, prediction: Tensor, i: int | Tensor) -> Tensor:
        """Estimate of the clean latent from x at grid point i (E1)."""
        clean = x - per_sample(self.sigma[i], x) * prediction
        return clean if self.prediction == "v" else clean / per_sample(self.alpha[i], x)

    def step(self, i: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step i as x_s ~ N(c_x x_t + c_0 x0, std^2): c_x, c_0 (E2), std (E3)."""
        alpha_t, sigma_t = self.alpha[i], self.sigma[i]
        alpha_s, sigma_s = self.alpha[i + 1], self.sigma[i + 1]
        if self.ode:                                            # the noise in x_t is kept, none is drawn
            c_x = sigma_s / sigma_t
            return c_x, alpha_s - alpha_t * c_x, torch.zeros_like(c_x)
        decay = alpha_t * sigma_s / (alpha_s * sigma_t)         # e^-h; its logarithm may be infinite
        c_x = sigma_s / sigma_t * decay                                                             # (E2)
        c_0 = alpha_s * (1 - decay ** 2)                                                            # (E2)
        return c_x, c_0, sigma_s * (1 - decay ** 2).sqrt()                                          # (E3)

    def transition(self, x: Tensor, prediction: Tensor, i: int | Tensor) -> tuple[Tensor, Tensor]:
        """Mean (like x) and std (to broadcast against it) of x_s, given x_t and its prediction."""
        c_x, c_0, std = (per_sample(value, x) for value in self.step(i))
        return c_x * x + c_0 * self.x0(x, prediction, i), std                                       # (E2, E3)

    def k(self, i: int | Tensor) -> Tensor:
        """How the score of step i depends on the prediction: score = const - k prediction (E6)."""
        k_v = self.sigma[i] * self.alpha[i + 1] / self.sigma[i + 1] ** 2   # c_0 / std^2 = alpha_s / sigma_s^2
        return k_v if self.prediction == "v" else k_v / self.alpha[i]


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """A scalar, or one value per sample (M,), shaped to broadcast against x (M, ...)."""
    return value.to(x).reshape(-1, *[1] * (x.dim() - 1))


# -----------------------------------------------------------------------------------------------------------
# 6. Bases
# A base is a frozen 3D diffusion model. `Base` says what it must offer. `shapes` is DiffSplat with small
# weights. Needs: sections 3, 4 and 5, support's join_views and SH_C0; load_base also Config and support/,
# which reads the networks (diffusers' own, but for GaussianCube's); add_lora needs peft.
# -----------------------------------------------------------------------------------------------------------


class Cond(NamedTuple):
    """Encoded prompts; what a network does not take is None."""

    embeds: Tensor                  # (B, L, D)
    mask: Tensor | None             # (B, L) true where there is a word
    pooled: Tensor | None = None    # (B, D) one vector for the whole prompt

    def map(self, function: Callable, *others: Cond) -> Cond:                       # of every field there is
        return Cond(*(None if fields[0] is None else function(*fields) for fields in zip(self, *others)))

    def __getitem__(self, rows) -> Cond:                                            # cond[rows] picks objects
        return self.map(lambda field: field[rows])


class Base(Protocol):
    """What a 3D diffusion model must offer.

    A protocol with defaults, so subclass it: set net, lora_targets and latent_shape, override encode, predict
    and decode; the rest is inherited. The LoRA stays on `net`, so every training wants a fresh base.
    """

    net: nn.Module                      # the frozen denoiser: the module that the LoRA goes on
    lora_targets: list[str]             # the layers of it that get one, by the ends of their names
    latent_shape: tuple[int, ...]       # of one object
    guidance: float = 1.0               # default scale of classifier-free guidance
    device: torch.device = torch.device("cpu")
    betas: dict = {}                    # arguments of diffusers' schedulers that tell the noise schedule
    elevation: float = ELEVATION        # degrees, around which the reward's cameras are drawn
    radius: float = RADIUS              # their distance from the origin, about which objects are centred
    dilation: float = 0.0               # of its splats in pictures, see `render`
    eval_size: int = 128                # side in pixels of the pictures of an evaluation
    tower: nn.Module | None = None      # its own image-text network, where CLIP would not fit its pictures
    normals: nn.Module | None = None    # its own normal estimator, where Marigold would not fit them

    @abstractmethod
    def encode(self, prompts: list[str]) -> Cond:
        """Prompts as `predict` takes them, of one length; [""] is the unconditional half of guidance."""

    @abstractmethod
    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Noise in x (B, *latent_shape), like x; or v if `schedule` says so. Timesteps t (B,) on the CPU."""

    @abstractmethod
    def decode(self, x0: Tensor) -> Gaussians:
        """Clean latents (B, *latent_shape) as splats; differentiable."""

    def prepare(self, prompts: list[str]) -> None:
        """Called with all prompts of a run before it begins, to check them and to encode what is slow."""

    def schedule(self, sampler: str, steps: int) -> NoiseSchedule:
        """The noise levels that the sampler walks."""
        return NoiseSchedule.from_diffusers(sampler, steps, **self.betas)

    def cameras(self, num_objects: int) -> tuple[Tensor, Tensor]:
        """The views of an evaluation, all around the object: c2w (B, 4, 4, 4), fxfycxcy (B, 4, 4)."""
        c2w = orbit(self.elevation, torch.arange(0.0, 360.0, 90.0), self.radius)
        return c2w.expand(num_objects, 4, 4, 4), intrinsics(num_objects, 4)


class DiffSplat(Base):
    """DiffSplat: latents of splat grids in four views, denoised by an image network that sees all at once.

    `net` predicts from [latent, Pluecker rays] of the four input cameras; `vae` has 12 channels, one splat
    grid per view. `shapes` is this class with small weights. Follows chenguolin/DiffSplat.
    """

    views = 4

    def __init__(self, net: nn.Module, vae: nn.Module,
                 text: Callable[[list[str]], tuple[Tensor, Tensor | None]], *, image_size: int,
                 prediction_type: str, guidance: float, latent_mean: Tensor, latent_std: Tensor, betas: dict,
                 scale_range: tuple[float, float], depth_scale: float, half_image_shift: bool, eval_size: int,
                 lora_targets: list[str], device: torch.device | str):
        self.device = torch.device(device)
        self.net = net.to(self.device).eval().requires_grad_(False)
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        join_views(self.net, self.views)
        self.text, self.guidance, self.betas, self.image_size = text, guidance, betas, image_size
        self.prediction_type, self.scale_range, self.depth_scale = prediction_type, scale_range, depth_scale
        self.eval_size, self.lora_targets = eval_size, lora_targets
        channels = vae.config.latent_channels
        size = image_size // 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (self.views, channels, size, size)
        self.latent_mean = latent_mean.to(self.device).reshape(-1, 1, 1)  # per channel, or one for all
        self.latent_std = latent_std.to(self.device).reshape(-1, 1, 1)
        self.c2w, self.fxfycxcy = input_cameras(1, self.device)
        rays = plucker_rays(self.c2w, self.fxfycxcy, image_size, image_size, half_image_shift)[0]
        self.plucker = F.interpolate(rays, (size, size), mode="bilinear")           # (V, 6, h, w)
        if prediction_type == "v_prediction":
            from diffusers import DDIMScheduler
            self.alpha_by_t = DDIMScheduler(**betas).alphas_cumprod.sqrt().to(self.device)  # (1000,)

    def encode(self, prompts: list[str]) -> Cond:
        """Prompts as the network takes them."""
        return Cond(*self.text(prompts))

    def prepare(self, prompts: list[str]) -> None:
        """Check, and encode where that is slow, all prompts of a run before it begins."""
        getattr(self.text, "prepare", self.text)(prompts)

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Noise in x (B, V, C, h, w) at timesteps t (B,): eps like x, whatever the network predicts."""
        B, V, C = x.shape[:3]
        dtype = next(self.net.parameters()).dtype
        t = t.to(self.device)
        rows = torch.cat([x, self.plucker.expand(B, -1, -1, -1, -1)], 2).flatten(0, 1).to(dtype)
        embeds = cond.embeds.to(self.device, dtype).repeat_interleave(V, 0)  # ((b v), L, D)
        mask = None if cond.mask is None else cond.mask.to(self.device).repeat_interleave(V, 0)
        extra = {"resolution": None, "aspect_ratio": None}      # sizes, which neither network uses
        out = self.net(rows, encoder_hidden_states=embeds, timestep=t.repeat_interleave(V), return_dict=False,
                       encoder_attention_mask=mask, added_cond_kwargs=extra)[0]
        out = out[:, :C].unflatten(0, (B, V)).float()           # PixArt's second half is an unused variance
        if self.prediction_type != "v_prediction":
            return out
        alpha = per_sample(self.alpha_by_t[t], x)               # v = alpha eps - sigma x0
        return alpha * out + (1 - alpha ** 2).sqrt() * x

    def decode(self, x0: Tensor) -> Gaussians:
        """Clean latents (B, V, C, h, w) -> B V H W splats, differentiable."""
        def decode(z: Tensor) -> Tensor:
            return self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float().clamp(-1, 1)

        z = (x0 * self.latent_std + self.latent_mean).flatten(0, 1)
        if self.image_size > 64:        # in parts, whose activations are computed again for gradients
            from torch.utils.checkpoint import checkpoint
            views = self.views if z.is_cuda else 1
            grid = torch.cat([checkpoint(decode, part, use_reentrant=False) for part in z.split(views)])
        else:
            grid = decode(z)
        B = x0.shape[0]
        return splat_grid_to_gaussians(grid.unflatten(0, (B, -1)), self.c2w.expand(B, -1, -1, -1),
                                       self.fxfycxcy.expand(B, -1, -1), self.scale_range, self.depth_scale)


class GaussianCube(Base):
    """GaussianCube (arXiv 2403.19655): a grid of G^3 Gaussians, denoised by a 3D U-Net that predicts x0.

    Channels of a latent (14, G, G, G), standardised per voxel by `mean` and `std`: offset from the voxel's
    centre, colour (spherical harmonic of degree 0), opacity, scales, quaternion wxyz; z is up there.
    """

    lora_targets = ["qkv", "encoder_kv", "proj_out", "out.2"]   # all attention layers, and the output layer
    guidance, elevation, eval_size = 3.5, 30.0, 512             # its authors look from 30 degrees above
    betas = {"beta_schedule": "squaredcos_cap_v2"}
    size = RADIUS / 2                   # of the grid's cube in our world: its authors' cameras are 2 away
    # It was trained through a rasteriser that widens splats by 0.3 square pixels, with a focal length of 560
    # pixels; ours is FXFY sides: the same blur, in pictures of any size.
    dilation = 0.3 * (FXFY / 560) ** 2

    def __init__(self, net: nn.Module, text: Callable[[list[str]], tuple[Tensor, Tensor | None]],
                 mean: Tensor, std: Tensor, device: torch.device | str):
        self.device = torch.device(device)
        self.net = net.to(self.device).eval().requires_grad_(False)
        self.text, self.mean, self.std = text, mean.to(self.device), std.to(self.device)
        self.latent_shape, axis = tuple(mean.shape), torch.linspace(-0.5, 0.5, mean.shape[-1])
        self.grid = torch.cartesian_prod(axis, axis, axis).to(self.device)                  # (G^3, 3)
        from diffusers import DDIMScheduler
        squared = DDIMScheduler(**self.betas).alphas_cumprod.double()   # sigma of t = 0 would lose digits
        self.alpha_by_t, self.sigma_by_t = squared.sqrt(), (1 - squared).sqrt()             # (1000,)

    def encode(self, prompts: list[str]) -> Cond:
        """CLIP's words; the unconditional half is zeros, as in training, not the empty prompt's."""
        named = torch.tensor([float(prompt != "") for prompt in prompts], device=self.device)
        return Cond(named[:, None, None] * self.text(prompts)[0].float(), None)

    def prepare(self, prompts: list[str]) -> None:
        """Encode all prompts of a run before it begins."""
        self.text.prepare(prompts)

    def schedule(self, sampler: str, steps: int) -> NoiseSchedule:
        """dpm starts at log(alpha / sigma) = -5.1, as published: below it, x0 says next to nothing of eps."""
        cut = {"lambda_min_clipped": -5.1} if sampler == "dpm" else {}
        return NoiseSchedule.from_diffusers(sampler, steps, **self.betas, **cut)

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Noise in x (B, 14, G, G, G) at timesteps t (B,); the other half of the output is a variance."""
        x0 = self.net(x, t.to(self.device), cond.embeds.to(self.device))[:, :x.shape[1]]
        alpha, sigma = (per_sample(table[t.cpu()], x) for table in (self.alpha_by_t, self.sigma_by_t))
        return (x - alpha * x0) / sigma

    def decode(self, x0: Tensor) -> Gaussians:
        """Clean latents (B, 14, G, G, G) -> G^3 splats, y up, differentiable."""
        values = (x0 * self.std + self.mean).flatten(2).mT
        offset, color, opacity, scales, quats = values.split([3, 3, 1, 3, 4], -1)
        x, y, z = (self.size * (self.grid + offset)).unbind(-1)
        w, i, j, k = (0.5 ** 0.5 * F.normalize(quats, dim=-1)).unbind(-1)   # a quarter turn about x
        return Gaussians(torch.stack([x, z, -y], -1), self.size * scales.clamp(0, 1),
                         torch.stack([w + i, i - w, j + k, k - j], -1), opacity[..., 0].clamp(0, 1),
                         (SH_C0 * color + 0.5).clamp(min=0))


class DiffSplatSD3(DiffSplat):
    """DiffSplat on Stable Diffusion 3.5, a rectified flow: `predict` returns v = noise - x0.

    The stock network gets the views of an object as one tall picture: its joint attention then sees all of
    them and the text, once, as DiffSplat's own does. published.positions_by_view does the rest.
    """

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """v in x (B, V, C, h, w) at timesteps t (B,), which are 1000 sigma: like x."""
        dtype = next(self.net.parameters()).dtype
        rows = torch.cat([x, self.plucker.expand(len(x), -1, -1, -1, -1)], 2)
        tall = rows.transpose(1, 2).flatten(2, 3).to(dtype)     # (B, C + 6, V h, w)
        text = cond.map(lambda field: field.to(self.device, dtype))
        out = self.net(tall, text.embeds, text.pooled, t.to(self.device), return_dict=False)[0]
        return out.unflatten(2, (self.views, -1)).transpose(1, 2).float()


def load_base(config: Config, device: torch.device | str) -> Base:
    """The base that `config.base` names, frozen. Raises UserError for missing or damaged weights."""
    if config.base == "shapes":
        file = Path(config.weights or HERE / "support/shapes.safetensors")
        parts, tower, normals = shapes.load(file, device)
        base = DiffSplat(**parts, device=device)
        base.tower, base.normals = tower, normals
    elif config.base == "gaussiancube":
        base = GaussianCube(**gaussiancube.load(config.weights, device), device=device)
    else:
        parts = published.load(config.base, config.weights, device, config.precision)
        base = (DiffSplatSD3 if config.base == "diffsplat-sd35" else DiffSplat)(**parts, device=device)
    if config.checkpoint:
        base.net.enable_gradient_checkpointing()
    return base


def add_lora(net: nn.Module, targets: list[str], rank: int, seed: int) -> nn.Module:
    """The network with a LoRA of scale 1 on the layers whose names end in one of `targets`, made by peft."""
    from peft import LoraConfig, get_peft_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(net, LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                              target_modules=targets))


# -----------------------------------------------------------------------------------------------------------
# 7. Rewards
# A reward is a function of pictures and prompts: reward(render, prompts) -> value (B, V), differentiable with
# respect to the render. Its gradient is all that the method sees of it.
# Needs: section 3 and kernels.Render; load_reward also Base and support/, where the published scorers are.
# -----------------------------------------------------------------------------------------------------------

Reward = Callable[[Render, list[str]], Tensor]


def colorfulness(render: Render, prompts: list[str]) -> Tensor:
    """How colourful the object is: Hasler and Suesstrunk (2003), sigma_rgyb + 0.3 mu_rgyb, colours in [0, 1].

    Taken over the object (weights: alpha, detached), not the picture: else an object could gain by growing.
    """
    weight = render.alpha[:, :, 0].detach()  # (B, V, H, W)
    weight = weight / weight.sum((-2, -1), keepdim=True).clamp(min=1e-6)
    r, g, b = render.image.unbind(2)
    opponents = torch.stack([r - g, (r + g) / 2 - b], 2)  # (B, V, 2, H, W)
    mean = (weight[:, :, None] * opponents).sum((-2, -1))                                         # (B, V, 2)
    variance = (weight[:, :, None] * (opponents - mean[..., None, None]) ** 2).sum((-2, -1))
    return (variance.sum(-1) + 1e-8).sqrt() + 0.3 * (mean.square().sum(-1) + 1e-8).sqrt()  # sqrt'(0) = inf


def depth_to_normals(depth: Tensor) -> Tensor:
    """Normals of the surface of a z-depth map (..., 1, H, W): (..., 3, H, W), camera space, towards us.

    Central differences of the unprojected pixel centres; zero on the border, where there is no neighbour.
    """
    H, W = depth.shape[-2:]
    v = (torch.arange(H, device=depth.device) + 0.5 - H / 2) / (FXFY * H)
    u = (torch.arange(W, device=depth.device) + 0.5 - W / 2) / (FXFY * W)
    points = torch.cat([depth * u, depth * v[:, None], depth], -3)
    down = points[..., 2:, 1:-1] - points[..., :-2, 1:-1]
    right = points[..., 1:-1, 2:] - points[..., 1:-1, :-2]
    return F.pad(F.normalize(torch.cross(down, right, dim=-3), dim=-3), (1, 1, 1, 1))


def mean_cosine(a: Tensor, b: Tensor, mask: Tensor, angle_mask: bool) -> Tensor:
    """Mean cosine of unit normals (B, V, 3, H, W) where `mask` (B, V, H, W) is true: (B, V), 0 if nowhere.

    `angle_mask` leaves out where b is 60 degrees or more from the line of sight (Nabla-R2D3's option).
    """
    if angle_mask:
        camera = torch.eye(4).to(b)[None, None], intrinsics(1, 1).to(b)
        sight = plucker_rays(*camera, *b.shape[-2:])[:, :, 3:]
        mask = mask & ((b * sight).sum(2).abs() > 0.5)
    return ((a * b).sum(2) * mask).sum((-2, -1)) / mask.sum((-2, -1)).clamp(min=1)


def depth_normal_consistency(render: Render, prompts: list[str], angle_mask: bool = False) -> Tensor:
    """Mean cosine between rendered normals and the normals of the rendered depth (detached, as published).

    Over pixels that are on the object (alpha > 0.5) with all their four neighbours; 0 where there is none.
    """
    inside = (render.alpha > 0.5).float()
    cross = inside.new_tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]])[None, None]
    mask = (F.conv2d(inside.flatten(0, 1), cross, padding=1) > 4.5).unflatten(0, inside.shape[:2])[:, :, 0]
    return mean_cosine(depth_to_normals(render.depth.detach()), render.normal, mask, angle_mask)


def tower_agreement(tower: shapes.ImageTextTower) -> Reward:
    """Embedded stand-in for HPSv2: the cosine of picture and prompt in the base's own image-text tower."""
    def reward(render: Render, prompts: list[str]) -> Tensor:
        pictures = tower.image(render.image.flatten(0, 1)).unflatten(0, render.image.shape[:2])  # (B, V, D)
        return (pictures * tower.text(prompts)[:, None]).sum(-1)
    return reward


def normal_agreement(estimator: nn.Module, gradient: bool = False, angle_mask: bool = False) -> Reward:
    """Mean cosine between rendered normals and those an estimator sees in the picture.

    The estimate is detached, as in the paper's setting; with `gradient` the picture learns from it too.
    """
    def reward(render: Render, prompts: list[str]) -> Tensor:
        with contextlib.nullcontext() if gradient else torch.no_grad():
            estimate = estimator(render.image.flatten(0, 1)).unflatten(0, render.image.shape[:2])
        return mean_cosine(render.normal, estimate, (render.alpha > 0.5)[:, :, 0], angle_mask)
    return reward


def load_reward(spec: str, base: Base, device: torch.device | str, checkpoint: bool = False,
                untrained: bool = False) -> Reward:
    """The reward that `spec` describes: "aesthetic", "aesthetic=1,dnc=0.3", "my_file.py:my_function".

    `checkpoint` saves memory in published scorers, `untrained` gives them random weights. The function's
    `.title` says what measures it. Raises UserError for what cannot be loaded.
    """
    terms = [(float(weight or 1), *load_reward_term(name, base, device, checkpoint, untrained))
             for name, weight in inputs.reward_terms(spec)]

    def reward(render: Render, prompts: list[str]) -> Tensor:
        return sum(weight * inputs.call_reward(function, title, render, prompts)
                   for weight, function, title in terms)

    reward.functions = {title: function for _, function, title in terms}
    reward.title = " + ".join(title if weight == 1 else f"{weight:g} x {title}" for weight, _, title in terms)
    return reward


def load_reward_term(name: str, base: Base, device: torch.device | str, checkpoint: bool,
                     untrained: bool) -> tuple[Reward, str]:
    """One reward by name, by its scorer's name or by file.py:function, and a title: what measures it. A base
    with small networks of its own has them for aesthetic, hpsv2 and normal, others the published scorers.
    """
    if ".py:" in name:
        return inputs.load_function(name), name
    named = {"colorfulness": (colorfulness, "colourfulness"),
             "dnc": (depth_normal_consistency, "depth-normal consistency")}
    if base.tower is not None:
        named |= {"aesthetic": (colorfulness, "embedded scorer: colourfulness"),
                  "hpsv2": (tower_agreement(base.tower), "embedded scorer: image-text tower"),
                  "normal": (normal_agreement(base.normals), "embedded scorer: normal estimator")}
    if name in named:
        return named[name][0], f"{name} ({named[name][1]})"
    scorer, title = scorers.load(name, device, checkpoint, untrained)
    reward = normal_agreement(scorer) if isinstance(scorer, scorers.MarigoldNormals) else scorer
    return reward, f"{name} ({title})"


# -----------------------------------------------------------------------------------------------------------
# 8. Rollout
# Needs: sections 5 and 6.
# -----------------------------------------------------------------------------------------------------------


class Trajectory(NamedTuple):
    """What sampling leaves for the loss."""

    x: Tensor           # (B, T + 1, *latent)
    eps: Tensor         # (B, T, *latent) the guided prediction, which the sampler used
    eps_text: Tensor    # (B, T, *latent) its conditional half


def predict_both(base: Base, x: Tensor, t: Tensor, cond: Cond, null: Cond,
                 guidance: float) -> tuple[Tensor | None, Tensor]:
    """The unconditional and the conditional prediction, in one batch; the first is None if guidance is 1."""
    if guidance == 1:
        return None, base.predict(x, t, cond)
    both = cond.map(lambda text, nothing: torch.cat([nothing.expand_as(text), text]), null)
    return base.predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)


def guide(eps_uncond: Tensor | None, eps_text: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance."""
    return eps_text if eps_uncond is None else eps_uncond + guidance * (eps_text - eps_uncond)


def predict_guided(base: Base, x: Tensor, t: Tensor, cond: Cond, null: Cond, guidance: float) -> Tensor:
    """The prediction that the sampler uses."""
    return guide(*predict_both(base, x, t, cond, null, guidance), guidance)


def seeded(*numbers: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on all of the arguments.

    Random numbers belong to an object here, not to a batch: an object is the same whatever is sampled with
    it, and sizes of batches and numbers of processes change memory and speed, not results beyond rounding.
    """
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))     # 56 bits: a seed has 63


def noise_like(x: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Standard normal noise of the shape of x (B, ...), on its device; row b comes from generators[b]."""
    return torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in generators]).to(x)


@torch.no_grad()
def rollout(base: Base, schedule: NoiseSchedule, cond: Cond, null: Cond, guidance: float,
            generators: list[torch.Generator], progress: Callable = iter, keep: bool = True
            ) -> Trajectory | Tensor:
    """Sample one object per row of `cond`, with a CPU generator each. `progress` wraps the range of steps.

    Returns all that the loss needs, or without `keep`, for a fraction of the memory, the samples alone.
    """
    start = torch.empty(len(generators), *base.latent_shape, device=base.device)
    x, steps = noise_like(start, generators), []
    for i in progress(range(len(schedule))):
        eps_uncond, eps_text = predict_both(base, x, schedule.t(i).expand(len(x)), cond, null, guidance)
        eps = guide(eps_uncond, eps_text, guidance)
        if keep:
            steps.append((x, eps, eps_text))
        mean, std = schedule.transition(x, eps, i)
        x = mean + std * noise_like(x, generators)
    if not keep:
        return x
    xs, guided, texts = zip(*steps)
    return Trajectory(*(torch.stack(each, 1) for each in ((*xs, x), guided, texts)))


def pick_transitions(steps: int, fraction: float, last_step: str, generator: torch.Generator) -> list[int]:
    """The steps of one trajectory to train: the last one as `last_step` says, the rest stratified over time.

    The rest is drawn without replacement, in turn from four equal quarters of the remaining steps, starting
    at a random quarter, so that every noise level is trained about equally often for any number of steps.
    """
    count = max(1, int(steps * fraction + 1e-9))        # 100 * 0.29 is 28.999...
    always = [steps - 1] if last_step == "always" else []
    end = steps if last_step == "stratified" else steps - 1
    quarters = [part[torch.randperm(len(part), generator=generator)].tolist()
                for part in torch.arange(end).tensor_split(4)]
    first = int(torch.randint(4, (), generator=generator))
    in_turn = quarters[first:] + quarters[:first]
    rest = [quarter[n] for n in range(steps) for quarter in in_turn if n < len(quarter)]
    return always + rest[:count - len(always)]


# -----------------------------------------------------------------------------------------------------------
# 9. The loss
# Residual nabla-DB: GFlowNets' detailed balance, on gradients of log-probabilities; only its forward term, as
# in the paper (Nabla-R2D3, arXiv 2506.15684; nabla-GFlowNet, arXiv 2412.07775).
#     code        symbol                                      code          symbol
#     eps_*       eps_theta, the network with its LoRA        g             reward gradient at x_s (E7 or E8)
#     ref_*       eps_ref, the LoRA switched off              k, weight     E6's k, and beta w(s)
#     eps_old     what the rollout predicted at x_t           c, pull       both times c / k (match_weights)
# Both scores in E4 are -(x_s - mean) / std^2, so x_s and x_t cancel from their difference (E6).
# Needs: up to nabla_loss section 5 and kernels.gradient_matching, for the closures `predict` and `value` hide
# base and reward. From make_judge on sections 2 to 8, and from support.processes `frozen` (no gradients of weights)
# and `phase` (times what is inside it).
# -----------------------------------------------------------------------------------------------------------


def reward_gradient(predict: Callable[[Tensor, Tensor], Tensor], value: Callable[[Tensor], Tensor],
                    schedule: NoiseSchedule, x_s: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """g (M, *latent), the gradient of value(x0(x_s)) with respect to x_s, and those values (M,), detached.

    x_s (M, *latent) lies at grid points s = i + 1 (M,), on the CPU. predict(x, t) is the sampler's prediction
    with the current weights: g is taken through it. value(x0) (M,) is the reward (E7), or < x0, u > (E8).
    """
    x_s = x_s.detach().requires_grad_()
    values = value(schedule.x0(x_s, predict(x_s, schedule.t(s)), s))                            # (E1) at s
    g, = torch.autograd.grad(values.sum(), x_s)                                                 # (E7, E8)
    return g, values.detach()


def match_weights(schedule: NoiseSchedule, i: Tensor, *, beta: float, matching: str,
                  time_weight: str) -> tuple[Tensor, Tensor]:
    """k and the weight beta w(s) of the residual (E6) at steps i (M,), on the CPU; both (M,), times c / k.

    The factor changes how much a noise level counts in the loss, not where the residual is zero. `matching`
    names c: "score" is E4 as published (c = k), "kl" the Kullback-Leibler divergence of the two steps
    (c = k std), "eps" and "v" compare the predictions, where a change of v is one of eps divided by alpha_t.
    """
    k, alpha_t, alpha_s = schedule.k(i), schedule.alpha[i], schedule.alpha[i + 1]
    weight = beta * alpha_s ** {"squared": 2, "linear": 1, "none": 0}[time_weight]
    own = torch.ones_like(k)
    in_eps, in_v = (own, 1 / alpha_t) if schedule.prediction == "eps" else (alpha_t, own)
    c = {"score": k, "kl": k * schedule.step(i)[2], "eps": in_eps, "v": in_v}[matching]
    return c, c * weight / k


def nabla_loss(predict: Callable, predict_ref: Callable, schedule: NoiseSchedule, x_t: Tensor, i: Tensor,
               eps_old: Tensor, g: Tensor, *, beta: float, matching: str = "score",
               time_weight: str = "squared", guidance: float = 1.0,
               backend: str | None = None) -> tuple[Tensor, Tensor]:
    """match (E4) and reg (E5, without lambda), both (M,), differentiable in the weights behind `predict`.

    predict(x, t) returns the two halves of classifier-free guidance (the first None where guidance is 1) with
    the LoRA, predict_ref the same without it. x_t, g and eps_old, the rollout's of the same branch, are
    (M, *latent), i (M,) step numbers on the CPU.
    """
    t = schedule.t(i)
    with torch.no_grad():
        ref_uncond, ref_text = predict_ref(x_t, t)
    eps_uncond, eps_text = predict(x_t, t)
    c, pull = match_weights(schedule, i, beta=beta, matching=matching, time_weight=time_weight)
    return gradient_matching(eps_uncond, eps_text, ref_uncond, ref_text, eps_old, g, guidance,
                             c.to(g), pull.to(g), backend=backend)


# The same with a base and a reward in place of the closures, as the training below uses it.

IMAGE_NOISE = 2e-3      # standard deviation of noise on the reward's pictures (Nabla-R2D3's released code)
Judge = Callable[[Tensor, list[str], list[torch.Generator]], tuple[Tensor, Render]]


def make_judge(base: Base, reward: Reward, *, views: int, view_size: int, elevation_jitter: float,
               azimuth_jitter: float, backend: str | None = None) -> Judge:
    """judge(x0, prompts, generators): rewards (M,) of clean latents and the pictures that were judged.

    The reward of an object is the mean over its views, from cameras that are drawn anew at every call.
    """
    def judge(x0: Tensor, prompts: list[str], generators: list[torch.Generator]) -> tuple[Tensor, Render]:
        cameras = sample_cameras(views, elevation_jitter, azimuth_jitter, generators, base.elevation,
                                 base.radius)
        pictures = render(base.decode(x0), *cameras, view_size, backend, base.dilation)
        image = (pictures.image + IMAGE_NOISE * noise_like(pictures.image, generators)).clamp(0, 1)
        pictures = pictures._replace(image=image)
        return reward(pictures, prompts).mean(1), pictures
    return judge


class Transitions(NamedTuple):
    """A micro-batch of M sampler steps, objects and times mixed."""

    i: Tensor                   # (M,) step numbers, on the CPU: step i goes from grid point i to i + 1
    x_t: Tensor                 # (M, *latent) at grid point i
    x_s: Tensor                 # (M, *latent) at grid point i + 1
    eps_old: Tensor             # (M, *latent) see Sampled
    cond: Cond                  # M prompts, encoded
    prompts: list[str]          # M prompts
    generators: list[torch.Generator]   # M, for whatever is random in a transition's loss
    u: Tensor | None            # (M, *latent) the reward's gradient at the trajectory's end (E8)
    advantage: Tensor | None    # (M,) of the whole trajectory, for DDPO

    def at(self, rows: Tensor) -> Transitions:
        """The transitions where the mask `rows` (M,) is true."""
        def pick(value):
            if isinstance(value, list):
                return [item for item, keep in zip(value, rows.tolist()) if keep]
            return None if value is None else value[rows]
        return Transitions(*map(pick, self))


class Job(NamedTuple):
    """What stays the same during a training."""

    base: Base
    judge: Judge
    schedule: NoiseSchedule
    null: Cond          # the encoded empty prompt
    config: Config
    rank: int = 0       # this process's number
    world: int = 1      # number of processes


def nabla_step(job: Job, batch: Transitions) -> tuple[dict[str, Tensor], int]:
    """Nabla-R2D3's loss and what is logged, (M,) each, and how many objects the reward was asked about."""
    base, schedule, config = job.base, job.schedule, job.config
    weights = {"beta": config.beta, "time_weight": config.time_weight}

    # 1. The reward gradient g, a constant of the loss. It moves the target by beta w / k times g; noise
    # levels where that factor is small next to the largest do without (skip_below).
    own, levels = schedule.prediction, torch.arange(len(schedule))
    factor = match_weights(schedule, levels, matching=own, **weights)[1]                              # (T,)
    asked = (factor >= config.skip_below * factor.max())[batch.i]                                     # (M,)
    g, reward, some = torch.zeros_like(batch.x_s), torch.zeros(len(batch.i)), batch.at(asked)
    if config.estimator == "identity":
        g[asked] = some.u
    elif asked.any():
        def predict(x: Tensor, t: Tensor) -> Tensor:
            return predict_guided(base, x, t, some.cond, job.null, config.guidance)

        def value(x0: Tensor) -> Tensor:
            if config.estimator == "step":
                return job.judge(x0, some.prompts, some.generators)[0]                                # (E7)
            return (x0 * some.u).flatten(1).sum(1)                                                    # (E8)

        with phase("reward gradient"), frozen(base.net):
            g[asked], values = reward_gradient(predict, value, schedule, some.x_s, some.i + 1)
        reward[asked] = values.to(reward)

    # 2. The loss. The reference is the same network with its LoRA switched off.
    guidance = config.guidance if config.branch == "guided" else 1.0
    halves = partial(predict_both, base, cond=batch.cond, null=job.null, guidance=guidance)

    def reference(x: Tensor, t: Tensor) -> tuple[Tensor | None, Tensor]:
        with base.net.disable_adapter():
            return halves(x, t)

    with phase("matching"):
        match, reg = nabla_loss(halves, reference, schedule, batch.x_t, batch.i, batch.eps_old, g,
                                guidance=guidance, matching=config.matching, backend=config.backend,
                                **weights)
    logged = {"reward_gradient": g.square().flatten(1).mean(1).sqrt(), "reward": reward,
              "loss": match + config.reg_weight * reg, "match": match, "reg": reg}
    return logged, int(asked.sum()) if config.estimator == "step" else 0


# -----------------------------------------------------------------------------------------------------------
# 10. The baselines
# What the paper compares with, on the same base, rewards, views, LoRA and data. Like nabla_step they return
# a dict with the loss per transition (M,), and how many objects the reward was asked about; but they climb
# the reward alone: nothing in them holds on to the prior. Needs: sections 5 to 9.
# -----------------------------------------------------------------------------------------------------------


def refl_step(job: Job, batch: Transitions) -> tuple[dict[str, Tensor], int]:
    """ReFL (ImageReward, arXiv 2304.05977): minus the reward of the one-step estimate at a late step."""
    t = job.schedule.t(batch.i)
    eps = predict_guided(job.base, batch.x_t, t, batch.cond, job.null, job.config.guidance)
    reward, _ = job.judge(job.schedule.x0(batch.x_t, eps, batch.i), batch.prompts, batch.generators)
    return {"loss": -reward}, len(reward)


def draft_step(job: Job, batch: Transitions) -> tuple[dict[str, Tensor], int]:
    """DRaFT-K (arXiv 2309.17400): minus the reward of the sample, through the last K steps of the sampler.

    The steps start at grid point T - K of the rollout and draw new noise. DRaFT-LV (K = 0) takes the last
    step alone, from the rollout's sample noised anew, several times per object: less variance.
    """
    schedule, x, first = job.schedule, batch.x_t, len(job.schedule) - max(1, job.config.draft_steps)
    if job.config.draft_steps == 0:
        x = schedule.alpha[first] * batch.x_s + schedule.sigma[first] * noise_like(x, batch.generators)
    for i in range(first, len(schedule)):
        t = schedule.t(i).expand(len(x))
        eps = predict_guided(job.base, x, t, batch.cond, job.null, job.config.guidance)
        mean, std = schedule.transition(x, eps, i)
        x = mean + std * noise_like(x, batch.generators)
    reward, _ = job.judge(x, batch.prompts, batch.generators)
    return {"loss": -reward}, len(reward)


def log_prob(schedule: NoiseSchedule, batch: Transitions, eps: Tensor) -> Tensor:
    """log N(x_s; mean, std^2), the mean over the latent's elements (as Nabla-R2D3's code has it): (M,)."""
    mean, std = schedule.transition(batch.x_t, eps, batch.i)
    density = -((batch.x_s - mean) / std) ** 2 / 2 - std.log() - math.log(2 * math.pi) / 2
    return density.flatten(1).mean(1)


def ddpo_step(job: Job, batch: Transitions) -> tuple[dict[str, Tensor], int]:
    """DDPO (arXiv 2305.13301): PPO's clipped policy gradient; the policy is the sampler's Gaussian step."""
    t = job.schedule.t(batch.i)
    eps = predict_guided(job.base, batch.x_t, t, batch.cond, job.null, job.config.guidance)
    ratio = (log_prob(job.schedule, batch, eps) - log_prob(job.schedule, batch, batch.eps_old)).exp()
    clip = DDPO_CLIP.get(job.config.base, 1e-4)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return {"loss": -torch.minimum(batch.advantage * ratio, batch.advantage * clipped)}, 0


def advantages(rewards: list[float], prompts: list[str], history: dict[str, list[float]]) -> Tensor:
    """DDPO's: (reward - mean) / std, over its prompt's last 32 rewards, or this epoch's while the prompt
    has fewer than 8. Returns (B,). `history`, the rewards by prompt, is brought up to date.
    """
    for prompt, reward in zip(prompts, rewards):
        history[prompt] = [*history.get(prompt, []), reward][-32:]
    peers = [history[prompt] if len(history[prompt]) >= 8 else rewards for prompt in prompts]
    mean = torch.tensor([math.fsum(peer) / len(peer) for peer in peers])
    std = torch.tensor([torch.tensor(peer).std(correction=0) for peer in peers])
    return (torch.tensor(rewards) - mean) / (std + 1e-6)


DRAFT_LV_NOISES = 2     # copies of a sample that DRaFT-LV noises anew (arXiv 2309.17400)


def pick_steps(config: Config, generator: torch.Generator) -> list[int]:
    """The steps of one trajectory that the configured method trains."""
    if config.method == "refl":                                             # one of the last quarter
        quarter = math.ceil(config.steps / 4)
        return [config.steps - 1 - int(torch.randint(quarter, (), generator=generator))]
    if config.method == "draft":
        if config.draft_steps == 0:
            return [config.steps - 1] * DRAFT_LV_NOISES
        return [config.steps - config.draft_steps]
    return pick_transitions(config.steps, config.fraction, config.last_step, generator)


METHODS = {"nabla": nabla_step, "refl": refl_step, "draft": draft_step, "ddpo": ddpo_step}


# -----------------------------------------------------------------------------------------------------------
# 11. Train
# One loop for all methods. Every epoch draws its randomness from (seed, epoch, object), so that a resumed
# run continues bit for bit without stored random states. Needs: everything above; files are written by
# support/run.py.
# -----------------------------------------------------------------------------------------------------------


class Sampled(NamedTuple):
    """The trajectories that this process sampled for an epoch, and what the updates need beside them."""

    prompts: list[str]
    cond: Cond
    trajectory: Trajectory
    eps_old: Tensor             # (B, T, *latent) the rollout's prediction, of the branch that is trained (E5)
    u: Tensor | None            # (B, *latent) see Transitions
    advantage: Tensor | None    # (B,)

    def transitions(self, b: Tensor, i: Tensor, generators: list[torch.Generator]) -> Transitions:
        """Steps i (M,) of objects b (M,)."""
        x = self.trajectory.x
        return Transitions(i, x[b, i], x[b, i + 1], self.eps_old[b, i], self.cond[b],
                           [self.prompts[n] for n in b], generators, None if self.u is None else self.u[b],
                           None if self.advantage is None else self.advantage[b])


def judge_samples(job: Job, x0: Tensor, prompts: list[str], generators: list[torch.Generator],
                  gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards (B,) of clean latents, alpha coverage (B,), and with `gradient` u (B, *latent) (E8)."""
    parts = []
    for rows in torch.arange(len(x0)).split(job.config.micro_batch):
        part = x0[rows].requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            reward, pictures = job.judge(part, [prompts[n] for n in rows], [generators[n] for n in rows])
        u = inputs.gradient(job.config.reward, reward, part) if gradient else torch.zeros_like(part)
        parts.append((reward.detach(), pictures.alpha.detach().mean((1, 2, 3, 4)), u))
    reward, coverage, u = (torch.cat(each) for each in zip(*parts))
    inputs.check_finite(job.config.reward, reward, u)
    return reward, coverage, u


def sample_epoch(job: Job, prompts: list[str], epoch: int,
                 history: dict[str, list[float]]) -> tuple[Sampled, dict]:
    """Draw prompts, sample and judge an object for each; what the updates need, and what is logged.

    An epoch's objects are numbered across processes, which share one order of the prompts. `history` holds
    the rewards by prompt that DDPO normalises with. "judged" counts the objects whose reward training needs.
    """
    config, B, shuffle = job.config, job.config.batch_size, seeded(job.config.seed, epoch, "prompts")
    mine = range(job.rank * B, (job.rank + 1) * B)
    order = torch.cat([torch.randperm(len(prompts), generator=shuffle)
                       for _ in range(0, job.world * B, len(prompts))])
    chosen = [prompts[n] for n in order[mine.start:mine.stop]]
    cond, generators = job.base.encode(chosen), [seeded(config.seed, epoch, n, "object") for n in mine]
    with phase("rollout"):
        trajectory = rollout(job.base, job.schedule, cond, job.null, config.guidance, generators)
    once = config.method == "nabla" and config.estimator != "step"      # then the reward is asked only here
    with phase("reward gradient" if once else "rollout"):
        reward, coverage, u = judge_samples(job, trajectory.x[:, -1], chosen, generators, gradient=once)
    advantage = None
    if config.method == "ddpo":
        everyone = processes.gather((reward.tolist(), chosen), job.world)
        rewards, asked = ([item for part in parts for item in part] for parts in zip(*everyone))
        advantage = advantages(rewards, asked, history)[mine.start:mine.stop].to(reward)
    guided = config.method == "ddpo" or config.branch == "guided"
    sampled = Sampled(chosen, cond, trajectory, trajectory.eps if guided else trajectory.eps_text,
                      u if once else None, advantage)
    judged = job.world * B if once or config.method == "ddpo" else 0
    return sampled, {"reward": processes.mean(reward, job.world), "coverage": processes.mean(coverage, job.world),
                     "judged": judged}


def train_epoch(job: Job, prompts: list[str], optimizer: torch.optim.Optimizer, epoch: int,
                history: dict[str, list[float]]) -> Iterator[dict]:
    """Sample, then descend. Yields one log row per update."""
    config, weights, B = job.config, optimizer.param_groups[0]["params"], job.config.batch_size
    sampled, logged = sample_epoch(job, prompts, epoch, history)

    # Every process knows all pairs of object n and step i; `copy` numbers repeats of a step (DRaFT-LV).
    pairs = torch.tensor([(n, i, copy) for n in range(job.world * B) for copy, i in enumerate(
        pick_steps(config, seeded(config.seed, epoch, n, "steps")))])
    pairs = pairs[torch.randperm(len(pairs), generator=seeded(config.seed, epoch, "pairs"))]
    for number, share in enumerate(pairs.tensor_split(min(config.updates_per_epoch, len(pairs)))):
        totals, mine = {}, share[share[:, 0] // B == job.rank]
        for part in mine.split(config.micro_batch):
            generators = [seeded(config.seed, epoch, *pair) for pair in part.tolist()]
            values, judged = METHODS[config.method](
                job, sampled.transitions(part[:, 0] - job.rank * B, part[:, 1], generators))
            totals["judged"] = totals.get("judged", 0) + judged
            for name, value in values.items():
                if not value.isfinite().all():
                    where = part[~value.isfinite().cpu(), 1][0]
                    folders.stop_diverged(f"{name} at sampler step {where}", epoch, number, config)
                totals[name] = totals.get(name, 0) + value.detach().sum().item() / len(share)
            with phase("backward"):
                (values["loss"].sum() / len(share)).backward()
        totals = processes.add_up(weights, totals, job.world)
        norm = nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
        optimizer.step()
        if not all(weight.isfinite().all() for weight in weights):
            folders.stop_diverged("LoRA weights after the step", epoch, number, config)
        optimizer.zero_grad()
        logged["judged"] += totals.pop("judged")
        yield {"epoch": epoch, **totals, **logged, "grad_norm": norm.item()}    # "reward" is the samples'
        logged["judged"] = 0


def start_job(config: Config, base: Base | None, rank: int, world: int,
              prompts: list[str]) -> tuple[Job, Reward]:
    """Load base and reward, encode the prompts, and find out now whether the reward can be trained."""
    base = base or load_base(config, config.device)
    schedule = base.schedule(config.sampler, config.steps)
    cli.check_steps(config, schedule, pick_steps(config, seeded(0)))
    reward = load_reward(config.reward, base, config.device, config.checkpoint, config.weights == "random")
    inputs.prepare(base, reward, prompts, config.prompts, config.test_prompts)
    config = dataclasses.replace(config, guidance=config.guidance or base.guidance)
    judge = make_judge(base, reward, views=config.views, view_size=config.view_size, backend=config.backend,
                       elevation_jitter=config.elevation_jitter, azimuth_jitter=config.azimuth_jitter)
    job = Job(base, judge, schedule, base.encode([""]), config, rank, world)
    trial = noise_like(torch.empty(1, *base.latent_shape, device=base.device), [seeded("trial")])
    judge_samples(job, trial, prompts[:1], [seeded("trial")], gradient=config.method != "ddpo")
    return job, reward


def start_lora(job: Job) -> torch.optim.Optimizer:
    """Put a new LoRA on the base, and an optimiser on the LoRA."""
    job.base.net = add_lora(job.base.net, job.base.lora_targets, job.config.lora_rank, job.config.seed)
    weights = [weight for weight in job.base.net.parameters() if weight.requires_grad]
    return torch.optim.AdamW(weights, lr=job.config.lr, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY)


@folders.unlocking()
def train(config: Config, base: Base | None = None) -> dict:
    """Fine-tune, measure before and after, and leave everything in the output folder. Returns the summary.
    `base` is one of the caller's own, in place of the one that `config` names.
    """
    from tqdm import tqdm
    started = time.perf_counter()
    if base is not None:
        config = dataclasses.replace(config, base=type(base).__name__)
    config = resolve(config)
    device, rank, world = processes.start_processes(config.device)
    config = dataclasses.replace(config, device=device)
    prompts, test_prompts = load_prompts(config.prompts), load_prompts(config.test_prompts)
    digest = hashlib.sha256(repr((prompts, test_prompts, world)).encode()).hexdigest()
    settings = dataclasses.asdict(config)
    settings, state = folders.open_run(settings, Config, digest, folders.FREE_ON_RESUME, rank, world)
    config, out, quiet = Config(**settings), Path(config.out), rank > 0
    test_prompts = test_prompts[:config.eval_prompts]
    job, reward = start_job(config, base, rank, world, [*prompts, *test_prompts])
    base, config = job.base, job.config
    identity = folders.check_identity(base, config.reward, out, state, world)
    features = metrics.load_features(base.tower, config.device)
    if not quiet:
        about = report.describe(dataclasses.asdict(config), reward.title) | {"identity": identity}
        print(report.plan(about, world, len(pick_steps(config, seeded(0))), len(prompts), len(test_prompts),
                          state and state["epoch"]))
        folders.begin(out, HERE, about, state)
    prompts = filter_prompts(job, prompts, identity)
    if isinstance(config.beta, str) and config.method == "nabla":        # see metrics.beta_of
        few = prompts[::max(1, len(prompts) // 12)][:12], dataclasses.replace(config, samples_per_prompt=8)
        sampled = measure(base, reward, features, job.schedule, *few, config.seed, "spread", rank, world)
        beta = metrics.beta_of(config.beta, sampled, quiet)
        job = job._replace(config=dataclasses.replace(config, beta=beta))

    common = base, reward, features, job.schedule, test_prompts, config

    def measure_base(name: str, seed: int) -> Measurement:              # made once, read again on resume
        path = out / f"checkpoint/{name}.pt"
        kept = metrics.load_measurement(path, len(test_prompts), config.samples_per_prompt) if state else None
        measured = processes.gather(kept, world)[0] or measure(*common, seed, name, rank, world)
        if not (quiet or kept):
            write_atomic(path, to_bytes(partial(torch.save, measured._asdict())))
        return measured

    before = measure_base("before", config.seed)
    other = measure_base("before, other seeds", config.seed + 1)        # a second draw: FID's noise floor
    optimizer, rows, history = start_lora(job), [], {}
    if state:
        folders.restore(base.net, optimizer, state, out)
        rows, history = state["rows"], state["history"]
    with tqdm(total=config.epochs * config.updates_per_epoch, initial=len(rows), desc="fine-tuning",
              disable=quiet) as updates:
        for epoch in range(state["epoch"] if state else 0, config.epochs):
            begun = time.perf_counter()
            for row in train_epoch(job, prompts, optimizer, epoch, history):
                row["judged"] += rows[-1]["judged"] if rows else 0
                rows.append({"update": len(rows) + 1, **row, "seconds": time.perf_counter() - begun})
                begun = time.perf_counter()
                updates.update()
                updates.set_postfix(reward=f"{row['reward']:.3f}", coverage=f"{row['coverage']:.3f}")
            if not quiet:
                folders.save_checkpoint(out, base.net, optimizer, rows, epoch + 1, digest, history, identity)
    after = measure(*common, config.seed, "after", rank, world)
    if quiet:
        return {}
    summary = {"scorer": reward.title, "base": config.base, "method": config.method, "epochs": config.epochs,
               "updates": len(rows), "judged": rows[-1]["judged"], "beta": job.config.beta,
               "features": features.title,
               **metrics.compare(before, after, other), "seconds": time.perf_counter() - started}
    write_report(base, test_prompts, before, after, rows, summary, config, out)
    metrics.print_summary(summary)
    print(f"open {out / 'report.html'}, or make new objects: "
          f"python r2d3.py sample --prompts \"{test_prompts[0]}\" --run {out}")
    return summary


def cost(config: Config, base: Base | None = None) -> dict:
    """What one epoch takes: parameters, seconds by phase, peak memory. Prints and returns it, saves nothing.
    On a CPU a big base does one transition of one object; random weights above 1e9 are only counted."""
    config = resolve(config)
    config = dataclasses.replace(config, beta=1.0 if isinstance(config.beta, str) else config.beta)
    on_gpu = torch.device(config.device).type == "cuda"
    if not on_gpu and base is None and config.weights == "random":
        if counted := published.count(config.base, partial(add_lora, rank=config.lora_rank, seed=0)):
            print(to_json(counted))                # more than a CPU can be asked for
            return counted
    if not on_gpu and config.base != "shapes":
        config = dataclasses.replace(config, batch_size=1, fraction=1 / config.steps, updates_per_epoch=1,
                                     skip_below=0.0)
    prompts = load_prompts(config.prompts)[:config.batch_size]
    job, _ = start_job(config, base, 0, 1, prompts)
    optimizer = start_lora(job)
    parameters = processes.count_parameters(job.base)
    processes.SECONDS, begun = {}, time.perf_counter()
    rows = list(train_epoch(job, prompts, optimizer, 0, {}))
    seconds, processes.SECONDS = processes.SECONDS | {"all": time.perf_counter() - begun}, None
    result = {"device": torch.cuda.get_device_name(config.device) if on_gpu else "CPU",
              "objects": config.batch_size, "updates": len(rows),
              "judged": sum(row["judged"] for row in rows),
              "parameters": parameters, "seconds": seconds, "peak_GB": processes.peak_memory_GB(config.device)}
    print(to_json(result))
    return result


@torch.no_grad()
def filter_prompts(job: Job, prompts: list[str], identity: dict) -> list[str]:
    """The prompts without the share `min_quantile` of them on which one object of the untouched base has
    the lowest reward. Processes share the work; rewards are kept for all runs with this base and reward.
    """
    config = job.config
    if not config.min_quantile:
        return prompts
    what = [identity, *(getattr(config, name) for name in folders.SCORED_WITH)]

    def rewards_of(part: list[str]) -> Tensor:
        generators, cond = [seeded("filter", prompt) for prompt in part], job.base.encode(part)
        x0 = rollout(job.base, job.schedule, cond, job.null, config.guidance, generators, keep=False)
        return job.judge(x0, part, generators)[0]

    different = [*dict.fromkeys(prompts)]
    key = hashlib.sha256(repr(what).encode()).hexdigest()
    rewards = folders.scores_by_prompt(key, different, config.eval_batch, rewards_of, job.rank, job.world)
    lowest = {*sorted(different, key=rewards.get)[:int(config.min_quantile * len(different))]}
    return [prompt for prompt in prompts if prompt not in lowest]


# -----------------------------------------------------------------------------------------------------------
# 12. Measure and report
# The paper's protocol: prompts that were never trained on, the same seeds and views before and after.
# Needs: sections 2 to 8, support's metrics, report, folders, to_json and write_atomic.
# -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(base: Base, reward: Reward, features: Features, schedule: NoiseSchedule, prompts: list[str],
            config: Config, seed: int, label: str, rank: int = 0, world: int = 1) -> Measurement:
    """Sample every prompt `samples_per_prompt` times and judge the objects. The same seed, the same noise.

    Processes share the chunks of objects, which are the same chunks for any number of them. Of an object its
    numbers and features are kept, and the latent only if the report shows it.
    """
    from tqdm import tqdm
    P, S, shown = len(prompts), config.samples_per_prompt, metrics.shown(len(prompts))
    texts, null, parts = metrics.text_features(features, prompts), base.encode([""]), []

    def measure_chunk(chunk: range) -> tuple[Tensor, ...]:
        named = [prompts[n // S] for n in chunk]
        generators = [seeded(seed, prompt, n % S) for prompt, n in zip(named, chunk)]
        bar = partial(tqdm, desc=f"{label}, {chunk.start} of {P * S}", leave=False, disable=rank > 0)
        x0 = rollout(base, schedule, base.encode(named), null, config.guidance, generators, bar, keep=False)
        pictures = render(base.decode(x0), *base.cameras(len(chunk)), base.eval_size, config.backend,
                          base.dilation)
        pictures = pictures._replace(image=pictures.image.clamp(0, 1))  # splats may be brighter than white
        judged = reward(pictures, named).mean(1), depth_normal_consistency(pictures, named).mean(1)
        kept = [k for k, n in enumerate(chunk) if n % S == 0 and n // S in shown]
        return *metrics.look(pictures, named, texts, features, *judged), x0[kept].cpu()

    chunks = [range(P * S)[n:n + config.eval_batch] for n in range(0, P * S, config.eval_batch)]
    for n in range(rank, rank + len(chunks), world):            # all processes go round equally often
        mine = measure_chunk(chunks[n]) if n < len(chunks) else None
        parts += [part for part in processes.gather(mine, world) if part]
    return metrics.join(parts, P, S, label)


@torch.no_grad()
def turntable(base: Base, gaussians: Gaussians, size: int = 128, frames: int = 36,
              backend: str | None = None) -> bytes:
    """A .gif in which all objects, side by side, turn once around."""
    B = len(gaussians.means)
    around = orbit(20.0, 360 / frames * torch.arange(frames), base.radius)[:, None, None]
    return report.gif([render(gaussians, c2w.expand(B, 1, 4, 4), intrinsics(B, 1), size, backend,
                              base.dilation).image.transpose(0, 1) for c2w in around])


def write_report(base: Base, prompts: list[str], before: Measurement, after: Measurement,
                 rows: list[dict], summary: dict, config: Config, out: Path) -> None:
    """summary.json, samples/, curves.png and report.html: one page with all of it, that needs no network."""
    shown = metrics.shown(len(prompts))
    cameras = orbit(20.0, 30.0, base.radius).expand(len(shown), 1, 4, 4), intrinsics(len(shown), 1)
    with torch.no_grad():
        objects = [base.decode(m.latents.to(base.device)) for m in (before, after)]
        pictures = [render(one, *cameras, 144, config.backend, base.dilation).image[:, 0].cpu()
                    for one in objects]
    both = Gaussians(*(torch.cat([a[:4], b[:4]]) for a, b in zip(*objects)))
    write_atomic(out / "summary.json", to_json(summary))
    for name, content in report.files(*pictures, [prompts[n] for n in shown], objects,
                                      turntable(base, both, backend=config.backend), rows, summary,
                                      f"{config.reward} on {config.base}", to_json(vars(config)),
                                      (base.radius, FXFY, base.dilation)).items():
        write_atomic(out / name, content)


# -----------------------------------------------------------------------------------------------------------
# 13. Sample, evaluate, command line
# Needs: sections 2 to 8 and 12, and support/; parse also train and cost.
# -----------------------------------------------------------------------------------------------------------


def load_tuned(config: Config, base: Base | None) -> tuple[Config, Base, NoiseSchedule]:
    """config with its guidance, the base, with the LoRA of `config.run` if that is set, and its schedule."""
    lora = inputs.find_lora(config.run) if config.run else None    # asked for before anything is fetched
    base = base or load_base(config, config.device)
    if lora:
        folders.warn_if_changed(config.run, base, config.reward)
        base.net = load_lora(base.net, lora).to(base.device).eval()
    config = dataclasses.replace(config, guidance=config.guidance or base.guidance)
    return config, base, base.schedule(config.sampler, config.steps)


@torch.no_grad()
def sample(config: Config, base: Base | None = None) -> list[Path]:
    """Make objects: for each a .ply, an .html to turn it, a .png of four views, a .gif; and samples.json. An
    object depends on seed, prompt and its number among the prompt's samples, not on the other prompts."""
    from tqdm import tqdm
    if not config.prompts:
        raise UserError("sample needs --prompts, a text file or a prompt; try --prompts \"a red cube\"")
    prompts = [*dict.fromkeys(load_prompts(config.prompts))]
    home = config.run if config.run and os.path.isdir(config.run) else "runs"
    folder = Path(config.out or f"{home}/samples")
    check_writable(folder)                                      # what cannot be written fails before the work
    export.check(config.mesh, config.merge, config.run, config.weights)
    config, base, schedule = load_tuned(resolve(config, "sample"), base)
    index, written = export.Index(folder, vars(config), folders.identify(base, "")["weights"]), []
    forty = export.mesh_angles(base.elevation)                  # cameras all around, if a mesh is wanted
    forty = orbit(*forty, base.radius), intrinsics(len(forty[0]))
    inputs.prepare(base, None, prompts, config.prompts)
    null = base.encode([""])
    objects = [(prompt, s) for prompt in prompts for s in range(config.samples_per_prompt)]
    for start in range(0, len(objects), config.eval_batch):
        chunk = objects[start:start + config.eval_batch]
        cond = base.encode([prompt for prompt, _ in chunk])
        generators = [seeded(config.seed, prompt, s) for prompt, s in chunk]
        bar = partial(tqdm, desc=f"objects {start + 1} to {start + len(chunk)}", leave=False)
        x0 = rollout(base, schedule, cond, null, config.guidance, generators, bar, keep=False)
        gaussians = base.decode(x0)
        pictures = render(gaussians, *base.cameras(len(chunk)), 256, config.backend, base.dilation).image
        for n, (prompt, s) in enumerate(chunk):
            path, about = index.claim(prompt, s)
            one = Gaussians(*(tensor[n:n + 1] for tensor in gaussians))
            around = turntable(base, one, 256, backend=config.backend)
            report.save_object(path, one, pictures[n:n + 1], around, about,
                               (base.radius, FXFY, base.dilation), forty if config.mesh else None,
                               config.backend)
            index.add(path, about)
            print(path)
            written.append(path)
    if config.merge:
        print(f"--weights {export.save_merged(base.net, config.base, config.weights, index)}")
    return written


@folders.unlocking()
def evaluate(config: Config, base: Base | None = None) -> dict:
    """The paper's protocol: by default 32 objects a prompt, the run beside the base. Returns the summary."""
    started, given = time.perf_counter(), config.out
    if given and (Path(given) / "checkpoint").is_dir():
        raise UserError(f"--out {given} is a run, whose report would be lost; name another folder")
    config = resolve(config, "evaluate")
    device, rank, world = processes.start_processes(config.device)
    out, tuned = Path(given or folders.evaluation_folder(config.run, config.out)), bool(config.run)
    if rank == 0:                                               # what cannot be written fails before the work
        folders.lock(out, "samples")
    config, base, schedule = load_tuned(dataclasses.replace(config, device=device), base)
    reward = load_reward(config.reward, base, config.device, config.checkpoint, config.weights == "random")
    features = metrics.load_features(base.tower, config.device)
    prompts = load_prompts(config.test_prompts)[:config.eval_prompts]
    inputs.prepare(base, reward, prompts, config.test_prompts)
    processes.gather(None, world, processes.LOADING_WAIT)
    about = report.describe(dataclasses.asdict(config) | {"out": str(out)}, reward.title)
    if rank == 0:
        write_atomic(out / "config.json", to_json(about))
    common = base, reward, features, schedule, prompts, config
    after = measure(*common, config.seed, "the fine-tuned model" if tuned else "the base", rank, world)
    with base.net.disable_adapter() if tuned else contextlib.nullcontext():
        before = measure(*common, config.seed, "the base", rank, world) if tuned else after
        other = measure(*common, config.seed + 1, "the base once more, for FID", rank, world)
    if rank > 0:
        return {}
    summary = {"scorer": reward.title, "base": config.base, "run": config.run,
               "seed": config.seed, "features": features.title, **metrics.compare(before, after, other),
               "seconds": time.perf_counter() - started}
    if config.protocol:
        method = config.method if tuned else "base"
        summary["paper_protocol"] = metrics.paper_protocol(before, after, other, base=config.base,
                                                           reward=config.reward, method=method)
    write_report(base, prompts, before, after, [], summary, config, out)
    metrics.print_summary(summary)
    print(f"open {out / 'report.html'}")
    return summary


def run_config(folder: str) -> Config:
    """The settings of a run, from its config.json; `run` is that folder."""
    return Config(**folders.read_settings(Path(folder), Config) | {"run": folder, "resume": False})


def parse(arguments: list[str]) -> tuple[Callable[[Config], object], Config]:
    """The command and its Config; with --run, what is not given is as it was in that run."""
    commands = {"train": train, "sample": sample, "evaluate": evaluate, "cost": cost}
    name = arguments.pop(0) if arguments and arguments[0] in commands else "train"
    config = cli.parse(Config, name, arguments)
    if config.run and (Path(config.run) / "config.json").is_file():
        settings = dataclasses.replace(run_config(config.run), out=None, prompts=None, device=None, seed=0,
                                       samples_per_prompt=None, eval_prompts=None)
        config = cli.parse(Config, name, arguments, settings)
    return commands[name], config


def main() -> int:
    """Exit codes: 0 done, 2 the caller can mend it (one sentence on stderr), 130 stopped by Ctrl-C."""
    def work() -> None:
        command, config = parse(sys.argv[1:])
        command(config)
    return cli.exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
