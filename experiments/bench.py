"""Everything that is measured about the kernels, in one command: `python experiments/bench.py`.

Steps, each a process of its own with a time limit, so that a crash or a hang costs one step and no other:

    environment  versions, and the machine's two ceilings: bandwidth of a copy, rate of a float32 product
    correct      both operators against float64, then the tests that need a GPU; if one fails, it ends here
    time         rasterize at all shapes: forward and with backward, picture alone and with geometry, beside
                 gsplat and one view at a time; host and device time, peak memory, device time by kernel
    sweep        rasterize with other tiles, warps and batches
    matching     gradient_matching: eager PyTorch, ours, both as CUDA graphs
    host         what a call of rasterize costs the host before any kernel is launched
    cost         one epoch of the paper's base with random weights, as it is, with larger micro-batches and with
                 what support/speed.py has: seconds by phase, peak memory
    first        the README's first command

On one H100 all but the last step took 7 minutes. Without a GPU `correct`, `time` on the two smallest shapes,
`matching` and `host` are run, in a minute or two on one core; `--only` names others. Each row goes to the file of --out, one JSON object a line,
the moment it is known, and says where and how it was measured: GPU, versions, commit, date, command. At the
end a table, and for each goal whether it is met; `--show FILE` prints them of rows that are there.

Times are medians with 20 and 80 % quantiles over repetitions that cycle through several random inputs, after
a warm-up, each between two device events; host_ms is how long the call keeps the host. peak_mb is the most
memory allocated in a pass beyond its inputs. floor_ms is the least time the pass can take: every input read
once and every output written once at the measured bandwidth, or the arithmetic of the contributing (pixel,
Gaussian) pairs at the measured float32 rate, whichever is larger.
"""
import argparse
import datetime
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
from kernels import gradient_matching, rasterize, splat  # noqa: E402
from support import report, speed  # noqa: E402

try:
    import triton
except ImportError:
    triton = None
try:
    import gsplat
except ImportError:
    gsplat = None

# name: objects, views, Gaussians per object, image side. The latent shapes below are those of the same bases.
SPLAT = {
    "embedded": (16, 4, 4096, 64),
    "diffsplat": (1, 4, 4 * 256**2, 256),
    "diffsplat-512": (1, 4, 4 * 256**2, 512),
    "diffsplat-b2": (2, 4, 4 * 256**2, 256),
    "diffsplat-b2-512": (2, 4, 4 * 256**2, 512),
    "diffsplat-b4": (4, 4, 4 * 256**2, 256),
    "diffsplat-b4-512": (4, 4, 4 * 256**2, 512),
    "gaussiancube": (4, 4, 32**3, 256),
}
TINY = {"tiny": (2, 2, 512, 32)}  # for --quick
MATCHING = {  # name: samples, elements per sample
    "embedded": (32, 4 * 8 * 8 * 8),
    "diffsplat": (8, 4 * 4 * 32 * 32),
    "gaussiancube": (8, 14 * 32**3),
    "large": (16, 2**22),
}
FXFYCXCY = (1422.222 / 1024, 1422.222 / 1024, 0.5, 0.5)  # DiffSplat's cameras
GAUSSIAN_FLOATS = 14  # mean 3, quaternion 4, scale 3, opacity 1, colour 3
PIXEL_FLOATS = 9  # image 3, alpha, depth, median depth, normal 3
# Additions and multiplications of one contributing pair: quadratic form 8, exponential and alpha 4, weight
# and transmittance 3, eight accumulated features 16; backward recomputes them and adds twice as many.
PAIR_FLOPS = {"forward": 31, "forward+backward": 31 + 31 + 62}


# ---- inputs ------------------------------------------------------------------------------------------------


def cameras(B, V, device):
    """V orbit cameras 360 / V degrees apart, elevation 10, distance 1.4; OpenCV axes. [B, V, 4, 4]"""
    azimuth, elevation = torch.arange(V) * (2 * math.pi / V), torch.tensor(math.radians(10.0))
    away = torch.stack([azimuth.sin() * elevation.cos(), elevation.sin().expand(V),
                        azimuth.cos() * elevation.cos()], -1)
    right = torch.stack([azimuth.cos(), torch.zeros(V), -azimuth.sin()], -1)
    c2w = torch.eye(4).repeat(V, 1, 1)
    c2w[:, :3] = torch.stack([right, torch.linalg.cross(right, away), -away, 1.4 * away], -1)
    return c2w.expand(B, V, 4, 4).contiguous().to(device)


