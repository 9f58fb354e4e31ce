"""The pictures and the page that a run leaves: before and after, the training's curves, all of it in one file.

r2d3.py hands in tensors and text and gets back {file name: content}; nothing here knows of the method.
"""

import base64
import contextlib
import html
import importlib.metadata
import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from support import UserError, export, say, to_bytes, to_json, viewer, write_atomic
from support.metrics import cells, paper_table, titles

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
img{max-width:100%} table{border-collapse:collapse} pre{background:#f5f5f5;padding:1rem;overflow-x:auto}
td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}"""


def write(out: Path, draw: Callable, objects: list[tuple], captions: list[str], rows: list[dict], summary: dict,
          settings: dict, camera: tuple[float, float, float]) -> None:
    """summary.json and all of `files`, atomically.

    objects: Gaussians before and after, n each. draw(gaussians, elevation, azimuths, size) -> (n, V, 3, size, size).
    """
    before, after = (draw(each, 20.0, torch.tensor([30.0]), 144)[:, 0].cpu() for each in objects)
    first = [torch.cat([a[:4], b[:4]]) for a, b in zip(*objects)]
    title = f"{settings['reward']} on {settings['base']}"
    made = files(before, after, captions, objects, turntable(draw, type(objects[0])(*first)), rows, summary, title,
                 to_json(settings), camera)
    for name, content in {"summary.json": to_json(summary), **made}.items():
        write_atomic(out / name, content)


def turntable(draw: Callable, gaussians: tuple, size: int = 128, frames: int = 36) -> bytes:
    """A .gif in which all objects, side by side, turn once around."""
    angles = 360 / frames * torch.arange(frames)
    return gif([draw(gaussians, 20.0, angle[None], size).transpose(0, 1) for angle in angles])


def files(before: Tensor, after: Tensor, captions: list[str], objects: list[tuple], turning_gif: bytes, rows: list[dict],
          summary: dict, title: str, settings: str, camera: tuple[float, float, float]) -> dict[str, bytes | str]:
    """Everything, by file name.

    before, after: (n, 3, H, W) in [0, 1], with n captions. objects: their Gaussians, before and after; the first four can
    be turned; camera as viewer.viewer takes it. rows: the training's log, may be empty. summary:
    {metric: {"before", "after", "after_ci95", "ci95"}}.
    """
    shown = captions[:4]
    still = png(picture_rows(torch.stack([before[:len(shown)], after[:len(shown)]])))
    turning = viewer.viewer(objects, shown, still, camera, limit=3000)
    out = {"samples/before_after.png": png(labelled(torch.cat([before, after], 2), captions, min(6, len(captions)))),
           "samples/turntable.gif": turning_gif}
    if rows:
        out["curves.png"] = curves(rows)
    table = ""
    for key, name in titles(summary).items():
        table += f"<tr><td>{name}<td>" + "<td>".join(cells(summary[key]))

    def inline(name: str) -> str:
        return f"data:image/{name[-3:]};base64,{base64.b64encode(out[name]).decode()}"

    out["report.html"] = f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>r2d3: {html.escape(title)}</title><style>{STYLE}</style>
<h1>{html.escape(title)}</h1>
<p>Scorer: {html.escape(summary['scorer'])}. {summary['prompts']} unseen prompts x {summary['samples_per_prompt']} objects,
the same seeds before and after; {summary['seconds']:.0f} seconds in all. Intervals: 95%, bootstrap over prompts,
of FID {summary['fid_to_base']['resamples']} times.
Features: {html.escape(summary['features'])}. FID from {summary['fid_to_base']['images']} pictures a side.</p>
<table><tr><th>on unseen prompts<th>before<th>after<th>95% of after<th>95% of the change</tr>{table}</table>
{paper_section(summary)}<h2>Before (top) and after (bottom)</h2><img alt="pairs" src="{inline('samples/before_after.png')}">
<h2>All around: before (top) and after (bottom)</h2>{turning}
{f'<h2>Training</h2><img alt="curves" src="{inline("curves.png")}">' if rows else ''}
<h2>Settings</h2><pre>{html.escape(settings)}</pre></html>"""
    return out


def paper_section(summary: dict) -> str:
    """The paper's own columns, of an evaluation with --protocol paper; else nothing."""
    if "paper_protocol" not in summary:
        return ""
    about, rows = paper_table(summary["paper_protocol"])
    lines = "".join("<tr><td>" + "<td>".join(row) for row in rows)
    published = "<th>paper, before<th>paper, after" if summary["paper_protocol"]["paper"] else ""
    return (f"<h2>In the paper's terms</h2><p>{about}</p>"
            f"<table><tr><th><th>before<th>after<th>95% of after{published}</tr>{lines}</table>")


