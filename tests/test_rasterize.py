"""kernels.rasterize in PyTorch: against a dense float64 formula, RaDe-GS and gsplat; on hard inputs; its arguments."""
import ast
import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rasterize_checks import (
    CHECKS,
    NAN,
    PARAMETERS,
    SCENES,
    assert_close,
    differentiate,
    errors,
    fuzzed,
    scene,
    small,
    weights_like,
)
from safetensors.torch import load_file

from kernels import rasterize, splat

ROOT = Path(__file__).resolve().parents[1]

# ---- against the dense formula -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCENES)
def test_float64_is_the_dense_formula(name):
    arguments, H, W = SCENES[name]
    found, want = errors(scene(**arguments), H, W, dtype=torch.float64)
    assert want.alpha.max() > 0.1
    assert_close(found, 1e-9, 1e-7 if name == "flat" else 1e-9)


@pytest.mark.parametrize("name", SCENES)
def test_float32_is_near_the_dense_formula(name):
    arguments, H, W = SCENES[name]
    found, _ = errors(scene(**arguments), H, W)
    print(name, {key: f"{value:.1e}" for key, value in found.items()})
    # Seen edge-on, a flat Gaussian is a line: its picture's derivatives are large differences of large numbers.
    assert_close(found, *((1e-4, 1e-2) if name == "flat" else (1e-5, 1e-4)))


def test_behind_the_camera_and_none_visible():
    inputs = scene(N=40, V=2)
    behind = inputs[5][..., :3, 3] - 2 * inputs[5][..., :3, 2]  # behind each camera
    mixed = [tensor.clone() for tensor in inputs]
    mixed[0][0, :10] = behind[0, 0]
    found, want = errors(mixed, 24, 24)
    assert want.alpha.max() > 0.1
    assert_close(found)
    away = [tensor.float() for tensor in inputs]
    away[0] = (away[0] + 100).requires_grad_()
    out = rasterize(*away, 24, 24, background=(0.2, 0.4, 0.6))
    assert torch.equal(out.image, torch.tensor([0.2, 0.4, 0.6]).view(3, 1, 1).expand_as(out.image))
    assert all(tensor.abs().max() == 0 for tensor in out[1:])
    sum(tensor.sum() for tensor in out).backward()
    assert away[0].grad is None or away[0].grad.abs().max() == 0
    nothing = [tensor[:, :0] for tensor in inputs[:5]] + inputs[5:]
    assert rasterize(*nothing, 8, 8).image.min() == 1


def test_the_comparison_is_sharp():
    """A gradient times 1.05, a flipped sign, a shift by one pixel: none of them gets past assert_close."""
    inputs = scene(N=60)

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return ctx.factor * g, None

    def on_image(change):
        return lambda render: render._replace(image=change(render.image))

    for change in (on_image(lambda x: Scale.apply(x, 1.05)), on_image(lambda x: Scale.apply(x, -1.0)),
                   on_image(lambda x: x.roll(1, -1)), on_image(lambda x: x.roll(1, -2)),
                   lambda render: render._replace(normal=-render.normal),
                   lambda render: render._replace(depth=render.depth * 1.001)):
        found, _ = errors(inputs, 20, 20, change=change)
        with pytest.raises(AssertionError):
            assert_close(found)


def test_a_batch_is_its_parts_and_bits_repeat():
    inputs = [tensor.float() for tensor in scene(B=3, V=2, N=50)]
    whole = rasterize(*inputs, 21, 17)
    for b in range(3):
        part = rasterize(*(tensor[b:b + 1] for tensor in inputs), 21, 17)
        for ours, theirs in zip(part, whole):
            assert torch.allclose(ours[0], theirs[b], atol=1e-6)

    def gradients():
        leaves = [tensor.clone().requires_grad_() for tensor in inputs[:5]]
        out = rasterize(*leaves, *inputs[5:], 21, 17)
        sum((a * w).sum() for a, w in zip(out, weights_like(out))).backward()
        return [leaf.grad for leaf in leaves]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients()))


