"""What other programs read: splats as .ply, meshes as .glb, the denoiser with its LoRA merged; and an index of files.

r2d3.py hands in cameras and Gaussians: means, scales, quats, opacities, colors, with a first dimension of objects.

Orientation. This project's world has +y up, azimuth 0 looks from +z. A .glb says the same (glTF: +y up, the front is
+z), so meshes are written as they are. A splat .ply carries no such word. What INRIA's training writes comes from
COLMAP's cameras, +y down, and viewers show a file as if it did: the SuperSplat viewer, antimatter15/splat and gsplat.js
turn it over or start with a camera whose up is -y. So means and rotations are turned by 180 degrees about x.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import unicodedata
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import rasterize
from kernels.splat import ALPHA_MIN, _rotation
from support import UserError, check_writable, load_weights, published, to_json, write_atomic

SOLID = 0.95        # share of the object's usual alpha where a pixel shows its surface: splats reach past its edges
FREE = 0.5          # how much a pixel without surface counts, against 1 for one that faces the camera
THROUGH = 0.2       # share of the cameras that must see through a point for it to be outside
SH_C0 = 0.28209479177387814     # zeroth spherical harmonic: .ply files store (colour - 0.5) / SH_C0
PLY_FIELDS = ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity",
              "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]


# ---- Splats --------------------------------------------------------------------------------------------------------


def visible(gaussians: tuple, index: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a picture can show of one object, as viewers understand it: unit quaternions, all on the CPU in float32.

    The rasteriser, like the published one, uses a quaternion as it is, so one that is not of unit length stretches its
    splat. Here the same ellipsoid is described by a rotation and scales: the axes of A diag(s), A the polynomial of q.
    So a viewer shows the sizes of our pictures, and q = 0, which is no rotation at all, becomes a proper one.

    Splats with a number that is not finite are left out. Returns means (n, 3), scales (n, 3), unit quats (n, 4) wxyz,
    opacities (n,), colors (n, 3); n may be 0.
    """
    means, scales, quats, opacities, colors = (t[index].detach().float().cpu() for t in gaussians)
    finite = torch.cat([means, scales, quats, opacities[:, None], colors], 1).isfinite().all(1)
    seen = finite & (opacities > ALPHA_MIN)
    means, scales, quats, opacities, colors = (t[seen] for t in (means, scales, quats, opacities, colors))
    length = quats.norm(dim=-1, keepdim=True)
    odd = (length[:, 0] - 1).abs() > 1e-5
    quats = torch.where(odd[:, None], quats, quats / length)
    if odd.any():
        axes, sizes, _ = torch.linalg.svd(_rotation(quats[odd]) * scales[odd, None])
        axes[..., 2] *= axes.det().sign()[:, None]              # a reflection is the same ellipsoid as a rotation
        scales[odd], quats[odd] = sizes, to_quaternions(axes)
    return means, scales, quats, opacities, colors


def to_quaternions(rotation: Tensor) -> Tensor:
    """Rotation matrices (n, 3, 3) -> unit quaternions (n, 4) wxyz.

    The matrix that has 4 q q^T's entries is known from the rotation; its longest row is q, and is safe to divide.
    """
    m = rotation.flatten(1).unbind(-1)
    xx, yy, zz = m[0], m[4], m[8]
    wx, wy, wz = m[7] - m[5], m[2] - m[6], m[3] - m[1]
    xy, xz, yz = m[1] + m[3], m[2] + m[6], m[5] + m[7]
    outer = torch.stack([1 + xx + yy + zz, wx, wy, wz, wx, 1 + xx - yy - zz, xy, xz,
                         wy, xy, 1 - xx + yy - zz, yz, wz, xz, yz, 1 - xx - yy + zz], -1).unflatten(-1, (4, 4))
    longest = outer.norm(dim=-1).argmax(-1)
    return F.normalize(outer[torch.arange(len(outer)), longest], dim=-1)


def y_down(means: Tensor, quats: Tensor) -> tuple[Tensor, Tensor]:
    """Turned by 180 degrees about x: means (n, 3), quats (n, 4) wxyz, the product of (0, 1, 0, 0) and q."""
    w, x, y, z = quats.unbind(-1)
    return means * means.new_tensor([1, -1, -1]), torch.stack([-x, w, -z, y], -1)


