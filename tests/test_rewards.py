"""The published scorers on tiny networks, the options of the geometry rewards, the prompt lists and their filter.

tests/data/hpsv2 and angle_mask hold what nabla-R2D3 77483e6 and HPSv2 866735e computed. Nothing is downloaded:
tiny random networks stand where the published weights would be, and are loaded by the same code.
"""
import dataclasses
import json
import math
import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]

import r2d3  # noqa: E402
from support import cameras, folders, scorers  # noqa: E402
from r2d3 import Config, Gaussians, Render, seeded  # noqa: E402

PROMPTS = ["a photo of a red toy robot", "An astronaut, riding a horse; 3D render!"]  # of tests/data/hpsv2
TINY_CLIP = {"embed_dim": 24,
             "vision_cfg": {"image_size": 56, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
             "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}
BASE = SimpleNamespace(tower=object(), normals=lambda images: images)


def close(got, want, tolerance):
    """The shapes are the same, and no element differs by more than a share of the largest one."""
    return got.shape == want.shape and ((got - want).abs().max() <= tolerance * want.abs().max()).item()


def render_of(image, **others):
    return Render(**dict.fromkeys(Render._fields) | {"image": image} | others)


# ---- HPS v2 --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hps():
    """The recorded tiny CLIP in open_clip's class, and what was recorded."""
    from open_clip.model import CLIP
    d = load_file(ROOT / "tests/data/hpsv2.safetensors")
    clip = CLIP(**TINY_CLIP).eval().requires_grad_(False)
    state = {name.removeprefix("sd."): value for name, value in d.items() if name.startswith("sd.")}
    state["token_embedding.weight"] = torch.zeros(49408, 32)
    state["token_embedding.weight"][d["token_ids_used"]] = d["sd_token_embedding.rows"]
    missing, unexpected = clip.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"attn_mask"}
    return clip, d


def test_hps_preprocessing_is_the_published_one(hps):
    """Measured: 0 (wide pictures, padded) and 0 (square ones). Without antialias or with white bars it is not."""
    clip, d = hps
    scorer = scorers.HPSv2(clip)
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]
                             ).view(2, 3, 1, 1)
    for given, wanted in (("images", "preprocessed"), ("square_images", "square_preprocessed")):
        got = (scorer.preprocess(d[given]) - mean) / std
        assert close(got, d[wanted], 1e-6)
        aliased = F.interpolate(d[given], got.shape[-2:], mode="bicubic")
        assert not close((aliased - mean) / std, d[wanted], 5e-2)
    tall = scorer.preprocess(d["images"].transpose(2, 3))       # the same picture on its side
    assert close(tall, scorer.preprocess(d["images"]).transpose(2, 3), 1e-6)
    assert (tall[..., :5] == 0).all() and (tall[..., -6:] == 0).all() and (tall[..., 6:-6] != 0).all()


def test_hps_score_is_the_published_one(hps):
    """Cosine without logit scale. Measured: scores within 6e-8, gradients 6e-7 of the largest, texts 2e-7."""
    import open_clip
    clip, d = hps
    assert torch.equal(open_clip.tokenize(PROMPTS), d["tokens"].long())
    scorer = scorers.HPSv2(clip)
    texts = scorer.encode_text(PROMPTS)
    assert close(texts, d["text_features"], 2e-6)
    images = d["images"][:, None].clone().requires_grad_()      # B = 2, V = 1
    score = scorer(render_of(images), PROMPTS)
    assert score.shape == (2, 1) and close(score[:, 0], d["score"], 5e-6)
    gradient, = torch.autograd.grad(score.sum(), images)
    assert close(gradient[:, 0], d["grad_images"], 5e-6)
    swapped = scorer(render_of(images), PROMPTS[::-1])[:, 0]
    assert not close(swapped, d["score"], 0.05), "the prompt matters"


