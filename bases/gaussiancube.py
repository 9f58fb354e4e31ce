"""GaussianCube (arXiv 2403.19655) as a plug-in: its base, its 3D U-Net, which no library has, and its published files.

    python r2d3.py --base gaussiancube --weights random --reward dnc cost

It is written as a base of your own would be: `load(config, device)` returns an r2d3.Base, and PRESETS has the settings
that it wants. The network is an ADM-type U-Net (Dhariwal and Nichol, arXiv
2105.05233) on a grid of Gaussians, told of text twice: pooled beside the time, and as further keys and values of every
attention. Names of attributes are those of the published state dict, so that it loads strictly.
Follows github.com/GaussianCube/GaussianCube (arXiv 2403.19655): model/unet.py, model/nn.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import r2d3
from support import UserError, published, to_bytes, write_atomic
from support.export import SH_C0, link
from support.presets import PAPER

PRESETS = PAPER | {"": PAPER[""] | {"steps": 50}}
# The text features that it was trained with were float32.
published.register("gaussiancube", {"text": "openai/clip-vit-large-patch14", "length": 77, "text_dim": 768,
                                    "download": "3 GB", "text_precision": "float32"})

REPO = "BwZhang/GaussianCube-Objaverse"
FILES = {"net": "objaverse_ckpt.pt", "mean": "mean.pt", "std": "std.pt"}     # 1.36 GB and twice 4 MB, in v1.1/
SIZE = 32           # voxels along a side of the published grid
# What configs/objaverse_text_cond.yml says; the hub has no configuration file.
CONFIG = {"channels": 14, "width": 128, "multipliers": [1, 2, 3, 4], "res_blocks": 3, "attention_levels": [2, 3],
          "head_width": 64, "text_width": 768, "embedding_width": 512, "pooling_heads": 64}


class GaussianCube(r2d3.Base):
    """GaussianCube (arXiv 2403.19655): a grid of G^3 r2d3.Gaussians, denoised by a 3D U-Net that predicts x0.

    Channels of a latent (14, G, G, G), standardised per voxel by `mean` and `std`: offset from the voxel's
    centre, colour (spherical harmonic of degree 0), opacity, scales, quaternion wxyz; z is up there.
    """

    lora_targets = ["qkv", "encoder_kv", "proj_out", "out.2"]   # all attention layers, and the output layer
    guidance, elevation, eval_size = 3.5, 30.0, 512             # its authors look from 30 degrees above
    betas = {"beta_schedule": "squaredcos_cap_v2"}
    size = r2d3.RADIUS / 2                   # of the grid's cube in our world: its authors' cameras are 2 away
    # It was trained through a rasteriser that widens splats by 0.3 square pixels, with a focal length of 560
    # pixels; ours is r2d3.FXFY sides: the same blur, in pictures of any size.
    dilation = 0.3 * (r2d3.FXFY / 560) ** 2

    def __init__(self, net: nn.Module, text: Callable,
                 mean: Tensor, std: Tensor, device: torch.device | str):
        self.device = torch.device(device)
        self.net = net.to(self.device).eval().requires_grad_(False)
        self.text, self.mean, self.std = text, mean.to(self.device), std.to(self.device)
        self.latent_shape, axis = tuple(mean.shape), torch.linspace(-0.5, 0.5, mean.shape[-1])
        self.grid = torch.cartesian_prod(axis, axis, axis).to(self.device)                  # (G^3, 3)
        from diffusers import DDIMScheduler
        squared = DDIMScheduler(**self.betas).alphas_cumprod.double()   # sigma of t = 0 would lose digits
        self.alpha_by_t, self.sigma_by_t = squared.sqrt(), (1 - squared).sqrt()             # (1000,)

    def encode(self, prompts: list[str]) -> r2d3.Cond:
        """CLIP's words; the unconditional half is zeros, as in training, not the empty prompt's."""
        named = torch.tensor([float(prompt != "") for prompt in prompts], device=self.device)
        return r2d3.Cond(named[:, None, None] * self.text(prompts)[0].float(), None)

    def prepare(self, prompts: list[str]) -> None:
        """Encode all prompts of a run before it begins."""
        self.text.prepare(prompts)

    def schedule(self, sampler: str, steps: int) -> r2d3.NoiseSchedule:
        """dpm starts at log(alpha / sigma) = -5.1, as published: below it, x0 says next to nothing of eps."""
        cut = {"lambda_min_clipped": -5.1} if sampler == "dpm" else {}
        return r2d3.NoiseSchedule.from_diffusers(sampler, steps, **self.betas, **cut)

    def predict(self, x: Tensor, t: Tensor, cond: r2d3.Cond) -> Tensor:
        """Noise in x (B, 14, G, G, G) at timesteps t (B,); the other half of the output is a variance."""
        x0 = self.net(x, t.to(self.device), cond.embeds.to(self.device))[:, :x.shape[1]]
        alpha, sigma = (r2d3.per_sample(table[t.cpu()], x) for table in (self.alpha_by_t, self.sigma_by_t))
        return (x - alpha * x0) / sigma

    def save_network(self, state: dict[str, Tensor], folder: Path, weights: str | None) -> None:
        """Write weights of `net` and what belongs to them into a folder that --weights takes."""
        files = local_files(Path(weights)) if weights else download()
        config = files["net"].with_name("config.json")
        for file in [files["mean"], files["std"], *[config] * config.is_file()]:
            link(file, folder / "v1.1" / file.name)
        write_atomic(folder / "v1.1" / FILES["net"], to_bytes(lambda file: torch.save(state, file)))

    def decode(self, x0: Tensor) -> r2d3.Gaussians:
        """Clean latents (B, 14, G, G, G) -> G^3 splats, y up, differentiable."""
        values = (x0 * self.std + self.mean).flatten(2).mT
        offset, color, opacity, scales, quats = values.split([3, 3, 1, 3, 4], -1)
        x, y, z = (self.size * (self.grid + offset)).unbind(-1)
        w, i, j, k = (0.5 ** 0.5 * F.normalize(quats, dim=-1)).unbind(-1)   # a quarter turn about x
        return r2d3.Gaussians(torch.stack([x, z, -y], -1), self.size * scales.clamp(0, 1),
                         torch.stack([w + i, i - w, j + k, k - j], -1), opacity[..., 0].clamp(0, 1),
                         (SH_C0 * color + 0.5).clamp(min=0))


def norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, heads, width, tokens), channels before tokens as the convolutions make them."""
    return F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT


