"""rasterize: differentiable splatting of Gaussians, all objects and all views in one call.

Colour, alpha, expected depth, median depth and normals in one pass, with the semantics of RaDe-GS, the
rasteriser that DiffSplat and Nabla-R2D3 render with. Lift this file on its own: it needs torch, and triton
where a GPU is to be used.

Mathematics. Camera axes: x right, y down, z forward. One Gaussian in one view:

    A = R_wc R(q), S = A diag(s)^2 A^T      R(q) is the polynomial of q as it is: like the published
                                            rasteriser, and unlike gsplat, q is not normalised here
    t = (tx, ty, tz)                        the centre; dropped unless tz > 0.2
    u = tx/tz, v = ty/tz                    clamped to 1.3 tan(fov/2) in all that follows, not in xy
    J = [[fx/tz, 0, -fx u/tz], [0, fy/tz, -fy v/tz]]                  fx, fy in pixels
    C = J S J^T + dilation I                det J S J^T = |J0 M x J1 M|^2 with M = A diag(s) is exact. No
                                            dilation unless asked for; INRIA's rasteriser and gsplat have 0.3
    o = opacity sqrt(det C / (det C + 1e-6) + 1e-6)                   dropped if det C <= 1e-6 (as published)
    raw_i = o exp(-d_i^T C^-1 d_i / 2)      d_i = xy - pixel_i; a pixel's centre is at (column, row)
          = exp(log o - h dy^2 - e^2)       e = a (dx - slope dy),  slope = C_xy / C_yy
                                            h = 1 / 2 C_yy,  a^2 = C_yy / 2 det C
    alpha_i = min(raw_i, 0.99)              0 where raw_i is below 1/255, so outside a box of half sides
                                            sqrt(2 ln(255 o) C_xx), sqrt(2 ln(255 o) C_yy)
    m = S^-1 (u, v, 1) up to a factor       = cof(A) diag(s_min / s)^2 cof(A)^T (u, v, 1): flat Gaussians too
    q = m / max(m . (u, v, 1), 1e-7 |m|)
    p = tz sqrt(nl) ((q_x - u/nl) / fx, (q_y - v/nl) / fy)            nl = 1 + u^2 + v^2
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

and log raw is a polynomial of e, dy, so that six moments over a tile's pixels (sums of g, g e, g dy, g e e,
g e dy, g dy dy; g = dL/dlog raw) give the gradients of a, slope, h, xy, log o. Powers of e and not of dx: of
a Gaussian much thinner than a pixel the sums of g dx dx, g dx dy, g dy dy nearly cancel. Nothing per pixel
and Gaussian is stored: the backward pass goes through the lists once more, front to back.

Contract: B objects of N Gaussians, V views, everything on one device

    float32; in the PyTorch path float64 too; other dtypes raise. Under autocast the same is computed.
    Differentiable once in means, quats, scales, opacities and colors: second derivatives raise.
    A Gaussian with a number that is not finite, or too large for its projection to be finite, is dropped, and
    so is all that a camera sees that is not finite or has fx or fy <= 0: gradients are zero, the picture is
    the background, and nothing else changes by a bit.
    The Triton path raises where a constant (c2w, fxfycxcy, background) wants a gradient, and copies what is
    not contiguous. It never waits for the GPU and can be captured in a CUDA graph, forward and backward;
    torch.compile goes around it. Its pictures have the same bits every time. Its gradients are added up by
    atomics in any order, unless deterministic=True: then the sums of each pair of a Gaussian and a tile are
    stored, 64 bytes, and added up in the order of the tiles. On a CPU gradients have the same bits every
    time.
    capacity is the number of pairs that there is room for, some 20 bytes each. By default: a quarter more
    than late calls of this shape needed, which the host learns without waiting, two per Gaussian and view in
    a first call. Where it is too small, which the GPU finds out, each tile goes through all Gaussians of its
    view, front to back, and tests their boxes. That is slow, and the same to the bit: no picture, and no
    deterministic gradient, depends on the capacity.
    Gradients of flat Gaussians in float32: any s_min / s_max. Seen edge-on they are differences of large
    numbers (1e-4 of the largest where s_min / s_max is below 1e-3).

Differences from the published CUDA: the exact support box instead of 3 standard deviations rounded up to
whole tiles; ln at pixel centres (published: half a pixel off); the median's gradient reaches all of its
Gaussian's t; flat Gaussians have the normal and plane of the formula above, not those of the inverse of rank
one that the published code takes where the least eigenvalue of S is below 1e-8.
"""
import math
import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # the PyTorch path needs no triton
    triton = None

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

TILE = 4  # pixels along a tile's side: splats are a few pixels wide
CHUNK = 16  # Gaussians composited at once
GROUP = 2048  # tiles worked on at once: their temporaries fit into a core's cache
CHANNELS = 10  # red green blue, 1, t at the tile's centre, p_x, p_y, normal


def _rotation(q):
    """(..., 4) wxyz -> (..., 3, 3), the usual polynomial; a rotation where |q| = 1."""
    w, x, y, z = q.unbind(-1)
    return torch.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1).unflatten(-1, (3, 3))


def _splats(gaussians, cameras, which, row, H, W, dilation):
    """Gaussian which[i] (of [B N, 14]) in view row[i] (of [B V, 16]): splat [L, 6] = x, y, a, slope, h,
    log o; features [L, 10]; t_z, C_xx [L].

    Everything that depends on a Gaussian alone is computed once, then gathered for each of its views. Nothing
    else is touched: a number that is not finite elsewhere reaches no gradient, not even as 0 x NaN.
    """
    used = torch.zeros(len(gaussians), dtype=torch.bool, device=gaussians.device).index_fill(0, which, True)
    which = (used.cumsum(0) - 1)[which]
    own = gaussians.index_select(0, used.nonzero()[:, 0])
    world, quats, scales, opacity, color = own.split([3, 4, 3, 1, 3], -1)
    A = _rotation(quats)
    cof = torch.stack([torch.linalg.cross(A[..., (i + 1) % 3], A[..., (i + 2) % 3]) for i in range(3)], -1)
    s = scales.clamp(min=1e-12)
    # The factor of m is free, so s_min is no constant here and the thinnest axis has D = 1: its gradient
    # comes by way of the others. Its own would be a small difference of numbers (s / s_min)^2 times larger.
    thinnest = s.argmin(-1, keepdim=True)
    D = ((s.gather(-1, thinnest) / s) ** 2).scatter(-1, thinnest, 1.0)
    shape = (cof * D[..., None, :]) @ cof.mT  # S^-1 up to a factor
    M = A * scales[..., None, :]
    own = torch.cat([world, M.flatten(-2), shape.flatten(-2), opacity, color], -1).index_select(0, which)
    world, M, shape, opacity, color = own.split([3, 9, 9, 1, 3], -1)

    c2w, fxfycxcy = cameras.index_select(0, row).split([12, 4], -1)
    c2w = c2w.unflatten(-1, (3, 4))
    to_camera = c2w[..., :3].mT  # [L, 3, 3]
    t = (to_camera @ (world - c2w[..., 3])[..., None])[..., 0]
    M = to_camera @ M.unflatten(-1, (3, 3))
    fx, fy, cx, cy = (fxfycxcy * fxfycxcy.new_tensor([W, H, W, H])).unbind(-1)
    tx, ty, tz = t.unbind(-1)
    x, y = fx * tx / tz + cx - 0.5, fy * ty / tz + cy - 0.5
    limit_u, limit_v = FOV_MARGIN * W / 2 / fx, FOV_MARGIN * H / 2 / fy
    u, v = (tx / tz).clamp(-limit_u, limit_u), (ty / tz).clamp(-limit_v, limit_v)
    JM0 = (fx / tz)[:, None] * (M[:, 0] - u[:, None] * M[:, 2])
    JM1 = (fy / tz)[:, None] * (M[:, 1] - v[:, None] * M[:, 2])
    C_xx, C_xy, C_yy = (JM0 * JM0).sum(-1), (JM0 * JM1).sum(-1), (JM1 * JM1).sum(-1)
    det = torch.linalg.cross(JM0, JM1).square().sum(-1) + dilation * (C_xx + C_yy + dilation)
    C_xx, C_yy = C_xx + dilation, C_yy + dilation
    det = torch.where(det > VANISHING, det, torch.nan)  # log o becomes NaN: dropped
    o = opacity[:, 0] * (det / (det + VANISHING) + VANISHING).sqrt()
    splat = torch.stack([x, y, (C_yy / (2 * det)).sqrt(), C_xy / C_yy, 0.5 / C_yy, o.log()], -1)

    ray = torch.stack([u, v, torch.ones_like(u)], -1)
    m = (to_camera @ (shape.unflatten(-1, (3, 3)) @ (to_camera.mT @ ray[..., None])))[..., 0]
    norm = m.norm(dim=-1).clamp(min=1e-30)
    q = m / torch.maximum((m * ray).sum(-1), 1e-7 * norm)[:, None]
    nl = 1 + u * u + v * v
    length = tz * nl.sqrt()
    p_x, p_y = length * (q[:, 0] - u / nl) / fx, length * (q[:, 1] - v / nl) / fy
    plane = torch.stack([torch.ones_like(u), t.norm(dim=-1), p_x, p_y], -1)
    return splat, torch.cat([color, plane, -m / norm[:, None]], -1), tz, C_xx