def test_hps_takes_all_views_at_once_and_reads_a_prompt_once(hps, monkeypatch):
    clip, d = hps
    scorer, rows, texts = scorers.HPSv2(clip), [], []
    forward, encode = type(clip.visual).forward, clip.encode_text
    monkeypatch.setattr(type(clip.visual), "forward", lambda self, x: rows.append(len(x)) or forward(self, x))
    monkeypatch.setattr(clip, "encode_text", lambda tokens: texts.append(len(tokens)) or encode(tokens))
    views = torch.stack([d["images"], d["images"].flip(0), d["images"] ** 2], 1)                # B = 2, V = 3
    score = scorer(render_of(views), PROMPTS)
    assert score.shape == (2, 3) and rows == [6] and texts == [2]
    assert close(score[:, 0], d["score"], 5e-6) and not close(score[:, 1], d["score"], 1e-2)
    again = scorer(render_of(views[[1, 0, 1]]), [PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    assert texts == [2] and close(again, score[[1, 0, 1]], 1e-6)
    scorer.encode_text([PROMPTS[0], "a new one", "a new one"])
    assert texts == [2, 1]


@pytest.fixture
def published(monkeypatch, tmp_path):
    """The hub and open_clip, tiny: a checkpoint in the published layout; what is asked of both is written down."""
    import huggingface_hub
    import open_clip
    from open_clip.model import CLIP
    torch.manual_seed(0)
    clip, asked = CLIP(**TINY_CLIP), []
    torch.save({"state_dict": clip.state_dict()}, tmp_path / "checkpoint.pt")
    (tmp_path / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path)
    create = open_clip.create_model

    def create_model(name, pretrained, precision, device):
        asked.append((name, precision, str(device)))
        return create("tiny-clip", pretrained=pretrained, precision=asked[0][1], device="cpu")

    def download(repository, name):
        asked.append((repository, name))
        return str(tmp_path / "checkpoint.pt")

    package, utils = ModuleType("hpsv2"), ModuleType("hpsv2.utils")
    utils.hps_version_map = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
    package.utils = utils
    monkeypatch.setitem(sys.modules, "hpsv2", package)
    monkeypatch.setitem(sys.modules, "hpsv2.utils", utils)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(open_clip, "create_model", create_model)
    return SimpleNamespace(clip=clip.eval().requires_grad_(False), asked=asked, folder=tmp_path, create=create)


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_hps_is_loaded_from_its_checkpoint(published, version):
    scorer = scorers.HPSv2.pretrained(version, "cpu")
    name = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}[version]
    assert published.asked == [("xswu/HPSv2", name), ("ViT-H-14", "fp32", "cpu")]
    assert not scorer.training and not any(weight.requires_grad for weight in scorer.parameters())
    images = torch.rand(2, 1, 3, 40, 40, generator=seeded(1))
    want = scorers.HPSv2(published.clip)(render_of(images), PROMPTS)
    assert close(scorer(render_of(images), PROMPTS), want, 1e-6)


def test_hps_that_cannot_be_fetched_says_so(published, monkeypatch):
    import huggingface_hub

    def offline(*names):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(r2d3.UserError, match="HPS v2.1.* could not be fetched.*no route to the hub.*4 GB") as error:
        r2d3.load_reward("hps-v2.1", BASE, "cpu")
    assert "\n" not in str(error.value)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names: str(published.folder / "checkpoint.pt"))
    torch.save({"state_dict": {"visual.proj": torch.zeros(1)}}, published.folder / "checkpoint.pt")
    with pytest.raises(r2d3.UserError, match="could not be fetched or read"):
        r2d3.load_reward("hps-v2.1", BASE, "cpu")
    monkeypatch.setitem(sys.modules, "hpsv2.utils", None)       # the package is not installed
    with pytest.raises(r2d3.UserError, match="hpsv2.*pip install -r requirements.txt"):
        r2d3.load_reward("hps-v2.1", BASE, "cpu")


def test_the_package_knows_the_checkpoints():
    utils = pytest.importorskip("hpsv2.utils")
    assert utils.hps_version_map["v2.1"] == "HPS_v2.1_compressed.pt"
    assert utils.hps_version_map["v2.0"] == "HPS_v2_compressed.pt"


def test_half_precision_is_asked_for_on_a_gpu_and_works(published):
    """bf16 weights, pictures and scores in float32. Measured: scores within 3e-3, gradient's cosine 0.9999."""
    scorers.load_clip("ViT-H-14", str(published.folder / "checkpoint.pt"), "cuda:1", False)
    assert published.asked == [("ViT-H-14", "pure_bf16", "cuda:1")]
    half = published.create("tiny-clip", pretrained=str(published.folder / "checkpoint.pt"), precision="pure_bf16")
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    images, results = torch.rand(2, 2, 3, 70, 70, generator=seeded(1)), []
    for clip in (published.clip, half):
        images = images.detach().requires_grad_()
        score = scorers.HPSv2(clip.eval().requires_grad_(False))(render_of(images), PROMPTS)
        assert score.dtype == torch.float32
        results.append((score.detach(), torch.autograd.grad(score.sum(), images)[0]))
    (score, gradient), (half_score, half_gradient) = results
    assert 0 < (score - half_score).abs().max() < 2e-2
    assert F.cosine_similarity(gradient.flatten(), half_gradient.flatten(), dim=0) > 0.99
    aesthetic = scorers.LaionAesthetic(half.visual)
    assert aesthetic.embed(images[0]).dtype == torch.float32


def test_checkpointing_computes_twice_and_the_same(published):
    """The image tower's blocks run once more in the backward pass; bit for bit the same gradient."""
    calls, gradients = [], []
    for checkpoint in (False, True):
        scorer = scorers.HPSv2.pretrained("v2.1", "cpu", checkpoint)
        count = []
        scorer.clip.visual.transformer.resblocks[0].register_forward_pre_hook(
            lambda *_, count=count: count.append(1))
        images = torch.rand(1, 2, 3, 56, 56, generator=seeded(1)).requires_grad_()
        gradients += torch.autograd.grad(scorer(render_of(images), PROMPTS[:1]).sum(), images)
        calls.append(len(count))
    assert calls == [1, 2] and torch.equal(*gradients)