class ResBlock(nn.Module):
    """Two convolutions with a skip. Time and text scale and shift the second norm; `resize` halves or doubles the grid.

    The published order is kept: the grid is resized between the first activation and the first convolution.
    """

    def __init__(self, width: int, out_width: int, embedding_width: int, resize: str | None = None):
        super().__init__()
        self.in_layers = nn.Sequential(norm(width), nn.SiLU(), nn.Conv3d(width, out_width, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_width, 2 * out_width))
        self.out_layers = nn.Sequential(norm(out_width), nn.SiLU(), nn.Identity(),      # there: dropout of 0
                                        nn.Conv3d(out_width, out_width, 3, padding=1))
        self.skip_connection = nn.Conv3d(width, out_width, 1) if width != out_width else nn.Identity()
        self.resize = resize

    def resized(self, h: Tensor) -> Tensor:
        if self.resize == "down":
            return F.avg_pool3d(h, 2)
        return F.interpolate(h, scale_factor=2, mode="nearest") if self.resize == "up" else h

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, C, D, D, D), embedding (B, E) -> (B, C', D', D', D')."""
        h = self.in_layers[2](self.resized(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(embedding)[:, :, None, None, None].chunk(2, 1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(self.resized(x)) + self.out_layers[1:](h)


class AttentionBlock(nn.Module):
    """Self-attention of the voxels; the words join as further keys and values, under one softmax and without a mask."""

    def __init__(self, width: int, embedding_width: int, head_width: int):
        super().__init__()
        self.heads = width // head_width
        self.norm = norm(width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.norm_encoder = norm(embedding_width)       # over words too: a text's padding changes every word
        self.encoder_kv = nn.Conv1d(embedding_width, 2 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x (B, C, D, D, D), text (B, E, L) -> like x."""
        q, k, v = self.qkv(self.norm(x.flatten(2))).unflatten(1, (self.heads, 3, -1)).unbind(2)
        text_k, text_v = self.encoder_kv(self.norm_encoder(text)).unflatten(1, (self.heads, 2, -1)).unbind(2)
        h = attend(q, torch.cat([text_k, k], -1), torch.cat([text_v, v], -1)).flatten(1, 2)
        return x + self.proj_out(h).unflatten(2, x.shape[2:])


