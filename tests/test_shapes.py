"""The embedded base: the file and prompts that are here, and the script that makes them."""
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

import make_shapes  # noqa: E402

import common
import r2d3  # noqa: E402
from support import load_weights  # noqa: E402

ASSET = ROOT / "support/shapes.safetensors"
TRAIN, TEST = ((ROOT / f"prompts/shapes_{name}.txt").read_text(encoding="utf-8").splitlines()
               for name in ("train", "test"))


@pytest.fixture(scope="module")
def base():
    return r2d3.load_base(r2d3.resolve(r2d3.Config()), "cpu")


# ---- The file that is here ----


def test_the_file_is_small_and_meets_its_bar():
    """What make_shapes.py measured of it: see experiments/README.md for what each of these is."""
    _, about = load_weights(ASSET)
    quality, made = json.loads(about["quality"]), json.loads(about["config"])
    assert ASSET.stat().st_size <= 12e6 and "make_shapes.py" in about["source"]
    assert quality["samples_per_prompt"] == {"closed": 16, "open": 16, "hard": 8} and quality["prompts"] == 90
    assert made["guidance"] == quality["guidance"] and quality["steps"] == r2d3.resolve(r2d3.Config()).steps
    assert quality["autoencoder"]["psnr_decoded_to_true"] >= 25.2            # the first edition's was 23.2


def check_split(train, test):
    """No test prompt was trained on, training prompts are all of the other side, and captions read back."""
    assert len({*train, *test}) == len(train) + len(test)
    assert all(make_shapes.is_unseen(make_shapes.parse_caption(prompt)) for prompt in test)
    assert not any(make_shapes.is_unseen(make_shapes.parse_caption(prompt)) for prompt in train)
    for prompt in train + test:
        assert make_shapes.caption(make_shapes.parse_caption(prompt)) == prompt
    seen = {part[1:] for prompt in train for part in make_shapes.parse_caption(prompt) if all(part[1:])}
    assert {color for color, _ in seen} == set(make_shapes.HUES) and {s for _, s in seen} == set(make_shapes.SHAPES)


