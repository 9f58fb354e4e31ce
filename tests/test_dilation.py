"""rasterize(dilation=...): in both backends against the dense formula, and against gsplat's recorded pictures. The
Triton kernels run in the interpreter, in a child process of this file.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_splat import PARAMETERS, dense, scene, weights_like  # noqa: E402

from kernels import rasterize, splat  # noqa: E402


def errors(inputs, H, W, dilation, dtype, **options):
    """Largest relative error of every output and gradient; how far the picture is from one without dilation."""
    reference = [tensor.detach().clone().requires_grad_(n < 5) for n, tensor in enumerate(inputs)]
    ours = [tensor.detach().to(dtype, copy=True).requires_grad_(n < 5) for n, tensor in enumerate(inputs)]
    want, got = dense(*reference, H, W, dilation=dilation), rasterize(*ours, H, W, dilation=dilation, **options)
    for render in (want, got):
        sum((a * w.to(a)).sum() for a, w in zip(render, weights_like(render))).backward()
    result = {name: ((a - b).abs().max() / b.abs().max()).item() for name, a, b in zip(want._fields, got, want)}
    result |= {f"grad {name}": ((a.grad - b.grad).abs().max() / b.grad.abs().max()).item()
               for name, a, b in zip(PARAMETERS, ours, reference)}
    plain = rasterize(*[tensor.detach() for tensor in ours], H, W, **options)
    result["effect"] = (plain.image - got.image).abs().max().item()
    return result


def check(result, tolerance):
    assert result.pop("effect") > 0.05
    assert max(result.values()) < tolerance, result


@pytest.mark.parametrize("flat", [1.0, 1e-3])
@pytest.mark.parametrize("dilation", [0.3, 2.0])
def test_against_the_dense_formula(flat, dilation):
    """Values and all gradients; the splats' planes, so depth and normal of each, are those without dilation."""
    inputs = scene(V=2, N=40, size=0.02, flat=flat)
    check(errors(inputs, 24, 31, dilation, torch.float64), 1e-9)
    check(errors(inputs, 24, 31, dilation, torch.float32), 1e-3)


def test_zero_dilation_is_none_to_the_bit():
    inputs = [tensor.float() for tensor in scene(V=2)]
    for a, b in zip(rasterize(*inputs, 24, 31), rasterize(*inputs, 24, 31, dilation=0)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf"), "0.3", None])
def test_what_is_no_dilation(wrong):
    with pytest.raises(ValueError, match="dilation: wanted a number of at least 0"):
        rasterize(*scene(), 8, 8, dilation=wrong)


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


@pytest.mark.skipif(splat.triton is None, reason="triton is not installed")
def test_triton_kernels_in_the_interpreter():
    child = subprocess.run([sys.executable, __file__], capture_output=True, text=True,
                           env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert child.returncode == 0, child.stderr[-2000:]
    for result in json.loads(child.stdout.splitlines()[-1]):
        check(result, 1e-3)


if __name__ == "__main__":
    results = [errors(scene(V=2, N=10, size=0.02, flat=flat), 13, 11, 0.3, torch.float32, backend="triton",
                      deterministic=fixed) for flat, fixed in ((1.0, False), (0.05, True))]
    print(json.dumps(results))
