"""What the tests of kernels.rasterize share: the dense formula in float64, scenes, and checks that each backend must pass.

tests/test_rasterize.py runs the PyTorch path, tests/test_rasterize_triton.py the kernels.
"""
import functools
import math
import os

import torch

from kernels import Render, rasterize

PARAMETERS = ("means", "quats", "scales", "opacities", "colors")
NAN, INF = math.nan, math.inf


def dense(means, quats, scales, opacities, colors, c2w, fxfycxcy, H, W, background=(1.0, 1.0, 1.0), margins=None, dilation=0.0):
    """Every Gaussian on every pixel, one view after another, textbook algebra: matrix inverses, no lists, no tiles.

    margins: a list that gets how close, relatively, a number comes to one of the formula's thresholds.
    """
    results = []
    for b in range(c2w.shape[0]):
        for v in range(c2w.shape[1]):
            w2c = torch.linalg.inv(c2w[b, v])
            fx, fy, cx, cy = (fxfycxcy[b, v] * fxfycxcy.new_tensor([W, H, W, H])).unbind()
            q0, q1, q2, q3 = quats[b].unbind(-1)
            K = torch.stack([torch.stack([torch.zeros_like(q0), -q3, q2], -1), torch.stack([q3, torch.zeros_like(q0), -q1], -1),
                             torch.stack([-q2, q1, torch.zeros_like(q0)], -1)], -2)
            rotation = torch.eye(3).to(K) + 2 * q0[:, None, None] * K + 2 * K @ K  # Rodrigues' formula, any |q|
            sigma = rotation @ torch.diag_embed(scales[b] ** 2) @ rotation.mT
            S = w2c[:3, :3] @ sigma @ w2c[:3, :3].T
            t = means[b] @ w2c[:3, :3].T + w2c[:3, 3]
            order = t[:, 2].argsort(stable=True)
            S, t, o, c = S[order], t[order], opacities[b][order], colors[b][order]
            ok = t[:, 2] > 0.2
            tz = torch.where(ok, t[:, 2], 1.0)
            x, y = fx * t[:, 0] / tz + cx - 0.5, fy * t[:, 1] / tz + cy - 0.5
            u = (t[:, 0] / tz).clamp(-1.3 * W / 2 / fx, 1.3 * W / 2 / fx)
            v_ = (t[:, 1] / tz).clamp(-1.3 * H / 2 / fy, 1.3 * H / 2 / fy)
            zero = torch.zeros_like(u)
            J = torch.stack([torch.stack([fx / tz, zero, -fx * u / tz], -1), torch.stack([zero, fy / tz, -fy * v_ / tz], -1)], -2)
            C = J @ S @ J.mT + dilation * torch.eye(2).to(J)
            det = torch.linalg.det(C)
            ok = ok & (det > 1e-6)
            C = torch.where(ok[:, None, None], C, torch.eye(2).to(C))
            ray = torch.stack([u, v_, torch.ones_like(u)], -1)
            m = torch.linalg.solve(S, ray)
            q = m / torch.maximum((m * ray).sum(-1), 1e-7 * m.norm(dim=-1))[:, None]
            nl = 1 + u ** 2 + v_ ** 2
            plane = [tz * nl.sqrt() * (q[:, 0] - u / nl) / fx, tz * nl.sqrt() * (q[:, 1] - v_ / nl) / fy]
            normal = -m / m.norm(dim=-1, keepdim=True)

            py, px = torch.meshgrid(torch.arange(H).to(x), torch.arange(W).to(x), indexing="ij")
            d = torch.stack([x[:, None, None] - px, y[:, None, None] - py], -1)  # [N, H, W, 2]
            power = -0.5 * torch.einsum("nhwi,nij,nhwj->nhw", d, torch.linalg.inv(C), d)
            raw = (o * (det / (det + 1e-6) + 1e-6).clamp(min=0).sqrt())[:, None, None] * power.exp()
            raw = torch.where(ok[:, None, None] & (raw >= 1 / 255), raw, 0.0)
            alpha = raw + (raw.clamp(max=0.99) - raw).detach()  # the clamp lets the gradient through
            after = (1 - alpha).cumprod(0)
            before = torch.cat([torch.ones_like(after[:1]), after[:-1]])
            w = torch.where(after >= 1e-4, alpha * before, 0.0)
            along = t.norm(dim=-1)[:, None, None] + plane[0][:, None, None] * d[..., 0] + plane[1][:, None, None] * d[..., 1]
            ln = (((px + 0.5 - cx) / fx) ** 2 + ((py + 0.5 - cy) / fy) ** 2 + 1).sqrt()
            total = w.sum(0)
            image = torch.einsum("nhw,nc->chw", w, c) + (1 - total) * torch.tensor(background).to(w)[:, None, None]
            depth = torch.where(total > 0, (w * along).sum(0) / total.clamp(min=1e-12) / ln, 0.0)
            summed = torch.einsum("nhw,nc->chw", w, normal)
            near = (w > 0) & (before > 0.5)
            last = torch.where(near, torch.arange(1, len(w) + 1)[:, None, None], 0).amax(0)
            chosen = along.gather(0, (last - 1).clamp(min=0)[None])[0]
            median = torch.where(last > 0, chosen / ln, 0.0)
            if margins is not None:
                for number, limit, where in ((t[:, 2], 0.2, o > 0), (det, 1e-6, t[:, 2] > 0.2),
                                             (o[:, None, None] * power.exp(), 1 / 255, ok), (after, 1e-4, alpha > 0),
                                             (before, 0.5, alpha > 0)):
                    near = (number / limit - 1).abs()[where]
                    margins.append(near.min().item() if near.numel() else 1.0)
            results.append((image, total[None], depth[None], median[None],
                            summed / summed.norm(dim=0, keepdim=True).clamp(min=1e-12)))
    shape = c2w.shape[:2]
    return Render(*(torch.stack(tensors).unflatten(0, shape) for tensors in zip(*results, strict=True)))


