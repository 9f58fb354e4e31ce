"""The paper's bases from folders in the published layout: the recorded networks load, predict and decode as recorded,
text is encoded once, and whatever is wrong with a folder is one sentence. Tiny, on the CPU, without network.
"""
import json
import shutil
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]

import common
import r2d3  # noqa: E402
from support import published, scorers  # noqa: E402
from r2d3 import Cond, Config, NoiseSchedule, seeded  # noqa: E402

BASES = {"diffsplat-pixart": "gsdiff_gobj83k_pas_fp16__render/checkpoints/013020/transformer_ema",
         "diffsplat-sd15": "gsdiff_gobj83k_sd15__render/checkpoints/013020/unet_ema"}
VAES = {"diffsplat-pixart": "gsvae_gobj265k_sdxl_fp16/checkpoints", "diffsplat-sd15": "gsvae_gobj265k_sd/checkpoints"}
PIXART = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 10, "out_channels": 8,
          "sample_size": 8, "patch_size": 2, "cross_attention_dim": 64, "caption_channels": 24, "norm_type": "ada_norm_single",
          "norm_elementwise_affine": False, "norm_eps": 1e-6, "use_additional_conditions": False}
WORDS = "a red blue lamp with two arms cube".split()


def data(name):
    path = ROOT / f"tests/data/{name}.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads((file.metadata() or {}).get("config", "{}"))


def weights(tensors, prefix="sd."):
    return {name.removeprefix(prefix): value.float() for name, value in tensors.items() if name.startswith(prefix)}


def close(got, want, tolerance):
    """The shapes are the same, and no element differs by more than a share of the largest one."""
    return got.shape == want.shape and ((got - want).abs().max() <= tolerance * want.abs().max()).item()


def write_text_encoder(folder, base):
    """A tiny T5 or CLIP with a tokenizer of a few words, as the published repos have them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
    )
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, **{w: n + 3 for n, w in enumerate(WORDS)}}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(
        folder / "tokenizer")
    torch.manual_seed(0)
    if base == "diffsplat-pixart":
        model = T5EncoderModel(T5Config(vocab_size=16, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    else:
        model = CLIPTextModel(CLIPTextConfig(vocab_size=16, hidden_size=24, intermediate_size=32, num_hidden_layers=1,
                                             num_attention_heads=2, bos_token_id=0, eos_token_id=1))
    model.save_pretrained(folder / "text_encoder")


def write_folder(folder, base):
    """DiffSplat's repo in small: the recorded weights in its layout, with its names and its quirks."""
    if base == "diffsplat-pixart":
        d, _ = data("pixart_mv")
        config = {"_class_name": "PixArtTransformerMV2DModel", **PIXART}
    else:
        d, config = data("unet_mv")
        config = {"_class_name": "UNetMV2DConditionModel", **config}
        assert "MV2D" in config["mid_block_type"] and "MV2D" in config["down_block_types"][0]
    config |= {"view_concat_condition": True, "input_concat_plucker": True, "input_concat_binary_mask": False}
    part = folder / BASES[base]
    part.mkdir(parents=True)
    (part / "config.json").write_text(json.dumps(config))
    names = sorted(weights(d))
    shards = {f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, own in shards.items():
        save_file({name: weights(d)[name] for name in own}, part / file)
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    d, config = data("gsvae")
    vae = {name: value for name, value in weights(d).items()}
    with torch.random.fork_rng():
        encoder = published.build(config | {"_class_name": "AutoencoderKL", "in_channels": 12, "out_channels": 12}).state_dict()
    vae = {f"vae.{name}": value for name, value in encoder.items()} | vae
    for number, scale in ((39030, 1.0), (9030, 0.5)):           # the higher number is the one
        path = folder / f"{VAES[base]}/{number:06d}/model.safetensors"
        path.parent.mkdir(parents=True)
        save_file({name: scale * value for name, value in vae.items()} | {"tiny_decoder.layers.0.weight": torch.ones(2)}, path)
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text(json.dumps(config | {"sample_size": 16}))
    write_text_encoder(folder, base)
    return folder


@pytest.fixture(scope="module", params=list(BASES))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp(name), name)


def load(name, folder, **settings):
    config = r2d3.resolve(Config(base=name, weights=str(folder), device="cpu", **settings))
    return r2d3.load_base(config, "cpu")


# ---- parity ------------------------------------------------------------------------------------------------