class AttentionPooling(nn.Module):
    """Words (B, L, C) -> (B, C): their mean asks, itself and they answer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, width) / width ** 0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, words: Tensor) -> Tensor:
        mean = words.mean(1, keepdim=True) + self.positional_embedding
        every = torch.cat([mean, words], 1)
        q, k, v = (layer(x).mT.unflatten(1, (self.heads, -1))
                   for layer, x in ((self.q_proj, mean), (self.k_proj, every), (self.v_proj, every)))
        return attend(q, k, v).flatten(1)


class Block(nn.Sequential):
    """Layers one after the other, each given what it takes. Convolutions stay stock, or peft could not wrap them."""

    def forward(self, h: Tensor, embedding: Tensor, text: Tensor) -> Tensor:
        for layer in self:
            more = {ResBlock: (embedding,), AttentionBlock: (text,)}.get(type(layer), ())
            h = layer(h, *more)
        return h


class UNet3D(nn.Module):
    """GaussianCube's denoiser: (B, 14, D, D, D) at times (B,) with text (B, 77, 768) -> (B, 28, D, D, D).

    The first half of the output predicts the clean latent x0, the second half a variance that nothing here uses. A text
    must always have its 77 words, padding included. Sizes are those of CONFIG; D is a multiple of 2^(levels - 1).
    """

    def __init__(self, channels: int, width: int, multipliers: list[int], res_blocks: int, attention_levels: list[int],
                 head_width: int, text_width: int, embedding_width: int, pooling_heads: int):
        super().__init__()
        self.channels, self.width, self.divisor = channels, width, 2 ** (len(multipliers) - 1)
        self.gradient_checkpointing = False
        E = embedding_width
        self.time_embed = nn.Sequential(nn.Linear(width, E), nn.SiLU(), nn.Linear(E, E))
        self.encoder_pooling = nn.Sequential(nn.LayerNorm(text_width), AttentionPooling(text_width, pooling_heads),
                                             nn.Linear(text_width, E), nn.LayerNorm(E))
        self.encoder_proj = nn.Linear(text_width, E) if text_width != E else nn.Identity()

        def layers(level: int, width: int, out_width: int) -> list[nn.Module]:
            attention = [AttentionBlock(out_width, E, head_width)] if level in attention_levels else []
            return [ResBlock(width, out_width, E), *attention]

        widths = [width * multiplier for multiplier in multipliers]
        blocks, skips, now = [Block(nn.Conv3d(channels, width, 3, padding=1))], [width], width
        for level, wide in enumerate(widths):
            for _ in range(res_blocks):
                blocks.append(Block(*layers(level, now, wide)))
                skips.append(now := wide)
            if level + 1 < len(widths):
                blocks.append(Block(ResBlock(now, now, E, "down")))
                skips.append(now)
        self.input_blocks = nn.ModuleList(blocks)
        self.middle_block = Block(ResBlock(now, now, E), AttentionBlock(now, E, head_width), ResBlock(now, now, E))
        blocks = []
        for level, wide in reversed([*enumerate(widths)]):
            for n in range(res_blocks + 1):
                up = [ResBlock(wide, wide, E, "up")] if level and n == res_blocks else []
                blocks.append(Block(*layers(level, now + skips.pop(), wide), *up))
                now = wide
        self.output_blocks = nn.ModuleList(blocks)
        self.out = nn.Sequential(norm(now), nn.SiLU(), nn.Conv3d(now, 2 * channels, 3, padding=1))

    def enable_gradient_checkpointing(self) -> None:
        """As in diffusers: activations are computed a second time for gradients, instead of being kept."""
        self.gradient_checkpointing = True

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        def run(block: Block, h: Tensor) -> Tensor:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                return checkpoint(block, h, embedding, words, use_reentrant=False)
            return block(h, embedding, words)

        half = self.width // 2
        frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=x.device))
        angles = t.float()[:, None] * frequencies       # in float32 also where weights are not: times reach 1000
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], -1).to(x)) + self.encoder_pooling(text)
        words = self.encoder_proj(text).mT              # (B, E, L)
        h, skips = x, []
        for block in self.input_blocks:
            skips.append(h := run(block, h))
        h = run(self.middle_block, h)
        for block in self.output_blocks:
            h = run(block, torch.cat([h, skips.pop()], 1))
        return self.out(h)


def load(config: r2d3.Config, device: torch.device | str) -> GaussianCube:
    """The base, from the published weights or those that --weights names."""
    return GaussianCube(**parts(config.weights, device), device=device)


def parts(weights: str | None, device: torch.device | str) -> dict:
    """What GaussianCube is made from: net, text, and the mean and std (14, D, D, D) of the latents; all float32.

    `weights` is a folder laid out like the published repo (v1.1/, or the three files themselves; a config.json beside
    them with entries of CONFIG says that the network has other sizes; text_encoder/ and tokenizer/ are used if there),
    "random" for a network before any training, or None to fetch what is needed. The text encoder is loaded when prompts
    are first encoded, and is gone afterwards. Whatever is missing or damaged is a UserError.
    """
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)                                # the same in every process and after a break
            net = UNet3D(**CONFIG)
        return {"net": net, "text": published.random_text("gaussiancube", device), **random_statistics()}
    root = Path(weights) if weights else None
    paths = local_files(root) if root else download()
    found = {name: read(path) for name, path in paths.items()}
    own = paths["net"].with_name("config.json")
    net = build(CONFIG | (published.read_config(own) if own.is_file() else {}), own)
    mean, std = (statistics(found[name], paths[name], net) for name in ("mean", "std"))
    if mean.shape != std.shape:
        raise UserError(f"{paths['mean']} is of {mean.shape[1]} voxels a side and {paths['std']} of {std.shape[1]}; "
                        "they belong to different models")
    try:
        net.load_state_dict(found["net"])
    except Exception as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"the weights {paths['net']} do not fit GaussianCube's U-Net: {what}") from None
    return {"net": net, "text": published.TextEncoder("gaussiancube", root, device), "mean": mean, "std": std}


def local_files(root: Path) -> dict[str, Path]:
    """The three files in root/v1.1, or in root."""
    if not root.is_dir():
        raise UserError(f"--weights {root}: there is no such folder")
    folder = root / "v1.1" if (root / "v1.1").is_dir() else root
    for name in FILES.values():
        if not (folder / name).is_file():
            raise UserError(f"there is no {name} in {folder}; lay it out like {REPO} on the Hugging Face hub, "
                            f"v1.1/ with {', '.join(FILES.values())}")
    return {part: folder / name for part, name in FILES.items()}


def download() -> dict[str, Path]:
    """The three files in the Hugging Face cache; what is not there yet is fetched, with progress bars."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    files = {part: f"v1.1/{name}" for part, name in FILES.items()}
    size = published.PUBLISHED["gaussiancube"]["download"]
    if not all(isinstance(try_to_load_from_cache(REPO, file), str) for file in files.values()):
        print(f"fetching gaussiancube from {REPO}, once: 1.4 GB, and 1.7 GB when CLIP first encodes prompts")
    try:
        return {part: Path(hf_hub_download(REPO, file)) for part, file in files.items()}
    except Exception as error:
        raise UserError("the weights of gaussiancube are not here and could not be fetched "
                        f"({type(error).__name__}): about {size}, once, or --weights DIR\n"
                        "      leave out --base to run now, with the embedded base") from None