def scene(B, V, N, device, seed):
    """Splat grids as decoded by a base: flat where V cameras see five random spheres, dead elsewhere (60 %).

    Returns the differentiable arguments of rasterize.
    """
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator).to(device)  # noqa: E731
    centre, radius = (rand(B, 1, 1, 5, 3) - 0.5) * 0.5, 0.14 + 0.14 * rand(B, 1, 1, 5)
    side = math.ceil((N / V) ** 0.5)
    grid = ((torch.arange(side, device=device) + 0.5) / side - 0.5) / FXFYCXCY[0]
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    ray = torch.stack([x, y, torch.ones_like(x)], -1).reshape(-1, 3)[: N // V]  # camera space, z = 1
    c2w = cameras(B, V, device)
    ray = ray @ c2w[..., :3, :3].mT  # [B, V, N / V, 3]
    origin = c2w[..., None, :3, 3]
    to_centre = centre - origin[..., None, :]  # [B, V, 1, 5, 3]
    length2 = ray.square().sum(-1, keepdim=True)
    along = (to_centre * ray[..., None, :]).sum(-1) / length2  # closest approach, in units of the ray
    root = (radius**2 - to_centre.square().sum(-1)) / length2 + along**2
    depth = torch.where(root > 0, along - root.clamp(min=0).sqrt(), torch.inf)
    depth, hit = depth.min(-1)  # [B, V, N / V]
    live = depth.isfinite()
    depth = depth.where(live, torch.full_like(depth, 1.4))
    means = origin + depth[..., None] * ray
    nearest = centre[:, 0, 0].gather(1, hit.reshape(B, -1, 1).expand(-1, -1, 3)).reshape(means.shape)
    normal = torch.nn.functional.normalize(means - nearest, dim=-1)
    cosine = -(normal * ray).sum(-1) / length2[..., 0].sqrt()
    sigma = 0.62 * depth / (FXFYCXCY[0] * side)
    scales = torch.stack([sigma / cosine.abs().clamp(min=0.45), sigma, 0.2 * sigma], -1)
    quats = torch.stack([1.001 + normal[..., 2], -normal[..., 1], normal[..., 0], 0 * sigma], -1)
    quats = torch.nn.functional.normalize(quats, dim=-1)  # turns the flat axis z onto the normal
    opacities = torch.where(live, 0.6 + 0.39 * rand(*live.shape), 0 * sigma)
    colors = 0.5 + 0.5 * torch.sin(12 * means + 6 * rand(B, 1, 1, 3))
    return [a.reshape(B, N, *a.shape[3:]).contiguous() for a in (means, quats, scales, opacities, colors)]


def mean_pairs(gaussians, V, size, pixels=64):
    """Contributing (pixel, Gaussian) pairs per pixel of the first object: alpha >= 1/255 before T < 1e-4."""
    means, quats, scales, opacities, _ = (a[0] for a in gaussians)
    generator, total = torch.Generator().manual_seed(0), 0.0
    w, x, y, z = quats.unbind(-1)
    axes = torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1)
    axes = axes.reshape(-1, 3, 3) * scales[:, None]
    focal = FXFYCXCY[0] * size
    for c2w in cameras(1, V, means.device)[0]:
        t = (means - c2w[:3, 3]) @ c2w[:3, :3]
        order = t[:, 2].argsort()
        order = order[opacities[order] > 1 / 255]
        t, a = t[order], c2w[:3, :3].T @ axes[order]
        u = t[:, :2] / t[:, 2:]
        a = focal * (a[:, :2] - u[..., None] * a[:, 2:]) / t[:, 2, None, None]  # screen-space axes [n, 2, 3]
        inverse = torch.linalg.inv(a @ a.mT)
        p = size * torch.rand(pixels, 1, 2, generator=generator).to(means.device)
        d = p - focal * u - size / 2  # [pixels, n, 2]
        power = -0.5 * torch.einsum("pni,nij,pnj->pn", d, inverse, d)
        alpha = (opacities[order] * power.exp()).clamp(max=0.99)
        alpha = alpha.where(alpha >= 1 / 255, torch.zeros_like(alpha))
        before = (1 - alpha).log().cumsum(1) - (1 - alpha).log()
        total += ((alpha > 0) & (before > math.log(1e-4))).sum().item() / (pixels * V)
    return total


# ---- backends: (gaussians, views, size) -> image, alpha and expected depth in any layout -------------------


def make_views(B, V, size, device):
    """Cameras in both conventions, made before the clock runs: c2w, fxfycxcy, w2c, pixel intrinsics."""
    c2w = cameras(B, V, device)
    fx, fy, cx, cy = FXFYCXCY
    intrinsics = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1 / size]], device=device) * size
    return (c2w, torch.tensor(FXFYCXCY, device=device).repeat(B, V, 1),
            torch.linalg.inv(c2w), intrinsics.repeat(B, V, 1, 1))


def ours(gaussians, views, size, module=splat, geometry=True, **options):
    """What gsplat returns too: image, alpha and expected depth; or the image alone."""
    render = module.rasterize(*gaussians, *views[:2], size, size, **options)
    return (render.image, render.alpha, render.depth) if geometry else (render.image,)


def with_gsplat(gaussians, views, size, geometry=True):
    means, quats, scales, opacities, colors = gaussians
    *_, w2c, intrinsics = views
    found = gsplat.rasterization(
        means, quats, scales, opacities, colors, w2c, intrinsics, size, size, eps2d=0.0,
        packed=False,  # its packed mode takes no batch of objects
        render_mode="RGB+ED" if geometry else "RGB",
        backgrounds=torch.ones(*w2c.shape[:2], 3, device=w2c.device))
    return found[:2] if geometry else found[:1]


