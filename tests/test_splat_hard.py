"""kernels.rasterize on hard inputs: not finite, empty, thin, at a threshold; and a fuzz against the dense formula.

Each check takes a backend. The Triton ones run in Triton's interpreter in a child process of this file
(`python tests/test_splat_hard.py`), and on a GPU where there is one.
"""
import ast
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "experiments")]

from test_splat import dense, scene, weights_like  # noqa: E402

import bench  # noqa: E402

from kernels import Render, rasterize, splat  # noqa: E402

NAN, INF = math.nan, math.inf


def differentiate(inputs, H, W, fields=Render._fields, weights=None, **options):
    """The render, and the gradients of a random loss on the named outputs by all Gaussian parameters."""
    leaves = [x.detach().clone().requires_grad_(n < 5) for n, x in enumerate(inputs)]
    render = rasterize(*leaves, H, W, **options)
    weights = dict(zip(Render._fields, weights or weights_like(render), strict=True))
    loss = sum((getattr(render, name) * weights[name].to(render.image)).sum() for name in fields)
    return render, torch.autograd.grad(loss, leaves[:5])


# The interpreter takes 20 ms for a pair of a Gaussian and a tile.
SLOW = bool(os.environ.get("TRITON_INTERPRET"))
H, W = (7, 8) if SLOW else (9, 11)


def small(device="cpu", **options):
    return [x.float().to(device) for x in scene(**{"B": 2, "V": 2, "N": 3 if SLOW else 5, "size": 0.15, **options})]


# ---- what is not finite ------------------------------------------------------------------------------------


def with_dead(inputs):
    """Object 0 with Gaussians that hold a NaN, an infinity or a number that overflows, in each place in turn."""
    columns = [slice(0, 3), slice(3, 7), slice(7, 10), slice(10, 11), slice(11, 14)]
    own = torch.cat([x if x.ndim == 3 else x[..., None] for x in inputs[:5]], -1)
    dead = own[:, :1].repeat(1, 14 * 4 + 14 + 3, 1)
    dead[..., 10] = 0.9
    for place in range(14):
        for n, value in enumerate((NAN, INF, -INF, 3e38)):
            dead[0, 4 * place + n, place] = value
        dead[0, 56 + place, place] = NAN
        dead[0, 56 + place, 10] = 0.0 if place != 10 else NAN  # transparent
    dead[0, 70, :3] = torch.tensor([0.0, 0.0, 1e30])  # far away in front or behind
    dead[0, 71, 7:10] = INF
    dead[0, 72, 7:10] = 1e18
    dead[0, 70:, 10] = 0.5
    # large finite numbers in a mean, a quaternion, an opacity or a colour are no reason to drop a Gaussian
    keep = [4 * place + 3 for place in (*range(7), 10, 11, 12, 13)]
    dead[0, keep] = dead[0, 56].clone()
    dead[1, :, 10] = 0.0
    own = torch.cat([own, dead.to(own)], 1)
    return [own[..., c] if c.stop - c.start > 1 else own[..., c.start] for c in columns] + inputs[5:]


def not_finite(backend, device="cpu"):
    inputs = small(device)
    run = functools.partial(differentiate, H=H, W=W, backend=backend, deterministic=device != "cpu")
    clean, clean_grads = run(inputs)
    found, grads = run(with_dead(inputs))
    return {"pictures": all(map(torch.equal, found, clean)),
            "gradients": all(torch.equal(a[:, :b.shape[1]], b) for a, b in zip(grads, clean_grads, strict=True)),
            "dead": max(a[:, inputs[0].shape[1]:].abs().max().item() for a in grads)}


def blind_cameras(backend, device="cpu"):
    """A view whose camera is not finite, or has no focal length, sees nothing and changes nothing."""
    inputs = small(device)
    found = {}
    weights = weights_like(rasterize(*inputs, H, W, backend=backend))
    for w in weights:
        w[0, 1] = 0
    clean, clean_grads = differentiate(inputs, H, W, weights=weights, backend=backend)
    bad = dict(origin=((5, (0, 1, 2, 3)), INF), focal=((6, (0, 1, 0)), NAN))
    if not SLOW:
        bad |= dict(c2w=((5, (0, 1, 1, 2)), NAN), zero=((6, (0, 1, 1)), 0.0), centre=((6, (0, 1, 2)), -INF))
    for name, ((n, place), value) in bad.items():
        broken = [x.clone() for x in inputs]
        broken[n][place] = value
        render, grads = differentiate(broken, H, W, backend=backend, weights=[w + 0 for w in weights])
        leaves = [x.clone().requires_grad_() for x in broken[:5]]
        everything = rasterize(*leaves, *broken[5:], H, W, backend=backend)
        torch.autograd.backward(list(everything), [torch.ones_like(x) for x in everything])
        found[name] = (
            bool((render.image[0, 1] == 1).all()) and all(not x[0, 1].any() for x in render[1:])
            and all(torch.equal(a[b, v], c[b, v]) for a, c in zip(render, clean, strict=True)
                    for b, v in ((0, 0), (1, 0), (1, 1)))
            and all(torch.allclose(a, b, rtol=1e-5, atol=1e-5 * b.abs().max()) for a, b in
                    zip(grads, clean_grads, strict=True))
            and all(bool(x.grad.isfinite().all()) for x in leaves))
    return found


