"""Make the embedded base `shapes` from nothing: data, autoencoder, judges, denoiser, measured quality.

    python experiments/make_shapes.py --compile --device cpu    # nearly as the file in support/ was made: two hours
    python experiments/make_shapes.py                           # without a C++ compiler; on a GPU where there is one
    python experiments/make_shapes.py --minutes 90              # training ends by the clock
    python experiments/make_shapes.py --quick                   # a smoke test, in runs/quick_shapes

A run replaces support/shapes.safetensors, prompts/shapes_*.txt and the picture experiments/results/shapes.png. What it
should reach, of what it measures and writes into the file: 95% of closed prompts named right, 65 to 90% of hard ones,
by a tower that is right on 97% of true pictures; 85% of the true spread of colourfulness within a prompt; on open
prompts histograms of colours and shapes within a total variation of 0.1 of the data's. experiments/README.md says what
the file that is here reaches.

Every stage leaves its result in the work folder and is skipped when that is there, so a stopped run goes on where it
was (training goes on from a checkpoint that is at most half a minute old). Stages:

    data      signed-distance shapes, sphere-traced into DiffSplat's splat grids; colours are applied on the fly
    ae        the 12-channel autoencoder (diffusers AutoencoderKL), one view at a time
    judges    the image-text tower and the normal estimator, trained on renders of the same splats
    denoiser  the text-to-3D diffusion model (diffusers PixArtTransformer2DModel with multi-view attention), EMA
    quality   90 unseen prompts: named by the tower, spread, histograms, geometry; experiments/results/shapes.png
"""

import argparse
import colorsys
import contextlib
import json
import math
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import bench  # noqa: E402
import r2d3  # noqa: E402
import tilt  # noqa: E402
from support import folders, inputs, report, shapes, to_bytes, write_atomic  # noqa: E402

GRID = 32                                   # splats along a view's side
SCALE_RANGE, DEPTH_SCALE = (0.002, 0.06), 0.5
HUES = {"red": 0, "orange": 27, "yellow": 53, "green": 120, "cyan": 182, "blue": 224, "purple": 278, "gray": None}
SHAPES = ["sphere", "cube", "cylinder", "cone", "ring", "pill", "cross", "diamond"]
SIZES = {"": (0.17, 0.32), "small": (0.17, 0.2), "big": (0.29, 0.32)}       # no word: any size
VOCAB = ["a", "an", "small", "big", "on", "something", "thing", *HUES, *SHAPES]
MAX_LENGTH = 14                             # "a small red cube on a big blue ring on a big gray cone"
LIGHT = F.normalize(torch.tensor([0.3, 0.9, 0.4]), dim=0)

Part = tuple[str, str, str]                 # (size, color, shape), "" where a caption leaves it open

# ---- The world: what is in it, and how it is called -------------------------------------------------------------

# Combinations that training never sees. Every colour and every shape still occurs in many others.
UNSEEN = {(color, SHAPES[(3 * n + 1) % 8]) for n, color in enumerate(HUES)}
SIZE_NAMES = list(SIZES)


def caption(parts: list[Part]) -> str:
    """[(size, color, shape), ...], the top object first, as words: "something red on a small ring"."""
    names = []
    for size, color, shape in parts:
        words = " ".join(word for word in (size, color, shape or "thing") if word)
        if not size and not shape:
            names.append(f"something {color}".strip())
        else:
            names.append(f"{'an' if words[0] == 'o' else 'a'} {words}")
    return " on ".join(names)


def parse_caption(text: str) -> list[Part]:
    """The inverse of caption()."""
    def find(words: list[str], known: list[str]) -> str:
        return next((word for word in words if word in known), "")

    return [(find(words, SIZE_NAMES), find(words, list(HUES)), find(words, SHAPES))
            for words in (part.split() for part in text.split(" on "))]


def is_open(parts: list[Part]) -> bool:
    """Whether a colour or a shape is left open, so that a prompt has answers of several kinds."""
    return not all(color and shape for _, color, shape in parts)


def group(parts: list[Part]) -> str:
    """The kind of a prompt: "open", "hard" (three objects, all named) or "closed" (one or two, all named)."""
    return "open" if is_open(parts) else "hard" if len(parts) == 3 else "closed"


def unseen_pair(top: Part, bottom: Part) -> bool:
    """A fixed eighth of all pairs of (color, shape) that stand on each other is kept out of training."""
    return (17 * list(HUES).index(top[1]) + 5 * SHAPES.index(top[2]) + 11 * list(HUES).index(bottom[1])
            + 3 * SHAPES.index(bottom[2])) % 8 == 0


def is_unseen(parts: list[Part]) -> bool:
    """Whether a caption belongs to the test side of the split.

    With everything named, that is a combination which training never shows; with something left open, a phrase which
    training never uses (a fixed sixth of them).
    """
    named = [all(part[1:]) for part in parts]
    return (any(part[1:] in UNSEEN for part in parts)
            or any(a and b and unseen_pair(*pair) for a, b, pair in zip(named, named[1:], zip(parts, parts[1:])))
            or is_open(parts) and zlib.crc32(caption(parts).encode()) % 6 == 0)


def leave_open(parts: list[Part], rng: random.Random) -> list[Part]:
    """The same scene in a caption that training may use and that leaves some colours or shapes unsaid."""
    while True:
        left = [(size, color if rng.random() < 0.6 else "", shape if rng.random() < 0.6 else "")
                for size, color, shape in parts]
        if is_open(left) and not is_unseen(left):
            return left


def training_caption(parts: list[Part], rng: random.Random) -> list[Part]:
    """Two captions of five leave something open."""
    return leave_open(parts, rng) if rng.random() < 0.4 else parts


def fill_in(parts: list[Part], rng: random.Random) -> list[Part]:
    """Everything that a caption leaves open, drawn as the training scenes are: any scene that training may show."""
    while True:
        full = [(size, color or rng.choice(list(HUES)), shape or rng.choice(SHAPES)) for size, color, shape in parts]
        if not is_open(parts) or not is_unseen(full):
            return full


def write_prompts(folder: Path) -> None:
    """shapes_test.txt: 90 prompts never trained on; shapes_train.txt: 240 others. Closed, open and hard in turn."""
    rng = random.Random(0)
    every = [(color, shape) for color in HUES for shape in SHAPES]
    unseen = sorted(UNSEEN)

    def draw(kind: str, test: bool) -> list[Part]:
        count = 3 if kind == "hard" else 1 if rng.random() < 0.35 else 2
        parts = []
        for _ in range(count):
            pool = unseen if test and kind != "open" and rng.random() < 0.3 else every
            parts.append((rng.choice(SIZE_NAMES), *rng.choice(pool)))
        if kind == "open":
            parts = [(size, color if rng.random() < 0.6 else "", shape if rng.random() < 0.6 else "")
                     for size, color, shape in parts]
        return parts

    def fits(parts: list[Part], kind: str, test: bool) -> bool:
        named = [part for part in parts if all(part[1:])]
        if test and kind == "open" and (any(part[1:] in UNSEEN for part in named) or len(named) == 2):
            return False                                            # what an open prompt names has been seen
        return group(parts) == kind and is_unseen(parts) == test

    for name, each in (("test", 30), ("train", 80)):
        groups = []
        for kind in ("closed", "open", "hard"):
            prompts = []
            while len(prompts) < each:
                parts = draw(kind, name == "test")
                if fits(parts, kind, name == "test") and caption(parts) not in prompts:
                    prompts.append(caption(parts))
            groups.append(prompts)
        lines = [prompt for row in zip(*groups) for prompt in row]  # any first so many are of all kinds
        write_atomic(folder / f"shapes_{name}.txt", "\n".join(lines) + "\n")