def test_aesthetic_is_frozen_and_checkpointed_too(published, monkeypatch):
    """Measured without: the same blocks, once. The head is what load_state_dict_from_url brings."""
    import hashlib
    head = scorers.LaionAesthetic(published.clip.visual).layers.state_dict()
    folder = published.folder / "checkpoints"
    folder.mkdir()
    path = folder / scorers.LaionAesthetic.url.rsplit("/", 1)[1]
    torch.save({f"layers.{name}": value for name, value in head.items()}, path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(published.folder))
    monkeypatch.setattr(scorers.LaionAesthetic, "sha256", hashlib.sha256(path.read_bytes()).hexdigest())
    created = scorers.load_clip
    monkeypatch.setattr(scorers, "load_clip", lambda name, weights, *rest: created(
        name, str(published.folder / "checkpoint.pt"), *rest))
    scorer = scorers.LaionAesthetic.pretrained("cpu", checkpoint=True)
    assert published.asked == [("ViT-L-14-quickgelu", "fp32", "cpu")]
    assert scorer.visual.transformer.grad_checkpointing
    assert not scorers.LaionAesthetic.pretrained("cpu").visual.transformer.grad_checkpointing
    assert not scorer.training and not any(weight.requires_grad for weight in scorer.parameters())


# ---- normals of an estimator -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def estimator(pipeline, tmp_path_factory):
    """The same, saved as published and loaded by our code."""
    folder = tmp_path_factory.mktemp("marigold")
    pipeline.to(torch.float16).save_pretrained(folder, variant="fp16")          # as published
    pipeline.to(torch.float32)
    name, scorers.MarigoldNormals.name = scorers.MarigoldNormals.name, str(folder)
    yield scorers.MarigoldNormals.pretrained("cpu")
    scorers.MarigoldNormals.name = name


def test_marigold_untrained_has_the_published_size():
    """Stable Diffusion 2's U-Net (865,910,724 weights) with four more input channels."""
    with torch.device("meta"):
        model = scorers.MarigoldNormals.pretrained("meta", untrained=True)
    assert sum(weight.numel() for weight in model.unet.parameters()) == 865_910_724 + 4 * 320 * 9
    assert sum(weight.numel() for weight in model.vae.parameters()) == 83_653_863 and model.size == 768
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("size", [32, 24, 45])
def test_marigold_is_the_pipeline(pipeline, estimator, size):
    """The pipeline's own output for the same noise, in its axes, resized or not.

    Measured: 6e-7 on average, 3e-5 at most (where bilinear resizing makes a normal short); 0 if neither is frozen.
    """
    assert scorers.MarigoldNormals.name != "prs-eth/marigold-normals-v1-1"         # here: the tiny one
    pipeline.set_progress_bar_config(disable=True)
    images = torch.rand(3, 3, size, size, generator=seeded(2))
    noise = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0)).expand(3, 4, 16, 16)
    theirs = pipeline(images, num_inference_steps=1, latents=noise.clone(), batch_size=3, output_type="pt")[0]
    ours = estimator(images)
    assert ours.shape == images.shape and close(ours.norm(dim=1), torch.ones(3, size, size), 1e-5)
    assert close(torch.stack([ours[:, 0], -ours[:, 1], -ours[:, 2]], 1), theirs, 1.5e-4)
    other = pipeline(images, num_inference_steps=1, latents=noise + 0.1, batch_size=3, output_type="pt")[0]
    assert not close(other, theirs, 1e-3), "the noise matters, so it is the same for every picture"
    assert (ours[0] - estimator(images[:1])[0]).abs().mean() < 5e-6, "an estimate depends on its picture alone"


def test_marigold_is_frozen_and_differentiable(estimator):
    """Along the gradient, in float64: the slope is the gradient's norm."""
    assert not estimator.training and not any(weight.requires_grad for weight in estimator.parameters())
    assert {weight.dtype for weight in (estimator.text, *estimator.parameters())} == {torch.float32}
    weights = torch.randn(1, 3, 32, 32, generator=seeded(3)).double()
    images = torch.rand(1, 3, 32, 32, generator=seeded(4)).double().requires_grad_()
    estimator.double()
    try:
        gradient, = torch.autograd.grad((estimator(images) * weights).sum(), images)
        step = 1e-5 * gradient / gradient.norm()
        with torch.no_grad():
            slope = ((estimator(images + step) - estimator(images - step)) * weights).sum() / 2e-5
    finally:
        estimator.float()
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=1e-3) and slope > 0


def test_marigold_saves_memory_if_asked_and_says_when_it_is_missing(estimator, monkeypatch):
    cheap = scorers.MarigoldNormals.pretrained("cpu", checkpoint=True)
    assert cheap.vae.use_slicing and cheap.unet.is_gradient_checkpointing
    assert cheap.vae.is_gradient_checkpointing
    gradients = []
    for model in (estimator, cheap):
        images = torch.rand(2, 3, 32, 32, generator=seeded(4)).requires_grad_()
        gradients += torch.autograd.grad(model(images)[:, 0].sum(), images)
    assert close(*gradients, 1e-4)
    monkeypatch.setattr(scorers.MarigoldNormals, "name", "nowhere/at-all")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(r2d3.UserError, match="Marigold.* could not be fetched") as error:
        r2d3.load_reward("marigold", BASE, "cpu")
    assert "\n" not in str(error.value)


