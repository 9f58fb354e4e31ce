"""The paper's evaluation: FID as torchmetrics computes it, CLIP similarity as open_clip does, averaged as the paper
says, beside the paper's own numbers. Tiny random networks stand for the published ones, on the same code path.
"""
import io
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image


import r2d3  # noqa: E402
from support import UserError, metrics  # noqa: E402


def stored(pictures):
    """(N, 3, H, W) in [0, 1] -> the pictures after they have been written as .png and read again, as PIL has them."""
    out = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()).save(file, "PNG")
        out.append(Image.open(file).convert("RGB"))
    return out


def blobs(count, size, seed):
    """Smooth coloured pictures on white, such as renders are."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    out = torch.ones(count, 3, size, size)
    for _ in range(3):
        cx, cy, width = (torch.rand(3, count, 1, 1, generator=generator) - 0.5).unbind(0)
        alpha = torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (0.1 + 0.2 * width.abs()))[:, None]
        out = out * (1 - alpha) + alpha * torch.rand(count, 3, 1, 1, generator=generator)
    return out


class TinyInception(nn.Module):
    """Takes bytes and gives features, as FID's Inception does."""

    def __init__(self, width):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(3, width, 5, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.num_features = width

    @torch.no_grad()
    def forward(self, pictures):
        assert pictures.dtype == torch.uint8
        return 20 * self.layers(pictures.float() / 128 - 1)


@pytest.mark.parametrize("width", [6, 40])                      # more and fewer features than pictures
def test_multi_view_fid_is_torchmetrics_per_prompt_and_view(width):
    from torchmetrics.image.fid import FrechetInceptionDistance
    net, P, S, V = TinyInception(width), 2, 12, 2
    sets = [blobs(P * S * V, 40, seed).unflatten(0, (P, S, V)) for seed in (0, 1)]
    features = [net((pictures.flatten(0, 2) * 255).round().byte()).unflatten(0, (P, S, V)) for pictures in sets]
    got, want = metrics.multi_view_fid(*features), []
    for p in range(P):
        for v in range(V):
            fid = FrechetInceptionDistance(feature=net)
            for pictures, real in zip(sets, (False, True)):
                rows = torch.from_numpy(np.stack([np.asarray(one) for one in stored(pictures[p, :, v])]))
                fid.update(rows.permute(0, 3, 1, 2).contiguous(), real=real)
            want.append(fid.compute())
    want = torch.stack(want).unflatten(0, (P, V)).mean(1)
    assert got.shape == (P,) and want.min() > 1 and (got - want).abs().max() < 0.01, (got, want)   # measured 1e-5
    pooled = metrics.frechet_distance(*(f.flatten(0, 2) for f in features))
    assert (got.mean() - pooled).abs() > 0.05                   # it is not the FID of all pictures
    assert metrics.multi_view_fid(features[0], features[0]).abs().max() < 1e-6


def test_inception_is_that_of_torchmetrics_and_rounds_pictures(monkeypatch):
    """The real network with random weights: pictures in [0, 1] give what their stored bytes give to torchmetrics."""
    import torch_fidelity.feature_extractor_inceptionv3 as fidelity
    from torchmetrics.image.fid import FrechetInceptionDistance
    monkeypatch.undo()                                          # conftest's stand-in
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **more: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *args, **more: None)
        torch.manual_seed(0)
        ours = metrics.inception("cpu")
        torch.manual_seed(0)
        theirs = FrechetInceptionDistance(feature=2048).inception
    pictures = blobs(2, 64, 0)
    rows = torch.from_numpy(np.stack([np.asarray(one) for one in stored(pictures)])).permute(0, 3, 1, 2).contiguous()
    got, want = ours(pictures), theirs(rows)
    assert got.shape == (2, 2048) and torch.equal(got, want) and want.std() > 0
    assert not torch.allclose(ours(1 - pictures), want)