# ---- Geometry: signed distances (or lower bounds of them), sphere-traced ------------------------------------------


def half_height(shape: str, size: float, stretch: float) -> float:
    return size * {"sphere": 0.95, "cube": 0.75 * stretch, "cylinder": 0.9 * stretch, "cone": 1.05 * stretch,
                   "ring": 1.02, "pill": 0.52, "cross": 0.98, "diamond": 1.15 * stretch}[shape]


def distance(shape: str, p: Tensor, size: Tensor, stretch: Tensor) -> Tensor:
    """Signed distance (points,) to a shape centred at the origin. p (points, 3); size, stretch (points,)."""
    x, y, z = p.unbind(-1)
    h = half_height(shape, size, stretch)

    def box(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        q = torch.stack([x.abs() - a, y.abs() - b, z.abs() - c], -1)
        return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)

    if shape == "sphere":
        return p.norm(dim=-1) - h
    if shape == "cube":
        return box(0.75 * size, h, 0.75 * size)
    if shape == "cylinder":
        q = torch.stack([torch.hypot(x, z) - 0.72 * size, y.abs() - h], -1)
        return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)
    if shape == "cone":
        radius = 0.92 * size
        return torch.maximum((torch.hypot(x, z) * 2 * h + (y - h) * radius) / torch.hypot(2 * h, radius), -h - y)
    if shape == "ring":
        thickness = 0.27 * size * stretch
        return torch.hypot(torch.hypot(x, y) - (h - thickness), z) - thickness
    if shape == "pill":
        return torch.stack([x - x.clamp(-0.62 * size, 0.62 * size), y, z], -1).norm(dim=-1) - h
    if shape == "cross":
        arm, bar = h, 0.29 * size * stretch
        return torch.stack([box(arm, bar, bar), box(bar, arm, bar), box(bar, bar, arm)]).amin(0)
    a = 0.92 * size                                                                                # diamond
    return ((x.abs() + z.abs()) / a + y.abs() / h - 1) / (2 / a ** 2 + 1 / h ** 2).sqrt()


def place(named: list[tuple[str, str]], rng: random.Random) -> dict:
    """A scene of objects (size, shape), top first, without colours: exact sizes, yaw, stretch and heights."""
    parts = [{"shape": shape, "size": size, "yaw": rng.uniform(0, 2 * math.pi), "stretch": rng.uniform(0.88, 1.12),
              "radius": rng.uniform(*SIZES[size])} for size, shape in named]
    # A stack shrinks until it is inside every view; a single object keeps the size that its word promises.
    total = sum(half_height(part["shape"], part["radius"], part["stretch"]) for part in parts)
    fit = min((1.0, 0.85, 0.75)[len(parts) - 1], (0.38, 0.4, 0.41)[len(parts) - 1] / total)
    for part in parts:
        part["radius"] *= fit
        part["half"] = half_height(part["shape"], part["radius"], part["stretch"])
    y = sum(part["half"] for part in parts)
    for part in parts:
        part["y"] = y - part["half"]
        y -= 2 * part["half"]
    return {"parts": parts}


def draw_geometry(rng: random.Random) -> dict:
    """One to three objects without colours; half of them of no said size."""
    count = rng.choices((1, 2, 3), (0.35, 0.4, 0.25))[0]
    return place([(rng.choice(["", "", "small", "big"]), rng.choice(SHAPES)) for _ in range(count)], rng)


def scene_table(scenes: list[dict]) -> tuple[Tensor, Tensor]:
    """Per scene and slot (n, 3): the shape's number, -1 for none; and (n, 3, 5) radius, stretch, cos, sin of yaw, y."""
    kinds, values = torch.full((len(scenes), 3), -1), torch.zeros(len(scenes), 3, 5)
    for n, scene in enumerate(scenes):
        for slot, part in enumerate(scene["parts"]):
            kinds[n, slot] = SHAPES.index(part["shape"])
            values[n, slot] = torch.tensor([part["radius"], part["stretch"], math.cos(part["yaw"]),
                                            math.sin(part["yaw"]), part["y"]])
    return kinds, values