def test_denoiser_from_the_folder_is_the_recorded_one(name, folder):
    """Outputs and gradients of the official multi-view networks; measured 0 where they were recorded, 1.1e-6 on a CPU without AVX-512."""
    base = load(name, folder)
    d, _ = data("pixart_mv" if name == "diffsplat-pixart" else "unet_mv")
    x = d["x"].requires_grad_()
    out = base.net(x, encoder_hidden_states=d["text_embeds"], timestep=d["timestep"], return_dict=False,
                   encoder_attention_mask=d.get("text_mask"), added_cond_kwargs={"resolution": None, "aspect_ratio": None})[0]
    gradient, = torch.autograd.grad((out * d["w"]).sum(), x)
    assert close(out, d["out"], 5e-6) and close(gradient, d["grad_x"], 5e-6)
    assert not close(1.05 * gradient, d["grad_x"], 1e-2) and not close(gradient.roll(1, 0), d["grad_x"], 1e-2)
    for wrong in (1.05 * out, -out, out.roll(1, 0), d["out_num_views_1"]):
        assert not close(wrong, d["out"], 1e-2)
    assert base.guidance == 7.5 and base.latent_shape == (4, 4, 8, 8) and base.tower is None
    alphas = NoiseSchedule.from_diffusers("dpm", 20, **base.betas).alpha[10].item()
    assert alphas == pytest.approx({"diffsplat-pixart": 0.2789, "diffsplat-sd15": 0.5265}[name], abs=2e-3)


def test_predictions_are_the_recorded_ones(name, folder):
    """The same through predict, two halves of two objects of four views, and back to the latent: measured 1e-6, 4e-7."""
    base = load(name, folder)
    d, _ = data("pixart_mv" if name == "diffsplat-pixart" else "unet_mv")
    x, rays = (part.unflatten(0, (4, 4)).contiguous() for part in d["x"].split([4, 6], 1))
    t, embeds = (d[key].unflatten(0, (4, 4))[:, 0] for key in ("timestep", "text_embeds"))
    mask = d["text_mask"].unflatten(0, (4, 4))[:, 0].bool() if "text_mask" in d else None
    base.plucker = rays                                         # the recorded rows have their own
    x.requires_grad_()
    out = base.predict(x, t, Cond(embeds, mask))
    assert close(out, d["out"][:, :4].unflatten(0, (4, 4)), 1e-5)
    if name == "diffsplat-sd15":                                # PixArt's was recorded with its variance
        gradient, = torch.autograd.grad((out * d["w"].unflatten(0, (4, 4))).sum(), x)
        assert close(gradient, d["grad_x"][:, :4].unflatten(0, (4, 4)), 1e-5)


def test_decoding_is_the_recorded_one(name, folder):
    """decode of GSAutoencoderKL and all that the official code hands to its rasteriser; measured 1.2e-6 of the largest."""
    d, _ = data("gsvae")
    base = load(name, folder)
    x0 = d["z_scaled"][None]                                    # as the denoiser has it: both folders hold the recorded config
    assert close(x0[0] * base.latent_std + base.latent_mean, d["latents"], 1e-6)
    for size in (16, 256):                                      # at once, or a view at a time
        base.image_size = size
        got = base.decode(torch.cat([x0, x0.flip(1)]))
        for ours, theirs in (("means", "xyz"), ("scales", "scale"), ("quats", "rotation"), ("colors", "rgb")):
            assert close(getattr(got, ours)[:1], d[f"from_vae.{theirs}"], 1e-5), ours
        assert close(got.opacities[:1, :, None], d["from_vae.opacity"], 1e-5)
        assert not close(got.means[1:], d["from_vae.xyz"], 1e-2)
    x = x0.clone().requires_grad_()
    gradients = []
    for base.image_size in (16, 256):
        gradients.append(torch.autograd.grad(base.decode(x).colors.square().sum(), x)[0])
    assert close(gradients[0], gradients[1], 1e-5) and gradients[0].abs().max() > 0


def test_decoding_keeps_little_for_its_gradient(name, folder):
    """A view at a time, computed again: what is kept is the latents and what the splats need. Measured 4.7 and 0.03 MB."""
    base, kept = load(name, folder), []
    x = torch.randn(2, *base.latent_shape, generator=seeded(0)).requires_grad_()
    weights = {weight.untyped_storage().data_ptr() for weight in base.vae.parameters()}
    for base.image_size in (16, 256):
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gaussians = base.decode(x)                          # alive while it is counted, so are all storages
        kept.append(sum(size for place, size in sizes.items() if place not in weights))
        assert gaussians.means.requires_grad
    assert kept[1] < 0.1 * kept[0], kept