def test_marigold_in_half_precision(estimator):
    """bf16 as on a GPU, pictures and normals in float32. Measured: 1.5 degrees on average."""
    import copy
    half = copy.deepcopy(estimator).to(torch.bfloat16)
    images = torch.rand(2, 3, 32, 32, generator=seeded(4))
    got, want = half(images), estimator(images)
    assert got.dtype == torch.float32 and half.text.dtype == torch.bfloat16
    angle = torch.rad2deg(torch.acos((got * want).sum(1).clamp(-1, 1)))
    assert 0 < angle.mean() < 5


def sphere(views=2):
    """A rendered sphere of flat Gaussians, 48 pixels, and its true normals as Marigold paints them.

    Theirs: x to the right of the picture, y to its top, z to the viewer (diffusers' guide to Marigold): worked
    out from where the pixels' rays meet the sphere, without any of the project's cameras.
    """
    n, radius, size = 8000, 0.4, 48
    k = torch.arange(n) + 0.5
    polar, turn = torch.acos(1 - 2 * k / n), math.pi * (1 + 5 ** 0.5) * k
    points = torch.stack([polar.sin() * turn.cos(), polar.cos(), polar.sin() * turn.sin()], -1)
    half = torch.stack([1 + points[:, 2], -points[:, 1], points[:, 0], torch.zeros(n)], -1)  # +z turned to the point
    gaussians = Gaussians(radius * points[None], torch.tensor([0.01, 0.01, 1e-4]).expand(1, n, 3),
                          F.normalize(half, dim=-1)[None], torch.full((1, n), 0.99), points[None] / 2 + 0.5)
    cameras = r2d3.orbit(torch.linspace(10, 40, views), torch.linspace(0, 70, views))[None]
    got = r2d3.render(gaussians, cameras, r2d3.intrinsics(1, views), size)
    place = (torch.arange(size) + 0.5) / size - 0.5
    right, top = place.expand(size, size), -place[:, None].expand(size, size)
    ray = F.normalize(torch.stack([right, top, torch.full((size, size), -r2d3.FXFY)]), dim=0)   # z to the viewer
    along = -1.4 * ray[2]                                       # the sphere's centre is at (0, 0, -1.4)
    inside = radius ** 2 - 1.4 ** 2 + along ** 2
    hit = (along - inside.clamp(min=0).sqrt()) * ray
    normals = F.normalize(hit + torch.tensor([0, 0, 1.4]).view(3, 1, 1), dim=0)    # past the rim: the rim's
    return got, normals


class ExactMarigold:
    """The parts of a pipeline that paint the true normals of a sphere, whatever they are shown."""

    default_processing_resolution = 48

    def __init__(self, truth):
        latent = SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: torch.zeros(2, 4, 6, 6)))
        self.vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0), encode=lambda x: latent,
                                   decode=lambda z: SimpleNamespace(sample=truth.expand(2, -1, -1, -1)))
        self.unet = lambda x, t, text: SimpleNamespace(sample=x[:, :4])
        self.scheduler = SimpleNamespace(set_timesteps=lambda steps: None, timesteps=[999],
                                         step=lambda out, t, x: SimpleNamespace(prev_sample=x))
        self.tokenizer = lambda words, return_tensors: SimpleNamespace(input_ids=torch.zeros(1, 2))
        self.text_encoder = lambda words: (torch.zeros(1, 2, 16),)


def test_camera_frames_agree_on_a_sphere():
    """Rendered normals (x right, y down, z forward) against an exact estimate in Marigold's axes, from two views.

    Measured: 0.9989 (a pixel blends several splats); with any one axis turned round at most 0.66.
    """
    got, truth = sphere()
    assert (got.normal[:, :, 2][got.alpha[:, :, 0] > 0.5] < 0).all(), "they face the camera"
    score = scorers.normal_agreement(scorers.MarigoldNormals(ExactMarigold(truth)))(got, [""])
    assert score.shape == (1, 2) and (score > 0.995).all(), score
    for axis in range(3):
        wrong = truth.clone()
        wrong[axis] *= -1
        assert (scorers.normal_agreement(scorers.MarigoldNormals(ExactMarigold(wrong)))(got, [""]) < 0.8).all()


@pytest.mark.parametrize("gradient", [False, True])
def test_gradient_of_normal_agreement(gradient):
    """In closed form for an estimator whose estimate is its picture; a picture with no object scores 0."""
    a, b = (F.normalize(torch.randn(2, 3, 3, 8, 8, generator=seeded(n)), dim=2) for n in (5, 6))
    alpha = torch.rand(2, 3, 1, 8, 8, generator=seeded(7))
    alpha[1, 2] = 0
    image, normal = b.clone().requires_grad_(), a.clone().requires_grad_()
    score = scorers.normal_agreement(torch.nn.Identity(), gradient)(render_of(image, alpha=alpha, normal=normal), [])
    mask = alpha[:, :, 0] > 0.5
    want = torch.tensor([[(a * b).sum(2)[n, v][mask[n, v]].mean() if mask[n, v].any() else 0.0
                          for v in range(3)] for n in range(2)])
    assert close(score.detach(), want, 1e-6) and score[1, 2] == 0
    got = torch.autograd.grad(score.sum(), (normal, image), allow_unused=True)
    share = (mask / mask.sum((-2, -1), keepdim=True).clamp(min=1))[:, :, None]
    assert close(got[0], b * share, 1e-6)
    assert close(got[1], a * share, 1e-6) if gradient else got[1] is None


