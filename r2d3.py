"""r2d3: align text-to-3D diffusion models with rewards that only see 2D renders.

This is the method of "Nabla-R2D3: Effective and Efficient 3D Diffusion Alignment with 2D Rewards"
(NeurIPS 2025, arXiv 2506.15684). A 3D-native diffusion model denoises the latent of an object; a reward
judges pictures of it. The method moves the score of every denoising step by a scaled gradient of the reward,
which samples from (prior x reward) instead of climbing the reward alone, and so keeps the prior's diversity:

    for every epoch:
        draw prompts and sample trajectories x_T .. x_0 with the current model                (rollout; E1-E3)
        pick some steps t -> s of every trajectory                                          (pick_transitions)
        for every update, for the transitions (x_t, x_s) of its share:
            x0  = one-step estimate of the clean latent from x_s                               (E1)
            g   = gradient of reward(render(decode(x0), random cameras)) with respect to x_s   (E7)
                  (or of the reward linearised at the trajectory's end: asked once per object) (E8)
            res = -k (eps_theta(x_t) - eps_ref(x_t)) - beta w(s) g                             (E6)
            descend mean |res|^2 + lambda |eps_theta - eps_old|^2 in the LoRA weights          (E4, E5)

`eps_ref` is the same network with its LoRA switched off. The numbers E1-E8 are explained in the README ("The
mathematics"). The file reads from top to bottom; every section says what it needs, so that it can be lifted:

    1 constants and words    5 NoiseSchedule     9 the loss          13 command line
    2 Config                 6 bases            10 the baselines
    3 cameras                7 rewards          11 train
    4 Gaussians              8 rollout          12 evaluate     (support/: what is not the method)

Run it:   python r2d3.py --reward aesthetic                        # minutes on two CPU cores, no download
          python r2d3.py sample --prompts "a red cube" --run runs/shapes-aesthetic-seed0
          python r2d3.py evaluate --run runs/shapes-aesthetic-seed0
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

if __name__ == "__main__":      # else idle threads spin, which costs a factor of four on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from support import (UserError, cache_folder, fetching, load_weights, metrics, published, report, scorers,
                    shapes, to_bytes, write_atomic)
from support.metrics import Features, Measurement
from kernels import Render, gradient_matching, rasterize

# -----------------------------------------------------------------------------------------------------------
# 1. Constants and words
# Letters in shapes: B objects, V views, N Gaussians per object, M transitions in a micro-batch, T steps of
# the sampler, C h w one view of the latent, H W pixels, L words, D features. `i` is a place on the sampler's
# grid: step i goes from grid point i (noise level t) to grid point i + 1 (level s).
# -----------------------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
FXFY = 1422.222 / 1024     # focal length in image widths: a field of view of 39.6 degrees (DiffSplat)
RADIUS = 1.4               # distance of the cameras from the origin (DiffSplat)
ELEVATION = 10.0           # degrees above the horizon (DiffSplat)
IMAGE_NOISE = 2e-3         # Gaussian noise on images before the reward (Nabla-R2D3's released code)
SH_C0 = 0.28209479177387814     # zeroth spherical harmonic: .ply files store (colour - 0.5) / SH_C0


# -----------------------------------------------------------------------------------------------------------
# 2. Config
# Every setting of a run; the command line is made from it, and it is saved with the run. A default of None
# means "by base and reward", see PRESETS: the paper's values for its bases, measured ones for `shapes`.
# -----------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Align a text-to-3D diffusion model with a 2D reward (Nabla-R2D3, arXiv 2506.15684)."""

    reward: str = "aesthetic"  # aesthetic, hpsv2, normal, dnc, file.py:function, a sum: aesthetic=1,dnc=0.3
    scorer: Literal["auto", "embedded", "laion", "hps-v2.1", "hps-v2.0", "marigold"] = "auto"  # auto: by base
    checkpoint_scorer: bool = False  # a published scorer's activations are computed twice, to save memory
    normal_gradient: bool = False  # of normal, also through the estimator (paper: the estimate is detached)
    angle_mask: bool = False  # normal and dnc only count where the surface is seen at less than 60 degrees
    base: Literal["shapes", "diffsplat-pixart", "diffsplat-sd15"] = "shapes"  # shapes: nothing is downloaded
    weights: str | None = None  # a folder like DiffSplat's repo, or random: untrained (of shapes only a file)
    precision: Literal["bf16", "float32"] = "bf16"  # of a diffsplat denoiser on a GPU; its LoRA is float32
    checkpoint_net: bool = False  # the denoiser's activations are computed twice, to save memory
    prompts: str | None = None  # a file, one a line; a prompt; hpdv2:photo; None: shapes or objects_train.txt
    min_quantile: float | None = None  # leave out the share where the base is worst; None: by base and reward
    test_prompts: str | None = None  # never trained on, to measure; None: shapes_test.txt or objects_test.txt
    out: str | None = None  # folder to write to; None: runs/<base>-<reward>-seed<seed>
    run: str | None = None  # for sample and evaluate: the run whose LoRA to use; None: the base as it is
    lora: str | None = None  # for sample and evaluate: another LoRA, our lora/ or the authors' .safetensors
    resume: bool = False  # go on from the last checkpoint of the run (with more epochs: train longer)
    seed: int = 0  # everything random in a run follows from it
    device: str | None = None  # cpu, cuda, cuda:1, mps; None: cuda where there is one, else cpu
    dry_run: bool = False  # one epoch, nothing saved: parameters, seconds by phase, memory; less on a CPU
    backend: Literal["torch", "triton"] | None = None  # of the kernels; None: triton on a GPU

    epochs: int | None = None  # passes of sampling and training; None: by base
    batch_size: int | None = None  # objects sampled per epoch and process; None: by base
    updates_per_epoch: int | None = None  # optimiser steps, which share an epoch's transitions; None: by base
    updates_per_gradient: int = 1  # an epoch's transitions are gone through so often (paper: 1)
    micro_batch: int | None = None  # transitions in one forward and backward pass: memory; None: by base
    lr: float | None = None  # learning rate of AdamW; None: by base
    weight_decay: float = 1e-4  # of AdamW (paper)
    max_grad_norm: float = 1.0  # the gradient of all LoRA weights is clipped to this norm (paper)
    lora_rank: int = 8  # rank of the LoRA, whose scale is 1 (paper)

    sampler: Literal["dpm", "ddim"] = "dpm"  # sde-dpmsolver++ of order 1 (paper), or DDIM with eta = 1
    steps: int = 20  # sampler steps (paper)
    guidance: float | None = None  # classifier-free guidance of sampling, loss, reward; None: the base's own
    beta: float | None = None  # strength of the reward against the prior (E4); None: by base and reward
    lam: float | None = None  # lambda, the pull to the rollout's predictions (E5); None: by base and reward
    matching: Literal["eps", "score"] | None = None  # score: E4 (paper); eps: divided by k; None: by base
    branch: Literal["guided", "conditional"] | None = None  # what is matched (paper: guided); None: by base
    last_step: Literal["always", "stratified", "never"] | None = None  # trained? None: by base; paper: always
    fraction: float = 0.4  # share of every trajectory's steps that is trained (paper)
    time_weight: Literal["squared", "linear", "none"] = "squared"  # w(s): alpha_s^2 (paper), alpha_s, 1
    train_from: float = 0.0  # where the trained steps begin: 0.5 leaves out the noisier half (paper: 0)
    stratify: bool = True  # draw the trained steps evenly over time (paper); else uniformly at random
    skip_below: float | None = None  # steps weighted below this share of the largest do without g; paper: 0
    reward_at: Literal["step", "sample"] | None = None  # each step (E7, paper), or once (E8); None: by base
    jacobian: bool = True  # reward gradient (E7) through the network (paper); else eps counts as constant
    clip_reward_grad: float | None = None  # largest L2 norm of an object's reward gradient; None: any (paper)

    method: Literal["nabla", "refl", "draft", "ddpo"] = "nabla"  # nabla-R2D3, or a baseline of its paper
    draft_steps: int = 1  # DRaFT-K's K: sampler steps that the gradient goes through
    draft_noises: int = 0  # DRaFT-LV: one step from so many renoised copies of the sample; 0: DRaFT-K
    ddpo_clip: float | None = None  # DDPO: how far the likelihood ratio may leave 1; None: by base

    views: int | None = None  # pictures per object for the reward (paper: 4); None: by base
    view_size: int | None = None  # pixels of such a picture's side; None: by base
    eval_size: int | None = None  # pixels of a picture's side in evaluations; None: by base
    elevation_range: float = 20.0  # degrees of random elevation of the reward's cameras, around 10 (paper)
    azimuth_range: float = 60.0  # degrees of their random azimuth, around evenly spaced views (paper)
    samples_per_prompt: int | None = None  # objects per prompt; None: 32 for evaluate (paper), else 4
    eval_prompts: int | None = None  # measure on so many of the test prompts only, the first; None: on all
    eval_batch: int = 60  # objects sampled at once in an evaluation
    base_only: bool = False  # evaluate: the base without a LoRA (with --run: in the settings of that run)
    row: str | None = None  # evaluate: a .jsonl file that the result is appended to, as one line