def cameras(B, V, generator):
    """Random cameras around the origin, looking at it, with slightly different focal lengths."""
    position = torch.nn.functional.normalize(torch.randn(B, V, 3, generator=generator).double(), dim=-1) * 1.4
    forward = -position / 1.4
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, torch.tensor([0.0, 1.0, 0.1]).to(forward).expand_as(forward)), dim=-1)
    c2w = torch.eye(4, dtype=torch.float64).repeat(B, V, 1, 1)
    c2w[..., :3, :] = torch.stack([right, torch.linalg.cross(forward, right), forward, position], -1)
    return c2w, torch.tensor([1.4, 1.3, 0.5, 0.48]).expand(B, V, 4) * (1 + 0.05 * torch.rand(B, V, 1, generator=generator))


def scene(B=1, V=1, N=60, seed=0, size=0.06, flat=1.0, spread=0.3):
    """Random Gaussians: means, quats (not quite of unit length), scales, opacities, colors, c2w, fxfycxcy; float64."""
    generator = torch.Generator().manual_seed(seed)
    means = spread * torch.randn(B, N, 3, generator=generator)
    quats = torch.nn.functional.normalize(torch.randn(B, N, 4, generator=generator), dim=-1) * 1.03
    scales = size * (0.3 + torch.rand(B, N, 3, generator=generator)) * torch.tensor([1.0, 1.0, flat])
    opacities = 0.05 + 0.94 * torch.rand(B, N, generator=generator)
    colors = torch.rand(B, N, 3, generator=generator)
    return [tensor.double() for tensor in (means, quats, scales, opacities, colors, *cameras(B, V, generator))]


