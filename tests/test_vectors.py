"""Against tensors recorded from the official code (DiffSplat a99d757, nabla-R2D3 77483e6), kept in tests/data.

Rasteriser: no CUDA was at hand, so data/radegs is RaDe-GS's forward pass transliterated to float64 by hand.
"""
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import r2d3  # noqa: E402
from kernels import rasterize  # noqa: E402


def data(name):
    return load_file(ROOT / f"tests/data/{name}.safetensors")


def assert_close(got, want, relative):
    """Largest error over largest value. test_the_comparison_is_sharp shows what this would not let pass."""
    error = (got - want).abs().max() / want.abs().max()
    assert got.shape == want.shape and error <= relative, f"relative error {error:.1e}"


def test_the_comparison_is_sharp():
    d = data("cameras")
    want = d["plucker_nobug_32"]
    for wrong in (want * 1.05, -want, want.roll(1, -1), want.roll(1, -2)):
        with pytest.raises(AssertionError):
            assert_close(wrong, want, 1e-2)


def test_cameras():
    d = data("cameras")
    c2w, fxfycxcy = r2d3.input_cameras(1)
    assert_close(c2w[0], d["default.C2W"], 2e-7)
    assert_close(fxfycxcy[0], d["default.fxfycxcy"], 1e-6)
    ours = r2d3.orbit(d["orbit.elev_deg"], d["orbit.azim_deg"], d["orbit.radius"])
    theirs = d["orbit.C2W_opengl"] * torch.tensor([1.0, -1, -1, 1])  # OpenGL to OpenCV: y and z turn around
    both = [torch.allclose(ours, theirs, atol=1e-5),
            torch.allclose(r2d3.orbit(-d["orbit.elev_deg"], d["orbit.azim_deg"], d["orbit.radius"]), theirs, atol=1e-5)]
    assert both == [False, True]  # the official elevation is positive downwards


def test_pluecker_rays():
    d = data("cameras")
    c2w, fxfycxcy = d["default.C2W"][None], d["default.fxfycxcy"][None]
    assert_close(r2d3.plucker_rays(c2w, fxfycxcy, 32, 32, half_image_shift=True)[0], d["plucker_bug_32"], 1e-6)
    large = r2d3.plucker_rays(c2w, fxfycxcy, 256, 256, half_image_shift=True)[0]
    assert_close(F.interpolate(large, (32, 32), mode="bilinear"), d["plucker_latent_256_to_32"], 1e-6)
    assert_close(r2d3.plucker_rays(c2w, fxfycxcy, 32, 32)[0], d["plucker_nobug_32"], 1e-6)
    direction = r2d3.plucker_rays(c2w, fxfycxcy, 3, 3)[0, 0, 3:, 1, 1]  # the middle pixel looks at the origin
    assert_close(direction, -c2w[0, 0, :3, 3] / 1.4, 1e-6)


def test_splat_grid():
    d = data("splat_grid")
    grid = torch.cat([d[f"grid.{name}"] for name in ("rgb", "scale", "rotation", "opacity", "depth")], 2)
    ours = r2d3.splat_grid_to_gaussians(grid, d["input_C2W"][None], d["input_fxfycxcy"][None])
    for name, tensor in zip(("xyz", "scale", "rotation", "opacity", "rgb"), ours):
        assert_close(tensor, d[f"from_grid.{name}"].reshape(tensor.shape), 1e-6)


def test_sampler_steps():
    d = data("scheduler")
    schedule = r2d3.NoiseSchedule.from_diffusers("dpm", 20)
    assert schedule.timesteps.tolist() == d["dpm.timesteps"].tolist()
    assert_close(schedule.alpha.float(), d["dpm.alpha_of_sigma"], 1e-6)
    assert_close(schedule.sigma.float(), d["dpm.sigma_t_of_sigma"], 1e-6)
    for i in (0, 1, 9, 10, 18, 19):
        latents, eps, noise, after, x0, mean, given, score = (d[f"dpm.step{i:02d}.{name}"] for name in (
            "latents", "eps", "noise", "prev_sampled", "x0", "mean", "prev_given", "score_given"))
        c_x, c_0, std = schedule.step(i)
        assert_close(std.float(), d["dpm.std_dev_per_step"][i], 2e-6)
        ours = schedule.x0(latents, eps, i)
        assert_close(ours, x0, 2e-5)
        assert_close((c_x * latents + c_0 * ours).float(), mean, 1e-5)
        assert_close((c_x * latents + c_0 * ours + std * noise).float(), after, 1e-5)
        assert_close((-(given - mean) / std ** 2).float(), score, 1e-5)