def one_view_at_a_time(render, gaussians, views, size):
    B, V = views[0].shape[:2]
    singly = [render([a[b : b + 1] for a in gaussians], [x[b : b + 1, v : v + 1] for x in views], size)
              for b in range(B) for v in range(V)]
    return [torch.cat(outputs) for outputs in zip(*singly, strict=True)]


def splat_backends(device):
    """{name: function of (gaussians, views, size)}"""
    if device.type == "cpu":
        return {"torch": partial(ours, backend="torch"),
                "torch, picture": partial(ours, backend="torch", geometry=False)}
    backends = {"triton": ours, "triton, picture": partial(ours, geometry=False),
                "triton, graph": ours, "triton, deterministic": partial(ours, deterministic=True),
                "triton, view by view": partial(one_view_at_a_time, ours)}
    if gsplat is not None:
        backends |= {"gsplat": with_gsplat, "gsplat, picture": partial(with_gsplat, geometry=False),
                     "gsplat, view by view": partial(one_view_at_a_time, with_gsplat)}
    return backends


def matching_inputs(M, n, dtype, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    latents = [torch.randn(M, n, generator=generator, device=device).to(dtype) for _ in range(6)]
    per_sample = torch.rand(2, M, generator=generator, device=device)
    return latents, per_sample[0] + 1, per_sample[1]


# ---- measuring ---------------------------------------------------------------------------------------------


def measure(calls, device, seconds):
    """Times of the calls in turn: {ms_p20, ms_p50, ms_p80, host_ms, reps, peak_mb} in about `seconds`."""
    cuda = device.type == "cuda"
    synchronise = partial(torch.cuda.synchronize, device) if cuda else lambda: None
    calls[0]()  # compiles, and fills caches and allocator
    synchronise()
    start = time.perf_counter()
    calls[-1]()
    synchronise()
    once = time.perf_counter() - start
    reps = max(5 if once < 1 else 1, min(200, int(seconds / once)))

    def stamp():
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    marks, host = [], []
    for i in range(reps):  # without a synchronisation: the host runs ahead of the GPU, as it does in training
        begin, called = stamp(), time.perf_counter()
        calls[i % len(calls)]()
        host.append(1e3 * (time.perf_counter() - called))
        marks.append((begin, stamp()))
    synchronise()
    times = [begin.elapsed_time(end) if cuda else 1e3 * (end - begin) for begin, end in marks]
    peak = None
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        calls[0]()
        peak = round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)
    p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "host_ms": sorted(host)[reps // 2], "reps": reps,
            "peak_mb": peak}


def passes(function, inputs, wanted):
    """The two passes over one input set as calls; incoming gradients are random and made beforehand."""
    leaves = [x.detach().requires_grad_() for x in wanted]
    outputs = function(*leaves, *inputs)
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    incoming = [torch.randn(x.shape, generator=generator, device=x.device) for x in outputs]
    del outputs

    def forward():
        with torch.no_grad():
            function(*leaves, *inputs)

    def both():
        torch.autograd.grad(function(*leaves, *inputs), leaves, incoming, allow_unused=True)

    return {"forward": forward, "forward+backward": both}


