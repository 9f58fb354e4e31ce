"""Cameras around an object: poses, intrinsics, and the rays of their pixels.

World: +y up; azimuth 0 looks from +z, 90 from +x. Cameras have OpenCV axes (x right, y down, z forward), their matrices
are camera-to-world, and intrinsics fx fy cx cy are divided by the size of the image. Follows DiffSplat's
src/utils/geo_util.py and is checked against its recorded output. B objects, V views.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FXFY = 1422.222 / 1024     # focal length in image widths: a field of view of 39.6 degrees (DiffSplat)
RADIUS = 1.4               # distance of the cameras from the origin (DiffSplat)
ELEVATION = 10.0           # degrees above the horizon (DiffSplat)


def orbit(elevation: Tensor | float, azimuth: Tensor | float,
          radius: Tensor | float = RADIUS) -> Tensor:
    """Camera-to-world matrices (..., 4, 4) of cameras that look at the origin, OpenCV axes.

    elevation and azimuth are in degrees (a positive elevation: the camera is above), radius in
    world units; they broadcast against each other.
    """
    tensors = [value if torch.is_tensor(value) else torch.tensor(float(value), dtype=torch.float32)
               for value in (elevation, azimuth, radius)]
    elevation, azimuth, radius = torch.broadcast_tensors(*tensors)
    elevation = torch.deg2rad(elevation)
    azimuth = torch.deg2rad(azimuth)
    to_camera = torch.stack([elevation.cos() * azimuth.sin(), elevation.sin(),
                             elevation.cos() * azimuth.cos()], -1)
    right = torch.stack([azimuth.cos(), torch.zeros_like(radius), -azimuth.sin()], -1)
    down = torch.cross(right, to_camera, dim=-1)
    c2w = torch.eye(4, dtype=radius.dtype, device=radius.device).repeat(*radius.shape, 1, 1)
    c2w[..., :3, :] = torch.stack([right, down, -to_camera, radius[..., None] * to_camera], -1)
    return c2w


def intrinsics(*shape: int) -> Tensor:
    """fx, fy, cx, cy of every camera of this project: (*shape, 4)."""
    return torch.tensor([FXFY, FXFY, 0.5, 0.5], dtype=torch.float32).expand(*shape, 4)


def input_cameras(num_objects: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """DiffSplat's four views of an object: c2w (B, 4, 4, 4), fxfycxcy (B, 4, 4)."""
    c2w = orbit(ELEVATION, torch.tensor([0.0, 90.0, 180.0, 270.0], dtype=torch.float32))
    return c2w.expand(num_objects, 4, 4, 4).to(device), intrinsics(num_objects, 4).to(device)


def plucker_rays(c2w: Tensor, fxfycxcy: Tensor, height: int, width: int,
                 half_image_shift: bool = False) -> Tensor:
    """The pixels' rays (B, V, 6, height, width), as Pluecker coordinates.

    These are [origin x direction, direction]. `half_image_shift` reproduces what the published
    DiffSplat weights were trained with: pixel positions run over [0.5, 1.5] of the image instead
    of its [0, 1], so that the rays are off by half an image.
    """
    rows = torch.arange(height, device=c2w.device)
    columns = torch.arange(width, device=c2w.device)
    if half_image_shift:
        v = rows / max(height - 1, 1) + 0.5
        u = columns / max(width - 1, 1) + 0.5
    else:
        v = (rows + 0.5) / height
        u = (columns + 0.5) / width
    fx, fy, cx, cy = fxfycxcy[..., None, None].unbind(-3)  # (B, V, 1, 1)
    x = ((u - cx) / fx).expand(*c2w.shape[:2], height, width)
    y = ((v[:, None] - cy) / fy).expand_as(x)
    in_camera = torch.stack([x, y, torch.ones_like(x)], 2)
    rays = F.normalize(torch.einsum("bvij,bvjhw->bvihw", c2w[..., :3, :3], in_camera), dim=2)
    origin = c2w[..., :3, 3, None, None].expand_as(rays)
    return torch.cat([torch.cross(origin, rays, dim=2), rays], 2)
