"""Measured speed and memory of the kernels: `python -m kernels.bench`; on a GPU under 8 minutes.

In one call: checks that Triton agrees with the PyTorch path (gradient_matching with float64) and that
deterministic=True is bit-identical; measures the machine's two ceilings (copy bandwidth, float32 rate); times
operators, backends, shapes and passes; prints one table and whether each goal is met; with --out, appends one
JSON row a line. A row says where and how it was measured: GPU, torch, triton, CUDA, commit, date, command.

Times are medians with 20 and 80 % quantiles over repetitions that cycle through several random inputs, after
a warm-up, each between two device events. peak_mb is the most memory allocated in a pass beyond its inputs.
floor_ms is the least time the pass can take: every input read once and every output written once at the
measured bandwidth, or the arithmetic of the contributing (pixel, Gaussian) pairs at the measured float32
rate, whichever is larger.
"""
import argparse
import datetime
import json
import math
import platform
import subprocess
import sys
import time
from functools import partial

import torch

from kernels import gradient_matching, rasterize

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


def render_ours(gaussians, views, size, backend, deterministic=False):
    return rasterize(*gaussians, *views[:2], size, size, backend=backend, deterministic=deterministic)


def ours(gaussians, views, size, backend, deterministic=False):
    render = render_ours(gaussians, views, size, backend, deterministic)
    return render.image, render.alpha, render.depth


def with_gsplat(gaussians, views, size, packed=False):
    means, quats, scales, opacities, colors = gaussians
    *_, w2c, intrinsics = views
    return gsplat.rasterization(
        means, quats, scales, opacities, colors, w2c, intrinsics, size, size, eps2d=0.0, packed=packed,
        render_mode="RGB+ED", backgrounds=torch.ones(*w2c.shape[:2], 3, device=w2c.device))[:2]


def one_view_at_a_time(render, gaussians, views, size):
    B, V = views[0].shape[:2]
    singly = [render([a[b : b + 1] for a in gaussians], [x[b : b + 1, v : v + 1] for x in views], size)
              for b in range(B) for v in range(V)]
    return [torch.cat(outputs) for outputs in zip(*singly, strict=True)]


def splat_backends(device, small):
    backends = {}
    if device.type == "cuda":
        fused = partial(ours, backend="triton")
        backends |= {"triton": fused, "triton, deterministic": partial(fused, deterministic=True),
                     "triton, view by view": partial(one_view_at_a_time, fused)}
        if gsplat is not None:
            backends |= {"gsplat": with_gsplat, "gsplat, packed": partial(with_gsplat, packed=True),
                         "gsplat, view by view": partial(one_view_at_a_time, with_gsplat)}
    # The PyTorch path is made for a CPU: where a GPU needs seconds for it, there is nothing to learn.
    return backends | ({"torch": partial(ours, backend="torch")} if small else {})


def matching_inputs(M, n, dtype, device, seed):
    generator = torch.Generator(device).manual_seed(seed)
    latents = [torch.randn(M, n, generator=generator, device=device).to(dtype) for _ in range(6)]
    per_sample = torch.rand(2, M, generator=generator, device=device)
    return latents, per_sample[0] + 1, per_sample[1]


# ---- measuring ---------------------------------------------------------------------------------------------