def test_prompts_are_closed_open_and_hard_in_turn(tmp_path):
    assert len(TEST) == 90 and len(TRAIN) == 240
    check_split(TRAIN, TEST)
    for prompts in (TEST, TRAIN):
        groups = [make_shapes.group(make_shapes.parse_caption(prompt)) for prompt in prompts]
        assert groups == ["closed", "open", "hard"] * (len(prompts) // 3)
    assert all(prompt.count(" on ") == 2 for prompt in TEST[2::3])
    assert sum(" on " in prompt for prompt in TEST[::3]) > 10
    make_shapes.write_prompts(tmp_path)
    for name, prompts in (("train", TRAIN), ("test", TEST)):
        assert (tmp_path / f"shapes_{name}.txt").read_text(encoding="utf-8").splitlines() == prompts


def test_words(base):
    cond = base.encode(["", "a red cube"])
    assert cond.embeds.shape[:2] == cond.mask.shape and cond.mask.sum(1).tolist() == [1, 3]
    assert torch.equal(base.encode(["A Red CUBE"]).embeds, cond.embeds[1:])
    with pytest.raises(r2d3.UserError, match="teapot"):
        base.encode(["a red teapot"])


def test_prediction_is_eps(base):
    """At high noise x is nearly eps itself; at every level the estimate of x0 is closer to x0 than x is."""
    schedule = base.schedule("dpm", 20)
    cond, null = base.encode(TEST[:4]), base.encode([""])
    x0 = common.rollout(base, schedule, cond, null, base.guidance, [r2d3.seeded(n) for n in range(4)]).x[:, -1]
    noise = torch.randn(x0.shape, generator=r2d3.seeded(1))
    for i in (0, 5, 10, 15, 19):
        x = (schedule.alpha[i] * x0 + schedule.sigma[i] * noise).float()
        with torch.no_grad():
            eps = base.predict(x, schedule.t(i).expand(4), cond)
        estimate = schedule.x0(x, eps, i)
        assert (eps - noise).square().mean() < 0.5
        assert (estimate - x0).square().mean() < (x - x0).square().mean()


def test_samples_are_what_the_prompts_say(base):
    closed = TEST[:60:3]
    said = [make_shapes.parse_caption(prompt) for prompt in closed]
    pictures = make_shapes.observe_samples(base, closed, base.guidance, make_shapes.STEPS)["picture"]
    assert make_shapes.named_right(make_shapes.name_objects(base.tower, pictures, said), said) > 0.75
    pairs = [(picture, wrong) for picture, own, wrong in zip(pictures, said, said[::-1]) if len(own) == len(wrong)]
    pictures, wrong = torch.stack([picture for picture, _ in pairs]), [parts for _, parts in pairs]
    assert make_shapes.named_right(make_shapes.name_objects(base.tower, pictures, wrong), wrong) < 0.35


# ---- The script's world ----


@pytest.mark.parametrize("text, parts", [
    ("a small red cube on a big blue ring", [("small", "red", "cube"), ("big", "blue", "ring")]),
    ("something red", [("", "red", "")]), ("something", [("", "", "")]),
    ("an orange cone on a small thing", [("", "orange", "cone"), ("small", "", "")]),
    ("a big red thing on a cube on something gray", [("big", "red", ""), ("", "", "cube"), ("", "gray", "")])])
def test_captions(text, parts):
    assert make_shapes.caption(parts) == text and make_shapes.parse_caption(text) == parts


def test_training_never_draws_what_is_kept_out():
    rng = random.Random(0)
    data = make_shapes.trace_all([make_shapes.draw_geometry(rng) for _ in range(8)])
    opened = 0
    for seed in range(40):
        _, every = make_shapes.draw_scenes(data, list(range(8)), random.Random(seed), True)
        for parts in every:
            said = make_shapes.training_caption(parts, rng)
            assert not make_shapes.is_unseen(parts) and not make_shapes.is_unseen(said)
            assert make_shapes.agrees(parts, said)
            opened += make_shapes.is_open(said)
    assert 0.3 < opened / 320 < 0.5


def test_what_is_left_open_is_filled_in_as_in_the_data():
    """A cube of no said colour has every colour but the one in which training never shows it, equally often."""
    rng = random.Random(0)
    drawn = [make_shapes.fill_in([("", "", "cube")], rng)[0] for _ in range(2000)]
    kept_out, = (color for color, shape in make_shapes.UNSEEN if shape == "cube")
    counts = {color: sum(part[1] == color for part in drawn) for color in make_shapes.HUES}
    assert counts.pop(kept_out) == 0 and {part[2] for part in drawn} == {"cube"}
    assert all(count == pytest.approx(2000 / 7, rel=0.25) for count in counts.values())
    assert make_shapes.fill_in([("", kept_out, "cube")], rng) == [("", kept_out, "cube")]      # what is said stays


def one_object(shape, size, yaw=0.0):
    half = make_shapes.half_height(shape, size, 1.0)
    return {"parts": [{"shape": shape, "size": "", "yaw": yaw, "stretch": 1.0, "radius": size, "half": half, "y": 0.0}]}


def test_geometry_is_where_it_should_be():
    """A traced sphere, decoded into splats and rasterised: depth, silhouette and normals of that sphere."""
    grids = make_shapes.paint(make_shapes.trace([one_object("sphere", 0.26)]), [["red"]], random.Random(0))
    assert grids.shape == (1, 4, 12, make_shapes.GRID, make_shapes.GRID) and grids.abs().max() <= 1.001
    out = r2d3.render(make_shapes.splats(grids), *r2d3.input_cameras(1), 64)
    radius = 0.95 * 0.26
    middle = out.depth[0, 0, 0, 31:33, 31:33].mean().item()
    assert middle == pytest.approx(1.4 - radius, abs=0.015)
    area = math.pi * (math.tan(math.asin(radius / 1.4)) * r2d3.FXFY) ** 2
    assert (out.alpha[0] > 0.5).float().mean().item() == pytest.approx(area, rel=0.15)  # splats reach over the rim
    assert out.normal[0, 0, :, 31:33, 31:33].mean((1, 2)).tolist() == pytest.approx([0, 0, -1], abs=0.15)
    left, right = out.normal[0, 0, 0, 32, 24].item(), out.normal[0, 0, 0, 32, 40].item()
    assert left < -0.2 and right > 0.2  # x is to the right, and the sphere is convex; 0.42 where splats do not blend
    assert out.image[0, 0, 0, 32, 32] > out.image[0, 0, 2, 32, 32] + 0.15                         # red


def test_a_quarter_turn_moves_the_views():
    """Turned without tracing anew, a scene is what tracing it at another yaw gives."""
    straight, yawed = (make_shapes.trace([one_object("cube", 0.3, yaw)]) for yaw in (0.4, 0.4 + math.pi / 2))
    turned = make_shapes.turned(straight, [0], torch.tensor([1]))
    for key in ("hit", "z", "normal", "own", "across"):
        close = (turned[key].float() - yawed[key].float()).abs() < 0.02
        assert close.float().mean() > 0.99, key                     # rounding moves a few rays at the rim


def test_splats_do_not_reach_over_an_edge():
    """On the top of a cube, seen at a low angle, splats are long away from us, and narrower next to its sides."""
    scene = one_object("cube", 0.3)
    scene["parts"][0]["y"] = -0.25                                  # well below the cameras
    traced = make_shapes.trace([scene])
    top = (traced["hit"] & (traced["normal"][..., 1] > 0.9))[0, 0]                 # in the view from +z
    across, x = traced["across"][0, 0].float(), traced["own"][0, 0, ..., 0].float().abs()
    inside, edge = across[top & (x < 0.5)], across[top & (x > 0.69)]               # in cube sizes the edge is at 0.75
    assert len(inside) and len(edge) and (inside[:, 1] > 2 * inside[:, 0]).all()
    assert inside[:, 0].mean() > 1.2 * edge[:, 0].mean()


def test_names_and_their_shares():
    said = [[("", "red", "")], [("", "", "cube")]]
    names = [[("red", "cone")], [("blue", "cube")]]
    assert make_shapes.named_right(names, said) == 1 and make_shapes.named_right([[("blue", "cone")]], said[:1]) == 0
    assert make_shapes.histogram(names, said, 1)["cone"] == 1 and make_shapes.histogram(names, said, 0)["blue"] == 1
    assert make_shapes.spread(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2) == pytest.approx(2 ** 0.5 / 2)
    assert make_shapes.psnr(torch.zeros(2, 1, 3, 4, 4), torch.full((2, 1, 3, 4, 4), 0.1)) == pytest.approx(20)


def test_the_script_makes_a_base_and_goes_on_where_it_was(tmp_path):
    command = [sys.executable, str(ROOT / "experiments/make_shapes.py"), "--quick", "--work", str(tmp_path), "--out",
               str(tmp_path / "shapes.safetensors")]
    first = subprocess.run([*command, "--until", "judges"], capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == 0 and not (tmp_path / "shapes.safetensors").exists(), first.stderr[-2000:]
    stamp = (tmp_path / "ae.pt").stat().st_mtime_ns
    second = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert second.returncode == 0 and (tmp_path / "ae.pt").stat().st_mtime_ns == stamp, second.stderr[-2000:]
    made = r2d3.load_base(r2d3.resolve(r2d3.Config(weights=str(tmp_path / "shapes.safetensors"))), "cpu")
    size = make_shapes.GRID // 4
    assert made.latent_shape == (4, 8, size, size) and made.tower.image(torch.rand(2, 3, 64, 64)).shape == (2, 64)
    _, about = load_weights(tmp_path / "shapes.safetensors")
    quality = json.loads(about["quality"])
    assert quality.keys() >= {"named_right", "spread_of_colorfulness", "open_colors", "open_shapes", "dnc", "normal",
                              "autoencoder", "training"}


def test_a_stage_goes_on_where_it_was_and_not_with_other_steps(tmp_path):
    def train(steps, stop=None):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        stage = make_shapes.Stage(tmp_path, "line", model, steps, float("inf"), 1e-2, ema=0.9)

        def loss_of(rng, generator):
            if stage.step == stop:
                stage.save()
                raise KeyboardInterrupt
            return (model(torch.randn(8, 2, generator=generator)) - 1).square().mean()

        stage.run(loss_of)
        return [value.clone() for value in model.parameters()]

    with pytest.raises(KeyboardInterrupt):
        train(6, stop=3)
    resumed = train(6)
    (tmp_path / "line.pt").unlink()
    assert all(map(torch.equal, resumed, train(6)))
    with pytest.raises(SystemExit, match="was begun for 6 steps, not 7: use another --work"):
        train(7)