def write_ply(path: Path, gaussians: tuple, index: int = 0) -> int:
    """Write one object as the .ply that splat viewers read (INRIA's: log scales, logit opacities, SH colours, y down).

    Splats that a picture cannot show (opacity below 1/255) are left out. Returns how many were written.
    """
    means, scales, quats, opacities, colors = visible(gaussians, index)
    means, quats = y_down(means, quats)
    columns = torch.cat([means, torch.zeros_like(means), (colors - 0.5) / SH_C0,
                         torch.logit(opacities.clamp(max=1 - 1e-6))[:, None], scales.clamp(min=1e-8).log(), quats], 1)
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(columns)}",
              *(f"property float {name}" for name in PLY_FIELDS), "end_header\n"]
    write_atomic(path, "\n".join(header).encode() + columns.contiguous().numpy().astype("<f4").tobytes())
    return len(columns)


# ---- Meshes --------------------------------------------------------------------------------------------------------


def mesh_libraries() -> tuple:
    """The modules scikit-image's measure and trimesh, which nothing else needs. UserError where one is missing."""
    try:
        import trimesh
        from skimage import measure
    except ImportError as error:
        raise UserError(f"--mesh needs scikit-image and trimesh ({error}); pip install scikit-image trimesh") from None
    return measure, trimesh


@torch.no_grad()
def mesh_angles(elevation: float) -> tuple[Tensor, Tensor]:
    """Elevations and azimuths (40,), in degrees, of cameras all around an object that is usually seen from `elevation`."""
    azimuth = 36.0 * torch.arange(10) + 9.0 * torch.arange(4)[:, None]
    return torch.tensor([-20.0, 0.0, elevation, elevation + 20.0]).repeat_interleave(10), azimuth.flatten()


def mesh(gaussians: tuple, c2w: Tensor, fxfycxcy: Tensor, index: int = 0, *, resolution: int = 80, size: int = 192,
         dilation: float = 0.0, backend: str | None = None):
    """One object as a trimesh.Trimesh with vertex colours: truncated signed distance fusion, then marching cubes.

    c2w (V, 4, 4), fxfycxcy (V, 4): cameras that see every side that the object has splats for, about 40. From a side
    without splats (DiffSplat has none underneath) one would look into the shell, and the mesh would be hollow there.
    resolution: voxels along the longest side of the object. size: pixels along a picture's side.
    dilation: variance in squared picture sides by which the base's splats are widened in pictures.
    Colours are sRGB, as in pictures. Source: Curless and Levoy 1996; pixels that show nothing carve.
    UserError: nothing to be seen, or scikit-image or trimesh is missing.
    """
    measure, trimesh = mesh_libraries()
    one = tuple(t[None].to(gaussians[0].device) for t in visible(gaussians, index))
    c2w, fxfycxcy = c2w.to(one[0]), fxfycxcy.to(one[0])
    low, high = bounds(one, c2w, fxfycxcy)
    voxel = float((high - low).max() / resolution)
    low, high = low - 3 * voxel, high + 3 * voxel
    steps = ((high - low) / voxel).ceil().int().tolist()
    axes = [start + voxel * torch.arange(count, device=low.device) for start, count in zip(low, steps)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)

    views = look(one, c2w, fxfycxcy, size, dilation, backend)
    truncation = max(3 * voxel, 1.5 * float(one[1].amax(-1).median()))
    distance = fuse(points, c2w, fxfycxcy, views, truncation).reshape(steps)
    distance = distance - bias(one, c2w, fxfycxcy, views, truncation)
    distance = F.pad(distance, [1] * 6, value=1.0)              # closed at the box
    distance = torch.where(distance.abs() < 1e-4, 1e-4, distance)   # a vertex on a grid point makes empty triangles
    if not (distance < 0).any():
        raise UserError("there is no surface to make a mesh of: the object is (almost) transparent")
    vertices, faces, _, _ = measure.marching_cubes(distance.cpu().numpy(), 0.0)
    vertices = low + voxel * (torch.from_numpy(vertices.copy()).to(low) - 1)
    made = trimesh.Trimesh(vertices.cpu().numpy(), faces, process=False)
    label = trimesh.graph.connected_component_labels(made.face_adjacency, node_count=len(faces))
    count = torch.from_numpy(label).long().bincount()           # specks are what is left of single floating splats
    made.update_faces((count >= count.max() / 50).numpy()[label])
    made.remove_unreferenced_vertices()
    vertices = torch.from_numpy(made.vertices.copy()).to(low)
    made.visual.vertex_colors = (color(vertices, c2w, fxfycxcy, views, 2 * voxel) * 255).round().byte().numpy()
    return made


