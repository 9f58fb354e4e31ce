"""GaussianCube from folders in the published layout: the recorded network, splats, noise levels and sampler steps, the
whole job at tiny size, and one sentence for whatever is wrong with a folder. On the CPU, without network.
"""
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]

from common import plugin  # noqa: E402
from test_bases import close, weights, write_text_encoder  # noqa: E402

import r2d3  # noqa: E402
from r2d3 import Cond, Config  # noqa: E402
from kernels import rasterize  # noqa: E402
from support import UserError, export, published, scorers  # noqa: E402

gaussiancube = plugin("gaussiancube")
GaussianCube = gaussiancube.GaussianCube
FILE = ROOT / "tests/data/gaussiancube.safetensors"


@pytest.fixture(scope="module")
def recorded():
    return load_file(FILE)


def about(key):
    with safe_open(FILE, "pt") as file:
        return json.loads(file.metadata()[key])


def tiny_net(recorded):
    net = gaussiancube.UNet3D(**about("config"))
    net.load_state_dict(weights(recorded))
    return net


def words(recorded):
    """Stands for CLIP: the first recorded text, whatever the prompt."""
    def text(prompts):
        return recorded["cond_text"][:1].expand(len(prompts), -1, -1), None
    text.prepare = lambda prompts: None
    return text


@pytest.fixture
def base(recorded):
    mean, std = (recorded[f"decode.{name}"].float().permute(3, 0, 1, 2) for name in ("mean", "std"))
    return GaussianCube(tiny_net(recorded), words(recorded), mean, std, "cpu")


@pytest.fixture(scope="module")
def folder(recorded, tmp_path_factory):
    """The published repo in small: three pickles in v1.1/, float64 statistics with the channels last."""
    root = tmp_path_factory.mktemp("gaussiancube")
    part = root / "v1.1"
    part.mkdir()
    torch.save(weights(recorded), part / "objaverse_ckpt.pt")
    size = torch.ones(8, 8, 8, 1, dtype=torch.float64)
    mean = torch.tensor([0.0] * 6 + [0.5] + [0.03] * 3 + [1.0] + [0.0] * 3, dtype=torch.float64)
    std = torch.tensor([0.03] * 3 + [0.8] * 3 + [0.2] + [0.01] * 3 + [0.3] * 4, dtype=torch.float64)
    torch.save(mean * size, part / "mean.pt")
    torch.save(std * size, part / "std.pt")
    (part / "config.json").write_text(json.dumps(about("config")), encoding="utf-8")
    write_text_encoder(root, "gaussiancube")
    return root


def copy(folder, to):
    """A folder's v1.1 to spoil, with nothing else."""
    to.mkdir()
    for file in (folder / "v1.1").iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


# ---- against the recordings --------------------------------------------------------------------------------


def test_full_size_network_has_the_published_keys_and_shapes():
    with torch.device("meta"):
        net = gaussiancube.UNet3D(**gaussiancube.CONFIG)
    got = {name: list(value.shape) for name, value in net.state_dict().items()}
    assert got == about("keys") and len(got) == 573
    assert sum(weight.numel() for weight in net.parameters()) == 339_007_516


def test_network_is_the_recorded_one(recorded):
    """Both rows in one batch, with text and with zeros; measured 3.1e-6 and 3.7e-6 on outputs up to 3.5."""
    net = tiny_net(recorded)
    for text, want in (("cond_text", "out"), (None, "out_zero_text")):
        embeds = recorded["cond_text"] if text else torch.zeros_like(recorded["cond_text"])
        got = net(recorded["x"], recorded["timesteps"], embeds)
        assert got.shape == (2, 28, 8, 8, 8) and (got - recorded[want]).abs().max() < 1e-5
        for wrong in (1.001 * got, got.roll(1, 0), got.transpose(-1, -2)):
            assert (wrong - recorded[want]).abs().max() > 1e-3
    assert (recorded["out"] - recorded["out_zero_text"]).abs().max() > 0.1         # the text counts


