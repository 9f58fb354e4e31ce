"""The Triton kernels of kernels/splat.py against the dense float64 formula of test_splat.py, and compiled.

They run in Triton's interpreter and are compiled for real targets in child processes of this file
(`python tests/test_splat_triton.py interpret|compile`): TRITON_INTERPRET is read when triton is imported, so
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_splat import SCENES, assert_close, errors, scene, weights_like  # noqa: E402

from kernels import splat  # noqa: E402
from kernels.splat import rasterize  # noqa: E402

needs_triton = pytest.mark.skipif(splat.triton is None, reason="triton is not installed")
# Small: the interpreter takes 20 ms per pair of a Gaussian and a tile, forward and backward.
CASES = {
    "many": (dict(B=2, V=2, N=12), 20, 18),
    "image smaller than a tile": (dict(B=1, V=2, N=10), 5, 3),
    "one pixel": (dict(N=10, spread=0.05, size=0.7), 1, 1),
    "one Gaussian": (dict(N=1, spread=0.02), 13, 13),
    "one object": (dict(B=1, V=3, N=8), 11, 12),
    "one view": (dict(B=3, V=1, N=8), 11, 12),
    "larger than the image": (dict(N=8, size=1.0), 12, 18),
    "beside the image": (dict(N=8, V=2, size=0.4, spread=1.0), 9, 17),
    "flat": (dict(N=12, V=2, flat=1e-3), 17, 15),
    "opaque stack": (dict(N=60, spread=0.05, size=0.5), 5, 9),
    "transparent": (dict(N=4), 20, 12),
    "behind the camera": (dict(N=5), 20, 12),
    "some behind the camera": (dict(N=10, V=2), 20, 12),
}
NONE_VISIBLE = ("transparent", "behind the camera")


def make(name):
    arguments, H, W = CASES[name]
    inputs = scene(**arguments)
    means, opacities, position = inputs[0], inputs[3], inputs[5][:, 0, :3, 3]
    if name == "larger than the image":
        opacities[:, ::2] = 1  # the clamp at 0.99
    if name == "transparent":
        opacities *= 1e-3
    if name == "behind the camera":
        means += 2 * position[:, None]
    if name == "some behind the camera":
        means[:, ::2] = position[:, None] + 0.1 * means[:, ::2]
    return inputs, H, W


def child(mode, **env):
    """What this file prints when it is run as a script with `mode`."""
    with tempfile.TemporaryDirectory() as cache:
        clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, __file__, mode], capture_output=True, text=True, cwd=ROOT,
                              env={**clean, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1", **env})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def differentiate(inputs, H, W, fields, device="cpu", **options):
    """The render, and the gradients of a random loss on the named fields."""
    inputs = [x.detach().to(device).requires_grad_(n < 5) for n, x in enumerate(inputs)]
    render = rasterize(*inputs, H, W, **options)
    weights = dict(zip(render._fields, weights_like(render)))
    loss = sum((getattr(render, name) * weights[name].to(inputs[0])).sum() for name in fields)
    return render, torch.autograd.grad(loss, inputs[:5])


def worst(actual, expected):
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()


@pytest.fixture(scope="module")
def interpreted():
    return child("interpret", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_interpreted_against_float64(interpreted, name):
    found, visible = interpreted["errors"][name]
    print(name, {key: f"{value:.1e}" for key, value in found.items()})
    assert visible == (name not in NONE_VISIBLE)
    # Measured worst: outputs 1.8e-6, gradients 3e-6; flat Gaussians seen edge-on 2e-5 and 7.2e-5.
    assert_close(found, *((1e-4, 3e-4) if name == "flat" else (1e-5, 2e-5)))


@needs_triton
def test_interpreted_details(interpreted):
    for fields in ("image", "alpha", "depth", "median_depth", "normal"):  # each output alone in the loss
        assert interpreted["alone"][fields] < 1e-5, interpreted["alone"]
    assert interpreted["exits early"]
    assert interpreted["deterministic"] < 1e-5 and interpreted["same bits"]
    assert interpreted["strided"]
    assert interpreted["nothing"] == [[1, 2, 3, 9, 10], 1.0, 0.0]
    assert "float64" in interpreted["double"] and "c2w: wanted a constant" in interpreted["constant"]
    assert interpreted["wrong"] > 1e-2


@needs_triton
def test_on_a_cpu_says_what_to_do():
    if not isinstance(splat._project_kernel, splat.triton.JITFunction):
        pytest.skip("TRITON_INTERPRET=1 is set for this process")
    inputs = [x.float() for x in scene(N=1)]
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        rasterize(*inputs, 4, 4, backend="triton")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(splat, "triton", None)
    inputs = [x.float() for x in scene(N=1)]
    rasterize(*inputs, 4, 4)
    with pytest.raises(ValueError, match="not installed"):
        rasterize(*inputs, 4, 4, backend="triton")


@pytest.fixture(scope="module")
def compiled():
    return child("compile")


@needs_triton
def test_compiles_without_spills(compiled):
    print(*compiled, sep="\n")  # registers and shared memory: pytest -s shows them
    assert len(compiled) == 3 * len(LAUNCHES) and not any(row["spill"] for row in compiled), compiled


# SASS instructions of the loop over a tile's pairs, for sm_90 with triton 3.8: what stands in for the speed where
# there is no GPU. Sum by sum, the backward pass had 333 and 231, with 75 and 45 shuffles.
INSTRUCTIONS = {"_composite_kernel": 103, "_composite_backward_kernel GEOMETRY DETERMINISTIC": 238,
                "_composite_backward_kernel GEOMETRY": 228, "_composite_backward_kernel DETERMINISTIC": 185,
                "_composite_backward_kernel": 184}


@needs_triton
def test_instructions_per_pair(compiled):
    found = {row["kernel"]: row for row in compiled if "loop" in row}
    if not found:
        pytest.skip("this triton comes without nvdisasm")
    print({name: (row["loop"], row["shuffles"]) for name, row in found.items()})
    assert found.keys() == INSTRUCTIONS.keys()
    for name, count in INSTRUCTIONS.items():
        assert 0.7 * count < found[name]["loop"] < 1.15 * count, (name, found[name])
        assert found[name]["shuffles"] == (16 if "backward" in name else 0), (name, found[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", SCENES)
def test_on_a_gpu(name):
    arguments, H, W = SCENES[name]
    inputs = scene(**arguments)
    small = [x.float() for x in inputs]
    fields = splat.Render._fields
    want, want_grads = differentiate(inputs, H, W, fields)
    for deterministic in (False, True):
        render, grads = differentiate(small, H, W, fields, "cuda", deterministic=deterministic)
        assert max(map(worst, render, want)) < (1e-3 if name == "flat" else 1e-5)
        assert max(map(worst, grads, want_grads)) < (1e-2 if name == "flat" else 1e-4)
    again = differentiate(small, H, W, fields, "cuda", deterministic=True)[1]
    assert all(map(torch.equal, grads, again))


def interpret():
    """Child: the errors of every case in Triton's interpreter."""
    torch.set_num_threads(1)
    found = {}
    for name in CASES:
        row, want = errors(*make(name), backend="triton")
        found[name] = row, bool(want.alpha.max() > 0)
    inputs, H, W = make("image smaller than a tile")
    small = [x.float() for x in inputs]
    run = functools.partial(differentiate, small, H, W, backend="triton")
    every = splat.Render._fields
    alone = {name: max(map(worst, run([name])[1], differentiate(inputs, H, W, [name])[1])) for name in every}

    inputs, H, W = make("one object")
    small = [x.float() for x in inputs]
    run = functools.partial(differentiate, small, H, W, backend="triton")
    fixed, again = run(every, deterministic=True), run(every, deterministic=True)
    expected = differentiate(inputs, H, W, every)
    strided = [x.mT.contiguous().mT for x in small]
    strided = differentiate(strided, H, W, every, backend="triton", deterministic=True)
    stack = [x.float().requires_grad_() for x in make("opaque stack")[0][:5]]
    stack = rasterize(*stack, *[x.float() for x in make("opaque stack")[0][5:]], 5, 9, backend="triton")
    start, stop = stack.image.grad_fn.saved_tensors[11:13]

    empty = [x[:, :0].requires_grad_() for x in small[:5]]
    nothing = rasterize(*empty, *[x[:, :2] for x in small[5:]], 9, 10, backend="triton")
    nothing.image.sum().backward()

    def mistake(inputs):
        try:
            rasterize(*inputs, H, W, backend="triton")
        except ValueError as error:
            return str(error)

    shifted = errors(*make("one Gaussian"), backend="triton",
                     change=lambda render: render._replace(image=render.image.roll(1, -1)))[0]
    return {"errors": found, "alone": alone,
            "deterministic": max(map(worst, fixed[1], expected[1])),
            "same bits": all(map(torch.equal, [*fixed[0], *fixed[1]], [*again[0], *again[1]])),
            "strided": all(map(torch.equal, [*fixed[0], *fixed[1]], [*strided[0], *strided[1]])),
            "exits early": bool((stop < start[1:]).any()),
            "nothing": [list(nothing.image.shape), nothing.image.min().item(), nothing.normal.max().item()],
            "double": mistake(inputs), "wrong": shifted["grad means"],
            "constant": mistake([*small[:5], small[5].clone().requires_grad_(), small[6]])}