def _project(means, quats, scales, opacities, colors, c2w, fxfycxcy, H, W, dilation=0.0):
    """The splats that a view can see, front to back: splat [L, 6], features [L, 10], box [L, 4], view [L]."""
    (B, N), V = means.shape[:2], c2w.shape[1]
    gaussians = torch.cat([means, quats, scales, opacities[..., None], colors], -1).flatten(0, 1)
    cameras = torch.cat([c2w[..., :3, :].flatten(2), fxfycxcy], -1).flatten(0, 1)
    with torch.no_grad():
        fine = gaussians.isfinite().all(-1).view(B, N)
        usable = (cameras.isfinite().all(-1) & (cameras[:, 12:14] > 0).all(-1)).view(B, V)
        z = torch.einsum("bvi,bvni->bvn", c2w[..., :3, 2], means[:, None] - c2w[:, :, None, :3, 3])
        # o is at most 5e-7 above the opacity: what this lets through in vain is dropped below
        fine &= opacities > 0.999 * ALPHA_MIN
        b, view, n = ((z > NEAR) & fine[:, None] & usable[:, :, None]).nonzero(as_tuple=True)
        which, row = b * N + n, b * V + view
        splat, features, tz, C_xx = _splats(gaussians, cameras, which, row, H, W, dilation)
        x, y, _, _, h, log_o = splat.unbind(-1)
        reach = 2 * (log_o - math.log(ALPHA_MIN))  # where o is below 1/255 it is below 0, and the box NaN
        half_x, half_y = (reach * C_xx).sqrt(), (reach * 0.5 / h).sqrt()
        box = torch.stack([(x - half_x).ceil().clamp(min=0), (x + half_x).floor().clamp(max=W - 1),
                           (y - half_y).ceil().clamp(min=0), (y + half_y).floor().clamp(max=H - 1)], -1)
        finite = torch.cat([splat, features], -1).isfinite().all(-1)
        live = (finite & (box[:, 0] <= box[:, 1]) & (box[:, 2] <= box[:, 3])).nonzero()[:, 0]
        live = live[tz[live].argsort(stable=True)]
        which, row, box = which[live], row[live], box[live].long()
    if torch.is_grad_enabled() and (gaussians.requires_grad or cameras.requires_grad):
        splat, features, _, _ = _splats(gaussians, cameras, which, row, H, W, dilation)
    else:
        splat, features = splat[live], features[live]
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
    first, wide = (row * (tiles_x * tiles_y) + y0 * tiles_x + x0)[splat], wide[splat]
    tile = first + step // wide * tiles_x + step % wide
    tile, order = tile.int().sort(stable=True)
    lengths = tile.bincount(minlength=views * tiles_x * tiles_y)
    inside_y, inside_x = ((torch.arange(n * TILE, device=box.device) < size).unflatten(0, (n, TILE))
                          for n, size in ((tiles_y, H), (tiles_x, W)))
    inside = (inside_y[:, None, :, None] & inside_x[None, :, None, :]).flatten(2).flatten(0, 1).to(dtype)
    return _Lists(splat[order], F.pad(lengths.cumsum(0), (1, 0)), tiles_x, tiles_y, inside.repeat(views, 1))