def bounds(one: tuple, c2w: Tensor, fxfycxcy: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper corner (3,) of a box around what is opaque, at most what all cameras have in view."""
    means, scales, _, opacities, _ = (t[0] for t in one)
    solid = opacities > 0.3
    if not solid.any():
        raise UserError("there is no surface to make a mesh of: the object is (almost) transparent")
    reach = (0.5 * c2w[:, :3, 3].norm(dim=-1) / fxfycxcy[:, 0]).max()
    means, size = means[solid].clamp(-reach, reach), scales[solid].amax(-1).median()
    return means.amin(0) - size, means.amax(0) + size


class View(NamedTuple):
    """What one camera sees of an object, (channels, H, W) each."""

    depth: Tensor       # of the surface, 0 where there is none
    facing: Tensor      # cosine between the surface's outward normal and the direction to the camera
    image: Tensor       # colours without the background


def look(one: tuple, c2w: Tensor, fxfycxcy: Tensor, size: int, dilation: float, backend: str | None) -> list[View]:
    """A View of every camera.

    Splat grids have holes where none of their own views looked, on top and underneath; through them one sees the shell
    from inside, which says nothing of where the object ends. So the outer side of a splat is needed: it is the one from
    which most cameras see it. Its normal is the shortest axis where the splat is flat.
    """
    means, scales, quats, opacities, colors = one

    def pictures(colors: Tensor) -> tuple[Tensor, ...]:
        parts = [rasterize(means, quats, scales, opacities, colors, c2w[None, view:view + 8],
                           fxfycxcy[None, view:view + 8], size, size, (0.0, 0.0, 0.0), backend=backend,
                           dilation=dilation * size ** 2)
                 for view in range(0, len(c2w), 8)]             # a few at a time: memory
        return tuple(torch.cat(part, 1)[0] for part in zip(*((p.image, p.alpha, p.median_depth) for p in parts)))

    image, alpha, depth = pictures(colors)
    depth = depth * (alpha > SOLID * alpha[alpha > 0.5].median()) if (alpha > 0.5).any() else 0 * depth
    outward = torch.zeros_like(means[0])
    for pose, lens, surface in zip(c2w, fxfycxcy, depth):
        z, place = project(means[0], pose, lens)
        seen = (pick(surface, place)[0] - z).abs() < 2 * scales[0].amax(-1)
        outward += seen[:, None] * F.normalize(pose[:3, 3] - means[0], dim=-1)
    sizes, order = scales[0].sort(dim=-1)
    axis = _rotation(quats[0])[torch.arange(len(order)), :, order[:, 0]]
    axis = axis * (axis * outward).sum(-1, keepdim=True).sign()
    outward = torch.where(sizes[:, :1] < sizes[:, 1:2] / 2, axis, F.normalize(outward, dim=-1))
    sides = F.normalize(2 * pictures((outward / 2 + 0.5)[None])[0] - alpha, dim=1)
    y, x = torch.meshgrid(*[(torch.arange(size).to(means) + 0.5) / size] * 2, indexing="ij")
    fx, fy, cx, cy = fxfycxcy.T[..., None, None]
    rays = torch.stack([(x - cx) / fx, (y - cy) / fy, torch.ones_like(x).expand(len(c2w), -1, -1)], 1)
    rays = F.normalize(rays, dim=1)
    facing = -(sides * torch.einsum("vij,vjhw->vihw", c2w[:, :3, :3], rays)).sum(1, keepdim=True)
    return [View(*parts) for parts in zip(depth, facing, image / alpha.clamp(min=0.5))]


def project(points: Tensor, c2w: Tensor, fxfycxcy: Tensor) -> tuple[Tensor, Tensor]:
    """World points (n, 3) in one camera: z-depth (n,) and where grid_sample finds them (1, 1, n, 2)."""
    x, y, z = ((points - c2w[:3, 3]) @ c2w[:3, :3]).unbind(-1)
    fx, fy, cx, cy = fxfycxcy
    return z, torch.stack([2 * (fx * x / z + cx) - 1, 2 * (fy * y / z + cy) - 1], -1)[None, None]


def bias(one: tuple, c2w: Tensor, fxfycxcy: Tensor, views: list[View], truncation: float) -> float:
    """What fuse() says where the surface is: the median at the centres of flat splats, 0 if most are not flat.

    Splats reach past the edge of what they cover and their planes past what is curved, so that what is fused is too
    large everywhere, by about half a splat. The centres of flat splats lie on the surface.
    """
    solid = one[3][0] > 0.3
    smallest, middle, _ = one[1][0].sort(dim=-1).values.unbind(-1)
    flat = solid & (smallest < middle / 2)
    if 2 * flat.sum() < solid.sum():
        return 0.0
    centres = fuse(one[0][0, flat], c2w, fxfycxcy, views, truncation)
    shown = centres[centres.abs() < 0.99]
    return float(shown.median()) if len(shown) else 0.0


def pick(picture: Tensor, place: Tensor) -> Tensor:
    """The pixels of a picture (C, H, W) at n places: (C, n), 0 outside."""
    return F.grid_sample(picture[None], place, mode="nearest", align_corners=False)[0, :, 0]


def fuse(points: Tensor, c2w: Tensor, fxfycxcy: Tensor, views: list[View], truncation: float) -> Tensor:
    """Signed distance (n,) at points (n, 3) in units of `truncation`, within [-1, 1], positive outside.

    The mean over the cameras in front of whose surface, or not far behind it, a point lies; the more squarely a surface
    faces a camera, the more that counts. Seen by none: inside. So is what only a few cameras see through, with no surface
    near: they look in at one hole and out at another.
    """
    total, weights, free = (points.new_zeros(len(points)) for _ in range(3))
    for pose, lens, view in zip(c2w, fxfycxcy, views):
        z, place = project(points, pose, lens)
        depth, facing = pick(torch.cat([view.depth, view.facing]), place)
        empty = depth == 0
        distance = torch.where(empty, 1.0, (depth - z) / truncation).clamp(max=1)
        weight = torch.where(empty, FREE, facing.clamp(min=0) ** 2) * (distance > -1)
        total += distance * weight
        weights += weight
        free += (distance == 1) & (weight > 0)
    inside = (weights < 0.01) | (total >= 0.999 * weights) & (free < THROUGH * len(views))
    return torch.where(inside, -1.0, total / weights.clamp(min=0.01))


def color(vertices: Tensor, c2w: Tensor, fxfycxcy: Tensor, views: list[View], tolerance: float) -> Tensor:
    """Colours (n, 3) in [0, 1], on the CPU: of the pictures in which a vertex is seen, most of those it faces.

    A vertex that no picture shows has the colour of the nearest one that is shown.
    """
    total, weights = vertices.new_zeros(len(vertices), 3), vertices.new_zeros(len(vertices))
    for pose, lens, view in zip(c2w, fxfycxcy, views):
        z, place = project(vertices, pose, lens)
        depth, facing, *rgb = pick(torch.cat(view), place)
        weight = facing.clamp(min=0) ** 2 * ((depth - z).abs() < tolerance)
        total += weight[:, None] * torch.stack(rgb, -1)
        weights += weight
    shown = weights > 1e-3
    colors = (total / weights.clamp(min=1e-3)[:, None]).clamp(0, 1).cpu()
    if shown.any() and not shown.all():
        from scipy.spatial import cKDTree
        shown, places = shown.cpu(), vertices.cpu().numpy()
        colors[~shown] = colors[shown][cKDTree(places[shown]).query(places[~shown])[1]]
    return colors


def glb(made) -> bytes:
    """A mesh as a binary glTF 2.0 file. Its colours are shown as they are, unlit: ours have their light in them.

    glTF wants linear colours. Viewers without KHR_materials_unlit light a rough surface that is no metal.
    """
    srgb = made.visual.vertex_colors[:, :3] / 255.0
    linear = made.copy()
    colors = made.visual.vertex_colors.copy()
    colors[:, :3] = (((srgb + 0.055) / 1.055) ** 2.4 * (srgb > 0.04045) + srgb / 12.92 * (srgb <= 0.04045)) * 255 + 0.5
    linear.visual.vertex_colors = colors

    def unlit(tree: dict) -> None:
        rough = {"metallicFactor": 0.0, "roughnessFactor": 1.0}
        tree["materials"] = [{"pbrMetallicRoughness": rough, "extensions": {"KHR_materials_unlit": {}}}]
        tree["extensionsUsed"] = ["KHR_materials_unlit"]
        tree["meshes"][0]["primitives"][0]["material"] = 0

    return mesh_libraries()[1].exchange.gltf.export_glb(linear, include_normals=True, tree_postprocessor=unlit)


# ---- Which file is what --------------------------------------------------------------------------------------------


class Index:
    """samples.json of a folder: for every object's file what it was made from. Nothing is overwritten that is another.

    A file's name tells the prompt, the seed and the sample; whatever else an object depends on (base, LoRA, sampler,
    steps, guidance) is in the index, and where it differs, the new file gets another name.
    """

    def __init__(self, folder: Path, settings: dict, weights: str):
        names = ("base", "run", "seed", "sampler", "steps", "guidance", "precision")
        self.common = {name: settings[name] for name in names} | {"weights": weights}      # what all objects depend on
        self.folder, self.path, self.entries = folder, folder / "samples.json", {}
        try:
            self.entries = dict(**json.loads(self.path.read_text(encoding="utf-8"))) if self.path.is_file() else {}
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self.path}, which says what the files beside it are, cannot be read ({error}); move it "
                            "away or name another --out") from None
        check_writable(folder)

    def claim(self, prompt: str, sample: int) -> tuple[Path, dict]:
        """Where to write an object's .ply, and what is said of it in the index."""
        about = {"prompt": prompt, "sample": sample, **self.common}
        return self.place(f"{file_stem(prompt)}-seed{self.common['seed']}-{sample}", ".ply", about), about

    def place(self, stem: str, suffix: str, about: dict) -> Path:
        """Where to write what `about` describes: STEM + suffix, or STEM-2 and so on if something else is there."""
        for number in range(1, 10 ** 6):
            name = f"{stem}{'' if number == 1 else f'-{number}'}{suffix}"
            if self.entries.get(name) == about or name not in self.entries and not (self.folder / name).exists():
                return self.folder / name
        raise UserError(f"{self.folder} is full of files called {stem}; name another --out")

    def add(self, path: Path, about: dict) -> None:
        """Say that `path` has been written."""
        self.entries[path.name] = about
        write_atomic(self.path, to_json(self.entries))


