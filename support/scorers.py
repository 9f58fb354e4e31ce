"""The published networks that judge pictures: LAION's aesthetic predictor, HPSv2, Marigold's normals.

r2d3.py loads them in `load_reward`, through `load` below. Each class stands alone: torch, and the library it names.
`render` is a kernels.Render: image (B, V, 3, H, W) and more; scores are (B, V).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from support import UserError, fetching


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


def too_long(prompts: list[str]) -> int:
    """How many of the prompts have more than the 77 tokens that CLIP reads, so that their ends are not seen."""
    import open_clip
    long = [prompt for prompt in dict.fromkeys(prompts) if len(prompt.encode("utf-8")) > 75]    # a token has a byte
    return sum(int((open_clip.tokenize(long[n:n + 1000], 78)[:, 77] != 0).sum()) for n in range(0, len(long), 1000))


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
            from huggingface_hub import hf_hub_download

            from support.published import hpsv2_package
            path = hf_hub_download("xswu/HPSv2", hpsv2_package().utils.hps_version_map[version])
        return cls(load_clip("ViT-H-14", path, device, checkpoint)).eval().requires_grad_(False)

    too_long = staticmethod(too_long)

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

    def __init__(self, pipeline, text: Tensor | None = None):
        super().__init__()
        self.vae, self.unet, self.scheduler = pipeline.vae, pipeline.unet, pipeline.scheduler
        self.size = pipeline.default_processing_resolution
        self.scheduler.set_timesteps(1)
        if text is None:
            text = pipeline.text_encoder(pipeline.tokenizer("", return_tensors="pt").input_ids)[0].detach()
        self.register_buffer("text", text)                      # (1, 2, D): no words

    @classmethod
    def pretrained(cls, device: torch.device | str, checkpoint: bool = False, untrained: bool = False) -> MarigoldNormals:
        """The published weights, fetched from the Hugging Face hub on first use; bf16 on a GPU."""
        from diffusers import AutoencoderKL, DDIMScheduler, MarigoldNormalsPipeline, UNet2DConditionModel
        if untrained:                                           # sizes: Stable Diffusion 2's, two latents to read from
            unet = UNet2DConditionModel(in_channels=8, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
                                        use_linear_projection=True)
            vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                                down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
            scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
            parts = MarigoldNormalsPipeline(unet, vae, scheduler, None, None, "normals", default_processing_resolution=768)
            model = cls(parts, torch.zeros(1, 2, 1024))
        else:
            model = cls(MarigoldNormalsPipeline.from_pretrained(cls.name, variant="fp16").to(torch.float32))
        model.vae.enable_slicing()                              # one picture at a time: they are large
        if checkpoint:
            model.unet.enable_gradient_checkpointing()
            model.vae.enable_gradient_checkpointing()
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        return model.to(device, dtype).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) in [0, 1] -> (N, 3, S, S), unit normals in our camera space."""
        return torch.cat([self.estimate(part) for part in images.split(16)])    # the U-Net sees 768 x 768 pixels

    def estimate(self, images: Tensor) -> Tensor:
        """`forward` for as many pictures as fit."""
        t, scale = self.scheduler.timesteps[0], self.vae.config.scaling_factor
        x = F.interpolate(images * 2 - 1, (self.size, self.size), mode="bilinear", antialias=True)
        latent = self.vae.encode(x.to(self.text)).latent_dist.mode() * scale        # (N, 4, h, w)
        noise = torch.randn(latent.shape[1:], generator=torch.Generator().manual_seed(0)).to(latent).expand_as(latent)
        out = self.unet(torch.cat([latent, noise], 1), t, self.text.expand(len(latent), -1, -1)).sample
        z = self.scheduler.step(out, t, noise).prev_sample
        normals = F.normalize(self.vae.decode(z / scale).sample.to(images.dtype).clamp(-1, 1), dim=1)
        normals = F.normalize(F.interpolate(normals, images.shape[-2:], mode="bilinear"), dim=1)
        return normals * normals.new_tensor([1, -1, -1]).view(3, 1, 1)  # theirs: y up, z towards the viewer


PUBLISHED = {   # scorer, title, size of its download, arguments of `pretrained`
    "laion": (LaionAesthetic, "LAION V2, CLIP ViT-L/14", "1.7 GB", {}),
    "hps-v2.1": (HPSv2, "HPS v2.1, CLIP ViT-H/14", "4 GB", {"version": "v2.1"}),
    "hps-v2.0": (HPSv2, "HPS v2.0, CLIP ViT-H/14", "4 GB", {"version": "v2.0"}),
    "marigold": (MarigoldNormals, "Marigold v1-1, one step", "2.6 GB", {}),
}
PUBLISHED |= {"aesthetic": PUBLISHED["laion"], "hpsv2": PUBLISHED["hps-v2.1"], "normal": PUBLISHED["marigold"]}


def load(name: str, device: torch.device | str, checkpoint: bool, untrained: bool) -> tuple[nn.Module, str]:
    """A published scorer by its own or its reward's name, and a title. UserError: unknown, or it cannot be fetched."""
    if name not in PUBLISHED:
        known = ", ".join(sorted({*PUBLISHED, "colorfulness", "dnc"}))
        raise UserError(f"there is no reward {name!r}; there are {known}, and file.py:function")
    scorer, title, size, arguments = PUBLISHED[name]
    with fetching(f"the scorer {title}", size):
        loaded = scorer.pretrained(device=device, checkpoint=checkpoint, untrained=untrained, **arguments)
    return loaded, title + ", random weights" * untrained
