"""The Triton kernels of kernels/splat.py: against the dense float64 formula, for any capacity; counted and compiled.

They run in Triton's interpreter and are compiled for real targets in child processes of this file (`python
tests/test_rasterize_triton.py interpret|hard|step|compile`): TRITON_INTERPRET is read when triton is imported, so no
pytest process could do both. On a GPU the same scenes and checks run there as well.
"""
import collections
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
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "experiments")]

import bench  # noqa: E402
from rasterize_checks import (  # noqa: E402
    CHECKS,
    SCENES,
    assert_close,
    differentiate,
    errors,
    fuzzed,
    same_bits,
    scene,
    small,
    weights_like,
    worst,
)

from kernels import Render, rasterize, splat  # noqa: E402

needs_triton = pytest.mark.skipif(splat.triton is None, reason="triton is not installed")
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
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


@pytest.fixture(scope="module")
def interpreted():
    return child("interpret", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def hard():
    return child("hard", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled():
    return child("compile")


# ---- in the interpreter ------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_pictures_and_gradients_are_near_float64(interpreted, name):
    found, visible = interpreted["errors"][name]
    print(name, {key: f"{value:.1e}" for key, value in found.items()})
    assert visible == (name not in NONE_VISIBLE)
    # Measured worst: outputs 1.8e-6, gradients 3e-6; flat Gaussians seen edge-on 2e-5 and 7.2e-5.
    assert_close(found, *((1e-4, 3e-4) if name == "flat" else (1e-5, 2e-5)))


@needs_triton
def test_each_output_alone_can_be_in_the_loss(interpreted):
    assert interpreted["alone"].keys() == set(Render._fields) and max(interpreted["alone"].values()) < 1e-5


@needs_triton
def test_an_opaque_tile_stops_early(interpreted):
    assert interpreted["exits early"]


@needs_triton
def test_deterministic_gradients_repeat_and_are_near(interpreted):
    assert interpreted["deterministic"] < 1e-5 and interpreted["same bits"]


@needs_triton
def test_strided_inputs_are_copied(interpreted):
    assert interpreted["strided"]


@needs_triton
def test_no_gaussians_give_the_background(interpreted):
    assert interpreted["nothing"] == [[1, 2, 3, 9, 10], 1.0, 0.0]


@needs_triton
def test_mistakes_are_named_by_the_kernels(interpreted):
    assert "float64" in interpreted["double"] and "c2w: wanted a constant" in interpreted["constant"]


@needs_triton
def test_the_comparison_notices_a_shift_by_a_pixel(interpreted):
    assert interpreted["wrong"] > 1e-2


@needs_triton
def test_no_bit_depends_on_the_capacity(interpreted):
    """Room for no pair, one, half of them: the second form gives the same pictures and all the same gradients."""
    found = interpreted["capacity"]
    assert len(found) == 6
    for same, deterministic, need, room in found:
        assert same and need > 16, (deterministic, need, room)


@needs_triton
def test_a_call_makes_room_for_what_the_last_one_needed(interpreted):
    """The first call has guessed; the second has a quarter more than the first needed; which is forgotten in time."""
    first, second, need, later = interpreted["room"]
    assert first == 2 * interpreted["rows"] < need < second < 1.5 * need and later < second / 2


@needs_triton
def test_dilation_is_that_of_the_dense_formula(interpreted):
    for found, effect in interpreted["dilation"]:
        assert max(found.values()) < 1e-3 and effect > 0.05, found


@needs_triton
@pytest.mark.parametrize("name", CHECKS)
def test_hard_input(hard, name):
    CHECKS[name][1](hard[name])


@needs_triton
def test_fuzz_is_near_float64(hard):
    found = hard["fuzz"]
    print(found)
    assert found["clear"] > 20 and found["outputs"] < 1e-3 and found["gradients"] < 1e-2, found
    assert max(found["median"]) < 1e-5, found


@needs_triton
def test_tile_keys_of_16_bits(hard):
    """65,536 tiles are numbered with 16 bits, one more with 32; the lists are the same."""
    assert hard["keys"] == {"65536": ["torch.int16", True], "65537": ["torch.int32", True]}


@needs_triton
def test_other_tiles_and_warps_compute_the_same(hard):
    found = hard["variants"]
    assert len(found) == 4 and max(found.values()) < 1e-5, found


STEP = """
import torch
from support import shapes
import common
import r2d3
from diffusers import AutoencoderKL, PixArtTransformer2DModel

torch.manual_seed(0)
net = PixArtTransformer2DModel(sample_size=4, patch_size=2, in_channels=10, out_channels=8, num_layers=1,
                               num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
                               caption_channels=8, interpolation_scale=1, use_additional_conditions=False)
vae = AutoencoderKL(in_channels=12, out_channels=12, down_block_types=["DownEncoderBlock2D"],
                    up_block_types=["UpDecoderBlock2D"], block_out_channels=[8], layers_per_block=1,
                    latent_channels=4, norm_num_groups=4, sample_size=4, mid_block_add_attention=False)
text = shapes.WordTable(["red", "cube"], 8, 3).requires_grad_(False)
base = common.diffsplat(net, vae, text, image_size=4, prediction_type="v_prediction", guidance=2.0,
                        scale_range=(0.02, 0.12), depth_scale=0.5, eval_size=4, lora_targets=("to_q", "to_k", "to_v"))
base.net = r2d3.add_lora(base.net, base.lora_targets, 2, 0)
with torch.no_grad():
    for name, weight in base.net.named_parameters():
        if "lora_B" in name:
            weight.normal_(0, 0.05)
schedule = r2d3.NoiseSchedule.from_diffusers("dpm", 20)
null, cond = base.encode([""]), base.encode(["red cube"])
found = {}
for backend in ("torch", "triton"):
    config = r2d3.resolve(r2d3.Config(backend=backend, views=1, view_size=17, guidance=2.0, branch="guided",
                                      estimator="step", skip_below=0.0))
    path = common.rollout(base, schedule, cond, null, 2.0, [r2d3.seeded(0)])
    old = path.eps[:, 12] + 0.01
    batch = r2d3.Transitions(torch.tensor([12]), path.x[:, 12], path.x[:, 13], old, cond, ["red cube"],
                             [r2d3.seeded(1)], None, None)
    reward = r2d3.load_reward("colorfulness=1,dnc=1", base, "cpu")
    logged, _ = r2d3.nabla_step(r2d3.Job(base, reward, schedule, null, config), batch)
    base.net.zero_grad()
    (logged["match"] + logged["reg"]).sum().backward()
    lora = torch.cat([w.grad.flatten() for n, w in base.net.named_parameters() if w.requires_grad])
    found[backend] = {**{name: logged[name] for name in ("reward_gradient", "match", "reg")},
                      "LoRA gradient": lora}
errors = {name: [want.abs().max().item(), ((found["triton"][name] - want).abs().max() / want.abs().max()).item()]
          for name, want in found["torch"].items()}
"""


@needs_triton
def test_a_fine_tuning_step_is_the_same_with_triton():
    """One whole step with both kernels (interpreted) and with PyTorch: the same LoRA gradients."""
    errors = child("step", TRITON_INTERPRET="1")
    print(errors)
    assert len(errors) == 4 and all(error < 1e-4 and largest > 0 for largest, error in errors.values()), errors


# ---- launches ----------------------------------------------------------------------------------------------

ALLOCATES_OR_LOOKS = {"empty", "empty_like", "empty_strided", "view", "slice", "select", "split", "split_with_sizes",
                      "unbind", "detach", "alias", "as_strided", "expand", "_unsafe_view"}


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given: operations of torch that compute something, and kernels of splat.py."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts, self.read = collections.Counter(), []
        for name in [name for name in dir(splat) if name.endswith("_kernel")]:
            monkeypatch.setattr(splat, name, {None: None})
            monkeypatch.setattr(splat, name, self.fake(name))

    def fake(self, name):
        class Kernel:
            def __getitem__(kernel, grid):  # noqa: N805
                assert all(0 < n < 2**31 for n in grid), (name, grid)
                return lambda *arguments, **options: self.counts.update([name])
        return Kernel()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.read.append(arguments[0].data_ptr())
        elif name not in ALLOCATES_OR_LOOKS:
            self.counts.update([name])
        return function(*arguments, **(options or {}))


@needs_triton
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("fields, background", [(Render._fields, (1.0, 1.0, 1.0)), (["image"], (0.1, 0.2, 0.3))])
def test_a_call_launches_14_and_5_at_most_and_waits_for_nothing(monkeypatch, deterministic, fields, background):
    inputs = small()
    inputs[:5] = [x.requires_grad_() for x in inputs[:5]]
    render = functools.partial(rasterize, *inputs, 33, 40, background, backend="triton", deterministic=deterministic)
    found = Launches(monkeypatch)
    render()  # a first call makes the place where the number of pairs is left
    pictures = dict(zip(Render._fields, render(), strict=True))
    incoming = [torch.ones_like(pictures[name]) for name in fields]
    found.counts.clear()
    found.read.clear()
    with found:
        render()
    places = [reported.data_ptr() for reported, _ in splat._NEEDS.values()]
    assert len(found.read) == 1 and found.read[0] in places  # page-locked memory of the host, not the GPU's
    print(found.counts)
    assert found.counts.total() <= 14 and found.counts["_composite_kernel"] == 2
    found.counts.clear()
    found.read.clear()
    with found:
        torch.autograd.grad([pictures[name] for name in fields], inputs[:5], incoming)
    print(found.counts)
    assert found.counts.total() <= 5 and found.counts["_composite_backward_kernel"] == 2 and not found.read


@needs_triton
def test_a_first_call_in_inference_mode_spoils_no_later_one(monkeypatch):
    """What keeps the number of pairs is made in that call, and written to in each; it is on the CPU whatever is set."""
    Launches(monkeypatch)
    splat._NEEDS.clear()
    inputs = small()
    with torch.inference_mode():
        rasterize(*inputs, 33, 40, backend="triton")
    inputs[0].requires_grad_()
    rasterize(*inputs, 33, 40, backend="triton").image.sum().backward()
    splat._NEEDS.clear()
    with torch.device("meta"):
        capacity, reported = splat._capacity((1, 2, 3, 4, 5), 100, torch.device("cpu"))
    assert capacity == 200 and reported.device == torch.device("cpu") and reported.item() == -1


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


@needs_triton
def test_compiles_without_spills(compiled):
    """Registers that are kept in memory instead: none, but for two in the second form, on one target."""
    print(*compiled, sep="\n")  # registers and shared memory: pytest -s shows them
    assert len(compiled) == 3 * len(LAUNCHES)
    assert all(row["spill"] <= (4 if "WHOLE" in row["kernel"] else 0) for row in compiled), compiled


# SASS instructions of the loop over a tile's pairs, for sm_90 with triton 3.8: what stands in for the speed where
# there is no GPU. Sum by sum, the backward pass had 333 and 231, with 75 and 45 shuffles.
INSTRUCTIONS = {"_composite_kernel": 98, "_composite_backward_kernel GEOMETRY DETERMINISTIC": 239,
                "_composite_backward_kernel GEOMETRY": 227, "_composite_backward_kernel DETERMINISTIC": 185,
                "_composite_backward_kernel": 182, "_composite_kernel 8 x 4": 76,
                "_composite_backward_kernel GEOMETRY 8 x 4": 169}


@needs_triton
def test_instructions_per_pair(compiled):
    found = {row["kernel"]: row for row in compiled if "loop" in row and "WHOLE" not in row["kernel"]}
    if not found:
        pytest.skip("this triton comes without nvdisasm")
    print({name: (row["loop"], row["shuffles"]) for name, row in found.items()})
    assert found.keys() == INSTRUCTIONS.keys()
    for name, count in INSTRUCTIONS.items():
        assert 0.7 * count < found[name]["loop"] < 1.15 * count, (name, found[name])
        assert found[name]["shuffles"] == (16 if "backward" in name else 0), (name, found[name])


@needs_triton
def test_both_forms_do_the_same_arithmetic(compiled):
    """The same sums, products, fused products and sums, exponentials: so the same bits on a GPU as well."""
    found = {row["kernel"]: row["floats"] for row in compiled if "floats" in row}
    if not found:
        pytest.skip("this triton comes without nvdisasm")
    second = [name for name in found if "WHOLE" in name]
    assert len(second) == 3
    for name in second:
        assert found[name] == found[name.replace(" WHOLE", "")], (name, found)


# ---- on a GPU ----------------------------------------------------------------------------------------------


@on_a_gpu
@pytest.mark.parametrize("name", SCENES)
def test_scene_on_a_gpu_is_near_float64(name):
    arguments, H, W = SCENES[name]
    inputs = scene(**arguments)
    small = [x.float().cuda() for x in inputs]
    want, want_grads = differentiate(inputs, H, W)
    for deterministic in (False, True):
        render, grads = differentiate(small, H, W, deterministic=deterministic)
        assert max(map(worst, render, want)) < (1e-3 if name == "flat" else 1e-5)
        assert max(map(worst, grads, want_grads)) < (1e-2 if name == "flat" else 1e-4)
    again = differentiate(small, H, W, deterministic=True)[1]
    assert all(map(torch.equal, grads, again))


@on_a_gpu
@pytest.mark.parametrize("name", CHECKS)
def test_hard_input_on_a_gpu(name):
    check, assertion = CHECKS[name]
    assertion(check("triton", "cuda"))


@on_a_gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_no_bit_depends_on_the_capacity_on_a_gpu(deterministic):
    inputs = [x.float().cuda() for x in scene(B=2, V=3, N=150)]
    want = differentiate(inputs, 40, 33, deterministic=deterministic, capacity=10**6)
    for capacity in (0, 1, 500, 10**5):
        got = differentiate(inputs, 40, 33, deterministic=deterministic, capacity=capacity)
        assert all(map(torch.equal, got[0], want[0])), capacity
        if deterministic:
            assert all(map(torch.equal, got[1], want[1])), capacity
        assert max(map(worst, got[1], want[1])) < 1e-5, capacity  # atomics add in any order


# ---- the children ------------------------------------------------------------------------------------------


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
    fixed, again = run(deterministic=True), run(deterministic=True)
    expected = differentiate(inputs, H, W)
    strided = [x.mT.contiguous().mT for x in small]
    strided = differentiate(strided, H, W, backend="triton", deterministic=True)
    stack = [x.float().requires_grad_() for x in make("opaque stack")[0][:5]]
    stack = rasterize(*stack, *[x.float() for x in make("opaque stack")[0][5:]], 5, 9, backend="triton")
    bounds, _, stop = stack.image.grad_fn.saved_tensors[11:14]

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
    return {"errors": found, "alone": alone, "capacity": capacities(), **rooms(), "dilation": dilated(),
            "deterministic": max(map(worst, fixed[1], expected[1])),
            "same bits": same_bits(fixed, again),
            "strided": same_bits(fixed, strided),
            "exits early": bool((stop < bounds[:, 1]).any()),
            "nothing": [list(nothing.image.shape), nothing.image.min().item(), nothing.normal.max().item()],
            "double": mistake(inputs), "wrong": shifted["grad means"],
            "constant": mistake([*small[:5], small[5].clone().requires_grad_(), small[6]])}


def pairs_of(render):
    """How many pairs there were: what the kernels left."""
    return render.image.grad_fn.saved_tensors[12].item()


def capacities():
    """[whether all bits are those with room for all pairs, deterministic, pairs, room]"""
    inputs = [x.float() for x in scene(V=2, N=3, size=0.3)]
    need = pairs_of(rasterize(inputs[0].requires_grad_(), *inputs[1:], 9, 12, backend="triton"))
    found = []
    for deterministic in (False, True):
        run = functools.partial(differentiate, inputs, 9, 12, backend="triton", deterministic=deterministic)
        want = run(capacity=need)
        for capacity in (0, 1, need // 2):
            found.append([same_bits(run(capacity=capacity), want), deterministic, need, capacity])
    return found


def rooms():
    """Lengths of the lists in a first and a second call, the pairs of both, room much later for one pair a call."""
    inputs, H, W = make("larger than the image")
    inputs = [x.float().requires_grad_(n < 5) for n, x in enumerate(inputs)]
    splat._NEEDS.clear()
    renders = [rasterize(*inputs, H, W, backend="triton") for _ in range(2)]
    first, second = (len(render.image.grad_fn.saved_tensors[10]) for render in renders)
    (reported, _), = splat._NEEDS.values()
    need = reported.item()
    assert need == pairs_of(renders[1])
    reported.fill_(1)
    rows = inputs[0].shape[1]
    later = [splat._capacity((1, 1, rows, H, W), rows, inputs[0].device)[0] for _ in range(40)][-1]
    return {"room": [first, second, need, later], "rows": rows}


def dilated():
    """[errors, how far the picture is from one without dilation]"""
    found = []
    for flat, deterministic in ((1.0, False), (0.05, True)):
        inputs = scene(V=2, N=10, size=0.02, flat=flat)
        row, want = errors(inputs, 13, 11, dilation=0.3, backend="triton", deterministic=deterministic)
        plain = rasterize(*[x.float() for x in inputs], 13, 11, backend="triton")
        found.append([row, (plain.image - want.image).abs().max().item()])
    return found


def check_hard():
    """Child: what the checks find, a fuzz, keys of tiles, other tiles and warps."""
    torch.set_num_threads(1)
    found = {name: check("triton") for name, (check, _) in CHECKS.items()}
    return {**found, "fuzz": fuzzed(40, torch.float32, "triton", most=5, side=9), "keys": keys(),
            "variants": variants()}


def variants():
    """How far other tiles and warps, which experiments/bench.py sweeps over, are from the ones in use."""
    inputs, found = small(B=1, V=1), {}
    want = [*rasterize(*inputs, 17, 9, backend="triton"), *differentiate(inputs, 17, 9, backend="triton")[1]]
    for name in ("8 x 8, 1 warp", "8 x 8, 2 warps", "16 x 8, 2 warps", "16 x 16, 4 warps"):
        module = bench.variant(name)
        leaves = [x.clone().requires_grad_(n < 5) for n, x in enumerate(inputs)]
        got = module.rasterize(*leaves, 17, 9, backend="triton")
        loss = sum((a * w).sum() for a, w in zip(got, weights_like(got), strict=True))
        got = [*got, *torch.autograd.grad(loss, leaves[:5])]
        found[name] = max(map(worst, got, want))
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
        for row in order.tolist():
            first, wide, count = box[row].tolist()
            for place in range(count):
                wanted.setdefault(first + place // wide * tiles_x + place % wide, []).append(row)
        seen, sort = [], torch.Tensor.sort
        torch.Tensor.sort = lambda x, **options: (seen.append(x.dtype), sort(x, **options))[1]  # noqa: B023
        lists, bounds, _, _, _ = splat._tile_lists_triton(order, box, 1000, (rows, tiles_x, tiles // tiles_x, tiles))
        torch.Tensor.sort = sort
        got = {t: lists[start:end].tolist() for t, (start, end) in enumerate(bounds.tolist()) if start < end}
        found[tiles] = str(seen[-1]), got == wanted and tiles - 1 in got
    return found


def step():
    """Child: of each number of a fine-tuning step its size, and how far the kernels are from PyTorch."""
    scope = {}
    exec(STEP, scope)
    return scope["errors"]


def loop_of_pairs(cubin):
    """Of the shortest loop with an exponential in it: instructions, shuffles, and the arithmetic of floats by kind;
    nothing without a disassembler.
    """
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
    words = collections.Counter(re.sub(r"^@!?U?P\w+ ", "", x).split()[0] for x in loop)
    floats = {word: n for word, n in words.items() if re.match(r"FADD|FMUL|FFMA|MUFU.EX2", word)}
    return {"loop": len(loop), "shuffles": sum("SHFL" in x for x in loop), "floats": floats}


TYPES = {**dict.fromkeys(("box_ptr", "row_ptr", "list_ptr", "bounds_ptr", "stop_ptr", "median_ptr"), "*i32"),
         **dict.fromkeys(("order_ptr", "count_ptr", "end_ptr", "slot_ptr", "need_ptr"), "*i64"),
         "tile_ptr": "*i16", "dilation": "fp32"}
NUMBERS = ("V", "N", "H", "W", "tiles_x", "tiles_y", "tiles", "least", "rows", "room", "capacity", "steps", "given")


def pixels(tiling):
    """Keywords of the kernels that make the pixels, for a tile's (width, height, warps)."""
    width, height, warps = tiling
    return {"TILE_X": width, "TILE_Y": height, "WARPS": warps, "num_warps": warps, **splat.COMPOSITE}


LARGE, SMALL = (pixels(tiling) for _, tiling in splat.TILINGS)
LAUNCHES = [
    ("_project_kernel", {**splat.LANES, "TILE_X": 8, "TILE_Y": 8}),
    *[(name, splat.LANES) for name in ("_count_kernel", "_expand_kernel", "_collect_kernel")],
    *[("_composite_kernel", {**LARGE, "BATCH": splat.BATCH, "WHOLE": whole}) for whole in (False, True)],
    *[("_composite_backward_kernel", {**LARGE, "GEOMETRY": geometry, "DETERMINISTIC": fixed, "WHOLE": whole})
      for geometry, whole in ((True, False), (False, False), (True, True)) for fixed in (True, False)],
    ("_composite_kernel", {**SMALL, "BATCH": splat.BATCH, "WHOLE": False}),
    ("_composite_backward_kernel", {**SMALL, "GEOMETRY": True, "DETERMINISTIC": False, "WHOLE": False}),
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
            types = TYPES | dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(constants, "constexpr")
            signature = {k: types.get(k, "*fp32") for k in kernel.arg_names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
            source = ASTSource(kernel, signature=signature, attrs=aligned,
                               constexprs={(kernel.arg_names.index(k),): v for k, v in constants.items()})
            built = splat.triton.compile(source, target=target, options=options)
            flags = [k for k in ("WHOLE", "GEOMETRY", "DETERMINISTIC") if constants.get(k)]
            flags += ["8 x 4"] * (constants.get("TILE_Y") == 4)
            row = {"target": f"{target.backend} {target.arch}", "kernel": " ".join([name, *flags]),
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
    modes = {"interpret": interpret, "hard": check_hard, "step": step, "compile": compile_all}
    print(json.dumps(modes[sys.argv[1]]()))
