"""r2d3: align text-to-3D diffusion models with rewards that only see 2D renders, in one file.

This is the method of "Nabla-R2D3: Effective and Efficient 3D Diffusion Alignment with 2D Rewards"
(NeurIPS 2025, arXiv 2506.15684). A 3D-native diffusion model denoises the latent of an object; a reward judges
pictures of it. The method moves the score of every denoising step by a scaled gradient of the reward, which
samples from (prior x reward) instead of climbing the reward alone, and so keeps the prior and its diversity:

    for every epoch:
        draw prompts and sample trajectories x_T .. x_0 with the current model                 (rollout; E1-E3)
        pick some steps t -> s of every trajectory                                             (pick_transitions)
        for every update, for the transitions (x_t, x_s) of its share:
            x0  = one-step estimate of the clean latent from x_s                               (E1)
            g   = gradient of reward(render(decode(x0), random cameras)) with respect to x_s   (E7)
            res = -k (eps_theta(x_t) - eps_ref(x_t)) - beta w(s) g                             (E6)
            descend mean |res|^2 + lambda |eps_theta - eps_old|^2 in the LoRA weights          (E4, E5)

`eps_ref` is the same network with its LoRA switched off. The numbers E1-E7 are explained in the README ("The
mathematics"). The file reads from top to bottom; every section says what it needs, so that it can be lifted:

    1 constants and words    5 NoiseSchedule      9 the loss
    2 Config                 6 bases             11 train
    3 cameras                7 rewards           12 evaluate
    4 Gaussians              8 rollout           13 command line

Run it:   python r2d3.py --reward aesthetic                        # minutes on two CPU cores, no download
          python r2d3.py sample --prompts "a red cube" --run runs/shapes-aesthetic-seed0
          python r2d3.py evaluate --run runs/shapes-aesthetic-seed0
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from kernels import Render, gradient_matching, rasterize

# ---------------------------------------------------------------------------------------------------------------
# 1. Constants and words
# Letters in shape comments: B objects, V views, N Gaussians per object, M transitions in a micro-batch, T sampler
# steps, C h w one view of the latent, H W pixels, L words, D features. `i` is a place on the sampler's grid: step i
# goes from grid point i (noise level t) to grid point i + 1 (level s).
# ---------------------------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
FXFY = 1422.222 / 1024     # focal length in image widths, field of view 39.6 degrees (DiffSplat's Objaverse renders)
RADIUS = 1.4               # distance of the cameras from the origin (DiffSplat)
ELEVATION = 10.0           # degrees above the horizon (DiffSplat)
IMAGE_NOISE = 2e-3         # Gaussian noise on images before the reward (Nabla-R2D3's released code)
SH_C0 = 0.28209479177387814  # zeroth spherical harmonic, 1 / (2 sqrt(pi)): .ply files store (colour - 0.5) / SH_C0


class UserError(ValueError):
    """Something the caller can mend: printed as one sentence, exit code 2, no traceback."""


# ---------------------------------------------------------------------------------------------------------------
# 3. Cameras
# World: +y up; azimuth 0 looks from +z, 90 from +x. Cameras: OpenCV axes (x right, y down, z forward), matrices are
# camera-to-world, intrinsics fx fy cx cy are divided by the image size.
# Needs: nothing. Follows: DiffSplat's src/utils/geo_util.py, checked against its recorded output.
# ---------------------------------------------------------------------------------------------------------------


def orbit(elevation: Tensor | float, azimuth: Tensor | float, radius: Tensor | float = RADIUS) -> Tensor:
    """Camera-to-world matrices of cameras that look at the origin.

    elevation, azimuth in degrees (positive elevation: camera above), radius in world units; they broadcast.
    Returns (..., 4, 4), OpenCV axes.
    """
    tensors = [v if torch.is_tensor(v) else torch.tensor(float(v)) for v in (elevation, azimuth, radius)]
    elev, azim, rad = torch.broadcast_tensors(*tensors)
    elev, azim, zero = torch.deg2rad(elev), torch.deg2rad(azim), torch.zeros_like(rad)
    back = torch.stack([elev.cos() * azim.sin(), elev.sin(), elev.cos() * azim.cos()], -1)   # origin -> camera
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
    """The views of the reward: evenly spaced azimuths, one random offset and elevation per object (a fresh draw).

    Ranges are full widths in degrees, centred on azimuth offset 0 and on ELEVATION. With fewer than four views the
    first one starts at a random quarter turn, so that every side is seen. Returns c2w (B, V, 4, 4), fxfycxcy (B, V, 4).
    """
    u = torch.rand(num_objects, 2, generator=generator) - 0.5
    quarter = torch.randint(4, (num_objects, 1), generator=generator) if views < 4 else 0
    azimuth = 360 / views * torch.arange(views) + 90 * quarter + azimuth_range * u[:, :1]           # (B, V)
    return orbit(ELEVATION + elevation_range * u[:, 1:], azimuth), intrinsics(num_objects, views)


def plucker_rays(c2w: Tensor, fxfycxcy: Tensor, height: int, width: int, half_image_shift: bool = False) -> Tensor:
    """Pluecker coordinates of the pixels' rays: (B, V, 6, height, width) = [origin x direction, direction].

    `half_image_shift` reproduces the convention that the published DiffSplat weights were trained with: pixel
    positions run over [0.5, 1.5] of the image instead of its [0, 1], so the rays are off by half an image.
    """
    h, w = torch.arange(height, device=c2w.device), torch.arange(width, device=c2w.device)
    if half_image_shift:
        v, u = h / max(height - 1, 1) + 0.5, w / max(width - 1, 1) + 0.5
    else:
        v, u = (h + 0.5) / height, (w + 0.5) / width
    fx, fy, cx, cy = fxfycxcy[..., None, None].unbind(-3)                                           # (B, V, 1, 1)
    x = ((u - cx) / fx).expand(*c2w.shape[:2], height, width)
    y = ((v[:, None] - cy) / fy).expand_as(x)
    rays = torch.einsum("bvij,bvjhw->bvihw", c2w[..., :3, :3], torch.stack([x, y, torch.ones_like(x)], 2))
    rays = F.normalize(rays, dim=2)
    origin = c2w[..., :3, 3, None, None].expand_as(rays)
    return torch.cat([torch.cross(origin, rays, dim=2), rays], 2)


# ---------------------------------------------------------------------------------------------------------------
# 4. Gaussians
# Needs: sections 1, 3 and kernels.rasterize.
# ---------------------------------------------------------------------------------------------------------------


class Gaussians(NamedTuple):
    """Splats in world space, activated: scales are standard deviations, opacities and colours in [0, 1]."""

    means: Tensor      # (B, N, 3)
    scales: Tensor     # (B, N, 3)
    quats: Tensor      # (B, N, 4) wxyz; not normalised, as published (RaDe-GS does not either)
    opacities: Tensor  # (B, N)
    colors: Tensor     # (B, N, 3)


def splat_grid_to_gaussians(grid: Tensor, c2w: Tensor, fxfycxcy: Tensor,
                            scale_range: tuple[float, float] = (0.0005, 0.02), depth_scale: float = 1.0) -> Gaussians:
    """One Gaussian per pixel of 12-channel images in [-1, 1] (DiffSplat's representation of an object).

    grid (B, V, 12, H, W): colour 0:3, scale 3:6 (+1 is the smallest of `scale_range`), rotation 6:10 wxyz in world
    space, opacity 10, z-depth 11 relative to the camera's distance from the origin in units of `depth_scale`. Pixel
    (i, j) stands for the ray through (j / (W - 1), i / (H - 1)), as published. Returns N = V H W splats per object.
    """
    B, V, _, H, W = grid.shape
    if grid.shape[2] != 12:
        raise ValueError(f"grid: want (B, V, 12, H, W), got {tuple(grid.shape)}")
    channels = grid.permute(0, 1, 3, 4, 2)                                                          # (B, V, H, W, 12)
    rgb, scale, quats, opacity, depth = channels.split([3, 3, 4, 1, 1], -1)
    small = scale / 2 + 0.5
    scales = scale_range[0] * small + scale_range[1] * (1 - small)
    z = depth_scale * depth + c2w[..., :3, 3].norm(dim=-1)[..., None, None, None]
    y, x = torch.meshgrid(torch.linspace(0, 1, H), torch.linspace(0, 1, W), indexing="ij")
    fx, fy, cx, cy = fxfycxcy[..., None, None].unbind(-3)                                           # (B, V, 1, 1)
    rays = torch.stack([(x.to(grid) - cx) / fx, (y.to(grid) - cy) / fy, torch.ones_like(z[..., 0])], -1)
    means = torch.einsum("bvij,bvhwj->bvhwi", c2w[..., :3, :3], rays * z) + c2w[..., None, None, :3, 3]
    return Gaussians(means.flatten(1, 3), scales.flatten(1, 3), quats.flatten(1, 3),
                     (opacity / 2 + 0.5).flatten(1), (rgb / 2 + 0.5).flatten(1, 3))


def render(gaussians: Gaussians, c2w: Tensor, fxfycxcy: Tensor, size: int, backend: str | None = None) -> Render:
    """Square pictures on white of every object from its V cameras: image (B, V, 3, size, size) and the rest of Render."""
    g = gaussians
    return rasterize(g.means, g.quats, g.scales, g.opacities, g.colors, c2w.to(g.means), fxfycxcy.to(g.means),
                     size, size, backend=backend)


PLY_FIELDS = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity",
              "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]


def save_ply(path: Path, gaussians: Gaussians, index: int = 0) -> int:
    """Write one object as the .ply that splat viewers read (INRIA layout: log scales, logit opacities, SH colours).

    Splats that a picture cannot show (opacity below 1/255) are left out. Returns how many were written.
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


def write_atomic(path: Path, content: bytes | str) -> None:
    """All of the new file or all of the old one, also after kill -9, on a full disk or in a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------
# 5. NoiseSchedule
# Every step of the sampler is one Gaussian transition, and this class is all that the method knows of diffusion.
# Needs: nothing. Timesteps and noise levels come from diffusers' schedulers.
#     x_t = alpha_t x0 + sigma_t eps,  h = log(alpha_s / sigma_s) - log(alpha_t / sigma_t),  e^-h = the ratio below
# ---------------------------------------------------------------------------------------------------------------


class NoiseSchedule:
    """Noise levels of a sampler with T steps: timesteps (T,), alpha (T + 1,), sigma (T + 1,).

    First-order SDE-DPM-Solver++ and DDIM with eta = 1 are the same transition on different grids. Every method takes
    a grid point i: an int, or one per sample as a LongTensor (M,). Tables are float64 and stay on the CPU.
    """

    def __init__(self, timesteps: Tensor, alpha: Tensor, sigma: Tensor):
        self.timesteps = timesteps.long().cpu()
        self.alpha, self.sigma = alpha.double().cpu(), sigma.double().cpu()
        if not len(alpha) == len(sigma) == len(timesteps) + 1:
            raise ValueError(f"want T timesteps and T + 1 levels, got {len(timesteps)}, {len(alpha)}, {len(sigma)}")

    def __len__(self) -> int:
        return len(self.timesteps)

    @classmethod
    def from_diffusers(cls, sampler: str, steps: int, **betas) -> NoiseSchedule:
        """The grid of "dpm" (sde-dpmsolver++ of order 1, as Nabla-R2D3 samples) or "ddim", with diffusers' numbers.

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
        squared = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]])
        return cls(scheduler.timesteps, squared.double().sqrt(), (1 - squared.double()).sqrt())

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

    def k(self, i: int | Tensor) -> Tensor:
        """How the score of step i depends on the prediction: score = const - k eps (E6)."""
        _, c_0, std = self.step(i)
        return c_0 * self.sigma[i] / (self.alpha[i] * std ** 2)


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """A scalar, or one value per sample (M,), shaped to broadcast against x (M, ...)."""
    return value.to(x).reshape(-1, *[1] * (x.dim() - 1))