def test_a_trajectory_is_the_recorded_one(monkeypatch):
    """20 steps of the official pipeline with its noises, guidance 5, through predict and rollout: measured 2e-6."""
    d, config = data("trajectory")
    net = published.build({"_class_name": "PixArtTransformerMV2DModel", "use_additional_conditions": False, **config})
    net.load_state_dict(weights(d))
    _, vae_config = data("gsvae")
    vae = published.build(vae_config | {"_class_name": "AutoencoderKL", "in_channels": 12, "out_channels": 12})
    base = common.diffsplat(net, vae, None, image_size=8, prediction_type="epsilon", guidance=5.0, latent_mean=torch.tensor(0.0),
                          latent_std=torch.tensor(1.0), betas={}, scale_range=(0.0005, 0.02), depth_scale=1.0,
                          half_image_shift=True, eval_size=16, lora_targets=[], device="cpu")
    assert base.latent_shape == (4, 4, 4, 4)
    base.plucker = torch.nn.functional.interpolate(d["plucker"][0], (4, 4), mode="bilinear")
    noises = iter([d["init_noise"], *d["step_noise_used"]])
    monkeypatch.setattr(torch, "randn", lambda *shape, generator, dtype: next(noises))
    cond = Cond(d["prompt_embeds"], d["prompt_mask"].bool())
    null = Cond(d["negative_prompt_embeds"], d["negative_mask"].bool())
    got = common.rollout(base, NoiseSchedule.from_diffusers("dpm", 20), cond, null, 5.0, [seeded(0)])
    want = d["latents"].unflatten(2, (4, 4))
    eps = got.eps
    for step in range(20):
        assert close(got.x[:, step + 1], want[:, step + 1], 1e-5), step
        assert close(eps[:, step], d["unet_outputs"].unflatten(2, (4, 8))[:, step, :, :4], 1e-5), step
    assert not close(got.x[:, -1].roll(1, 1), want[:, -1], 1e-2)


def test_rays_have_the_published_half_image_shift(name, folder):
    base, want = load(name, folder), r2d3.plucker_rays(*r2d3.input_cameras(1), 16, 16, half_image_shift=True)
    small = torch.nn.functional.interpolate(want[0], (8, 8), mode="bilinear")
    assert torch.equal(base.plucker, small)


# ---- folders -----------------------------------------------------------------------------------------------


def test_merged_and_unindexed_weights(name, folder, tmp_path):
    want = load(name, folder).net.state_dict()
    for kind in ("merged", "merged, shards left", "no index"):
        copy = shutil.copytree(folder, tmp_path / kind)
        part = copy / BASES[name]
        if "merged" in kind:
            shards = sorted(part.glob("*-of-*.safetensors"))
            save_file({k: v for shard in shards for k, v in load_file(shard).items()}, part / "diffusion_pytorch_model.safetensors")
            for shard in shards:                                # and the index stays, as it does when they are merged
                shard.write_bytes(b"no longer needed") if "left" in kind else shard.unlink()
        else:
            (part / "diffusion_pytorch_model.safetensors.index.json").unlink()
        got = load(name, copy).net.state_dict()
        assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)


def test_which_checkpoint(tmp_path):
    """The highest number, numbers compared; another name of the same kind if it is the only one."""
    part = "model.safetensors"
    find = partial(published.newest, tmp_path, "gsvae_gobj265k_sd", "gsvae_*", part)

    def add(name, number):
        path = tmp_path / name / "checkpoints" / number / part
        path.parent.mkdir(parents=True)
        path.touch()
        return path

    with pytest.raises(r2d3.UserError, match="gsvae_gobj265k_sd/checkpoints/NNNNNN"):
        find()
    mine = add("gsvae_mine", "000010")
    assert find() == mine
    add("gsvae_other", "000010")
    with pytest.raises(r2d3.UserError, match="gsvae_gobj265k_sd/checkpoints/NNNNNN"):
        find()                                                  # which of the two?
    add("gsvae_gobj265k_sd", "9")
    add("gsvae_gobj265k_sd", "old")
    newest = add("gsvae_gobj265k_sd", "000100")
    assert find() == newest