def scene_distance(p: Tensor, rows: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Of points p (M, 3) in scenes rows (M,): distance, nearest part (M,), position in its axes and size (M, 3)."""
    best = torch.full(rows.shape, 1e3)
    nearest, own = torch.zeros_like(rows), torch.zeros_like(p)
    for slot in range(3):
        kinds = table[0][rows, slot]
        for number, shape in enumerate(SHAPES):
            pick = (kinds == number).nonzero()[:, 0]
            if not len(pick):
                continue
            size, stretch, cos, sin, y = table[1][rows[pick], slot].unbind(-1)
            q = p[pick]
            q = torch.stack([q[:, 0] * cos - q[:, 2] * sin, q[:, 1] - y, q[:, 0] * sin + q[:, 2] * cos], -1)
            d = distance(shape, q, size, stretch)
            closer = d < best[pick]
            pick = pick[closer]
            best[pick], nearest[pick], own[pick] = d[closer], slot, (q / size[:, None])[closer]
    return best, nearest, own


def input_cameras() -> Tensor:
    """c2w (4, 4, 4) of the four views, on the default device."""
    return r2d3.input_cameras(1, torch.get_default_device())[0][0]


def trace(scenes: list[dict], line: Tensor | None = None) -> dict[str, Tensor]:
    """Sphere-trace every scene from the four cameras. (n, 4, G, G): hit, z, part; (.., 3): world normal, own;
    (.., 2): across.

    `line` (G,) places the rays across the picture, -0.5 to 0.5; left out, they are those of the splat grid: splat
    (i, j) sits on the picture's (i, j) / (GRID - 1).
    """
    line = torch.linspace(-0.5, 0.5, GRID) if line is None else line
    shape = (len(scenes), 4, len(line), len(line))
    c2w = input_cameras()
    y, x = torch.meshgrid(line / r2d3.FXFY, line / r2d3.FXFY, indexing="ij")
    rays = torch.einsum("vij,hwj->vhwi", c2w[:, :3, :3], torch.stack([x, y, torch.ones_like(x)], -1))
    rays = rays.expand(*shape, 3).reshape(-1, 3)
    origin = c2w[None, :, None, None, :3, 3].expand(*shape, 3).reshape(-1, 3)
    rows = torch.arange(len(scenes)).repeat_interleave(len(rays) // len(scenes))
    table, z, length = scene_table(scenes), torch.full((len(rays),), 0.75), rays.norm(dim=-1)
    going = torch.arange(len(rays))                                 # rays that have neither arrived nor left
    for _ in range(64):
        d, _, _ = scene_distance(origin[going] + rays[going] * z[going, None], rows[going], table)
        z[going] += d / length[going]
        going = going[(d.abs() > 2e-4) & (z[going] < 2.2)]
    p = origin + rays * z[:, None]
    hit = z < 2.1
    hit[going] &= scene_distance(p[going], rows[going], table)[0].abs() < 2e-3
    on = hit.nonzero()[:, 0]
    part, own, normal = torch.zeros(len(p), dtype=torch.uint8), torch.zeros_like(p), torch.zeros_like(p)
    _, nearest, own[on] = scene_distance(p[on], rows[on], table)
    part[on] = nearest.to(torch.uint8)
    step = 1e-3 * torch.eye(3)
    normal[on] = torch.stack([scene_distance(p[on] + e, rows[on], table)[0]
                              - scene_distance(p[on] - e, rows[on], table)[0] for e in step], -1)
    normal = F.normalize(normal, dim=-1)
    # How far a splat reaches over the surface along its two axes: over the gap to its neighbours, which is wide where
    # the surface is seen at a low angle, but not over an edge, where the distance to the scene grows.
    R = c2w[:, :3, :3].repeat_interleave(len(line) ** 2, 0).repeat(len(scenes), 1, 1)[on]
    n = in_front(torch.einsum("pij,pi->pj", R, normal[on]))
    pixel = z[on] / (r2d3.FXFY * (GRID - 1))
    across = torch.zeros(len(p), 2)
    for axis, most in ((0, 1.8), (1, 2.5)):
        tangent = torch.eye(3)[axis] - n[:, axis:axis + 1] / (1 - n[:, 2:]) * (n - torch.tensor([0.0, 0.0, 1.0]))
        tangent = torch.einsum("pij,pj->pi", R, tangent)
        wide = 0.67 * pixel * (1 + (n[:, axis] / n[:, 2]) ** 2).sqrt().clamp(max=most)
        over = torch.stack([scene_distance(p[on] + sign * 1.5 * wide[:, None] * tangent, rows[on], table)[0]
                            for sign in (1, -1)]).amax(0).clamp(min=0)
        across[on, axis] = torch.maximum(wide - over, torch.minimum(wide, 0.5 * pixel))
    return {"hit": hit.view(shape), "z": z.view(shape).half(), "part": part.view(shape),
            "normal": normal.view(*shape, 3).half(), "own": own.view(*shape, 3).half(),
            "across": across.view(*shape, 2).half()}


def in_front(n: Tensor) -> Tensor:
    """Normals in camera space (..., 3), turned a little where rounding has them look away from the camera."""
    return F.normalize(torch.cat([n[..., :2], n[..., 2:].clamp(max=-0.02)], -1), dim=-1)


def turned(traced: dict[str, Tensor], rows: list[int], quarters: Tensor) -> dict[str, Tensor]:
    """Some of the scenes, each turned by quarters (n,) of a circle: the cameras swap places, so nothing is traced."""
    views = (torch.arange(4) - quarters[:, None]) % 4
    out = {key: tensor[torch.tensor(rows)[:, None], views] for key, tensor in traced.items()}
    x, y, z = out["normal"].unbind(-1)
    n = quarters.view(-1, 1, 1, 1)
    cos, sin = (torch.tensor(values)[n] for values in ((1, 0, -1, 0), (0, 1, 0, -1)))
    out["normal"] = torch.stack([cos * x + sin * z, y, cos * z - sin * x], -1)
    return out


def quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    w, v, s, u = a[..., :1], a[..., 1:], b[..., :1], b[..., 1:]
    return torch.cat([w * s - (v * u).sum(-1, keepdim=True), w * u + s * v + torch.cross(v, u, dim=-1)], -1)


def camera_quaternions() -> Tensor:
    """(4, 4) wxyz of the input cameras' rotations."""
    R = input_cameras()[:, :3, :3]
    w = (1 + R.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp(min=0).sqrt() / 2
    q = []
    for matrix, real in zip(R, w):
        if real > 0.1:
            axis = torch.stack([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
            q.append(torch.cat([real[None], axis / (4 * real)]))
        else:                                                       # half a turn: R = 2 a a^T - 1
            values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
            axis = vectors[:, values.argmax()]
            # q and -q are the same rotation, but not the same numbers to an autoencoder, and the sign of an eigenvector is
            # whatever the machine's LAPACK gives. So it is set: y is positive, or x where y is zero.
            positive = axis[1] if axis[1].abs() > 1e-4 else axis[0]
            q.append(torch.cat([torch.zeros(1), axis * positive.sign()]))
    return torch.stack(q)


def geometry_channels(traced: dict[str, Tensor]) -> Tensor:
    """(n, 4, 12, GRID, GRID) in [-1, 1] with colours still empty (background: white, tiny, transparent, facing us)."""
    hit, z, normal = traced["hit"], traced["z"].float(), traced["normal"].float()
    R = input_cameras()[:, :3, :3]
    facing = torch.tensor([0.0, 0.0, -1.0])
    n = torch.where(hit[..., None], torch.einsum("vij,bvhwi->bvhwj", R, normal), facing)          # camera space
    n = in_front(n)
    turn = torch.cat([1 + (n * facing).sum(-1, keepdim=True), torch.cross(facing.expand_as(n), n, dim=-1)], -1)
    flip = torch.tensor([0.0, 1.0, 0.0, 0.0])                                                     # +z to -z
    camera = camera_quaternions()[:, None, None].expand(len(z), -1, GRID, GRID, -1)
    quats = quaternion_product(quaternion_product(camera, F.normalize(turn, dim=-1)), flip.expand_as(camera))
    thin = 0.25 * z[..., None] / (r2d3.FXFY * (GRID - 1))
    scales = torch.cat([traced["across"].float(), thin], -1)
    low, high = SCALE_RANGE
    scales = torch.where(hit[..., None], 2 * (high - scales) / (high - low) - 1, 1.0).clamp(-1, 1)
    depth = torch.where(hit, (z - r2d3.RADIUS) / DEPTH_SCALE, 0.0)
    opacity = torch.where(hit, 1.0, -1.0)
    return torch.cat([torch.ones_like(n), scales, quats, opacity[..., None], depth[..., None]], -1).movedim(-1, 2)


# ---- Colours: what a caption names, and what it does not ---------------------------------------------------------


def draw_color(name: str, rng: random.Random) -> tuple[Tensor, Tensor, int, float, float]:
    """Two tones of a named colour and a pattern: 0 plain, 1 bands, 2 segments, 3 checks; frequency and phase."""
    saturation, value = rng.uniform(0.35, 0.95), rng.uniform(0.6, 0.95)
    if name in ("orange", "yellow"):
        saturation, value = rng.uniform(0.5, 0.95), rng.uniform(0.78, 0.98)
    hue = rng.uniform(0, 360) if name == "gray" else HUES[name] + rng.uniform(-6, 6)
    if name == "gray":
        saturation, value = rng.uniform(0, 0.04), rng.uniform(0.35, 0.75)
    other = (saturation * rng.uniform(0.55, 0.9), value * rng.uniform(0.62, 0.82))
    tones = [torch.tensor(colorsys.hsv_to_rgb(hue % 360 / 360, s, v)) for s, v in ((saturation, value), other)]
    if rng.random() < 0.5:
        tones.reverse()
    pattern = rng.choice([0, 0, 0, 1, 2, 3])
    return *tones, pattern, rng.uniform(3.0, 5.0), rng.uniform(0, 2 * math.pi)


def colored(traced: dict[str, Tensor], colors: list[list[str]], rng: random.Random) -> Tensor:
    """Lit colours in [0, 1] of traced pictures (n, 4, G, G, 3), on white; colors[n] names the parts, top first."""
    rgb = torch.ones(*traced["hit"].shape, 3)
    for n, names in enumerate(colors):
        for slot, name in enumerate(names):
            first, second, pattern, frequency, phase = draw_color(name, rng)
            tone = first
            if pattern:
                x, y, z = traced["own"][n].float().unbind(-1)
                bands = torch.sin(frequency * y + phase) > 0
                segments = torch.sin(round(frequency) * torch.atan2(z, x) + phase) > 0
                where = (bands, segments, bands ^ segments)[pattern - 1]
                tone = torch.where(where[..., None], second, first)
            rgb[n] = torch.where((traced["part"][n] == slot)[..., None], tone, rgb[n])
    light = 0.7 + 0.36 * (traced["normal"].float() @ LIGHT.to(rgb)).clamp(min=0)
    return torch.where(traced["hit"][..., None], (rgb * light[..., None]).clamp(0, 1), 1.0)


def paint(traced: dict[str, Tensor], colors: list[list[str]], rng: random.Random) -> Tensor:
    """The splat grids (n, 4, 12, GRID, GRID) of traced scenes in these colours."""
    grids = geometry_channels(traced)
    grids[:, :, :3] = colored(traced, colors, rng).movedim(-1, 2) * 2 - 1
    return grids

# ---- Stages: each leaves a file in the work folder ----------------------------------------------------------------


def make_data(work: Path, count: int, seed: int) -> dict:
    """`count` traced geometries: {"traced", "scenes"}; kept in the work folder."""
    path = work / f"data{seed}.pt"
    if path.is_file():
        return torch.load(path, weights_only=False)
    rng = random.Random(seed)
    data = trace_all([draw_geometry(rng) for _ in range(count)])
    write_atomic(path, to_bytes(lambda file: torch.save(data, file)))
    return data


def trace_all(scenes: list[dict]) -> dict:
    """{"scenes", "traced"} of many scenes: computed on the default device, kept on the CPU."""
    at_once = 32 if torch.get_default_device().type == "cpu" else 512
    chunks = [{key: tensor.cpu() for key, tensor in trace(scenes[n:n + at_once]).items()}
              for n in tqdm(range(0, len(scenes), at_once), desc="tracing")]
    return {"scenes": scenes, "traced": {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}}


def draw_scenes(data: dict, rows: list[int], rng: random.Random, seen: bool | None) -> tuple[Tensor, list]:
    """Turn and paint scenes: grids (n, 4, 12, GRID, GRID), and their parts. seen: True what training may see; None any.
    """
    every = []
    for n in rows:
        while True:
            named = [(part["size"], rng.choice(list(HUES)), part["shape"]) for part in data["scenes"][n]["parts"]]
            if seen is None or is_unseen(named) != seen:
                break
        every.append(named)
    quarters = torch.tensor([rng.randrange(4) for _ in rows])
    return paint(turned(data["traced"], rows, quarters), [[part[1] for part in named] for named in every], rng), every


class Stage:
    """A training loop that can be stopped: step counter, learning rate, checkpoint, EMA.

    It ends after `steps` steps, or after `minutes` of its own time, whichever comes first; the learning rate comes
    down before the end in either case.
    """

    def __init__(self, work: Path, name: str, model: torch.nn.Module, steps: int, minutes: float, lr: float,
                 ema: float):
        self.path, self.name, self.model, self.steps, self.lr = work / f"{name}.pt", name, model, steps, lr
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
        self.minutes, self.decay, self.step, self.seconds, self.progress, self.loss = minutes, ema, 0, 0.0, 0.0, 0.0
        self.average = {key: value.clone() for key, value in model.state_dict().items()}
        if self.path.is_file():
            state = torch.load(self.path, weights_only=True, map_location=self.device)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if state.get("steps", steps) != steps:
                raise SystemExit(f"{self.path} was begun for {state['steps']} steps, not {steps}: use another --work")
            self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]
            self.progress, self.loss = state["progress"], state["loss"]

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "average": self.average, "step": self.step, "steps": self.steps,
                 "loss": self.loss, "optimizer": self.optimizer.state_dict(), "seconds": self.seconds,
                 "progress": self.progress}
        write_atomic(self.path, to_bytes(lambda file: torch.save(state, file)))

    def gradients(self, loss_of: Callable, *numbers: random.Random | torch.Generator | None) -> Tensor:
        """The loss; its gradients are left in the model. `numbers`: loss_of's two sources, None for the GPU's own."""
        self.optimizer.zero_grad()
        loss = loss_of(*numbers)
        loss.backward()
        return loss.detach()

    def run(self, loss_of: Callable) -> None:
        """Train to the end: loss_of(rng, generator) -> loss. Warm-up, then constant, then down over the last third."""
        saved, begun = time.time(), time.time() - self.seconds
        values = self.model.state_dict()
        floats = [key for key, value in values.items() if value.is_floating_point()]
        replay = None
        if self.device.type == "cuda" and self.progress < 1:
            # Most of a step of so small a network is launching kernels, so it becomes one CUDA graph, whose random
            # numbers are the GPU's own. Of the path on a GPU only the tracing of scenes has been run on one so far.
            torch.cuda.manual_seed(self.step)
            replay, on_gpu = bench.captured(lambda: self.gradients(loss_of, None, None))
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=5)
        while self.progress < 1:
            rate = self.lr * min(1, (self.step + 1) / 200) * min(1, 3 * (1 - self.progress) + 0.01)
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = rate
            if replay:
                replay()
                loss = on_gpu
            else:
                loss = self.gradients(loss_of, random.Random(f"{self.name}{self.step}"), r2d3.seeded(self.step))
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            follow = get_ema_multi_avg_fn(min(self.decay, (1 + self.step) / (10 + self.step)))
            follow([self.average[key] for key in floats], [values[key] for key in floats], self.step)
            if self.step % 20 == 1:                                 # a GPU is not waited for at every step
                self.loss = 0.8 * self.loss + 0.2 * loss.item() if self.step > 1 else loss.item()
            self.seconds = time.time() - begun
            self.progress = max(self.step / self.steps, self.seconds / (60 * self.minutes))
            bar.update()
            bar.set_postfix(loss=f"{self.loss:.4f}", progress=f"{self.progress:.3f}", refresh=False)
            if time.time() - saved > 30 or self.progress >= 1:
                saved = time.time()
                self.save()
        self.model.load_state_dict(self.average)
        self.model.eval().requires_grad_(False)


VAE = {"in_channels": 12, "out_channels": 12, "down_block_types": ["DownEncoderBlock2D"] * 3,
       "up_block_types": ["UpDecoderBlock2D"] * 3, "block_out_channels": [32, 64, 64], "layers_per_block": 1,
       "latent_channels": 8, "norm_num_groups": 8, "sample_size": GRID, "mid_block_add_attention": False}
CHANNEL_WEIGHTS = torch.tensor([2.0] * 3 + [1.0] * 3 + [1.0] * 4 + [1.0] + [4.0]).view(12, 1, 1)


def reconstruction_loss(out: Tensor, grid: Tensor) -> Tensor:
    """L1 in which the object counts more than the background; opacity counts everywhere."""
    weight = (0.03 + 1.4 * (grid[:, 10:11] > 0)).expand(-1, 12, -1, -1).clone()
    weight[:, 10] = 1.0
    return ((out - grid).abs() * weight * CHANNEL_WEIGHTS).mean()


def picture_loss(out: Tensor, grids: Tensor, generator: torch.Generator) -> Tensor:
    """L1 between pictures of decoded and of true splats (n, 4, 12, GRID, GRID), one random view of each object."""
    cameras = random_cameras(len(grids), 1, generator)
    true, seen = (r2d3.render(splats(each), *cameras, 64) for each in (grids, out))
    return (seen.image - true.image).abs().mean() + (seen.alpha - true.alpha).abs().mean()


def random_cameras(count: int, views: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cameras anywhere that the reward could look from: (count, views, 4, 4), (count, views, 4)."""
    u = torch.rand(2, count, views, generator=generator)
    return r2d3.orbit(r2d3.ELEVATION + 40 * u[0] - 20, 360 * u[1]), r2d3.intrinsics(count, views)


def train_autoencoder(work: Path, make: Callable, steps: int, minutes: float) -> torch.nn.Module:
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE)
    stage = Stage(work, "ae", vae, steps, minutes, 1.5e-3, ema=0.998)
    data = make() if stage.progress < 1 else None

    def loss_of(rng: random.Random, generator: torch.Generator) -> Tensor:
        grids, _ = draw_scenes(data, rng.choices(range(len(data["scenes"])), k=4), rng, True)
        flat = grids.flatten(0, 1)
        # bfloat16 for speed, until the learning rate goes down and its rounding would be what is left to learn
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.progress < 0.9):
            posterior = vae.encode(flat).latent_dist
            out = vae.decode(posterior.sample(generator)).sample.float()
        loss = reconstruction_loss(out, flat) + 1e-4 * posterior.kl().float().mean() / latent_numbers()
        if stage.progress > 0.6:                                    # what counts in the end is how it looks
            loss = loss + 4 * picture_loss(out.clamp(-1, 1).unflatten(0, (-1, 4)), grids, generator)
        return loss

    stage.run(loss_of)
    return vae


def latent_numbers() -> int:
    """How many numbers a view's latent has."""
    return VAE["latent_channels"] * (GRID // 4) ** 2


# ---- Judges: what the objects are called, and how their surfaces lie ------------------------------------------------

TOWER = {"dim": 64, "width": 32, "layers": 2}


def reconstruct(vae: torch.nn.Module, grids: Tensor) -> Tensor:
    """Grids (n, 4, 12, GRID, GRID) through the autoencoder and back."""
    return vae.decode(vae.encode(grids.flatten(0, 1)).latent_dist.mode()).sample.clamp(-1, 1).unflatten(0, (-1, 4))


def splats(grids: Tensor) -> r2d3.Gaussians:
    return r2d3.splat_grid_to_gaussians(grids, *r2d3.input_cameras(len(grids)), SCALE_RANGE, DEPTH_SCALE)


@torch.no_grad()
def make_pictures(work: Path, make: Callable, vae: torch.nn.Module, times: int) -> dict:
    """Every scene `times` times in new colours, three pictures each; every other 32 scenes as decoded."""
    path = work / "pictures.pt"
    if path.is_file():
        return torch.load(path, weights_only=False)
    data, rng, generator = make(), random.Random("pictures"), r2d3.seeded(2)
    images, normals, every = [], [], []
    order = [n for _ in range(times) for n in rng.sample(range(len(data["scenes"])), len(data["scenes"]))]
    for start in tqdm(range(0, len(order), 32), desc="pictures"):
        grids, parts = draw_scenes(data, order[start:start + 32], rng, None)
        if start // 32 % 2:
            grids = reconstruct(vae, grids)
        out = r2d3.render(splats(grids), *random_cameras(len(grids), 3, generator), 64)
        images.append((out.image.flatten(0, 1).clamp(0, 1) * 255).round().byte())
        normals.append((out.normal * (out.alpha > 0.5) * 127).flatten(0, 1).round().char())
        every += [named for named in parts for _ in range(3)]
    pictures = {"images": torch.cat(images), "normals": torch.cat(normals), "parts": every}
    write_atomic(path, to_bytes(lambda file: torch.save(pictures, file)))
    return pictures


def renamed(parts: list[Part], slot: int, color: str, shape: str) -> str:
    """The caption with another colour and shape in one place."""
    return caption([(part[0], color, shape) if n == slot else part for n, part in enumerate(parts)])


def agrees(parts: list[Part], said: list[Part]) -> bool:
    """Whether a scene is one of those that a caption allows."""
    return len(parts) == len(said) and all(not word or word == true for part, words in zip(parts, said)
                                           for true, word in zip(part, words))


@contextlib.contextmanager
def attention_in_float32() -> Iterator[None]:
    """Under autocast, attention alone in float32: on a CPU its backward pass in bfloat16 takes ten times as long."""
    stock = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *options, **named) -> Tensor:
        mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        with torch.autocast("cpu", enabled=False):
            return stock(q.float(), k.float(), v.float(), mask, *options, **named).to(q.dtype)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock


def train_tower(work: Path, make: Callable, steps: int, minutes: float) -> shapes.ImageTextTower:
    """Contrastive: every picture finds its caption in the batch's, and among its own with one word changed."""
    torch.manual_seed(1)
    tower = shapes.ImageTextTower(shapes.WordTable(VOCAB, TOWER["dim"], MAX_LENGTH), **TOWER)
    stage = Stage(work, "tower", tower, steps, minutes, 1.5e-3, ema=0.998)

    pictures = make() if stage.progress < 1 else {"parts": []}
    often = [len(parts) ** 2 for parts in pictures["parts"]]        # small objects in a stack are the hard ones

    def loss_of(rng: random.Random, generator: torch.Generator) -> Tensor:
        rows = rng.choices(range(len(pictures["parts"])), often, k=64)
        said, candidates = [], []
        for row in rows:
            parts = pictures["parts"][row]
            words = leave_open(parts, rng) if rng.random() < 0.4 else list(parts)
            said.append(words)
            slot = rng.randrange(len(parts))                        # this one is named in full, and then wrongly
            _, color, shape = words[slot] = parts[slot]
            other_colors = [other for other in HUES if other != color]      # fewer: they are easier to see
            other_shapes = [other for other in SHAPES if other != shape]
            wrong = [renamed(words, slot, other, shape) for other in rng.sample(other_colors, 2)]
            wrong += [renamed(words, slot, color, other) for other in rng.sample(other_shapes, 5)]
            candidates += [caption(words), *wrong]
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.progress < 0.8):
            images = pictures["images"][rows].float() / 255
            images = torch.where(torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5, images.flip(-1), images)
            gray = images.mean(1, keepdim=True)                     # a caption does not name the saturation
            images = gray + (0.7 + 1.1 * torch.rand(64, 1, 1, 1, generator=generator)) * (images - gray)
            images = images.clamp(0, 1)
            seen = tower.image(images + 0.01 * torch.randn(images.shape, generator=generator)).float()
            words = tower.text([caption(parts) for parts in said] + candidates).float()
        scale = tower.logit_scale.exp().clamp(max=50)
        hard = torch.einsum("nd,nkd->nk", seen, words[len(rows):].unflatten(0, (len(rows), -1))) * scale
        every = seen @ words[:len(rows)].T * scale
        # A caption may be true of other pictures of the batch too: those are no counterexamples.
        true = torch.tensor([[agrees(pictures["parts"][row], words) for words in said] for row in rows])
        every = every.masked_fill(true & ~torch.eye(len(rows), dtype=torch.bool), -1e4)
        own = torch.arange(len(rows))
        return (F.cross_entropy(hard, 0 * own) + F.cross_entropy(every, own) + F.cross_entropy(every.T, own)) / 3

    with attention_in_float32():
        stage.run(loss_of)
    return tower


def train_normals(work: Path, make: Callable, steps: int, minutes: float) -> shapes.NormalEstimator:
    """Cosine loss on the object's pixels."""
    torch.manual_seed(2)
    estimator = shapes.NormalEstimator()
    stage = Stage(work, "normal", estimator, steps, minutes, 2e-3, ema=0.998)
    pictures = make() if stage.progress < 1 else None

    def loss_of(rng: random.Random, generator: torch.Generator) -> Tensor:
        rows = rng.choices(range(len(pictures["parts"])), k=16)
        images, normals = pictures["images"][rows].float() / 255, pictures["normals"][rows].float()
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.progress < 0.8):
            estimate = estimator(images + 0.01 * torch.randn(images.shape, generator=generator))
        inside = normals.norm(dim=1) > 60
        return 1 - ((estimate.float() * F.normalize(normals, dim=1)).sum(1) * inside).sum() / inside.sum()

    stage.run(loss_of)
    return estimator