def test_splats_are_the_recorded_ones_turned_upright(base, recorded):
    """Values and the gradient to the latent, with clamps that act; our world is the published one, turned."""
    base.size = 1.0
    x0 = recorded["decode.x0"].clone().requires_grad_()
    got = base.decode(x0)
    sign = (got.quats * recorded["decode.quats_yup"]).sum(-1, keepdim=True).sign()
    for ours, name in ((got.means, "means_yup"), (got.opacities, "opacities"), (got.scales, "scales"),
                       (got.colors, "colors"), (sign * got.quats, "quats_yup")):
        assert ours.shape == recorded[f"decode.{name}"].shape
        assert (ours - recorded[f"decode.{name}"]).abs().max() < 1e-6, name
    assert (got.opacities == 0).any() and (got.opacities == 1).any()
    assert (got.scales == 0).any() and (got.colors == 0).any()
    x, y, z = got.means.unbind(-1)
    w, i, j, k = (0.5 ** 0.5 * got.quats).unbind(-1)
    theirs = {"xyz": torch.stack([x, -z, y], -1), "opacities": got.opacities, "scales": got.scales,
              "colors": got.colors, "rots": torch.stack([w - i, w + i, j - k, j + k], -1)}
    assert (theirs["rots"] - recorded["decode.rots"]).abs().max() < 1e-6
    loss = sum((recorded[f"decode.w_{name}"] * value).sum() for name, value in theirs.items())
    gradient, = torch.autograd.grad(loss, x0)
    assert close(gradient, recorded["decode.grad_x0"], 1e-5)


def test_gradients_are_finite_where_scales_are_clamped(base, recorded):
    x0 = recorded["decode.x0"].clone().requires_grad_()
    gaussians = base.decode(x0)
    assert (gaussians.scales == 0).any()
    picture = r2d3.render(gaussians, *base.cameras(1), 24, dilation=base.dilation)
    gradient, = torch.autograd.grad(sum(part.square().sum() for part in picture), x0)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_grid_of_the_published_size(recorded):
    axis = torch.linspace(-0.5, 0.5, 32, dtype=torch.float64)
    base = GaussianCube(torch.nn.Identity(), None, *torch.zeros(2, 14, 32, 32, 32), "cpu")
    assert base.latent_shape == (14, 32, 32, 32)
    assert base.decode(torch.zeros(1, 14, 32, 32, 32)).means.shape == (1, 32768, 3)
    assert (base.grid[recorded["grid32.index"]] - recorded["grid32.xyz"]).abs().max() < 1e-6
    assert axis[0] == base.grid[0, 0]


def test_fifty_step_grid_is_the_recorded_one(recorded):
    base = GaussianCube(torch.nn.Identity(), None, *torch.zeros(2, 14, 2, 2, 2), "cpu")
    schedule = base.schedule("dpm", 50)
    assert torch.equal(schedule.timesteps, recorded["grid50.timesteps"])
    assert torch.allclose(schedule.alpha, recorded["grid50.alpha"], atol=1e-6, rtol=0)
    assert torch.allclose(schedule.sigma, recorded["grid50.sigma"], atol=1e-6, rtol=3e-4)
    c_x, c_0, std = schedule.step(torch.arange(50))
    for got, name in ((c_x, "c_x"), (c_0, "c_0"), (std, "std"), (schedule.k(torch.arange(50)), "k")):
        want = recorded[f"grid50.{name}"]
        assert torch.allclose(got[:-1], want[:-1], rtol=1e-4), name         # 2.8e-5, see alphas_cumprod's float32
        assert torch.allclose(got[-1], want[-1], rtol=1e-3), name           # 5.1e-4
    assert (base.alpha_by_t ** 2 - recorded["alphas_cumprod_f64"]).abs().max() < 1e-6
    assert base.schedule("ddim", 20).alpha.isfinite().all()


def test_sampler_steps_are_the_recorded_ones(base, recorded):
    """Five steps of diffusers' scheduler on the published network with guidance 3.5, each from the recorded latent."""
    schedule = base.schedule("dpm", 5)
    assert torch.equal(schedule.timesteps, recorded["sde5.timesteps"])
    cond, null = base.encode(["a red lamp"]), base.encode([""])
    assert null.embeds.abs().max() == 0 and cond.embeds.abs().max() > 0 and null.embeds.shape == cond.embeds.shape
    job = r2d3.Job(base, None, schedule, null, Config(guidance=3.5))
    x, errors = recorded["sde5.x_init"], []
    for i in range(5):
        eps = job.predict_guided(x, schedule.t(i).expand(1), cond)
        mean, std = schedule.transition(x, eps, i)
        got, x = mean + std * recorded["sde5.noise"][i:i + 1], recorded["sde5.prev"][i:i + 1]
        errors.append((got - x).abs().max().item())
    assert errors[0] < 3e-4 and max(errors[1:]) < 5e-5, errors              # measured 6e-5, then up to 9e-6


