"""gradient_matching against float64 autograd of the dense formula and against the recorded official loss.

The Triton kernels run in Triton's interpreter and are compiled for real targets in child processes of this
file (`python tests/test_matching.py interpret|compile`): TRITON_INTERPRET is read when triton is imported, so
no pytest process could do both.
"""
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kernels import matching  # noqa: E402
from kernels.matching import gradient_matching  # noqa: E402

needs_triton = pytest.mark.skipif(matching.triton is None, reason="triton is not installed")
SHAPES = {"round": (2, (4, 8, 8, 8)), "awkward": (3, (7, 11, 17)), "one": (1, (1,)), "scalar": (5, ())}
DTYPES = {"float32": (torch.float32,) * 2, "bfloat16": (torch.bfloat16,) * 2, "float16": (torch.float16,) * 2,
          "mixed": (torch.float32, torch.bfloat16)}  # of eps_theta and of everything else
GUIDANCE = {"cfg": 7.5, "per sample": None, "conditional": 1.0, "text only": 1}
# Error as a share of each sample's largest element. Measured worst: values 5e-7 on any dtype, gradients
# 3.5e-7 in float32. In bfloat16 and float16 the gradient is rounded to its own dtype, and errs by half a unit
# in the last place, 2^-8 and 2^-11; by a whole one in bfloat16 in Triton's interpreter, which truncates.
VALUE_TOL = 2e-6
GRAD_TOL = {"float32": 1.5e-6, "bfloat16": 2**-7 + 1e-5, "float16": 2**-11 + 1e-5, "mixed": 1.5e-6}


def make_case(shape, dtype, guidance, device="cpu", seed=0):
    """Inputs of the size they have in training: the network has moved off the reference by a tenth."""
    M, rest = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    theta, other = DTYPES[dtype]
    u, t = randn(M, *rest), randn(M, *rest)
    latents = [u, t, u + 0.1 * randn(M, *rest), t + 0.1 * randn(M, *rest), t + 0.1 * randn(M, *rest),
               randn(M, *rest)]
    latents = [x.to(device, theta if i < 2 else other) for i, x in enumerate(latents)]
    if guidance == "text only":
        latents[0] = latents[2] = None
    s = GUIDANCE[guidance] or (1 + 6 * torch.rand(M, generator=generator)).to(device)
    # 1 to 1000 is what the steps of one sampler span; float16 would overflow in a gradient of k^2.
    k = torch.logspace(0, 1 if dtype == "float16" else 3, M).to(device)
    weight = (k.cpu() * torch.rand(M, generator=generator)).to(device)
    incoming = torch.randn(2, M, generator=generator).to(device)
    return [*latents, s, k, weight], incoming


def differentiate(function, arguments, incoming):
    """[match, reg, gradient of eps_uncond or None, gradient of eps_text]"""
    theta = [x if x is None else x.detach().requires_grad_() for x in arguments[:2]]
    match, reg = function(*theta, *arguments[2:])
    wanted = [x for x in theta if x is not None]
    grads = torch.autograd.grad((incoming[0] * match + incoming[1] * reg).sum(), wanted)
    return [match, reg, grads[0] if len(grads) == 2 else None, grads[-1]]


def dense(u, t, ur, tr, old, g, s, k, weight):
    """E4 to E6 of the README as they are written, in float64."""
    column = lambda x: x.reshape(-1, *[1] * (t.ndim - 1)) if torch.is_tensor(x) else x  # noqa: E731
    s, k, weight = column(s), column(k), column(weight)
    eps = t if u is None else u + s * (t - u)
    ref = tr if u is None else ur + s * (tr - ur)
    residual = -k * (eps - ref) - weight * g
    return (residual**2).reshape(len(t), -1).mean(1), ((eps - old) ** 2).reshape(len(t), -1).mean(1)


def to_float64(arguments):
    return [x.double() if torch.is_tensor(x) else x for x in arguments]


def worst(actual, expected):
    """Largest error as a share of the sample's largest expected element; 0 expected means 0 wanted."""
    actual, expected = (x.detach().cpu().double().reshape(len(x), -1) for x in (actual, expected))
    scale = expected.abs().amax(1, keepdim=True)
    return ((actual - expected).abs() / scale.where(scale > 0, torch.ones_like(scale))).max().item()


def errors(backend, shape, dtype, guidance, device="cpu"):
    """Worst errors of [match, reg, gradient of eps_uncond, gradient of eps_text] against float64."""
    arguments, incoming = make_case(shape, dtype, guidance, device)
    expected = differentiate(dense, to_float64(arguments), incoming.double())
    actual = differentiate(functools.partial(gradient_matching, backend=backend), arguments, incoming)
    for x, argument in zip(actual[2:], arguments[:2], strict=True):
        assert x is None or (x.dtype == argument.dtype and x.shape == argument.shape)
    assert actual[0].dtype == actual[1].dtype == torch.float32
    return [0.0 if y is None else worst(x, y) for x, y in zip(actual, expected, strict=True)]


