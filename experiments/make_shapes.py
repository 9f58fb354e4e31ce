"""Make the embedded base `shapes` from nothing: data, autoencoder, judges, denoiser, measured quality.

    python experiments/make_shapes.py                                    # hours on two cores; stops and goes on at will
    python experiments/make_shapes.py --quick                            # a smoke test, in runs/quick_shapes

Every stage leaves its result in the work folder and is skipped when that is there, so a stopped run goes on where it
was (training goes on from a checkpoint that is at most two minutes old). Stages:

    data      signed-distance shapes, sphere-traced into DiffSplat's splat grids; colours are applied on the fly
    ae        the 12-channel autoencoder (diffusers AutoencoderKL), one view at a time
    judges    the image-text tower and the normal estimator, trained on renders of the same splats
    denoiser  the text-to-3D diffusion model (diffusers PixArtTransformer2DModel with multi-view attention), EMA
    quality   60 unseen prompts x 4 samples, named by the tower; the picture experiments/results/shapes.png
"""

import argparse
import colorsys
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import r2d3  # noqa: E402
from support import report, shapes  # noqa: E402

GRID = 32                                   # splats along a view's side
SCALE_RANGE, DEPTH_SCALE = (0.002, 0.05), 0.5
HUES = {"red": 0, "orange": 27, "yellow": 53, "green": 120, "cyan": 182, "blue": 224, "purple": 278, "gray": None}
SHAPES = ["sphere", "cube", "cylinder", "cone", "ring", "pill", "cross", "diamond"]
SIZES = {"": 0.26, "small": 0.19, "big": 0.33}
VOCAB = ["a", "an", "small", "big", "on", *HUES, *SHAPES]
MAX_LENGTH = 9                              # "a small red cube on a big blue ring"
LIGHT = F.normalize(torch.tensor([0.3, 0.9, 0.4]), dim=0)

# ---- The world: what is in it, and how it is called -------------------------------------------------------------

# Combinations that training never sees. Every colour and every shape still occurs in many others.
UNSEEN = {(color, SHAPES[(3 * n + 1) % 8]) for n, color in enumerate(HUES)}
SIZE_NAMES = list(SIZES)


def caption(parts: list[tuple[str, str, str]]) -> str:
    """[(size, color, shape), ...], the top object first."""
    named = [" ".join(word for word in part if word) for part in parts]
    return " on ".join(f"{'an' if name[0] == 'o' else 'a'} {name}" for name in named)


def unseen_pair(top: tuple, bottom: tuple) -> bool:
    """A fixed eighth of all pairs of (color, shape) is kept out of training."""
    return (17 * list(HUES).index(top[1]) + 5 * SHAPES.index(top[2]) + 11 * list(HUES).index(bottom[1])
            + 3 * SHAPES.index(bottom[2])) % 8 == 0


def is_unseen(parts: list[tuple[str, str, str]]) -> bool:
    """Whether a scene belongs to the test side of the split."""
    return any(part[1:] in UNSEEN for part in parts) or len(parts) == 2 and unseen_pair(*parts)


def write_prompts() -> None:
    """prompts/shapes_test.txt: 60 prompts of unseen combinations; prompts/shapes_train.txt: 200 of seen ones."""
    rng = random.Random(0)

    def part(pool: list) -> tuple[str, str, str]:
        return (rng.choice(SIZE_NAMES), *rng.choice(pool))

    every = [(color, shape) for color in HUES for shape in SHAPES]
    unseen = sorted(UNSEEN)
    seen = [combination for combination in every if combination not in UNSEEN]
    test = {caption([(size, *combination)]) for combination in unseen for size in SIZE_NAMES}
    while len(test) < 60:
        parts = [part(unseen if rng.random() < 0.3 else seen), part(every)]
        if is_unseen(parts):
            test.add(caption(parts))
    train = {caption([(rng.choice(SIZE_NAMES), *combination)]) for combination in seen}
    while len(train) < 200:
        parts = [part(seen), part(seen)]
        if not is_unseen(parts):
            train.add(caption(parts))
    for name, prompts in (("test", test), ("train", train)):
        ordered = sorted(prompts)
        rng.shuffle(ordered)
        r2d3.write_atomic(ROOT / f"prompts/shapes_{name}.txt", "\n".join(ordered) + "\n")