def test_cameras_see_what_the_published_ones_see(base, recorded):
    """Points of the data's world through our cameras; published pictures are mirrored (matrices of det -1)."""
    x, y, z = (base.size * recorded["cam.points"]).unbind(-1)
    world = torch.stack([x, z, -y], -1)
    for n, azimuth in enumerate(recorded["cam.azimuth"].tolist()):
        c2w = r2d3.orbit(base.elevation, 180.0 - azimuth, base.radius)
        camera = (world - c2w[:3, 3]) @ c2w[:3, :3]
        uv = 1.09375 * camera[:, :2] / camera[:, 2:] + 0.5      # with their focal length; ours is 1.27 times longer
        assert (uv - recorded["cam.uv_ours"][n]).abs().max() < 1e-5
        assert (torch.stack([1 - uv[:, 0], uv[:, 1]], -1) - recorded["cam.uv_official"][n]).abs().max() < 1e-5


# ---- in our world ------------------------------------------------------------------------------------------


def solid(values, D=16, ball=True):
    """A base of D^3 voxels without statistics, and a latent with colours values(x, y, z), opaque in a ball."""
    base = GaussianCube(torch.nn.Identity(), None, torch.zeros(14, D, D, D), torch.ones(14, D, D, D), "cpu")
    x, y, z = base.grid.T.unflatten(1, (D, D, D))
    latent = torch.zeros(1, 14, D, D, D)
    latent[0, 6] = ((x ** 2 + y ** 2 + z ** 2 < 0.25) if ball else torch.ones_like(x)).float()
    latent[0, 7:10], latent[0, 10] = 0.03, 1.0
    latent[0, 3:6] = (torch.stack(values(x, y, z)).float() - 0.5) / export.SH_C0
    return base, latent


def test_objects_are_upright_centred_and_fill_the_frame():
    """Red where the data's z is large: up. Blue where its y is small, an asset's front: to the first camera."""
    base, latent = solid(lambda x, y, z: (z > 0, x * 0, y < 0))
    picture = r2d3.render(base.decode(latent), *base.cameras(1), 64)
    red, blue = picture.image[0, :, 0], picture.image[0, :, 2]
    inside = picture.alpha[0, :, 0] > 0.9
    for view in range(4):
        assert red[view, :24][inside[view, :24]].mean() > 0.9 and red[view, 44:][inside[view, 44:]].mean() < 0.3
    assert blue[0, 32:][inside[0, 32:]].mean() > 0.9 and blue[2, 50:][inside[2, 50:]].mean() < 0.1
    rows, columns = (inside.any(axis) for axis in (2, 1))
    assert ((rows.sum(1) > 40) & (columns.sum(1) > 40)).all()               # a ball of the grid's size
    assert not rows[:, [0, -1]].any() and not columns[:, [0, -1]].any()     # and not cut
    centre = (columns.float() * torch.arange(64)).sum(1) / columns.sum(1)
    assert (centre - 31.5).abs().max() < 1


def test_dilation_is_that_of_the_training_pictures():
    """0.3 square pixels with the authors' camera, and the same blur in ours at any size; the base's own attribute."""
    base, latent = solid(lambda x, y, z: (x * 0, x * 0, x * 0), D=24)
    latent[0, 7:10] = 0.003
    gaussians, theirs = base.decode(latent), torch.tensor([1.09375, 1.09375, 0.5, 0.5]).expand(1, 4, 4)
    c2w = base.cameras(1)[0]
    want = rasterize(*(gaussians._asdict()[name] for name in ("means", "quats", "scales", "opacities", "colors")),
                     c2w, theirs, 512, 512, dilation=0.3)
    got, plain = (r2d3.render(gaussians, c2w, theirs, 512, dilation=dilation * (1.09375 / r2d3.FXFY) ** 2)
                  for dilation in (base.dilation, 0.0))
    assert torch.allclose(got.image, want.image, atol=1e-5) and (plain.image - want.image).abs().max() > 0.1
    coverage = [r2d3.render(gaussians, *base.cameras(1), size, dilation=base.dilation).alpha.mean()
                for size in (128, 384)]
    assert coverage[1] == pytest.approx(coverage[0].item(), rel=0.02)       # not so much thicker in small pictures
    assert r2d3.Base.dilation == r2d3.DiffSplat.dilation == 0