# ---- Denoiser ------------------------------------------------------------------------------------------------------

NET = {"sample_size": GRID // 4, "patch_size": 2, "in_channels": 14, "out_channels": 8, "num_layers": 6,
       "num_attention_heads": 4, "attention_head_dim": 32, "cross_attention_dim": 128, "caption_channels": 64,
       "interpolation_scale": 1, "use_additional_conditions": False}
# A sampler of few steps loses spread: each step ends at the mean of what it may still become, not at one of it. Of a
# Gaussian's standard deviation 20 steps on DiffSplat's levels leave 0.84 to 0.87; 30 steps on these leave 0.91 to 0.93.
BETAS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.012}
STEPS, GUIDANCE = 30, 1.0                   # STEPS is also `steps` of shapes in support/presets.py


@torch.no_grad()
def make_latents(work: Path, make: Callable, vae: torch.nn.Module, times: int) -> dict:
    """Latents (n, 4, 8, h, w) and parts of every scene in `times` colourings, training combinations only.

    Computed on the default device, kept on the CPU."""
    device = torch.get_default_device()
    path = work / f"latents_{device.type}.pt"                       # of other scenes on a GPU
    if path.is_file():
        return torch.load(path, weights_only=False)
    data, rng, latents, every = make(), random.Random("latents"), [], []
    data["traced"] = {key: tensor.to(device) for key, tensor in data["traced"].items()}
    vae.to(device)
    for _ in range(times):
        for start in tqdm(range(0, len(data["scenes"]), 32), desc="latents"):
            grids, parts = draw_scenes(data, list(range(start, min(start + 32, len(data["scenes"])))), rng, True)
            with torch.autocast(device.type, torch.bfloat16):
                latents.append(vae.encode(grids.flatten(0, 1)).latent_dist.mode().unflatten(0, (-1, 4)).half().cpu())
            every += parts
    vae.cpu()
    out = {"latents": torch.cat(latents), "parts": every}
    write_atomic(path, to_bytes(lambda file: torch.save(out, file)))
    return out