# ---- nothing there, and derivatives of derivatives ---------------------------------------------------------


def empty(backend, device="cpu"):
    """Each output alone can be differentiated, and gives zeros, where there is nothing to be seen."""
    inputs = small(device)
    cases = {"no Gaussian": [x[:, :0] for x in inputs[:5]] + inputs[5:], "no object": [x[:0] for x in inputs],
             "no view": inputs[:5] + [x[:, :0] for x in inputs[5:]], "behind": [inputs[0] + 100, *inputs[1:]],
             "transparent": [*inputs[:3], inputs[3] * 1e-3, *inputs[4:]]}
    found = {}
    for name, case in cases.items():
        for field in ("image", "median_depth") if SLOW else Render._fields:
            render, grads = differentiate(case, H, W, [field], backend=backend)
            found[f"{name}, {field}"] = not any(x.any() for x in grads) and (render.image == 1).all().item() and all(
                a.shape == b.shape for a, b in zip(grads, case, strict=False))
    return found


def twice(backend, device="cpu"):
    """create_graph gives the same first derivatives; the second ones raise, for any loss."""
    inputs = small(device, B=1, V=1)
    found, options = {}, {"backend": backend, "deterministic": device != "cpu"}     # else a GPU's sums have any order
    for name, loss in (("linear", lambda r: r.image.sum()), ("square", lambda r: r.image.square().sum()),
                       ("geometry", lambda r: r.depth.sum() + r.normal.square().sum() + r.median_depth.sum())):
        leaves = [x.clone().requires_grad_() for x in inputs[:5]]
        first = torch.autograd.grad(loss(rasterize(*leaves, *inputs[5:], H, W, **options)), leaves,
                                    materialize_grads=True)
        value = loss(rasterize(*leaves, *inputs[5:], H, W, **options))
        graph = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
        found[name] = all(map(torch.equal, first, graph))
        for n in range(3):
            try:
                torch.autograd.grad(graph[n].square().sum(), leaves, retain_graph=True, allow_unused=True)
                found[f"{name} {n}"] = "computed"
            except RuntimeError as error:
                found[f"{name} {n}"] = str(error)
    return found


# ---- precision ---------------------------------------------------------------------------------------------


def thin(backend, device="cpu"):
    """Errors of the gradients by means, quats and scales, as shares of the largest: flat ones, and needles that are
    a hundredth of a pixel wide.
    """
    found = {}
    for flat in (2.5e-4, 1e-7) if SLOW else (2.5e-4, 1e-5, 1e-7):
        inputs = small(device, B=1, N=8, V=1 if SLOW else 2, size=0.3, flat=flat, seed=3)
        for fields in (("depth", "median_depth", "normal"), ("image", "alpha")):
            exact = differentiate([x.double() for x in inputs], 8, 8, fields, backend="torch")[1]
            ours = differentiate(inputs, 8, 8, fields, backend=backend)[1]
            found[f"{flat} {fields[0]}"] = [
                ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours[:3], exact[:3], strict=True)]
    inputs = small(device, B=1, N=8, V=1 if SLOW else 2, size=0.3, seed=3)
    inputs[2][..., 1:] *= 0.003
    inputs[3][:] = 0.9
    exact = differentiate([x.double() for x in inputs], 12, 12, backend="torch")[1]
    ours = differentiate(inputs, 12, 12, backend=backend)[1]
    found["needles"] = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours[:3], exact[:3], strict=True)]
    return found


def threshold(backend, device="cpu"):
    """alpha in the middle of one wide Gaussian of opacity 1/255, and of a little less."""
    c2w = torch.eye(4, device=device)[None, None]
    found = []
    for opacity in (1 / 255, 0.999 / 255):
        shape = [[[0.0, 0.0, 2.0]]], [[[1.0, 0, 0, 0]]], [[[0.5, 0.5, 0.5]]], [[opacity]], [[[0.0, 0.0, 0.0]]]
        inputs = [torch.tensor(x, device=device) for x in shape]
        fxfycxcy = torch.tensor([[[1.0, 1.0, 0.5, 0.5]]], device=device)
        found.append(rasterize(*inputs, c2w, fxfycxcy, 9, 9, backend=backend).alpha[0, 0, 0, 4, 4].item())
    return found