def loop_of_pairs(cubin):
    """Instructions and shuffles of the shortest loop with an exponential in it; nothing without a disassembler."""
    disassembler = Path(splat.triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not disassembler.is_file():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.cubin").write_bytes(cubin)
        text = subprocess.run([disassembler, "-c", Path(folder, "kernel.cubin")], capture_output=True, text=True,
                              check=True).stdout
    instructions, labels, loops = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line.strip()):
            labels[label[1]] = len(instructions)
        if instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            back = re.search(r"BRA.*?(\.L_\w+)", instruction[1])
            if back and back[1] in labels:  # to a label above
                loops.append(instructions[labels[back[1]]:])
    loop = min((loop for loop in loops if any("MUFU.EX2" in x for x in loop)), key=len)
    return {"loop": len(loop), "shuffles": sum("SHFL" in x for x in loop)}


TYPES = {"box_ptr": "*i32", "rank_ptr": "*i32", "totals_ptr": "*i64", "order_ptr": "*i64", "end_ptr": "*i64",
         "tile_ptr": "*i16", "row_ptr": "*i32", "start_ptr": "*i32", "stop_ptr": "*i32", "median_ptr": "*i32",
         "slot_ptr": "*i64"}
NUMBERS = ("V", "N", "H", "W", "tiles_x", "tiles_y", "least", "rows", "pairs", "steps")
LAUNCHES = [
    ("_project_kernel", {**splat.LANES, "TILE": splat.GPU_TILE}),
    ("_record_kernel", splat.LANES),
    ("_expand_kernel", splat.LANES),
    ("_composite_kernel", {**splat.COMPOSITE, "BATCH": splat.BATCH}),
    *[("_composite_backward_kernel", {**splat.COMPOSITE, "GEOMETRY": geometry, "DETERMINISTIC": fixed})
      for geometry in (True, False) for fixed in (True, False)],
    ("_add_pairs_kernel", splat.ADD_PAIRS),
    ("_project_backward_kernel", {**splat.LANES, "GEOMETRY": True}),
    ("_project_backward_kernel", {**splat.LANES, "GEOMETRY": False}),
]