def new_base(vae: torch.nn.Module, mean: Tensor, std: Tensor,
             device: str) -> tuple[r2d3.DiffSplat, torch.nn.Module]:
    """An untrained `shapes`, and the module that holds what is to be trained: network and words."""
    from diffusers import PixArtTransformer2DModel
    torch.manual_seed(3)
    net, text = PixArtTransformer2DModel(**NET), shapes.WordTable(VOCAB, NET["caption_channels"], MAX_LENGTH)
    torch.nn.init.zeros_(net.proj_out.weight)
    torch.nn.init.zeros_(net.proj_out.bias)
    torch.nn.init.normal_(net.adaln_single.linear.weight, std=0.02)
    settings = {"image_size": GRID, "prediction_type": "v_prediction", "guidance": GUIDANCE, "betas": BETAS,
                "latent_mean": mean, "latent_std": std, "scale_range": SCALE_RANGE, "depth_scale": DEPTH_SCALE,
                "half_image_shift": False, "eval_size": 64, "lora_targets": shapes.LORA_TARGETS}
    base = r2d3.DiffSplat(net, vae, text.to(device), settings, device)
    return base, torch.nn.ModuleDict({"net": net.requires_grad_(True), "text": text})


def draw_captions(every: list[list[Part]], text: shapes.WordTable, times: int) -> Tensor:
    """Word numbers (n, times, MAX_LENGTH), uint8: training captions of n scenes, drawn ahead."""
    rng = random.Random("captions")
    said = [caption(training_caption(parts, rng)) for parts in every for _ in range(times)]
    return torch.cat([text.tokens(said[n:n + 1000]).byte().cpu()
                      for n in range(0, len(said), 1000)]).unflatten(0, (-1, times))


