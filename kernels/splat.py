"""rasterize: differentiable splatting of Gaussians, all objects and all views in one call.

Colour, alpha, expected depth, median depth and normals in one pass, with the semantics of RaDe-GS, the rasteriser
that DiffSplat and Nabla-R2D3 render with. Lift this file on its own: it needs torch.

Mathematics. Camera axes: x right, y down, z forward. One Gaussian in one view:

    A = R_wc R(q), S = A diag(s)^2 A^T      R(q) is the polynomial of q as it is: like the published rasteriser,
                                            and unlike gsplat, q is not normalised here
    t = (tx, ty, tz)                        the centre; dropped unless tz > 0.2
    u = tx/tz, v = ty/tz                    clamped to 1.3 tan(fov/2) in all that follows, not in the position xy
    J = [[fx/tz, 0, -fx u/tz], [0, fy/tz, -fy v/tz]]                  fx, fy in pixels
    C = J S J^T                             no dilation. det C = |J0 M x J1 M|^2 with M = A diag(s): no cancellation
    o = opacity sqrt(det C / (det C + 1e-6) + 1e-6)                   dropped if det C <= 1e-6 (as published)
    raw_i = o exp(-d_i^T C^-1 d_i / 2)      d_i = xy - pixel_i; pixel (row, column) has its centre at (column, row)
          = exp(log o - h dy^2 - (a dx - r dy)^2)       h = 1 / 2 C_yy,  a^2 = C_yy / 2 det C,  r = a C_xy / C_yy
    alpha_i = min(raw_i, 0.99)              0 below 1/255: outside of a box of half sides sqrt(2 ln(255 o) C_xx), ...
    m = S^-1 (u, v, 1) up to a factor       = cof(A) diag(s_min / s)^2 cof(A)^T (u, v, 1): also for flat Gaussians
    q = m / max(m . (u, v, 1), 1e-7 |m|),   p = tz sqrt(nl) ((q_x - u/nl) / fx, (q_y - v/nl) / fy),   nl = 1 + u^2 + v^2
    t_i = |t| + p . d_i                     length of the pixel's ray up to the Gaussian's own plane
    n = -m / |m|                            normal, camera space, facing the camera

The Gaussians that reach a pixel, in order of tz (T_1 = 1), up to the first that would take T below 1e-4:

    w_k = alpha_k T_k,  T_{k+1} = T_k (1 - alpha_k),        out = sum_k w_k f_k        f = (colour, 1, t, n)
    image = out_colour + (1 - alpha) background             alpha = out_1 = 1 - T_last
    depth = out_t / (alpha ln)              z-depth; ln = |ray| / ray_z of the pixel; 0 where nothing is
    normal = out_n / max(|out_n|, 1e-12)
    median_depth = t_k / ln                 of the last contributor with T_k > 1/2; 0 where nothing is

Backward. With g = dL/dout (per pixel), v_k = g . f_k and the suffix sum R_k = g . out - sum_{j <= k} w_j v_j:

    dL/df_k = sum over pixels of w_k g
    dL/dalpha_k = T_k v_k - R_k / (1 - alpha_k)
    dL/dlog raw_k = raw_k dL/dalpha_k       the clamp at 0.99 lets the gradient through, as published

and log raw is a polynomial of dx, dy, so that six moments over a tile's pixels give the gradients of a, r, h, xy, log o.
Nothing per pixel and Gaussian is stored: the backward pass goes through the lists once more, front to back.

Differences from the published CUDA: the exact support box instead of 3 standard deviations rounded up to whole
tiles; ln at pixel centres (published: half a pixel off); the median's gradient reaches all of its Gaussian's t.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

NEAR = 0.2  # Gaussians closer than this are dropped
ALPHA_MIN, ALPHA_MAX = 1 / 255, 0.99
T_MIN = 1e-4
FOV_MARGIN = 1.3
VANISHING = 1e-6  # of det C, in pixels^4


class Render(NamedTuple):
    """What rasterize returns; B objects, V views. Normals are in camera space and face the camera."""

    image: torch.Tensor  # (B, V, 3, H, W)
    alpha: torch.Tensor  # (B, V, 1, H, W) in [0, 1]
    depth: torch.Tensor  # (B, V, 1, H, W) expected z-depth in world units, 0 where nothing is
    median_depth: torch.Tensor  # (B, V, 1, H, W)
    normal: torch.Tensor  # (B, V, 3, H, W) of unit length, 0 where nothing is


# ---- PyTorch: the CPU path, and the specification of the kernels -------------------------------------------

TILE = 8  # pixels along a tile's side
CHUNK = 16  # Gaussians composited at once
GROUP = 512  # tiles worked on at once: their temporaries fit into a core's cache
CHANNELS = 10  # red green blue, 1, t at the tile's centre, p_x, p_y, normal


def _rotation(q):
    """(..., 4) wxyz -> (..., 3, 3), the usual polynomial; a rotation where |q| = 1."""
    w, x, y, z = q.unbind(-1)
    return torch.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1).unflatten(-1, (3, 3))


def _project(means, quats, scales, opacities, colors, c2w, fxfycxcy, H, W):
    """The splats that a view can see: shape [L, 6] = x, y, a, r, h, log o; features [L, 10]; depth order key, box, view.

    Everything that depends on a Gaussian alone is computed once, then gathered for each view that sees it.
    """
    B, N = means.shape[:2]
    V = c2w.shape[1]
    rotation, origin = c2w[..., :3, :3], c2w[..., :3, 3]
    with torch.no_grad():
        z = torch.einsum("bvi,bvni->bvn", rotation[..., 2], means[:, None] - origin[:, :, None])
        b, view, n = ((z > NEAR) & (opacities > ALPHA_MIN)[:, None]).nonzero(as_tuple=True)
    A = _rotation(quats)
    cof = torch.stack([torch.linalg.cross(A[..., (k + 1) % 3], A[..., (k + 2) % 3]) for k in range(3)], -1)
    s = scales.clamp(min=1e-12)
    shape = (cof * (s.detach().amin(-1, keepdim=True) / s)[..., None, :] ** 2) @ cof.mT  # S^-1 up to a factor
    own = torch.cat([means, (A * scales[..., None, :]).flatten(-2), shape.flatten(-2), opacities[..., None], colors], -1)
    own = own.flatten(0, 1).index_select(0, b * N + n)
    world, M, shape, opacity, color = own.split([3, 9, 9, 1, 3], -1)

    row = b * V + view
    to_camera = rotation.flatten(0, 1).mT[row]  # [L, 3, 3]
    t = (to_camera @ (world - origin.flatten(0, 1)[row])[..., None])[..., 0]
    M = to_camera @ M.unflatten(-1, (3, 3))
    fx, fy, cx, cy = (fxfycxcy.flatten(0, 1)[row] * fxfycxcy.new_tensor([W, H, W, H])).unbind(-1)
    tx, ty, tz = t.unbind(-1)
    x, y = fx * tx / tz + cx - 0.5, fy * ty / tz + cy - 0.5
    u, v = ((c / tz).clamp(-limit, limit) for c, limit in ((tx, FOV_MARGIN * W / 2 / fx), (ty, FOV_MARGIN * H / 2 / fy)))
    JM0, JM1 = (fx / tz)[:, None] * (M[:, 0] - u[:, None] * M[:, 2]), (fy / tz)[:, None] * (M[:, 1] - v[:, None] * M[:, 2])
    C_xx, C_xy, C_yy = (JM0 * JM0).sum(-1), (JM0 * JM1).sum(-1), (JM1 * JM1).sum(-1)
    det = torch.linalg.cross(JM0, JM1).square().sum(-1)
    o = opacity[:, 0] * (det / (det + VANISHING) + VANISHING).sqrt()

    with torch.no_grad():
        reach = 2 * (o / ALPHA_MIN).log()  # below 0, then NaN, then not live, where o < 1/255
        half_x, half_y = (reach * C_xx).sqrt(), (reach * C_yy).sqrt()
        box = torch.stack([(x - half_x).ceil().clamp(min=0), (x + half_x).floor().clamp(max=W - 1),
                           (y - half_y).ceil().clamp(min=0), (y + half_y).floor().clamp(max=H - 1)], -1)
        live = ((box[:, 0] <= box[:, 1]) & (box[:, 2] <= box[:, 3]) & (det > VANISHING)).nonzero()[:, 0]
        live = live[tz[live].argsort(stable=True)]  # front to back
        box, row = box[live].long(), row[live]
    keep = [vector.index_select(0, live) for vector in (x, y, u, v, fx, fy, tz, C_xy, C_yy, det, o)]
    x, y, u, v, fx, fy, tz, C_xy, C_yy, det, o = keep
    t, shape, to_camera = t.index_select(0, live), shape.index_select(0, live), to_camera[live]
    a = (C_yy / (2 * det)).sqrt()
    splat = torch.stack([x, y, a, a * C_xy / C_yy, 0.5 / C_yy, o.log()], -1)

    ray = torch.stack([u, v, torch.ones_like(u)], -1)
    m = (to_camera @ (shape.unflatten(-1, (3, 3)) @ (to_camera.mT @ ray[..., None])))[..., 0]
    norm = m.norm(dim=-1).clamp(min=1e-30)
    q = m / torch.maximum((m * ray).sum(-1), 1e-7 * norm)[:, None]
    nl = 1 + u * u + v * v
    length = tz * nl.sqrt()
    features = torch.cat([color.index_select(0, live), torch.ones_like(u)[:, None], torch.stack(
        [t.norm(dim=-1), length * (q[:, 0] - u / nl) / fx, length * (q[:, 1] - v / nl) / fy], -1), -m / norm[:, None]], -1)
    return splat, features, box, row


class _Lists(NamedTuple):
    """Which splats reach which tile, front to back."""

    splats: torch.Tensor  # [pairs] splat numbers, tile by tile
    start: torch.Tensor  # [tiles + 1] where each tile's list begins
    tiles_x: int
    tiles_y: int
    live_pixels: torch.Tensor  # [tiles, TILE * TILE] 1. for the pixels that are in the picture


def _tile_lists(box, row, views, H, W, dtype):
    tiles_x, tiles_y = -(-W // TILE), -(-H // TILE)
    x0, x1, y0, y1 = (box // TILE).unbind(-1)
    wide, counts = x1 - x0 + 1, (x1 - x0 + 1) * (y1 - y0 + 1)
    splat = torch.repeat_interleave(counts)
    step = torch.arange(len(splat), device=box.device) - (counts.cumsum(0) - counts)[splat]
    tile = (row * (tiles_x * tiles_y) + y0 * tiles_x + x0)[splat] + step // wide[splat] * tiles_x + step % wide[splat]
    tile, order = tile.int().sort(stable=True)
    lengths = tile.bincount(minlength=views * tiles_x * tiles_y)
    inside_y, inside_x = ((torch.arange(n * TILE, device=box.device) < size).unflatten(0, (n, TILE))
                          for n, size in ((tiles_y, H), (tiles_x, W)))
    inside = (inside_y[:, None, :, None] & inside_x[None, :, None, :]).flatten(2).flatten(0, 1).to(dtype)
    return _Lists(splat[order], F.pad(lengths.cumsum(0), (1, 0)), tiles_x, tiles_y, inside.repeat(views, 1))


def _chunks(lists, splat, features):
    """Go through all lists front to back, CHUNK splats of up to GROUP tiles at a time.

    Yields the tiles [A] of a step and their chunk; the consumer sends back T [A, pixels] after it, and tiles in which
    all pixels are opaque are not visited again.
    """
    device, tiles = splat.device, lists.tiles_x * lists.tiles_y
    offsets = torch.arange(TILE, device=device, dtype=splat.dtype) - (TILE - 1) / 2  # pixels from the tile's centre
    lanes = torch.arange(CHUNK, device=device)
    for group in (lists.start[1:] > lists.start[:-1]).nonzero()[:, 0].split(GROUP):
        T, position, active = lists.live_pixels[group], lists.start[group], group
        while len(active):
            end = lists.start[active + 1]
            pair = position[:, None] + lanes  # [A, K]
            chosen = lists.splats[pair.clamp(max=len(lists.splats) - 1)]
            x, y, a, r, h, log_o = splat[chosen].unbind(-1)  # [A, K] each
            log_o = log_o.masked_fill(pair >= end[:, None], -math.inf)
            x = x - (active % lists.tiles_x * TILE)[:, None] - (TILE - 1) / 2  # from the tile's centre
            y = y - (active % tiles // lists.tiles_x * TILE)[:, None] - (TILE - 1) / 2
            dx, dy = x[:, None] - offsets[:, None], y[:, None] - offsets[:, None]  # [A, TILE, K]
            e = (a[:, None] * dx)[:, None] - (r[:, None] * dy)[:, :, None]  # [A, TILE (y), TILE (x), K]
            log_raw = torch.addcmul((log_o[:, None] - h[:, None] * dy * dy)[:, :, None], e, e, value=-1)
            raw = F.threshold(log_raw.exp_().flatten(1, 2), ALPHA_MIN, 0.0)  # [A, pixels, K]
            alpha = raw.clamp(max=ALPHA_MAX)
            after = T[:, :, None] * (1 - alpha).cumprod(-1)
            before = torch.cat([T[:, :, None], after[..., :-1]], -1)
            f = features[chosen]  # [A, K, 10]
            f[..., 4] += f[..., 5] * x + f[..., 6] * y
            weights = torch.where(after >= T_MIN, alpha * before, 0.0)
            yield active, chosen, (x, y, a, r, h), f, raw, alpha, before, weights
            T, position = after[..., -1], position + CHUNK
            more = ((T >= T_MIN).any(1) & (position < end)).nonzero()[:, 0]
            T, position, active = T[more], position[more], active[more]


class _Composite(torch.autograd.Function):
    """splat [L, 6], features [L, 10] -> sums [tiles, pixels, 10] and the median splat's number [tiles, pixels] or -1."""

    @staticmethod
    def forward(ctx, splat, features, lists):
        tiles = len(lists.start) - 1
        out = splat.new_zeros(tiles, TILE * TILE, CHANNELS)
        median = torch.full((tiles, TILE * TILE), -1, device=splat.device)
        numbers = torch.arange(1, CHUNK + 1, device=splat.device, dtype=torch.int8)
        for active, chosen, _, f, _, _, before, weights in _chunks(lists, splat, features):
            out[active] += weights @ f
            near = (before[..., 0] > 0.5).any(1).nonzero()[:, 0]
            if len(near):
                last = (((before[near] > 0.5) & (weights[near] > 0)) * numbers).amax(-1).long()  # 0: none
                found = chosen[near].gather(1, (last - 1).clamp(min=0))
                median[active[near]] = torch.where(last > 0, found, median[active[near]])
        ctx.save_for_backward(splat, features, out)
        ctx.lists = lists
        ctx.mark_non_differentiable(median)
        return out, median

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, _):
        splat, features, out = ctx.saved_tensors
        rest = (g * out).sum(-1, keepdim=True)  # [tiles, pixels, 1]: what lies behind, in units of the loss
        grads = splat.new_zeros(len(splat), 6 + CHANNELS)
        offset = torch.arange(TILE, device=g.device, dtype=g.dtype) - (TILE - 1) / 2
        py, px = (axis.flatten() for axis in torch.meshgrid(offset, offset, indexing="ij"))
        basis = torch.stack([torch.ones_like(px), px, py, px * px, px * py, py * py])  # [6, pixels]
        for active, chosen, (x, y, a, r, h), f, raw, alpha, before, weights in _chunks(ctx.lists, splat, features):
            g_tile = g[active]
            value = g_tile @ f.mT  # [A, pixels, K]
            behind = rest[active] - (weights * value).cumsum(-1)
            rest[active] = behind[..., -1:]
            # a splat that was not blended (alpha 0, or behind the last one) gets nothing
            g_raw = torch.where(weights > 0, raw * (before * value - behind / (1 - alpha)), 0.0)
            one, sx, sy, sxx, sxy, syy = (basis @ g_raw).unbind(1)  # [A, K] each
            gx, gy = x * one - sx, y * one - sy  # sums of g dx, g dy, g dx dx, ...
            gxx, gyy = x * (x * one - 2 * sx) + sxx, y * (y * one - 2 * sy) + syy
            gxy = x * y * one - x * sy - y * sx + sxy
            ge = a * gx - r * gy
            gf = weights.mT @ g_tile  # [A, K, 10]
            gt, p = gf[..., 4:5], f[..., 5:7]
            gf[..., 5:7] += gt * torch.stack([x, y], -1)
            g_splat = torch.stack([-2 * a * ge, 2 * r * ge - 2 * h * gy, 2 * (r * gxy - a * gxx),
                                   2 * (a * gxy - r * gyy), -gyy, one], -1)
            g_splat[..., :2] += gt * p
            grads.index_add_(0, chosen.flatten(), torch.cat([g_splat, gf], -1).flatten(0, 1))
        return grads[:, :6], grads[:, 6:], None