def test_order_does_not_matter_and_quaternions_are_used_as_they_are():
    inputs = [tensor.float() for tensor in scene(N=50)]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    shuffled = [tensor[:, order] for tensor in inputs[:5]] + inputs[5:]
    for a, b in zip(rasterize(*inputs, 24, 24), rasterize(*shuffled, 24, 24)):
        assert torch.allclose(a, b, atol=1e-6)
    longer = [inputs[0], 1.2 * inputs[1], *inputs[2:]]
    assert (rasterize(*longer, 24, 24).image - rasterize(*inputs, 24, 24).image).abs().max() > 0.01


# In float32. Measured: below 1e-4, and of flat splats, of which those seen edge-on are lines, 1.0e-3 (means).
DILATED = {1.0: 1e-4, 1e-3: 3e-3}


@pytest.mark.parametrize("flat", [1.0, 1e-3])
@pytest.mark.parametrize("dilation", [0.3, 2.0])
def test_dilation_is_that_of_the_dense_formula(flat, dilation):
    """Values and all gradients; the splats' planes, so depth and normal of each, are those without dilation."""
    inputs = scene(V=2, N=40, size=0.02, flat=flat)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, DILATED[flat])):
        found, want = errors(inputs, 24, 31, dtype=dtype, dilation=dilation)
        assert max(found.values()) < tolerance, found
        plain = rasterize(*[x.to(dtype) for x in inputs], 24, 31)
        assert (plain.image - want.image).abs().max() > 0.05


def test_zero_dilation_is_none_to_the_bit():
    inputs = [tensor.float() for tensor in scene(V=2)]
    for a, b in zip(rasterize(*inputs, 24, 31), rasterize(*inputs, 24, 31, dilation=0)):
        assert torch.equal(a, b)


# ---- hard inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKS)
def test_hard_input(name):
    check, assertion = CHECKS[name]
    assertion(check("torch"))


def test_fuzz_float64():
    found = fuzzed(300, torch.float64, "torch")
    print(found)
    assert found["clear"] > 290 and found["outputs"] < 1e-8 and found["gradients"] < 1e-6, found
    assert max(found["median"]) < 1e-12, found


def test_fuzz_float32():
    found = fuzzed(120, torch.float32, "torch")
    print(found)
    assert found["clear"] > 60 and found["outputs"] < 1e-3 and found["gradients"] < 1e-2, found
    assert max(found["median"]) < 1e-5, found