def save_object(path: Path, gaussians: tuple, pictures: Tensor, draw: Callable, about: dict,
                camera: tuple[float, float, float], mesh_cameras: tuple[Tensor, Tensor] | None,
                backend: str | None) -> None:
    """One object's files: path is the .ply; beside it an .html to turn it, a .png, a .gif and, with cameras, a .glb.

    pictures (1, V, 3, H, W); draw as in `write`; camera as viewer.viewer takes it. A mesh that cannot be made is said, and no error.
    """
    if export.write_ply(path, gaussians) == 0:
        say(f"nothing can be seen of {path}, it holds no splats: look at --run and --weights")
    views = png(picture_rows(pictures))
    write_atomic(path.with_suffix(".png"), views)
    write_atomic(path.with_suffix(".gif"), turntable(draw, gaussians, 256))
    lines = "".join(f"<tr><td>{html.escape(str(key))}<td>{html.escape(str(value))}" for key, value in about.items())
    body = viewer.viewer([gaussians], [""], views, camera, limit=131072)
    write_atomic(path.with_suffix(".html"), viewer.page(about["prompt"], f"{body}<table>{lines}</table>"))
    if mesh_cameras:
        try:
            made = export.mesh(gaussians, *mesh_cameras, dilation=camera[2], backend=backend)
            write_atomic(path.with_suffix(".glb"), export.glb(made))
        except UserError as error:
            say(f"{path.with_suffix('.glb')} was not made: {error}")


def labelled(images: Tensor, captions: list[str], columns: int) -> Image.Image:
    """(n, 3, H, W) in [0, 1], each with its caption below, in rows of `columns`."""
    n, _, H, W = images.shape
    below = ["\n".join(textwrap.wrap(caption, max(W // 6, 1))) for caption in captions]      # a letter is 6 pixels wide
    rows, line = -(-n // columns), H + 4 + 12 * max(text.count("\n") + 1 for text in below)
    picture = Image.new("RGB", (columns * W, rows * line), "white")
    draw = ImageDraw.Draw(picture)
    for k, (image, text) in enumerate(zip(images.detach().cpu().clamp(0, 1), below)):
        x, y = k % columns * W, k // columns * line
        picture.paste(Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()), (x, y))
        draw.multiline_text((x + W // 2, y + H), text, fill="black", anchor="ma", align="center", spacing=1,
                            font_size=10)
    return picture


def curves(rows: list[dict]) -> bytes:
    """The log as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 3), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(1, 3), (("reward", "reward of the epoch's samples"),
                                                           ("coverage", "alpha coverage"), ("loss", "loss"))):
        axes.plot([row["update"] for row in rows], [row[name] for row in rows], color="tab:blue")
        axes.set(title=title, xlabel="update")
        axes.grid(alpha=0.3)
    return to_bytes(lambda file: figure.savefig(file, format="png", dpi=110))


def png(picture: Image.Image) -> bytes:
    return to_bytes(lambda file: picture.save(file, "PNG"))


def gif(frames: list[Tensor]) -> bytes:
    """Pictures (rows, columns, 3, H, W), one after the other, as a .gif."""
    pictures = [picture_rows(frame) for frame in frames]
    return to_bytes(lambda file: pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=80, loop=0))


def picture_rows(images: Tensor) -> Image.Image:
    """(rows, columns, 3, H, W) in [0, 1] -> one picture."""
    rows, columns, _, H, W = images.shape
    flat = images.detach().cpu().clamp(0, 1).permute(0, 3, 1, 4, 2).reshape(rows * H, columns * W, 3)
    return Image.fromarray((flat * 255).round().byte().numpy())


def git_commit() -> str | None:
    """The commit of this code, "-dirty" where it was changed; None where there is no git or no commit that holds it.

    Rows that an experiment has just appended to experiments/results are no change of the code.
    """
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", Path(__file__).parents[1], *arguments], capture_output=True, encoding="utf-8",
                              errors="replace").stdout.strip()

    with contextlib.suppress(OSError):                          # no git here
        head = git("rev-parse", "--verify", "--quiet", "HEAD") if git("ls-files", "support/report.py") else ""
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)experiments/results")
        return head and head + ("-dirty" if changed else "") or None
    return None


def describe(config: dict, scorer: str) -> dict:
    """What config.json holds: every setting, and with what and by whom the run was made."""
    names = ("torch", "diffusers", "peft", "triton", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)}
    gpu = torch.cuda.get_device_name(config["device"]) if config["device"].startswith("cuda") else None
    return {"config": config, "scorer": scorer, "command": sys.argv, "seed": config["seed"], "git_commit": git_commit(),
            "gpu": gpu, "versions": {"python": sys.version.split()[0], **versions}}


def plan(about: dict, world: int, picked: int, prompts: int, test_prompts: int, done: int | None) -> str:
    """What a training is going to do, before it does. `picked` steps of a trajectory are trained; `done` epochs are."""
    config = about["config"]
    objects = config["batch_size"] * world
    lines = [f"base      {config['base']} on {config['device']}" + (f", {world} processes" if world > 1 else ""),
             f"reward    {about['scorer']}",
             f"training  {config['epochs']} epochs x {config['updates_per_epoch']} updates; an epoch samples {objects} "
             f"objects in {config['steps']} steps",
             f"          and trains on {objects * picked} of these; rewards see {config['views']} views of "
             f"{config['view_size']} pixels squared",
             f"prompts   {prompts} to train on, {test_prompts} x {config['samples_per_prompt']} to measure"]
    if config["base"] == "shapes" and torch.cuda.is_available():
        lines += ["bigger    this GPU can run the paper's base: --base diffsplat-pixart (a large download, once)"]
    return "\n".join([*lines, f"results   {config['out']}/" + (f" (going on after epoch {done})" if done else "")])