def file_stem(prompt: str) -> str:
    """A prompt as a part of a file's name: letters and digits of any script, at most about 100 bytes.

    What was cut, or has no letters, ends in a hash of the prompt: two long prompts that begin alike differ.
    """
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", prompt).lower()).strip("-")
    short = words.encode()[:80].decode(errors="ignore").strip("-")
    try:
        os.fsencode(short)
    except UnicodeEncodeError:                                  # a file system that only has other letters
        short = ""
    if short and short == words:
        return short
    return f"{short or 'prompt'}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"


# ---- A denoiser of its own -----------------------------------------------------------------------------------------


def begin(config) -> Path:
    """The folder that a sampling with these settings writes to.

    UserError, before the work: it cannot be written to, or a mesh or a merged denoiser that is wanted cannot be made.
    """
    home = config.run if config.run and os.path.isdir(config.run) else "runs"
    folder = Path(config.out or f"{home}/samples")
    check_writable(folder)
    if config.mesh:
        mesh_libraries()
    if config.merge and (not config.run or config.weights == "random"):
        raise UserError("--merge needs --run, a run or a LoRA, and the base's own --weights; leave --merge out")
    return folder


def save_merged(made, base: str, weights: str | None, index: Index) -> Path:
    """Write the denoiser with its LoRA merged, as what --weights takes; returns that. `made.net` is merged by this.

    For `shapes` a .safetensors file of the whole base. Else a folder laid out like the published repository: the merged
    network in float32, and what it needs beside it, as hard links where the file system has them. A plug-in that has
    a layout of its own writes it: base.save_network(state, folder, weights). `made` is the base, `base` its name.
    weights: where the base came from, as in --weights. index: of the folder to write to.
    """
    from safetensors.torch import save
    net = made.net.float().cpu().merge_and_unload()
    state = {name: value.detach().contiguous() for name, value in net.state_dict().items()}
    folder = index.place("merged", ".safetensors" if base == "shapes" else "", index.common)
    if base == "shapes":
        source = Path(weights or Path(__file__).with_name("shapes.safetensors"))
        tensors, config = load_weights(source)
        tensors |= {f"net.{name}": value for name, value in state.items()}
        write_atomic(folder, save(tensors, config))
    elif hasattr(made, "save_network"):
        made.save_network(state, folder, weights)
    elif base not in published.PUBLISHED:
        raise UserError(f"--merge does not know how {base} is laid out; give it a method save_network, or leave --merge "
                        "out")
    else:
        names, root = published.PUBLISHED[base], Path(weights) if weights else published.download(base)
        vae = published.newest(root, names["vae"], "gsvae_*", "model.safetensors")
        link(vae, folder / names["vae"] / "checkpoints" / vae.parent.name / vae.name)
        place = folder / names["net"] / "checkpoints/000001" / names["part"]
        write_atomic(place / "config.json", net.to_json_string())
        write_atomic(place / "diffusion_pytorch_model.safetensors", save(state))
    # Without --weights the text encoder is in the hub's cache, where it will be found again.
    others = [] if base == "shapes" or not weights else Path(weights).iterdir()
    for part in others:
        if part.is_dir() and re.match(r"text_encoder|tokenizer|vae$", part.name):
            for file in filter(Path.is_file, part.rglob("*")):
                link(file, folder / file.relative_to(weights))
    index.add(folder, index.common)
    return folder


def link(source: Path, target: Path) -> None:
    """`source` under a second name, or a copy of it where that cannot be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)