PRESETS = {  # by base; under "" for all, then by reward and by method (the later wins)
    "shapes": {  # chosen from experiments/results/compare.jsonl
        "": {"epochs": 6, "batch_size": 16, "updates_per_epoch": 16, "lr": 1e-3, "matching": "eps",
             "branch": "conditional", "reward_at": "sample", "skip_below": 0.25, "beta": 1000.0, "lam": 1.0,
             "views": 2, "view_size": 48, "eval_size": 64, "min_quantile": 0.0, "ddpo_clip": 1e-2,
             "micro_batch": 16, "last_step": "always"},
        "refl": {"epochs": 64, "batch_size": 1, "updates_per_epoch": 1, "lr": 2e-4},
        "draft": {"epochs": 32, "batch_size": 2, "updates_per_epoch": 1, "lr": 2e-4},
        "ddpo": {"epochs": 40, "batch_size": 16, "updates_per_epoch": 4, "lr": 1e-3, "last_step": "never"},
    },
    "paper": {  # the paper's, for its bases
        "": {"epochs": 100, "batch_size": 16, "updates_per_epoch": 4, "lr": 1e-4, "matching": "score",
             "branch": "guided", "reward_at": "step", "skip_below": 0.0, "beta": 1e6, "lam": 1e4,
             "views": 4, "view_size": 512, "eval_size": 512, "min_quantile": 0.0, "ddpo_clip": 1e-4,
             "micro_batch": 2, "last_step": "always"},
        "aesthetic": {"beta": 2e6, "lam": 3e3},
        "hpsv2": {"beta": 1e7, "lam": 5e3},
        "normal": {"min_quantile": 0.2},
        "dnc": {"min_quantile": 0.2},
    },
}


def resolve(config: Config) -> Config:
    """A new Config with the defaults that depend on base and reward filled in; refuses what cannot work."""
    presets = PRESETS.get(config.base, PRESETS["paper"])
    rewards = [part.split("=")[0].strip() for part in config.reward.split(",")]
    usual = presets[""] | presets.get(rewards[0], {}) | presets.get(config.method, {})
    usual["min_quantile"] = max(presets.get(reward, {}).get("min_quantile", 0.0) for reward in rewards)
    name = "-".join(Path(reward.split(":")[0]).stem for reward in rewards)
    kind = "shapes" if config.base == "shapes" else "objects"
    gpu = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    usual |= {"prompts": str(HERE / f"prompts/{kind}_train.txt"),
              "test_prompts": str(HERE / f"prompts/{kind}_test.txt"),
              "samples_per_prompt": 4, "device": gpu if torch.cuda.is_available() else "cpu",
              "out": f"runs/{config.base}-{name}{'' if config.method == 'nabla' else '-' + config.method}"
                     f"-seed{config.seed}"}
    filled = {name: value for name, value in usual.items() if getattr(config, name) is None}
    for name in ("prompts", "test_prompts", "weights"):         # a run's files are found from any folder
        path = filled.get(name, getattr(config, name))
        if path and path != "random" and (os.path.isfile(path) or os.path.isdir(path) and name == "weights"):
            filled[name] = str(Path(path).resolve())
    config = dataclasses.replace(config, **filled)
    try:
        torch.empty(0, device=config.device).cpu()
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0][:80]
        raise UserError(f"--device {config.device} cannot be used here ({why})") from None
    on_cpu = torch.device(config.device).type == "cpu"
    if config.backend == "triton" and on_cpu and not os.environ.get("TRITON_INTERPRET"):
        raise UserError("--backend triton needs a GPU; on a CPU leave --backend out")
    may_be_zero = {"lam", "weight_decay", "elevation_range", "azimuth_range", "seed", "train_from",
                   "draft_noises", "skip_below", "min_quantile"}
    at_most = {"steps": 500, "lora_rank": 1024, "seed": 2**62, "train_from": 0.9, "skip_below": 1,
               "draft_steps": 1 if config.draft_noises else config.steps, "min_quantile": 0.9, "fraction": 1}
    for name, value in dataclasses.asdict(config).items():
        if type(value) not in (int, float):
            continue
        if not (value >= 0 if name in may_be_zero else value > 0):
            wanted = "must not be negative" if name in may_be_zero else "must be above zero"
            raise UserError(f"--{name.replace('_', '-')} is {value}; it {wanted}")
        if not value <= at_most.get(name, 1e30):
            raise UserError(f"--{name.replace('_', '-')} is {value}; at most {at_most.get(name, 1e30)} works")
    if min(config.view_size, config.eval_size) < 8:
        raise UserError("--view-size and --eval-size must be at least 8 pixels")
    if not pick_steps(config, seeded(0)):
        raise UserError("nothing to train; use more --steps, a lower --train-from, another --last-step")
    return config


# -----------------------------------------------------------------------------------------------------------
# 3. Cameras
# World: +y up; azimuth 0 looks from +z, 90 from +x. Cameras: OpenCV axes (x right, y down, z forward),
# matrices are camera-to-world, intrinsics fx fy cx cy are divided by the image size.
# Needs: nothing. Follows: DiffSplat's src/utils/geo_util.py, checked against its recorded output.
# -----------------------------------------------------------------------------------------------------------


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