def measure(calls, device, seconds):
    """Times of the calls in turn: {ms_p20, ms_p50, ms_p80, reps, peak_mb} in about `seconds`."""
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

    marks = []
    for i in range(reps):  # without a synchronisation: the host runs ahead of the GPU, as it does in training
        begin = stamp()
        calls[i % len(calls)]()
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
    return {"ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "reps": reps, "peak_mb": peak}


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
        torch.autograd.grad(function(*leaves, *inputs), leaves, incoming)

    return {"forward": forward, "forward+backward": both}


def captured(call):
    """The call as one CUDA graph: its kernels alone, without the time the host takes to launch them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


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
    git = ["git", "-C", __file__.rpartition("/")[0], "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"gpu": gpu, "cpu": platform.machine(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "triton": triton and triton.__version__,
            "gsplat": gsplat and gsplat.__version__, "cuda": torch.version.cuda or torch.version.hip,
            "commit": commit,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "cmd": " ".join(["python -m kernels.bench", *sys.argv[1:]])}


# ---- the three parts of a run ------------------------------------------------------------------------------


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
    if device.type == "cpu":
        return found

    size = 52  # no multiple of a tile
    gaussians, views = scene(2, 3, 3 * 400, device, 0), make_views(2, 3, size, device)
    results = []
    for backend, deterministic in (("triton", False), ("torch", False), ("triton", True), ("triton", True)):
        leaves = [x.detach().requires_grad_() for x in gaussians]
        render = render_ours(leaves, views, size, backend, deterministic)
        outputs = [render.image, render.alpha, render.depth, render.normal]
        generator = torch.Generator(device).manual_seed(0)
        incoming = [torch.randn(x.shape, generator=generator, device=device) for x in outputs]
        results.append(outputs + list(torch.autograd.grad(outputs, leaves, incoming)))
    names = ("image", "alpha", "depth", "normal", "d means", "d quats", "d scales", "d opacities", "d colors")
    for what, a, b in zip(names, *results[:2], strict=True):
        found.append((f"rasterize: {what} against the PyTorch path", relative(a, b), 1e-3))
    differing = sum((a != b).sum().item() for a, b in zip(results[2], results[3], strict=True))
    return [*found, ("rasterize: elements that differ between two deterministic runs", differing, 0.5)]


def cases(op, device, quick):
    """(row so far, {backend: function}, leaf sets, constant sets, bytes and operations of each pass)"""
    cuda = device.type == "cuda"
    if op in ("matching", "all"):
        for shape in MATCHING if cuda and not quick else list(MATCHING)[:3]:
            for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
                M, n = MATCHING[shape]
                inputs = [matching_inputs(M, n, dtype, device, seed) for seed in range(2 if quick else 4)]
                row = {"op": "gradient_matching", "shape": shape, "M": M, "n": n, "dtype": str(dtype)[6:]}
                functions = {name: partial(gradient_matching, backend=name.split(",")[0]) for name in
                             (("triton", "torch", "triton, graph", "torch, graph") if cuda else ("torch",))}
                size = M * n * dtype.itemsize
                need = {"forward": (6 * size, 0), "forward+backward": (14 * size, 0)}
                constants = [(*latents[2:], 7.5, k, weight) for latents, k, weight in inputs]
                yield row, functions, [latents[:2] for latents, _, _ in inputs], constants, need
    if op in ("splat", "all"):
        for shape in SPLAT if cuda and not quick else list(SPLAT)[: 2 if cuda else 1]:
            B, V, N, size = SPLAT[shape]
            sets = [scene(B, V, N, device, seed) for seed in range(2 if quick else 3)]
            pairs = mean_pairs(sets[0], V, size)
            live = (torch.cat([x[3] for x in sets]) > 0).float().mean().item()
            gaussians, pixels = 4 * GAUSSIAN_FLOATS * B * N, 4 * PIXEL_FLOATS * B * V * size**2
            need = {name: (gaussians + pixels if name == "forward" else 3 * gaussians + 2 * pixels,
                           flops * pairs * B * V * size**2) for name, flops in PAIR_FLOPS.items()}
            row = {"op": "rasterize", "shape": shape, "B": B, "V": V, "N": N, "H": size, "W": size,
                   "dtype": "float32", "live": round(live, 3), "pairs_per_pixel": round(pairs, 2)}
            functions = {name: lambda *x, render=render: render(x[:5], *x[5:])
                         for name, render in splat_backends(device, B * N <= 4 * 256**2).items()}
            yield row, functions, sets, [(make_views(B, V, size, device), size)] * len(sets), need


def run(op, device, quick, seconds):
    """Rows of everything that `seconds` allow; a backend that fails gives a row with the reason."""
    bandwidth, rate = ceilings(device)
    print(f"measured ceilings: copy {bandwidth / 1e9:.0f} GB/s, float32 product {rate / 1e12:.2f} TFLOP/s")
    end, rows, facts = time.monotonic() + seconds, [], provenance(device)
    for row, functions, leaf_sets, constant_sets, need in cases(op, device, quick):
        for backend, function in functions.items():
            if time.monotonic() > end:
                print(f"out of time: {row['op']} {row['shape']} {backend} is left out")
                continue
            try:
                ready = [passes(function, *sets) for sets in zip(constant_sets, leaf_sets, strict=True)]
                timed = {}
                for name in need:
                    calls = [each[name] for each in ready]
                    if backend.endswith("graph"):
                        calls = [captured(call) for call in calls]
                    timed[name] = measure(calls, device, 0.3 if quick else 1.5)
            except (RuntimeError, AssertionError, AttributeError, ImportError) as error:
                # out of memory, or a rival that is not built for this machine
                timed = {name: {"error": str(error).splitlines()[0]} for name in need}
            for name, (size, operations) in need.items():
                floor = 1e3 * max(size / bandwidth, operations / rate)
                limit = "bytes" if size / bandwidth > operations / rate else "flops"
                rows.append({**row, "backend": backend, "pass": name, **timed[name], "floor_ms": floor,
                             "floor": limit, **facts})
    return rows


def table(rows):
    key = lambda r: (r["op"], r["shape"], r["dtype"], r["pass"])  # noqa: E731
    eager = {key(r): r.get("ms_p50") for r in rows if r["backend"] == "torch"}
    line = "{:18}{:17}{:9}{:22}{:17}{:>10}{:>10}{:>10}{:>9}{:>9}{:>9}{:>5}"
    print(line.format("operator", "shape", "dtype", "backend", "pass", "ms p50", "p20", "p80", "x torch",
                      "x floor", "peak MB", "reps"))
    for r in rows:
        names = (r["op"], r["shape"], r["dtype"], r["backend"], r["pass"])
        if "error" in r:
            print(*names, "failed:", r["error"])
            continue
        times = (f"{r[name]:.3f}" for name in ("ms_p50", "ms_p20", "ms_p80"))
        speedup = f"{eager[key(r)] / r['ms_p50']:.2f}" if eager.get(key(r)) else "-"
        print(line.format(*names, *times, speedup, f"{r['ms_p50'] / r['floor_ms']:.1f}", r["peak_mb"] or "-",
                          r["reps"]))


def goals(rows):
    """Prints for each goal whether it is met, and by how much."""
    both = {(r["op"], r["shape"], r["dtype"], r["backend"]): r for r in rows
            if r["pass"] == "forward+backward" and "error" not in r}

    def verdict(text, value, wanted, at_least=True):
        met = value is not None and (value >= wanted if at_least else value <= wanted)
        result = "not measured" if value is None else f"{'met' if met else 'MISSED'} ({value:.2f})"
        print(f"  {text}, wanted {'>=' if at_least else '<='} {wanted}: {result}")

    def ratio(above, below, name="ms_p50"):
        above = [r[name] for r in above if r]
        return min(above) / below[name] if above and below else None

    print("goals, forward + backward:")
    for shape in (name for name in SPLAT if name.startswith("diffsplat")):
        mine, *rivals, singly, singly_mine = (
            both.get(("rasterize", shape, "float32", backend)) for backend in
            ("triton", "gsplat", "gsplat, packed", "gsplat, view by view", "triton, view by view"))
        verdict(f"{shape}: gsplat's time / ours", ratio(rivals, mine), 1.3)
        verdict(f"{shape}: time view by view / ours", ratio([singly or singly_mine], mine), 3)
        verdict(f"{shape}: gsplat's peak memory / ours", ratio(rivals, mine, "peak_mb"), 1)
    at = lambda shape, backend: both.get(("gradient_matching", shape, "float32", backend))  # noqa: E731
    for how, suffix in (("", ""), (", kernels alone (CUDA graph)", ", graph")):
        value = ratio([at("diffsplat", "torch" + suffix)], at("diffsplat", "triton" + suffix))
        verdict(f"gradient_matching, DiffSplat latent{how}: eager PyTorch's time / ours", value, 5)
    large = at("large", "triton")
    verdict("gradient_matching, large: our time / the bandwidth floor",
            large and large["ms_p50"] / large["floor_ms"], 1.3, at_least=False)


def main():
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--op", choices=("splat", "matching", "all"), default="all", help="what to measure")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cuda or cpu")
    parser.add_argument("--out", help="append one JSON row a line to this file; left out: only print")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions")
    options = parser.parse_args()
    device = torch.device(options.device)
    wrong = False
    for what, error, tolerance in check(device):
        wrong |= not error < tolerance  # NaN is wrong too
        print(f"{'ok' if error < tolerance else 'WRONG':6} {what}: {error:.2e}")
    if wrong:
        sys.exit("results differ, so nothing is timed")
    rows = run(options.op, device, options.quick, 60 if options.quick else 400)
    table(rows)
    if device.type == "cpu":
        print("CPU times are good for ratios in this table only: machine and load decide the rest")
    else:
        goals(rows)
    if options.out:
        with open(options.out, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
