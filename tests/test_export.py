"""What other programs read: .ply and .glb files, the viewer in a page, samples.json, and LoRAs in and out."""
import base64
import dataclasses
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch


import make_shapes  # noqa: E402
import test_bases  # noqa: E402
import test_flow  # noqa: E402
from test_gaussiancube import folder as cube_folder, recorded  # noqa: E402, F401

import r2d3  # noqa: E402
from kernels.splat import _rotation  # noqa: E402
from r2d3 import Gaussians  # noqa: E402
from support import UserError, export, report, viewer  # noqa: E402


@pytest.fixture(scope="module")
def base():
    return r2d3.load_base(r2d3.resolve(r2d3.Config()), "cpu")


def forty():
    """The cameras of `sample --mesh`."""
    azimuth = 36.0 * torch.arange(10) + 9.0 * torch.arange(4)[:, None]
    c2w = r2d3.orbit(torch.tensor([[-20.0], [0.0], [10.0], [30.0]]), azimuth)
    return c2w.flatten(0, 1), r2d3.intrinsics(40)


def cloud(count, seed=0):
    """Splats of every kind: quaternions of many lengths, some of length 0, flat and round ones."""
    rand = torch.Generator().manual_seed(seed)
    quats = torch.randn(1, count, 4, generator=rand) * torch.rand(1, count, 1, generator=rand)
    quats[:, ::7] = 0
    return Gaussians(torch.rand(1, count, 3, generator=rand) - 0.5, 0.05 * torch.rand(1, count, 3, generator=rand) + 1e-3,
                     quats, 0.8 * torch.rand(1, count, generator=rand) + 0.1, torch.rand(1, count, 3, generator=rand))


def read_ply(path):
    """means, scales, quats, opacities, colors of a file, by INRIA's conventions."""
    header, _, body = path.read_bytes().partition(b"end_header\n")
    names = re.findall(r"property float (\w+)", header.decode())
    table = torch.from_numpy(np.frombuffer(body, "<f4").reshape(-1, len(names)).copy())
    column = dict(zip(names, table.T))

    def stack(*keys):
        return torch.stack([column[key] for key in keys], -1)
    return (stack("x", "y", "z"), stack("scale_0", "scale_1", "scale_2").exp(), stack("rot_0", "rot_1", "rot_2", "rot_3"),
            column["opacity"].sigmoid(), 0.5 + stack("f_dc_0", "f_dc_1", "f_dc_2") / (2 * math.sqrt(math.pi)))


def covariance(scales, quats):
    M = _rotation(quats) * scales[..., None, :]
    return M @ M.mT


# ---- .ply ----------------------------------------------------------------------------------------------------------


def test_ply_holds_the_ellipsoids_of_our_pictures_turned_y_down(tmp_path):
    """Viewers normalise quaternions and our rasteriser does not: the file's own rotation and scales make up for it."""
    own = cloud(300)
    assert r2d3.export.write_ply(tmp_path / "a.ply", own) == 300
    means, scales, quats, opacities, colors = read_ply(tmp_path / "a.ply")
    assert (quats.norm(dim=-1) - 1).abs().max() < 1e-5         # none of length 0 either
    turn = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(means, own.means[0] @ turn)
    want = turn @ covariance(own.scales[0], own.quats[0]) @ turn
    assert (covariance(scales, quats) - want).abs().max() < 1e-5 * want.abs().max()
    assert (opacities - own.opacities[0]).abs().max() < 1e-5 and (colors - own.colors[0]).abs().max() < 1e-5


def test_a_file_seen_by_a_camera_that_takes_y_down_is_our_picture(tmp_path, base):
    """The pictures of what viewers read, from their side: the world turned over with its cameras is the same picture."""
    own = base.decode(torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(0)))
    r2d3.export.write_ply(tmp_path / "a.ply", own)
    file = Gaussians(*(tensor[None] for tensor in read_ply(tmp_path / "a.ply")))
    c2w = r2d3.orbit(20.0, torch.tensor([30.0, 140.0]))[None]
    over = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    ours = r2d3.render(own, c2w, r2d3.intrinsics(1, 2), 96).image
    theirs = r2d3.render(file, over @ c2w, r2d3.intrinsics(1, 2), 96).image
    assert (ours - theirs).abs().max() < 2e-3 and ours.min() < 0.6
    upside_down = r2d3.render(file, c2w, r2d3.intrinsics(1, 2), 96).image
    assert (ours - upside_down).abs().max() > 0.1