def test_depth_normal_consistency(monkeypatch):
    """Recorded with a focal length of 43.96 pixels of 32, and with border pixels counted as zeros."""
    d = data("dnc")
    monkeypatch.setattr(r2d3, "FXFY", 43.95963871127396 / 32)
    normals = r2d3.depth_to_normals(d["raw_depth"])
    assert_close(normals, d["d2n"][:, 0].reshape(normals.shape), 1e-4)
    normal = d["raw_normal"].clone().requires_grad_()
    mask = d["alpha"][:, 0] > 0.5
    published = ((normal * normals).sum(1) * mask).sum((-2, -1)) / mask.sum((-2, -1))
    assert_close(published, d["score"], 1e-5)
    published.sum().backward()
    assert_close(normal.grad, d["grad_normal"], 1e-4)
    # ours: the same cosine over those of the pixels that have all four neighbours on the object
    render = r2d3.Render(d["alpha"], *(tensor[None] for tensor in (
        d["alpha"], d["raw_depth"], d["raw_depth"], d["raw_normal"])))
    inner = (F.conv2d(mask.float()[:, None], torch.tensor([[[[0.0, 1, 0], [1, 1, 1], [0, 1, 0]]]]), padding=1) == 5)[:, 0]
    inner[:, 0], inner[:, -1], inner[:, :, 0], inner[:, :, -1] = False, False, False, False
    want = ((d["raw_normal"] * normals).sum(1) * inner).sum((-2, -1)) / inner.sum((-2, -1)).clamp(min=1)
    assert_close(r2d3.depth_normal_consistency(render, [])[0], want, 1e-5)


def tiny_clip(weights):
    """open_clip's image tower with the recorded Hugging Face weights."""
    from open_clip.transformer import QuickGELU, VisionTransformer
    tower = VisionTransformer(224, 56, width=32, layers=2, heads=4, mlp_ratio=2, output_dim=768, act_layer=QuickGELU)
    theirs = {name.removeprefix("sd.vision_model."): value.float() for name, value in weights.items()}
    state = {"class_embedding": theirs["embeddings.class_embedding"],
             "positional_embedding": theirs["embeddings.position_embedding.weight"],
             "conv1.weight": theirs["embeddings.patch_embedding.weight"], "proj": theirs["sd.visual_projection.weight"].T}
    for kind in ("weight", "bias"):
        state[f"ln_pre.{kind}"] = theirs[f"pre_layrnorm.{kind}"]
        state[f"ln_post.{kind}"] = theirs[f"post_layernorm.{kind}"]
        for n in range(2):
            block, layer = f"transformer.resblocks.{n}", f"encoder.layers.{n}"
            state[f"{block}.attn.in_proj_{kind}"] = torch.cat([theirs[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
            for ours, name in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                               ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                state[f"{block}.{ours}.{kind}"] = theirs[f"{layer}.{name}.{kind}"]
    tower.load_state_dict(state)
    return tower.eval()


def test_laion_aesthetic():
    d = data("aesthetic")
    model = r2d3.LaionAesthetic(tiny_clip({name: value for name, value in d.items() if name.startswith("sd.")})).eval()
    images = (d["images_u8"].float() / 255).requires_grad_()
    embed = model.embed(images)
    assert_close(embed.detach(), d["embed_normalised"], 1e-5)
    names = {f"layers.{n}.{kind}" for n in (0, 2, 4, 6, 7) for kind in ("weight", "bias")}
    assert {name for name in model.state_dict() if name.startswith("layers")} == names  # the published file's names
    render = r2d3.Render(images[:, None], *[None] * 4)
    scores = model(render, ["", ""])
    x = embed
    for n in (0, 2, 4, 6, 7):
        layer = model.layers.get_submodule(str(n))
        x = x @ layer.weight.T + layer.bias
    assert_close(scores.detach(), x.detach(), 1e-5)
    gradient, = torch.autograd.grad(scores.sum(), images)
    assert gradient.abs().max() > 0 and gradient.isfinite().all()


def test_laion_aesthetic_needs_the_published_file(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(r2d3.UserError, match="could not be fetched"):
        r2d3.LaionAesthetic.pretrained("cpu")
    import open_clip
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: None)
    (tmp_path / "checkpoints/sac+logos+ava1-l14-linearMSE.pth").write_bytes(b"something else")
    with pytest.raises(r2d3.UserError, match="checksum"):
        r2d3.LaionAesthetic.pretrained("cpu")


def test_rasterizer():
    """The published tiles end Gaussians at 3 standard deviations or further on, ours at alpha 1/255; and the
    published depth belongs to the pixel's corner: a few pixels and all depths differ a little."""
    d = data("radegs")
    parameters = [d[name][None] for name in ("xyz", "rotation", "scale")] + [d["opacity"][None, :, 0], d["rgb"][None]]
    parameters = [tensor.clone().requires_grad_() for tensor in parameters]
    got = rasterize(*parameters, d["C2W"][None], d["fxfycxcy"][None], 48, 48)
    for name, most, mean in (("image", 2e-4, 5e-5), ("alpha", 5e-4, 1e-4), ("normal", 1e-4, 1e-4),
                             ("depth", 5e-3, 2e-3), ("median_depth", 5e-3, 2e-3)):
        error = (getattr(got, name)[0] - d[f"out.{name}"]).abs()
        assert error.flatten().quantile(0.99) < most and error.mean() < mean, (name, error.quantile(0.99), error.mean())
    sum((getattr(got, name)[0] * d[f"w.{name}"]).sum() for name in ("image", "alpha", "depth", "normal")).backward()
    for name, tensor in zip(("xyz", "rotation", "scale", "opacity", "rgb"), parameters):
        want = d[f"grad.{name}"].reshape(tensor.grad[0].shape)
        assert (tensor.grad[0] - want).norm() / want.norm() < 0.025, name