def test_angle_mask(monkeypatch):
    """Only where the surface is seen at less than 60 degrees, by the estimate (normal) or the rendering (dnc)."""
    got, truth = sphere()
    ours = truth * torch.tensor([1, -1, -1]).view(3, 1, 1)
    place = (torch.arange(48) + 0.5) / 48 - 0.5
    sight = F.normalize(torch.stack([place.expand(48, 48), place[:, None].expand(48, 48),
                                     torch.full((48, 48), r2d3.FXFY)]), dim=0)
    seen = -(sight * ours).sum(0) > math.cos(math.radians(60))
    inside = got.alpha[0, 0, 0] > 0.5
    assert 0.5 < (inside & seen).sum() / inside.sum() < 0.9
    exact = scorers.normal_agreement(lambda images: ours.expand(2, -1, -1, -1), angle_mask=True)(got, [""])
    cosine = (got.normal[0] * ours).sum(1)
    want = torch.stack([cosine[v][seen & (got.alpha[0, v, 0] > 0.5)].mean() for v in range(2)])
    assert close(exact[0], want, 1e-5)
    plain = scorers.normal_agreement(lambda images: ours.expand(2, -1, -1, -1))(got, [""])
    assert (exact - plain).abs().min() > 1e-4 and (exact > plain).all(), "the rim is the worst of it"
    full = got._replace(alpha=torch.ones_like(got.alpha))       # dnc: the rendered normals decide
    cosine = (scorers.depth_to_normals(got.depth) * got.normal).sum(2)[0]
    seen = -(sight * got.normal[0]).sum(1) > 0.5
    seen[:, [0, -1]] = seen[:, :, [0, -1]] = False              # there is no depth beyond the picture
    assert 0.2 < seen.float().mean() < 0.6
    want = torch.stack([cosine[v][seen[v]].mean() for v in range(2)])
    assert close(r2d3.depth_normal_consistency(full, [""], angle_mask=True)[0], want, 1e-5)
    assert not close(r2d3.depth_normal_consistency(full, [""])[0], want, 1e-2)


def test_angle_mask_is_the_published_one_where_that_is_right(monkeypatch):
    """Recorded: the rays (with y up, half a pixel off, which ours are not) and dnc with the mask on.

    In the recording every pixel of the object is seen at less than 60 degrees, so its mask takes nothing away.
    """
    d = load_file(ROOT / "tests/data/angle_mask.safetensors") | load_file(ROOT / "tests/data/dnc.safetensors")
    recorded = 43.95963871127396 / 32                          # with 40 degrees
    monkeypatch.setattr(cameras, "FXFY", recorded)
    monkeypatch.setattr(scorers, "FXFY", recorded)
    rays = r2d3.plucker_rays(torch.eye(4)[None, None], r2d3.intrinsics(1, 1), 32, 32)[0, 0, 3:]
    turned = d["score"].new_tensor([1, -1, 1]).view(3, 1, 1) * d["rays"].permute(2, 0, 1)
    assert (rays - turned).abs().max() < 0.6 / 43.96 and (rays + turned).abs().max() > 1
    angle = torch.rad2deg(torch.acos((d["raw_normal"] * rays).sum(1).abs().clamp(max=1)))
    assert angle[d["alpha"][:, 0] > 0.5].max() < 60
    alpha, depth, normal = (d[name][None] for name in ("alpha", "raw_depth", "raw_normal"))
    pictures = Render(alpha, alpha, depth, depth, normal)
    with_mask, without = (r2d3.depth_normal_consistency(pictures, [""], angle_mask=on) for on in (True, False))
    assert torch.equal(with_mask, without)
    published = (scorers.depth_to_normals(depth) * normal).sum(2) * (alpha > 0.5)[:, :, 0]
    assert close(published.sum((-2, -1)) / (alpha > 0.5).sum((-3, -2, -1)), d["score"][None], 2e-6)


# ---- which scorer measures a reward ----------------------------------------------------------------------------


@pytest.fixture
def asked_for(monkeypatch):
    """The published scorers' loaders, which only write down what they were asked."""
    asked = []
    for kind in ("LaionAesthetic", "HPSv2", "MarigoldNormals"):
        def pretrained(*, kind=kind, **how):
            asked.append((kind, how))
            return lambda render, prompts=None: render.image.mean((2, 3, 4)) if hasattr(render, "image") else render
        monkeypatch.setattr(getattr(scorers, kind), "pretrained", pretrained)
    return asked