def sample_cameras(num_objects: int, views: int, elevation_range: float, azimuth_range: float,
                   generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The views of the reward: evenly spaced azimuths, one random offset and elevation per object.

    Ranges are full widths in degrees, centred on azimuth offset 0 and on ELEVATION. With fewer than four
    views the first one starts at a random quarter turn, so that every side is seen in turn.
    Returns c2w (B, V, 4, 4), fxfycxcy (B, V, 4).
    """
    u = torch.rand(num_objects, 2, generator=generator) - 0.5
    quarter = torch.randint(4, (num_objects, 1), generator=generator) if views < 4 else 0
    azimuth = 360 / views * torch.arange(views) + 90 * quarter + azimuth_range * u[:, :1]  # (B, V)
    return orbit(ELEVATION + elevation_range * u[:, 1:], azimuth), intrinsics(num_objects, views)


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
# Needs: sections 1, 3 and kernels.rasterize.
# -----------------------------------------------------------------------------------------------------------


class Gaussians(NamedTuple):
    """Splats in world space, activated: scales are standard deviations, opacities and colours in [0, 1]."""

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


def render(gaussians: Gaussians, c2w: Tensor, fxfycxcy: Tensor, size: int,
           backend: str | None = None) -> Render:
    """Square pictures on white of every object from its V cameras: image (B, V, 3, size, size) and so on."""
    g = gaussians
    return rasterize(g.means, g.quats, g.scales, g.opacities, g.colors, c2w.to(g.means), fxfycxcy.to(g.means),
                     size, size, backend=backend)


PLY_FIELDS = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity",
              "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]


def save_ply(path: Path, gaussians: Gaussians, index: int = 0) -> int:
    """Write one object as the .ply that splat viewers read (INRIA: log scales, logit opacities, SH colours).

    Splats that a picture cannot show (opacity below 1/255) are left out. Returns how many were written.
    Viewers normalise quaternions and the rasteriser, as published, does not: splats may look a little larger
    or smaller there than in our pictures.
    """
    means, scales, quats, opacities, colors = (t[index].detach().float().cpu() for t in gaussians)
    seen = opacities > 1 / 255
    columns = torch.cat([means, torch.zeros_like(means), (colors - 0.5) / SH_C0,
                         torch.logit(opacities.clamp(max=1 - 1e-6))[:, None],
                         scales.clamp(min=1e-8).log(), F.normalize(quats, dim=-1)], 1)[seen]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(columns)}",
              *(f"property float {name}" for name in PLY_FIELDS), "end_header\n"]
    write_atomic(path, "\n".join(header).encode() + columns.contiguous().numpy().astype("<f4").tobytes())
    return len(columns)


# -----------------------------------------------------------------------------------------------------------
# 5. NoiseSchedule
# Every step of the sampler is one Gaussian transition; this class is all that the method knows of diffusion.
# Needs: nothing. Timesteps and noise levels come from diffusers' schedulers.
#     x_t = alpha_t x0 + sigma_t eps,   h = log(alpha_s / sigma_s) - log(alpha_t / sigma_t)
# -----------------------------------------------------------------------------------------------------------


class NoiseSchedule:
    """Noise levels of a sampler with T steps: timesteps (T,), alpha (T + 1,), sigma (T + 1,).

    First-order SDE-DPM-Solver++ and DDIM with eta = 1 are the same transition on different grids. Every
    method takes a grid point i: an int, or one per sample as a LongTensor (M,). Tables: float64, CPU.
    """

    def __init__(self, timesteps: Tensor, alpha: Tensor, sigma: Tensor):
        self.timesteps = timesteps.long().cpu()
        self.alpha, self.sigma = alpha.double().cpu(), sigma.double().cpu()
        if not len(alpha) == len(sigma) == len(timesteps) + 1:
            raise ValueError(f"want T timesteps and T + 1 levels; got {len(timesteps)} and {len(alpha)}")

    def __len__(self) -> int:
        return len(self.timesteps)

    @classmethod
    def from_diffusers(cls, sampler: str, steps: int, **betas) -> NoiseSchedule:
        """The grid of "dpm" (sde-dpmsolver++ of order 1, Nabla-R2D3's) or "ddim", with diffusers' numbers.

        Both end at the smallest noise level instead of at 0, so that the last step is a Gaussian too.
        """
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
        if sampler == "dpm":
            scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1,
                                                    final_sigmas_type="sigma_min", **betas)
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
        """What the network is told at grid point i; after the last step that is timestep 0."""
        return torch.cat([self.timesteps, torch.zeros(1, dtype=torch.long)])[i]

    def x0(self, x: Tensor, eps: Tensor, i: int | Tensor) -> Tensor:
        """Estimate of the clean latent from x at grid point i (E1)."""
        return (x - per_sample(self.sigma[i], x) * eps) / per_sample(self.alpha[i], x)

    def step(self, i: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step i as x_s ~ N(c_x x_t + c_0 x0, std^2): c_x, c_0 (E2), std (E3)."""
        decay = self.sigma[i + 1] * self.alpha[i] / (self.sigma[i] * self.alpha[i + 1])             # e^-h
        c_x = self.sigma[i + 1] / self.sigma[i] * decay                                             # (E2)
        c_0 = self.alpha[i + 1] * (1 - decay ** 2)                                                  # (E2)
        return c_x, c_0, self.sigma[i + 1] * (1 - decay ** 2).sqrt()                                # (E3)

    def transition(self, x: Tensor, eps: Tensor, i: int | Tensor) -> tuple[Tensor, Tensor]:
        """Mean (like x) and std (to broadcast against it) of x_s, given x_t and its noise."""
        c_x, c_0, std = (per_sample(value, x) for value in self.step(i))
        return c_x * x + c_0 * self.x0(x, eps, i), std                                              # (E2, E3)

    def k(self, i: int | Tensor) -> Tensor:
        """How the score of step i depends on the prediction: score = const - k eps (E6)."""
        _, c_0, std = self.step(i)
        return c_0 * self.sigma[i] / (self.alpha[i] * std ** 2)


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """A scalar, or one value per sample (M,), shaped to broadcast against x (M, ...)."""
    return value.to(x).reshape(-1, *[1] * (x.dim() - 1))


# -----------------------------------------------------------------------------------------------------------
# 6. Bases
# A base is a frozen 3D diffusion model. It offers encode(prompts) -> Cond, predict(x, t, cond) -> eps,
# decode(x0) -> Gaussians, and: betas, latent_shape, guidance, net (the module that LoRA goes on), device.
# Needs: sections 3 and 4; the networks are stock diffusers.
# -----------------------------------------------------------------------------------------------------------


class Cond(NamedTuple):
    """Encoded prompts: embeds (B, L, D); mask (B, L), true where there is a word, or None."""

    embeds: Tensor
    mask: Tensor | None

    def __getitem__(self, rows) -> Cond:                                            # cond[rows] picks objects
        return Cond(self.embeds[rows], None if self.mask is None else self.mask[rows])


class MultiViewAttnProcessor:
    """Self-attention over all views of an object: (b v) n d -> b (v n) d. The rest stays per view."""

    def __init__(self, views: int):
        self.views = views

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: None = None,
                 attention_mask: None = None, **unused) -> Tensor:
        rows, tokens, width = hidden_states.shape
        joined = hidden_states.reshape(rows // self.views, self.views * tokens, width)
        q, k, v = (layer(joined).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                   for layer in (attn.to_q, attn.to_k, attn.to_v))                  # (b, heads, v n, d)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out)).reshape(rows, tokens, -1)


def join_views(net: nn.Module, views: int) -> None:
    """Make every self-attention (`attn1`) of a stock diffusers network multi-view, as DiffSplat does."""
    net.set_attn_processor({name: MultiViewAttnProcessor(views) if ".attn1." in name else processor
                            for name, processor in net.attn_processors.items()})


class DiffSplat:
    """DiffSplat: latents of splat grids in four views, denoised by an image network that sees all at once.

    `net` predicts from [latent, Pluecker rays] of the four input cameras; `vae` has 12 channels, one splat
    grid per view. `shapes` is this class with small weights. Follows chenguolin/DiffSplat.
    """

    views = 4

    def __init__(self, net: nn.Module, vae: nn.Module,
                 text: Callable[[list[str]], tuple[Tensor, Tensor | None]], *, image_size: int,
                 prediction_type: str, guidance: float, latent_mean: Tensor, latent_std: Tensor, betas: dict,
                 scale_range: tuple[float, float], depth_scale: float, half_image_shift: bool,
                 device: torch.device | str):
        self.device = torch.device(device)
        self.net = net.to(self.device).eval().requires_grad_(False)
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        join_views(self.net, self.views)
        self.text, self.guidance, self.betas, self.image_size = text, guidance, betas, image_size
        self.prediction_type, self.scale_range, self.depth_scale = prediction_type, scale_range, depth_scale
        channels = vae.config.latent_channels
        size = image_size // 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (self.views, channels, size, size)
        self.latent_mean = latent_mean.to(self.device).reshape(-1, 1, 1)  # per channel, or one for all
        self.latent_std = latent_std.to(self.device).reshape(-1, 1, 1)
        self.c2w, self.fxfycxcy = input_cameras(1, self.device)
        rays = plucker_rays(self.c2w, self.fxfycxcy, image_size, image_size, half_image_shift)[0]
        self.plucker = F.interpolate(rays, (size, size), mode="bilinear")           # (V, 6, h, w)
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
        if self.prediction_type == "epsilon":
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


def load_base(config: Config, device: torch.device | str) -> DiffSplat:
    """The base that `config.base` names, frozen, on `device`. `shapes` has judges too: .tower, .normals."""
    if config.base == "shapes":
        path = Path(config.weights or HERE / "support/shapes.safetensors")
        parts, tower, normals = shapes.load(path, device)
    else:
        parts = published.load(config.base, config.weights, device, config.precision)
        tower = normals = None
    base = DiffSplat(**parts, device=device)
    base.tower, base.normals = tower, normals
    if config.checkpoint_net:
        base.net.enable_gradient_checkpointing()
    return base


def load_prompts(spec: str) -> list[str]:
    """A text file with one prompt a line, the prompt itself, or hpdv2:photo, a style of that benchmark."""
    if not spec.strip():
        raise UserError("the prompt is empty; write what to make, for example --prompts \"a red cube\"")
    if spec.startswith("hpdv2:"):
        return published.benchmark_prompts(spec.removeprefix("hpdv2:"))
    if os.path.isfile(spec):
        try:
            lines = Path(spec).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"the prompt file {spec} is not UTF-8 text; write one prompt a line") from None
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"the prompt file {spec} is empty; write one prompt a line")
        return prompts
    one_word = len(spec.split()) == 1                           # "a lamp, black/white, 1.5 m" is a prompt
    if spec.endswith(".txt") or os.path.isdir(spec) or one_word and (Path(spec).suffix or os.sep in spec):
        raise UserError(f"there is no prompt file {spec}")
    return [spec.strip()]


def load_lora(net: nn.Module, path: Path) -> nn.Module:
    """The network with a saved LoRA of scale 1: a run's lora/ folder, or what Nabla-R2D3's code saved."""
    from peft import set_peft_model_state_dict
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"there is no LoRA in {path}: no adapter_model or pytorch_lora_weights.safetensors")
    weights = {"base_model.model." + re.sub(r"^(base_model\.model|unet)\.", "", name): value
               for name, value in load_weights(files[0])[0].items()}
    down = {name: value for name, value in weights.items() if "lora_A" in name}
    if not down or {name.replace("lora_A", "lora_B") for name in down} != weights.keys() - down.keys():
        raise UserError(f"{files[0]} is not a whole LoRA: it needs a lora_A and a lora_B for every layer")
    try:
        net = add_lora(net, next(iter(down.values())).shape[0], 0)
        if unknown := set_peft_model_state_dict(net, weights).unexpected_keys:
            raise KeyError(f"it has no {unknown[0]}")
    except (RuntimeError, KeyError, IndexError) as error:
        raise UserError(f"{files[0]} does not fit this base ({' '.join(str(error).split())[:150]})") from None
    return net


def add_lora(net: nn.Module, rank: int, seed: int) -> nn.Module:
    """The network with a LoRA of scale 1 on attention, feed-forward and projections (the paper's set)."""
    from peft import LoraConfig, get_peft_model
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "proj",
               "linear", "linear_1", "linear_2"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(net, LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                              target_modules=targets))


# -----------------------------------------------------------------------------------------------------------
# 7. Rewards
# A reward is a function of pictures and prompts: reward(render, prompts) -> score (B, V), differentiable with
# respect to the render. Its gradient is all that the method sees of it.
# Needs: sections 3 and 4; the published scorers are networks of open_clip and diffusers.
# -----------------------------------------------------------------------------------------------------------

Reward = Callable[[Render, list[str]], Tensor]