# ---- Geometry: signed distances (or lower bounds of them), sphere-traced ------------------------------------------


def half_height(shape: str, size: float, stretch: float) -> float:
    return size * {"sphere": 0.95, "cube": 0.75 * stretch, "cylinder": 0.9 * stretch, "cone": 1.05 * stretch,
                   "ring": 1.02, "pill": 0.52, "cross": 0.98, "diamond": 1.15 * stretch}[shape]


def distance(shape: str, p: Tensor, size: Tensor, stretch: Tensor) -> Tensor:
    """Signed distance to a shape centred at the origin. p (n, points, 3); size, stretch (n, 1)."""
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


def draw_geometry(rng: random.Random) -> dict:
    """One or two objects without colours: shapes, sizes, yaw, stretch and heights."""
    count = 1 if rng.random() < 0.4 else 2
    parts = [{"shape": rng.choice(SHAPES), "size": rng.choice(SIZE_NAMES), "yaw": rng.uniform(0, 2 * math.pi),
              "stretch": rng.uniform(0.88, 1.12)} for _ in range(count)]
    for part in parts:
        part["radius"] = SIZES[part["size"]] * rng.uniform(0.94, 1.06)
    fit = min(0.85, 0.4 / sum(half_height(p["shape"], p["radius"], p["stretch"]) for p in parts)) if count == 2 else 1
    for part in parts:                                              # a pair shrinks until it is inside every view
        part["radius"] *= fit
        part["half"] = half_height(part["shape"], part["radius"], part["stretch"])
    y = sum(part["half"] for part in parts)
    for part in parts:                                                                             # top object first
        part["y"] = y - part["half"]
        y -= 2 * part["half"]
    return {"parts": parts}


def scene_distance(p: Tensor, scenes: list[dict]) -> tuple[Tensor, Tensor, Tensor]:
    """Distance (n, points), nearest part 0 | 1 (n, points), position in that part's own axes and size (n, points, 3)."""
    best = torch.full(p.shape[:2], 1e3)
    nearest, own = torch.zeros(p.shape[:2], dtype=torch.long), torch.zeros_like(p)
    for slot in range(2):
        for shape in SHAPES:
            rows = [n for n, s in enumerate(scenes) if slot < len(s["parts"]) and s["parts"][slot]["shape"] == shape]
            if not rows:
                continue
            parts = [scenes[n]["parts"][slot] for n in rows]
            size, stretch, yaw, y = (torch.tensor([[part[key]] for part in parts])
                                     for key in ("radius", "stretch", "yaw", "y"))
            q = p[rows]
            q = torch.stack([q[..., 0] * yaw.cos() - q[..., 2] * yaw.sin(), q[..., 1] - y,
                             q[..., 0] * yaw.sin() + q[..., 2] * yaw.cos()], -1)
            d = distance(shape, q, size, stretch)
            closer = d < best[rows]
            best[rows] = torch.where(closer, d, best[rows])
            nearest[rows] = torch.where(closer, slot, nearest[rows])
            own[rows] = torch.where(closer[..., None], q / size[..., None], own[rows])
    return best, nearest, own


def trace(scenes: list[dict]) -> dict[str, Tensor]:
    """Sphere-trace every scene through its splat grids. (n, 4, 32, 32): hit, z, part; (.., 3): world normal, own."""
    n = len(scenes)
    c2w, fxfycxcy = r2d3.input_cameras(1)
    line = torch.linspace(-0.5, 0.5, GRID) / r2d3.FXFY              # splat (i, j) sits on the image's (i, j) / (GRID - 1)
    y, x = torch.meshgrid(line, line, indexing="ij")
    rays = torch.einsum("vij,hwj->vhwi", c2w[0, :, :3, :3], torch.stack([x, y, torch.ones_like(x)], -1)).reshape(-1, 3)
    origin = c2w[0, :, None, None, :3, 3].expand(4, GRID, GRID, 3).reshape(-1, 3)
    length = rays.norm(dim=-1)
    z = torch.full((n, len(rays)), 0.75)
    for _ in range(64):
        d, _, _ = scene_distance(origin + rays * z[..., None], scenes)
        z = (z + d / length).clamp(max=2.2)
    d, part, own = scene_distance(origin + rays * z[..., None], scenes)
    hit, p = (d.abs() < 2e-3) & (z < 2.1), origin + rays * z[..., None]
    step = 1e-3 * torch.eye(3)
    normal = torch.stack([scene_distance(p + e, scenes)[0] - scene_distance(p - e, scenes)[0] for e in step], -1)
    shape = (n, 4, GRID, GRID)
    return {"hit": hit.view(shape), "z": z.view(shape).half(), "part": part.view(shape).bool(),
            "normal": F.normalize(normal, dim=-1).view(*shape, 3).half(), "own": own.view(*shape, 3).half()}


def quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    w, v, s, u = a[..., :1], a[..., 1:], b[..., :1], b[..., 1:]
    return torch.cat([w * s - (v * u).sum(-1, keepdim=True), w * u + s * v + torch.cross(v, u, dim=-1)], -1)


def camera_quaternions() -> Tensor:
    """(4, 4) wxyz of the input cameras' rotations."""
    R = r2d3.input_cameras(1)[0][0, :, :3, :3]
    w = (1 + R.diagonal(dim1=-2, dim2=-1).sum(-1)).clamp(min=0).sqrt() / 2
    q = []
    for matrix, real in zip(R, w):
        if real > 0.1:
            axis = torch.stack([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
            q.append(torch.cat([real[None], axis / (4 * real)]))
        else:                                                                                      # half a turn: R = 2 a a^T - 1
            values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
            q.append(torch.cat([torch.zeros(1), vectors[:, values.argmax()]]))
    return torch.stack(q)


def geometry_channels(traced: dict[str, Tensor]) -> Tensor:
    """(n, 4, 12, 32, 32) in [-1, 1] with colours still empty (background: white, tiny, transparent, facing us)."""
    hit, z, normal = traced["hit"], traced["z"].float(), traced["normal"].float()
    R = r2d3.input_cameras(1)[0][0, :, :3, :3]
    facing = torch.tensor([0.0, 0.0, -1.0])
    n = torch.where(hit[..., None], torch.einsum("vij,bvhwi->bvhwj", R, normal), facing)          # camera space
    n = F.normalize(torch.cat([n[..., :2], n[..., 2:].clamp(max=-0.02)], -1), dim=-1)
    turn = torch.cat([1 + (n * facing).sum(-1, keepdim=True), torch.cross(facing.expand_as(n), n, dim=-1)], -1)
    flip = torch.tensor([0.0, 1.0, 0.0, 0.0])                                                     # +z to -z
    camera = camera_quaternions()[:, None, None].expand(len(z), -1, GRID, GRID, -1)
    quats = quaternion_product(quaternion_product(camera, F.normalize(turn, dim=-1)), flip.expand_as(camera))
    pixel = z / (r2d3.FXFY * (GRID - 1))
    across = 0.62 * pixel / (-n[..., 2]).clamp(min=0.45)
    scales = torch.stack([across, across, 0.25 * pixel], -1)
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


def paint(channels: Tensor, traced: dict[str, Tensor], colors: list[list[str]], rng: random.Random) -> Tensor:
    """A copy of the grids with lit colours; colors[n] names the parts of scene n, top first."""
    out, own = channels.clone(), traced["own"].float()
    rgb = torch.ones(*traced["hit"].shape, 3)
    for n, names in enumerate(colors):
        for slot, name in enumerate(names):
            first, second, pattern, frequency, phase = draw_color(name, rng)
            x, y, z = own[n].unbind(-1)
            bands = torch.sin(frequency * y + phase) > 0
            segments = torch.sin(round(frequency) * torch.atan2(z, x) + phase) > 0
            where = (torch.zeros_like(bands), bands, segments, bands ^ segments)[pattern]
            tone = torch.where(where[..., None], second, first)
            rgb[n] = torch.where((traced["part"][n] == bool(slot))[..., None], tone, rgb[n])
    light = 0.7 + 0.36 * (traced["normal"].float() @ LIGHT).clamp(min=0)
    rgb = torch.where(traced["hit"][..., None], (rgb * light[..., None]).clamp(0, 1), 1.0)
    out[:, :, :3] = rgb.movedim(-1, 2) * 2 - 1
    return out

# ---- Stages: each leaves a file in the work folder ----------------------------------------------------------------


def make_data(work: Path, count: int, seed: int) -> dict:
    """`count` traced geometries: {"channels", "traced", "scenes"}; about one second of two cores for 40."""
    path = work / f"data{seed}.pt"
    if path.is_file():
        return torch.load(path, weights_only=False)
    rng = random.Random(seed)
    scenes = [draw_geometry(rng) for _ in range(count)]
    traced = [trace(scenes[n:n + 48]) for n in tqdm(range(0, count, 48), desc="tracing")]
    traced = {key: torch.cat([chunk[key] for chunk in traced]) for key in traced[0]}
    data = {"scenes": scenes, "traced": traced, "channels": geometry_channels(traced).half()}
    r2d3.write_atomic(path, r2d3.to_bytes(lambda file: torch.save(data, file)))
    return data


def draw_scenes(data: dict, rows: list[int], rng: random.Random, seen: bool | None) -> tuple[Tensor, list]:
    """Paint scenes: grids (n, 4, 12, 32, 32) and their parts. seen: True only training combinations, None any."""
    colors, parts = [], []
    for n in rows:
        shapes = data["scenes"][n]["parts"]
        while True:
            named = [(part["size"], rng.choice(list(HUES)), part["shape"]) for part in shapes]
            if seen is None or is_unseen(named) != seen:
                break
        parts.append(named)
        colors.append([part[1] for part in named])
    traced = {key: tensor[rows] for key, tensor in data["traced"].items()}
    return paint(data["channels"][rows].float(), traced, colors, rng), parts


class Stage:
    """A training loop that can be stopped: step counter, learning rate, checkpoint, EMA."""

    def __init__(self, work: Path, name: str, model: torch.nn.Module, steps: int, lr: float, ema: float = 0.0):
        self.path, self.name, self.model, self.steps, self.lr = work / f"{name}.pt", name, model, steps, lr
        self.optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=1e-3)
        self.decay, self.step, self.seconds, self.loss = ema, 0, 0.0, 0.0
        self.average = {key: value.clone() for key, value in model.state_dict().items()}
        if self.path.is_file():
            state = torch.load(self.path, weights_only=True)
            model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "average": self.average, "step": self.step,
                 "optimizer": self.optimizer.state_dict(), "seconds": self.seconds}
        r2d3.write_atomic(self.path, r2d3.to_bytes(lambda file: torch.save(state, file)))

    def run(self, loss_of: Callable) -> None:
        """Train to the end: loss_of(rng, generator) -> loss. Warm-up, then constant, then down over the last third."""
        saved = begun = time.time()
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=5)
        while self.step < self.steps:
            progress = self.step / self.steps
            rate = self.lr * min(1, (self.step + 1) / 200) * min(1, 3 * (1 - progress) + 0.01)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            rng, generator = random.Random(f"{self.name}{self.step}"), r2d3.seeded(self.step)
            loss = loss_of(rng, generator)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            decay = min(self.decay, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for key, value in self.model.state_dict().items():
                    self.average[key].lerp_(value, 1 - decay) if value.is_floating_point() else None
            self.loss = 0.99 * self.loss + 0.01 * loss.item() if self.step > 1 else loss.item()
            bar.update()
            bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
            if time.time() - saved > 120 or self.step == self.steps:
                self.seconds += time.time() - begun
                saved = begun = time.time()
                self.save()
        self.model.load_state_dict(self.average)
        self.model.eval().requires_grad_(False)


VAE = {"in_channels": 12, "out_channels": 12, "down_block_types": ["DownEncoderBlock2D"] * 3,
       "up_block_types": ["UpDecoderBlock2D"] * 3, "block_out_channels": [32, 64, 64], "layers_per_block": 1,
       "latent_channels": 8, "norm_num_groups": 8, "sample_size": GRID, "mid_block_add_attention": False}
CHANNEL_WEIGHTS = torch.tensor([1.5] * 3 + [1.0] * 3 + [1.0] * 4 + [1.0] + [3.0]).view(12, 1, 1)


def reconstruction_loss(out: Tensor, grid: Tensor) -> Tensor:
    """L1 in which the object counts more than the background; opacity counts everywhere."""
    weight = (0.1 + 1.4 * (grid[:, 10:11] > 0)).expand(-1, 12, -1, -1).clone()
    weight[:, 10] = 1.0
    return ((out - grid).abs() * weight * CHANNEL_WEIGHTS).mean()


def train_autoencoder(work: Path, make: Callable, steps: int) -> torch.nn.Module:
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE)
    stage = Stage(work, "ae", vae, steps, 1.5e-3, ema=0.999)
    data = make() if stage.step < steps else None

    def loss_of(rng: random.Random, generator: torch.Generator) -> Tensor:
        grids, _ = draw_scenes(data, rng.choices(range(len(data["scenes"])), k=8), rng, True)
        grids = grids.flatten(0, 1)
        # bfloat16 for speed, until the learning rate goes down and its rounding would be what is left to learn
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.step < 0.8 * steps):
            posterior = vae.encode(grids).latent_dist
            out = vae.decode(posterior.sample(generator)).sample
        return reconstruction_loss(out.float(), grids) + 1e-4 * posterior.kl().float().mean() / (8 * 8 * 8)

    stage.run(loss_of)
    return vae


