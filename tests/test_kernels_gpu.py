"""What only a GPU can show of kernels/: sizes as in training, streams, devices, atomics, graphs, stale memory.

tests/test_rasterize_triton.py and test_matching.py hold their scenes on a GPU to the same float64 formulas as on a
CPU; nothing of that is repeated here.
"""
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "experiments")]

import bench  # noqa: E402
from rasterize_checks import differentiate, same_bits, scene, weights_like, worst  # noqa: E402
from test_matching import make_case  # noqa: E402

from kernels import gradient_matching, rasterize  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def share(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


@pytest.fixture
def inputs():
    return [x.float().cuda() for x in scene(B=2, V=3, N=60)]


def test_stale_memory_is_not_read(inputs):
    """What torch.empty hands out holds NaN."""
    want = differentiate(inputs, 33, 40, deterministic=True)
    stale = [torch.full((2**size,), math.nan, device="cuda") for size in range(8, 29)]
    del stale
    assert same_bits(differentiate(inputs, 33, 40, deterministic=True), want)
    arguments, incoming = make_case("awkward", "float32", "cfg", "cuda")
    assert all(x.isfinite().all() for x in gradient_matching(*arguments))


def test_strided_and_expanded(inputs):
    want = differentiate(inputs, 33, 40, deterministic=True)
    strided = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    assert not strided[0].is_contiguous() and same_bits(differentiate(strided, 33, 40, deterministic=True), want)
    one = [x[:1].expand(2, *x.shape[1:]) for x in inputs]
    copied = [x.contiguous() for x in one]
    assert same_bits(differentiate(one, 33, 40, deterministic=True), differentiate(copied, 33, 40, deterministic=True))


def test_on_a_side_stream(inputs):
    want = differentiate(inputs, 64, 64, deterministic=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = differentiate(inputs, 64, 64, deterministic=True)
    torch.cuda.current_stream().wait_stream(stream)
    assert same_bits(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_a_second_device(inputs):
    want = differentiate(inputs, 33, 40, deterministic=True)
    got = differentiate([x.to("cuda:1") for x in inputs], 33, 40, deterministic=True)
    assert same_bits(*[[[x.cpu() for x in part] for part in result] for result in (got, want)])
    arguments, _ = make_case("round", "float32", "cfg", "cuda:1")
    assert gradient_matching(*arguments)[0].device == torch.device("cuda:1")


@pytest.mark.parametrize("B", [4, 5])
def test_many_tiles(B):
    """65,536 tiles, the most that 16-bit keys carry, and more: the last object is as it is alone."""
    gaussians, views = bench.scene(B, 4, 4 * 32**2, torch.device("cuda"), 0), bench.make_views(B, 4, 512, "cuda")
    whole = rasterize(*gaussians, *views[:2], 512, 512)
    alone = rasterize(*[x[B - 1:] for x in gaussians], *[x[B - 1:] for x in views[:2]], 512, 512)
    assert alone.alpha.max() > 0.5
    assert all(torch.equal(a[B - 1:], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("shape", ["embedded", "diffsplat"])
def test_full_size(shape):
    """As near to the PyTorch path in float64 as that path itself in float32, whose gradients by quaternions and colours
    are up to 4e-3 off: a rounded depth can put another Gaussian in front. The same bits where asked for.
    """
    B, V, N, size = bench.SPLAT[shape]
    gaussians = bench.scene(B, V, N, torch.device("cuda"), 0)
    inputs = [*gaussians, *bench.make_views(B, V, size, "cuda")[:2]]
    exact = differentiate([x.double() for x in inputs], size, size, backend="torch")
    single = differentiate(inputs, size, size, backend="torch")
    first, second = (differentiate(inputs, size, size) for _ in range(2))
    fixed, again = (differentiate(inputs, size, size, deterministic=True) for _ in range(2))
    names = [*exact[0]._fields, "means", "quats", "scales", "opacities", "colors"]
    for name, *values in zip(names, *([*x[0], *x[1]] for x in (exact, single, first, second, fixed)), strict=True):
        exactly, in_float32, ours, other, same_bits = values
        limit = max(1e-3, 1.5 * share(in_float32, exactly))
        limit = 3e-2 if name == "median_depth" else limit  # where T is about 1/2 it may be a neighbour's
        assert share(ours, exactly) < limit and share(same_bits, exactly) < limit, name
        assert share(ours, other) < 1e-4, name
    assert same_bits(fixed, again)


def replayed(call, leaves, others):
    """The call as a CUDA graph, replayed after each of `others` was copied to the leaves: a list of its results."""
    replay, kept = bench.captured(call)
    results = []
    for inputs in others:
        with torch.no_grad():
            for leaf, x in zip(leaves, inputs, strict=True):
                leaf.copy_(x)
        replay()
        results.append([x.clone() for x in kept])
    return results


@pytest.mark.parametrize("capacity", [None, 0])
def test_rasterize_is_captured_and_replayed_with_other_inputs(inputs, capacity):
    """Forward and backward in one graph: the bits of a call, for scenes with more pairs than the captured one too."""
    other = [x.float().cuda() for x in scene(B=2, V=3, N=60, seed=1, size=0.15)]
    leaves = [x.clone().requires_grad_(n < 5) for n, x in enumerate(inputs)]
    weights = [w.cuda() for w in weights_like(rasterize(*inputs, 33, 40))]

    def call():
        render = rasterize(*leaves, 33, 40, deterministic=True, capacity=capacity)
        return *render, *torch.autograd.grad(list(render), leaves[:5], weights)

    for found, scene_of in zip(replayed(call, leaves, [inputs, other]), (inputs, other), strict=True):
        render, grads = differentiate(scene_of, 33, 40, weights=weights, deterministic=True)
        assert all(map(torch.equal, found[:5], render))
        assert max(map(worst, found[5:], grads)) < 1e-6  # the loss is summed up in another order


def test_gradient_matching_is_captured_and_replayed_with_other_inputs():
    (arguments, _), (others, _) = (make_case("awkward", "float32", "cfg", "cuda", seed) for seed in (0, 1))
    leaves = [x.clone() if torch.is_tensor(x) else x for x in arguments]
    tensors = [n for n, x in enumerate(arguments) if torch.is_tensor(x)]
    found = replayed(lambda: gradient_matching(*leaves), [leaves[n] for n in tensors], [[others[n] for n in tensors]])
    assert all(map(torch.equal, found[0], gradient_matching(*others)))


def test_under_torch_compile(inputs):
    arguments, _ = make_case("awkward", "float32", "cfg", "cuda")
    compiled = torch.compile(lambda *x: sum(gradient_matching(*x)))
    assert torch.allclose(compiled(*arguments), sum(gradient_matching(*arguments)))
    compiled = torch.compile(lambda *x: rasterize(*x, 33, 40).image * 2)
    assert torch.equal(compiled(*inputs), rasterize(*inputs, 33, 40).image * 2)


def test_the_host_never_waits(inputs):
    """Everything is queued, in the first call of a shape too: with warnings for each wait there are none."""
    rasterize(*inputs, 33, 40)  # compiles
    incoming = [torch.randn(2, 3, channels, 35, 40, device="cuda") for channels in (3, 1, 1, 1, 3)]
    leaves = [x.clone().requires_grad_() for x in inputs[:5]]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                render = rasterize(*leaves, *inputs[5:], 35, 40)
                torch.autograd.backward(list(render), incoming)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not [str(w.message) for w in caught if "synchroniz" in str(w.message)]
