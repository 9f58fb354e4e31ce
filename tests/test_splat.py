"""kernels.rasterize against a dense float64 formula (every output, every gradient) and the recorded RaDe-GS vectors."""
from pathlib import Path

import pytest
import torch


from kernels import Render, rasterize  # noqa: E402

DATA = Path(__file__).parent / "data"
PARAMETERS = ("means", "quats", "scales", "opacities", "colors")


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


def errors(inputs, H, W, *, dtype=torch.float32, change=lambda render: render, **options):
    """Largest relative errors of rasterize: {output or parameter: |error| / largest value}, and the dense outputs."""
    reference = [tensor.clone().requires_grad_(n < 5) for n, tensor in enumerate(inputs)]
    ours = [tensor.to(dtype).requires_grad_(n < 5) for n, tensor in enumerate(inputs)]
    want = dense(*reference, H, W)
    got = change(rasterize(*ours, H, W, **options))
    weights = weights_like(want)
    sum((a * w.double()).sum() for a, w in zip(want, weights)).backward()
    loss = sum((a * w.to(dtype)).sum() for a, w in zip(got, weights))
    if loss.requires_grad:
        loss.backward()
    pairs = {name: (getattr(got, name), getattr(want, name)) for name in Render._fields}
    pairs |= {f"grad {name}": (a.grad if a.grad is not None else torch.zeros_like(a), b.grad)
              for name, a, b in zip(PARAMETERS, ours, reference)}
    return {name: ((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for name, (a, b) in pairs.items()}, want


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


@pytest.mark.parametrize("name", SCENES)
def test_float64_is_the_dense_formula(name):
    arguments, H, W = SCENES[name]
    found, want = errors(scene(**arguments), H, W, dtype=torch.float64)
    assert want.alpha.max() > 0.1
    assert_close(found, 1e-9, 1e-7 if name == "flat" else 1e-9)


@pytest.mark.parametrize("name", SCENES)
def test_float32(name):
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