def colorfulness(render: Render, prompts: list[str]) -> Tensor:
    """How colourful the object is: Hasler and Suesstrunk (2003), sigma_rgyb + 0.3 mu_rgyb, colours in [0, 1].

    Taken over the object (weights: alpha, detached), not the picture: else an object could score by growing.
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
    def score(render: Render, prompts: list[str]) -> Tensor:
        pictures = tower.image(render.image.flatten(0, 1)).unflatten(0, render.image.shape[:2])  # (B, V, D)
        return (pictures * tower.text(prompts)[:, None]).sum(-1)
    return score


def normal_agreement(estimator: nn.Module, gradient: bool = False, angle_mask: bool = False) -> Reward:
    """Mean cosine between rendered normals and those an estimator sees in the picture.

    The estimate is detached, as in the paper's setting; with `gradient` the picture learns from it too.
    """
    def score(render: Render, prompts: list[str]) -> Tensor:
        with contextlib.nullcontext() if gradient else torch.no_grad():
            estimate = estimator(render.image.flatten(0, 1)).unflatten(0, render.image.shape[:2])
        return mean_cosine(render.normal, estimate, (render.alpha > 0.5)[:, :, 0], angle_mask)
    return score


# What can measure a reward: the embedded scorer, then the default of the paper's bases, then others.
SCORERS = {"aesthetic": ("embedded", "laion"), "hpsv2": ("embedded", "hps-v2.1", "hps-v2.0"),
           "normal": ("embedded", "marigold"), "dnc": ("embedded",)}


def load_reward(spec: str, base: DiffSplat, device: torch.device | str,
                config: Config | None = None) -> Reward:
    """The reward that `spec` describes: "aesthetic", "aesthetic=1,dnc=0.3", "my_file.py:my_function".

    `config` has the options. The returned function has a `.title` that says which scorer measures it.
    """
    config = config or Config()
    names = {part.partition("=")[0].strip() for part in spec.split(",")}
    options = {f"--scorer {config.scorer}": [name for name in SCORERS if config.scorer in SCORERS[name][1:]],
               "--normal-gradient": ["normal"] if config.normal_gradient else [],
               "--angle-mask": ["normal", "dnc"] if config.angle_mask else []}
    for option, rewards in options.items():                     # given, but for none of the rewards asked for
        if rewards and names.isdisjoint(rewards):
            raise UserError(f"{option} is for {' and '.join(rewards)}, and --reward is {spec}; leave it out")
    terms = []
    for part in spec.split(","):
        name, _, weight = part.partition("=")
        try:
            weight = float(weight or 1)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight) or weight == 0:
            raise UserError(f"the weight in --reward {part} is not a number or 0; write dnc=0.3, say")
        terms.append((weight, *load_reward_term(name.strip(), base, device, config)))

    def reward(render: Render, prompts: list[str]) -> Tensor:
        total = 0
        for weight, function, title in terms:
            try:
                score = function(render, prompts)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                raise UserError(f"--reward {title} failed: {type(error).__name__}: {error}") from error
            got, wanted = getattr(score, "shape", type(score).__name__), render.image.shape[:2]
            if got != wanted:
                raise UserError(f"--reward {title} returned {got}; wanted (objects, views), here {wanted}")
            if torch.is_grad_enabled() and render.image.requires_grad and not score.requires_grad:
                raise UserError(f"--reward {title} cannot be trained: it has no gradient to the pictures")
            total = total + weight * score
        return total

    reward.title = " + ".join(title if weight == 1 else f"{weight:g} x {title}" for weight, _, title in terms)
    return reward


def load_reward_term(name: str, base: DiffSplat, device: torch.device | str,
                     config: Config) -> tuple[Reward, str]:
    """One reward by name or file.py:function, and its title."""
    if ".py:" in name:
        path, _, function = name.rpartition(":")
        if not Path(path).is_file():
            raise UserError(f"there is no file {path} for --reward {name}")
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
        if not callable(getattr(module, function, None)):
            raise UserError(f"{path} has no function {function!r}; --reward {name} needs "
                            f"def {function}(render, prompts) -> scores (objects, views)")
        return getattr(module, function), name
    if name not in SCORERS:
        raise UserError(f"there is no reward {name!r}; there are {', '.join(SCORERS)}, and file.py:function")
    usual = SCORERS[name][0 if config.base == "shapes" else min(1, len(SCORERS[name]) - 1)]
    scorer = config.scorer if config.scorer in SCORERS[name] else usual
    if scorer == "embedded" and name in ("hpsv2", "normal") and getattr(base, "tower", None) is None:
        raise UserError(f"the embedded scorer of {name} belongs to --base shapes; leave --scorer out")
    place = device, config.checkpoint_scorer, config.weights == "random"
    agreement = partial(normal_agreement, gradient=config.normal_gradient, angle_mask=config.angle_mask)
    about, load = {
        "aesthetic": ("embedded scorer: colourfulness", lambda: colorfulness),
        "hpsv2": ("embedded scorer: image-text tower", lambda: tower_agreement(base.tower)),
        "normal": ("embedded scorer: normal estimator", lambda: agreement(base.normals)),
        "dnc": ("depth-normal consistency",
                lambda: partial(depth_normal_consistency, angle_mask=config.angle_mask)),
        "laion": ("LAION V2, CLIP ViT-L/14", lambda: scorers.LaionAesthetic.pretrained(*place)),
        "hps-v2.1": ("HPS v2.1, CLIP ViT-H/14", lambda: scorers.HPSv2.pretrained("v2.1", *place)),
        "hps-v2.0": ("HPS v2.0, CLIP ViT-H/14", lambda: scorers.HPSv2.pretrained("v2.0", *place)),
        "marigold": ("Marigold v1-1, one step",
                     lambda: agreement(scorers.MarigoldNormals.pretrained(*place))),
    }[name if scorer == "embedded" else scorer]
    about += ", gradient through the estimator" if config.normal_gradient and name == "normal" else ""
    about += ", random weights" if scorer != "embedded" and config.weights == "random" else ""
    about += ", angle mask" if config.angle_mask and name in ("normal", "dnc") else ""
    with fetching(f"the scorer {scorer}", {"laion": "1.7 GB", "marigold": "2.6 GB"}.get(scorer, "4 GB")):
        return load(), f"{name} ({about})"


# -----------------------------------------------------------------------------------------------------------
# 8. Rollout
# Needs: sections 5 and 6.
# -----------------------------------------------------------------------------------------------------------


class Trajectory(NamedTuple):
    """What sampling leaves for the loss: x (B, T + 1, *latent); and per step (B, T, *latent): eps, the guided
    prediction that the sampler used, and eps_text, the conditional half of it."""

    x: Tensor
    eps: Tensor
    eps_text: Tensor


def predict_both(base: DiffSplat, x: Tensor, t: Tensor, cond: Cond, null: Cond,
                 guidance: float) -> tuple[Tensor | None, Tensor]:
    """The two halves of classifier-free guidance in one batch; the first is None where guidance is 1."""
    if guidance == 1:
        return None, base.predict(x, t, cond)
    M = len(x)
    both = Cond(torch.cat([null.embeds.expand(M, -1, -1), cond.embeds]),
                None if cond.mask is None else torch.cat([null.mask.expand(M, -1), cond.mask]))
    return base.predict(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)


def guide(eps_uncond: Tensor | None, eps_text: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance."""
    return eps_text if eps_uncond is None else eps_uncond + guidance * (eps_text - eps_uncond)


def predict_guided(base: DiffSplat, x: Tensor, t: Tensor, cond: Cond, null: Cond, guidance: float) -> Tensor:
    """The prediction that the sampler uses."""
    return guide(*predict_both(base, x, t, cond, null, guidance), guidance)


@torch.no_grad()
def rollout(base: DiffSplat, schedule: NoiseSchedule, cond: Cond, null: Cond, guidance: float,
            generator: torch.Generator, progress: Callable = iter) -> Trajectory:
    """Sample one object per row of `cond`, keeping all that the loss needs. `generator` is a CPU one."""
    B = len(cond.embeds)

    def noise() -> Tensor:
        return torch.randn(B, *base.latent_shape, generator=generator).to(base.device)

    xs, guided, texts = [noise()], [], []
    for i in progress(range(len(schedule))):
        x = xs[-1]
        eps_uncond, eps_text = predict_both(base, x, schedule.t(i).expand(B), cond, null, guidance)
        texts.append(eps_text)
        guided.append(guide(eps_uncond, eps_text, guidance))
        mean, std = schedule.transition(x, guided[-1], i)
        xs.append(mean + std * noise())
    return Trajectory(*(torch.stack(steps, 1) for steps in (xs, guided, texts)))


def pick_transitions(steps: int, fraction: float, last_step: str | None, generator: torch.Generator,
                     train_from: float = 0.0, stratify: bool = True) -> list[int]:
    """The steps of one trajectory to train: the last one as `last_step` says, the rest stratified over time.

    The rest is drawn without replacement, in turn from four equal quarters of the remaining steps, starting
    at a random quarter, so that every noise level is trained about equally often for any number of steps.
    """
    count = max(1, int(steps * fraction + 1e-9))
    always = [steps - 1] if last_step in ("always", None) else []
    end = steps if last_step == "stratified" else steps - 1
    pool = torch.arange(min(round(steps * train_from), end), end)
    parts = pool.tensor_split(4) if stratify else [pool]
    parts = [part[torch.randperm(len(part), generator=generator)].tolist() for part in parts]
    first = int(torch.randint(len(parts), (), generator=generator))
    turns = [part[n] for n in range(steps) for part in parts[first:] + parts[:first] if n < len(part)]
    return always + turns[:count - len(always)]


# -----------------------------------------------------------------------------------------------------------
# 9. The loss
# Residual nabla-DB, forward direction (Nabla-R2D3, arXiv 2506.15684; nabla-GFlowNet, arXiv 2412.07775).
#     code        symbol                                      code          symbol
#     eps_*       eps_theta, the network with its LoRA        g             gradient of the reward at x_s (E7)
#     ref_*       eps_ref, the LoRA switched off              k             how the score depends on eps (E6)
#     eps_old     what is matched, as the rollout had it      weight        beta w(s)
# Both scores are -(x_s - mean) / std^2, so x_s and x_t cancel from their difference, and matching the scores
# is a weighted regression of eps_theta to eps_ref - (beta w / k) g. That is why this page is all there is.
# Needs: sections 5, 7 and 8, kernels.gradient_matching.
# -----------------------------------------------------------------------------------------------------------