# ---- folders -----------------------------------------------------------------------------------------------


def test_folder_loads_with_and_without_its_v11(folder, tmp_path):
    for root in (folder, copy(folder, tmp_path / "flat")):
        parts = gaussiancube.parts(str(root), "cpu")
        assert parts["mean"].shape == parts["std"].shape == (14, 8, 8, 8) and parts["mean"].dtype == torch.float32
        assert parts["mean"][6].min() == 0.5 and (parts["std"][3] - 0.8).abs().max() < 1e-6
        assert torch.equal(parts["net"].state_dict()["out.2.weight"], torch.load(
            folder / "v1.1/objaverse_ckpt.pt", weights_only=True)["out.2.weight"])


class Evil:
    def __reduce__(self):
        return print, ("code from a pickle ran",)


def spoil(part, fault):
    ckpt, mean = part / "objaverse_ckpt.pt", part / "mean.pt"
    if fault == "missing":
        (part / "std.pt").unlink()
    elif fault == "cut":
        ckpt.write_bytes(ckpt.read_bytes()[:5000])
    elif fault == "evil":
        mean.write_bytes(pickle.dumps(Evil()))
    elif fault == "no dict":
        torch.save(torch.ones(3), ckpt)
    elif fault == "key":
        state = torch.load(ckpt, weights_only=True)
        state["out.3.weight"] = state.pop("out.2.weight")
        torch.save(state, ckpt)
    elif fault == "shape":
        torch.save(torch.ones(14, 8, 8, 8), mean)
    elif fault == "odd":
        torch.save(torch.ones(7, 7, 7, 14), mean)
    elif fault == "other size":
        torch.save(torch.ones(4, 4, 4, 14), mean)
    elif fault == "nan":
        torch.save(torch.full((8, 8, 8, 14), torch.nan), part / "std.pt")
    elif fault == "full size":
        sizes = {"res_blocks": 2, "width": 32, "multipliers": [1, 1]}
        (part / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    elif fault == "config":
        (part / "config.json").write_text(json.dumps({"depth": 2}), encoding="utf-8")


@pytest.mark.parametrize("fault, words", [
    ("missing", "there is no std.pt in"), ("cut", "objaverse_ckpt.pt cannot be read, is the file complete"),
    ("evil", "mean.pt cannot be read"), ("no dict", "do not fit GaussianCube's U-Net"), ("key", "out.2.weight"),
    ("shape", r"wanted \(D, D, D, 14\)"), ("odd", "a multiple of 2"), ("other size", "belong to different models"),
    ("nan", "not finite"), ("full size", "do not fit"), ("config", "no U-Net can be made")])
def test_what_is_wrong_with_a_folder_is_one_sentence(folder, tmp_path, capsys, fault, words):
    part = copy(folder, tmp_path / "spoilt")
    spoil(part, fault)
    with pytest.raises(UserError, match=words) as error:
        gaussiancube.parts(str(part), "cpu")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 and str(part) in str(error.value)
    assert "ran" not in capsys.readouterr().out                             # no code from pickles


def test_no_folder_and_no_network(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="there is no such folder"):
        gaussiancube.parts(str(tmp_path / "nowhere"), "cpu")
    import huggingface_hub
    asked = []

    def fail(repo, name):
        asked.append((repo, name))
        raise ConnectionError("no network")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match="about 3 GB, once, or --weights DIR"):
        gaussiancube.parts(None, "cpu")
    assert asked == [("BwZhang/GaussianCube-Objaverse", "v1.1/objaverse_ckpt.pt")]
    assert "once: 1.4 GB, and 1.7 GB" in capsys.readouterr().out


