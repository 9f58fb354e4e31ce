"""The embedded base `shapes`: its text encoder, its two judges, and how support/shapes.safetensors is read.

Its denoiser and its autoencoder are stock diffusers networks at toy size. Trained by make_shapes.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from support import PromptError, UserError, brief, load_weights


class WordTable(nn.Module):
    """The text encoder of `shapes`: a learned vector per word plus one per position."""

    def __init__(self, vocab: list[str], dim: int, max_length: int):
        super().__init__()
        self.index = {word: n for n, word in enumerate(["", *vocab])}               # 0 is padding
        self.words, self.positions = nn.Embedding(len(self.index), dim), nn.Embedding(max_length, dim)

    def tokens(self, prompts: list[str]) -> Tensor:
        """(B, max_length) word numbers, 0 where there is none. UserError: an unknown word, too many words."""
        out = torch.zeros(len(prompts), self.positions.num_embeddings, dtype=torch.long)
        for row, prompt in zip(out, prompts):
            words = prompt.lower().split()
            unknown = [word for word in words if word not in self.index]
            if unknown:
                raise PromptError(f"the base 'shapes' does not know the word {brief(unknown[0], 60)!r} in the prompt "
                                  f"{brief(prompt, 100)!r}; it knows: {' '.join(w for w in self.index if w)}", prompt)
            if len(words) > len(row):
                raise PromptError(f"the prompt {brief(prompt, 100)!r} has {len(words)} words; "
                                  f"'shapes' takes {len(row)}", prompt)
            row[:len(words)] = torch.tensor([self.index[word] for word in words], dtype=torch.long)
        return out.to(self.words.weight.device)

    def prepare(self, prompts: list[str]) -> None:
        """Check the prompts of a run, of which there may be millions."""
        for n in range(0, len(prompts), 1000):
            self.tokens(prompts[n:n + 1000])

    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeds (B, L, D), and a mask (B, L), true where there is a word."""
        return self.embed(self.tokens(prompts))

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The same of word numbers (B, L)."""
        mask = tokens > 0
        mask[:, 0] = True                                       # the null prompt "" keeps one pad token
        return self.words(tokens) + self.positions.weight, mask


class ImageTextTower(nn.Module):
    """A small CLIP for the world of `shapes`: pictures and prompts that agree have vectors of high cosine."""

    def __init__(self, table: nn.Module, dim: int = 64, width: int = 32, layers: int = 1):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width]
        self.cnn = nn.Sequential(*(layer for a, b in zip(widths, widths[1:]) for layer in (
            nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU(),
            nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU())))
        self.image_head = nn.Linear(widths[-1] * 16, dim)       # 64 px / 2^4 = a 4 x 4 map
        self.table = table          # prompts -> (embeds (N, L, dim), mask (N, L))
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, "gelu", batch_first=True)
        self.mixer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def image(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, D), unit length."""
        if images.shape[-1] != 64:
            images = F.interpolate(images, (64, 64), mode="bilinear", antialias=True)
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

        def conv(a: int, b: int, stride: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, stride, padding=1), nn.GroupNorm(4, b), nn.SiLU()]

        self.down = nn.ModuleList(nn.Sequential(*conv(a, b, stride), *conv(b, b)) for a, b, stride in (
            (3, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)))
        self.up = nn.ModuleList(nn.Sequential(*conv(3 * b, b)) for b in (2 * width, width))
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


# All linear layers of the denoiser and its patch convolution: what Nabla-R2D3's released code gives a LoRA.
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "proj", "linear",
                "linear_1", "linear_2"]


def load(path: Path, device: torch.device | str) -> tuple[dict, ImageTextTower, NormalEstimator]:
    """What r2d3.DiffSplat is made from, and the judges. UserError: a file that is not such a base."""
    from diffusers import AutoencoderKL, PixArtTransformer2DModel
    state, about = load_weights(path)
    if '"vocab"' not in about.get("config", ""):
        raise UserError(f"{path} does not hold the base 'shapes': it was not made by experiments/make_shapes.py")
    about = json.loads(about["config"])

    def part(name: str, module: nn.Module) -> nn.Module:
        own = {key.removeprefix(f"{name}."): value.float() for key, value in state.items()
               if key.startswith(f"{name}.")}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise UserError(f"{path} does not fit: {str(error).splitlines()[1].strip()}") from None
        return module.to(device).eval().requires_grad_(False)

    vocab, length = about["vocab"], about["max_length"]
    settings = {"image_size": about["vae"]["sample_size"], "prediction_type": about["prediction_type"],
                "guidance": about["guidance"], "betas": about.get("betas", {}),
                "latent_mean": state["latent_mean"].float(), "latent_std": state["latent_std"].float(),
                "scale_range": about["scale_range"], "depth_scale": about["depth_scale"], "half_image_shift": False,
                "eval_size": 64, "lora_targets": LORA_TARGETS}
    base = {"net": part("net", PixArtTransformer2DModel(**about["net"])),
            "vae": part("vae", AutoencoderKL(**about["vae"])),
            "text": part("text", WordTable(vocab, about["net"]["caption_channels"], length)), "settings": settings}
    tower = ImageTextTower(WordTable(vocab, about["tower"].get("dim", 64), length), **about["tower"])
    return base, part("tower", tower), part("normal", NormalEstimator(**about["normal"]))