def _chunks(lists, splat, features):
    """Go through all lists front to back, CHUNK splats of up to GROUP tiles at a time.

    Yields the active tiles of a step, numbers [active], and their chunk. Tiles in which all pixels are opaque
    are left out.
    """
    device, tiles = splat.device, lists.tiles_x * lists.tiles_y
    offsets = torch.arange(TILE, device=device, dtype=splat.dtype) - (TILE - 1) / 2  # from the tile's centre
    lanes = torch.arange(CHUNK, device=device)
    below = splat.new_tensor(ALPHA_MIN).nextafter(splat.new_zeros(())).item()  # ALPHA_MIN itself is kept
    for group in (lists.start[1:] > lists.start[:-1]).nonzero()[:, 0].split(GROUP):
        T, position, active = lists.live_pixels[group], lists.start[group], group
        while len(active):
            end = lists.start[active + 1]
            pair = position[:, None] + lanes  # [active, K]
            chosen = lists.splats[pair.clamp(max=len(lists.splats) - 1)]
            x, y, a, slope, h, log_o = splat[chosen].unbind(-1)  # [active, K] each
            log_o = log_o.masked_fill(pair >= end[:, None], -math.inf)
            x = x - (active % lists.tiles_x * TILE)[:, None] - (TILE - 1) / 2  # from the tile's centre
            y = y - (active % tiles // lists.tiles_x * TILE)[:, None] - (TILE - 1) / 2
            dx, dy = x[:, None] - offsets[:, None], y[:, None] - offsets[:, None]  # [active, TILE, K]
            # [active, TILE (y), TILE (x), K]
            e = (a[:, None] * dx)[:, None] - ((a * slope)[:, None] * dy)[:, :, None]
            log_raw = torch.addcmul((log_o[:, None] - h[:, None] * dy * dy)[:, :, None], e, e, value=-1)
            # exp takes thirty times as long where its result underflows, and this is most of a tile's pixels
            raw = log_raw.clamp_(min=-20).exp_().flatten(1, 2)  # [active, pixels, K]
            raw = F.threshold(raw, below, 0.0)  # keeps what is larger
            alpha = raw.clamp(max=ALPHA_MAX)
            after = T[:, :, None] * (1 - alpha).cumprod(-1)
            before = torch.cat([T[:, :, None], after[..., :-1]], -1)
            f = features[chosen]  # [active, K, 10]
            f[..., 4] += f[..., 5] * x + f[..., 6] * y
            weights = torch.where(after >= T_MIN, alpha * before, 0.0)
            yield active, chosen, (x, y, a, slope, h), (dy, e), f, raw, alpha, before, weights
            T, position = after[..., -1], position + CHUNK
            more = ((T >= T_MIN).any(1) & (position < end)).nonzero()[:, 0]
            T, position, active = T[more], position[more], active[more]


class _Once(torch.autograd.Function):
    """Gradients as they are. To differentiate them raises: nothing would be found, and taken for zero."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tensors[:count]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("rasterize: its gradients cannot be differentiated again (second derivatives are "
                           "not implemented): detach them, or leave create_graph out")


def _once(gradients, *sources):
    """Gradients that say no where somebody asks for theirs; `sources` is what they were computed from."""
    return _Once.apply(len(gradients), *gradients, *sources) if torch.is_grad_enabled() else gradients


class _Composite(torch.autograd.Function):
    """splat [L, 6], features [L, 10] -> sums [tiles, pixels, 10], median's splat [tiles, pixels] or -1."""

    @staticmethod
    def forward(ctx, splat, features, lists):
        tiles = len(lists.start) - 1
        out = splat.new_zeros(tiles, TILE * TILE, CHANNELS)
        median = torch.full((tiles, TILE * TILE), -1, device=splat.device)
        numbers = torch.arange(1, CHUNK + 1, device=splat.device, dtype=torch.int8)
        for active, chosen, _, _, f, _, _, before, weights in _chunks(lists, splat, features):
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
    def backward(ctx, g, _):
        splat, features, out = ctx.saved_tensors
        with torch.no_grad():
            rest = (g * out).sum(-1, keepdim=True)  # [tiles, pixels, 1]: what lies behind, in loss
            grads = splat.new_zeros(len(splat), 6 + CHANNELS)
            for active, chosen, shape, (dy, e), f, raw, alpha, before, weights in _chunks(
                    ctx.lists, splat, features):
                x, y, a, slope, h = shape
                g_tile = g[active]
                value = g_tile @ f.mT  # [active, pixels, K]
                behind = rest[active] - (weights * value).cumsum(-1)
                rest[active] = behind[..., -1:]
                # a splat that was not blended (alpha 0, or behind the last one) gets nothing
                g_raw = torch.where(weights > 0, raw * (before * value - behind / (1 - alpha)), 0.0)
                g_raw = g_raw.unflatten(1, (TILE, TILE))
                ge = g_raw * e
                s_ee = (ge * e).sum((1, 2))
                lines, ge = g_raw.sum(2), ge.sum(2)  # [active, TILE (y), K]
                gy, s_e, s_ey = lines * dy, ge.sum(1), (ge * dy).sum(1)
                gf = weights.mT @ g_tile  # [active, K, 10]
                gt, p = gf[..., 4:5], f[..., 5:7]
                gf[..., 5:7] += gt * torch.stack([x, y], -1)
                g_y = 2 * (a * slope * s_e - h * gy.sum(1))
                g_splat = torch.stack([-2 * a * s_e, g_y, -2 * s_ee / a, 2 * a * s_ey, -(gy * dy).sum(1),
                                       lines.sum(1)], -1)
                g_splat[..., :2] += gt * p
                grads.index_add_(0, chosen.flatten(), torch.cat([g_splat, gf], -1).flatten(0, 1))
        return *_once([grads[:, :6], grads[:, 6:]], splat, features, g), None


def _rasterize_torch(means, quats, scales, opacities, colors, c2w, fxfycxcy, H, W, background, dilation):
    B, V = c2w.shape[:2]
    gaussians = means, quats, scales, opacities, colors
    splat, features, box, row = _project(*gaussians, c2w, fxfycxcy, H, W, dilation)
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
    ln = torch.where(ln < math.inf, ln, 1.0)  # a camera that is not finite
    depth = torch.where(alpha > 0, t / (alpha.clamp(min=1e-12) * ln), 0.0)

    median = picture(median[..., None])  # (B, V, 1, H, W)
    if len(splat):
        chosen = median.clamp(min=0).flatten()
        xy, plane = splat[:, :2].index_select(0, chosen), features[:, 4:7].index_select(0, chosen)
        pixel = torch.stack([column.expand(B, V, 1, H, W), line.expand(B, V, 1, H, W)], -1).reshape(-1, 2)
        t = plane[:, 0] + (plane[:, 1:] * (xy - pixel)).sum(-1)
        median = torch.where(median >= 0, t.view(median.shape) / ln, 0.0)
    else:
        median = 0 * alpha  # a zero that has a gradient, like the other pictures
    image = color + (1 - alpha) * background.view(3, 1, 1)
    return Render(image, alpha, depth, median, F.normalize(normal, dim=2, eps=1e-12))


# ---- Triton ------------------------------------------------------------------------------------------------

# No launch waits for a number of the GPU's: lists have room for `capacity` pairs, and the kernels that make
# the pixels have two forms. One goes through the tiles' lists, and ends at once where these would not have
# fitted; the other (WHOLE) through the lists of whole views, which always fit, and mostly ends at once.
#
# A program per tile. Splats are a few pixels wide: tiles of 16 x 16 look at more pixels in vain. Where tiles
# are few, each has a warp at once and the longest list decides: smaller tiles have shorter ones. By tiles of
# 8 x 8 in all views, the first row that fits: (least number of them, (width, height, warps) of a tile). What
# 8 x 4 is taken for is a model's expectation, not measured yet: experiments/README.md, section 7.
TILINGS = ((8193, (8, 8, 1)), (0, (8, 4, 1)))  # of 32 pixels, or a multiple, a warp
BATCH = 16  # Gaussians between two looks at whether a tile is opaque
WHOLE_PROGRAMS = 2048  # of the second form of the two kernels, which mostly has nothing to do
RECORD = 16  # floats per Gaussian and view
COMPOSITE = dict(enable_fp_fusion=True)
LANES = dict(BLOCK=128, num_warps=4, enable_fp_fusion=True)  # a Gaussian or a pair in each lane
ADD_PAIRS = dict(ROWS=32, num_warps=4)

if triton is not None:
    # Constants stand to the right of tensors: triton 3.8 interprets constexpr * tensor as a constexpr.
    _NEAR, _FOV_MARGIN, _VANISHING = tl.constexpr(NEAR), tl.constexpr(FOV_MARGIN), tl.constexpr(VANISHING)
    # Sizes: another one is no reason to compile a kernel anew, which takes seconds.
    _SIZES = ["V", "N", "H", "W", "tiles_x", "tiles_y", "rows", "tiles", "room", "capacity",
              "steps", "least", "given"]
    _ALPHA_MIN, _ALPHA_MAX, _T_MIN = tl.constexpr(ALPHA_MIN), tl.constexpr(ALPHA_MAX), tl.constexpr(T_MIN)

    @triton.jit
    def _dot(a, b):
        return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]

    @triton.jit
    def _cross(a, b):
        return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]

    @triton.jit
    def _add(a, s, b):
        """a + s b"""
        return a[0] + s * b[0], a[1] + s * b[1], a[2] + s * b[2]

    @triton.jit
    def _add_where(condition, a, s, b):
        c = _add(a, s, b)
        return (tl.where(condition, c[0], a[0]), tl.where(condition, c[1], a[1]),
                tl.where(condition, c[2], a[2]))

    @triton.jit
    def _load3(ptr, mask):
        return tl.load(ptr, mask, other=0), tl.load(ptr + 1, mask, other=0), tl.load(ptr + 2, mask, other=0)

    @triton.jit
    def _load_camera(c2w_ptr, fxfycxcy_ptr, row, H, W):
        """Axes (right, down, forward) and origin in world space; fx, fy, cx, cy in pixels."""
        m = c2w_ptr + row * 16
        right = tl.load(m), tl.load(m + 4), tl.load(m + 8)
        down = tl.load(m + 1), tl.load(m + 5), tl.load(m + 9)
        forward = tl.load(m + 2), tl.load(m + 6), tl.load(m + 10)
        origin = tl.load(m + 3), tl.load(m + 7), tl.load(m + 11)
        f = fxfycxcy_ptr + row * 4
        return (right, down, forward, origin,
                tl.load(f) * W, tl.load(f + 1) * H, tl.load(f + 2) * W, tl.load(f + 3) * H)

    @triton.jit
    def _axes(w, x, y, z):
        """The columns of A = R(q) in world space."""
        return ((1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)),
                (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)),
                (2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)))

    @triton.jit
    def _center(mean, camera):
        right, down, forward, origin, fx, fy, cx, cy = camera
        offset = _add(mean, -1.0, origin)
        return _dot(right, offset), _dot(down, offset), _dot(forward, offset)

    @triton.jit
    def _footprint(t, axes, s, camera, H, W):
        """u, v and, in world space, the rows j of J R_wc; the rows e of J M; their cross product."""
        right, down, forward, origin, fx, fy, cx, cy = camera
        tx, ty, tz = t
        limit_u, limit_v = W * _FOV_MARGIN / 2 / fx, H * _FOV_MARGIN / 2 / fy
        u = tl.minimum(tl.maximum(tx / tz, -limit_u), limit_u)
        v = tl.minimum(tl.maximum(ty / tz, -limit_v), limit_v)
        kx, ky = fx / tz, fy / tz
        jx, jy = _add(right, -u, forward), _add(down, -v, forward)
        jx, jy = (kx * jx[0], kx * jx[1], kx * jx[2]), (ky * jy[0], ky * jy[1], ky * jy[2])
        ex = s[0] * _dot(jx, axes[0]), s[1] * _dot(jx, axes[1]), s[2] * _dot(jx, axes[2])
        ey = s[0] * _dot(jy, axes[0]), s[1] * _dot(jy, axes[1]), s[2] * _dot(jy, axes[2])
        return u, v, jx, jy, ex, ey, _cross(ex, ey)

    @triton.jit
    def _facing(ray, cof, D):
        """z = cof^T ray and m = cof D z, for a ray in world space."""
        z = _dot(cof[0], ray), _dot(cof[1], ray), _dot(cof[2], ray)
        d0, d1, d2 = D[0] * z[0], D[1] * z[1], D[2] * z[2]
        m = (cof[0][0] * d0 + cof[1][0] * d1 + cof[2][0] * d2,
             cof[0][1] * d0 + cof[1][1] * d1 + cof[2][1] * d2,
             cof[0][2] * d0 + cof[1][2] * d1 + cof[2][2] * d2)
        return z, m

    @triton.jit
    def _shrinking(scales):
        """s at least 1e-12, and D = (s_min / s)^2."""
        s = tl.maximum(scales[0], 1e-12), tl.maximum(scales[1], 1e-12), tl.maximum(scales[2], 1e-12)
        least = tl.minimum(tl.minimum(s[0], s[1]), s[2])
        r0, r1, r2 = least / s[0], least / s[1], least / s[2]
        return s, (r0 * r0, r1 * r1, r2 * r2)

    @triton.jit
    def _pack(x):
        """16 times [BLOCK] -> [BLOCK, 16], for stores of whole lines of memory."""
        a, b, c, d = tl.join(x[0], x[8]), tl.join(x[1], x[9]), tl.join(x[2], x[10]), tl.join(x[3], x[11])
        e, f, g, h = tl.join(x[4], x[12]), tl.join(x[5], x[13]), tl.join(x[6], x[14]), tl.join(x[7], x[15])
        a, b, c, d = tl.join(a, e), tl.join(b, f), tl.join(c, g), tl.join(d, h)
        a, b = tl.join(a, c), tl.join(b, d)
        return tl.reshape(tl.join(a, b), [a.shape[0], 16])

    @triton.jit
    def _in_view(means_ptr, quats_ptr, scales_ptr, opacities_ptr, colors_ptr, own, mask, camera, H, W,
                 dilation):
        """Gaussians `own` in a view: t_z, half the sides of the box, the record, whether they are visible."""
        mean, scales = _load3(means_ptr + own * 3, mask), _load3(scales_ptr + own * 3, mask)
        q = quats_ptr + own * 4
        qx, qy, qz = _load3(q + 1, mask)
        opacity = tl.load(opacities_ptr + own, mask, other=0.0)
        right, down, forward, origin, fx, fy, cx, cy = camera

        axes = _axes(tl.load(q, mask, other=1.0), qx, qy, qz)
        tx, ty, tz = _center(mean, camera)
        visible = mask & (tz > _NEAR) & (tz * 0 + tl.minimum(fx, fy) > 0)
        tz = tl.where(visible, tz, 1.0)
        u, v, jx, jy, ex, ey, c = _footprint((tx, ty, tz), axes, scales, camera, H, W)
        C_xx, C_xy, C_yy, det = _dot(ex, ex), _dot(ex, ey), _dot(ey, ey), _dot(c, c)
        det += dilation * (C_xx + C_yy + dilation)
        C_xx, C_yy = C_xx + dilation, C_yy + dilation
        o = opacity * tl.sqrt(det / (det + _VANISHING) + _VANISHING)
        visible = visible & (det > _VANISHING) & (o >= _ALPHA_MIN)
        det, C_yy, o = tl.where(visible, det, 1.0), tl.where(visible, C_yy, 1.0), tl.where(visible, o, 1.0)

        x, y = fx * tx / tz + cx - 0.5, fy * ty / tz + cy - 0.5
        reach = 2 * tl.log(o / _ALPHA_MIN)
        half_x, half_y = tl.sqrt(reach * C_xx), tl.sqrt(reach * C_yy)
        s, D = _shrinking(scales)
        cof = _cross(axes[1], axes[2]), _cross(axes[2], axes[0]), _cross(axes[0], axes[1])
        z, m = _facing(_add(_add(forward, u, right), v, down), cof, D)
        norm = tl.maximum(tl.sqrt(_dot(m, m)), 1e-30)
        m = _dot(right, m), _dot(down, m), _dot(forward, m)  # in camera space
        along = tl.maximum(m[0] * u + m[1] * v + m[2], 1e-7 * norm)
        nl = 1 + u * u + v * v
        length = tz * tl.sqrt(nl)
        a = tl.sqrt(C_yy / (2 * det))
        a_slope, h, log_o = a * C_xy / C_yy, 0.5 / C_yy, tl.log(o)
        t = tl.sqrt(tx * tx + ty * ty + tz * tz)
        p_x, p_y = length * (m[0] / along - u / nl) / fx, length * (m[1] / along - v / nl) / fy
        n_x, n_y, n_z = -m[0] / norm, -m[1] / norm, -m[2] / norm
        red, green, blue = _load3(colors_ptr + own * 3, visible)
        # 0 x what is not finite is NaN, and that equals nothing
        finite = half_x * 0 + half_y * 0 + x * 0 + y * 0 + a * 0 + a_slope * 0 + h * 0 + log_o * 0
        finite += red * 0 + green * 0 + blue * 0 + t * 0 + p_x * 0 + p_y * 0 + n_x * 0 + n_y * 0 + n_z * 0
        record = x, y, a, a_slope, h, log_o, red, green, blue, t, p_x, p_y, n_x, n_y, n_z, t
        return tz, half_x, half_y, record, visible & (finite == 0)

    @triton.jit(do_not_specialize=_SIZES)
    def _project_kernel(
        means_ptr, quats_ptr, scales_ptr, opacities_ptr, colors_ptr,  # (B, N, .)
        c2w_ptr, fxfycxcy_ptr,  # (B, V, .)
        distance_ptr,  # [B V N] out: t_z, infinity where nothing is visible
        box_ptr,  # [B V N, 3] int32 out: first tile, tiles in a line, all tiles: 0 of what is not visible
        record_ptr,  # [B V N, RECORD] out: x, y, a, a slope, h, log o, colour, t, p_x, p_y, normal, -; only
        #              of what is visible
        V, N, H, W, dilation, tiles_x, tiles_y,
        TILE_X: tl.constexpr, TILE_Y: tl.constexpr, RECORD: tl.constexpr, BLOCK: tl.constexpr,
    ):
        blocks = tl.cdiv(N, BLOCK)
        view = tl.program_id(0) // blocks  # of all B V
        n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        mask = n < N
        own, row = (view // V).to(tl.int64) * N + n, view.to(tl.int64) * N + n
        camera = _load_camera(c2w_ptr, fxfycxcy_ptr, view, H, W)
        tz, half_x, half_y, record, visible = _in_view(
            means_ptr, quats_ptr, scales_ptr, opacities_ptr, colors_ptr, own, mask, camera, H, W, dilation)
        x, y = tl.where(visible, record[0], 0.0), tl.where(visible, record[1], 0.0)
        half_x, half_y = tl.where(visible, half_x, 0.0), tl.where(visible, half_y, 0.0)
        x0 = tl.minimum(tl.maximum(tl.ceil(x - half_x), 0.0), W).to(tl.int32)
        x1 = tl.minimum(tl.maximum(tl.floor(x + half_x), -1.0), W - 1).to(tl.int32)
        y0 = tl.minimum(tl.maximum(tl.ceil(y - half_y), 0.0), H).to(tl.int32)
        y1 = tl.minimum(tl.maximum(tl.floor(y + half_y), -1.0), H - 1).to(tl.int32)
        visible = visible & (x0 <= x1) & (y0 <= y1)
        x0, y0 = x0 // TILE_X, y0 // TILE_Y
        wide, high = x1 // TILE_X - x0 + 1, y1 // TILE_Y - y0 + 1
        tl.store(distance_ptr + row, tl.where(visible, tz, float("inf")), mask)
        tl.store(box_ptr + row * 3, view * tiles_x * tiles_y + y0 * tiles_x + x0, mask)
        tl.store(box_ptr + row * 3 + 1, tl.where(visible, wide, 0), mask)
        tl.store(box_ptr + row * 3 + 2, tl.where(visible, wide * high, 0), mask)
        place = row[:, None] * RECORD + tl.arange(0, RECORD)[None, :]
        tl.store(record_ptr + place, _pack(record), visible[:, None])

    @triton.jit(do_not_specialize=_SIZES)
    def _count_kernel(
        order_ptr,  # [rows] int64: all B V N rows, front to back; those that are not visible come last
        box_ptr,  # as above
        count_ptr,  # [rows] int64 out: tiles of each, in this order
        rows, BLOCK: tl.constexpr,
    ):
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = place < rows
        row = tl.load(order_ptr + place, mask, other=0)
        tl.store(count_ptr + place, tl.load(box_ptr + row * 3 + 2, mask, other=0).to(tl.int64), mask)

    @triton.jit(do_not_specialize=_SIZES)
    def _expand_kernel(
        order_ptr, box_ptr,  # as above
        end_ptr,  # [rows] int64: where the pairs of each row end, in this order
        tile_ptr,  # [room] int16 or int32 out: the pair's tile, counted from `least`
        row_ptr,  # [room] int32 out: the pair's row
        need_ptr,  # [1] int64 out: how many pairs there are
        room, capacity, rows, steps,  # 2^steps > rows
        N, tiles_x, tiles_y, tiles, least, BLOCK: tl.constexpr,
    ):
        pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = pair < room
        need = tl.load(end_ptr + rows - 1)
        tl.store(need_ptr, need)
        place = tl.minimum(pair, rows - 1)
        if need <= capacity:
            low, high = tl.zeros_like(pair), tl.zeros_like(pair) + rows - 1
            step = 0
            while step < steps:  # the first that ends behind the pair
                middle = low + (high - low) // 2
                before = tl.load(end_ptr + middle) <= pair
                low, high = tl.where(before, middle + 1, low), tl.where(before, high, middle)
                step += 1
            place = tl.minimum(low, rows - 1)
        row = tl.load(order_ptr + place)
        first, wide, count = _load3(box_ptr + row * 3, mask)
        wide = tl.maximum(wide, 1)
        place = (pair - tl.load(end_ptr + place)).to(tl.int32) + count
        tile = first + place // wide * tiles_x + place % wide
        if need > capacity:  # the lists of whole views, which always have room
            tile = (row // N).to(tl.int32) * (tiles_x * tiles_y)
        # What is left of the room goes behind all lists: a stable sort keeps it there.
        tile = tl.where(pair < _listed(need, capacity, rows), tile, tiles - 1)
        tl.store(tile_ptr + pair, (tile + least).to(tile_ptr.dtype.element_ty), mask)
        tl.store(row_ptr + pair, row.to(tl.int32), mask)

    @triton.jit(do_not_specialize=_SIZES)
    def _collect_kernel(
        tile_ptr, slot_ptr,  # [room]: sorted by tile; int64, where the pair was before this sort
        row_ptr, need_ptr,  # as above
        list_ptr,  # [room] int32 out: the rows of each tile's list, nearest first, tile by tile
        bounds_ptr,  # [tiles, 2] int32 out: where each tile's list begins and ends; 0, 0 before
        room, capacity, rows, least, BLOCK: tl.constexpr,
    ):
        pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        pairs = _listed(tl.load(need_ptr), capacity, rows)
        mask = pair < pairs
        tile = tl.load(tile_ptr + pair, mask, other=0).to(tl.int32) - least
        before = tl.load(tile_ptr + pair - 1, mask & (pair > 0), other=0).to(tl.int32) - least
        behind = tl.load(tile_ptr + pair + 1, pair + 1 < pairs, other=0).to(tl.int32) - least
        slot = tl.load(slot_ptr + pair, mask, other=0)
        tl.store(list_ptr + pair, tl.load(row_ptr + slot, mask, other=0), mask)
        tl.store(bounds_ptr + 2 * tile, pair, mask & ((pair == 0) | (before != tile)))
        tl.store(bounds_ptr + 2 * tile + 1, pair + 1, mask & ((pair + 1 == pairs) | (behind != tile)))

    @triton.jit
    def _listed(need, capacity, rows):
        """The length of all lists: of the tiles', or of whole views' where there is no room for those."""
        return tl.where(need > capacity, rows, need).to(tl.int32)

    @triton.jit
    def _own_tiles(need_ptr, capacity, tiles, WHOLE: tl.constexpr):
        """This program's tiles, from which on and below which: none where it is the other form's turn."""
        share = tl.cdiv(tiles, tl.num_programs(0))
        tile = tl.program_id(0) * share
        turn = (tl.load(need_ptr) > capacity) == WHOLE
        return tile, tl.where(turn, tl.minimum(tile + share, tiles), tile)

    @triton.jit
    def _list_of(bounds_ptr, tile, tiles_x, tiles_y, WHOLE: tl.constexpr):
        """Where the tile's list, or its view's, begins and ends."""
        if WHOLE:
            tile -= tile % (tiles_x * tiles_y)
        return tl.load(bounds_ptr + 2 * tile), tl.load(bounds_ptr + 2 * tile + 1)

    @triton.jit
    def _next(pair, end, list_ptr, box_ptr, tile, tiles_x, WHOLE: tl.constexpr):
        """The first pair from `pair` on that reaches the tile: every one, but in the list of a whole view."""
        if WHOLE:
            looking = pair < end
            while looking:
                lane = tl.arange(0, 32)
                row = tl.load(list_ptr + pair + lane, pair + lane < end, other=0)
                first, wide, count = _load3(box_ptr + row.to(tl.int64) * 3, pair + lane < end)
                column, line = tile % tiles_x - first % tiles_x, tile // tiles_x - first // tiles_x
                reaches = (column >= 0) & (column < wide) & (line >= 0) & (line * wide < count)
                ahead = tl.min(tl.where(reaches, lane, 32))
                pair += ahead
                looking = (ahead == 32) & (pair < end)
            pair = tl.minimum(pair, end)
        return pair

    @triton.jit
    def _pixels(tile, fxfycxcy_ptr, H, W, tiles_x, tiles_y,
                TILE_X: tl.constexpr, TILE_Y: tl.constexpr, WARPS: tl.constexpr):
        """The tile's view; [pixels of a thread, WARPS, 32]: columns, lines, whether in the picture, ln."""
        view = tile // (tiles_x * tiles_y)
        own = tl.arange(0, TILE_X * TILE_Y // (32 * WARPS))[:, None, None] * (32 * WARPS)
        pixel = own + tl.arange(0, WARPS)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
        column = tile % tiles_x * TILE_X + pixel % TILE_X
        line = tile // tiles_x % tiles_y * TILE_Y + pixel // TILE_X
        f = fxfycxcy_ptr + view * 4
        ray_x = ((column + 0.5) / W - tl.load(f + 2)) / tl.load(f)
        ray_y = ((line + 0.5) / H - tl.load(f + 3)) / tl.load(f + 1)
        ln = tl.sqrt(ray_x * ray_x + ray_y * ray_y + 1)
        ln = tl.where(ln < float("inf"), ln, 1.0)  # a camera that is not finite
        return view.to(tl.int64), column, line, (column < W) & (line < H), ln

    @triton.jit
    def _address(plane, area, pixel):
        """Said not to be aligned: or Triton gives neighbours to a thread, and sums have to cross warps."""
        return tl.multiple_of(plane * area + pixel, [1, 1, 1])

    @triton.jit
    def _load_splat(record_ptr, row, RECORD: tl.constexpr):
        r = record_ptr + row.to(tl.int64) * RECORD
        return (tl.load(r), tl.load(r + 1), tl.load(r + 2), tl.load(r + 3), tl.load(r + 4),
                tl.load(r + 5), tl.load(r + 6), tl.load(r + 7), tl.load(r + 8), tl.load(r + 9),
                tl.load(r + 10), tl.load(r + 11), tl.load(r + 12), tl.load(r + 13), tl.load(r + 14))

    @triton.jit
    def _blend(splat, column, line, T):
        """dx, dy, e, raw, weight, 1 - alpha and the T behind, of one splat on a tile's pixels."""
        dx, dy = splat[0] - column, splat[1] - line
        e = splat[2] * dx - splat[3] * dy
        raw = tl.exp(splat[5] - splat[4] * dy * dy - e * e)
        raw = tl.where(raw >= _ALPHA_MIN, raw, 0.0)
        alpha = tl.minimum(raw, _ALPHA_MAX)
        after = T * (1 - alpha)
        return dx, dy, e, raw, tl.where(after >= _T_MIN, alpha * T, 0.0), 1 - alpha, after

    @triton.jit(do_not_specialize=_SIZES)
    def _composite_kernel(
        record_ptr, box_ptr,  # [rows, RECORD], [rows, 3]
        list_ptr, bounds_ptr, need_ptr,  # [room], [tiles, 2], [1]: the lists
        fxfycxcy_ptr, background_ptr,  # (B, V, 4), (3,)
        image_ptr, alpha_ptr, depth_ptr, median_depth_ptr, normal_ptr,  # (B, V, ., H, W) out
        norm_ptr,  # (B, V, H, W) out: |out_n|
        median_ptr,  # (B, V, H, W) int32 out: the median's pair, or -1
        stop_ptr,  # [tiles] int32 out: the first pair that was not looked at
        H, W, tiles_x, tiles_y, tiles, capacity,
        WHOLE: tl.constexpr,  # which form: it goes through the tiles' lists, or those of whole views
        RECORD: tl.constexpr, BATCH: tl.constexpr,
        TILE_X: tl.constexpr, TILE_Y: tl.constexpr, WARPS: tl.constexpr,
    ):
        tile, last = _own_tiles(need_ptr, capacity, tiles, WHOLE)
        while tile < last:
            view, column, line, inside, ln = _pixels(
                tile, fxfycxcy_ptr, H, W, tiles_x, tiles_y, TILE_X, TILE_Y, WARPS)
            px, py = column.to(tl.float32), line.to(tl.float32)
            pair, end = _list_of(bounds_ptr, tile, tiles_x, tiles_y, WHOLE)
            pair = _next(pair, end, list_ptr, box_ptr, tile, tiles_x, WHOLE)
            T = tl.where(inside, 1.0, 0.0)
            zero = T * 0
            red, green, blue, total, depth = zero, zero, zero, zero, zero
            nx, ny, nz, median_depth, median = zero, zero, zero, zero, column * 0 - 1
            if pair < end:
                # A splat is fetched while the one before it is blended, its row one step earlier.
                splat = _load_splat(record_ptr, tl.load(list_ptr + pair), RECORD)
                second = _next(pair + 1, end, list_ptr, box_ptr, tile, tiles_x, WHOLE)
                row = tl.load(list_ptr + tl.minimum(second, end - 1))
                clearest = tl.max(T)
                while (pair < end) & (clearest >= _T_MIN):
                    pause = tl.minimum(pair + BATCH, end)
                    while pair < pause:
                        following = _load_splat(record_ptr, row, RECORD)
                        third = _next(second + 1, end, list_ptr, box_ptr, tile, tiles_x, WHOLE)
                        row = tl.load(list_ptr + tl.minimum(third, end - 1))
                        dx, dy, e, raw, w, keep, after = _blend(splat, px, py, T)
                        t = splat[9] + splat[10] * dx + splat[11] * dy
                        red += w * splat[6]
                        green += w * splat[7]
                        blue += w * splat[8]
                        total += w
                        depth += w * t
                        nx += w * splat[12]
                        ny += w * splat[13]
                        nz += w * splat[14]
                        near = (w > 0) & (T > 0.5)
                        median_depth = tl.where(near, t, median_depth)
                        median = tl.where(near, pair, median)
                        T = after
                        splat = following
                        pair, second = second, third
                    clearest = tl.max(T)
            tl.store(stop_ptr + tile, pair)

            area = H * W
            one = _address(view, area, line * W + column)
            three = _address(view * 3, area, line * W + column)
            left = 1 - total
            tl.store(image_ptr + three, red + left * tl.load(background_ptr), inside)
            tl.store(image_ptr + three + area, green + left * tl.load(background_ptr + 1), inside)
            tl.store(image_ptr + three + 2 * area, blue + left * tl.load(background_ptr + 2), inside)
            tl.store(alpha_ptr + one, total, inside)
            tl.store(depth_ptr + one, depth / (tl.maximum(total, 1e-12) * ln), inside)
            tl.store(median_depth_ptr + one, median_depth / ln, inside)
            norm = tl.sqrt(nx * nx + ny * ny + nz * nz)
            tl.store(norm_ptr + one, norm, inside)
            norm = tl.maximum(norm, 1e-12)
            tl.store(normal_ptr + three, nx / norm, inside)
            tl.store(normal_ptr + three + area, ny / norm, inside)
            tl.store(normal_ptr + three + 2 * area, nz / norm, inside)
            tl.store(median_ptr + one, median, inside)
            tile = tile + 1 if WHOLE else last

    @triton.jit
    def _fold(a, b, lane, STEP: tl.constexpr):
        """Lanes with bit STEP go on with b, the others with a, each with the other's share added."""
        high = (lane & STEP) != 0
        return tl.where(high, b, a) + tl.gather(tl.where(high, a, b), lane ^ STEP, 1)

    @triton.jit
    def _halve(a, lane, STEP: tl.constexpr):
        return a + tl.gather(a, lane ^ STEP, 1)

    @triton.jit
    def _add_lanes(moments, colors, planes, normals, lane, GEOMETRY: tl.constexpr):
        """Sums over each warp's lanes, of [WARPS, 32] each: the n-th ends in the lanes 2 n and 2 n + 1.

        By halves: after 8 exchanges a lane has 8 sums to go on with, after 4 more 4, so 16 exchanges in all,
        where 15 sums one after another take 75.
        """
        a, b, c, d, e, f = moments
        g, h = colors[0], colors[1]
        a = _fold(a, colors[2], lane, 16)
        if GEOMETRY:
            b, c = _fold(b, planes[0], lane, 16), _fold(c, planes[1], lane, 16)
            d, e = _fold(d, planes[2], lane, 16), _fold(e, normals[0], lane, 16)
            f, g = _fold(f, normals[1], lane, 16), _fold(g, normals[2], lane, 16)
        else:  # columns that nobody reads
            b, c, d = _halve(b, lane, 16), _halve(c, lane, 16), _halve(d, lane, 16)
            e, f, g = _halve(e, lane, 16), _halve(f, lane, 16), _halve(g, lane, 16)
        h = _halve(h, lane, 16)
        a, b, c, d = _fold(a, e, lane, 8), _fold(b, f, lane, 8), _fold(c, g, lane, 8), _fold(d, h, lane, 8)
        a, b = _fold(a, c, lane, 4), _fold(b, d, lane, 4)
        return _halve(_fold(a, b, lane, 2), lane, 1)

    @triton.jit(do_not_specialize=_SIZES)
    def _composite_backward_kernel(
        record_ptr, box_ptr, list_ptr, bounds_ptr, need_ptr, stop_ptr,  # as in the forward kernel
        fxfycxcy_ptr, background_ptr, image_ptr, alpha_ptr, depth_ptr, normal_ptr, norm_ptr, median_ptr,
        g_image_ptr, g_alpha_ptr,  # (B, V, ., H, W)
        g_depth_ptr, g_median_ptr, g_normal_ptr,  # (B, V, ., H, W); unused if not GEOMETRY
        slot_ptr,  # [room] int64: where a pair's sums go; unused if not DETERMINISTIC
        pair_sums_ptr,  # [room, RECORD] out, likewise
        sums_ptr,  # [rows, RECORD], to be added to: see _project_backward_kernel
        H, W, tiles_x, tiles_y, tiles, capacity,
        given,  # bits: which of the gradients (image, alpha, depth, median_depth, normal) there are
        WHOLE: tl.constexpr, GEOMETRY: tl.constexpr,  # are there gradients of depth, median_depth, normal?
        DETERMINISTIC: tl.constexpr, RECORD: tl.constexpr,
        TILE_X: tl.constexpr, TILE_Y: tl.constexpr, WARPS: tl.constexpr,
    ):
        tile, last = _own_tiles(need_ptr, capacity, tiles, WHOLE)
        while tile < last:
            view, column, line, inside, ln = _pixels(
                tile, fxfycxcy_ptr, H, W, tiles_x, tiles_y, TILE_X, TILE_Y, WARPS)
            px, py = column.to(tl.float32), line.to(tl.float32)
            area = H * W
            one = _address(view, area, line * W + column)
            three = _address(view * 3, area, line * W + column)
            T = tl.where(inside, 1.0, 0.0)
            pair, _ = _list_of(bounds_ptr, tile, tiles_x, tiles_y, WHOLE)
            stop = tl.load(stop_ptr + tile)
            pair = _next(pair, stop, list_ptr, box_ptr, tile, tiles_x, WHOLE)
            if pair < stop:
                # The gradients g of out, and rest = g . out: scaling out changes neither depth nor normal.
                b0, b1, b2 = tl.load(background_ptr), tl.load(background_ptr + 1), tl.load(background_ptr + 2)
                asked = inside & ((given & 1) != 0)
                g0 = tl.load(g_image_ptr + three, asked, other=0.0)
                g1 = tl.load(g_image_ptr + three + area, asked, other=0.0)
                g2 = tl.load(g_image_ptr + three + 2 * area, asked, other=0.0)
                g_alpha = tl.load(g_alpha_ptr + one, inside & ((given & 2) != 0), other=0.0)
                alpha = tl.load(alpha_ptr + one, inside, other=0.0)
                rest = g0 * (tl.load(image_ptr + three, inside, other=0.0) - b0)
                rest += g1 * (tl.load(image_ptr + three + area, inside, other=0.0) - b1)
                rest += g2 * (tl.load(image_ptr + three + 2 * area, inside, other=0.0) - b2)
                rest += g_alpha * alpha
                g_alpha -= g0 * b0 + g1 * b1 + g2 * b2
                if GEOMETRY:
                    alpha = tl.maximum(alpha, 1e-12)
                    g_t = tl.load(g_depth_ptr + one, inside & ((given & 4) != 0), other=0.0) / alpha
                    g_alpha -= g_t * tl.load(depth_ptr + one, inside, other=0.0)
                    g_t /= ln
                    g_median = tl.load(g_median_ptr + one, inside & ((given & 8) != 0), other=0.0) / ln
                    median = tl.load(median_ptr + one, inside, other=-1)
                    n0 = tl.load(normal_ptr + three, inside, other=0.0)
                    n1 = tl.load(normal_ptr + three + area, inside, other=0.0)
                    n2 = tl.load(normal_ptr + three + 2 * area, inside, other=0.0)
                    asked = inside & ((given & 16) != 0)
                    gn0 = tl.load(g_normal_ptr + three, asked, other=0.0)
                    gn1 = tl.load(g_normal_ptr + three + area, asked, other=0.0)
                    gn2 = tl.load(g_normal_ptr + three + 2 * area, asked, other=0.0)
                    along = n0 * gn0 + n1 * gn1 + n2 * gn2
                    norm = tl.maximum(tl.load(norm_ptr + one, inside, other=1.0), 1e-12)
                    gn0 = (gn0 - n0 * along) / norm
                    gn1 = (gn1 - n1 * along) / norm
                    gn2 = (gn2 - n2 * along) / norm

                lane = tl.arange(0, 32)[None, :] + tl.zeros([WARPS, 32], tl.int32)
                column_of, own = lane // 2, (lane % 2 == 0) & (lane < 2 * (15 if GEOMETRY else 9))
                lane_of_one = tl.arange(0, 32)[None, :]
                once = lane_of_one % 2 == 0
                row = tl.load(list_ptr + pair)
                splat = _load_splat(record_ptr, row, RECORD)
                second = _next(pair + 1, stop, list_ptr, box_ptr, tile, tiles_x, WHOLE)
                next_row = tl.load(list_ptr + tl.minimum(second, stop - 1))
                while pair < stop:
                    following = _load_splat(record_ptr, next_row, RECORD)
                    third = _next(second + 1, stop, list_ptr, box_ptr, tile, tiles_x, WHOLE)
                    last_row = tl.load(list_ptr + tl.minimum(third, stop - 1))
                    dx, dy, e, raw, w, keep, after = _blend(splat, px, py, T)
                    value = g0 * splat[6] + g1 * splat[7] + g2 * splat[8] + g_alpha
                    if GEOMETRY:
                        value += g_t * (splat[9] + splat[10] * dx + splat[11] * dy)
                        value += gn0 * splat[12] + gn1 * splat[13] + gn2 * splat[14]
                    rest -= w * value
                    g = tl.where(w > 0, raw * (T * value - rest / keep), 0.0)
                    ge, gy = g * e, g * dy
                    moments = (tl.sum(g, 0), tl.sum(ge, 0), tl.sum(gy, 0),
                               tl.sum(ge * e, 0), tl.sum(ge * dy, 0), tl.sum(gy * dy, 0))
                    colors = tl.sum(w * g0, 0), tl.sum(w * g1, 0), tl.sum(w * g2, 0)
                    planes, normals = colors, colors
                    if GEOMETRY:
                        wt = w * g_t + tl.where(median == pair, g_median, 0.0)
                        planes = tl.sum(wt, 0), tl.sum(wt * dx, 0), tl.sum(wt * dy, 0)
                        normals = tl.sum(w * gn0, 0), tl.sum(w * gn1, 0), tl.sum(w * gn2, 0)
                    sums = _add_lanes(moments, colors, planes, normals, lane, GEOMETRY)
                    place = row.to(tl.int64) * RECORD
                    if DETERMINISTIC:
                        sums = tl.sum(sums, 0)[None, :]
                        if WHOLE:
                            tl.atomic_add(sums_ptr + place + lane_of_one // 2, sums, once, sem="relaxed")
                        else:
                            place = tl.load(slot_ptr + pair) * RECORD
                            tl.store(pair_sums_ptr + place + lane_of_one // 2, sums, once)
                    else:
                        tl.atomic_add(sums_ptr + place + column_of, sums, own & (sums != 0), sem="relaxed")
                    T = after
                    splat = following
                    row, next_row = next_row, last_row
                    pair, second = second, third
            tile = tile + 1 if WHOLE else last

    @triton.jit(do_not_specialize=_SIZES)
    def _add_pairs_kernel(
        order_ptr, end_ptr, need_ptr,  # as above
        pair_sums_ptr,  # [room, RECORD]: the sums of each tile, in the order before the sort by tiles
        sums_ptr,  # [rows, RECORD] out, of visible rows
        rows, capacity, ROWS: tl.constexpr, RECORD: tl.constexpr,
    ):
        """Deterministic: each row's tiles in a fixed order."""
        place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        mask = (place < rows) & (tl.load(need_ptr) <= capacity)
        start = tl.load(end_ptr + place - 1, mask & (place > 0), other=0)
        count = tl.where(mask, tl.load(end_ptr + place, mask, other=0) - start, 0)
        lane = tl.arange(0, RECORD)[None, :]
        total = tl.zeros([ROWS, RECORD], tl.float32)
        most = tl.max(count)
        step = 0
        while step < most:
            pair = (start + step)[:, None] * RECORD + lane
            total += tl.load(pair_sums_ptr + pair, (count > step)[:, None], other=0.0)
            step += 1
        row = tl.load(order_ptr + place, mask, other=0)
        tl.store(sums_ptr + row[:, None] * RECORD + lane, total, (count > 0)[:, None])

    @triton.jit(do_not_specialize=_SIZES)
    def _project_backward_kernel(
        means_ptr, quats_ptr, scales_ptr, opacities_ptr,  # as in _project_kernel
        c2w_ptr, fxfycxcy_ptr,
        box_ptr,  # as above
        sums_ptr,  # [B V N, RECORD]: sum of g, g e, g dy, g e e, g e dy, g dy dy with g = dL/dlog raw,
        #            then of w dL/dout_colour; of s, s dx, s dy with s = dL/dt; of w dL/dout_n; -
        g_means_ptr, g_quats_ptr, g_scales_ptr, g_opacities_ptr, g_colors_ptr,  # (B, N, .) out
        V, N, H, W, dilation,
        GEOMETRY: tl.constexpr, RECORD: tl.constexpr, BLOCK: tl.constexpr,
    ):
        """A Gaussian per lane, one view after another: no atomics."""
        blocks = tl.cdiv(N, BLOCK)
        b = tl.program_id(0) // blocks
        n = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        mask = n < N
        own = b.to(tl.int64) * N + n
        mean, scales = _load3(means_ptr + own * 3, mask), _load3(scales_ptr + own * 3, mask)
        q = quats_ptr + own * 4
        qw = tl.load(q, mask, other=1.0)
        qx, qy, qz = _load3(q + 1, mask)
        opacity = tl.load(opacities_ptr + own, mask, other=1.0)
        A = _axes(qw, qx, qy, qz)
        s, D = _shrinking(scales)
        cof = _cross(A[1], A[2]), _cross(A[2], A[0]), _cross(A[0], A[1])

        zero = tl.zeros([BLOCK], tl.float32)
        zeros = zero, zero, zero
        g_mean, g_scale, g_color, g_log_opacity = zeros, zeros, zeros, zero
        g_A0, g_A1, g_A2, g_cof0, g_cof1, g_cof2 = zeros, zeros, zeros, zeros, zeros, zeros
        ever = mask & (n < 0)
        view, stop = b * V, b * V + V
        while view < stop:
            camera = _load_camera(c2w_ptr, fxfycxcy_ptr, view, H, W)
            right, down, forward, origin, fx, fy, cx, cy = camera
            row = view.to(tl.int64) * N + n
            visible = tl.load(box_ptr + row * 3 + 2, mask, other=0) > 0
            sums = sums_ptr + row * RECORD
            ever = ever | visible
            s_1, s_e, s_y = _load3(sums, visible)
            s_ee, s_ey, s_yy = _load3(sums + 3, visible)
            g_color = _add(g_color, 1.0, _load3(sums + 6, visible))

            tx, ty, tz = _center(mean, camera)
            tz = tl.where(visible, tz, 1.0)
            u, v, jx, jy, ex, ey, c = _footprint((tx, ty, tz), A, scales, camera, H, W)
            C_xx, C_xy, C_yy, det = _dot(ex, ex), _dot(ex, ey), _dot(ey, ey), _dot(c, c)
            det = tl.where(visible, det + dilation * (C_xx + C_yy + dilation), 1.0)
            C_yy = tl.where(visible, C_yy + dilation, 1.0)
            a, slope, h = tl.sqrt(C_yy / (2 * det)), C_xy / C_yy, 0.5 / C_yy

            # log raw = log o - h dy^2 - e^2,  e = a (dx - slope dy)
            g_x, g_y = -2 * a * s_e, 2 * (a * slope * s_e - h * s_y)
            g_log_a, g_slope = -2 * s_ee, 2 * a * s_ey
            g_log_opacity += s_1
            # slope = C_xy / C_yy,  a^2 = C_yy / 2 det,  h = 1 / 2 C_yy,  o^2 ~ det / (det + 1e-6) + 1e-6
            g_C_xy = g_slope / C_yy
            g_C_yy = (0.5 * g_log_a - slope * g_slope + h * s_yy) / C_yy
            more = det + _VANISHING
            g_det = -0.5 * g_log_a / det + 0.5 * s_1 * _VANISHING / (more * (det + more * _VANISHING))
            # C_xy = ex . ey,  C_yy = ey . ey + dilation,  c = ex x ey,
            # det = |c|^2 + dilation (ex . ex + ey . ey + dilation)
            g_C_yy += dilation * g_det
            across = _cross(ey, c)
            g_ex = 2 * g_det * across[0], 2 * g_det * across[1], 2 * g_det * across[2]
            g_ex = _add(_add(g_ex, g_C_xy, ey), 2 * dilation * g_det, ex)
            g_ey = _add(_add(zeros, g_C_xy, ex), 2 * g_C_yy, ey)
            g_ey = _add(g_ey, 2 * g_det, _cross(c, ex))
            # ex_i = s_i (jx . A_i)
            g_s0 = g_ex[0] * _dot(jx, A[0]) + g_ey[0] * _dot(jy, A[0])
            g_s1 = g_ex[1] * _dot(jx, A[1]) + g_ey[1] * _dot(jy, A[1])
            g_s2 = g_ex[2] * _dot(jx, A[2]) + g_ey[2] * _dot(jy, A[2])
            x0, x1, x2 = g_ex[0] * scales[0], g_ex[1] * scales[1], g_ex[2] * scales[2]
            y0, y1, y2 = g_ey[0] * scales[0], g_ey[1] * scales[1], g_ey[2] * scales[2]
            # Where nothing is visible all sums are zero, but 0 x infinity would not be.
            g_A0 = _add_where(visible, _add_where(visible, g_A0, x0, jx), y0, jy)
            g_A1 = _add_where(visible, _add_where(visible, g_A1, x1, jx), y1, jy)
            g_A2 = _add_where(visible, _add_where(visible, g_A2, x2, jx), y2, jy)
            g_jx = _add(_add(_add(zeros, x0, A[0]), x1, A[1]), x2, A[2])
            g_jy = _add(_add(_add(zeros, y0, A[0]), y1, A[1]), y2, A[2])
            # jx = fx / tz (right - u forward)
            g_tz = -(_dot(g_jx, jx) + _dot(g_jy, jy)) / tz
            g_u, g_v = -fx / tz * _dot(g_jx, forward), -fy / tz * _dot(g_jy, forward)
            g_tx, g_ty = zero, zero

            if GEOMETRY:
                g_t, g_px, g_py = _load3(sums + 9, visible)
                gn = _load3(sums + 12, visible)
                ray = _add(_add(forward, u, right), v, down)  # in world space, like all of this block
                z, m = _facing(ray, cof, D)
                norm = tl.maximum(tl.sqrt(_dot(m, m)), 1e-30)
                mx, my = _dot(right, m), _dot(down, m)
                bound = 1e-7 * norm
                ahead = _dot(m, ray)
                q_den = tl.maximum(ahead, bound)
                nl = 1 + u * u + v * v
                root = tl.sqrt(nl)
                q_x, q_y = mx / q_den, my / q_den
                # t = |t| + p . d
                g_px_scaled, g_py_scaled = g_px / fx, g_py / fy
                p_x, p_y = tz * root * (q_x - u / nl) / fx, tz * root * (q_y - v / nl) / fy
                g_x += p_x * g_t
                g_y += p_y * g_t
                far = tl.sqrt(tx * tx + ty * ty + tz * tz)
                g_tx += g_t * tx / far
                g_ty += g_t * ty / far
                g_tz += g_t * tz / far
                # p_x = tz sqrt(nl) (q_x - u / nl) / fx
                g_length = g_px_scaled * (q_x - u / nl) + g_py_scaled * (q_y - v / nl)
                g_tz += g_length * root
                along = (g_px_scaled * u + g_py_scaled * v) / nl
                g_u += g_length * tz * u / root + tz * root * (2 * u * along - g_px_scaled) / nl
                g_v += g_length * tz * v / root + tz * root * (2 * v * along - g_py_scaled) / nl
                # q = m / max(m . ray, 1e-7 |m|),  n = -m / |m|
                g_qx, g_qy = tz * root * g_px_scaled, tz * root * g_py_scaled
                g_den = -(g_qx * q_x + g_qy * q_y) / q_den
                unit = m[0] / norm, m[1] / norm, m[2] / norm
                gn = _add(_add(_add(zeros, gn[0], right), gn[1], down), gn[2], forward)
                g_m = _add(_add(zeros, -1 / norm, gn), _dot(unit, gn) / norm, unit)
                g_m = _add(_add(g_m, g_qx / q_den, right), g_qy / q_den, down)
                g_m = _add(g_m, tl.where(ahead > bound, g_den, 0.0), ray)
                g_m = _add(g_m, tl.where(ahead > bound, 0.0, 1e-7 * g_den), unit)
                g_ray = _add(zeros, tl.where(ahead > bound, g_den, 0.0), m)
                # m = sum_i D_i z_i cof_i,  z_i = cof_i . ray,  D_i = (s_min / s_i)^2. The factor of m is
                # free: sum_i D_i z_i y_i = m . g_m = 0. So the thinnest axis gets what the others leave: its
                # own y_i is a small difference of numbers 1 / D times larger.
                y0, y1, y2 = _dot(cof[0], g_m), _dot(cof[1], g_m), _dot(cof[2], g_m)
                d0, d1, d2 = D[0] * z[0] * y0, D[1] * z[1] * y1, D[2] * z[2] * y2
                first = (s[0] <= s[1]) & (s[0] <= s[2])
                last = (s[2] < s[0]) & (s[2] < s[1])
                d0, d1, d2 = (tl.where(first, -d1 - d2, d0), tl.where(first | last, d1, -d0 - d2),
                              tl.where(last, -d0 - d1, d2))
                g_s0 -= tl.where(scales[0] >= 1e-12, 2 * d0 / s[0], 0.0)
                g_s1 -= tl.where(scales[1] >= 1e-12, 2 * d1 / s[1], 0.0)
                g_s2 -= tl.where(scales[2] >= 1e-12, 2 * d2 / s[2], 0.0)
                g_cof0 = _add_where(visible, _add_where(visible, g_cof0, D[0] * z[0], g_m), D[0] * y0, ray)
                g_cof1 = _add_where(visible, _add_where(visible, g_cof1, D[1] * z[1], g_m), D[1] * y1, ray)
                g_cof2 = _add_where(visible, _add_where(visible, g_cof2, D[2] * z[2], g_m), D[2] * y2, ray)
                g_ray = _add(_add(_add(g_ray, D[0] * y0, cof[0]), D[1] * y1, cof[1]), D[2] * y2, cof[2])
                g_u += _dot(right, g_ray)
                g_v += _dot(down, g_ray)

            # u = tx / tz where it is not clamped,  x = fx tx / tz + cx - 1/2
            g_u = fx * g_x + tl.where(tl.abs(tx / tz) <= W * _FOV_MARGIN / 2 / fx, g_u, 0.0)
            g_v = fy * g_y + tl.where(tl.abs(ty / tz) <= H * _FOV_MARGIN / 2 / fy, g_v, 0.0)
            g_tx += g_u / tz
            g_ty += g_v / tz
            g_tz -= (g_u * tx + g_v * ty) / (tz * tz)
            g_center = _add(_add(_add(zeros, g_tx, right), g_ty, down), g_tz, forward)
            g_mean = _add_where(visible, g_mean, 1.0, g_center)
            g_scale = _add_where(visible, g_scale, 1.0, (g_s0, g_s1, g_s2))
            view += 1

        if GEOMETRY:  # cof_0 = A_1 x A_2, ...
            g_A0 = _add(_add(g_A0, 1.0, _cross(A[1], g_cof2)), 1.0, _cross(g_cof1, A[2]))
            g_A1 = _add(_add(g_A1, 1.0, _cross(A[2], g_cof0)), 1.0, _cross(g_cof2, A[0]))
            g_A2 = _add(_add(g_A2, 1.0, _cross(A[0], g_cof1)), 1.0, _cross(g_cof0, A[1]))
        # A_0 = (1 - 2 (y y + z z), 2 (x y + w z), 2 (x z - w y)), ...
        g_qw = qz * (g_A0[1] - g_A1[0]) + qy * (g_A2[0] - g_A0[2]) + qx * (g_A1[2] - g_A2[1])
        g_qx = qy * (g_A0[1] + g_A1[0]) + qz * (g_A0[2] + g_A2[0]) + qw * (g_A1[2] - g_A2[1])
        g_qy = qx * (g_A0[1] + g_A1[0]) + qz * (g_A1[2] + g_A2[1]) + qw * (g_A2[0] - g_A0[2])
        g_qz = qx * (g_A0[2] + g_A2[0]) + qy * (g_A1[2] + g_A2[1]) + qw * (g_A0[1] - g_A1[0])
        g_qx -= 2 * qx * (g_A1[1] + g_A2[2])
        g_qy -= 2 * qy * (g_A0[0] + g_A2[2])
        g_qz -= 2 * qz * (g_A0[0] + g_A1[1])
        tl.store(g_quats_ptr + own * 4, tl.where(ever, 2 * g_qw, 0.0), mask)
        tl.store(g_quats_ptr + own * 4 + 1, tl.where(ever, 2 * g_qx, 0.0), mask)
        tl.store(g_quats_ptr + own * 4 + 2, tl.where(ever, 2 * g_qy, 0.0), mask)
        tl.store(g_quats_ptr + own * 4 + 3, tl.where(ever, 2 * g_qz, 0.0), mask)
        tl.store(g_opacities_ptr + own, tl.where(ever, g_log_opacity / opacity, 0.0), mask)
        for i in tl.static_range(3):
            tl.store(g_means_ptr + own * 3 + i, g_mean[i], mask)
            tl.store(g_scales_ptr + own * 3 + i, g_scale[i], mask)
            tl.store(g_colors_ptr + own * 3 + i, g_color[i], mask)


_NEEDS = {}  # (device, shape of a call): where the GPU leaves the number of pairs, the largest of late


def _capacity(shape, rows, device):
    """The largest number of pairs in late calls of this shape and a quarter; where this call's will be.

    The number comes back without waiting, some time after the call: in page-locked memory, which the GPU
    writes to. A larger number of long ago is forgotten by a sixteenth a call. Memory is limited to 64 pairs a
    Gaussian and view.
    """
    if (device, shape) not in _NEEDS:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return 2 * rows, None  # page-locked memory cannot be had now
        with torch.inference_mode(False):  # or no call outside of it could write there
            reported = torch.full((1,), -1, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        _NEEDS[device, shape] = [reported, 0]
    reported, largest = entry = _NEEDS[device, shape]
    need = reported.item()  # of the host's memory: nobody waits
    if need < 0:
        return 2 * rows, reported
    entry[1] = largest = max(need, largest - largest // 16)
    wanted = largest + largest // 4
    grain = 1 << max(wanted.bit_length() - 4, 0)  # sizes that hardly change are easy on the allocator
    return min(-(-wanted // grain) * grain, max(64 * rows, 2**22)), reported


def _programs(count, times=1):
    return (times * -(-count // LANES["BLOCK"]),)


def _tile_lists_triton(order, box, capacity, shape):
    """Which rows reach which tile, nearest first. shape: N, tiles_x, tiles_y, tiles.

    [room] int32, the rows of each tile's list, tile by tile; [tiles, 2], where each begins and ends; [1], how
    many pairs there are. If more than `capacity`, the lists are those of whole views, in their first tiles.
    And what deterministic gradients need: slot [room], where a pair was before the sort by tiles; end [rows],
    where the pairs of each row end in slot's order.
    """
    (N, tiles_x, tiles_y, tiles), rows, new = shape, len(order), dict(device=order.device)
    room = max(capacity, rows)
    grid = _programs(room)
    short = tiles <= 2**16  # then 16 bits carry a tile's number, counted from the least of them
    least = -(2**15) if short else 0
    count, need = torch.empty(rows, dtype=torch.int64, **new), torch.empty(1, dtype=torch.int64, **new)
    _count_kernel[_programs(rows)](order, box, count, rows, **LANES)
    end = count.cumsum(0)
    tile = torch.empty(room, dtype=torch.int16 if short else torch.int32, **new)
    row, lists = torch.empty(room, dtype=torch.int32, **new), torch.empty(room, dtype=torch.int32, **new)
    _expand_kernel[grid](order, box, end, tile, row, need, room, capacity, rows, rows.bit_length(), N,
                         tiles_x, tiles_y, tiles, least, **LANES)
    tile, slot = tile.sort(stable=True)  # after the sort by distance: two of short keys, not one of long keys
    bounds = torch.zeros(tiles, 2, dtype=torch.int32, **new)
    _collect_kernel[grid](tile, slot, row, need, lists, bounds, room, capacity, rows, least, **LANES)
    return lists, bounds, need, slot, end


def _tiling(views, H, W):
    """Keywords of the kernels: a tile's sides and warps."""
    tiles = views * -(-W // 8) * -(-H // 8)
    width, height, warps = next(shape for least, shape in TILINGS if tiles >= least)
    return dict(TILE_X=width, TILE_Y=height), dict(WARPS=warps, num_warps=warps, **COMPOSITE)


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quats, scales, opacities, colors, c2w, fxfycxcy, background, H, W, deterministic,
                dilation, capacity):
        inputs = means, quats, scales, opacities, colors, c2w, fxfycxcy, background  # contiguous
        (B, V), N = c2w.shape[:2], means.shape[1]
        sides, program = _tiling(B * V, H, W)
        tiles_x, tiles_y = -(-W // sides["TILE_X"]), -(-H // sides["TILE_Y"])
        rows, tiles = B * V * N, B * V * tiles_x * tiles_y
        if max(rows, tiles) >= 2**30:
            raise ValueError(f"rasterize: {rows} Gaussians, {tiles} tiles in all views: use a smaller batch")
        new = dict(device=means.device)
        reported = None
        if capacity is None:
            capacity, reported = _capacity((B, V, N, H, W), rows, means.device)
        capacity = min(capacity, 2**30)
        with torch.cuda.device_of(means):
            distance, record = torch.empty(rows, **new), torch.empty(rows, RECORD, **new)
            box = torch.empty(rows, 3, dtype=torch.int32, **new)
            if rows:
                _project_kernel[_programs(N, B * V)](
                    *inputs[:7], distance, box, record, V, N, H, W, dilation, tiles_x, tiles_y, RECORD=RECORD,
                    **sides, **LANES)
                order = distance.sort(stable=True)[1]
                lists, bounds, need, slot, end = _tile_lists_triton(
                    order, box, capacity, (N, tiles_x, tiles_y, tiles))
                if reported is not None:
                    reported.copy_(need, non_blocking=True)
            else:
                lists, bounds = box, torch.zeros(tiles, 2, dtype=torch.int32, **new)
                need = order = slot = end = torch.zeros(1, dtype=torch.int64, **new)
            image, normal = torch.empty(B, V, 3, H, W, **new), torch.empty(B, V, 3, H, W, **new)
            alpha, depth, median_depth = (torch.empty(B, V, 1, H, W, **new) for _ in range(3))
            norm, median = torch.empty(B, V, H, W, **new), torch.empty(B, V, H, W, dtype=torch.int32, **new)
            stop = torch.empty(tiles, dtype=torch.int32, **new)
            for whole, programs in ((False, tiles), (True, min(tiles, WHOLE_PROGRAMS))) if tiles else ():
                _composite_kernel[(programs,)](
                    record, box, lists, bounds, need, fxfycxcy, background, image, alpha, depth, median_depth,
                    normal, norm, median, stop, H, W, tiles_x, tiles_y, tiles, capacity, WHOLE=whole,
                    RECORD=RECORD, BATCH=BATCH, **sides, **program)
        ctx.save_for_backward(*inputs, record, box, lists, bounds, need, stop, image, alpha, depth, normal,
                              norm, median, *((slot, order, end) if deterministic else ()))
        ctx.deterministic, ctx.dilation, ctx.capacity = deterministic, dilation, capacity
        ctx.set_materialize_grads(False)
        return image, alpha, depth, median_depth, normal

    @staticmethod
    def backward(ctx, *gradients):
        given = [g for g in gradients if g is not None]
        with torch.no_grad():
            grads = _Rasterize.differentiate(ctx, *gradients)
        return *_once(grads, *ctx.saved_tensors[:5], *given), *8 * (None,)

    @staticmethod
    def differentiate(ctx, *gradients):
        means, quats, scales, opacities, colors, c2w, fxfycxcy, background, *saved = ctx.saved_tensors
        record, box, lists, bounds, need, stop, image, *pictures = saved[:12]
        slot, order, end = saved[12:] or 3 * (need,)
        (B, V, _, H, W), N = image.shape, means.shape[1]
        rows = len(record)
        if rows == 0:
            return [torch.zeros_like(x) for x in (means, quats, scales, opacities, colors)]
        geometry = any(g is not None for g in gradients[2:])
        given = sum(1 << n for n, g in enumerate(gradients) if g is not None)
        gradients = [image if g is None else g.contiguous() for g in gradients]  # an absent one is not read
        sides, program = _tiling(B * V, H, W)
        tiles_x, tiles_y = -(-W // sides["TILE_X"]), -(-H // sides["TILE_Y"])
        tiles = len(stop)
        extra = len(lists) if ctx.deterministic else 0
        with torch.cuda.device_of(means):
            pair_sums, sums = torch.zeros(extra + rows, RECORD, device=means.device).split([extra, rows])
            # A view's sums are added in the order of its tiles, also where there is no room for each pair's.
            serial = B * V if ctx.deterministic else min(tiles, WHOLE_PROGRAMS)
            for whole, programs in ((False, tiles), (True, serial)):
                _composite_backward_kernel[(programs,)](
                    record, box, lists, bounds, need, stop, fxfycxcy, background, image, *pictures,
                    *gradients, slot, pair_sums, sums, H, W, tiles_x, tiles_y, tiles, ctx.capacity, given,
                    WHOLE=whole, GEOMETRY=geometry, DETERMINISTIC=ctx.deterministic, RECORD=RECORD, **sides,
                    **program)
            if ctx.deterministic:
                _add_pairs_kernel[(-(-rows // ADD_PAIRS["ROWS"]),)](
                    order, end, need, pair_sums, sums, rows, ctx.capacity, RECORD=RECORD, **ADD_PAIRS)
            grads = [torch.empty_like(x) for x in (means, quats, scales, opacities, colors)]
            _project_backward_kernel[_programs(N, B)](
                means, quats, scales, opacities, c2w, fxfycxcy, box, sums, *grads, V, N, H, W, ctx.dilation,
                GEOMETRY=geometry, RECORD=RECORD, **LANES)
        return grads


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
    backend=None,  # "torch" | "triton" | None: triton for float32 on a GPU, torch otherwise
    deterministic=False,  # gradients with the same bits every time; on a CPU they always have
    dilation=0.0,  # square pixels that every splat's covariance grows by, on the screen only: not its plane
    capacity=None,  # room for so many pairs of a Gaussian and a tile, on a GPU; a matter of speed only
):
    """Render (image, alpha, depth, median_depth, normal) of every object in every view: see this file's head.

    ValueError: a shape, dtype, device, size, background or backend that does not fit.
    """
    if torch.compiler.is_compiling():  # lists whose lengths depend on the data are nothing for a compiler
        return torch.compiler.disable(rasterize)(
            means, quats, scales, opacities, colors, c2w, fxfycxcy, height, width, background,
            backend=backend, deterministic=deterministic, dilation=dilation, capacity=capacity)
    if not (torch.is_tensor(means) and means.ndim == 3 and means.shape[2] == 3):
        got = tuple(getattr(means, "shape", ())) or type(means)
        raise ValueError(f"means: wanted a tensor (B, N, 3), got {got}")
    if means.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"means: wanted float32 (or float64), got {means.dtype}: call .float() on it")
    if not (torch.is_tensor(c2w) and c2w.ndim == 4):
        got = tuple(getattr(c2w, "shape", ())) or type(c2w)
        raise ValueError(f"c2w: wanted a tensor (B, V, 4, 4), got {got}")
    B, N, V = *means.shape[:2], c2w.shape[1]
    try:
        height, width = operator.index(height), operator.index(width)
    except TypeError:
        raise ValueError(f"height, width: wanted whole numbers, got {height!r} x {width!r}") from None
    if height < 1 or width < 1:
        raise ValueError(f"height, width: wanted at least 1 x 1, got {height} x {width}")
    if not (isinstance(dilation, (int, float)) and 0 <= dilation < math.inf):
        raise ValueError(f"dilation: wanted a number of at least 0, got {dilation!r}")
    dilation = float(dilation)
    if capacity is not None and not (isinstance(capacity, int) and capacity >= 0):
        raise ValueError(f"capacity: wanted a whole number of at least 0, or None, got {capacity!r}")
    if not torch.is_tensor(background):
        try:
            red, green, blue = (float(color) for color in background)
        except (TypeError, ValueError):
            got = repr(background)
            raise ValueError(f"background: wanted three numbers or a tensor (3,), got {got}") from None
        # To copy a list to a GPU would make the host wait.
        background = means.new_full((3,), red)
        if not red == green == blue:
            background[1].fill_(green)
            background[2].fill_(blue)
    background = background.to(means)
    wanted = {"quats": (quats, (B, N, 4)), "scales": (scales, (B, N, 3)), "opacities": (opacities, (B, N)),
              "colors": (colors, (B, N, 3)), "c2w": (c2w, (B, V, 4, 4)), "fxfycxcy": (fxfycxcy, (B, V, 4)),
              "background": (background, (3,))}
    for name, (tensor, shape) in wanted.items():
        got = tuple(tensor.shape) if torch.is_tensor(tensor) else type(tensor).__name__
        if got != shape:
            raise ValueError(f"{name}: wanted a tensor of shape {shape}, got {got}")
        if tensor.device != means.device or tensor.dtype != means.dtype:
            got = f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name}: wanted {means.dtype} on {means.device} like means, got {got}")
    if backend is None:
        fits = means.is_cuda and triton is not None and means.dtype == torch.float32
        backend = "triton" if fits else "torch"
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend: wanted 'torch', 'triton' or None, got {backend!r}")
    inputs = (means, quats, scales, opacities, colors, c2w, fxfycxcy)
    if backend == "torch":
        if deterministic and means.is_cuda:
            raise ValueError("deterministic: on a GPU it needs float32 and backend 'triton'")
        with torch.autocast(means.device.type, enabled=False):
            return _rasterize_torch(*inputs, height, width, background, dilation)
    if triton is None:
        raise ValueError("backend 'triton' was asked for, but triton is not installed")
    if not means.is_cuda and isinstance(_project_kernel, triton.JITFunction):
        raise ValueError("backend 'triton' on CPU tensors needs TRITON_INTERPRET=1 in the environment")
    if means.dtype != torch.float32:
        raise ValueError(f"backend 'triton' computes in float32, got {means.dtype} (use backend='torch')")
    for name, constant in (("c2w", c2w), ("fxfycxcy", fxfycxcy), ("background", background)):
        if constant.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: wanted a constant, got a tensor that requires grad: detach it")
    inputs = [x.contiguous() for x in (*inputs, background)]
    return Render(*_Rasterize.apply(*inputs, height, width, bool(deterministic), dilation, capacity))