def read(path: Path) -> dict | Tensor:
    """What a published pickle holds. Only tensors are read from it: a pickle that wants to run code is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = " ".join(str(error).split())[:120]
        raise UserError(f"{path} cannot be read, is the file complete? ({type(error).__name__}: {why})") from None


def build(config: dict, where: Path) -> UNet3D:
    try:
        return UNet3D(**config)
    except Exception as error:
        raise UserError(f"{where}: no U-Net can be made from it ({' '.join(str(error).split())[:150]}); it may set "
                        f"{', '.join(CONFIG)}") from None


def statistics(value: dict | Tensor, path: Path, net: UNet3D) -> Tensor:
    """(D, D, D, 14) of a file -> (14, D, D, D) float32."""
    shape = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
    if not torch.is_tensor(value) or shape != (*[len(value)] * 3, net.channels) or len(value) % net.divisor:
        raise UserError(f"{path} holds {shape}; wanted (D, D, D, {net.channels}) with D a multiple of {net.divisor}")
    if not value.isfinite().all():
        raise UserError(f"{path} holds numbers that are not finite; fetch it again")
    return value.float().permute(3, 0, 1, 2).contiguous()


def random_statistics() -> dict[str, Tensor]:
    """For random weights: a mean and std with which unit Gaussians become small, half opaque, gray-ish splats."""
    mean = torch.tensor([0.0] * 6 + [0.3] + [0.012] * 3 + [1.0] + [0.0] * 3)
    std = torch.tensor([0.03] * 3 + [0.6] * 3 + [0.3] + [0.005] * 3 + [0.3] * 4)
    grid = torch.ones(1, SIZE, SIZE, SIZE)
    return {"mean": mean[:, None, None, None] * grid, "std": std[:, None, None, None] * grid}