def test_quaternions_of_rotations():
    q = torch.nn.functional.normalize(torch.randn(200, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    q = torch.cat([q, torch.eye(4), torch.tensor([[0.0, 0.6, 0.8, 0.0], [1e-4, 0.0, 0.0, 1.0]])])
    assert (_rotation(export.to_quaternions(_rotation(q))) - _rotation(q)).abs().max() < 1e-5


# ---- Meshes --------------------------------------------------------------------------------------------------------


def inside(mesh, n):
    """Points (n^3, 3) of a grid, and whether each is inside: the parity of the crossings of a ray along z."""
    axis = torch.linspace(-0.5, 0.5, n) + 0.0007
    corners = torch.from_numpy(mesh.vertices.copy()).float()[torch.from_numpy(mesh.faces.copy())]
    columns = torch.cartesian_prod(axis, axis)[:, None]         # (n^2, 1, 2)
    counts = torch.zeros(n * n, n + 1, dtype=torch.long)

    def side(a, b):
        return (b[:, 0] - a[:, 0]) * (columns[..., 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (columns[..., 0] - a[:, 0])

    for part in corners.split(2000):
        a, b, c = part.unbind(1)
        shares = torch.stack([side(b, c), side(c, a), side(a, b)], -1)
        column, face = ((shares > 0).all(-1) | (shares < 0).all(-1)).nonzero(as_tuple=True)
        share = shares[column, face]
        z = (share / share.sum(-1, keepdim=True) * part[face][..., 2]).sum(-1)
        counts.index_put_((column, torch.searchsorted(axis, z)), torch.ones_like(column), accumulate=True)
    return torch.cartesian_prod(axis, axis, axis), (counts.cumsum(1)[:, :n] % 2 == 1).flatten()


@pytest.mark.parametrize("through", ["as they are", "through the autoencoder"])
def test_meshes_are_the_true_scenes(base, through):
    """Volume IoU against the signed distances that the scenes were traced from."""
    pytest.importorskip("skimage", reason="meshes need scikit-image")
    pytest.importorskip("trimesh", reason="meshes need trimesh")
    rng, count = random.Random(11), 4 if through == "as they are" else 8
    scenes = [make_shapes.draw_geometry(rng) for _ in range(count)]
    traced = make_shapes.trace(scenes)
    colors = [["red", "blue", "yellow"][:len(scene["parts"])] for scene in scenes]
    table = make_shapes.scene_table(scenes)
    with torch.no_grad():
        grids = make_shapes.paint(traced, colors, random.Random(0))
        if through != "as they are":
            grids = make_shapes.reconstruct(base.vae, grids)
        gaussians = make_shapes.splats(grids)
    shares = []
    for index in range(count):
        begun = time.process_time()
        made = export.mesh(gaussians, *forty(), index)
        assert time.process_time() - begun < 20                 # 2 cores, 10 s each
        assert made.is_watertight and made.is_volume and made.volume > 0
        points, ours = inside(made, 40)
        true = make_shapes.scene_distance(points, torch.full((len(points),), index), table)[0] < 0
        shares.append(((ours & true).sum() / (ours | true).sum()).item())
    assert sum(shares) / count >= 0.85 and min(shares) > 0.7, shares        # of 16 measured: 0.878 and 0.936


def ball(count=4000, radius=0.3):
    """Flat splats on a sphere, red where y is positive and blue below; a sphere tells up from down by its colours."""
    n = torch.arange(count) + 0.5
    y, turn = 1 - 2 * n / count, math.pi * (1 + 5 ** 0.5) * n
    normal = torch.stack([(1 - y * y).sqrt() * turn.cos(), y, (1 - y * y).sqrt() * turn.sin()], -1)
    z = torch.tensor([0.0, 0.0, 1.0])
    quats = torch.cat([1 + (normal @ z)[:, None], torch.cross(z.expand_as(normal), normal, dim=-1)], -1)
    red = (y > 0).float()
    return Gaussians((radius * normal)[None], torch.tensor([0.012, 0.012, 0.001]).expand(1, count, 3),
                     torch.nn.functional.normalize(quats, dim=-1)[None], torch.full((1, count), 0.95),
                     torch.stack([0.2 + 0.6 * red, 0.2 + 0 * red, 0.8 - 0.6 * red], -1)[None])


def test_glb_is_upright_has_linear_colours_and_its_size(tmp_path):
    trimesh = pytest.importorskip("trimesh", reason="meshes need trimesh")
    pytest.importorskip("skimage", reason="meshes need scikit-image")
    made = export.mesh(ball(), *forty(), resolution=48, size=128)
    assert made.is_watertight and abs(made.volume / (4 / 3 * math.pi * 0.3 ** 3) - 1) < 0.06
    up = made.vertices[:, 1] > 0.05
    assert np.abs(made.visual.vertex_colors[up, :3].mean(0) - [204, 51, 51]).max() < 8      # sRGB, as in our pictures
    (tmp_path / "a.glb").write_bytes(export.glb(made))
    length = int.from_bytes((tmp_path / "a.glb").read_bytes()[12:16], "little")
    tree = json.loads((tmp_path / "a.glb").read_bytes()[20:20 + length])
    primitive = tree["meshes"][0]["primitives"][0]
    assert tree["asset"]["version"] == "2.0" and {"POSITION", "NORMAL", "COLOR_0"} <= primitive["attributes"].keys()
    assert "KHR_materials_unlit" in tree["materials"][primitive["material"]]["extensions"]
    assert tree["extensionsUsed"] == ["KHR_materials_unlit"]
    again = trimesh.load(tmp_path / "a.glb", force="mesh")
    assert len(again.faces) == len(made.faces) and again.is_watertight
    accessor = tree["accessors"][primitive["attributes"]["COLOR_0"]]
    start = 20 + length + 8 + tree["bufferViews"][accessor["bufferView"]]["byteOffset"]
    stored = np.frombuffer((tmp_path / "a.glb").read_bytes(), np.uint8, 4 * accessor["count"], start).reshape(-1, 4)
    stored = stored[made.vertices[:, 1] > 0.05, :3].mean(0)
    assert np.abs(stored - 255 * np.array([0.604, 0.033, 0.033])).max() < 10                # sRGB 0.8, 0.2 made linear


def test_no_mesh_of_nothing_and_without_libraries(monkeypatch):
    pytest.importorskip("skimage", reason="meshes need scikit-image")
    clear = ball()._replace(opacities=torch.full((1, 4000), 0.02))
    with pytest.raises(UserError, match="no surface"):
        export.mesh(clear, *forty())
    monkeypatch.setitem(sys.modules, "trimesh", None)
    with pytest.raises(UserError, match="pip install scikit-image trimesh"):
        r2d3.sample(r2d3.Config(prompts="a red cube", mesh=True, device="cpu"))


# ---- The viewer ----------------------------------------------------------------------------------------------------


def test_packed_splats_are_those_of_the_object():
    own = cloud(500)
    packed = viewer.pack(own, 0, 10 ** 6)
    words = np.frombuffer(base64.b64decode(packed["splats"]), "<u4").reshape(-1, 4).astype(np.int64)
    assert packed["count"] == packed["of"] == 500 and len(words) == 500
    place = np.stack([words[:, 0] & 65535, words[:, 0] >> 16, words[:, 1] & 65535], -1) / 65535
    means = torch.from_numpy(np.array(packed["low"]) + place * np.array(packed["size"]))
    assert (means - own.means[0]).abs().max() < 1e-4
    s = np.stack([words[:, 1] >> 16 & 255, words[:, 1] >> 24, words[:, 2] & 255], -1) / 255
    scales = np.exp(packed["logs"][0] + packed["logs"][1] * s)
    q = (np.stack([words[:, 2] >> 8 & 255, words[:, 2] >> 16 & 255, words[:, 2] >> 24], -1) - 127) / 127
    w = np.sqrt(np.maximum(0, 1 - (q * q).sum(-1, keepdims=True)))
    found = covariance(torch.from_numpy(scales), torch.from_numpy(np.concatenate([w, q], -1)))
    want = covariance(own.scales[0], own.quats[0])
    assert ((found - want).norm(dim=(1, 2)) / want.norm(dim=(1, 2))).median() < 0.03
    rgba = np.stack([words[:, 3] >> 8 * n & 255 for n in range(4)], -1) / 255
    assert np.abs(rgba - torch.cat([own.colors[0], own.opacities[0, :, None]], 1).numpy()).max() < 0.003
    thin = viewer.pack(own, 0, 100)
    assert (thin["count"], thin["of"]) == (100, 500)
    empty = viewer.pack(own._replace(opacities=torch.zeros(1, 500)), 0, 100)
    assert empty["count"] == 0 and empty["splats"] == ""


def page_of_balls(folder):
    """A page with a ball before (as it is) and after (turned over), and our picture of them."""
    own = ball()
    other = own._replace(means=-own.means)
    cameras = r2d3.orbit(20.0, 30.0)[None, None], r2d3.intrinsics(1, 1)
    ours = torch.cat([r2d3.render(one, *cameras, 300).image for one in (own, other)])
    body = viewer.viewer([own, other], ["<b>a</b></script>"], report.png(report.picture_rows(ours)), (1.4, r2d3.FXFY, 0.0),
                         limit=10 ** 6)
    page = folder / "page.html"
    page.write_text(viewer.page("balls & </script>", body), encoding="utf-8")
    return page, ours


def test_the_page_needs_nothing_else_and_no_text_gets_out(tmp_path):
    page, _ = page_of_balls(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', text) and "://" not in text and "import " not in text
    assert text.count("</script>") == 1 and "<b>a" not in text and "&lt;b&gt;a" in text
    assert 'img alt="the objects" src="data:image/png' in text  # what browsers without WebGL 2 or scripts show
    assert len(text) < 700_000


@pytest.mark.skipif(not shutil.which("chromium"), reason="looks at the page in chromium, which is not installed")
def test_the_viewer_draws_our_picture_and_turns(tmp_path):
    """In a headless browser, from file://, without network: a screenshot like our own render, and another after a drag."""
    from PIL import Image
    page, ours = page_of_balls(tmp_path)
    text = page.read_text(encoding="utf-8").replace("max-width:40rem;margin:1rem auto;\npadding:0 1rem", "margin:0")
    text = re.sub(r"<h1>.*?</h1>", "", text).replace("width:100%;cursor", "width:300px;cursor")
    drag = """<script>
    const canvas = document.querySelector("canvas"), at = (type, x, y) => canvas.dispatchEvent(
      new PointerEvent(type, {clientX: x, clientY: y, pointerId: 1, bubbles: true}));
    canvas.setPointerCapture = () => {};
    at("pointerdown", 100, 100); at("pointermove", 100, 180); at("pointerup", 100, 180);
    </script>"""

    def shot(name, html):
        (tmp_path / f"{name}.html").write_text(html, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
                 "--hide-scrollbars", "--virtual-time-budget=4000", f"--user-data-dir={tmp_path / name}"]
        subprocess.run(["chromium", *flags, "--window-size=300,720", f"--screenshot={tmp_path / name}.png",
                        f"file://{tmp_path / name}.html"], check=True, capture_output=True, timeout=120)
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))[:600, :300] / 255.0
        return torch.from_numpy(picture).float()

    ours = torch.cat([*ours[:, 0].permute(0, 2, 3, 1)])
    still = shot("still", text.replace("<img ", "<img style='display:none' "))      # the canvas, not the picture
    assert (still - ours).abs().mean() < 0.02 and ((still - ours).abs().amax(-1) > 0.25).float().mean() < 0.02
    turned = shot("turned", text.replace("<img ", "<img style='display:none' ") + drag)     # looks down from 60 degrees
    above = torch.cat([r2d3.render(one, r2d3.orbit(60.0, 30.0)[None, None], r2d3.intrinsics(1, 1), 300).image[0, 0].permute(
        1, 2, 0) for one in (ball(), ball()._replace(means=-ball().means))])
    assert (turned - above).abs().mean() < 0.02 < (turned - ours).abs().mean()
    plain = shot("plain", re.sub(r"<script>.*</script>", "", text, flags=re.S))     # without scripts: the picture
    assert (plain - ours).abs().mean() < 0.02


# ---- samples.json, names, the same object again ----------------------------------------------------------------------


def sample(out, prompts, **settings):
    return r2d3.sample(r2d3.Config(**{"prompts": str(prompts), "out": str(out), "steps": 4, "samples_per_prompt": 1,
                                      "device": "cpu", **settings}))


def index(out):
    return json.loads((out / "samples.json").read_text(encoding="utf-8"))


def test_the_same_object_alone_and_among_others(tmp_path):
    (tmp_path / "list.txt").write_text("a red cube\na big green ring\na red cube\n", encoding="utf-8")
    among = sample(tmp_path / "among", tmp_path / "list.txt", samples_per_prompt=2, seed=5)
    assert len(among) == 4                                      # the same words twice are the same objects
    alone, = sample(tmp_path / "alone", "a big green ring", seed=5)
    twin = next(path for path in among if path.name == alone.name)
    one, other = read_ply(alone), read_ply(twin)
    for a, b in zip(one[:2] + one[3:], other[:2] + other[3:]):  # rounding differs with the size of a batch
        assert a.shape == b.shape and (a - b).abs().max() < 1e-3
    a, b = (covariance(*ply[1:3]) for ply in (one, other))      # where two axes are as long, a rotation may be another
    assert (a - b).abs().max() < 1e-3 * a.abs().max()
    about = index(tmp_path / "among")
    assert about.keys() == {path.name for path in among} and about[alone.name] == index(tmp_path / "alone")[alone.name]
    assert {"prompt": "a big green ring", "sample": 0, "seed": 5, "base": "shapes", "steps": 4, "sampler": "dpm",
            "run": None}.items() <= about[alone.name].items()
    for path in among:
        assert all(path.with_suffix(suffix).is_file() for suffix in (".html", ".png", ".gif"))
    assert "a big green ring" in alone.with_suffix(".html").read_text(encoding="utf-8")


def test_nothing_is_overwritten_that_is_something_else(tmp_path):
    first, = sample(tmp_path, "a red cube")
    content = first.read_bytes()
    again, = sample(tmp_path, "a red cube")
    assert again == first and first.read_bytes() == content
    other, = sample(tmp_path, "a red cube", steps=5)
    assert other.name == "a-red-cube-seed0-0-2.ply" and first.read_bytes() == content
    assert [entry["steps"] for entry in index(tmp_path).values()] == [4, 5]
    (tmp_path / "a-red-cone-seed0-0.ply").write_bytes(b"somebody's")            # of an older version, without an index
    sample(tmp_path, "a red cone")
    assert (tmp_path / "a-red-cone-seed0-0.ply").read_bytes() == b"somebody's"
    (tmp_path / "samples.json").write_text("[1", encoding="utf-8")
    with pytest.raises(UserError, match="samples.json"):
        sample(tmp_path, "a red cube")


def test_every_prompt_has_a_readable_name():
    assert export.file_stem("A red cube, 1.5 m!") == "a-red-cube-1-5-m"
    assert export.file_stem("красный куб") == "красный-куб" and export.file_stem("红色的立方体") == "红色的立方体"
    emoji = [export.file_stem(text) for text in ("🚗", "🚀", "!?", "..", "🚗")]
    assert len(set(emoji)) == 4 and emoji[0] == emoji[4] and all(re.fullmatch(r"prompt-[0-9a-f]{8}", one) for one in emoji)
    long = ["a very " * 20 + end for end in ("red cube", "blue cube")] + ["红" * 200, "红" * 201]
    stems = [export.file_stem(text) for text in long]
    assert len(set(stems)) == 4 and all(len(stem.encode()) < 100 for stem in stems)
    assert not any(set(stem) & set('/\\:*?"<>| \n') for stem in stems + emoji)


# ---- LoRA in, LoRA out ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["shapes", *test_bases.BASES, "diffsplat-sd35", "gaussiancube"])
def tuned(request, tmp_path_factory):
    """(settings, lora folder): a base with small weights in its published layout, and a LoRA as a run saves it."""
    root = tmp_path_factory.mktemp(request.param)
    weights = None
    if request.param in test_bases.BASES:
        weights = str(test_bases.write_folder(root / "weights", request.param))
    elif request.param == "diffsplat-sd35":
        weights = str(test_flow.write_base(root / "weights"))
    elif request.param == "gaussiancube":
        weights = str(request.getfixturevalue("cube_folder"))
    settings = {"base": request.param, "weights": weights, "device": "cpu"}
    base = r2d3.load_base(r2d3.resolve(r2d3.Config(**settings)), "cpu")
    net = r2d3.add_lora(base.net, base.lora_targets, 4, 0)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    optimizer = torch.optim.AdamW([value for value in net.parameters() if value.requires_grad])
    r2d3.folders.save_checkpoint(root / "run", net, optimizer, [{"update": 1, "epoch": 1, "judged": 1}], 1, "", {}, {})
    return settings, root / "run/lora"


def predicted(base, seed=0):
    """What a base says of some noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, *base.latent_shape, generator=generator)
    prompt = "a red cube" if base.tower else "a red lamp"
    base.prepare([prompt])
    with torch.no_grad():
        return base.predict(x, torch.tensor([500.0 if "v" == base.schedule("dpm", 4).prediction else 500]),
                            base.encode([prompt]))


def load(settings, **more):
    return r2d3.load_base(r2d3.resolve(r2d3.Config(**settings | more)), "cpu")


def test_the_lora_loads_with_peft_and_diffusers_as_the_readme_says(tuned):
    settings, lora = tuned
    base = load(settings)
    plain = predicted(base)
    base.net = r2d3.inputs.load_lora(base.net, lora)
    ours = predicted(base)
    assert (ours - plain).abs().max() > 1e-3 * plain.abs().max()

    from peft import PeftModel
    base = load(settings)
    base.net = PeftModel.from_pretrained(base.net, lora)
    assert torch.equal(predicted(base), ours)

    base = load(settings)
    if hasattr(base.net, "load_lora_adapter"):
        base.net.load_lora_adapter(lora, weight_name="adapter_model.safetensors", prefix="base_model.model")
        assert torch.equal(predicted(base), ours)
    else:                                                       # diffusers' PixArt has no adapters, GaussianCube is ours
        assert settings["base"] in ("shapes", "diffsplat-pixart", "gaussiancube")


def test_merged_weights_are_taken_again(tuned, tmp_path, monkeypatch, capsys):
    settings, lora = tuned
    base = load(settings)
    plain = predicted(base)
    base.net = r2d3.inputs.load_lora(base.net, lora)
    want = predicted(base)
    monkeypatch.setattr(report, "save_object", lambda *args: None)
    prompt = "a red cube" if settings["base"] == "shapes" else "a red lamp"
    sample(tmp_path, prompt, run=str(lora), merge=True, **settings)
    path = capsys.readouterr().out.split("--weights ")[1].strip()
    assert Path(path).name.startswith("merged") and index(tmp_path)[Path(path).name]["run"] == str(lora)
    got = predicted(load(settings, weights=path))
    assert (got - want).abs().max() < 1e-4 * want.abs().max() < (got - plain).abs().max()
    with pytest.raises(UserError, match="--merge needs --run"):
        sample(tmp_path, prompt, merge=True, **settings)


def test_a_run_leaves_a_report_that_turns(tmp_path):
    config = r2d3.Config(out=str(tmp_path / "run"), epochs=1, batch_size=2, updates_per_epoch=1, samples_per_prompt=1,
                         steps=6, eval_prompts=5, device="cpu")
    r2d3.train(dataclasses.replace(config))
    text = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    scene = json.loads(re.search(r"view\(document.currentScript.closest\(\"\.viewer\"\), (\{.*?\})\);\}</script>", text)[1])
    assert scene["columns"] == 4 and len(scene["objects"]) == 8 and all(one["count"] > 20 for one in scene["objects"])
    assert sum(len(one["splats"]) for one in scene["objects"]) < 512_000
    assert not re.search(r'(src|href)="(?!data:)', text)