class Transitions(NamedTuple):
    """A micro-batch of M sampler steps, objects and times mixed."""

    i: Tensor                  # (M,) step numbers, on the CPU: step i goes from grid point i to i + 1
    x_t: Tensor                # (M, *latent) at grid point i
    x_s: Tensor                # (M, *latent) at grid point i + 1
    eps_old: Tensor            # (M, *latent)
    cond: Cond                 # M prompts, encoded
    prompts: list[str]         # M prompts
    advantage: Tensor | None = None     # (M,) of the whole trajectory, for DDPO
    uphill: Tensor | None = None        # (M, *latent) reward's gradient at the trajectory's end, for (E8)


def judge(base: DiffSplat, reward: Reward, x0: Tensor, prompts: list[str], config: Config,
          generator: torch.Generator) -> tuple[Tensor, Render]:
    """Rewards (M,) of clean latents, mean over randomly placed cameras, and the pictures that were judged."""
    cameras = sample_cameras(len(x0), config.views, config.elevation_range, config.azimuth_range, generator)
    pictures = render(base.decode(x0), *cameras, config.view_size, config.backend)
    noise = IMAGE_NOISE * torch.randn(pictures.image.shape, generator=generator)
    pictures = pictures._replace(image=pictures.image + noise.to(pictures.image))
    return reward(pictures, prompts).mean(1), pictures