def test_autocast_changes_nothing():
    inputs = small()
    want, want_grads = differentiate(inputs, 9, 10)
    leaves = [x.clone().requires_grad_() for x in inputs[:5]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = rasterize(*leaves, *inputs[5:], 9, 10)
    grads = torch.autograd.grad(sum((a * w).sum() for a, w in zip(got, weights_like(got), strict=True)), leaves)
    for a, b in zip((*got, *grads), (*want, *want_grads), strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


def test_under_torch_compile():
    inputs = small()
    want, want_grads = differentiate(inputs, 9, 10)

    @functools.partial(torch.compile, backend="eager")
    def compiled(*inputs):
        return [2 * x for x in rasterize(*inputs, 9, 10)]

    leaves = [x.clone().requires_grad_() for x in inputs[:5]]
    got = compiled(*leaves, *inputs[5:])
    assert all(torch.equal(a, 2 * b) for a, b in zip(got, want, strict=True))
    loss = sum((a * w).sum() for a, w in zip(got, weights_like(want), strict=True))
    for a, b in zip(torch.autograd.grad(loss, leaves), want_grads, strict=True):
        assert torch.allclose(a, 2 * b, rtol=1e-5, atol=1e-5 * b.abs().max())


def test_render_says_what_is_not_finite(capsys):
    import r2d3
    from support import say_once
    say_once.cache_clear()                                      # another test may have made it say so already
    means, quats, scales, opacities, colors, c2w, fxfycxcy = small()
    gaussians = r2d3.Gaussians(means, scales, quats, opacities, colors)
    want = r2d3.render(gaussians, c2w, fxfycxcy, 8)
    assert capsys.readouterr().err == ""
    broken = gaussians._replace(means=gaussians.means.index_fill(1, torch.tensor([0]), NAN))
    for _ in range(2):
        got = r2d3.render(broken, c2w, fxfycxcy, 8)
    assert got.image.isfinite().all() and not torch.equal(got.image, want.image)
    assert capsys.readouterr().err.count("that are not finite") == 1


# ---- arguments ---------------------------------------------------------------------------------------------


def test_mistakes_are_named():
    inputs = [tensor.float() for tensor in scene(N=5)]
    names = ["means", "quats", "scales", "opacities", "colors", "c2w", "fxfycxcy"]
    for n, name in enumerate(names):
        wrong = [tensor[..., :-1] if m == n else tensor for m, tensor in enumerate(inputs)]
        with pytest.raises(ValueError, match=name):
            rasterize(*wrong, 8, 8)
        if n:
            with pytest.raises(ValueError, match=name):
                rasterize(*[tensor.double() if m == n else tensor for m, tensor in enumerate(inputs)], 8, 8)
    for options, word in (({"background": (1.0, 1.0)}, "background"), ({"backend": "cuda"}, "backend")):
        with pytest.raises(ValueError, match=word):
            rasterize(*inputs, 8, 8, **options)
    with pytest.raises(ValueError, match="height"):
        rasterize(*inputs, 0, 8)


@pytest.mark.parametrize("options, message", [
    (dict(dilation="0.3"), "dilation: wanted a number of at least 0"),
    (dict(height=16.0), "height, width: wanted whole numbers, got 16.0 x 8"),
    (dict(width="8"), "height, width: wanted whole numbers, got 8 x '8'"),
    (dict(width=0), "at least 1 x 1, got 8 x 0"),
    (dict(background=None), "background: wanted three numbers or a tensor .* got None"),
    (dict(background="red"), "background: wanted three numbers .* got 'red'"),
    (dict(background=(1, 1)), "background: wanted three numbers"),
    (dict(background=1.0), "background: wanted three numbers"),
    (dict(background=torch.ones(2)), "background: wanted a tensor of shape"),
    (dict(capacity=-1), "capacity: wanted a whole number of at least 0, or None, got -1"),
    (dict(capacity=1e6), "capacity: wanted a whole number of at least 0, or None, got 1000000.0"),
    (dict(backend="cuda"), "backend: wanted 'torch'"),
], ids=str)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        rasterize(*small(), **{"height": 8, "width": 8, **options})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("backend", ["torch", "triton", None])
def test_other_dtypes_are_refused(dtype, backend):
    with pytest.raises(ValueError, match="means: wanted float32 .*call .float"):
        rasterize(*[x.to(dtype) for x in small()], 8, 8, backend=backend)


def test_sizes_and_backgrounds_that_are_fine():
    import numpy as np
    inputs = small()
    want = rasterize(*inputs, 8, 9, (0, 0.5, 1))
    for size, background in (((np.int64(8), torch.tensor(9)), np.array([0, 0.5, 1])),
                             ((8, 9), torch.tensor([0, 0.5, 1], dtype=torch.float64))):
        assert torch.equal(rasterize(*inputs, *size, background).image, want.image)


@pytest.mark.parametrize("name", ["splat", "matching"])
def test_a_file_can_be_lifted_on_its_own(name, tmp_path):
    """Copied alone into an empty folder it is imported: torch and triton are all it needs."""
    source = (ROOT / "kernels" / f"{name}.py").read_text(encoding="utf-8")
    (tmp_path / "lifted.py").write_text(source, encoding="utf-8")
    imported = {node.module if isinstance(node, ast.ImportFrom) else alias.name for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    assert {top.split(".")[0] for top in imported} - set(sys.stdlib_module_names) == {"torch", "triton"}
    spec = importlib.util.spec_from_file_location("lifted", tmp_path / "lifted.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf"), "0.3", None])
def test_what_is_no_dilation(wrong):
    with pytest.raises(ValueError, match="dilation: wanted a number of at least 0"):
        rasterize(*scene(), 8, 8, dilation=wrong)


# ---- against recordings of others --------------------------------------------------------------------------


@pytest.mark.parametrize("eps2d", ["0", "0.3"])
def test_gsplats_recorded_pictures(eps2d):
    """gsplat's own PyTorch reference in float64, with its default dilation and without. It normalises quaternions."""
    d = {name: tensor.double() for name, tensor in load_file(ROOT / "tests/data/gsplat.safetensors").items()}
    H, W = d["eps0.rgb"].shape[1:3]
    c2w, K = torch.linalg.inv(d["viewmats"]), d["Ks"]
    fxfycxcy = torch.stack([K[:, 0, 0] / W, K[:, 1, 1] / H, K[:, 0, 2] / W, K[:, 1, 2] / H], -1)
    quats = torch.nn.functional.normalize(d["quats"], dim=-1)
    gaussians = (d[name] if name != "quats" else quats for name in PARAMETERS)
    inputs = [tensor[None] for tensor in (*gaussians, c2w, fxfycxcy)]
    got = rasterize(*inputs, H, W, d["background"], dilation=float(eps2d))
    image, alpha = got.image[0].permute(0, 2, 3, 1), got.alpha[0].permute(0, 2, 3, 1)
    for ours, name in ((image, "rgb"), (alpha, "alpha")):                   # measured 3e-6 without, 5e-7 with dilation
        assert (ours - d[f"eps{eps2d}.{name}"]).abs().max() < 1e-5
    other = {"0": "0.3", "0.3": "0"}[eps2d]
    assert (image - d[f"eps{other}.rgb"]).abs().max() > 0.1


# RaDe-GS, the rasteriser that DiffSplat and Nabla-R2D3 render with.
#
# tests/data/radegs.safetensors is RaDe-GS's forward pass (0b1fe5f), written down again in float64 by hand since
# no CUDA was at hand, with its autograd gradients: 300 Gaussians in two views of 48 x 48 pixels.
#
# Two things differ by design. The published tiles of 16 pixels see a Gaussian up to 3 standard deviations,
# rounded up to a tile; ours see it up to where its alpha falls below 1/255. And the published depth belongs to
# a pixel's corner, ours to its middle. So the pictures are compared by a share of their pixels, and then once
# more exactly: these two habits around our own projection give the recorded pictures and gradients to rounding.

SIZE, TILE = 48, 16
RADEGS_OUTPUTS = ("image", "alpha", "normal", "depth", "median_depth")
RADEGS_PARAMETERS = ("xyz", "rotation", "scale", "opacity", "rgb")
# The largest error of 99% of the pixels and the mean error of all. Measured: 7.0e-5, 2.1e-4, 4.5e-5, 3.6e-3,
# 3.8e-3 and 1.6e-5, 3.3e-5, 3.2e-5, 9.8e-4, 1.1e-3.
MOST = {"image": 1e-4, "alpha": 3e-4, "normal": 1e-4, "depth": 5e-3, "median_depth": 5e-3}
MEAN = {"image": 3e-5, "alpha": 6e-5, "normal": 6e-5, "depth": 1.5e-3, "median_depth": 1.5e-3}
# |error| / |gradient|. Measured: 0.0110, 0.0185, 0.0158, 0.0069, 0.0020.
GRADIENT = {"xyz": 0.015, "rotation": 0.025, "scale": 0.02, "opacity": 0.01, "rgb": 0.003}
# With the published habits. Measured: 6.5e-6, of the normals, and 2.4e-6, of xyz.
EXACT, EXACT_GRADIENT = 1e-5, 5e-6


def agrees(got, want, most, mean):
    """All pixels within `mean` on average, 99% of them within `most`."""
    error = (got.detach() - want).abs().double()
    return got.shape == want.shape and (error.flatten().quantile(0.99) < most and error.mean() < mean).item()


def distance(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.fixture(scope="module")
def recorded():
    d = load_file(ROOT / "tests/data/radegs.safetensors")
    d["opacity"] = d["opacity"][:, 0]
    d["grad.opacity"] = d["grad.opacity"][:, 0]
    return d


def recorded_scene(recorded, dtype):
    """The Gaussians as leaves, c2w and fxfycxcy."""
    gaussians = [recorded[name][None].to(dtype).requires_grad_() for name in RADEGS_PARAMETERS]
    return gaussians, recorded["C2W"][None].to(dtype), recorded["fxfycxcy"][None].to(dtype)


def objective(recorded, got):
    """The recorded gradients are of this."""
    return sum((got[name] * recorded[f"w.{name}"]).sum() for name in ("image", "alpha", "depth", "normal"))


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def ours(request, recorded):
    """Our pictures of the scene and the gradients of their objective."""
    gaussians, c2w, fxfycxcy = recorded_scene(recorded, request.param)
    render = rasterize(*gaussians, c2w, fxfycxcy, SIZE, SIZE)
    got = {name: getattr(render, name)[0] for name in RADEGS_OUTPUTS}
    gradients = torch.autograd.grad(objective(recorded, got), gaussians)
    return got, dict(zip(RADEGS_PARAMETERS, (gradient[0] for gradient in gradients)))


@pytest.mark.parametrize("name", RADEGS_OUTPUTS)
def test_pictures_are_radegs(recorded, ours, name):
    got, want = ours[0][name], recorded[f"out.{name}"]
    assert agrees(got, want, MOST[name], MEAN[name])
    for wrong in (1.05 * got, -got, got.roll(1, -1), got.roll(1, -2), got.mT, got.flip(0)):
        assert not agrees(wrong, want, MOST[name], MEAN[name])


def test_radegs_pictures_are_not_empty(recorded):
    """What the recorded pictures hold: objects, edges, background, opaque and thin places."""
    alpha = recorded["out.alpha"]
    assert (alpha == 0).any() and (alpha > 0.99).any() and 0.3 < alpha.mean() < 0.99
    assert torch.allclose(recorded["out.normal"].norm(dim=1, keepdim=True), (alpha > 0).float(), atol=1e-5)


@pytest.mark.parametrize("name", RADEGS_PARAMETERS)
def test_gradients_are_radegs(recorded, ours, name):
    got, want = ours[1][name], recorded[f"grad.{name}"]
    assert got.shape == want.shape and distance(got, want) < GRADIENT[name]
    wrong = [1.05 * got, -got, got.roll(1, 0)] + ([got.roll(1, 1)] if got.ndim > 1 else [])
    for gradient in wrong:
        assert not distance(gradient, want) < GRADIENT[name]


def project(recorded):
    """Our projection in float64: the leaves, what _project gives, and which Gaussian each row of it is."""
    gaussians, c2w, fxfycxcy = recorded_scene(recorded, torch.float64)
    projected = splat._project(*gaussians, c2w, fxfycxcy, SIZE, SIZE)
    difference, which = torch.cdist(projected[1][:, :3].detach(), gaussians[4][0].detach()).min(1)
    assert difference.max() == 0  # colours tell them apart
    return gaussians, projected, which


def test_projection_is_radegs(recorded):
    """Positions, conics, opacities, planes and normals of single Gaussians, to the rounding of the record."""
    gaussians, (shape, features, _, view), which = project(recorded)
    visible = torch.zeros(2, 300, dtype=torch.bool)
    visible[view, which] = True
    assert torch.equal(visible, recorded["per_gaussian.radii"] > 0)

    def errors(shape, features):
        x, y, a, slope, h, log_o = shape.unbind(1)  # alpha = exp(log o - h dy^2 - (a dx - r dy)^2)
        r = a * slope
        distances = (recorded["xyz"][which].double() - recorded["C2W"][view, :3, 3]).norm(dim=1)
        pairs = {"means2d": (torch.stack([x, y], 1), None),
                 "conics": (torch.stack([2 * a * a, -2 * a * r, 2 * (h + r * r)], 1), None),
                 "coef": (log_o.exp() / gaussians[3][0, which], None),
                 "ray_planes": (features[:, 5:7], None), "normals": (features[:, 7:], None),
                 "distance": (features[:, 4], distances)}
        wanted = {name: recorded[f"per_gaussian.{name}"][view, which].double() if want is None else want
                  for name, (_, want) in pairs.items()}
        return {name: ((got - wanted[name]).abs().max() / wanted[name].abs().max()).item()
                for name, (got, _) in pairs.items()}

    with torch.no_grad():
        assert max(errors(shape, features).values()) < 2e-6  # measured: 6.8e-7, of the normals
        moved, turned = shape.clone(), features.clone()
        moved[:, :2] += 0.5
        turned[:, 5:] *= -1
        wrong = errors(moved, turned)
        assert wrong["means2d"] > 1e-3 and wrong["ray_planes"] > 1 and wrong["normals"] > 1


def published_pictures(recorded, shape, features, view, which):
    """Both views from our projection, all pixels at once, with RaDe-GS's tiles and its depth's half pixel."""
    pixels = torch.arange(SIZE, dtype=torch.float64)
    row, column = (axis.flatten() for axis in torch.meshgrid(pixels, pixels, indexing="ij"))
    out = {name: [] for name in ("image", "alpha", "normal", "depth")}
    for v in range(2):
        x, y, a, slope, h, log_o = shape[view == v].split(1, 1)  # (N, 1), front to back
        color, _, t, plane_x, plane_y, normal = features[view == v].split([3, 1, 1, 1, 1, 3], 1)
        radius = recorded["per_gaussian.radii"][v, which[view == v], None].double()
        dx, dy = x - column, y - row  # (N, pixels)
        raw = (log_o - h * dy * dy - (a * (dx - slope * dy)) ** 2).exp()
        reached = raw >= 1 / 255
        for pixel, centre in ((column, x), (row, y)):
            tile = pixel.div(TILE).floor()
            reached &= tile >= ((centre - radius) / TILE).floor()
            reached &= tile < ((centre + radius + TILE - 1) / TILE).floor()
        clamped = raw + (raw.clamp(max=0.99) - raw).detach()  # the clamp lets the gradient through
        alpha = torch.where(reached, clamped, 0.0)
        after = (1 - alpha).cumprod(0)
        before = torch.cat([torch.ones_like(after[:1]), after[:-1]])
        weight = torch.where(after >= 1e-4, alpha * before, 0.0)
        total, focal = weight.sum(0), recorded["fxfycxcy"][v, 0].double() * SIZE
        ln = (((column - SIZE / 2) ** 2 + (row - SIZE / 2) ** 2) / focal ** 2 + 1).sqrt()
        depth = (weight * (t + plane_x * dx + plane_y * dy)).sum(0) / (total.clamp(min=1e-12) * ln)
        out["image"].append(color.T @ weight + 1 - total)
        out["alpha"].append(total[None])
        out["normal"].append(F.normalize(normal.T @ weight, dim=0, eps=1e-12))
        out["depth"].append(depth[None])
    return {name: torch.stack(views).unflatten(2, (SIZE, SIZE)) for name, views in out.items()}


def test_with_radegs_habits_it_is_exact(recorded):
    """The cut-off and the half pixel are all that differs."""
    gaussians, (shape, features, _, view), which = project(recorded)
    got = published_pictures(recorded, shape, features, view, which)
    for name, picture in got.items():
        want = recorded[f"out.{name}"].double()
        assert (picture.detach() - want).abs().max() < EXACT * want.abs().max(), name
    gradients = torch.autograd.grad(objective(recorded, got), gaussians)
    for name, gradient in zip(RADEGS_PARAMETERS, gradients):
        assert distance(gradient[0], recorded[f"grad.{name}"]) < EXACT_GRADIENT, name