# ---------------------------------------------------------------------------------------------------------------
# 6. Bases
# A base is a frozen 3D diffusion model. It offers encode(prompts) -> Cond, predict(x, t, cond) -> eps,
# decode(x0) -> Gaussians, and: betas, latent_shape, guidance, net (the module that LoRA goes on), device.
# Needs: sections 3 and 4; the networks are stock diffusers.
# ---------------------------------------------------------------------------------------------------------------


class Cond(NamedTuple):
    """Encoded prompts: embeds (B, L, D); mask (B, L), true where there is a word, or None."""

    embeds: Tensor
    mask: Tensor | None

    def __getitem__(self, rows) -> Cond:                                            # cond[rows] picks objects
        return Cond(self.embeds[rows], None if self.mask is None else self.mask[rows])

    def expand(self, rows: int) -> Cond:
        """A Cond of one prompt, repeated."""
        return self[torch.zeros(rows, dtype=torch.long)]


class MultiViewAttnProcessor:
    """Self-attention over all views of an object: (b v) n d -> b (v n) d. The rest of the block stays per view."""

    def __init__(self, views: int):
        self.views = views

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states=None, attention_mask=None, **kwargs) -> Tensor:
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
    """DiffSplat: multi-view latents of splat grids, denoised by an image diffusion network that sees all views at once.

    `net` predicts from [latent, Pluecker rays] of the four input cameras; `vae` has 12 channels, one splat grid per
    view. `shapes` is this class with small weights. Follows chenguolin/DiffSplat (checked on its recorded output).
    """

    views = 4

    def __init__(self, net: nn.Module, vae: nn.Module, encode: Callable[[list[str]], Cond], *, image_size: int,
                 prediction_type: str, guidance: float, latent_mean: Tensor, latent_std: Tensor, betas: dict,
                 scale_range: tuple[float, float], depth_scale: float, half_image_shift: bool,
                 device: torch.device | str):
        self.device = torch.device(device)
        self.net = net.to(self.device).eval().requires_grad_(False)
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        join_views(self.net, self.views)
        self.encode, self.guidance, self.prediction_type, self.betas = encode, guidance, prediction_type, betas
        self.scale_range, self.depth_scale = scale_range, depth_scale
        channels = vae.config.latent_channels
        size = image_size // 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_shape = (self.views, channels, size, size)
        self.latent_mean = latent_mean.to(self.device).reshape(-1, 1, 1)            # per channel, or one for all
        self.latent_std = latent_std.to(self.device).reshape(-1, 1, 1)
        self.c2w, self.fxfycxcy = input_cameras(1, self.device)
        rays = plucker_rays(self.c2w, self.fxfycxcy, image_size, image_size, half_image_shift)[0]
        self.plucker = F.interpolate(rays, (size, size), mode="bilinear")           # (V, 6, h, w)
        from diffusers import DDIMScheduler
        self.alpha_by_t = DDIMScheduler(**betas).alphas_cumprod.sqrt().to(self.device)                  # (1000,)

    def predict(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Noise in x (B, V, C, h, w) at timesteps t (B,): eps like x, whatever the network itself predicts."""
        B, V, C = x.shape[:3]
        dtype = next(self.net.parameters()).dtype
        t = t.to(self.device)
        rows = torch.cat([x, self.plucker.expand(B, -1, -1, -1, -1)], 2).flatten(0, 1).to(dtype)     # ((b v), C+6, h, w)
        embeds = cond.embeds.to(self.device, dtype).repeat_interleave(V, 0)                          # ((b v), L, D)
        mask = None if cond.mask is None else cond.mask.to(self.device).repeat_interleave(V, 0)
        extra = {"resolution": None, "aspect_ratio": None}      # PixArt-alpha's size conditions, unused since Sigma
        out = self.net(rows, encoder_hidden_states=embeds, timestep=t.repeat_interleave(V), return_dict=False,
                       encoder_attention_mask=mask, added_cond_kwargs=extra)[0]
        out = out[:, :C].unflatten(0, (B, V)).float()           # PixArt's second half is a variance that nobody uses
        if self.prediction_type == "epsilon":
            return out
        alpha = per_sample(self.alpha_by_t[t], x)               # v = alpha eps - sigma x0 and x = alpha x0 + sigma eps
        return alpha * out + (1 - alpha ** 2).sqrt() * x

    def decode(self, x0: Tensor) -> Gaussians:
        """Clean latents (B, V, C, h, w) -> B V H W splats, differentiable."""
        z = (x0 * self.latent_std + self.latent_mean).flatten(0, 1)
        grid = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float().clamp(-1, 1)
        B = x0.shape[0]
        return splat_grid_to_gaussians(grid.unflatten(0, (B, -1)), self.c2w.expand(B, -1, -1, -1),
                                       self.fxfycxcy.expand(B, -1, -1), self.scale_range, self.depth_scale)


class WordTable(nn.Module):
    """The text encoder of `shapes`: a learned vector per word plus one per position."""

    def __init__(self, vocab: list[str], dim: int, max_length: int):
        super().__init__()
        self.index = {word: n for n, word in enumerate(["", *vocab])}               # 0 is padding
        self.words, self.positions = nn.Embedding(len(self.index), dim), nn.Embedding(max_length, dim)

    def tokens(self, prompts: list[str]) -> Tensor:
        """(B, max_length) word numbers, 0 where there is none. Unknown words and too long prompts are the user's errors."""
        out = torch.zeros(len(prompts), self.positions.num_embeddings, dtype=torch.long)
        for row, prompt in zip(out, prompts):
            words = prompt.lower().split()
            unknown = [word for word in words if word not in self.index]
            if unknown:
                raise UserError(f"the base 'shapes' does not know the word {unknown[0]!r} in the prompt {prompt!r}; "
                                f"it knows: {' '.join(w for w in self.index if w)}")
            if len(words) > len(row):
                raise UserError(f"the prompt {prompt!r} has {len(words)} words; the base 'shapes' takes {len(row)}")
            row[:len(words)] = torch.tensor([self.index[word] for word in words], dtype=torch.long)
        return out.to(self.words.weight.device)

    def forward(self, prompts: list[str]) -> Cond:
        tokens = self.tokens(prompts)
        mask = tokens > 0
        mask[:, 0] = True                                       # the null prompt "" keeps one pad token: softmax needs one
        return Cond(self.words(tokens) + self.positions.weight, mask)


class ImageTextTower(nn.Module):
    """A small CLIP for the world of `shapes`: pictures and prompts to unit vectors whose product is their agreement."""

    def __init__(self, vocab: list[str], max_length: int, dim: int = 64, width: int = 32):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width]
        self.cnn = nn.Sequential(*(layer for a, b in zip(widths, widths[1:]) for layer in (
            nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU(),
            nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU())))
        self.image_head = nn.Linear(widths[-1] * 16, dim)       # 64 px / 2^4 = a 4 x 4 map
        self.table = WordTable(vocab, dim, max_length)
        self.mixer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def image(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, D), unit length."""
        images = F.interpolate(images, (64, 64), mode="bilinear", antialias=True) if images.shape[-1] != 64 else images
        return F.normalize(self.image_head(self.cnn(images * 2 - 1).flatten(1)), dim=-1)

    def text(self, prompts: list[str]) -> Tensor:
        """N prompts -> (N, D), unit length."""
        embeds, mask = self.table(prompts)
        mixed = self.mixer(embeds, src_key_padding_mask=~mask) * mask[..., None]
        return F.normalize(mixed.sum(1) / mask.sum(1, keepdim=True), dim=-1)


class NormalEstimator(nn.Module):
    """A small 2D normal estimator for the world of `shapes`: pictures to unit normals in camera space."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.down = nn.ModuleList(nn.Sequential(nn.Conv2d(a, b, 3, stride=s, padding=1), nn.GroupNorm(4, b), nn.SiLU(),
                                                nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(4, b), nn.SiLU())
                                  for a, b, s in ((3, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)))
        self.up = nn.ModuleList(nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(4, b), nn.SiLU())
                                for a, b in ((6 * width, 2 * width), (3 * width, width)))
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, 3, H, W), unit length."""
        maps = [images * 2 - 1]
        for block in self.down:
            maps.append(block(maps[-1]))
        x = maps.pop()
        for block in self.up:
            skip = maps.pop()
            x = block(torch.cat([F.interpolate(x, skip.shape[-2:], mode="bilinear"), skip], 1))
        return F.normalize(self.head(x), dim=1)