def compile_all():
    """Child: registers, spills and shared memory of all kernels on three targets, no GPU needed."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    rows = []
    for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
        for name, launch in LAUNCHES:
            kernel = getattr(splat, name)
            constants = {k: v for k, v in {**launch, "RECORD": splat.RECORD}.items() if k in kernel.arg_names}
            options = {k: v for k, v in launch.items() if k not in constants}
            types = TYPES | dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(constants, "constexpr") | {"dilation": "fp32"}
            signature = {k: types.get(k, "*fp32") for k in kernel.arg_names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
            source = ASTSource(kernel, signature=signature, attrs=aligned,
                               constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()})
            built = splat.triton.compile(source, target=target, options=options)
            flags = " ".join(k for k in ("GEOMETRY", "DETERMINISTIC") if constants.get(k))
            row = {"target": f"{target.backend} {target.arch}", "kernel": f"{name} {flags}".strip(),
                   "warps": options["num_warps"], "shared": built.metadata.shared}
            if target.backend == "cuda":
                with tempfile.TemporaryDirectory() as folder:
                    ptx = Path(folder, "kernel.ptx")
                    ptx.write_text(built.asm["ptx"])
                    arch = re.search(r"\.target (\w+)", built.asm["ptx"])[1]
                    command = [get_ptxas(target.arch).path, "-v", f"-arch={arch}", ptx, "-o", f"{ptx}.o"]
                    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
                row["registers"] = int(re.search(r"Used (\d+) registers", report)[1])
                row["spill"] = sum(int(x) for x in re.findall(r"(\d+) bytes spill", report))
                if target.arch == 90 and "composite" in name:
                    row |= loop_of_pairs(built.asm["cubin"])
            else:
                count = lambda what: int(re.search(rf"\.{what}: *(\d+)", built.asm["amdgcn"])[1])  # noqa
                row["registers"] = count("vgpr_count")
                row["spill"] = count("vgpr_spill_count") + count("sgpr_spill_count")
            rows.append(row)
    return rows


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_all}[sys.argv[1]]()))
