"""The frozen networks that judge pictures: published scorers, and the small judges of the embedded base.

r2d3.py loads them in `load_reward` and `load_base`. Each class stands alone: torch, and the library it names.
`render` is a kernels.Render: image (B, V, 3, H, W) and more; scores are (B, V).
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def load_clip(name: str, weights: str | None, device: torch.device | str, checkpoint: bool) -> nn.Module:
    """open_clip's CLIP, in bf16 on a GPU; `checkpoint`: activations are computed twice instead of kept.

    Without weights it is untrained, as `untrained` below makes the scorers: to measure speed and memory.
    """
    import open_clip
    precision = "pure_bf16" if torch.device(device).type == "cuda" else "fp32"
    clip = open_clip.create_model(name, pretrained=weights, precision=precision, device=device)
    if checkpoint:
        clip.set_grad_checkpointing()
    return clip


def clip_embed(visual: nn.Module, images: Tensor) -> Tensor:
    """CLIP's image tower: (N, 3, S, S) in [0, 1] -> (N, D), unit length."""
    import open_clip
    mean = images.new_tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = images.new_tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    dtype = next(visual.parameters(), images).dtype
    return F.normalize(visual(((images - mean) / std).to(dtype)).to(images.dtype), dim=-1)


class LaionAesthetic(nn.Module):
    """LAION aesthetic predictor V2: five linear layers on a CLIP ViT-L/14 image embedding of unit length.

    Scores are about 1 to 10. Pictures are resized as Nabla-R2D3's reward does it (bicubic, not antialiased).
    """

    url = ("https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
           "sac+logos+ava1-l14-linearMSE.pth")
    sha256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual        # open_clip's image tower: (N, 3, S, S) -> (N, 768)
        sizes = {"0": (768, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}
        self.layers = nn.Sequential(OrderedDict((name, nn.Linear(*size)) for name, size in sizes.items()))

    @classmethod
    def pretrained(cls, device: torch.device | str, checkpoint: bool = False, untrained: bool = False) -> LaionAesthetic:
        """The published weights, fetched on first use (CLIP through open_clip, the head is 3.7 MB)."""
        if untrained:
            clip = load_clip("ViT-L-14-quickgelu", None, device, checkpoint)
            return cls(clip.visual).to(device).eval().requires_grad_(False)
        head = torch.hub.load_state_dict_from_url(cls.url, map_location="cpu", weights_only=True)
        path = Path(torch.hub.get_dir()) / "checkpoints" / cls.url.rsplit("/", 1)[1]
        if hashlib.sha256(path.read_bytes()).hexdigest() != cls.sha256:
            raise ValueError(f"wrong checksum: delete {path} and try again")
        model = cls(load_clip("ViT-L-14-quickgelu", "openai", device, checkpoint).visual)
        model.layers.load_state_dict({key.removeprefix("layers."): value for key, value in head.items()})
        return model.to(device).eval().requires_grad_(False)

    def embed(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, 768), unit length."""
        return clip_embed(self.visual, F.interpolate(images, self.visual.image_size, mode="bicubic"))

    def forward(self, render, prompts: list[str]) -> Tensor:
        scores = self.layers(self.embed(render.image.flatten(0, 1)))
        return scores.reshape(render.image.shape[:2])


class HPSv2(nn.Module):
    """Human Preference Score v2: cosine of picture and prompt in a CLIP ViT-H/14 tuned on people's choices.

    Scores are about 0.2 to 0.35: without CLIP's logit scale, as in HPSv2's own score and in Nabla-R2D3.
    Only the checkpoints' names are the package hpsv2's: its networks do not import any more.
    """

    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip, self.texts = clip, {}        # texts: prompt -> (D,), encoded once

    @classmethod
    def pretrained(cls, version: str, device: torch.device | str, checkpoint: bool = False,
                   untrained: bool = False) -> HPSv2:
        """The published weights of "v2.1" or "v2.0", fetched from the Hugging Face hub on first use."""
        path = None
        if not untrained:
            from hpsv2.utils import hps_version_map
            from huggingface_hub import hf_hub_download
            path = hf_hub_download("xswu/HPSv2", hps_version_map[version])
        return cls(load_clip("ViT-H-14", path, device, checkpoint)).eval().requires_grad_(False)

    def preprocess(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 3, S, S): the longest side to S, antialiased bicubic, the rest black."""
        size = max(self.clip.visual.image_size)
        h, w = (round(side * size / max(images.shape[-2:])) for side in images.shape[-2:])
        left, top = (size - w) // 2, (size - h) // 2
        images = F.interpolate(images, (h, w), mode="bicubic", antialias=True)
        return F.pad(images, (left, size - w - left, top, size - h - top))

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """(B, D), unit length."""
        import open_clip
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.texts]
        if new:
            tokens = open_clip.tokenize(new).to(self.clip.logit_scale.device)
            self.texts.update(zip(new, F.normalize(self.clip.encode_text(tokens).float(), dim=-1)))
        return torch.stack([self.texts[prompt] for prompt in prompts])

    def forward(self, render, prompts: list[str]) -> Tensor:
        embeds = clip_embed(self.clip.visual, self.preprocess(render.image.flatten(0, 1)))
        return (embeds.unflatten(0, render.image.shape[:2]) * self.encode_text(prompts)[:, None]).sum(-1)