def spoil(folder, name, what):
    part = folder / BASES[name]
    shard, other = sorted(part.glob("*-of-*.safetensors"))
    if what == "nothing there":
        shutil.rmtree(part)
    elif what in ("a shard", "a shard, no index"):
        shard.unlink()
        if "no index" in what:
            (part / "diffusion_pytorch_model.safetensors.index.json").unlink()
    elif what == "all shards":
        shard.unlink()
        other.unlink()
    elif what == "the config":
        (part / "config.json").unlink()
    elif what == "truncated config":
        (part / "config.json").write_text('{"_class_name": "PixArt')
    elif what == "a list":
        (part / "config.json").write_text("[]")
    elif what in ("another network", "no network"):
        config = {"_class_name": "AutoencoderKL"} if what == "another network" else {}
        (part / "config.json").write_text(json.dumps(config))
    elif what == "an impossible size":
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        (part / "config.json").write_text(json.dumps(config | {"attention_head_dim": "sixteen", "num_attention_heads": "two"}))
    elif what == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif what == "VAE":
        for file in folder.glob("gsvae_*/checkpoints/*/model.safetensors"):
            file.unlink()
    elif what == "truncated VAE":
        file = folder / VAES[name] / "039030/model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "VAE without its prefix":
        file = folder / VAES[name] / "039030/model.safetensors"
        save_file({key.removeprefix("vae."): value for key, value in load_file(file).items()}, file)
    elif what == "VAE's config":
        (folder / "vae/config.json").write_text("{")
    elif what == "VAE's scale":
        (folder / "vae/config.json").write_text('{"scaling_factor": "x"}')
    elif what == "only from pictures":
        part.parents[2].rename(folder / part.parents[2].name.replace("__render", "_image__render"))
    elif what == "another base's VAE":
        (folder / VAES[name]).parent.rename(folder / {"diffsplat-pixart": "gsvae_gobj265k_sd",
                                                      "diffsplat-sd15": "gsvae_gobj265k_sdxl_fp16"}[name])
    elif what == "no Pluecker channels":
        for file in (shard, other):
            tensors = {key: value[:, :4].clone() if key in ("conv_in.weight", "pos_embed.proj.weight") else value
                       for key, value in load_file(file).items()}
            save_file(tensors, file)
    else:
        tensors = load_file(other)
        key = next(key for key in tensors if key.endswith("attn1.to_q.weight"))
        value = tensors.pop(key)
        tensors |= {"a key": {key.replace("to_q", "to_x"): value}, "a shape": {key: value[:-1].clone()}}[what]
        save_file(tensors, other)


@pytest.mark.parametrize("what, words", [
    ("nothing there", ["_ema in", "lay it out"]), ("a shard", ["lacks the shard 1 of 2"]), ("a shard, no index", ["lacks the shard 1 of 2"]),
    ("all shards", ["diffusion_pytorch_model.safetensors"]), ("the config", ["config.json is missing"]),
    ("truncated config", ["config.json cannot be read", "complete"]), ("a list", ["config.json cannot be read"]),
    ("another network", ["that of a AutoencoderKL", "2D"]), ("no network", ["that of a None"]),
    ("an impossible size", ["config.json", "can be made"]), ("truncated", ["-of-00002.safetensors cannot be read", "complete"]),
    ("VAE", ["gsvae", "lay it out"]), ("truncated VAE", ["039030/model.safetensors cannot be read"]),
    ("VAE without its prefix", ["039030/model.safetensors do not fit AutoencoderKL", "encoder"]),
    ("VAE's config", ["vae/config.json cannot be read"]), ("VAE's scale", ["scaling_factor is 'x', not a number"]),
    ("only from pictures", ["_ema in", "lay it out"]), ("another base's VAE", ["gsvae", "lay it out"]),
    ("no Pluecker channels", ["takes 4 channels", "6 of Pluecker rays"]), ("a key", ["to_q", "_ema do not fit"]), ("a shape", ["to_q", "_ema do not fit"])])
def test_damaged_folders(name, folder, tmp_path, capsys, monkeypatch, what, words):
    copy = shutil.copytree(folder, tmp_path / "copy")
    spoil(copy, name, what)
    monkeypatch.setattr(sys, "argv", ["r2d3.py", "--base", name, "--weights", str(copy), "--out", str(tmp_path / "out")])
    assert r2d3.main() == 2
    error = capsys.readouterr().err.strip()
    assert all(word in error for word in words) and "\n" not in error and "Traceback" not in error, error
    assert not (tmp_path / "out").exists()