def check(found, dtype):
    assert max(found[:2]) < VALUE_TOL and max(found[2:]) < GRAD_TOL[dtype], found


def child(mode, **env):
    """What this file prints when it is run as a script with `mode`."""
    with tempfile.TemporaryDirectory() as cache:
        clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, __file__, mode], capture_output=True, text=True, cwd=ROOT,
                              env={**clean, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1", **env})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# ---- the PyTorch path --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_against_float64(shape, dtype, guidance):
    check(errors("torch", shape, dtype, guidance), dtype)


def test_gradcheck():
    arguments, _ = make_case("one", "float32", "cfg")
    arguments = to_float64(arguments)
    for x in arguments[:2]:
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda u, t: gradient_matching(u, t, *arguments[2:]), arguments[:2])


@pytest.mark.parametrize("dtype, factors", [("float32", (0.0, -1.0, 1.05)), ("bfloat16", (0.0, -1.0, 1.25))])
def test_tolerances_reject_wrong_gradients(dtype, factors):
    arguments, incoming = make_case("round", dtype, "cfg")
    expected = differentiate(dense, to_float64(arguments), incoming.double())
    actual = differentiate(gradient_matching, arguments, incoming)
    for factor in factors:
        for x, y in zip(actual[2:], expected[2:], strict=True):
            assert worst(factor * x.float(), y) > 3 * GRAD_TOL[dtype]
    for x, y in zip(actual[:2], expected[:2], strict=True):
        assert worst(1.001 * x, y) > 3 * VALUE_TOL


def test_small_difference_at_the_last_step():
    # k = 1760 and eps within 1e-3 of the reference: subtracting guided predictions instead of differencing
    # first loses four digits (measured 1.7e-4 against 1.1e-7 here).
    torch.manual_seed(0)
    ur, tr, old, g = torch.randn(4, 2, 4096)
    u, t = ur + 1e-3 * torch.randn(2, 4096), tr + 1e-3 * torch.randn(2, 4096)
    arguments = [u, t, ur, tr, old, 0 * g, 7.5, torch.full((2,), 1760.0), torch.zeros(2)]
    incoming = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    expected = differentiate(dense, to_float64(arguments), incoming.double())
    actual = differentiate(gradient_matching, arguments, incoming)
    naive = differentiate(dense, arguments, incoming)
    for i in (0, 2, 3):
        assert worst(actual[i], expected[i]) < 1e-6
    assert worst(naive[3], expected[3]) > 1e-5  # so the line above is a test


def test_zero_at_the_stated_optimum():
    # eps* = eps_ref - (weight / k) g: the same shift of both branches shifts the guided prediction by it.
    arguments, incoming = make_case("round", "float32", "cfg")
    u, t, ur, tr, old, g, s, k, weight = to_float64(arguments)
    shift = (weight / k).reshape(-1, 1, 1, 1, 1) * g
    optimum = [ur - shift, tr - shift, ur, tr, old, g, s, k, weight]
    incoming = incoming.double() * torch.tensor([[1], [0]])  # match alone
    match, _, G_u, G_t = differentiate(gradient_matching, optimum, incoming)
    assert (match / (weight**2)).max() < 1e-24
    assert max(G_u.abs().max(), G_t.abs().max()) / k.max() ** 2 < 1e-15