def judge_samples(base: DiffSplat, reward: Reward, x0: Tensor, prompts: list[str], config: Config,
                  generator: torch.Generator, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards (B,) of an epoch's samples, alpha coverage (B,), and with `gradient` u (B, *latent) (E8)."""
    parts = []
    for rows in torch.arange(len(x0)).split(config.micro_batch):
        part = x0[rows].requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            score, pictures = judge(base, reward, part, [prompts[n] for n in rows], config, generator)
        u = torch.autograd.grad(score.sum(), part)[0] if gradient else torch.zeros_like(part)
        parts.append((score.detach(), pictures.alpha.detach().mean((1, 2, 3, 4)), u))
    return tuple(torch.cat(each) for each in zip(*parts))


@contextlib.contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """No gradients of weights, or every LoRA layer would keep its input for one, which takes most memory."""
    trained = [weight for weight in net.parameters() if weight.requires_grad]
    try:
        net.requires_grad_(False)
        yield
    finally:
        for weight in trained:
            weight.requires_grad_()


def reward_gradient(base: DiffSplat, reward: Reward, schedule: NoiseSchedule, batch: Transitions, null: Cond,
                    config: Config, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """g (M, *latent): gradient by x_s of the reward's mean over views (E7), and that mean (M,); where
    `batch` has the reward's gradient at the sample, of that linear function of x0(x_s) instead (E8).
    """
    x_s, s = batch.x_s.detach().requires_grad_(), batch.i + 1
    with frozen(base.net):
        with contextlib.nullcontext() if config.jacobian else torch.no_grad():
            eps = predict_guided(base, x_s, schedule.t(s), batch.cond, null, config.guidance)
        x0 = schedule.x0(x_s, eps, s)                                                           # (E1) at s
        if batch.uphill is None:
            score, _ = judge(base, reward, x0, batch.prompts, config, generator)                # (E7)
        else:
            score = (x0 * batch.uphill).flatten(1).sum(1)                                       # (E8)
        g, = torch.autograd.grad(score.sum(), x_s)
    if config.clip_reward_grad:
        norm = g.flatten(1).norm(dim=1).clamp(min=1e-12)
        g = g * per_sample((config.clip_reward_grad / norm).clamp(max=1), g)
    return g, score.detach()


def match_weights(schedule: NoiseSchedule, i: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """k and beta w(s) of the residual (E6) at steps i (M,); matching in eps divides the residual by k."""
    k, power = schedule.k(i), {"squared": 2, "linear": 1, "none": 0}[config.time_weight]
    weight = config.beta * schedule.alpha[i + 1] ** power
    return (torch.ones_like(k), weight / k) if config.matching == "eps" else (k, weight)


def nabla_loss(base: DiffSplat, schedule: NoiseSchedule, batch: Transitions, null: Cond, g: Tensor,
               config: Config) -> tuple[Tensor, Tensor]:
    """match (E4) and reg (E5, without lambda), per transition (M,), differentiable in the LoRA weights."""
    guidance = config.guidance if config.branch == "guided" else 1.0
    t = schedule.t(batch.i)
    with torch.no_grad(), base.net.disable_adapter():
        ref_uncond, ref_text = predict_both(base, batch.x_t, t, batch.cond, null, guidance)
    eps_uncond, eps_text = predict_both(base, batch.x_t, t, batch.cond, null, guidance)
    k, weight = match_weights(schedule, batch.i, config)
    return gradient_matching(eps_uncond, eps_text, ref_uncond, ref_text, batch.eps_old, g, guidance,
                             k.to(g), weight.to(g), backend=config.backend)


# -----------------------------------------------------------------------------------------------------------
# 10. The baselines
# What the paper compares with, on the same base, rewards, views, LoRA and data. They return a loss per
# transition (M,) and climb the reward alone: nothing in them holds on to the prior. Needs: sections 5 to 9.
# -----------------------------------------------------------------------------------------------------------


def refl_loss(base: DiffSplat, reward: Reward, schedule: NoiseSchedule, batch: Transitions, null: Cond,
              config: Config, generator: torch.Generator) -> Tensor:
    """ReFL (ImageReward, arXiv 2304.05977): minus the reward of the one-step estimate at a late step."""
    eps = predict_guided(base, batch.x_t, schedule.t(batch.i), batch.cond, null, config.guidance)
    return -judge(base, reward, schedule.x0(batch.x_t, eps, batch.i), batch.prompts, config, generator)[0]


def draft_loss(base: DiffSplat, reward: Reward, schedule: NoiseSchedule, batch: Transitions, null: Cond,
               config: Config, generator: torch.Generator) -> Tensor:
    """DRaFT-K (arXiv 2309.17400): minus the reward of the sample, through the last K steps of the sampler.

    The steps start at grid point T - K of the rollout and draw new noise. DRaFT-LV (`draft_noises`) starts
    at the last step from the rollout's sample, noised anew, which lowers the variance of the gradient.
    """
    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x)

    x, first = batch.x_t, len(schedule) - config.draft_steps
    if config.draft_noises:
        x = schedule.alpha[first] * batch.x_s + schedule.sigma[first] * noise(x)
    for i in range(first, len(schedule)):
        eps = predict_guided(base, x, schedule.t(i).expand(len(x)), batch.cond, null, config.guidance)
        mean, std = schedule.transition(x, eps, i)
        x = mean + std * noise(x)
    return -judge(base, reward, x, batch.prompts, config, generator)[0]


def log_prob(schedule: NoiseSchedule, batch: Transitions, eps: Tensor) -> Tensor:
    """log N(x_s; mean, std^2), the mean over the latent's elements (as Nabla-R2D3's code has it): (M,)."""
    mean, std = schedule.transition(batch.x_t, eps, batch.i)
    density = -((batch.x_s - mean) / std) ** 2 / 2 - std.log() - math.log(2 * math.pi) / 2
    return density.flatten(1).mean(1)


def ddpo_loss(base: DiffSplat, reward: Reward, schedule: NoiseSchedule, batch: Transitions, null: Cond,
              config: Config, generator: torch.Generator) -> Tensor:
    """DDPO (arXiv 2305.13301): PPO's clipped policy gradient; the policy is the sampler's Gaussian step."""
    eps = predict_guided(base, batch.x_t, schedule.t(batch.i), batch.cond, null, config.guidance)
    ratio = (log_prob(schedule, batch, eps) - log_prob(schedule, batch, batch.eps_old)).exp()
    clipped = ratio.clamp(1 - config.ddpo_clip, 1 + config.ddpo_clip)
    return -torch.minimum(batch.advantage * ratio, batch.advantage * clipped)


def advantages(scores: list[float], prompts: list[str], history: dict[str, list[float]]) -> Tensor:
    """DDPO's: rewards (B,), each normalised by its prompt's last 32; by this epoch's until there are 8,
    since the spread of fewer says little. `history`, by prompt, is brought up to date.
    """
    for prompt, score in zip(prompts, scores):
        history[prompt] = [*history.get(prompt, []), score][-32:]
    peers = [history[prompt] if len(history[prompt]) >= 8 else scores for prompt in prompts]
    mean = torch.tensor([math.fsum(peer) / len(peer) for peer in peers])
    std = torch.tensor([torch.tensor(peer).std(correction=0) for peer in peers])
    return (torch.tensor(scores) - mean) / (std + 1e-6)


def pick_steps(config: Config, generator: torch.Generator) -> list[int]:
    """The steps of one trajectory that the method trains."""
    if config.method == "refl":                                             # one of the last quarter
        return [config.steps - 1 - int(torch.randint(-(-config.steps // 4), (), generator=generator))]
    if config.method == "draft":
        return [config.steps - config.draft_steps] * max(1, config.draft_noises)
    return pick_transitions(config.steps, config.fraction, config.last_step, generator, config.train_from,
                            config.stratify)


BASELINES = {"refl": refl_loss, "draft": draft_loss, "ddpo": ddpo_loss}


# -----------------------------------------------------------------------------------------------------------
# 11. Train
# One loop. Every epoch draws its randomness from a generator of its own, seeded by (seed, epoch, process), so
# a resumed run continues bit for bit without stored random states.
# Several GPUs: torchrun --nproc-per-node N r2d3.py ...
# Needs: everything above.
# -----------------------------------------------------------------------------------------------------------


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator whose stream depends on all of the numbers."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def start_processes(config: Config) -> tuple[Config, int, int]:
    """Join the other processes if torchrun started us. Returns the config with our device, rank, world."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return config, 0, 1
    rank, on_gpu = int(os.environ["RANK"]), config.device.startswith("cuda")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=24))
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        config = dataclasses.replace(config, device=f"cuda:{os.environ['LOCAL_RANK']}")
    return config, rank, world


def train_epoch(base: DiffSplat, reward: Reward, schedule: NoiseSchedule, prompts: list[str], null: Cond,
                optimizer: torch.optim.Optimizer, config: Config, epoch: int, rank: int, world: int,
                history: dict[str, list[float]]) -> Iterator[dict]:
    """Sample, then descend. Yields one log row per update. `history` is DDPO's, see `advantages`."""
    generator = seeded(config.seed, epoch, rank)
    B, parameters = config.batch_size, optimizer.param_groups[0]["params"]
    order = torch.cat([torch.randperm(len(prompts), generator=generator) for _ in range(0, B, len(prompts))])
    chosen = [prompts[n] for n in order[:B]]
    cond = base.encode(chosen)
    with phase("rollout", config):
        trajectory = rollout(base, schedule, cond, null, config.guidance, generator)
    ddpo, once = config.method == "ddpo", config.method == "nabla" and config.reward_at == "sample"
    with phase("reward gradient" if once else "rollout", config):
        score, covered, uphill = judge_samples(base, reward, trajectory.x[:, -1], chosen, config, generator,
                                               gradient=once)
    sampled, advantage = {"reward": score.mean().item(), "coverage": covered.mean().item()}, None
    if ddpo:
        everyone = [(score.tolist(), chosen)] * world
        if world > 1:
            torch.distributed.all_gather_object(everyone, (score.tolist(), chosen))
        scores, asked = ([item for part in parts for item in part] for parts in zip(*everyone))
        advantage = advantages(scores, asked, history)[rank * B:(rank + 1) * B].to(score)
    eps_old = trajectory.eps if config.branch == "guided" or ddpo else trajectory.eps_text
    pairs = torch.tensor([(b, i) for b in range(B) for i in pick_steps(config, generator)])
    pairs = pairs[torch.randperm(len(pairs), generator=generator)]
    shares = pairs.tensor_split(min(config.updates_per_epoch, len(pairs))) * config.updates_per_gradient
    judged, gradients = B if ddpo or once else 0, {}            # objects judged; g, which may be used again
    weight = match_weights(schedule, torch.arange(config.steps), config)[1]
    heard = weight >= config.skip_below * weight.max()          # (T,) the steps at which the reward counts

    def gather(part: Tensor) -> Transitions:
        b, i = part.unbind(1)
        return Transitions(
            i, trajectory.x[b, i], trajectory.x[b, i + 1], eps_old[b, i], cond[b], [chosen[n] for n in b],
            advantage[b] if ddpo else None, uphill[b] if once else None)

    for number, share in enumerate(shares):
        totals = {}
        for part in share.split(config.micro_batch):
            batch, i = gather(part), part[:, 1]
            if config.method == "nabla":
                key = tuple(part[0].tolist())       # all rounds have the same parts: their first names them
                if key not in gradients:
                    some, g, score = heard[i], torch.zeros_like(batch.x_s), torch.zeros(len(part))
                    if some.any():
                        with phase("reward gradient", config):
                            g[some], judgement = reward_gradient(base, reward, schedule, gather(part[some]),
                                                                 null, config, generator)
                        score[some] = judgement.cpu()
                    judged += 0 if once else int(some.sum())
                    gradients[key] = g, score
                g, score = gradients[key]
                with phase("matching", config):
                    match, reg = nabla_loss(base, schedule, batch, null, g, config)
                values = {"reward": score, "loss": match + config.lam * reg, "match": match, "reg": reg,
                          "reward_gradient": g.square().flatten(1).mean(1).sqrt()}
            else:
                judged += 0 if ddpo else len(part)
                with phase("loss", config):
                    values = {"loss": BASELINES[config.method](base, reward, schedule, batch, null, config,
                                                               generator)}
            for name, value in values.items():
                if not value.isfinite().all():
                    where = f"{name} at sampler step {i[~value.isfinite().cpu()][0]}"
                    stop_diverged(where, epoch, number, config)
                if name != "reward":
                    totals[name] = totals.get(name, 0) + value.detach().sum().item() / len(share)
            with phase("backward", config):
                (values["loss"].sum() / len(share)).backward()
        if world > 1:
            for parameter in parameters:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= world
        norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        if not all(parameter.isfinite().all() for parameter in parameters):
            stop_diverged("LoRA weights after the step", epoch, number, config)
        optimizer.zero_grad()
        yield {"epoch": epoch, **sampled, "judged": judged * world, **totals, "grad_norm": norm.item()}
        judged = 0


SECONDS: dict[str, float] = {}      # by phase of train_epoch, with --dry-run


@contextlib.contextmanager
def phase(name: str, config: Config) -> Iterator[None]:
    """Adds the time that its body takes to SECONDS, in a dry run; else does nothing."""
    def now() -> float:
        if config.dry_run and torch.device(config.device).type == "cuda":
            torch.cuda.synchronize(config.device)
        return time.perf_counter()

    begun = now()
    yield
    if config.dry_run:
        SECONDS[name] = SECONDS.get(name, 0) + now() - begun


def dry_run(base: DiffSplat, reward: Reward, schedule: NoiseSchedule, prompts: list[str], null: Cond,
            config: Config) -> dict:
    """One epoch of `train_epoch`, and what it cost; of big bases on a CPU one object and one transition."""
    import resource
    on_gpu = torch.device(config.device).type == "cuda"
    if not on_gpu and config.base != "shapes":
        config = dataclasses.replace(config, batch_size=1, fraction=1 / config.steps, updates_per_epoch=1)
    base.net = add_lora(base.net, config.lora_rank, config.seed)
    trained = [weight for weight in base.net.parameters() if weight.requires_grad]
    SECONDS.clear()
    begun, optimizer = time.perf_counter(), torch.optim.AdamW(trained, lr=config.lr)
    rows = list(train_epoch(base, reward, schedule, prompts, null, optimizer, config, 0, 0, 1, {}))
    result = {"device": torch.cuda.get_device_name(config.device) if on_gpu else "CPU",
              "objects": config.batch_size, "updates": len(rows), "judged": sum(r["judged"] for r in rows),
              "parameters": {"denoiser": sum(w.numel() for w in base.net.parameters() if not w.requires_grad),
                             "VAE": sum(weight.numel() for weight in base.vae.parameters()),
                             "LoRA, trained": sum(weight.numel() for weight in trained)},
              "seconds": SECONDS | {"all": time.perf_counter() - begun},
              "peak_GB": torch.cuda.max_memory_allocated(config.device) / 1e9 if on_gpu else
                         resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}              # of kilobytes
    print(json.dumps(result, indent=1))
    return result


def stop_diverged(what: str, epoch: int, update: int, config: Config) -> None:
    """Say what went wrong and what is left."""
    state = Path(config.out, "checkpoint/state.pt")
    left = f"the last good checkpoint is {state}" if state.is_file() else "there is no checkpoint yet"
    raise UserError(f"not finite: the {what} (epoch {epoch}, update {update}); {left}; "
                    "try a smaller --lr or --beta")


# Only these may differ between a run and its continuation (of prompts only the files' names, not the words).
FREE_ON_RESUME = {"resume", "epochs", "out", "run", "device", "row", "dry_run", "backend", "micro_batch",
                  "checkpoint_net", "checkpoint_scorer", "prompts", "test_prompts"}


def open_run(config: Config, prompts: str) -> tuple[Config, dict | None]:
    """Check that the folder is ours to write to; `prompts` is the digest of the prompt lists. Returns the
    config, in which None now means what the run had, and the checkpoint to go on from, or None.
    """
    out = Path(config.out)
    checkpoint = out / "checkpoint/state.pt"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if not checkpoint.is_file():
        if config.resume:
            raise UserError(f"--resume: there is no checkpoint in {out}; leave --resume out to begin")
        if out.is_dir() and not (out / "config.json").is_file() and any(out.iterdir()):
            raise UserError(f"{out} is not empty and holds no run; name another folder with --out")
        return config, None
    if not config.resume:
        raise UserError(f"{out} already holds a run; go on with --resume, or begin another with --out")
    theirs = dataclasses.asdict(run_config(out))
    unset = [name for name in theirs.keys() - FREE_ON_RESUME if getattr(config, name) is None]
    config = dataclasses.replace(config, **{name: theirs[name] for name in unset})
    for name, ours in dataclasses.asdict(config).items():
        if name not in FREE_ON_RESUME and theirs[name] != ours:
            raise UserError(f"{out} belongs to a run with other settings ({name} was {theirs[name]}, "
                            f"now {ours}); name another folder with --out")
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        epoch, same = state["epoch"], state["prompts"] == prompts
    except Exception as error:
        raise UserError(f"{checkpoint} cannot be read ({type(error).__name__}); name another folder with "
                        "--out, what is in this one can still be used with --run") from None
    if not same:
        raise UserError(f"the prompts are not those {out} began with, or the number of processes is not; "
                        "restore them or name another --out")
    if epoch > config.epochs:
        raise UserError(f"{out} has {epoch} epochs already; give --epochs {epoch} or more")
    return config, state


def run_config(folder: str | Path) -> Config:
    """The settings of a run, from its config.json; `run` is that folder."""
    path = Path(folder) / "config.json"
    try:
        theirs = {"reward_at": "step"} | json.loads(path.read_text())["config"]     # (older runs)
        return Config(**theirs | {"run": str(folder), "resume": False})
    except OSError:
        raise UserError(f"--run {folder}: there is no run in that folder") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); is it whole?") from None


# What a prompt's score depends on.
SCORED_WITH = ("base", "weights", "reward", "scorer", "angle_mask", "sampler", "steps", "guidance", "views",
               "view_size", "elevation_range", "azimuth_range", "eval_batch")


@torch.no_grad()
def filter_prompts(base: DiffSplat, reward: Reward, schedule: NoiseSchedule, prompts: list[str], null: Cond,
                   config: Config, rank: int = 0, world: int = 1) -> list[str]:
    """The prompts without the share `min_quantile` of them on which the untouched base scores lowest.

    One object each; processes share the work. Scores are kept for all runs with this base and reward.
    """
    if not config.min_quantile:
        return prompts
    from tqdm import tqdm
    weights = Path(config.weights or HERE / "support/shapes.safetensors")
    files = {weights, *weights.rglob("*"), *map(Path, re.findall(r"[^,=\s][^,=]*\.py(?=:)", config.reward))}
    stamps = sorted((str(file), file.stat().st_mtime_ns) for file in files if file.is_file())
    what = [getattr(config, name) for name in SCORED_WITH] + [prompts, world, stamps]
    key = hashlib.sha256(repr(what).encode()).hexdigest()
    path, scores = cache_folder("scores") / f"{key}-{rank}.json", {}
    with contextlib.suppress(OSError, ValueError):
        scores = json.loads(path.read_text())
    different = [*dict.fromkeys(prompts)]
    mine = range(0, len(different), config.eval_batch)[rank::world]
    for n in tqdm(mine, "scoring the prompts", leave=False, disable=rank > 0):
        part, generator = different[n:n + config.eval_batch], seeded(n)
        if part[0] not in scores:
            x0 = rollout(base, schedule, base.encode(part), null, config.guidance, generator).x[:, -1]
            score, _ = judge(base, reward, x0, part, config, generator)
            scores |= zip(part, score.nan_to_num(-math.inf).tolist())
            write_atomic(path, json.dumps(scores))
    if world > 1:
        shares = [scores] * world
        torch.distributed.all_gather_object(shares, scores)
        scores = dict(item for share in shares for item in share.items())
    lowest = {*sorted(different, key=scores.get)[:int(config.min_quantile * len(different))]}
    return [prompt for prompt in prompts if prompt not in lowest]


def save_checkpoint(base: DiffSplat, optimizer: torch.optim.Optimizer, rows: list[dict], epoch: int,
                    prompts: str, history: dict, config: Config) -> None:
    """All that resume needs, the log, and the LoRA in peft's format; each file is replaced in one go."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save
    out = Path(config.out)
    lora = {name: value.cpu().contiguous() for name, value in get_peft_model_state_dict(base.net).items()}
    state = {"epoch": epoch, "prompts": prompts, "rows": rows, "lora": lora,
             "history": history, "optimizer": optimizer.state_dict()}
    write_atomic(out / "lora/adapter_model.safetensors", save(lora))
    about = {key: sorted(value) if isinstance(value, set) else value
             for key, value in base.net.peft_config["default"].to_dict().items()}
    write_atomic(out / "lora/adapter_config.json", json.dumps(about, indent=1, default=str))
    lines = [",".join(rows[0]), *(",".join(f"{value:.6g}" for value in row.values()) for row in rows)]
    write_atomic(out / "log.csv", "\n".join(lines) + "\n")
    write_atomic(out / "checkpoint/state.pt", to_bytes(lambda file: torch.save(state, file)))  # trusted: last


def train(config: Config) -> dict:
    """Fine-tune, measure before and after, and leave everything in the output folder. Returns the summary."""
    from peft import set_peft_model_state_dict
    from tqdm import tqdm
    started = time.perf_counter()
    config, rank, world = start_processes(resolve(config))
    few = config.last_step == "always" and pick_steps(config, seeded(0)) == [config.steps - 1]
    if config.method == "nabla" and config.skip_below and few:
        raise UserError("only the last step would be trained, where no reward is heard; raise --fraction")
    prompts, test_prompts = load_prompts(config.prompts), load_prompts(config.test_prompts)
    digest = hashlib.sha256(repr((prompts, test_prompts, world)).encode()).hexdigest()
    config, state = (config, None) if config.dry_run else open_run(config, digest)
    test_prompts = test_prompts[:config.eval_prompts]
    base = load_base(config, config.device)
    reward = load_reward(config.reward, base, config.device, config)
    base.prepare([*prompts, *test_prompts, ""])
    null = base.encode([""])
    schedule = NoiseSchedule.from_diffusers(config.sampler, config.steps, **base.betas)
    config = dataclasses.replace(config, guidance=config.guidance or base.guidance)
    blank = torch.ones(1, 1, 3, 16, 16, device=base.device, requires_grad=True)
    reward(Render(blank, *(blank[:, :, :1],) * 3, blank), prompts[:1])  # cannot be trained? found before work
    if config.dry_run:
        return dry_run(base, reward, schedule, prompts, null, config)
    out, quiet = Path(config.out), rank > 0
    features = None if quiet else metrics.load_features(base.tower, config.device)
    if not quiet:
        about = report.describe(dataclasses.asdict(config), reward.title)
        print(report.plan(about, world, len(pick_steps(config, seeded(0))), len(prompts), len(test_prompts),
                          state and state["epoch"]))
        write_atomic(out / "config.json", json.dumps(about, indent=1))
        for name in () if state else ("r2d3.py", "kernels/*.py", "support/*.py"):
            for source in HERE.glob(name):
                write_atomic(out / "source" / source.relative_to(HERE), source.read_text())

    prompts = filter_prompts(base, reward, schedule, prompts, null, config, rank, world)

    def base_measurement(name: str, seed: int) -> Measurement | None:       # made once, read again on resume
        path = out / f"checkpoint/{name}.pt"
        if quiet:
            return None
        with contextlib.suppress(Exception):
            if state:
                return Measurement(**torch.load(path, weights_only=True))
        measured = measure(base, reward, features, schedule, test_prompts, config, seed, name)
        write_atomic(path, to_bytes(lambda file: torch.save(measured._asdict(), file)))
        return measured

    before = base_measurement("before", config.seed)
    other = base_measurement("before, other seeds", config.seed + 1)
    base.net = add_lora(base.net, config.lora_rank, config.seed)
    weights = [weight for weight in base.net.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay)
    rows, first, history = [], 0, {}
    if state:
        set_peft_model_state_dict(base.net, state["lora"])
        optimizer.load_state_dict(state["optimizer"])
        rows, first, history = state["rows"], state["epoch"], state.get("history", {})

    total = config.epochs * config.updates_per_epoch * config.updates_per_gradient
    with tqdm(total=total, initial=len(rows), desc="fine-tuning", disable=quiet) as updates:
        for epoch in range(first, config.epochs):
            begun = time.perf_counter()
            for row in train_epoch(base, reward, schedule, prompts, null, optimizer, config, epoch, rank,
                                   world, history):
                row["judged"] += rows[-1]["judged"] if rows else 0
                rows.append({"update": len(rows) + 1, **row, "seconds": time.perf_counter() - begun})
                begun = time.perf_counter()
                updates.update()
                updates.set_postfix(reward=f"{row['reward']:.3f}", coverage=f"{row['coverage']:.3f}")
            if not quiet:
                save_checkpoint(base, optimizer, rows, epoch + 1, digest, history, config)
    if quiet:
        return {}
    after = measure(base, reward, features, schedule, test_prompts, config, config.seed, "after")
    summary = {"scorer": reward.title, "base": config.base, "method": config.method, "epochs": config.epochs,
               "updates": len(rows), "judged": rows[-1]["judged"], "features": features.title,
               **metrics.compare(before, after, other), "seconds": time.perf_counter() - started}
    write_report(base, test_prompts, before, after, rows, summary, config, out)
    metrics.print_summary(summary)
    print(f"open {out / 'report.html'}, or make new objects: "
          f"python r2d3.py sample --prompts \"{test_prompts[0]}\" --run {out}")
    return summary


# -----------------------------------------------------------------------------------------------------------
# 12. Evaluate
# The paper's protocol: prompts that were never trained on, the same seeds and views before and after.
# Needs: sections 3 to 8.
# -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(base: DiffSplat, reward: Reward, features: Features, schedule: NoiseSchedule, prompts: list[str],
            config: Config, seed: int, label: str) -> Measurement:
    """Sample every prompt `samples_per_prompt` times and judge the objects. The same seed, the same noise."""
    from tqdm import tqdm
    P, S = len(prompts), config.samples_per_prompt
    every = [n for n in range(P) for _ in range(S)]
    texts, null, parts = features.text(prompts), base.encode([""]), []
    chunks = [every[n:n + config.eval_batch] for n in range(0, P * S, config.eval_batch)]
    for number, rows in enumerate(chunks):
        named = [prompts[n] for n in rows]
        cond, generator = base.encode(named), seeded(seed, number)
        bar = partial(tqdm, desc=f"evaluating {label}, {number + 1} of {len(chunks)}", leave=False)
        x0 = rollout(base, schedule, cond, null, config.guidance, generator, bar).x[:, -1]
        pictures = render(base.decode(x0), *input_cameras(len(rows)), config.eval_size, config.backend)
        images = pictures.image.flatten(0, 1)
        seen = {see: see(images).unflatten(0, (len(rows), -1))
                for see in {features.image, features.diversity, features.fid}}
        similar = seen[features.image].mean(1) @ texts.T    # (rows, P)
        own = torch.tensor(rows, device=similar.device)
        parts.append((reward(pictures, named).mean(1), similar.gather(1, own[:, None])[:, 0],
                      (similar.argmax(1) == own).float(), pictures.alpha.mean((1, 2, 3, 4)),
                      depth_normal_consistency(pictures, named).mean(1), seen[features.diversity],
                      seen[features.fid], x0))
    return Measurement(*(torch.cat(tensors).unflatten(0, (P, S)).cpu() for tensors in zip(*parts)))


@torch.no_grad()
def turntable(gaussians: Gaussians, size: int = 128, frames: int = 36, backend: str | None = None) -> bytes:
    """A .gif in which all objects, side by side, turn once around."""
    B, pictures = len(gaussians.means), []
    for azimuth in range(0, 360, 360 // frames):
        c2w = orbit(20.0, float(azimuth)).expand(B, 1, 4, 4)
        views = render(gaussians, c2w, intrinsics(B, 1), size, backend).image           # (B, 1, 3, H, W)
        pictures.append(report.picture_rows(views.transpose(0, 1)))
    return to_bytes(lambda file: pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:],
                                                  duration=80, loop=0))


def write_report(base: DiffSplat, prompts: list[str], before: Measurement, after: Measurement,
                 rows: list[dict], summary: dict, config: Config, out: Path) -> None:
    """summary.json, samples/, curves.png and report.html: one page with all of it, that needs no network."""
    shown = [n * len(prompts) // 12 for n in range(12)] if len(prompts) > 12 else [*range(len(prompts))]
    cameras = orbit(20.0, 30.0).expand(len(shown), 1, 4, 4), intrinsics(len(shown), 1)
    with torch.no_grad():
        objects = [base.decode(m.latents[shown, 0].to(base.device)) for m in (before, after)]
        pictures = [render(one, *cameras, 144, config.backend).image[:, 0].cpu() for one in objects]
    both = Gaussians(*(torch.cat([a[:4], b[:4]]) for a, b in zip(*objects)))
    write_atomic(out / "summary.json", json.dumps(summary, indent=1))
    for name, content in report.files(*pictures, [prompts[n] for n in shown],
                                      turntable(both, backend=config.backend), rows, summary,
                                      f"{config.reward} on {config.base}",
                                      json.dumps(dataclasses.asdict(config), indent=1)).items():
        write_atomic(out / name, content)


# -----------------------------------------------------------------------------------------------------------
# 13. Command line
# -----------------------------------------------------------------------------------------------------------


def load_run(config: Config) -> tuple[Config, DiffSplat, NoiseSchedule]:
    """The base, with the LoRA of `config.run` or `config.lora` on it if that is set."""
    config = resolve(config)
    if config.run and not (Path(config.run) / "lora/adapter_model.safetensors").is_file():
        raise UserError(f"--run {config.run}: there is no finished epoch of a run in that folder")
    if config.lora and not Path(config.lora).exists():
        raise UserError(f"--lora {config.lora}: there is no such file or folder")
    base = load_base(config, config.device)
    if config.lora or config.run:
        base.net = load_lora(base.net, Path(config.lora or f"{config.run}/lora")).to(base.device).eval()
    config = dataclasses.replace(config, guidance=config.guidance or base.guidance)
    return config, base, NoiseSchedule.from_diffusers(config.sampler, config.steps, **base.betas)


@torch.no_grad()
def sample(config: Config) -> list[Path]:
    """Make objects: for each a .ply for splat viewers, a .png of the four views and a turntable .gif."""
    from tqdm import tqdm
    if not config.prompts:
        raise UserError("sample needs --prompts, a text file or a prompt; try --prompts \"a red cube\"")
    prompts = load_prompts(config.prompts)
    folder = Path(config.out or Path(config.run or "runs") / "samples")
    config, base, schedule = load_run(config)
    written = []
    base.prepare([*prompts, ""])
    for n, prompt in enumerate(prompts):
        cond = base.encode([prompt] * config.samples_per_prompt)
        x0 = rollout(base, schedule, cond, base.encode([""]), config.guidance,
                     seeded(config.seed, n), partial(tqdm, desc=prompt, leave=False)).x[:, -1]
        gaussians = base.decode(x0)
        pictures = render(gaussians, *input_cameras(len(x0)), 256, config.backend).image
        for s in range(len(x0)):
            name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:80]
            path = folder / f"{name}-seed{config.seed}-{s}.ply"
            if path in written:                                 # the same words twice in one list
                path = path.with_stem(f"{path.stem}-prompt{n + 1}")
            one = Gaussians(*(tensor[s:s + 1] for tensor in gaussians))
            save_ply(path, one)
            write_atomic(path.with_suffix(".png"), report.png(report.picture_rows(pictures[s:s + 1])))
            write_atomic(path.with_suffix(".gif"), turntable(one, 256, backend=config.backend))
            print(path)
            written.append(path)
    return written


def evaluate(config: Config) -> dict:
    """The paper's protocol: 60 unseen prompts x 32 objects, the run beside the base. Returns the summary."""
    started, given, run = time.perf_counter(), config.out, config.run
    if given and (Path(given) / "checkpoint").is_dir():
        raise UserError(f"--out {given} is a run, whose report would be lost; name another folder")
    if config.base_only:
        config = dataclasses.replace(config, run=None, lora=None)
    samples = 32 if config.samples_per_prompt is None else config.samples_per_prompt
    config, base, schedule = load_run(dataclasses.replace(config, samples_per_prompt=samples))
    reward = load_reward(config.reward, base, config.device, config)
    features = metrics.load_features(base.tower, config.device)
    prompts = load_prompts(config.test_prompts)[:config.eval_prompts]
    base.prepare([*prompts, ""])
    report.add_row(config.row)                                  # cannot be written? found before work
    common = base, reward, features, schedule, prompts, config
    tuned = bool(config.run or config.lora)
    after = measure(*common, config.seed, "the fine-tuned model" if tuned else "the base")
    with base.net.disable_adapter() if tuned else contextlib.nullcontext():
        before = measure(*common, config.seed, "the base") if tuned else after
        other = measure(*common, config.seed + 1, "the base once more, for FID")
    summary = {"scorer": reward.title, "base": config.base, "run": config.run or config.lora,
               "seed": config.seed, "features": features.title, **metrics.compare(before, after, other),
               "seconds": time.perf_counter() - started}
    named = "-" + "-".join(Path(config.lora).resolve().with_suffix("").parts[-2:]) if config.lora else ""
    place = f"{run}/evaluation{'-base' * config.base_only}" if run else f"{config.out}-evaluation"
    out = Path(given or place + named)
    write_report(base, prompts, before, after, [], summary, config, out)
    report.add_row(config.row, report.describe(dataclasses.asdict(config), reward.title) | summary)
    metrics.print_summary(summary)
    print(f"open {out / 'report.html'}")
    return summary


def parse(arguments: list[str]) -> tuple[Callable, Config]:
    """The command (train, sample or evaluate) and its Config; a mistake is a UserError."""
    import tyro
    commands = {"train": train, "sample": sample, "evaluate": evaluate}
    name = arguments.pop(0) if arguments and arguments[0] in commands else "train"
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            prog = "python r2d3.py [train | sample | evaluate]"
            read = partial(tyro.cli, Config, prog=prog, args=arguments)
            config = read()
            if config.run is not None and name != "train":      # what is not given is as it was in the run
                theirs = run_config(config.run)
                config = read(default=dataclasses.replace(theirs, out=None, prompts=None, device=None, seed=0,
                                                          samples_per_prompt=None, eval_prompts=None))
            not_for = {"train": "run lora row base_only", "evaluate": "resume dry_run prompts",
                       "sample": "resume dry_run row base_only"}
            for option in not_for[name].split():
                if getattr(config, option):
                    raise UserError(f"--{option.replace('_', '-')} is not for {name}; leave it out")
            return commands[name], config
    except SystemExit as stop:
        if stop.code == 0:                                      # --help
            raise
        text = message.getvalue().partition("\n")[2]           # without the title, then without the box
        text = re.split("Argument helptext|For full helptext", re.sub("[│─╰╯]|-{4,}", " ", text))[0]
        raise UserError(" ".join(text.split()).rstrip(".") + "; --help lists what there is") from None


def main() -> int:
    """Exit codes: 0 done, 2 the caller can mend it (one sentence on stderr), 130 stopped by Ctrl-C."""
    try:
        command, config = parse(sys.argv[1:])
        command(config)
        return 0
    except (UserError, OSError) as error:
        print(f"\nr2d3: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("\nr2d3: out of memory; try a smaller --micro-batch or --eval-batch, --checkpoint-net or "
              "--checkpoint-scorer", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nr2d3: stopped; with --resume a training goes on after its last epoch", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