def _rasterize_torch(means, quats, scales, opacities, colors, c2w, fxfycxcy, H, W, background):
    B, V = c2w.shape[:2]
    splat, features, box, row = _project(means, quats, scales, opacities, colors, c2w, fxfycxcy, H, W)
    lists = _tile_lists(box, row, B * V, H, W, means.dtype)
    out, median = _Composite.apply(splat, features, lists)

    def picture(tiled):  # [tiles, pixels, ...] -> (B, V, ..., H, W)
        tiled = tiled.unflatten(0, (B, V, lists.tiles_y, lists.tiles_x)).unflatten(4, (TILE, TILE))
        return tiled.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)[..., :H, :W]

    offset = torch.arange(TILE, device=means.device, dtype=means.dtype) - (TILE - 1) / 2
    t = out[..., 4] - out[..., 5] * offset.repeat(TILE) - out[..., 6] * offset.repeat_interleave(TILE)
    sums = picture(torch.cat([out[..., :4], t[..., None], out[..., 7:]], -1))  # (B, V, 8, H, W)
    color, alpha, t, normal = sums.split([3, 1, 1, 3], 2)

    fx, fy, cx, cy = fxfycxcy[..., None, None, None].unbind(2)  # (B, V, 1, 1, 1)
    column, line = (torch.arange(size, device=means.device, dtype=means.dtype) for size in (W, H))
    line = line[:, None]
    ray_x, ray_y = ((column + 0.5) / W - cx) / fx, ((line + 0.5) / H - cy) / fy
    ln = (ray_x ** 2 + ray_y ** 2 + 1).sqrt()
    depth = torch.where(alpha > 0, t / (alpha.clamp(min=1e-12) * ln), 0.0)

    median = picture(median[..., None])  # (B, V, 1, H, W)
    if len(splat):
        k = median.clamp(min=0).flatten()
        xy, plane = splat[:, :2].index_select(0, k), features[:, 4:7].index_select(0, k)
        pixel = torch.stack([column.expand(B, V, 1, H, W), line.expand(B, V, 1, H, W)], -1).reshape(-1, 2)
        t = plane[:, 0] + (plane[:, 1:] * (xy - pixel)).sum(-1)
        median = torch.where(median >= 0, t.view(median.shape) / ln, 0.0)
    else:
        median = torch.zeros_like(alpha)
    image = color + (1 - alpha) * background.view(3, 1, 1)
    return Render(image, alpha, depth, median, F.normalize(normal, dim=2, eps=1e-12))