def test_a_damaged_text_encoder(name, folder, tmp_path):
    """A weight that is missing would be random; a file that is cut is not blamed on the network."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "text_encoder/model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    key = next(key for key in tensors if key.endswith(("q.weight", "q_proj.weight")))
    save_file({("wrong" if name == key else name): value for name, value in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(r2d3.UserError, match=f"lacks .*{key.split('.')[-2]}"):
        load(name, copy).encode(["a red lamp"])
    file.write_bytes(whole[:-50])
    with pytest.raises(r2d3.UserError, match="is it complete") as error:
        load(name, copy).encode(["a red lamp"])
    assert "network is needed" not in str(error.value)
    file.write_bytes(whole)
    load(name, copy).encode(["a red lamp"])


def test_a_folder_is_found_from_anywhere(name, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "random").mkdir(exist_ok=True)
    weights = {given: r2d3.resolve(Config(base=name, weights=given)).weights for given in (folder.name, "random")}
    assert weights == {folder.name: str(folder.resolve()), "random": "random"}      # the latter is a word, not a folder


def test_without_network_and_without_weights(monkeypatch, capsys, tmp_path):
    """What is missing, how much it is, what runs now: two lines."""
    import huggingface_hub

    def offline(*args, **more):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for name, size in (("diffsplat-pixart", "22 GB"), ("diffsplat-sd15", "6 GB")):
        monkeypatch.setattr(sys, "argv", ["r2d3.py", "--reward", "aesthetic", "--base", name, "--out", str(tmp_path / name)])
        assert r2d3.main() == 2
        first, second = capsys.readouterr().err.strip().splitlines()
        assert name in first and size in first and "--base" in second and "now" in second
    cached = tmp_path / "snapshot"                              # offline, the hub's client returns what it has: the other base
    (cached / BASES["diffsplat-sd15"]).mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **more: str(cached))
    monkeypatch.setattr(sys, "argv", ["r2d3.py", "--base", "diffsplat-pixart", "--out", str(tmp_path / "out")])
    assert r2d3.main() == 2
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "could not be fetched" in first and "22 GB" in first and "--base" in second


def test_only_what_is_needed_is_downloaded(monkeypatch, name, folder):
    """One denoiser and one VAE out of a repo that has many; the patterns are tried on the files it is known to have."""
    from fnmatch import fnmatch

    import huggingface_hub
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, allow_patterns: asked.append(
        (repo, allow_patterns)) or str(folder))
    config = r2d3.resolve(Config(base=name, device="cpu"))
    r2d3.load_base(config, "cpu")
    (repo, patterns), = asked
    assert repo == "chenguolin/DiffSplat"
    files = [f"{place}/checkpoints/0{n}/{file}" for n, place in enumerate((
        "gsrecon_gobj265k_cnp_even4", "gsvae_gobj265k_sd", "gsvae_gobj265k_sdxl_fp16", "gsvae_gobj265k_sd3",
        "gsdiff_gobj83k_sd15__render", "gsdiff_gobj83k_sd15_image__render", "gsdiff_gobj83k_pas_fp16__render",
        "gsdiff_gobj83k_pas_fp16_image__render", "gsdiff_gobj83k_sd15__render__depth"))
        for file in ("model.safetensors", "transformer_ema/config.json", "unet_ema/config.json")]
    taken = {file.split("/")[0] for file in files if any(fnmatch(file, pattern) for pattern in patterns)}
    kind = "pas_fp16" if name == "diffsplat-pixart" else "sd15"
    assert taken == {f"gsdiff_gobj83k_{kind}__render", f"gsvae_gobj265k_{'sdxl_fp16' if kind == 'pas_fp16' else 'sd'}"}


# ---- text --------------------------------------------------------------------------------------------------


def test_prompts_are_encoded_once(name, folder, monkeypatch):
    """By the encoder's own output, padded to the published length; afterwards from memory, and in a new process from disk."""
    import transformers
    cls = transformers.T5EncoderModel if name == "diffsplat-pixart" else transformers.CLIPTextModel
    loaded, real = [], cls.from_pretrained

    def from_pretrained(*args, **more):
        model = real(*args, **more)
        loaded.append(weakref.ref(model[0] if isinstance(model, tuple) else model))
        return model

    monkeypatch.setattr(cls, "from_pretrained", from_pretrained)
    base = load(name, folder)
    assert not loaded                                           # only when text is encoded
    prompts = ["a red lamp", "a blue cube with two arms", "", "a red lamp"]
    embeds, mask, _ = base.encode(prompts)
    assert len(loaded) == 1 and torch.equal(embeds[0], embeds[3]) and not torch.equal(embeds[0], embeds[1])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = real(folder / "text_encoder").eval()
    length = 300 if name == "diffsplat-pixart" else 77
    assert embeds.shape == (4, length, 24)
    for prompt, row, valid in zip(prompts, embeds, [None] * 4 if mask is None else mask):
        tokens = tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        with torch.no_grad():
            if name == "diffsplat-pixart":
                words = len(prompt.split()) + 1
                want = model(tokens.input_ids, attention_mask=tokens.attention_mask)[0][0, :words]
                assert valid.sum() == words and valid[:words].all() and close(row[:words], want, 1e-5)
            else:
                assert valid is None and close(row, model(tokens.input_ids)[0][0], 1e-5)
    base.encode(prompts[:2])
    again = load(name, folder)
    assert torch.equal(again.encode(prompts).embeds, embeds) and len(loaded) == 1
    files = list(Path(published.TextEncoder(name, folder, "cpu").cache).rglob("*"))
    damaged = next(path for path in files if path.suffix == ".safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-7])              # a damaged file is made again, alone: not the same batch
    assert close(load(name, folder).encode(prompts).embeds, embeds, 1e-6) and len(loaded) == 2
    assert not [path for path in files if "part" in path.name]
    again.encode(["a red cube"])
    assert len(loaded) == 3                                     # a new prompt
    row, = again.encode(["  A Red lamp "]).embeds               # PixArt's pipeline strips and lowers, that of SD1.5 does not
    assert close(row, embeds[0], 1e-5) == (name == "diffsplat-pixart")
    assert len(loaded) == 4 and not any(model() for model in loaded)    # and every time the encoder is gone afterwards


def test_another_text_encoder_in_the_same_place(name, folder, tmp_path):
    """What is kept belongs to the files that made it."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    old = load(name, copy).encode(["a red lamp"]).embeds
    weights = load_file(copy / "text_encoder/model.safetensors")
    save_file({key: 2 * value for key, value in weights.items()}, copy / "text_encoder/model.safetensors", {"format": "pt"})
    assert not close(load(name, copy).encode(["a red lamp"]).embeds, old, 1e-2)


def test_t5_reads_a_sentencepiece_model(tmp_path, monkeypatch):
    """As published: spiece.model and no tokenizer.json. Pieces, then </s>, at most `length`; padding has no say."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = write_folder(tmp_path, "diffsplat-pixart")
    for file in (folder / "tokenizer").glob("*"):
        file.unlink()
    lines = ["a red lamp with two arms", "a blue cube", "the old chair"] * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer/spiece"), vocab_size=60, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, hard_vocab_limit=False, minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer/spiece.model"))
    encoder = published.TextEncoder("diffsplat-pixart", folder, "cpu")
    encoder.length = 9
    prompts = ["a red lamp", "", "a blue cube and a red lamp with two arms"]
    ids, mask = encoder.tokenizer()(prompts)
    wanted = [[*pieces.encode(prompt)[:8], 1] for prompt in prompts]
    assert [row[:n].tolist() for row, n in zip(ids, mask.sum(1))] == wanted and wanted[1] == [1] and len(wanted[2]) == 9
    from transformers import T5EncoderModel
    model = T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(encoder, "tokenizer", lambda: lambda prompts: (ids[:len(prompts)] % vocabulary, mask[:len(prompts)]))
    embeds, valid = encoder(prompts)
    for row, words, n in zip(embeds, wanted, valid.sum(1)):
        with torch.no_grad():
            assert n == len(words) and close(row[:n], model(torch.tensor([words]) % vocabulary)[0][0], 1e-5)