def test_hub_files_are_read_from_where_they_were_put(folder, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(folder / name))
    parts = gaussiancube.parts(None, "cpu")
    assert parts["mean"].shape == (14, 8, 8, 8) and parts["text"].length == 77 and parts["text"].root is None


def test_text_is_clips_padded_to_77_and_the_null_is_zero(folder):
    parts = gaussiancube.parts(str(folder), "cpu")
    base = GaussianCube(**parts, device="cpu")
    base.prepare(["a red lamp", ""])
    embeds, mask, _ = base.encode(["a red lamp", "", "a blue cube with two arms"])
    assert embeds.shape == (3, 77, 24) and mask is None and embeds.dtype == torch.float32
    assert embeds[1].abs().max() == 0 and embeds[0].abs().max() > 0 and not torch.equal(embeds[0], embeds[2])


# ---- fine-tuning -------------------------------------------------------------------------------------------


def test_lora_is_on_attention_and_output_layers(recorded):
    """Also on convolutions, by peft; 523,488 weights at full size and rank 8; nothing changes before training."""
    with torch.device("meta"):
        net = r2d3.add_lora(gaussiancube.UNet3D(**gaussiancube.CONFIG), GaussianCube.lora_targets, 8, 0)
    trained = {name: weight for name, weight in net.named_parameters() if "lora" in name}
    assert len(trained) == 2 * 46 and sum(weight.numel() for weight in trained.values()) == 523_488
    tiny = tiny_net(recorded)
    x, t, text = recorded["x"], recorded["timesteps"], recorded["cond_text"]
    with torch.no_grad():
        tuned = r2d3.add_lora(tiny, GaussianCube.lora_targets, 8, 0)
        assert (tuned(x, t, text) - recorded["out"]).abs().max() < 1e-5
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        assert (tuned(x, t, text) - recorded["out"]).abs().max() > 0.01
        with tuned.disable_adapter():
            assert (tuned(x, t, text) - recorded["out"]).abs().max() < 1e-5


def test_gradient_checkpointing_changes_nothing(base):
    gradients = []
    for checkpoint in (False, True):
        if checkpoint:
            base.net.enable_gradient_checkpointing()
        x = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = base.predict(x, torch.tensor([500]), base.encode(["a"]))
        gradients.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert close(gradients[0], gradients[1], 1e-5)


@pytest.fixture
def judges(monkeypatch, pipeline):
    """The published judges and CLIP, tiny and random."""
    import open_clip
    from open_clip.model import CLIP

    def clip(*unused, dim=768, **more):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return CLIP(dim, {"image_size": 28, "layers": 1, "width": 32, "head_width": 16, "patch_size": 14},
                        {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}).eval()

    monkeypatch.setattr(scorers, "load_clip", clip)
    monkeypatch.setattr(open_clip, "create_model", clip)
    normals = scorers.MarigoldNormals(pipeline).requires_grad_(False)
    monkeypatch.setattr(scorers.MarigoldNormals, "pretrained", lambda *args, **how: normals)
    for judge in (scorers.LaionAesthetic, scorers.HPSv2):
        def untrained(*args, real=judge.pretrained, **how):
            return real(*args, **how | {"untrained": True})
        monkeypatch.setattr(judge, "pretrained", untrained)


@pytest.fixture
def run(monkeypatch, capsys):
    """python r2d3.py with these arguments -> what it printed."""
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["r2d3.py", *map(str, arguments)])
        code, printed = r2d3.main(), capsys.readouterr()
        assert code == 0, printed.err
        return printed.out
    return call