def test_conditional_only():
    arguments, incoming = make_case("awkward", "float32", "conditional")
    match, reg, G_u, G_t = differentiate(gradient_matching, arguments, incoming)
    assert not G_u.any()
    none = [None, arguments[1], None, *arguments[3:]]
    for x, y in zip(differentiate(gradient_matching, none, incoming), (match, reg, None, G_t), strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


def test_batch_of_two_is_two_batches_of_one():
    arguments, incoming = make_case("round", "float32", "per sample")
    both = differentiate(gradient_matching, arguments, incoming)
    for m in range(2):
        alone = differentiate(gradient_matching, [x[m : m + 1] for x in arguments], incoming[:, m : m + 1])
        for x, y in zip(both, alone, strict=True):
            assert worst(x[m : m + 1], y) < 1e-6


@pytest.mark.parametrize("step", [0, 9, 19])
def test_official_loss(step):
    # Recorded from the authors' code: it matches the first 4 of 8 channels and regularises all 8. Its own
    # float32 rounding is 1.8e-4 of the largest gradient at the last step (std 0.00998), 5e-6 elsewhere.
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(ROOT / "tests/data/official_loss.safetensors", "pt") as f:
        prefix, meta = f"step{step:02d}.", f.metadata()
        v = {name[len(prefix) :]: f.get_tensor(name) for name in f.keys() if name.startswith(prefix)}
    tol = 1e-3 if step == 19 else 1e-5
    now, after = json.loads(meta["timesteps"])[str(step)]
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    alpha_t, sigma_t = alpha_bar[now].sqrt(), (1 - alpha_bar[now]).sqrt()
    alpha_s, sigma_s = alpha_bar[after].sqrt(), (1 - alpha_bar[after]).sqrt()
    shrink = 1 - ((alpha_t * sigma_s) / (sigma_t * alpha_s)) ** 2  # 1 - e^{-2h}
    k = alpha_s * shrink * sigma_t / (alpha_t * sigma_s**2 * shrink)  # c0 sigma_t / (alpha_t std^2)
    k, weight = k.expand(2), (float(meta["beta"]) * v["alpha_prod_next"]).expand(2)

    eps = [v[f"eps_{name}"] for name in ("theta_uncond", "theta_text", "ref_uncond", "ref_text", "old")]
    for x in eps[:2]:
        x.requires_grad_()
    s, g = float(meta["guidance"]), v["reward_grad"]
    match, _ = gradient_matching(*(x[:, :, :4] for x in eps), g, s, k, weight)
    _, reg = gradient_matching(*eps, torch.zeros_like(eps[0]), s, k, weight)
    G_u, G_t = torch.autograd.grad((match + float(meta["reg_scale"]) * reg).sum(), eps[:2])
    assert worst(match, v["forward_loss"]) < tol
    assert worst(reg, v["unet_reg"]) < 1e-5
    assert worst(G_u, v["grad_eps_theta_uncond"]) < tol
    assert worst(G_t, v["grad_eps_theta_text"]) < tol


def test_errors_name_the_argument():
    (u, t, ur, tr, old, g, s, k, weight), _ = make_case("round", "float32", "cfg")
    for arguments, message in [
        ((u, t, ur, tr[:1], old, g, s, k, weight), r"ref_text: wanted .* \(2, 4, 8, 8, 8\), got \(1,"),
        ((u, t, ur, tr, old, g, s, k[:1], weight), r"k: wanted a tensor of shape \(2,\), got \(1,\)"),
        ((u, t, ur, tr, old, g, s, k, 3.0), "weight: wanted a tensor .* got float"),
        ((u, t, ur, tr, old, g, torch.ones(3), k, weight), "guidance: wanted"),
        ((u, t, ur, tr, old, g, None, k, weight), "guidance: wanted a number .* got None"),
        ((u, t, ur, tr, old, g, "7.5", k, weight), "guidance: wanted a number .* got '7.5'"),
        ((None, t, None, tr, old, g, "1", k, weight), "guidance: wanted a number .* got '1'"),
        ((u, t, ur, tr, old, g.int(), s, k, weight), "reward_grad: wanted floats"),
        ((u, t, ur, tr, old.clone().requires_grad_(), g, s, k, weight), "eps_old: wanted a constant"),
        ((None, t, ur, tr, old, g, s, k, weight), "eps_uncond and ref_uncond: wanted two"),
        ((None, t, None, tr, old, g, s, k, weight), "guidance: wanted the number 1"),
        ((u, t[:0], ur, tr, old, g, s, k, weight), "eps_text: wanted"),
    ]:
        with pytest.raises(ValueError, match=message):
            gradient_matching(*arguments)
    with pytest.raises(ValueError, match="backend: wanted"):
        gradient_matching(u, t, ur, tr, old, g, s, k, weight, backend="cuda")


# ---- the Triton kernels ------------------------------------------------------------------------------------

INTERPRETED = [(shape, dtype, guidance) for shape in SHAPES for dtype in DTYPES for guidance in GUIDANCE]


@pytest.fixture(scope="module")
def interpreted():
    return child("interpret", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("case", INTERPRETED, ids="-".join)
def test_triton_interpreted_against_float64(interpreted, case):
    check(interpreted["errors"]["-".join(case)], case[1])


@needs_triton
def test_triton_interpreted_details(interpreted):
    assert interpreted["strided"] < GRAD_TOL["float32"]  # inputs that are not contiguous, expanded G
    assert interpreted["detached"] < GRAD_TOL["float32"]  # only eps_text wants a gradient
    assert "float64" in interpreted["double"]
    assert len(interpreted["twice"]) == 4
    assert all("cannot be differentiated again" in x for x in interpreted["twice"]), interpreted["twice"]


@needs_triton
def test_triton_on_a_cpu_says_what_to_do():
    if not isinstance(matching._forward_kernel, matching.triton.JITFunction):
        pytest.skip("TRITON_INTERPRET=1 is set for this process")
    arguments, _ = make_case("one", "float32", "cfg")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        gradient_matching(*arguments, backend="triton")


@needs_triton
def test_triton_compiles_without_spills():
    rows = child("compile")
    print(*rows, sep="\n")  # registers and shared memory: pytest -s shows them
    assert len(rows) == 18 and not any(row["spill"] for row in rows), rows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", INTERPRETED, ids="-".join)
def test_triton_on_a_gpu(case):
    check(errors("triton", *case, device="cuda"), case[1])
    arguments, incoming = make_case(*case, device="cuda")
    first, second = (differentiate(gradient_matching, arguments, incoming) for _ in range(2))
    assert all(x is None or torch.equal(x, y) for x, y in zip(first, second, strict=True))


def interpret():
    """Child: the errors of every case in Triton's interpreter."""
    found = {"-".join(case): errors("triton", *case) for case in INTERPRETED}
    run = functools.partial(gradient_matching, backend="triton")
    arguments, incoming = make_case("awkward", "float32", "cfg")
    expected = differentiate(dense, to_float64(arguments), incoming[:, :1].expand(2, 3).double())
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in arguments[:6]] + arguments[6:]
    strided = differentiate(run, strided, incoming[:, :1].expand(2, 3))
    text = arguments[1].clone().requires_grad_()
    match, reg = run(arguments[0], text, *arguments[2:])
    (detached,) = torch.autograd.grad((incoming[0, 0] * match + incoming[1, 0] * reg).sum(), text)
    try:
        run(*to_float64(arguments))
        double = "computed"
    except ValueError as error:
        double = str(error)
    twice = []  # the gradients are linear in u and t: the PyTorch path has second derivatives, Triton must not say 0
    for loss in (lambda match, reg: match.sum(), lambda match, reg: (match * reg).sum()):
        for n in range(2):
            theta = [x.detach().requires_grad_() for x in arguments[:2]]
            first = torch.autograd.grad(loss(*run(*theta, *arguments[2:])), theta, create_graph=True)
            try:
                twice.append(str(torch.autograd.grad(first[n].square().sum(), theta)))
            except RuntimeError as error:
                twice.append(str(error))
    return {"errors": found, "strided": max(map(worst, strided, expected)),
            "detached": worst(detached, expected[3]), "double": double, "twice": twice}


def compile_all():
    """Child: registers, spills and shared memory of both kernels on three targets, no GPU needed."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    triton = matching.triton
    rows = []
    launch = {k: v for k, v in matching.LAUNCH.items() if k != "BLOCK"}
    for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
        for kernel in (matching._forward_kernel, matching._backward_kernel):
            for theta, other, s_tensor in [("fp32", "fp32", 0), ("fp32", "bf16", 1), ("bf16", "bf16", 0)]:
                constants = {"HAS_UNCOND": True, "S_TENSOR": bool(s_tensor), "BLOCK": matching.BLOCK,
                             "WANT_U": True, "WANT_T": True}
                constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
                types = {"s_ptr": "*fp32" if s_tensor else "fp32"}
                types |= {name: "constexpr" for name in constants}
                types |= {name: "*" + theta for name in ("u_ptr", "t_ptr", "G_u_ptr", "G_t_ptr")}
                types |= {name: "*" + other for name in ("ur_ptr", "tr_ptr", "old_ptr", "g_ptr")}
                types |= {name: "i32" for name in ("n", "blocks", "G_match_stride", "G_reg_stride")}
                signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
                aligned = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items())
                           if kind[0] == "*" or name == "n"}
                source = ASTSource(kernel, signature=signature, attrs=aligned,
                                   constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()})
                built = triton.compile(source, target=target, options=launch)
                row = {"target": f"{target.backend} {target.arch}", "kernel": kernel.__name__,
                       "dtypes": f"{theta} {other}", "shared": built.metadata.shared}
                if target.backend == "cuda":
                    with tempfile.TemporaryDirectory() as folder:
                        ptx = Path(folder, "kernel.ptx")
                        ptx.write_text(built.asm["ptx"])
                        arch = re.search(r"\.target (\w+)", built.asm["ptx"])[1]
                        command = [get_ptxas(target.arch).path, "-v", f"-arch={arch}", ptx, "-o", f"{ptx}.o"]
                        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
                    row["registers"] = int(re.search(r"Used (\d+) registers", report)[1])
                    row["spill"] = sum(int(x) for x in re.findall(r"(\d+) bytes spill", report))
                else:
                    count = lambda what: int(re.search(rf"\.{what}: *(\d+)", built.asm["amdgcn"])[1])  # noqa
                    row["registers"] = count("vgpr_count")
                    row["spill"] = count("vgpr_spill_count") + count("sgpr_spill_count")
                rows.append(row)
    return rows


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_all}[sys.argv[1]]()))