def captured(call):
    """(replay, outputs): the call as one CUDA graph, its kernels without the time it takes to launch them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph.replay, outputs


def by_kernel(call, reps=3):
    """Device time of each kernel in a call, in microseconds: {name: (launches, time)}, the longest first."""
    from torch.profiler import ProfilerActivity, profile
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(reps):
            call()
        torch.cuda.synchronize()
    times = {}
    for event in found.key_averages():
        if str(event.device_type).endswith("CUDA"):
            launches, total = times.get(event.key[:80], (0, 0))  # templates that differ later are one
            total += event.self_device_time_total / reps
            times[event.key[:80]] = (launches + event.count / reps, round(total, 1))
    return dict(sorted(times.items(), key=lambda item: -item[1][1]))


def ceilings(device):
    """Bytes a second of a copy, read and written; float32 operations a second of a matrix product."""
    count, side = (2**24, 1024) if device.type == "cpu" else (2**29, 8192)
    a, b = torch.randn(2, count // 2, device=device)
    copy = measure([lambda: a.copy_(b)], device, 0.5)["ms_p20"]
    m = torch.randn(side, side, device=device)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    product = measure([lambda: m @ m], device, 0.5)["ms_p20"]
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * a.numel() * 4 / copy * 1e3, 2 * side**3 / product * 1e3


def provenance(device):
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"gpu": gpu, "cpu": platform.machine(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "triton": triton and triton.__version__,
            "gsplat": gsplat and gsplat.__version__, "cuda": torch.version.cuda or torch.version.hip,
            "commit": report.git_commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


class Rows:
    """Where a step's rows go: appended to a file at once. A step that is stopped keeps what it had."""

    def __init__(self, path, step, device, run, command):
        self.path = path
        self.facts = {"step": step, "run": run, **provenance(device), "cmd": command}

    def __call__(self, **row):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **self.facts}) + "\n")
        print(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)

    def failed(self, error, **row):
        """A backend that fails, out of memory or not built for this machine, is a row as well."""
        self(**row, error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")


# ---- the steps ---------------------------------------------------------------------------------------------


def environment(rows, device, quick):
    bandwidth, rate = ceilings(device)
    rows(copy_gb_per_s=bandwidth / 1e9, float32_tflops=rate / 1e12)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def check(device):
    """[(what, error, tolerance)]: Triton against the PyTorch path, gradient_matching against float64."""
    found = []
    latents, k, weight = matching_inputs(3, 5003, torch.float32, device, 0)
    results = []
    for dtype in (torch.float32, torch.float64):
        u, t, *rest = (x.to(dtype) for x in latents)
        leaves = [u.requires_grad_(), t.requires_grad_()]
        match, reg = gradient_matching(u, t, *rest, 7.5, k, weight)
        results.append([match, reg, *torch.autograd.grad((k * match + weight * reg).sum(), leaves)])
    names = ("match", "reg", "d eps_uncond", "d eps_text")
    for what, a, b in zip(names, *results, strict=True):
        found.append((f"gradient_matching: {what} against float64", relative(a, b), 1e-5))

    size = 52  # no multiple of a tile
    gaussians, views = scene(2, 3, 3 * 400, device, 0), make_views(2, 3, size, device)
    runs = [(torch.float32, {}), (torch.float64, {"backend": "torch"})]
    if device.type == "cuda":
        runs += 2 * [(torch.float32, {"deterministic": True})]
    results = []
    for dtype, options in runs:
        leaves = [x.detach().to(dtype).requires_grad_() for x in gaussians]
        render = rasterize(*leaves, *(x.to(dtype) for x in views[:2]), size, size, **options)
        outputs = [render.image, render.alpha, render.depth, render.normal]
        generator = torch.Generator(device).manual_seed(0)
        incoming = [torch.randn(x.shape, generator=generator, device=device).to(dtype) for x in outputs]
        results.append(outputs + list(torch.autograd.grad(outputs, leaves, incoming)))
    names = ("image", "alpha", "depth", "normal", "d means", "d quats", "d scales", "d opacities", "d colors")
    for what, a, b in zip(names, *results[:2], strict=True):
        found.append((f"rasterize: {what} against float64", relative(a, b), 1e-3))
    if device.type == "cuda":
        differing = sum((a != b).sum().item() for a, b in zip(*results[2:], strict=True))
        found.append(("rasterize: elements that differ between two deterministic runs", differing, 0.5))
    return found


GPU_TESTS = ["test_kernels_gpu.py", "test_rasterize_triton.py", "test_matching.py"]


def correct(rows, device, quick):
    """Exits with 1 if anything is wrong."""
    wrong = False
    for what, error, tolerance in check(device):
        good = error < tolerance  # NaN is wrong too
        rows(what=what, error=error, tolerance=tolerance, ok=good)
        wrong |= not good
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        tests = [str(ROOT / "tests" / name) for name in (GPU_TESTS[:1] if quick else GPU_TESTS)]
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests]
        if not quick:
            command += ["-k", "gpu"]
        subprocess.run(command, cwd=ROOT)
        counts = {"passed": 0, "failed": 0, "skipped": 0}
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {part.tag for part in case}
            kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            counts[kind] += 1
            if kind == "failed":
                rows(what=f"{case.get('classname')}::{case.get('name')}", ok=False)
    rows(what="tests that need a GPU", **counts, ok=not counts["failed"])
    sys.exit(int(wrong or counts["failed"] > 0))


def floor(size, operations, ceiling):
    bandwidth, rate = ceiling
    return {"floor_ms": 1e3 * max(size / bandwidth, operations / rate),
            "floor": "bytes" if size / bandwidth > operations / rate else "flops"}


def splat_case(shape, sets):
    """What a shape's rows begin with, its inputs, and bytes and operations of each pass."""
    B, V, N, size = (SPLAT | TINY)[shape]
    pairs = mean_pairs(sets[0], V, size)
    live = (torch.cat([x[3] for x in sets]) > 0).float().mean().item()
    gaussians, pixels = 4 * GAUSSIAN_FLOATS * B * N, 4 * PIXEL_FLOATS * B * V * size**2
    need = {name: (gaussians + pixels if name == "forward" else 3 * gaussians + 2 * pixels,
                   flops * pairs * B * V * size**2) for name, flops in PAIR_FLOPS.items()}
    return {"op": "rasterize", "shape": shape, "B": B, "V": V, "N": N, "H": size, "W": size,
            "dtype": "float32", "live": round(live, 3), "pairs_per_pixel": round(pairs, 2)}, need