# ---- the public function -----------------------------------------------------------------------------------


def rasterize(
    means,  # (B, N, 3) world space
    quats,  # (B, N, 4) wxyz, used as they are
    scales,  # (B, N, 3) standard deviations, >= 0
    opacities,  # (B, N) in [0, 1]
    colors,  # (B, N, 3)
    c2w,  # (B, V, 4, 4) camera to world, OpenCV axes
    fxfycxcy,  # (B, V, 4) divided by the picture's width and height
    height,
    width,
    background=(1.0, 1.0, 1.0),  # three numbers, or a tensor (3,)
    *,
    backend=None,  # "torch" | "triton" | None: triton for tensors on a GPU, torch otherwise
    deterministic=False,  # gradients with the same bits every time; they always have on a CPU
):
    """Render (image, alpha, depth, median_depth, normal) of every object in every view; see the head of this file.

    Differentiable in means, quats, scales, opacities and colors; float32, in the PyTorch path also float64.
    ValueError: a shape, dtype, device or backend that does not fit.
    """
    if not (torch.is_tensor(means) and means.ndim == 3 and means.shape[2] == 3):
        raise ValueError(f"means: wanted a tensor (B, N, 3), got {tuple(getattr(means, 'shape', ())) or type(means)}")
    if not (torch.is_tensor(c2w) and c2w.ndim == 4):
        raise ValueError(f"c2w: wanted a tensor (B, V, 4, 4), got {tuple(getattr(c2w, 'shape', ())) or type(c2w)}")
    B, N, V = *means.shape[:2], c2w.shape[1]
    background = torch.as_tensor(background, dtype=means.dtype, device=means.device)
    wanted = {"quats": (quats, (B, N, 4)), "scales": (scales, (B, N, 3)), "opacities": (opacities, (B, N)),
              "colors": (colors, (B, N, 3)), "c2w": (c2w, (B, V, 4, 4)), "fxfycxcy": (fxfycxcy, (B, V, 4)),
              "background": (background, (3,))}
    for name, (tensor, shape) in wanted.items():
        got = tuple(tensor.shape) if torch.is_tensor(tensor) else type(tensor).__name__
        if got != shape:
            raise ValueError(f"{name}: wanted a tensor of shape {shape}, got {got}")
        if tensor.device != means.device or tensor.dtype != means.dtype:
            raise ValueError(f"{name}: wanted {means.dtype} on {means.device} like means, got {tensor.dtype} on {tensor.device}")
    if not means.is_floating_point():
        raise ValueError(f"means: wanted floats, got {means.dtype}")
    if height < 1 or width < 1:
        raise ValueError(f"height, width: wanted at least 1 x 1, got {height} x {width}")
    if backend not in (None, "torch"):
        raise ValueError(f"backend: wanted 'torch', 'triton' or None, got {backend!r}")
    return _rasterize_torch(means, quats, scales, opacities, colors, c2w, fxfycxcy, height, width, background)