def train_denoiser(work: Path, latents: dict, vae: torch.nn.Module, steps: int, minutes: float,
                   compiled: bool = False, device: str = "cpu") -> tuple:
    """Squared error of v, at stratified noise levels; a tenth of the captions is left out."""
    from diffusers import DDIMScheduler
    every = latents["latents"]
    # One scale for all channels: some hold next to nothing, and to blow them up would make the network learn noise.
    mean = every.float().mean((0, 1, 3, 4))
    std = (every - mean.view(-1, 1, 1)).square().mean().sqrt().expand(len(mean)).clone()
    base, module = new_base(vae, mean, std, device)
    gpu = base.device.type == "cuda"
    batch, rate = (256, 1.8e-3) if gpu else (32, 1.2e-3)
    stage = Stage(work, "denoiser", module, steps, minutes, rate, ema=0.999)
    alphas, captions = DDIMScheduler(**BETAS).alphas_cumprod.sqrt().to(device), 4
    tokens, every = draw_captions(latents["parts"], base.text, captions).to(device), every.to(device)

    def loss_of(rng: random.Random | None, generator: torch.Generator | None) -> Tensor:
        source = {"generator": generator, "device": device}
        rows = torch.randint(len(every), (batch,), **source)
        x0 = (every[rows].float() - base.latent_mean) / base.latent_std
        t = 1000 * (torch.arange(batch, device=device) + torch.rand(batch, **source)) / batch          # stratified
        t = t.long().clamp(max=999)                                 # 255 + 0.9999999 is 256 in float32
        noise = torch.randn(x0.shape, **source)
        alpha = r2d3.per_sample(alphas[t], x0)
        x = alpha * x0 + (1 - alpha ** 2).sqrt() * noise
        words = tokens[rows, torch.randint(captions, (batch,), **source)].long()
        words = words * (torch.rand(batch, 1, **source) > 0.1)
        with torch.autocast(base.device.type, torch.bfloat16, enabled=gpu or stage.progress < 0.95,
                            cache_enabled=not gpu):
            eps = base.predict(x, t, r2d3.Cond(*base.text.embed(words)))
        return ((eps - noise) / alpha).square().mean()              # = the squared error of v

    if compiled:
        base.net.forward = torch.compile(base.net.forward)
    with contextlib.nullcontext() if gpu else attention_in_float32():
        stage.run(loss_of)
    vars(base.net).pop("forward", None)
    return base, module


# ---- Quality: measured, drawn, written into the file ----------------------------------------------------------------