# ---- Judges: what the objects are called, and how their surfaces lie ------------------------------------------------


def reconstruct(vae: torch.nn.Module, grids: Tensor) -> Tensor:
    """Grids (n, 4, 12, 32, 32) through the autoencoder and back."""
    return vae.decode(vae.encode(grids.flatten(0, 1)).latent_dist.mode()).sample.clamp(-1, 1).unflatten(0, (-1, 4))


def splats(grids: Tensor) -> r2d3.Gaussians:
    return r2d3.splat_grid_to_gaussians(grids, *r2d3.input_cameras(len(grids)), SCALE_RANGE, DEPTH_SCALE)


@torch.no_grad()
def make_pictures(work: Path, make: Callable, vae: torch.nn.Module, times: int) -> dict:
    """Every scene `times` times in new colours, from a camera the reward could draw; every other one as decoded."""
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
        cameras = r2d3.sample_cameras(len(grids), 1, 20.0, 360.0, generator)
        out = r2d3.render(splats(grids), *cameras, 64)
        images.append((out.image[:, 0].clamp(0, 1) * 255).round().byte())
        normals.append((out.normal * (out.alpha > 0.5) * 127)[:, 0].round().char())
        every += parts
    pictures = {"images": torch.cat(images), "normals": torch.cat(normals), "parts": every}
    r2d3.write_atomic(path, r2d3.to_bytes(lambda file: torch.save(pictures, file)))
    return pictures