# ---- LoRA --------------------------------------------------------------------------------------------------


def test_the_authors_lora_and_ours(tmp_path):
    """pytorch_lora_weights.safetensors with unet. keys makes the recorded prediction; so does our own folder."""
    d = load_file(ROOT / "tests/data/lora.safetensors")
    settings = PIXART | {"attention_head_dim": 8, "cross_attention_dim": 32}

    def net():
        net = published.build(settings | {"_class_name": "PixArtTransformer2DModel"})
        net.load_state_dict(weights(d))
        r2d3.published.join_views(net, 4)
        return net.eval()

    theirs = {name[5:]: value for name, value in d.items() if name.startswith("lora.")}
    (tmp_path / "ours").mkdir()
    save_file({f"unet.{name}": value for name, value in theirs.items()}, tmp_path / "pytorch_lora_weights.safetensors")
    save_file({f"base_model.model.{name}": value for name, value in theirs.items()}, tmp_path / "ours/adapter_model.safetensors")
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors", tmp_path / "ours"):
        with torch.no_grad():
            out = r2d3.inputs.load_lora(net(), path)(
                d["x"], encoder_hidden_states=d["text_embeds"], encoder_attention_mask=d["text_mask"], timestep=d["timestep"],
                return_dict=False, added_cond_kwargs={"resolution": None, "aspect_ratio": None})[0]
        assert close(out, d["out_lora"], 2e-6) and not close(out, d["out_base"], 0.1)
    with pytest.raises(r2d3.UserError, match="no LoRA in"):
        r2d3.inputs.load_lora(net(), tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    save_file({"unet.down.lora_A.weight": torch.ones(8, 4)}, tmp_path / "other/pytorch_lora_weights.safetensors")
    with pytest.raises(r2d3.UserError, match="not a whole LoRA"):
        r2d3.inputs.load_lora(net(), tmp_path / "other")
    for wrong in (torch.ones(4, 8), torch.tensor(1.0)):
        save_file({"unet.down.lora_A.weight": wrong, "unet.down.lora_B.weight": wrong.clone()}, tmp_path / "other/pytorch_lora_weights.safetensors")
        with pytest.raises(r2d3.UserError, match="does not fit this base"):
            r2d3.inputs.load_lora(net(), tmp_path / "other")
    save_file({"unet.down.weight": torch.ones(8, 4)}, tmp_path / "other/pytorch_lora_weights.safetensors")
    with pytest.raises(r2d3.UserError, match="not a whole LoRA"):
        r2d3.inputs.load_lora(net(), tmp_path / "other")
    (tmp_path / "other/adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(r2d3.UserError, match="cannot be read"):
        r2d3.inputs.load_lora(net(), tmp_path / "other")
    with pytest.raises(r2d3.UserError, match="--run is not for train"):
        r2d3.parse(["--run", "anything"])
    with pytest.raises(r2d3.UserError, match="no such file or folder"):     # before the base is looked for
        r2d3.sample(Config(base="diffsplat-pixart", prompts="a lamp", run=str(tmp_path / "nowhere"), device="cpu"))


# ---- random weights, options, and everything at once ----------------------------------------------------------


def test_published_sizes():
    """Parameters of the published networks, counted without making them."""
    for name, count in (("diffsplat-pixart", 610_883_744), ("diffsplat-sd15", 859_538_244)):
        about = published.PUBLISHED[name]
        with torch.device("meta"):
            net, vae = published.build(about["net_config"]), published.build(about["vae_config"] | {"_class_name": "AutoencoderKL"})
        assert sum(weight.numel() for weight in net.parameters()) == count
        assert sum(weight.numel() for weight in vae.parameters()) == 83_674_608


@pytest.fixture
def small(monkeypatch):
    """The published bases and scorers, at tiny sizes."""
    _, unet = data("unet_mv")
    _, vae = data("gsvae")
    vae |= {"in_channels": 12, "out_channels": 12, "sample_size": 16}
    for name, net in (("diffsplat-pixart", PIXART | {"_class_name": "PixArtTransformer2DModel"}),
                      ("diffsplat-sd15", unet | {"_class_name": "UNet2DConditionModel"})):
        monkeypatch.setitem(published.PUBLISHED, name, published.PUBLISHED[name] | {
            "net_config": net, "vae_config": vae, "text_dim": 24})
    from open_clip.model import CLIP

    def clip(*unused, dim=768, **more):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return CLIP(dim, {"image_size": 28, "layers": 1, "width": 32, "head_width": 16, "patch_size": 14},
                        {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}).eval()

    import open_clip
    common.shrink_pictures(monkeypatch)
    monkeypatch.setattr(scorers, "load_clip", clip)
    monkeypatch.setattr(open_clip, "create_model", clip)
    return clip


def test_random_weights_are_the_same_everywhere(name, small):
    """In every process of a run and after a break; and nobody else's random numbers are touched."""
    before = torch.get_rng_state()
    first = r2d3.load_base(r2d3.resolve(Config(base=name, weights="random", device="cpu")), "cpu")
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(1)
    second = r2d3.load_base(r2d3.resolve(Config(base=name, weights="random", device="cpu")), "cpu")
    for part in ("net", "vae"):
        a, b = (getattr(base, part).state_dict() for base in (first, second))
        assert all(torch.equal(a[key], b[key]) for key in a)
    prompts = ["a lamp", "a chair"]
    assert torch.equal(first.encode(prompts).embeds, second.encode(prompts).embeds)
    assert first.encode(prompts).embeds.shape == (2, 300 if name == "diffsplat-pixart" else 77, 24)


@pytest.mark.parametrize("reward", ["aesthetic", "hpsv2", "dnc"])
def test_cost(name, small, reward, tmp_path, monkeypatch, capsys):
    """With random weights nothing is fetched, nor what evaluations measure with."""
    monkeypatch.setattr(r2d3.metrics, "load_features", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["r2d3.py", "cost", "--base", name, "--weights", "random", "--reward", reward, "--steps", "4",
                                      "--view-size", "16", "--device", "cpu"])
    assert r2d3.main() == 0
    printed = capsys.readouterr().out
    result = json.loads(printed[printed.index("{"):])
    assert result["objects"] == result["updates"] == result["judged"] == 1 and result["peak_GB"] > 0.1
    assert {"rollout", "reward gradient", "matching", "backward", "all"} == set(result["seconds"])
    assert all(seconds > 0 for seconds in result["seconds"].values())
    parameters = result["parameters"]
    assert 0 < parameters["LoRA, trained"] < parameters["net"] and parameters["vae"] > 1000
    assert list(tmp_path.iterdir()) == []                       # nothing is saved


def test_gradient_checkpointing_changes_nothing(name, folder):
    gradients = []
    for checkpoint in (False, True):
        base = load(name, folder, checkpoint=checkpoint)
        assert any(getattr(module, "gradient_checkpointing", False) for module in base.net.modules()) == checkpoint
        cond = base.encode(["a red lamp"])
        x = torch.randn(1, *base.latent_shape, generator=seeded(0)).requires_grad_()
        out = base.predict(x, torch.tensor([500]), cond)
        assert out.dtype == torch.float32
        gradients.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert close(gradients[0], gradients[1], 1e-5)


def test_half_precision_weights_predict_in_single(name, folder):
    base = load(name, folder)
    x, t, cond = torch.randn(1, *base.latent_shape, generator=seeded(0)), torch.tensor([500]), base.encode(["a red lamp"])
    want = base.predict(x, t, cond)
    base.net = r2d3.add_lora(base.net.to(torch.bfloat16), base.lora_targets, 4, 0)
    got = base.predict(x, t, cond)
    assert got.dtype == torch.float32 and close(got, want, 0.05)     # measured 0.008 and 0.013
    assert {weight.dtype for weight in base.net.parameters() if weight.requires_grad} == {torch.float32}


def test_evaluate_encodes_all_prompts_at_once(name, folder, small, tmp_path, monkeypatch):
    """Else a text encoder of gigabytes would be loaded for every batch."""
    encode, calls = published.TextEncoder.encode, []
    monkeypatch.setattr(published.TextEncoder, "encode", lambda self, prompts: calls.append(prompts) or encode(self, prompts))
    (tmp_path / "test.txt").write_text("a red cube\na blue lamp with two arms")
    r2d3.evaluate(Config(base=name, weights=str(folder), reward="dnc", test_prompts=str(tmp_path / "test.txt"), steps=2,
                         samples_per_prompt=2, eval_batch=1, device="cpu", out=str(tmp_path / "out")))
    assert calls == [["a red cube", "a blue lamp with two arms", ""]]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_the_whole_job(name, folder, small, number, pipeline, tmp_path, monkeypatch, capsys):
    """Rollout, reward, loss, update, checkpoint, evaluation, resume and samples, from a folder in the published layout."""
    reward = {"diffsplat-pixart": ("hpsv2", "normal"), "diffsplat-sd15": ("aesthetic", "dnc")}[name][number]
    normals = scorers.MarigoldNormals(pipeline).requires_grad_(False)
    monkeypatch.setattr(scorers.MarigoldNormals, "pretrained", lambda **how: normals)
    untrained = {"LaionAesthetic": scorers.LaionAesthetic.pretrained, "HPSv2": scorers.HPSv2.pretrained}
    monkeypatch.setattr(scorers.LaionAesthetic, "pretrained", lambda **how: untrained["LaionAesthetic"](**how | {"untrained": True}))
    monkeypatch.setattr(scorers.HPSv2, "pretrained", lambda **how: untrained["HPSv2"](**how | {"untrained": True}))
    (tmp_path / "train.txt").write_text("a red lamp\na blue cube\na lamp with two arms\na blue lamp")
    (tmp_path / "test.txt").write_text("a red cube\na blue lamp with two arms")
    out = tmp_path / "run"

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["r2d3.py", *map(str, arguments)])
        code = r2d3.main()
        assert code == 0, capsys.readouterr().err

    common = ["--base", name, "--weights", folder, "--reward", reward, "--out", out, "--prompts", tmp_path / "train.txt",
              "--test-prompts", tmp_path / "test.txt", "--batch-size", 2, "--steps", 4, "--view-size", 28,
              "--samples-per-prompt", 2, "--views", 2, "--device", "cpu"]
    run(*common, "--epochs", 1)
    run(*common, "--epochs", 2, "--resume")
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert "CLIP" in summary["features"] and (out / "report.html").is_file() and summary["updates"] == 4
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))["config"]
    assert config["guidance"] == 7.5 and config["matching"] == "score" and config["lr"] == 1e-4
    assert (config["beta"], config["reg_weight"]) == {"aesthetic": (2e6, 3e3), "hpsv2": (1e7, 5e3)}.get(reward, (1e6, 1e4))
    assert config["min_quantile"] == (0.2 if reward in ("normal", "dnc") else 0.0)
    state = torch.load(out / "checkpoint/state.pt", weights_only=True)
    assert max(value.abs().max() for key, value in state["lora"].items() if "lora_B" in key) > 0
    run("evaluate", "--run", out, "--samples-per-prompt", 1)
    assert (out / "evaluation/summary.json").is_file()
    run("sample", "--run", out, "--prompts", "a red lamp", "--samples-per-prompt", 1)
    run("sample", "--base", name, "--weights", folder, "--run", out / "lora", "--prompts", "a red lamp", "--samples-per-prompt", 1,
        "--steps", 4, "--out", tmp_path / "lora", "--device", "cpu")
    one, other = (path / "a-red-lamp-seed0-0.ply" for path in (out / "samples", tmp_path / "lora"))
    assert one.read_bytes() == other.read_bytes() and one.with_suffix(".png").is_file() and one.with_suffix(".gif").is_file()