@torch.no_grad()
def observe(base: r2d3.DiffSplat, gaussians: r2d3.Gaussians) -> dict[str, Tensor]:
    """What the judges see of n objects from the four canonical views: picture (n, 4, 3, 64, 64), the rest (n,)."""
    out = r2d3.render(gaussians, *r2d3.input_cameras(len(gaussians.means)), 64)
    rewards = {"colorfulness": r2d3.scorers.colorfulness, "dnc": r2d3.depth_normal_consistency,
               "normal": r2d3.scorers.normal_agreement(base.normals)}
    return {"picture": out.image} | {name: reward(out, []).mean(1) for name, reward in rewards.items()}


def joined(chunks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}


def sampling(base: r2d3.DiffSplat, guidance: float, steps: int) -> r2d3.Job:
    """A job that only samples."""
    schedule = base.schedule("dpm", steps)
    return r2d3.Job(base, None, schedule, base.encode([""]), r2d3.Config(guidance=guidance))


@torch.no_grad()
def observe_samples(base: r2d3.DiffSplat, prompts: list[str], guidance: float, steps: int) -> dict[str, Tensor]:
    """One sample per prompt, observed."""
    job, seen = sampling(base, guidance, steps), []
    for start in tqdm(range(0, len(prompts), 60), desc=f"samples, guidance {guidance}, {steps} steps"):
        some = prompts[start:start + 60]
        generators = [r2d3.seeded(4, start + n) for n in range(len(some))]
        x0 = job.rollout(some, generators, keep=False)
        seen.append(observe(base, base.decode(x0)))
    return joined(seen)


@torch.no_grad()
def observe_truth(base: r2d3.DiffSplat, prompts: list[str], rng: random.Random) -> dict[str, dict[str, Tensor]]:
    """One true scene per prompt, what is left open drawn as in the data: its own splats, and those of its latent."""
    named = [fill_in(parse_caption(prompt), rng) for prompt in prompts]
    data = trace_all([place([(size, shape) for size, _, shape in parts], rng) for parts in named])
    seen = {"true": [], "decoded": []}
    for start in range(0, len(prompts), 60):
        rows = slice(start, start + 60)
        grids = paint({key: tensor[rows] for key, tensor in data["traced"].items()},
                      [[part[1] for part in parts] for parts in named[rows]], rng)
        seen["true"].append(observe(base, splats(grids)))
        seen["decoded"].append(observe(base, splats(reconstruct(base.vae, grids))))
    return {name: joined(chunks) for name, chunks in seen.items()}


@torch.no_grad()
def name_objects(tower: shapes.ImageTextTower, pictures: Tensor, said: list[list[Part]]) -> list[list[tuple[str, str]]]:
    """What the tower calls every object in pictures (n, V, 3, H, W) of scenes that their prompts describe."""
    return name_features(tower, tower.image(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2]).mean(1), said)


@torch.no_grad()
def name_features(tower: shapes.ImageTextTower, seen: Tensor, said: list[list[Part]]) -> list[list[tuple[str, str]]]:
    """The same from what the tower has seen (n, D): its first choice of all 64 (color, shape) for every object."""
    every, words = [(color, shape) for color in HUES for shape in SHAPES], {}
    for key in {(tuple(parts), slot) for parts in said for slot in range(len(parts))}:
        words[key] = tower.text([renamed(list(key[0]), key[1], *pair) for pair in every])
    return [[every[(words[tuple(parts), slot] @ vector).argmax()] for slot in range(len(parts))]
            for vector, parts in zip(seen, said)]


def named_right(names: list[list[tuple[str, str]]], said: list[list[Part]]) -> float:
    """Share of the objects of which all that is said is so."""
    right = [all(not word or word == name for word, name in zip(part[1:], pair))
             for pairs, parts in zip(names, said) for pair, part in zip(pairs, parts)]
    return sum(right) / len(right)


def histogram(names: list[list[tuple[str, str]]], said: list[list[Part]], which: int) -> dict[str, float]:
    """How often each colour (which = 0) or shape (1) was named where the prompt leaves it open."""
    counts = dict.fromkeys((list(HUES), SHAPES)[which], 0)
    for pairs, parts in zip(names, said):
        for pair, part in zip(pairs, parts):
            if not part[1 + which]:
                counts[pair[which]] += 1
    return {name: count / max(sum(counts.values()), 1) for name, count in counts.items()}


def spread(values: Tensor, each: int) -> float:
    """Standard deviation within a prompt, averaged over prompts; `each` objects of a prompt follow each other."""
    return values.unflatten(0, (-1, each)).std(1).mean().item()


def psnr(a: Tensor, b: Tensor) -> float:
    """Of pictures (n, V, 3, H, W) in [0, 1]: per object, then averaged over objects; decibels."""
    return (-10 * (a - b).square().mean((1, 2, 3, 4)).log10()).mean().item()


@torch.no_grad()
def measure_autoencoder(base: r2d3.DiffSplat, held_out: dict) -> dict:
    """Errors of the objects' splats in [-1, 1], and how pictures at 128 pixels differ, on scenes never trained on."""
    rng = random.Random("held out")
    grids, parts = draw_scenes(held_out, list(range(len(held_out["scenes"]))), rng, None)
    again = reconstruct(base.vae, grids)
    error, inside = (again - grids).abs(), (grids[:, :, 10:11] > 0).float()
    channels = {"rgb": (0, 3), "scale": (3, 6), "rotation": (6, 10), "opacity": (10, 11), "depth": (11, 12)}
    out = {"error_on_objects": {name: ((error[:, :, a:b] * inside).sum() / inside.sum() / (b - a)).item()
                                for name, (a, b) in channels.items()}}
    some = slice(0, 64)
    true, seen = (r2d3.render(splats(each[some]), *r2d3.input_cameras(len(each[some])), 128) for each in (grids, again))
    scenes = held_out["scenes"][::8]                                # against exact pictures, which take longer
    traced = trace(scenes, (torch.arange(128) + 0.5) / 128 - 0.5)
    colors = [[rng.choice(list(HUES)) for _ in scene["parts"]] for scene in scenes]
    exact = colored(traced, colors, random.Random(0)).movedim(-1, 2)
    grids = paint(trace(scenes), colors, random.Random(0))
    pictures = [r2d3.render(splats(each), *r2d3.input_cameras(len(each)), 128).image
                for each in (grids, reconstruct(base.vae, grids))]
    return out | {"psnr_decoded_to_true": psnr(seen.image, true.image), "psnr_true_to_traced": psnr(pictures[0], exact),
                  "psnr_decoded_to_traced": psnr(pictures[1], exact)}