def test_the_base_picks_the_scorer(asked_for):
    load = r2d3.load_reward
    assert load("aesthetic", BASE, "cpu").title == "aesthetic (embedded scorer: colourfulness)"
    assert load("hpsv2", BASE, "cpu").title == "hpsv2 (embedded scorer: image-text tower)"
    assert load("normal", BASE, "cpu").title == "normal (embedded scorer: normal estimator)"
    assert load("dnc", BASE, "cpu").title == "dnc (depth-normal consistency)" and not asked_for
    bare = SimpleNamespace(tower=None)
    assert load("aesthetic", bare, "cpu").title == "aesthetic (LAION V2, CLIP ViT-L/14)"
    assert load("hpsv2", bare, "cpu").title == "hpsv2 (HPS v2.1, CLIP ViT-H/14)"
    assert load("normal", bare, "cpu").title == "normal (Marigold v1-1, one step)"
    assert load("dnc", bare, "cpu").title == "dnc (depth-normal consistency)"
    how = {"device": "cpu", "checkpoint": False, "untrained": False}
    assert asked_for == [("LaionAesthetic", how), ("HPSv2", how | {"version": "v2.1"}), ("MarigoldNormals", how)]


def test_a_scorer_has_a_name_of_its_own(asked_for):
    """On any base, in sums, with what saves memory; the title says what measures."""
    assert r2d3.load_reward("hps-v2.0", BASE, "cpu").title == "hps-v2.0 (HPS v2.0, CLIP ViT-H/14)"
    summed = r2d3.load_reward("aesthetic=2,marigold=0.5,hpsv2", BASE, "cpu", checkpoint=True)
    assert summed.title == ("2 x aesthetic (embedded scorer: colourfulness) + 0.5 x marigold (Marigold v1-1, one step) "
                            "+ hpsv2 (embedded scorer: image-text tower)")
    how = {"device": "cpu", "checkpoint": False, "untrained": False}
    assert asked_for == [("HPSv2", how | {"version": "v2.0"}), ("MarigoldNormals", how | {"checkpoint": True})]
    bare = SimpleNamespace(tower=None)
    assert r2d3.load_reward("colorfulness", bare, "cpu").title == "colorfulness (colourfulness)"
    untrained = r2d3.load_reward("laion", bare, "cpu", untrained=True).title
    assert untrained == "laion (LAION V2, CLIP ViT-L/14, random weights)" and asked_for[-1][1]["untrained"]
    with pytest.raises(r2d3.UserError, match="there is no reward 'beauty'"):
        r2d3.load_reward("beauty", BASE, "cpu")


def test_marigold_becomes_a_reward(estimator):
    """By its name, and as `normal` of a base without an estimator: the agreement of rendered normals with its own."""
    got, _ = sphere()
    got = got._replace(image=got.image.requires_grad_(), normal=got.normal.detach().requires_grad_())
    want = scorers.normal_agreement(estimator)(got, [""])
    for name, base in (("marigold", BASE), ("normal", SimpleNamespace(tower=None))):
        score = r2d3.load_reward(name, base, "cpu")(got, [""])
        assert close(score, want, 1e-5)
        picture, normal = torch.autograd.grad(score.sum(), (got.image, got.normal), allow_unused=True)
        assert picture is None and normal.abs().max() > 0       # the estimate is detached


def test_arguments_of_the_geometry_rewards():
    """`gradient` and `angle_mask` of the functions change what they say, and where the gradient goes."""
    got, truth = sphere()
    ours = truth * torch.tensor([1, -1, -1]).view(3, 1, 1)
    got = got._replace(image=got.image.requires_grad_(), normal=got.normal.detach().requires_grad_())
    scores = [scorers.normal_agreement(lambda images: ours + 0 * images, **more)(got, [""])
              for more in ({}, {"gradient": True}, {"angle_mask": True})]
    through = [torch.autograd.grad(score.sum(), got.image, allow_unused=True)[0] for score in scores[:2]]
    assert through[0] is None and through[1] is not None
    assert torch.equal(scores[0], scores[1]) and not torch.allclose(scores[0], scores[2])
    dnc = [r2d3.depth_normal_consistency(got, [""], angle_mask=on) for on in (False, True)]
    assert not torch.allclose(*dnc)


def test_running_out_of_memory_in_a_scorer_is_not_called_its_failure(monkeypatch):
    def too_much(render, prompts):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")

    monkeypatch.setattr(scorers, "colorfulness", too_much)
    with pytest.raises(torch.OutOfMemoryError):
        r2d3.load_reward("aesthetic", BASE, "cpu")(render_of(torch.rand(1, 1, 3, 8, 8)), [""])


# ---- leaving out prompts ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    base = r2d3.load_base(Config(), "cpu")
    return base, base.encode([""]), r2d3.NoiseSchedule.from_diffusers("dpm", 3)


@pytest.fixture
def setting(shapes, tmp_path):
    """A job, 12 prompts for it in three batches, and what the base scores on each, by rollout and judge."""
    base, null, schedule = shapes
    prompts = (ROOT / "prompts/shapes_train.txt").read_text(encoding="utf-8").splitlines()[:12]
    config = Config(out=str(tmp_path), steps=3, views=1, view_size=16, guidance=2.0, eval_batch=5,
                    min_quantile=0.25, seed=3)
    job = r2d3.Job(base, r2d3.load_reward("aesthetic", base, "cpu"), schedule, null, config)
    generators = [seeded("filter", prompt) for prompt in prompts]
    x0 = job.rollout(prompts, generators).x[:, -1]
    return job, prompts, dict(zip(prompts, job.judge(x0, prompts, generators)[0].tolist()))


