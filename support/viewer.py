"""Objects that turn in a browser: a piece of a page that needs no network, or a page of its own.

The drawing is viewer.js, which is written into the page with the splats, 16 bytes each. Without WebGL 2 or without
scripts the page shows a picture instead.
"""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

import torch

from support import export

STYLE = """.viewer canvas{width:100%;cursor:grab;touch-action:none;display:block}.viewer canvas[hidden]{display:none}
.viewer img{width:100%;display:block}.viewer img[hidden]{display:none}
.viewer div{display:grid;text-align:center;font-size:.8rem}"""


def pack(gaussians: tuple, index: int, limit: int) -> dict:
    """What viewer.js draws: 16 bytes a splat. Of more than `limit` a random part is kept, larger in turn."""
    means, scales, quats, opacities, colors = export.visible(gaussians, index)
    count = len(means)
    if count > limit:
        kept = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit].sort().values
        means, scales, quats, opacities, colors = (t[kept] for t in (means, scales, quats, opacities, colors))
        scales = scales * (count / limit) ** 0.5                # the same share of the surface is covered
    if count == 0:
        return {"count": 0, "of": 0, "low": [0.0] * 3, "size": [1.0] * 3, "logs": [0.0, 0.0], "splats": ""}

    def whole(values: torch.Tensor, most: int) -> torch.Tensor:
        return (values.clamp(0, 1) * most).round().long()

    low, size = means.amin(0), (means.amax(0) - means.amin(0)).clamp(min=1e-6)
    logs = scales.clamp(min=1e-6).log()
    first, reach = logs.min(), (logs.max() - logs.min()).clamp(min=1e-6)
    x, y, z = whole((means - low) / size, 65535).unbind(-1)
    s = whole((logs - first) / reach, 255)
    q = quats[:, 1:] * torch.where(quats[:, :1] < 0, -1.0, 1.0)     # w is what is missing to 1
    q = (q * 127).round().long() + 127
    c = whole(torch.cat([colors, opacities[:, None]], 1), 255)
    words = torch.stack([x | y << 16, z | s[:, 0] << 16 | s[:, 1] << 24,
                         s[:, 2] | q[:, 0] << 8 | q[:, 1] << 16 | q[:, 2] << 24,
                         c[:, 0] | c[:, 1] << 8 | c[:, 2] << 16 | c[:, 3] << 24], 1)
    return {"count": len(means), "of": count, "low": low.tolist(), "size": size.tolist(),
            "logs": [first.item(), reach.item()],
            "splats": base64.b64encode(words.numpy().astype("<u4").tobytes()).decode()}


def viewer(groups: list[tuple], captions: list[str], picture: bytes, camera: tuple[float, float, float], *,
           limit: int) -> str:
    """A piece of HTML with one row of objects per group; every object turns with the others.

    groups: Gaussians of at least len(captions) objects each. picture: a .png for browsers that cannot draw.
    camera: its distance from the origin, its focal length in picture widths, and the variance, in squared picture widths,
    by which the base's splats are widened on the screen. limit: the most splats an object is shown with.
    """
    objects = [pack(group, index, limit) for group in groups for index in range(len(captions))]
    thinned = [one for one in objects if one["count"] < one["of"]]
    note = (f"Shown with at most {limit:,} splats an object, of up to {max(one['of'] for one in thinned):,}. "
            if thinned else "")
    radius, focal, dilation = camera
    scene = {"columns": len(captions), "radius": radius, "focal": focal, "dilation": dilation, "elevation": 20,
             "azimuth": 30, "objects": objects}
    data = json.dumps(scene).replace("<", "\\u003c")            # no text can end the script
    script = Path(__file__).with_name("viewer.js").read_text(encoding="utf-8")
    names = "".join(f"<span>{html.escape(caption)}</span>" for caption in captions)
    return f"""<style>{STYLE}</style><section class="viewer"><canvas hidden tabindex="0"></canvas>
<img alt="the objects" src="data:image/png;base64,{base64.b64encode(picture).decode()}">
<div style="grid-template-columns:repeat({len(captions)},1fr)">{names}</div>
<p>Drag to turn, arrow keys too; click, then the wheel, to come closer. {note}</p>
<script>{{{script}
view(document.currentScript.closest(".viewer"), {data});}}</script></section>
"""


def page(title: str, body: str) -> str:
    """A whole page around `body`, which is HTML; `title` is text."""
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>body{{font:16px/1.5 system-ui,sans-serif;max-width:40rem;margin:1rem auto;
padding:0 1rem;color:#222}}</style><h1>{html.escape(title)}</h1>{body}</html>
"""
