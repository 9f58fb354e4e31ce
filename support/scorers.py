"""What judges pictures: formulas, the small networks of an embedded base, and the published networks.

r2d3.py loads them in `load_reward`, through `load` at the end. A scorer is a function scorer(render, prompts) -> (B, V),
where `render` is a kernels.Render: image (B, V, 3, H, W), alpha, depth, normal. Published are LAION's aesthetic
predictor, HPSv2 and Marigold's normals; each class stands alone: torch, and the library that it names.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from support import UserError, fetching
from support.cameras import FXFY, intrinsics, plucker_rays


# ---- Formulas and embedded networks --------------------------------------------------------------------------------

def colorfulness(render, prompts: list[str]) -> Tensor:
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


def depth_normal_consistency(render, prompts: list[str], angle_mask: bool = False) -> Tensor:
    """Mean cosine between rendered normals and the normals of the rendered depth (detached, as published).

    Over pixels that are on the object (alpha > 0.5) with all their four neighbours; 0 where there is none.
    """
    inside = (render.alpha > 0.5).float()
    cross = inside.new_tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]])[None, None]
    mask = (F.conv2d(inside.flatten(0, 1), cross, padding=1) > 4.5).unflatten(0, inside.shape[:2])[:, :, 0]
    return mean_cosine(depth_to_normals(render.depth.detach()), render.normal, mask, angle_mask)


def tower_agreement(tower: nn.Module) -> Callable:
    """Embedded stand-in for HPSv2: the cosine of picture and prompt in the base's own image-text tower."""
    def reward(render, prompts: list[str]) -> Tensor:
        pictures = tower.image(render.image.flatten(0, 1)).unflatten(0, render.image.shape[:2])  # (B, V, D)
        return (pictures * tower.text(prompts)[:, None]).sum(-1)
    return reward


def normal_agreement(estimator: nn.Module, gradient: bool = False, angle_mask: bool = False) -> Callable:
    """Mean cosine between rendered normals and those an estimator sees in the picture.

    The estimate is detached, as in the paper's setting; with `gradient` the picture learns from it too.
    """
    def reward(render, prompts: list[str]) -> Tensor:
        with contextlib.nullcontext() if gradient else torch.no_grad():
            estimate = estimator(render.image.flatten(0, 1)).unflatten(0, render.image.shape[:2])
        return mean_cosine(render.normal, estimate, (render.alpha > 0.5)[:, :, 0], angle_mask)
    return reward


# ---- Published networks ------------------------------------------------------------------------------------------


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


def load(name: str, base, device: torch.device | str, checkpoint: bool, untrained: bool) -> tuple[Callable, str]:
    """A reward by its own or its scorer's name, and a title that says what measures it.

    A base with small networks of its own (`tower` and `normals`) is judged by them for aesthetic, hpsv2 and normal, any
    other by the published scorers. UserError: an unknown name, or a scorer that cannot be fetched.
    """
    if name == "colorfulness":
        return colorfulness, "colorfulness (colourfulness)"
    if name == "dnc":
        return depth_normal_consistency, "dnc (depth-normal consistency)"
    if base.tower is not None and name == "aesthetic":
        return colorfulness, "aesthetic (embedded scorer: colourfulness)"
    if base.tower is not None and name == "hpsv2":
        return tower_agreement(base.tower), "hpsv2 (embedded scorer: image-text tower)"
    if base.tower is not None and name == "normal":
        return normal_agreement(base.normals), "normal (embedded scorer: normal estimator)"
    if name not in PUBLISHED:
        known = ", ".join(sorted({*PUBLISHED, "colorfulness", "dnc"}))
        raise UserError(f"there is no reward {name!r}; there are {known}, and file.py:function")
    scorer, title, size, arguments = PUBLISHED[name]
    with fetching(f"the scorer {title}", size):
        loaded = scorer.pretrained(device=device, checkpoint=checkpoint, untrained=untrained, **arguments)
    reward = normal_agreement(loaded) if scorer is MarigoldNormals else loaded
    return reward, f"{name} ({title}{', random weights' * untrained})"