# ---- the fuzz ----------------------------------------------------------------------------------------------


def adversary(seed, most=10, side=20):
    """A random scene, hard in a random way, its picture's size and dilation, and which Gaussians are not finite."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    pick = lambda *options: options[int(rand(1) * len(options))]  # noqa: E731
    B, V, N = pick(1, 1, 2), pick(1, 1, 2), 1 + int(rand(1) * most)
    H, W = 1 + int(rand(1) * side), 1 + int(rand(1) * side)
    inputs = scene(B, V, N, seed, size=10 ** (-2 + 2 * rand(1).item()), flat=pick(1.0, 0.1, 1e-2),
                   spread=pick(0.05, 0.3, 1.0))
    means, quats, scales, opacities, colors, c2w, fxfycxcy = inputs
    quats *= 0.7 + 0.6 * rand(B, N, 1)
    opacities[rand(B, N) < 0.1] = 1.0
    opacities[rand(B, N) < 0.1] = 0.0
    scales *= 10 ** (rand(B, N, 1) - 0.5)
    fxfycxcy = (fxfycxcy * (0.5 + rand(B, V, 4))).to(torch.float64)  # the centre is anywhere in the picture
    if N > 1 and rand(1) < 0.2:  # twins: the same distance
        means[:, 1], quats[:, 1], scales[:, 1] = means[:, 0], quats[:, 0], scales[:, 0]
    near = rand(B, N) < 0.2  # beside the camera, in front of it and behind
    means[near] = (c2w[:, 0, None, :3, 3] + rand(B, N, 3) - 0.5)[near]
    dead = rand(B, N) < pick(0.0, 0.3)
    dilation = pick(0.0, 0.0, 0.3, 2.0)
    return [means, quats, scales, opacities, colors, c2w, fxfycxcy], H, W, dilation, dead, generator


def fuzz(seed, dtype, backend, **size):
    """(largest error of the outputs, of the gradients, margin): shares of the largest value of each."""
    inputs, H, W, dilation, dead, generator = adversary(seed, **size)
    ours = [x.to(dtype, copy=True) for x in inputs]
    inputs[3] = torch.where(dead, 0.0, inputs[3])
    for b, n in dead.nonzero().tolist():
        which = int(torch.randint(5, (), generator=generator))
        bad = (NAN, INF, -INF)[int(torch.randint(3, (), generator=generator))]
        ours[which][b, n] = bad
    margins, leaves = [], [x.requires_grad_(n < 5) for n, x in enumerate(inputs)]
    want = dense(*leaves, H, W, margins=margins, dilation=dilation)
    weights = weights_like(want, seed)
    want_grads = torch.autograd.grad(sum((a * w).sum() for a, w in zip(want, weights, strict=True)), leaves[:5],
                                     materialize_grads=True)
    got, grads = differentiate(ours, H, W, weights=weights, backend=backend, dilation=dilation)
    off = lambda a, b: ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()  # noqa: E731
    assert not any(x[dead].any() for x in grads), seed
    assert all(x.isfinite().all() for x in (*got, *grads)), seed
    return (max(map(off, got, want)), max(map(off, grads, want_grads)), min(margins, default=1.0))


def fuzzed(count, dtype, backend, **size):
    """Of all scenes that keep clear of thresholds: their number, the worst of both errors, and the median ones."""
    rows = [fuzz(seed, dtype, backend, **size) for seed in range(count)]
    clear = [row for row in rows if row[2] > (1e-4 if dtype == torch.float32 else 1e-9)]
    outputs, gradients = (sorted(row[n] for row in clear) for n in (0, 1))
    half = len(clear) // 2
    return {"clear": len(clear), "outputs": outputs[-1], "gradients": gradients[-1],
            "median": [outputs[half], gradients[half]]}


# ---- tests -------------------------------------------------------------------------------------------------

CHECKS = {check.__name__: check for check in (not_finite, blind_cameras, empty, twice, thin, threshold)}


@pytest.fixture(scope="module")
def interpreted():
    if splat.triton is None:
        pytest.skip("triton is not installed")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(params=["torch", "triton, interpreted", "triton"])
def found(request):
    """A function that gives a check's findings with each backend."""
    if request.param == "torch":
        return lambda name: CHECKS[name]("torch")
    if request.param == "triton":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return lambda name: CHECKS[name]("triton", "cuda")
    return request.getfixturevalue("interpreted").__getitem__