class MarigoldNormals(nn.Module):
    """Marigold's normal estimator (arXiv 2505.09358) in one step, from the parts of diffusers' pipeline.

    Unlike the pipeline it is differentiable, and starts from one fixed noise: a picture has one estimate.
    """

    name = "prs-eth/marigold-normals-v1-1"

    def __init__(self, pipeline):
        super().__init__()
        self.vae, self.unet, self.scheduler = pipeline.vae, pipeline.unet, pipeline.scheduler
        self.size = pipeline.default_processing_resolution
        self.scheduler.set_timesteps(1)
        no_words = pipeline.tokenizer("", return_tensors="pt").input_ids
        self.register_buffer("text", pipeline.text_encoder(no_words)[0].detach())   # (1, 2, D)

    @classmethod
    def pretrained(cls, device: torch.device | str, checkpoint: bool = False, untrained: bool = False) -> MarigoldNormals:
        """The published weights, fetched from the Hugging Face hub on first use; bf16 on a GPU."""
        if untrained:
            raise ValueError("marigold is not available untrained; take another reward with --weights random")
        from diffusers import MarigoldNormalsPipeline
        model = cls(MarigoldNormalsPipeline.from_pretrained(cls.name, variant="fp16").to(torch.float32))
        if checkpoint:
            model.unet.enable_gradient_checkpointing()
            model.vae.enable_gradient_checkpointing()
            model.vae.enable_slicing()                          # one picture at a time
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        return model.to(device, dtype).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) in [0, 1] -> (N, 3, S, S), unit normals in our camera space."""
        t, scale = self.scheduler.timesteps[0], self.vae.config.scaling_factor
        x = F.interpolate(images * 2 - 1, (self.size, self.size), mode="bilinear", antialias=True)
        latent = self.vae.encode(x.to(self.text)).latent_dist.mode() * scale        # (N, 4, h, w)
        noise = torch.randn(latent.shape[1:], generator=torch.Generator().manual_seed(0)).to(latent).expand_as(latent)
        out = self.unet(torch.cat([latent, noise], 1), t, self.text.expand(len(latent), -1, -1)).sample
        z = self.scheduler.step(out, t, noise).prev_sample
        normals = F.normalize(self.vae.decode(z / scale).sample.to(images.dtype).clamp(-1, 1), dim=1)
        normals = F.normalize(F.interpolate(normals, images.shape[-2:], mode="bilinear"), dim=1)
        return normals * normals.new_tensor([1, -1, -1]).view(3, 1, 1)  # theirs: y up, z towards the viewer


class ImageTextTower(nn.Module):
    """A small CLIP for the world of `shapes`: pictures and prompts that agree have vectors of high cosine."""

    def __init__(self, table: nn.Module, dim: int = 64, width: int = 32):
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width]
        self.cnn = nn.Sequential(*(layer for a, b in zip(widths, widths[1:]) for layer in (
            nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU(),
            nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU())))
        self.image_head = nn.Linear(widths[-1] * 16, dim)       # 64 px / 2^4 = a 4 x 4 map
        self.table = table          # prompts -> (embeds (N, L, dim), mask (N, L))
        self.mixer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, "gelu", batch_first=True)
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