def test_clip_similarity_is_open_clips(monkeypatch):
    """Cosines of stored pictures and prompts against open_clip's own preprocessing and towers, to 1e-4."""
    import open_clip
    from open_clip.model import CLIP
    asked, tokenize = [], open_clip.get_tokenizer("ViT-B-32-quickgelu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = CLIP(32, {"image_size": 56, "layers": 2, "width": 64, "head_width": 16, "patch_size": 14},
                    {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}).eval()
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **more: asked.append((args, more)) or clip)
    features = metrics.load_features(None, "cpu")
    assert asked == [(("ViT-B-32-quickgelu",), {"pretrained": "openai"})] and "ViT-B/32" in features.title
    prompts, V = ["a red cube", "a lamp with two arms", "a blue chair"], 4
    pictures = blobs(len(prompts) * V, 224, 3)
    preprocess = open_clip.image_transform(clip.visual.image_size, is_train=False, resize_mode="shortest")
    with torch.no_grad():
        rows = torch.stack([preprocess(one) for one in stored(pictures)])
        image, text = clip.encode_image(rows, normalize=True), clip.encode_text(tokenize(prompts), normalize=True)
        want = (image.unflatten(0, (-1, V)) * text[:, None]).sum(-1).mean(1)                       # per view, averaged
        seen = features.image(pictures).unflatten(0, (-1, V)).mean(1)
        got = (seen * features.text(prompts)).sum(-1)                                              # as measure() does
    assert (got - want).abs().max() < 1e-4, (got, want)
    assert (got - got.roll(1)).abs().min() > 1e-3               # the prompts differ by more than that
    similarity = metrics.multi_view_clip_similarity(got[:, None].expand(-1, 5))
    assert torch.allclose(similarity, 100 * want, atol=1e-2) and similarity.shape == (3,)