def renamed(parts: list, slot: int, color: str, shape: str) -> str:
    """The caption with another colour and shape in one place."""
    return caption([(part[0], color, shape) if n == slot else part for n, part in enumerate(parts)])


def train_tower(work: Path, pictures: dict, steps: int) -> shapes.ImageTextTower:
    """Contrastive: every picture finds its caption in the batch's, and among its own with one word changed."""
    torch.manual_seed(1)
    tower = shapes.ImageTextTower(shapes.WordTable(VOCAB, 64, MAX_LENGTH))
    stage = Stage(work, "tower", tower, steps, 2e-3, ema=0.998)

    def loss_of(rng: random.Random, generator: torch.Generator) -> Tensor:
        rows = rng.choices(range(len(pictures["parts"])), k=64)
        captions, candidates = [], []
        for row in rows:
            parts = pictures["parts"][row]
            slot = rng.randrange(len(parts))
            _, color, shape = parts[slot]
            wrong = [renamed(parts, slot, other, shape) for other in HUES if other != color]
            wrong += [renamed(parts, slot, color, other) for other in SHAPES if other != shape]
            captions.append(caption(parts))
            candidates += [caption(parts), *wrong]
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.step < 0.8 * steps):
            images = pictures["images"][rows].float() / 255
            gray = images.mean(1, keepdim=True)                     # a caption does not name the saturation
            images = gray + (0.7 + 1.1 * torch.rand(64, 1, 1, 1, generator=generator)) * (images - gray)
            images = images.clamp(0, 1)
            seen = tower.image(images + 0.01 * torch.randn(images.shape, generator=generator)).float()
            words = tower.text(captions + candidates).float()
        scale = tower.logit_scale.exp().clamp(max=50)
        hard = torch.einsum("nd,nkd->nk", seen, words[len(rows):].unflatten(0, (len(rows), -1))) * scale
        every = seen @ words[:len(rows)].T * scale
        same = torch.tensor([[a == b for b in captions] for a in captions])
        every = every.masked_fill(same & ~torch.eye(len(rows), dtype=torch.bool), -1e4)
        own = torch.arange(len(rows))
        return (F.cross_entropy(hard, 0 * own) + F.cross_entropy(every, own) + F.cross_entropy(every.T, own)) / 3

    stage.run(loss_of)
    return tower