def test_what_is_not_finite_is_dropped(found):
    assert found("not_finite") == {"pictures": True, "gradients": True, "dead": 0.0}


def test_a_camera_that_is_not_finite_sees_nothing(found):
    cameras = found("blind_cameras")
    assert len(cameras) > 1 and all(cameras.values()), cameras


def test_nothing_to_be_seen(found):
    cases = found("empty")
    assert len(cases) >= 10 and all(cases.values()), cases


def test_second_derivatives_raise(found):
    cases = found("twice")
    assert len(cases) == 12
    for name, value in cases.items():
        assert value is True if " " not in name else "cannot be differentiated again" in value, (name, value)


def test_gradients_of_flat_gaussians_and_needles(found):
    """Measured worst: means 5.1e-5, quats 8.2e-5, scales 2.8e-6, of needles 7.7e-5. With moments of dx, dy, and a
    gradient of the thinnest scale's own, it was 1.6e-4, 6.9e-3 and 8.3, and of the needles' scales 1.1e-3.
    """
    errors = found("thin")
    print(errors)
    for name, (means, quats, scales) in errors.items():
        worst = 3e-4 if name == "needles" else 1e-5
        assert means < 5e-4 and quats < 5e-4 and scales < worst, (name, means, quats, scales)


def test_an_opacity_of_1_255_is_seen(found):
    at, below = found("threshold")
    assert at == pytest.approx(1 / 255, rel=1e-5) and below == 0


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


def test_fuzz_triton(interpreted):
    found = interpreted["fuzz"]
    print(found)
    assert found["clear"] > 20 and found["outputs"] < 1e-3 and found["gradients"] < 1e-2, found
    assert max(found["median"]) < 1e-5, found


def test_tile_keys_of_16_bits(interpreted):
    """65,536 tiles are numbered with 16 bits, one more with 32; the lists are the same."""
    assert interpreted["keys"] == {"65536": ["torch.int16", True], "65537": ["torch.int32", True]}


def test_other_tiles_and_warps_compute_the_same(interpreted):
    found = interpreted["variants"]
    assert len(found) == 3 and max(found.values()) < 1e-5, found


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


def variants():
    """How far other tiles and warps, which experiments/bench.py sweeps over, are from the ones in use."""
    inputs, found = small(B=1, V=1), {}
    want = [*rasterize(*inputs, 17, 9, backend="triton"), *differentiate(inputs, 17, 9, backend="triton")[1]]
    for name in ("tile 8, 2 warps", "tile 16, 1 warps", "tile 16, 4 warps"):
        module = bench.variant(name)
        leaves = [x.clone().requires_grad_(n < 5) for n, x in enumerate(inputs)]
        got = module.rasterize(*leaves, 17, 9, backend="triton")
        loss = sum((a * w).sum() for a, w in zip(got, weights_like(got), strict=True))
        got = [*got, *torch.autograd.grad(loss, leaves[:5])]
        found[name] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True))
    return found


def keys():
    """Lists of pairs in 65,536 and 65,537 tiles, made by the kernels: the keys' type, and whether they are right."""
    found = {}
    for tiles in (65536, 65537):
        tiles_x, rows, generator = 64, 40, torch.Generator().manual_seed(0)
        box = torch.stack([torch.randint(tiles - 2 * tiles_x, (rows,), generator=generator),
                           torch.full((rows,), 2), torch.randint(1, 5, (rows,), generator=generator)], 1).int()
        box[7] = torch.tensor([tiles - 2, 2, 2])  # up to the last tile
        order = torch.randperm(rows, generator=generator)
        wanted = {}
        for rank, row in enumerate(order.tolist()):
            first, wide, count = box[row].tolist()
            for place in range(count):
                wanted.setdefault(first + place // wide * tiles_x + place % wide, []).append(rank)
        seen, sort = [], torch.Tensor.sort
        torch.Tensor.sort = lambda x, **options: (seen.append(x.dtype), sort(x, **options))[1]  # noqa: B023
        row, _, start, _ = splat._tile_lists_triton(order, box, int(box[:, 2].sum()), tiles_x, tiles)
        torch.Tensor.sort = sort
        start = start.tolist()
        got = {t: row[start[t]:start[t + 1]].tolist() for t in range(tiles) if start[t] < start[t + 1]}
        found[tiles] = str(seen[-1]), got == wanted and tiles - 1 in got
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {}
    for name, check in CHECKS.items():
        begun = time.perf_counter()
        results[name] = check("triton")
        print(name, time.perf_counter() - begun)
    results["fuzz"] = fuzzed(40, torch.float32, "triton", most=5, side=9)
    results["keys"] = keys()
    results["variants"] = variants()
    print(json.dumps(results))