def time_splat(rows, device, quick):
    ceiling = ceilings(device)
    for shape in TINY if quick else list(SPLAT)[: None if device.type == "cuda" else 2]:
        B, V, N, size = (SPLAT | TINY)[shape]
        sets = [scene(B, V, N, device, seed) for seed in range(2)]
        views, (row, need) = make_views(B, V, size, device), splat_case(shape, sets)
        for backend, function in splat_backends(device).items():
            try:
                ready = [passes(lambda *x, f=function: f(x[:5], *x[5:]), (views, size), x) for x in sets]
                for name, cost_of_pass in need.items():
                    calls = [each[name] for each in ready]
                    if backend.endswith("graph"):
                        calls = [captured(call)[0] for call in calls]
                    timed = measure(calls, device, 0.1 if quick else 0.25)
                    rows(**row, backend=backend, **{"pass": name}, **timed, **floor(*cost_of_pass, ceiling))
                if device.type == "cuda" and backend in ("triton", "triton, picture", "gsplat"):
                    rows(op="kernels", shape=shape, backend=backend,
                         us=by_kernel(ready[0]["forward+backward"]))
            except (RuntimeError, AssertionError, AttributeError, ImportError) as error:
                rows.failed(error, **row, backend=backend)


# Variants of splat.py: constants that are changed. Of tiles: width, height, warps.
VARIANTS = {f"{width} x {height}, {warps} warp{'s' * (warps > 1)}": {"TILINGS": ((0, (width, height, warps)),)}
            for width, height, warps in ((8, 8, 1), (8, 8, 2), (8, 4, 1), (16, 8, 1), (16, 8, 2), (16, 8, 4),
                                         (16, 16, 4), (16, 16, 8))}
VARIANTS |= {f"batch {batch}": {"BATCH": batch} for batch in (4, 8, 32, 64)}
VARIANTS |= {f"lanes {block}, {warps} warps": {"LANES": {"BLOCK": block, "num_warps": warps}} for block, warps
             in ((64, 1), (64, 2), (128, 2), (128, 8), (256, 2), (256, 4), (256, 8), (512, 8))}