def train_normals(work: Path, pictures: dict, steps: int) -> shapes.NormalEstimator:
    """Cosine loss on the object's pixels."""
    torch.manual_seed(2)
    estimator = shapes.NormalEstimator()
    stage = Stage(work, "normal", estimator, steps, 2e-3, ema=0.998)

    def loss_of(rng: random.Random, generator: torch.Generator) -> Tensor:
        rows = rng.choices(range(len(pictures["parts"])), k=16)
        images, normals = pictures["images"][rows].float() / 255, pictures["normals"][rows].float()
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.step < 0.8 * steps):
            estimate = estimator(images + 0.01 * torch.randn(images.shape, generator=generator))
        inside = normals.norm(dim=1) > 60
        return 1 - ((estimate.float() * F.normalize(normals, dim=1)).sum(1) * inside).sum() / inside.sum()

    stage.run(loss_of)
    return estimator


@torch.no_grad()
def named_right(tower: shapes.ImageTextTower, pictures: Tensor, every: list) -> float:
    """Share of objects whose colour and shape are the tower's first choice of all 64. pictures (n, V, 3, H, W)."""
    seen = tower.image(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2]).mean(1)
    right = []
    for vector, parts in zip(seen, every):
        for slot, part in enumerate(parts):
            words = tower.text([renamed(parts, slot, color, shape) for color in HUES for shape in SHAPES])
            right.append((words @ vector).argmax().item() == list(HUES).index(part[1]) * 8 + SHAPES.index(part[2]))
    return sum(right) / len(right)


# ---- Denoiser ------------------------------------------------------------------------------------------------------

NET = {"sample_size": 8, "patch_size": 2, "in_channels": 14, "out_channels": 8, "num_layers": 6,
       "num_attention_heads": 4, "attention_head_dim": 32, "cross_attention_dim": 128, "caption_channels": 64,
       "interpolation_scale": 1, "use_additional_conditions": False}


@torch.no_grad()
def make_latents(work: Path, make: Callable, vae: torch.nn.Module, times: int) -> dict:
    """Latents (n, 4, 8, 8, 8) and captions of every scene in `times` colourings, training combinations only."""
    path = work / "latents.pt"
    if path.is_file():
        return torch.load(path, weights_only=False)
    data, rng, latents, captions = make(), random.Random("latents"), [], []
    for _ in range(times):
        for start in tqdm(range(0, len(data["scenes"]), 32), desc="latents"):
            grids, parts = draw_scenes(data, list(range(start, min(start + 32, len(data["scenes"])))), rng, True)
            latents.append(vae.encode(grids.flatten(0, 1)).latent_dist.mode().unflatten(0, (-1, 4)).half())
            captions += [caption(p) for p in parts]
    out = {"latents": torch.cat(latents), "captions": captions}
    r2d3.write_atomic(path, r2d3.to_bytes(lambda file: torch.save(out, file)))
    return out


