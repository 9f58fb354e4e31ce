"""The embedded base: its file, its prompts, its data, and the script that makes it."""
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "experiments"))

import make_shapes  # noqa: E402

import r2d3  # noqa: E402

ASSET = ROOT / "support/shapes.safetensors"
TRAIN, TEST = ((ROOT / f"prompts/shapes_{name}.txt").read_text().splitlines() for name in ("train", "test"))


@pytest.fixture(scope="module")
def base():
    return r2d3.load_base(r2d3.resolve(r2d3.Config()), "cpu")


def test_the_file_is_small_and_meets_its_bar():
    _, about = r2d3.load_weights(ASSET)
    quality = json.loads(about["quality"])
    assert ASSET.stat().st_size <= 12e6 and "make_shapes.py" in about["source"]
    assert quality["named_right_true_pictures"] >= 0.95
    assert quality["named_right_samples_by_guidance"]["2.0"] >= 0.85 and quality["samples"] == 240


def test_test_prompts_are_unseen_combinations():
    assert len(set(TEST)) == 60 and len(set(TRAIN)) == 200 and not set(TEST) & set(TRAIN)
    assert all(make_shapes.is_unseen(make_shapes.parse_caption(prompt)) for prompt in TEST)
    assert not any(make_shapes.is_unseen(make_shapes.parse_caption(prompt)) for prompt in TRAIN)
    for prompt in TEST + TRAIN:
        assert make_shapes.caption(make_shapes.parse_caption(prompt)) == prompt
    assert sum(" on " in prompt for prompt in TEST) >= 30
    seen = {part[1:] for prompt in TRAIN for part in make_shapes.parse_caption(prompt)}
    assert {color for color, _ in seen} == set(make_shapes.HUES) and {s for _, s in seen} == set(make_shapes.SHAPES)


def test_training_never_draws_an_unseen_combination():
    rng = random.Random(0)
    scenes = [make_shapes.draw_geometry(rng) for _ in range(8)]
    traced = make_shapes.trace(scenes)
    data = {"scenes": scenes, "traced": traced, "channels": make_shapes.geometry_channels(traced).half()}
    for seed in range(20):
        _, parts = make_shapes.draw_scenes(data, list(range(8)), random.Random(seed), True)
        assert not any(make_shapes.is_unseen(part) for part in parts)


def test_geometry_is_where_it_should_be():
    """A traced sphere, decoded into splats and rasterised: depth, silhouette and normals of that sphere."""
    size = 0.26
    part = {"shape": "sphere", "size": "", "yaw": 0.3, "stretch": 1.0, "radius": size, "half": 0.95 * size, "y": 0.0}
    channels = make_shapes.geometry_channels(make_shapes.trace([{"parts": [part]}]))
    assert channels.shape == (1, 4, 12, 32, 32) and channels.abs().max() <= 1.001
    cameras = r2d3.input_cameras(1)
    out = r2d3.render(make_shapes.splats(channels), *cameras, 64)
    radius = 0.95 * size
    middle = out.depth[0, 0, 0, 31:33, 31:33].mean().item()
    assert middle == pytest.approx(1.4 - radius, abs=0.01)
    angular = math.asin(radius / 1.4)
    area = math.pi * (math.tan(angular) * r2d3.FXFY) ** 2
    assert (out.alpha[0] > 0.5).float().mean().item() == pytest.approx(area, rel=0.25)  # splats reach over the rim
    assert out.normal[0, 0, :, 31:33, 31:33].mean((1, 2)).tolist() == pytest.approx([0, 0, -1], abs=0.15)
    left, right = out.normal[0, 0, 0, 32, 24].item(), out.normal[0, 0, 0, 32, 40].item()
    assert left < -0.2 and right > 0.2  # x is to the right, and the sphere is convex; 0.42 where splats do not blend


def test_words(base):
    cond = base.encode(["", "a red cube"])
    assert cond.embeds.shape[:2] == cond.mask.shape and cond.mask.sum(1).tolist() == [1, 3]
    assert torch.equal(base.encode(["A Red CUBE"]).embeds, cond.embeds[1:])
    with pytest.raises(r2d3.UserError, match="teapot"):
        base.encode(["a red teapot"])


def test_prediction_is_eps(base):
    """At high noise x is nearly eps itself; at every level the estimate of x0 is closer to x0 than x is."""
    schedule = r2d3.NoiseSchedule.from_diffusers("dpm", 20)
    cond, null = base.encode(TEST[:4]), base.encode([""])
    x0 = r2d3.rollout(base, schedule, cond, null, base.guidance, r2d3.seeded(0)).x[:, -1]
    noise = torch.randn(x0.shape, generator=r2d3.seeded(1))
    for i in (0, 5, 10, 15, 19):
        x = (schedule.alpha[i] * x0 + schedule.sigma[i] * noise).float()
        with torch.no_grad():
            eps = base.predict(x, schedule.t(i).expand(4), cond)
        estimate = schedule.x0(x, eps, i)
        assert (eps - noise).square().mean() < 0.5
        assert (estimate - x0).square().mean() < (x - x0).square().mean()


def test_samples_are_what_the_prompts_say(base):
    pictures = make_shapes.sample_pictures(base, TEST[:20], base.guidance)
    parts = [make_shapes.parse_caption(prompt) for prompt in TEST[:20]]
    assert make_shapes.named_right(base.tower, pictures, parts) > 0.75
    wrong = [make_shapes.parse_caption(prompt) for prompt in reversed(TEST[:20])]
    assert make_shapes.named_right(base.tower, pictures, wrong) < 0.3


def test_the_script_makes_a_base_and_goes_on_where_it_was(tmp_path):
    command = [sys.executable, str(ROOT / "experiments/make_shapes.py"), "--quick", "--work", str(tmp_path), "--out",
               str(tmp_path / "shapes.safetensors")]
    first = subprocess.run([*command, "--until", "judges"], capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == 0 and not (tmp_path / "shapes.safetensors").exists(), first.stderr[-2000:]
    stamp = (tmp_path / "ae.pt").stat().st_mtime_ns
    second = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert second.returncode == 0 and (tmp_path / "ae.pt").stat().st_mtime_ns == stamp, second.stderr[-2000:]
    made = r2d3.load_base(r2d3.resolve(r2d3.Config(weights=str(tmp_path / "shapes.safetensors"))), "cpu")
    assert made.latent_shape == (4, 8, 8, 8) and made.tower.image(torch.rand(2, 3, 64, 64)).shape == (2, 64)