def weights_like(render, seed=0):
    """Random weights of each output in a loss."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tensor.shape, generator=generator) for tensor in render]


def differentiate(inputs, H, W, fields=Render._fields, weights=None, **options):
    """The render, and the gradients of a random loss on the named outputs by all Gaussian parameters."""
    leaves = [x.detach().clone().requires_grad_(n < 5) for n, x in enumerate(inputs)]
    render = rasterize(*leaves, H, W, **options)
    weights = dict(zip(Render._fields, weights or weights_like(render), strict=True))
    loss = sum((getattr(render, name) * weights[name].to(render.image)).sum() for name in fields)
    return render, torch.autograd.grad(loss, leaves[:5])


def worst(actual, expected, least=1e-6):
    """The largest error as a share of the largest value."""
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=least)).item()


def same_bits(a, b):
    """Two results of differentiate: the same bits everywhere?"""
    return all(map(torch.equal, [*a[0], *a[1]], [*b[0], *b[1]]))


def errors(inputs, H, W, *, dtype=torch.float32, change=lambda render: render, dilation=0.0, **options):
    """Largest relative errors of rasterize: {output or parameter: |error| / largest value}, and the dense outputs."""
    reference = [tensor.detach().clone().requires_grad_(n < 5) for n, tensor in enumerate(inputs)]
    ours = [tensor.detach().to(dtype, copy=True).requires_grad_(n < 5) for n, tensor in enumerate(inputs)]
    want = dense(*reference, H, W, dilation=dilation)
    got = change(rasterize(*ours, H, W, dilation=dilation, **options))
    weights = weights_like(want)
    sum((a * w.double()).sum() for a, w in zip(want, weights)).backward()
    loss = sum((a * w.to(dtype)).sum() for a, w in zip(got, weights))
    if loss.requires_grad:
        loss.backward()
    pairs = {name: (getattr(got, name), getattr(want, name)) for name in Render._fields}
    pairs |= {f"grad {name}": (a.grad if a.grad is not None else torch.zeros_like(a), b.grad)
              for name, a, b in zip(PARAMETERS, ours, reference)}
    return {name: worst(a, b) for name, (a, b) in pairs.items()}, want


def assert_close(found, outputs=1e-5, gradients=1e-4):
    for name, error in found.items():
        assert error < (gradients if name.startswith("grad") else outputs), f"{name}: {error:.1e} of {found}"


SCENES = {
    "many": (dict(B=2, V=3, N=150), 40, 33),
    "image smaller than a tile": (dict(B=1, V=2, N=30), 5, 3),
    "one pixel": (dict(B=1, V=1, N=30, spread=0.05, size=0.7), 1, 1),
    "one Gaussian": (dict(N=1, spread=0.02), 24, 24),
    "larger than the image": (dict(N=12, size=1.0), 20, 28),
    "flat": (dict(N=80, V=2, flat=1e-3), 32, 32),
    "opaque stack": (dict(N=400, spread=0.08, size=0.2), 24, 24),
}


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
            found[f"{flat} {fields[0]}"] = [worst(a, b, 0) for a, b in zip(ours[:3], exact[:3], strict=True)]
    inputs = small(device, B=1, N=8, V=1 if SLOW else 2, size=0.3, seed=3)
    inputs[2][..., 1:] *= 0.003
    inputs[3][:] = 0.9
    exact = differentiate([x.double() for x in inputs], 12, 12, backend="torch")[1]
    ours = differentiate(inputs, 12, 12, backend=backend)[1]
    found["needles"] = [worst(a, b, 0) for a, b in zip(ours[:3], exact[:3], strict=True)]
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
    off = functools.partial(worst, least=1e-3)
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


# ---- what must have been found: each check beside its assertion --------------------------------------------


def is_dropped(found):
    assert found == {"pictures": True, "gradients": True, "dead": 0.0}


def sees_nothing(found):
    assert len(found) > 1 and all(found.values()), found


def gives_zeros(found):
    assert len(found) >= 10 and all(found.values()), found


def raises(found):
    assert len(found) == 12
    for name, value in found.items():
        assert value is True if " " not in name else "cannot be differentiated again" in value, (name, value)


def is_near(found):
    """Measured worst: means 5.1e-5, quats 8.2e-5, scales 2.8e-6, of needles 7.7e-5. With moments of dx, dy, and a
    gradient of the thinnest scale's own, it was 1.6e-4, 6.9e-3 and 8.3, and of the needles' scales 1.1e-3.
    """
    for name, (means, quats, scales) in found.items():
        most = 3e-4 if name == "needles" else 1e-5
        assert means < 5e-4 and quats < 5e-4 and scales < most, (name, means, quats, scales)


def is_seen_at_the_threshold(found):
    at, below = found
    assert abs(at * 255 - 1) < 1e-5 and below == 0


CHECKS = {
    "what is not finite is dropped": (not_finite, is_dropped),
    "a camera that is not finite sees nothing": (blind_cameras, sees_nothing),
    "nothing to be seen gives zeros": (empty, gives_zeros),
    "second derivatives raise": (twice, raises),
    "gradients of flat Gaussians and needles are near": (thin, is_near),
    "an opacity of 1/255 is seen": (threshold, is_seen_at_the_threshold),
}