def new_base(vae: torch.nn.Module, mean: Tensor, std: Tensor, guidance: float) -> tuple[r2d3.DiffSplat, torch.nn.Module]:
    """An untrained `shapes`, and the module that holds what is to be trained: network and words."""
    from diffusers import PixArtTransformer2DModel
    torch.manual_seed(3)
    net, text = PixArtTransformer2DModel(**NET), shapes.WordTable(VOCAB, NET["caption_channels"], MAX_LENGTH)
    torch.nn.init.zeros_(net.proj_out.weight)
    torch.nn.init.zeros_(net.proj_out.bias)
    torch.nn.init.normal_(net.adaln_single.linear.weight, std=0.02)
    base = r2d3.DiffSplat(net, vae, text, image_size=GRID, prediction_type="v_prediction", guidance=guidance,
                          latent_mean=mean, latent_std=std, betas={}, scale_range=SCALE_RANGE,
                          depth_scale=DEPTH_SCALE, half_image_shift=False, device="cpu")
    return base, torch.nn.ModuleDict({"net": net.requires_grad_(True), "text": text})


def train_denoiser(work: Path, latents: dict, vae: torch.nn.Module, steps: int, guidance: float) -> tuple:
    every = latents["latents"].float()
    mean, std = every.mean((0, 1, 3, 4)), every.std((0, 1, 3, 4))
    base, module = new_base(vae, mean, std, guidance)
    stage = Stage(work, "denoiser", module, steps, 1.2e-3, ema=0.9995)
    batch = 16

    def loss_of(rng: random.Random, generator: torch.Generator) -> Tensor:
        rows = rng.choices(range(len(every)), k=batch)
        x0 = (every[rows] - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        t = (1000 * (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch).long()      # stratified
        noise = torch.randn(x0.shape, generator=generator)
        alpha = r2d3.per_sample(base.alpha_by_t[t], x0)
        x = alpha * x0 + (1 - alpha ** 2).sqrt() * noise
        cond = base.encode(["" if rng.random() < 0.1 else latents["captions"][row] for row in rows])
        eps = base.predict(x, t, cond)
        return ((eps - noise) / alpha).square().mean()              # = the squared error of v

    stage.run(loss_of)
    return base, module, stage.seconds


# ---- Quality: measured, drawn, written into the file ----------------------------------------------------------------


def parse_caption(text: str) -> list[tuple[str, str, str]]:
    """The inverse of caption()."""
    words = [part.split()[1:] for part in text.split(" on ")]
    return [(part[0] if len(part) == 3 else "", *part[-2:]) for part in words]


@torch.no_grad()
def sample_pictures(base: r2d3.DiffSplat, prompts: list[str], guidance: float, size: int = 64) -> Tensor:
    """(n, 4, 3, size, size)"""
    schedule, pictures = r2d3.NoiseSchedule.from_diffusers("dpm", 20), []
    for start in tqdm(range(0, len(prompts), 60), desc=f"sampling, guidance {guidance}"):
        cond = base.encode(prompts[start:start + 60])
        x0 = r2d3.rollout(base, schedule, cond, base.encode([""]), guidance, r2d3.seeded(4, start)).x[:, -1]
        pictures.append(r2d3.render(base.decode(x0), *r2d3.input_cameras(len(x0)), size).image)
    return torch.cat(pictures)


@torch.no_grad()
def measure_quality(base: r2d3.DiffSplat, held_out: dict, prompts: list[str]) -> dict:
    """What is claimed of the base, on scenes and combinations that training has not seen."""
    grids, parts = draw_scenes(held_out, list(range(len(held_out["scenes"]))), random.Random("held out"), None)
    again = reconstruct(base.vae, grids)
    error, inside = (again - grids).abs(), (grids[:, :, 10:11] > 0).float()
    mean_error = {name: ((error[:, :, a:b] * inside).sum() / inside.sum() / (b - a)).item() for name, a, b in
                  (("rgb", 0, 3), ("scale", 3, 6), ("rotation", 6, 10), ("opacity", 10, 11), ("depth", 11, 12))}
    true = r2d3.render(splats(grids), *r2d3.input_cameras(len(grids)), 64)
    estimate = base.normals(true.image.flatten(0, 1)).unflatten(0, true.image.shape[:2])
    mask = (true.alpha > 0.5)[:, :, 0]
    cosine = (estimate * true.normal).sum(2)[mask].clamp(-1, 1)
    named = {str(guidance): named_right(base.tower, sample_pictures(base, prompts, guidance),
                                        [parse_caption(prompt) for prompt in prompts]) for guidance in (1.0, 2.0, 3.0)}
    return {"autoencoder_error_on_objects": mean_error,
            "named_right_true_pictures": named_right(base.tower, true.image, parts),
            "named_right_decoded": named_right(base.tower, r2d3.render(
                splats(again), *r2d3.input_cameras(len(grids)), 64).image, parts),
            "named_right_samples_by_guidance": named, "samples": len(prompts),
            "normal_error_degrees": cosine.arccos().rad2deg().mean().item()}


def write_asset(path: Path, base: r2d3.DiffSplat, text: torch.nn.Module, quality: dict) -> None:
    from safetensors.torch import save
    parts = {"net": base.net, "vae": base.vae, "text": text, "tower": base.tower, "normal": base.normals}
    state = {f"{name}.{key}": value.half().contiguous() for name, part in parts.items()
             for key, value in part.state_dict().items()}
    state |= {"latent_mean": base.latent_mean.flatten(), "latent_std": base.latent_std.flatten()}
    about = {"net": NET, "vae": VAE, "vocab": VOCAB, "max_length": MAX_LENGTH, "prediction_type": "v_prediction",
             "guidance": base.guidance, "scale_range": SCALE_RANGE, "depth_scale": DEPTH_SCALE, "tower": {}, "normal": {}}
    try:
        commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, encoding="utf-8").stdout.strip()
    except OSError:                                                                                # no git here
        commit = "unknown"
    r2d3.write_atomic(path, save(state, {"config": json.dumps(about), "quality": json.dumps(quality),
                                         "source": f"experiments/make_shapes.py at commit {commit}"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, help="where the stages leave their results; runs/make_shapes")
    parser.add_argument("--out", type=Path, help="the file to make; support/shapes.safetensors")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: tests the script, not the model")
    parser.add_argument("--until", choices=["ae", "judges", "denoiser", "end"], default="end", help="stop after this stage")
    args = parser.parse_args()
    args.work = args.work or ROOT / ("runs/quick_shapes" if args.quick else "runs/make_shapes")
    args.out = args.out or (args.work / "shapes.safetensors" if args.quick else ROOT / "support/shapes.safetensors")
    size = ({"data": 48, "held_out": 16, "ae": 4, "pictures": 1, "tower": 3, "normal": 3, "latents": 1, "denoiser": 4,
             "samples": 1, "prompts": 4} if args.quick else
            {"data": 3600, "held_out": 200, "ae": 9000, "pictures": 4, "tower": 4000, "normal": 2500, "latents": 8,
             "denoiser": 16000, "samples": 4, "prompts": 60})
    write_prompts()
    vae = train_autoencoder(args.work, lambda: make_data(args.work, size["data"], 0), size["ae"])
    if args.until == "ae":
        return
    if args.until != "denoiser":
        pictures = make_pictures(args.work, lambda: make_data(args.work, size["data"], 0), vae, size["pictures"])
        tower = train_tower(args.work, pictures, size["tower"])
        normals = train_normals(args.work, pictures, size["normal"])
    if args.until == "judges":
        return
    latents = make_latents(args.work, lambda: make_data(args.work, size["data"], 0), vae, size["latents"])
    base, module, seconds = train_denoiser(args.work, latents, vae, size["denoiser"], guidance=2.0)
    if args.until == "denoiser":
        return
    base.tower, base.normals = tower, normals
    prompts = r2d3.load_prompts(str(ROOT / "prompts/shapes_test.txt"))[:size["prompts"]]
    quality = measure_quality(base, make_data(args.work, size["held_out"], 1),
                              [prompt for prompt in prompts for _ in range(size["samples"])])
    write_asset(args.out, base, module["text"], quality)
    pictures = sample_pictures(base, prompts, base.guidance, 112)[:, 0]
    picture = args.out if args.quick else ROOT / "experiments/results/shapes"
    r2d3.write_atomic(picture.with_suffix(".png"), report.png(report.labelled(pictures, prompts, columns=10)))
    print(json.dumps(quality, indent=1))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