def filtered(job, prompts, identity):
    """As `begin` leaves prompts out."""
    return folders.without_lowest(prompts, job.config, partial(r2d3.score_prompts, job), identity, job.rank, job.world)


def best_of(prompts, scores):
    return [prompt for prompt in prompts if prompt not in set(sorted(prompts, key=scores.get)[:3])]


def with_config(job, **changes):
    return job._replace(config=dataclasses.replace(job.config, **changes))


SAME = {"weights": "the same", "reward": {}}


def scores_file():
    file, = Path(os.environ["XDG_CACHE_HOME"], "r2d3/scores").iterdir()
    return file


def test_the_lowest_prompts_are_left_out_and_the_list_is_kept(setting, monkeypatch):
    job, prompts, scores = setting
    want = best_of(prompts, scores)
    twice = [prompts[0]] * 3 + prompts + [prompts[7]]
    assert filtered(job, prompts, SAME) == want and len(want) == 9
    assert json.loads(scores_file().read_text(encoding="utf-8")) == pytest.approx(scores, abs=1e-5)
    again = [p for p in twice if p in want]                     # a prompt that is there twice counts once
    assert filtered(job, twice, SAME) == again

    def untouchable(*arguments, **more):
        raise AssertionError("scored again")

    monkeypatch.setattr(r2d3.Job, "rollout", untouchable)
    later = with_config(job, resume=True, epochs=99, out="elsewhere", seed=4, lr=0.1, eval_batch=7)
    assert filtered(later, prompts, SAME) == want
    other = [prompts[0], "a red cube", *prompts[2:]]            # a file that has changed
    for changed, named, identity in ((with_config(job, views=2), prompts, SAME), (job, other, SAME),
                                     (with_config(job, reward="dnc"), prompts, SAME),
                                     (job, prompts, {"weights": "others", "reward": {}})):
        with pytest.raises(AssertionError, match="scored again"):   # scores of something else
            filtered(changed, named, identity)
    assert filtered(with_config(job, min_quantile=0.0), prompts, SAME) == prompts


def test_an_interrupted_pass_goes_on(setting):
    job, prompts, scores = setting
    calls = []

    def unplugged(pictures, part):
        calls.append(part)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return job.reward(pictures, part)

    with pytest.raises(KeyboardInterrupt):
        filtered(job._replace(reward=unplugged), prompts, SAME)
    got = filtered(job._replace(reward=unplugged), prompts, SAME)
    assert calls == [prompts[:5], prompts[5:10], prompts[5:10], prompts[10:]]
    assert got == best_of(prompts, scores)
    scores_file().write_text("{ half a fi", encoding="utf-8")
    assert filtered(job, prompts, SAME) == got


def test_a_changed_reward_scores_again(setting, tmp_path):
    job, prompts, _ = setting
    mine = tmp_path / "mine.py"
    for sign in "+-":
        mine.write_text(f"def score(render, prompts):\n    return {sign}render.image.mean((2, 3, 4))\n", encoding="utf-8")
        spec = f"dnc=0.1,{mine}:score=2"
        changed = with_config(job, reward=spec)._replace(reward=r2d3.load_reward(spec, job.base, "cpu"))
        assert filtered(changed, prompts, folders.identify(job.base, spec))
    assert len(list(Path(os.environ["XDG_CACHE_HOME"], "r2d3/scores").iterdir())) == 2


def test_processes_share_the_work(setting, monkeypatch, tmp_path):
    """Two processes, one after the other: each scores its share of every batch, and both get the list of a single one."""
    job, prompts, scores = setting
    shares = {0: {}, 1: {}}
    for rank in range(2):
        batches = iter((prompts[:10], prompts[10:]))

        def gather(mine, world, *wait):
            if not mine:                                        # what is known from before: nothing
                return [mine] * world
            theirs = {prompt: scores[prompt] for prompt in next(batches)[1 - rank::2]}
            assert not mine.keys() & theirs.keys()
            shares[rank] |= mine
            return [mine, theirs] if rank == 0 else [theirs, mine]

        monkeypatch.setattr(r2d3.processes, "gather", gather)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache{rank}"))
        assert filtered(job._replace(rank=rank, world=2), prompts, SAME) == best_of(prompts, scores)
    assert [list(share) for share in shares.values()] == [prompts[0::2], prompts[1::2]]
    assert {**shares[0], **shares[1]} == pytest.approx(scores, abs=1e-5)


def test_a_score_that_is_not_a_number_is_the_lowest(setting):
    job, prompts, _ = setting

    def broken(render, named):
        rows = [math.nan if prompt in (prompts[1], prompts[8], prompts[11]) else 0.5 for prompt in named]
        return torch.tensor(rows)[:, None]

    for _ in range(2):                                          # the second time from the file
        got = filtered(job._replace(reward=broken), prompts, SAME)
        assert got == [p for n, p in enumerate(prompts) if n not in (1, 8, 11)]