def measure_quality(base: r2d3.DiffSplat, held_out: dict, prompts: list[str], samples: dict[str, int]) -> dict:
    """All that is claimed of the base, on prompts, scenes and combinations that training has not seen.

    `samples`: how many of each prompt, by the prompts' group.
    """
    quality = {"guidance": base.guidance, "steps": STEPS, "autoencoder": measure_autoencoder(base, held_out),
               "named_right": {}, "spread_of_colorfulness": {}, "dnc": {}, "normal": {}}
    for kind, each in samples.items():
        repeated = [prompt for prompt in prompts if group(parse_caption(prompt)) == kind for _ in range(each)]
        said = [parse_caption(prompt) for prompt in repeated]
        seen = observe_truth(base, repeated, random.Random(kind))
        seen["samples"] = observe_samples(base, repeated, base.guidance, STEPS)
        names = {source: name_objects(base.tower, values["picture"], said) for source, values in seen.items()}
        for key in ("dnc", "normal"):
            quality[key][kind] = {source: values[key].mean().item() for source, values in seen.items()}
        spreads = {source: spread(values["colorfulness"], each) for source, values in seen.items()}
        quality["named_right"][kind] = {source: named_right(names[source], said) for source in seen}
        quality["spread_of_colorfulness"][kind] = spreads | {"share": spreads["samples"] / spreads["true"]}
        if kind == "open":
            rng = random.Random("open")
            drawn = [[part[1:] for part in fill_in(parts, rng)] for _ in range(20) for parts in said]
            for which, key in enumerate(("colors", "shapes")):
                data = histogram(drawn, said * 20, which)
                quality[f"open_{key}"] = {"data": data}
                for source in ("true", "samples"):
                    seen_as = histogram(names[source], said, which)
                    quality[f"open_{key}"] |= {source: seen_as,
                                               f"total_variation_{source}": tilt.total_variation(seen_as, data)}
    quality |= {"prompts": len(prompts), "samples_per_prompt": samples, "elsewhere": []}
    few = max(2, samples["closed"] // 2)                            # other settings, on some of the closed prompts
    repeated = [prompt for prompt in prompts if group(parse_caption(prompt)) == "closed" for _ in range(few)][:15 * few]
    true = spread(observe_truth(base, repeated, random.Random(1))["true"]["colorfulness"], few)
    for guidance, steps in ((1.0, 20), (1.5, 20), (2.0, 20)):
        seen = observe_samples(base, repeated, guidance, steps)
        said = [parse_caption(prompt) for prompt in repeated]
        quality["elsewhere"].append({"guidance": guidance, "steps": steps, "prompts": len(repeated) // few, "closed":
                                     named_right(name_objects(base.tower, seen["picture"], said), said),
                                     "share_of_spread": spread(seen["colorfulness"], few) / true})
    return quality


def write_file(path: Path, parts: dict[str, torch.nn.Module], mean: Tensor, std: Tensor, quality: dict) -> None:
    """The base: networks in half precision, how they are made, and what was measured of them."""
    from safetensors.torch import save
    state = {f"{name}.{key}": value.half().contiguous() for name, part in parts.items()
             for key, value in part.state_dict().items()}
    state |= {"latent_mean": mean.flatten(), "latent_std": std.flatten()}
    about = {"net": NET, "vae": VAE, "vocab": VOCAB, "max_length": MAX_LENGTH, "prediction_type": "v_prediction",
             "guidance": GUIDANCE, "betas": BETAS, "scale_range": SCALE_RANGE, "depth_scale": DEPTH_SCALE,
             "tower": TOWER, "normal": {}}
    write_atomic(path, save(state, {"config": json.dumps(about), "quality": json.dumps(quality),
                                    "source": f"experiments/make_shapes.py at commit {report.git_commit()}"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, help="where the stages leave their results; runs/make_shapes")
    parser.add_argument("--out", type=Path, help="the file to make; support/shapes.safetensors")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: a test of the script")
    parser.add_argument("--until", choices=["ae", "judges", "denoiser", "end"], default="end", help="stop after this")
    parser.add_argument("--minutes", type=float, default=math.inf, help="let the training end by the clock; any number")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, or cuda for the denoiser and its data; by default a GPU where there is one")
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser: a fifth faster, needs g++")
    args = parser.parse_args()
    args.work = args.work or ROOT / ("runs/quick_shapes" if args.quick else "runs/make_shapes")
    args.out = args.out or (args.work / "shapes.safetensors" if args.quick else ROOT / "support/shapes.safetensors")
    size = ({"data": 24, "more": 32, "held_out": 8, "ae": 4, "pictures": 1, "tower": 3, "normal": 3, "latents": 1,
             "denoiser": 4, "samples": {"closed": 2, "open": 2, "hard": 2}, "prompts": 2} if args.quick else
            {"data": 3000, "more": 8000, "held_out": 200, "ae": 7500, "pictures": 1, "tower": 5000, "normal": 1500,
             "latents": 3, "denoiser": 34000, "samples": {"closed": 16, "open": 16, "hard": 8}, "prompts": 30})
    if args.device != "cpu":                                        # its steps are faster, and of more pictures
        size["denoiser"] *= 3
    minutes = {stage: share * args.minutes for stage, share in
               {"ae": 0.27, "tower": 0.14, "normal": 0.04, "denoiser": 0.55}.items()}
    folder = args.work if args.quick else ROOT / "prompts"
    write_prompts(folder)
    vae = train_autoencoder(args.work, lambda: make_data(args.work, size["data"], 0), size["ae"], minutes["ae"])
    if args.until == "ae":
        return
    def pictures() -> dict:
        return make_pictures(args.work, lambda: make_data(args.work, size["more"], 2), vae, size["pictures"])

    tower = train_tower(args.work, pictures, size["tower"], minutes["tower"])
    normals = train_normals(args.work, pictures, size["normal"], minutes["normal"])
    if args.until == "judges":
        return
    # The denoiser learns from the judges' scenes; a GPU traces three times as many others in a minute or two.
    scenes = (size["more"], 2) if args.device == "cpu" else (3 * size["more"], 4)
    with torch.device(args.device):
        latents = make_latents(args.work, lambda: make_data(args.work, *scenes), vae, size["latents"])
    base, module = train_denoiser(args.work, latents, vae, size["denoiser"], minutes["denoiser"], args.compile,
                                  args.device)
    module.cpu()
    if args.until == "denoiser":
        return
    parts = {"net": base.net, "vae": vae, "text": module["text"], "tower": tower, "normal": normals}
    training = {name: {key: state[key] for key in ("step", "seconds", "loss")} for name in minutes
                for state in [torch.load(args.work / f"{name}.pt", weights_only=True, map_location="cpu")]}
    write_file(args.out, parts, base.latent_mean, base.latent_std, {})
    # What is measured is what the file holds, in half precision.
    base = r2d3.load_base(r2d3.resolve(r2d3.Config(weights=str(args.out))), "cpu")
    prompts = inputs.load_prompts(str(folder / "shapes_test.txt"))[:3 * size["prompts"]]
    quality = measure_quality(base, make_data(args.work, size["held_out"], 1), prompts, size["samples"])
    quality["training"] = training
    write_file(args.out, parts, base.latent_mean, base.latent_std, quality)
    draw_grid(base, prompts, args.out if args.quick else ROOT / "experiments/results/shapes")
    print(json.dumps(quality, indent=1))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


@torch.no_grad()
def draw_grid(base: r2d3.DiffSplat, prompts: list[str], path: Path) -> None:
    """One sample of every test prompt: closed, open, hard, a block each."""
    prompts = sorted(prompts, key=lambda prompt: ("closed", "open", "hard").index(group(parse_caption(prompt))))
    generators = [r2d3.seeded(5, n) for n in range(len(prompts))]
    x0 = sampling(base, base.guidance, STEPS).rollout(prompts, generators, keep=False)
    pictures = r2d3.render(base.decode(x0), *r2d3.input_cameras(len(x0)), 144).image[:, 0]
    write_atomic(path.with_suffix(".png"), report.png(report.labelled(pictures, prompts, columns=10)))


if __name__ == "__main__":
    main()