def variant(name):
    """A second copy of kernels/splat.py with a variant's constants."""
    spec = importlib.util.spec_from_file_location(f"splat_{list(VARIANTS).index(name)}", splat.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    change = dict(VARIANTS[name])
    module.LANES = module.LANES | change.pop("LANES", {})
    for constant, value in change.items():
        setattr(module, constant, value)
    return module


def warm(names, device):
    """Compile variants into Triton's cache: several such processes run beside `correct`."""
    for name in names:
        module = variant(name)
        for size in (64, 256):
            leaves = [x.requires_grad_() for x in scene(1, 4, 4096, device, 0)]
            outputs = ours(leaves, make_views(1, 4, size, device), size, module)
            torch.autograd.grad(sum(x.sum() for x in outputs), leaves)


def sweep(rows, device, quick):
    for shape in TINY if quick else ("diffsplat", "diffsplat-b2", "diffsplat-b4", "embedded", "gaussiancube"):
        B, V, N, size = (SPLAT | TINY)[shape]
        leaves, views = scene(B, V, N, device, 0), make_views(B, V, size, device)
        for name in list(VARIANTS)[:1] if quick else VARIANTS:
            try:
                module = variant(name)
                ready = passes(lambda *x: ours(x[:5], *x[5:], module), (views, size), leaves)  # noqa: B023
                times = {key: measure([call], device, 0.05)["ms_p50"] for key, call in ready.items()}
                if device.type == "cuda":  # where a scene is small, the host's time hides what differs
                    times["us"] = by_kernel(ready["forward+backward"])
                rows(op="sweep", shape=shape, variant=name, **times)
            except RuntimeError as error:
                rows.failed(error, op="sweep", shape=shape, variant=name)


def matching(rows, device, quick):
    cuda, ceiling = device.type == "cuda", ceilings(device)
    for shape in MATCHING if cuda and not quick else list(MATCHING)[:2]:
        M, n = MATCHING[shape]
        for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
            sets = [matching_inputs(M, n, dtype, device, seed) for seed in range(2 if quick else 4)]
            row = {"op": "gradient_matching", "shape": shape, "M": M, "n": n, "dtype": str(dtype)[6:]}
            need = {"forward": 6 * M * n * dtype.itemsize, "forward+backward": 14 * M * n * dtype.itemsize}
            for backend in ("triton", "torch", "triton, graph", "torch, graph") if cuda else ("torch",):
                function = partial(gradient_matching, backend=backend.split(",")[0])
                try:
                    ready = [passes(function, (*latents[2:], 7.5, k, weight), latents[:2])
                             for latents, k, weight in sets]
                    for name, size in need.items():
                        calls = [each[name] for each in ready]
                        if backend.endswith("graph"):
                            calls = [captured(call)[0] for call in calls]
                        timed = measure(calls, device, 0.1 if quick else 0.3)
                        rows(**row, backend=backend, **{"pass": name}, **timed, **floor(size, 0, ceiling))
                except RuntimeError as error:
                    rows.failed(error, **row, backend=backend)


def host(rows, device, quick):
    """Host time of rasterize with launches left out: checks, allocations, torch's own operations on tiny tensors."""
    module = variant(next(iter(VARIANTS)))
    for name in [name for name in dir(module) if name.endswith("_kernel")]:
        setattr(module, name, defaultdict(lambda: lambda *arguments, **options: None))
    cpu = torch.device("cpu")
    leaves, views = scene(1, 4, 16, cpu, 0), make_views(1, 4, 16, cpu)
    ready = passes(lambda *x: ours(x[:5], *x[5:], module, backend="triton", capacity=64), (views, 16), leaves)
    for name, call in ready.items():
        rows(op="host", **{"pass": name}, us=1e3 * measure([call], cpu, 0.1 if quick else 1)["ms_p50"])


COST = {  # what is asked: options of `python r2d3.py cost`, ways of support/speed.py, seconds
    "4 transitions": (["--batch-size", "2", "--updates-per-epoch", "1", "--fraction", "0.1"], [], 90),
    "4 objects, --checkpoint": (["--batch-size", "4", "--checkpoint"], [], 120),
    "as published": ([], [], 150),
    **{f"micro-batch {size}": (["--micro-batch", str(size)], [], 120) for size in (4, 8, 16)},
    "channels last": ([], ["channels_last"], 150),
    "compiled": ([], ["compiled"], 240),
    "all of it": (["--micro-batch", "8"], ["channels_last", "compiled"], 240),
    "all of it, E8": (["--micro-batch", "8", "--estimator", "sample"], ["channels_last", "compiled"], 240),
}
PAPER = ["--base", "diffsplat-pixart", "--weights", "random"]
FIRST = ["--reward", "aesthetic"]


def run(program, arguments, limit):
    """(exit code or None for a limit that was reached, seconds, output) of a program of ours."""
    begun = time.perf_counter()
    child = subprocess.Popen([sys.executable, str(ROOT / program), *arguments], cwd=ROOT, encoding="utf-8",
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, code = child.communicate(timeout=limit)[0], child.returncode
    except subprocess.TimeoutExpired:
        child.kill()
        output, code = child.communicate()[0], None
    return code, round(time.perf_counter() - begun, 1), output


def epoch(ways, arguments):
    """`python r2d3.py cost` with ways of support/speed.py; the second of two epochs, since the first compiles."""
    import r2d3
    _, config = r2d3.parse(["cost", *arguments])
    resolved = r2d3.resolve(config)
    base = r2d3.load_base(resolved, resolved.device)
    speed.speed_up(base, ways)
    net = base.net
    for _ in range(2 if "compiled" in ways else 1):
        base.net = net
        r2d3.cost(config, base)
        print("epoch done", flush=True)


def cost(rows, device, quick):
    for what, (options, ways, limit) in list(COST.items())[: 1 if quick else None]:
        arguments = [*([] if quick else PAPER), *options, "--device", str(device)]
        program, begin = ("experiments/bench.py", ["--ways", ",".join(ways)]) if ways else ("r2d3.py", ["cost"])
        code, seconds, output = run(program, [*begin, *arguments], limit)
        row = {"op": "cost", "what": what, "ways": ways, "arguments": " ".join(arguments), "wall_s": seconds}
        try:
            *_, last = re.findall(r"^\{\n.*?^\}", output, re.MULTILINE | re.DOTALL)
            rows(**row, **json.loads(last))
        except ValueError:
            rows(**row, error=f"exit code {code}: {output[-1500:]}")


def first(rows, device, quick):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        code, seconds, output = run("r2d3.py", [*FIRST, "--out", str(out), "--device", str(device)], 150)
        row = {"op": "first", "arguments": " ".join(FIRST), "wall_s": seconds}
        try:
            rows(**row, summary=json.loads((out / "summary.json").read_text(encoding="utf-8")))
        except OSError:
            rows(**row, error=f"exit code {code}: {output[-1500:]}")


STEPS = {  # function; seconds it may take, seconds that must be left to begin it
    "environment": (environment, 40, 5),
    "correct": (correct, 200, 20),
    "time": (time_splat, 140, 30),
    "sweep": (sweep, 100, 30),
    "matching": (matching, 50, 20),
    "host": (host, 30, 5),
    "cost": (cost, 520, 60),
    "first": (first, 160, 60),
}
ON_A_CPU = {"correct": 15, "time": 45, "matching": 15, "host": 10}  # what is run without a GPU; seconds on one core


# ---- tables ------------------------------------------------------------------------------------------------


COMPOSITING = "_composite", "rasterize_to_pixels"  # where the pixels are made: our kernels and gsplat's


def compositing_us(row):
    return sum(time for name, (_, time) in row["us"].items() if any(word in name for word in COMPOSITING))


def table(rows):
    """Prints what was measured: operators first, then the sweep, the cost and the first command."""
    timed = [r for r in rows if "ms_p50" in r]
    key = lambda r: (r["op"], r["shape"], r["dtype"], r["pass"])  # noqa: E731
    eager = {key(r): r["ms_p50"] for r in timed if r["backend"] == "torch"}
    line = "{:18}{:17}{:9}{:22}{:17}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}{:>9}"
    if timed:
        print(line.format("operator", "shape", "dtype", "backend", "pass", "ms p50", "p20", "p80", "host ms",
                          "x torch", "x floor", "peak MB"))
    for r in timed:
        times = (f"{r[name]:.3f}" for name in ("ms_p50", "ms_p20", "ms_p80", "host_ms"))
        speedup = f"{eager[key(r)] / r['ms_p50']:.2f}" if eager.get(key(r)) else "-"
        print(line.format(r["op"], r["shape"], r["dtype"], r["backend"], r["pass"], *times, speedup,
                          f"{r['ms_p50'] / r['floor_ms']:.1f}", r["peak_mb"] or "-"))
    for r in rows:
        if r.get("op") == "sweep" and "forward" in r:
            kernels = f", compositing alone {compositing_us(r) / 1e3:.3f}" if "us" in r else ""
            times = f"{r['forward']:9.3f}{r['forward+backward']:9.3f} ms{kernels}"
            print(f"{r['shape']:18}{r['variant']:24}{times}")
        if r.get("op") == "cost" and "seconds" in r:
            seconds = ", ".join(f"{name} {value:.1f}" for name, value in r["seconds"].items())
            print(f"cost, {r['what']}: {seconds} s; peak {r['peak_GB']:.1f} GB")
        if r.get("op") == "first" and "summary" in r:
            print(f"first command: {r['wall_s']} s")
        if "error" in r and "ok" not in r:
            names = (r[k] for k in ("op", "what", "shape", "backend", "variant") if k in r)
            print("failed:", *names, r["error"])
        if r.get("ok") is False:
            print("WRONG:", r["what"], r.get("error", ""))
        if "passed" in r:
            print(f"{r['what']}: {r['passed']} passed, {r['failed']} failed, {r['skipped']} skipped")


def beside_gsplat(rows):
    """A Markdown table's lines: times beside gsplat's in ms; gsplat's forward + backward over ours."""
    timed = [r for r in rows if r.get("op") == "rasterize" and "ms_p50" in r]
    found = {(r["shape"], r["backend"], r["pass"]): r for r in timed}
    kernels = {(r["shape"], r["backend"]): compositing_us(r) for r in rows if r.get("op") == "kernels"}
    lines = ["| objects, views, Gaussians, side | ours: forward, with backward | gsplat | as called | "
             "compositing alone | picture alone | peak memory |", "|---|---|---|---|---|---|---|"]
    for shape, (B, V, N, size) in SPLAT.items():
        ours, theirs, ours_picture, their_picture = (
            [found.get((shape, backend, name)) for name in ("forward", "forward+backward")]
            for backend in ("triton", "gsplat", "triton, picture", "gsplat, picture"))
        if all(ours + theirs + ours_picture + their_picture) and (shape, "gsplat") in kernels:
            times = [", ".join(f"{row['ms_p50']:.2f}" for row in pair) for pair in (ours, theirs)]
            ratios = [theirs[1]["ms_p50"] / ours[1]["ms_p50"],
                      kernels[shape, "gsplat"] / kernels[shape, "triton"],
                      their_picture[1]["ms_p50"] / ours_picture[1]["ms_p50"],
                      theirs[1]["peak_mb"] / ours[1]["peak_mb"]]
            cells = [f"{B}, {V}, {N:,}, {size}", *times, *(f"{ratio:.2f}" for ratio in ratios)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def goals(rows):
    """Prints for each goal whether it is met, and by how much."""
    found = {(r["op"], r["shape"], r["dtype"], r["backend"], r["pass"]): r for r in rows
             if "pass" in r and "ms_p50" in r}
    kernels = {(r["shape"], r["backend"]): sum(us for _, us in r["us"].values()) / 1e3 for r in rows
               if r.get("op") == "kernels"}

    def verdict(text, above, below, wanted, at_least=True, name="ms_p50"):
        value = above[name] / below[name] if above and below else None
        met = value is not None and (value >= wanted if at_least else value <= wanted)
        result = "not measured" if value is None else f"{'met' if met else 'MISSED'} ({value:.2f})"
        print(f"  {text}, wanted {'>=' if at_least else '<='} {wanted}: {result}")

    def rasterized(shape, backend, name="forward+backward"):
        return found.get(("rasterize", shape, "float32", backend, name))

    print("goals:")
    for shape in SPLAT:
        ours, theirs = rasterized(shape, "triton"), rasterized(shape, "gsplat")
        wanted = 4 if shape == "embedded" else 1.6
        verdict(f"{shape}, forward + backward: gsplat's time / ours", theirs, ours, wanted)
        verdict(f"{shape}, forward: the same", rasterized(shape, "gsplat", "forward"),
                rasterized(shape, "triton", "forward"), 1.2)
        verdict(f"{shape}: our peak memory / gsplat's", ours, theirs, 1.5, at_least=False, name="peak_mb")
        own = kernels.get((shape, "triton"))
        verdict(f"{shape}: a captured graph / its kernels", rasterized(shape, "triton, graph"),
                own and {"ms_p50": own}, 1.1, at_least=False)
        if shape.startswith("diffsplat"):
            verdict(f"{shape}: view by view / ours", rasterized(shape, "triton, view by view"), ours, 3)
    large = found.get(("gradient_matching", "large", "float32", "triton", "forward+backward"))
    verdict("gradient_matching, large: our time / the bandwidth floor", large,
            large and {"ms_p50": large["floor_ms"]}, 1.3, at_least=False)
    peak = [r for r in rows if "checkpoint" in r.get("what", "") and "peak_GB" in r]
    verdict("the paper's base, 4 objects with --checkpoint: peak GB", peak and peak[-1], {"peak_GB": 1}, 24,
            at_least=False, name="peak_GB")


# ---- the command -------------------------------------------------------------------------------------------


def main():
    if sys.argv[1:2] == ["--ways"]:
        return epoch(sys.argv[2].split(","), sys.argv[3:])
    parser = argparse.ArgumentParser(prog="python experiments/bench.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help=", ".join(STEPS) + "; by default all, "
                        "on a CPU " + ", ".join(ON_A_CPU))
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cuda or cpu")
    parser.add_argument("--out", help="file that rows are appended to; by default experiments/results/"
                        "kernels.jsonl for a GPU, a temporary file for a CPU")
    parser.add_argument("--budget", type=float, default=530, help="seconds for everything (default: 530)")
    parser.add_argument("--show", metavar="FILE", help="measure nothing: table and goals of the rows in FILE")
    parser.add_argument("--quick", action="store_true", help="tiny: does the command work at all?")
    parser.add_argument("--step", choices=(*STEPS, "warm"), help=argparse.SUPPRESS)  # in a child
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--variants", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.show:
        found = [json.loads(line) for line in Path(options.show).read_text(encoding="utf-8").splitlines()]
        table(found)
        print(*beside_gsplat(found), sep="\n")
        return goals(found)
    device = torch.device(options.device)
    if options.step == "warm":
        return warm(options.variants, device)
    if options.step:
        command = os.environ.get("KERNELS_BENCH_COMMAND", "")
        rows = Rows(options.out, options.step, device, options.run, command)
        return STEPS[options.step][0](rows, device, options.quick)

    begun, run = time.monotonic(), datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = options.out or (str(ROOT / "experiments/results/kernels.jsonl") if device.type == "cuda" else
                          str(Path(tempfile.mkdtemp(), "kernels.jsonl")))
    print(f"rows go to {out}", flush=True)
    environ = {**os.environ, "KERNELS_BENCH_COMMAND": " ".join(["python experiments/bench.py", *sys.argv[1:]])}
    child = [sys.executable, __file__, "--device", options.device, "--out", out, "--run", run,
             *(["--quick"] if options.quick else [])]
    wanted = options.only or (ON_A_CPU if device.type == "cpu" else STEPS)
    steps = [step for step in STEPS if step in wanted]
    limits = {step: ON_A_CPU.get(step, STEPS[step][1]) if device.type == "cpu" else STEPS[step][1] for step in steps}
    plan = ", ".join(f"{step} ({limits[step]} s)" for step in steps)
    print(f"on {options.device}, about: {plan}; all of it ends within {options.budget:.0f} s", flush=True)
    helpers = []
    if device.type == "cuda" and "sweep" in steps and not options.quick:
        helpers = [subprocess.Popen([*child, "--step", "warm", "--variants", *list(VARIANTS)[n::8]], cwd=ROOT,
                                    env=environ) for n in range(8)]
    wrong = False
    for step in steps:
        _, limit, least = STEPS[step]
        left = options.budget - (time.monotonic() - begun)
        if left < least:
            print(f"---- {step}: left out, {left:.0f} seconds are not enough", flush=True)
            continue
        print(f"---- {step}", flush=True)
        if step not in ("environment", "correct"):  # nothing else may run while the clock does
            for helper in helpers:
                try:
                    helper.wait(60)
                except subprocess.TimeoutExpired:
                    helper.kill()
            helpers = []
        process = subprocess.Popen([*child, "--step", step], cwd=ROOT, env=environ)
        try:
            code = process.wait(min(limit, left))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
            print(f"---- {step}: stopped after {min(limit, left):.0f} seconds; its rows so far are kept")
        if step == "correct" and code:
            wrong = True
            print("---- results differ, so nothing is timed")
            break
    for helper in helpers:
        helper.kill()
    found = []
    if Path(out).is_file():
        found = [json.loads(line) for line in Path(out).read_text(encoding="utf-8").splitlines()]
    found = [row for row in found if row.get("run") == run]
    table(found)
    if device.type == "cpu":
        print("CPU times are good for ratios in this table only; the goals are a GPU's")
    else:
        goals(found)
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