@pytest.mark.parametrize("reward, estimator", [("aesthetic", "step"), ("hpsv2=1,normal=1,dnc=1", "sample")])
def test_the_whole_job(folder, judges, run, reward, estimator, tmp_path, monkeypatch):
    """Rollout, reward, loss, update, checkpoint, evaluation, resume, samples: from a folder in the published layout."""
    monkeypatch.setattr(GaussianCube, "eval_size", 28)
    (tmp_path / "train.txt").write_text("a red lamp\na blue cube\na lamp with two arms\na blue lamp", encoding="utf-8")
    (tmp_path / "test.txt").write_text("a red cube\na blue lamp with two arms", encoding="utf-8")
    out = tmp_path / "run"
    common = ["--base", "gaussiancube", "--weights", folder, "--reward", reward, "--out", out, "--estimator", estimator,
              "--prompts", tmp_path / "train.txt", "--test-prompts", tmp_path / "test.txt", "--batch-size", 2,
              "--steps", 4, "--view-size", 28, "--samples-per-prompt", 2, "--views", 2, "--updates-per-epoch", 2,
              "--device", "cpu"]
    run(*common, "--epochs", 1)
    run(*common, "--epochs", 2, "--resume")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert "Inception" in summary["features"] and (out / "report.html").is_file() and summary["updates"] == 4
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))["config"]
    assert (config["guidance"], config["matching"], config["lora_rank"], config["sampler"]) == (3.5, "score", 8, "dpm")
    state = torch.load(out / "checkpoint/state.pt", weights_only=True)
    moved = [name for name, value in state["lora"].items() if "lora_B" in name and value.abs().max() > 0]
    assert any("qkv" in name for name in moved) and any("out.2" in name for name in moved)
    printed = run("evaluate", "--run", out, "--samples-per-prompt", 2, "--protocol", "paper")
    summary = json.loads((out / "evaluation/summary.json").read_text(encoding="utf-8"))
    assert {"reward", "multi_view_fid", "multi_view_clip_similarity"} <= summary["paper_protocol"].keys()
    page = (out / "evaluation/report.html").read_text(encoding="utf-8")
    assert "multi-view FID" in printed and "multi-view FID" in page
    for words in ("paper: 5.92 / 234.96 / 22.57", "paper: 4.40 / 64.22 / 28.60"):
        assert (words in printed) == (reward == "aesthetic")
    run("sample", "--run", out, "--prompts", "a red lamp", "--samples-per-prompt", 1)
    files = sorted((out / "samples").glob("a-red-lamp*"))
    assert {file.suffix for file in files} == {".ply", ".html", ".png", ".gif"}
    header = next(file for file in files if file.suffix == ".ply").read_bytes()[:120]
    assert b"element vertex" in header and 0 < int(header.split(b"element vertex ")[1].split()[0]) <= 512


def test_settings_are_the_papers():
    config = r2d3.resolve(Config(base="gaussiancube", device="cpu"))
    assert (config.sampler, config.steps, config.lora_rank, config.recipe, config.lr) == ("dpm", 50, 8, "paper", 1e-4)
    assert GaussianCube.guidance == 3.5 and config.samples_per_prompt == 4
    for name, sampler, steps in (("diffsplat-pixart", "dpm", 20), ("diffsplat-sd15", "ddim", 20)):
        config = r2d3.resolve(Config(base=name, device="cpu"))
        assert (config.sampler, config.steps) == (sampler, steps)


def test_cost_of_random_weights(judges, run, monkeypatch, tmp_path):
    """Nothing is fetched and nothing saved; twice the same network, and nobody else's random numbers are touched."""
    monkeypatch.setattr(gaussiancube, "CONFIG", about("config"))
    monkeypatch.setattr(gaussiancube, "SIZE", 8)
    monkeypatch.setitem(published.PUBLISHED["gaussiancube"], "text_dim", 24)
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    first, second = (gaussiancube.parts("random", "cpu") for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first["net"].parameters(), second["net"].parameters()))
    noise = torch.randn(1, 14, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = r2d3.render(GaussianCube(**first, device="cpu").decode(noise), *r2d3.input_cameras(1), 32)
    assert 0.05 < pictures.alpha.mean() < 0.9                               # there is something to judge
    printed = run("cost", "--base", "gaussiancube", "--weights", "random", "--reward", "dnc", "--steps", 4,
                  "--view-size", 16,
                  "--device", "cpu")
    result = json.loads(printed[printed.index("{"):])
    parameters = result["parameters"]
    assert result["objects"] == result["judged"] == 1 and 0 < parameters["LoRA, trained"] < parameters["net"]
    assert list(tmp_path.iterdir()) == []


def test_cond_has_no_mask(base):
    assert isinstance(base.encode(["a"]), Cond) and base.encode(["a"]).mask is None