def measurement(P=5, S=8, V=4, D=16, shift=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompt = 10 * torch.randn(P, 1, 1, D, generator=torch.Generator().manual_seed(99))
    features = prompt + shift + torch.randn(P, S, V, D, generator=generator)
    value = torch.rand(P, S, generator=generator)
    return metrics.Measurement(value + shift, 0.3 + 0.01 * value, value, value, value,
                               nn.functional.normalize(features, dim=-1), features, value)


def test_the_papers_three_columns(capsys):
    before, other, after = measurement(seed=0), measurement(seed=1), measurement(shift=3.0, seed=2)
    result = metrics.paper_protocol(before, after, other, base="diffsplat-pixart", reward="aesthetic", method="nabla")
    floor, moved = (result["multi_view_fid"][when] for when in ("before", "after"))
    assert moved - floor == pytest.approx(9 * 16, rel=0.2)      # the squared distance of the means, in every view
    assert 0 < floor < 40
    assert result["reward"]["before"] == pytest.approx(before.reward.mean().item(), abs=1e-6)
    low, high = result["multi_view_fid"]["after_ci95"]
    assert low < moved < high
    clip = result["multi_view_clip_similarity"]["before"]
    assert clip == pytest.approx(100 * before.alignment.mean().item(), abs=1e-4) and 30 < clip < 31
    assert result["paper"] == {"before": (4.72, 55.26, 34.58), "after": (6.44, 217.89, 25.86)}
    metrics.print_paper_protocol(result, "CLIP ViT-B/32, Inception (FID)")
    printed = capsys.readouterr().out
    assert "paper: 6.44 / 217.89 / 25.86" in printed and "paper: 4.72 / 55.26 / 34.58" in printed
    assert "multi-view FID" in printed and "multi-view CLIP similarity x 100" in printed and "Inception" in printed
    assert "5 prompts x 8 objects x 4 views" in printed
    assert metrics.paper_table(result)[1][0][-2:] == ["4.72", "6.44"]


@pytest.mark.parametrize("base, reward, method, want", [
    ("diffsplat-pixart", "hpsv2", "draft", (32.65, 224.64, 33.99)),
    ("diffsplat-pixart", "dnc", "base", (87.81, 55.26, 34.58)),
    ("diffsplat-sd15", "laion", "ddpo", (4.80, 54.79, 34.61)),
    ("gaussiancube", "aesthetic", "nabla", (5.92, 234.96, 22.57)),
    ("gaussiancube", "hpsv2", "nabla", None), ("shapes", "aesthetic", "nabla", None),
    ("diffsplat-pixart", "aesthetic=1,dnc=1", "nabla", None)])
def test_which_rows_of_the_paper_are_shown(base, reward, method, want, capsys):
    before, other = measurement(seed=0), measurement(seed=1)
    result = metrics.paper_protocol(before, before, other, base=base, reward=reward, method=method)
    assert (result["paper"] and result["paper"]["after"]) == want
    metrics.print_paper_protocol(result, "CLIP")
    printed = capsys.readouterr().out
    assert ("paper: " in printed) == (want is not None)
    times = 100 if reward in ("hpsv2", "dnc") else 1            # the paper's tables give these times 100
    assert result["reward"]["after"] == pytest.approx(times * before.reward.mean().item(), rel=1e-5)
    assert ("reward x 100" in printed) == (times == 100)


def test_one_object_a_prompt_has_no_distribution():
    """Found before any work."""
    config = r2d3.Config(protocol="paper", samples_per_prompt=1, device="cpu")
    with pytest.raises(UserError, match="--samples-per-prompt 2 or more"):
        r2d3.resolve(config, "evaluate")
    r2d3.resolve(r2d3.Config(protocol="paper", device="cpu"), "evaluate")


@pytest.mark.parametrize("rank", [8, 3])
def test_one_command_evaluates_a_lora_of_the_authors_code(rank, tmp_path, monkeypatch, capsys):
    """Their pytorch_lora_weights.safetensors, of any rank, in the paper's terms beside the paper's numbers."""
    import open_clip
    from open_clip.model import CLIP
    from safetensors.torch import save_file
    from test_bases import write_folder
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = CLIP(32, {"image_size": 28, "layers": 1, "width": 32, "head_width": 16, "patch_size": 14},
                    {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}).eval()
        folder = write_folder(tmp_path / "weights", "diffsplat-pixart")
        config = r2d3.resolve(r2d3.Config(base="diffsplat-pixart", weights=str(folder), device="cpu"))
        net = r2d3.load_base(config, "cpu").net
        lora = {}
        for name, layer in net.named_modules():
            if name.endswith((".to_q", ".to_v", "proj_out")):
                lora[f"unet.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features)
                lora[f"unet.{name}.lora_B.weight"] = 0.3 * torch.randn(layer.out_features, rank)
    save_file(lora, tmp_path / "pytorch_lora_weights.safetensors")
    tuned = r2d3.inputs.load_lora(net, tmp_path / "pytorch_lora_weights.safetensors")
    scales = {layer.scaling["default"] for layer in tuned.modules() if hasattr(layer, "scaling")}
    assert scales == {8 / rank}                                 # they never set lora_alpha, peft's default is 8
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **more: clip)
    monkeypatch.setattr(r2d3.DiffSplat, "eval_size", property(lambda self: 28, lambda self, size: None), raising=False)
    (tmp_path / "test.txt").write_text("a red cube\na blue lamp with two arms", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [
        "r2d3.py", "evaluate", "--base", "diffsplat-pixart", "--weights", str(folder), "--reward", "dnc",
        "--protocol", "paper", "--run", str(tmp_path / "pytorch_lora_weights.safetensors"),
        "--test-prompts", str(tmp_path / "test.txt"),
        "--samples-per-prompt", "3", "--steps", "3", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert r2d3.main() == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "paper: 87.81 / 55.26 / 34.58" in printed and "paper: 89.53 / 99.01 / 34.08" in printed
    assert "2 prompts x 3 objects x 4 views" in printed and "reward x 100" in printed
    result = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))["paper_protocol"]
    assert result["multi_view_fid"]["after"] != result["multi_view_fid"]["before"]
    assert result["reward"]["after"] != result["reward"]["before"] and 1 < result["reward"]["before"] < 100