def test_geometry_rewards_filter_by_default():
    share = {(base, reward): r2d3.resolve(Config(base=base, reward=reward, device="cpu")).min_quantile
             for base in ("shapes", "diffsplat-pixart") for reward in ("aesthetic", "hpsv2", "normal", "dnc")}
    assert {key for key, value in share.items() if value} == {("diffsplat-pixart", "normal"),
                                                              ("diffsplat-pixart", "dnc")}
    assert r2d3.resolve(Config(min_quantile=0.5, device="cpu")).min_quantile == 0.5
    for wrong in (-0.1, 0.95, math.nan):
        with pytest.raises(r2d3.UserError, match="--min-quantile"):
            r2d3.resolve(Config(min_quantile=wrong, device="cpu"))


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_a_long_list_loads_fast(tmp_path):
    """As long as G-Objaverse's, 83,296 lines; measured 0.03 s."""
    lines = [f"a wooden chair number {n} with brass fittings and a cushion" for n in range(83296)]
    (tmp_path / "long.txt").write_text("\n".join(lines) + "\n\n")
    begun = time.process_time()
    assert r2d3.inputs.load_prompts(str(tmp_path / "long.txt")) == lines
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("prompt", ["a red cube.", "a black/white cow, 1.5 m tall", "hpdv2 style chair", "x" * 900,
                                    "ein gr\u00fcner W\u00fcrfel " * 30])
def test_a_prompt_is_itself(prompt):
    assert r2d3.inputs.load_prompts(f" {prompt}") == [prompt.strip()]


@pytest.mark.parametrize("spec", ["nowhere.txt", "no where.txt", "folder/file", "list.csv"])
def test_a_missing_file_is_not_a_prompt(spec):
    with pytest.raises(r2d3.UserError, match=re.escape(f"there is no prompt file {spec}")):
        r2d3.inputs.load_prompts(spec)


def test_hpdv2_comes_through_its_package(monkeypatch):
    package, asked = ModuleType("hpsv2"), []
    package.benchmark_prompts = lambda style: asked.append(style) or [" A  toad\nin the rain ", "Two cats."]
    package.utils = ModuleType("hpsv2.utils")
    monkeypatch.setitem(sys.modules, "hpsv2", package)
    monkeypatch.setitem(sys.modules, "hpsv2.utils", package.utils)
    for style in ("photo", "anime", "concept-art", "paintings"):
        assert r2d3.inputs.load_prompts(f"hpdv2:{style}") == ["A toad in the rain", "Two cats."]
    assert asked == ["photo", "anime", "concept-art", "paintings"]
    with pytest.raises(r2d3.UserError, match="the styles are photo, anime, concept-art and paintings"):
        r2d3.inputs.load_prompts("hpdv2:sculpture")

    def offline(style):
        raise ConnectionError("no network\nhere")

    package.benchmark_prompts = offline
    with pytest.raises(r2d3.UserError, match="HPDv2 benchmark prompts could not be fetched") as error:
        r2d3.inputs.load_prompts("hpdv2:photo")
    assert "\n" not in str(error.value)


def test_hpdv2_with_the_real_package(monkeypatch, tmp_path):
    """The package's own function, with the files where the hub's cache would have them."""
    hpsv2 = pytest.importorskip("hpsv2")
    for style in ("photo", "anime", "concept-art", "paintings"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} one", f"{style} two"]))
    for module in (hpsv2, hpsv2.utils):
        monkeypatch.setattr(module, "root_path", str(tmp_path / "cache"))
        monkeypatch.setattr(module.huggingface_hub, "hf_hub_download", lambda repository, name, **where: str(
            tmp_path / name))
    assert r2d3.inputs.load_prompts("hpdv2:concept-art") == ["concept-art one", "concept-art two"]


def test_object_captions():
    """Written captions: enough of them, all different, none trained on that is measured, of one plain style."""
    train, test = (r2d3.inputs.load_prompts(str(ROOT / f"prompts/objects_{name}.txt")) for name in ("train", "test"))
    assert len(train) >= 600 and len(test) == 60
    everything = train + test
    plain = [re.sub(r"[^a-z0-9 ]", "", line.lower()) for line in everything]
    assert len(set(plain)) == len(everything)
    for line in everything:
        assert line.isascii() and line == line.strip() and "  " not in line and not line.endswith("."), line
        assert 4 <= len(line.split()) <= 20 and len(line) <= 110, line
    assert 6 <= sum(len(line.split()) for line in everything) / len(everything) <= 13
    starts = [" ".join(line.split()[:3]) for line in plain]
    assert max(starts.count(start) for start in starts) <= 0.03 * len(starts), "no template"
    assert len({word for line in plain for word in line.split()}) > 1500
    small = {"a", "an", "and", "in", "of", "on", "the", "with"}
    words = [set(line.split()) - small for line in plain]
    for seen in words[len(train):]:                             # not the same object in other words either
        assert all(len(seen & other) <= 0.5 * len(seen | other) for other in words[:len(train)]), seen
