"""The published DiffSplat checkpoints: where they are, how they are read, and their text encoders.

r2d3.py uses this in `load_base`. Whatever is missing or damaged is a UserError.
Names, sizes and quirks: github.com/chenguolin/DiffSplat and the Hugging Face repo of the same name.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from support import UserError, cache_folder, clear_parts, fetching, load_weights, say, write_atomic

REPO = "chenguolin/DiffSplat"
# These are in the same repository, but belong to bases/diffsplat_sd35.py.
SD35_FOLDERS = {"gsdiff_gobj83k_sd35m__render", "gsvae_gobj265k_sd3"}
VAE = {"in_channels": 12, "out_channels": 12, "latent_channels": 4, "layers_per_block": 2, "sample_size": 256,
       "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
       "up_block_types": ["UpDecoderBlock2D"] * 4}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]    # the paper's LoRA: all attention layers and the output layer
PUBLISHED = {
    "diffsplat-pixart": {
        "net": "gsdiff_gobj83k_pas_fp16__render", "part": "transformer_ema", "vae": "gsvae_gobj265k_sdxl_fp16",
        "text": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", "length": 300, "text_dim": 4096, "download": "22 GB",
        "betas": {}, "vae_config": VAE | {"scaling_factor": 0.13025}, "lora_targets": [*ATTENTION, "proj_out"],
        "net_config": {"_class_name": "PixArtTransformer2DModel", "sample_size": 32, "in_channels": 10, "out_channels": 8,
                       "num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "patch_size": 2,
                       "cross_attention_dim": 1152, "caption_channels": 4096, "norm_type": "ada_norm_single",
                       "norm_elementwise_affine": False, "norm_eps": 1e-6, "use_additional_conditions": False}},
    "diffsplat-sd15": {
        "net": "gsdiff_gobj83k_sd15__render", "part": "unet_ema", "vae": "gsvae_gobj265k_sd",
        "text": "openai/clip-vit-large-patch14", "length": 77, "text_dim": 768, "download": "6 GB",
        "betas": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        "vae_config": VAE | {"scaling_factor": 0.18215}, "lora_targets": [*ATTENTION, "conv_out"],
        "net_config": {"_class_name": "UNet2DConditionModel", "sample_size": 32, "in_channels": 10, "out_channels": 4,
                       "cross_attention_dim": 768, "attention_head_dim": 8}},
}


def register(base: str, about: dict) -> None:
    """Add what is known of a plug-in's base, so that its networks or its text encoder are read by what is here.

    `about` has the entries of PUBLISHED; an "encoder", if there is one, takes the place of TextEncoder.
    """
    PUBLISHED[base] = about


def download(base: str) -> Path:
    """The folder in the Hugging Face cache with the two checkpoints of `base`; only they are fetched, with progress bars."""
    from huggingface_hub import snapshot_download
    about = PUBLISHED[base]
    net, vae = f"{about['net']}/checkpoints/*/{about['part']}", f"{about['vae']}/checkpoints/*/model.safetensors"
    try:
        root = Path(snapshot_download(REPO, allow_patterns=[f"{net}/*", vae]))
        if not (any(root.glob(f"{net}/*.safetensors")) and any(root.glob(vae))):    # offline, what is cached is another base
            raise FileNotFoundError
        return root
    except Exception as error:
        raise UserError(f"the weights of {base} are not here and could not be fetched ({type(error).__name__}): about "
                        f"{about['download']}, once, or --weights DIR\n      leave out --base to run now, with the embedded "
                        "base") from None


def load(base: str, weights: str | None, device: torch.device | str, precision: str = "bf16") -> dict:
    """What r2d3.DiffSplat is made from; bf16 on a GPU.

    `weights` is a folder laid out like the published repo, "random" for networks before any training, or None to fetch
    what is needed. On a GPU both networks are bf16, with `precision` "float32" the denoiser is not. The text encoder is
    loaded when prompts are first encoded, and is gone afterwards.
    """
    about = PUBLISHED[base]
    if weights == "random":
        encode = random_text(base, device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)                                # the same in every process and after a break
            net, vae = build_both(base)
    else:
        net, vae = load_networks(base, Path(weights) if weights else download(base))
        encode = about.get("encoder", TextEncoder)(base, Path(weights) if weights else None, device)
    half = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    nn.Module.to(net, half if precision == "bf16" else torch.float32)     # diffusers' own .to warns of nothing
    nn.Module.to(vae, half)
    settings = {"image_size": min(256, vae.config.sample_size), "prediction_type": about.get("prediction_type", "epsilon"),
                "guidance": about.get("guidance", 7.5), "betas": about["betas"],
                "latent_mean": torch.tensor(getattr(vae.config, "shift_factor", None) or 0.0),
                "latent_std": torch.tensor(1 / vae.config.scaling_factor), "scale_range": (0.0005, 0.02),
                "depth_scale": 1.0, "half_image_shift": True, "eval_size": 512, "lora_targets": about["lora_targets"]}
    return {"net": net, "vae": vae, "text": encode, "settings": settings}


def load_networks(base: str, root: Path) -> tuple[nn.Module, nn.Module]:
    """Denoiser and VAE from a folder laid out like the published repo."""
    about = PUBLISHED[base]
    folder = newest(root, about["net"], "gsdiff_*", about["part"])
    config, wanted = read_config(folder / "config.json"), about["net_config"]["_class_name"]
    if str(config.get("_class_name")).replace("MV2D", "2D") != wanted:
        raise UserError(f"{folder}/config.json is that of a {config.get('_class_name')}; {base} is a {wanted}")
    net = read_network(config, tensors(folder), folder)
    file = newest(root, about["vae"], "gsvae_*", "model.safetensors")
    weights = {name.removeprefix("vae."): value for name, value in load_weights(file)[0].items() if name.startswith("vae.")}
    own = root / "vae/config.json"
    config = about["vae_config"] | (read_config(own) if own.is_file() else {})
    if not isinstance(config["scaling_factor"], (int, float)):
        raise UserError(f"{own}: scaling_factor is {config['scaling_factor']!r}, not a number")
    # 12 channels, whatever the config says: it is that of the image VAE it was made from
    vae = read_network(config | {"_class_name": "AutoencoderKL", "in_channels": 12, "out_channels": 12}, weights, file)
    if net.config.in_channels != vae.config.latent_channels + 6:
        raise UserError(f"{folder} takes {net.config.in_channels} channels; {base} takes {vae.config.latent_channels} of the "
                        "latent and 6 of Pluecker rays")
    return net, vae


def newest(root: Path, name: str, pattern: str, part: str) -> Path:
    """root/NAME/checkpoints/NNNNNN/part with the highest number; NAME as published, or the only one that fits the pattern.

    What is published under another name (another base, or one that starts from a picture) does not fit.
    """
    others = {about.get(key) for about in PUBLISHED.values() for key in ("net", "vae")} | SD35_FOLDERS
    others -= {name}
    for folders in (name, pattern):
        found = [path for path in root.glob(f"{folders}/checkpoints/*/{part}")
                 if path.parent.name.isdigit() and path.parents[2].name not in others and "_image_" not in path.parents[2].name]
        if len({path.parents[2] for path in found}) == 1:
            return max(found, key=lambda path: int(path.parent.name))
    raise UserError(f"there is no {name}/checkpoints/NNNNNN/{part} in {root}; lay it out like {REPO} on the "
                     "Hugging Face hub")


def read_config(path: Path) -> dict:
    try:
        return dict(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read, is the file complete? ({error})") from None


def tensors(folder: Path) -> dict[str, Tensor]:
    """A network's weights, in one file or in shards (their names say how many there are; an index is not needed)."""
    whole = folder / "diffusion_pytorch_model.safetensors"
    if whole.is_file():                                         # shards may lie beside what they were merged into
        return load_weights(whole)[0]
    shards = {int(match[1]): path for path in folder.glob("*.safetensors")
              if (match := re.search(r"-(\d+)-of-\d+\.safetensors$", path.name))}
    if not shards:
        raise UserError(f"there is no {whole.name}, whole or in shards, in {folder}")
    count = int(re.search(r"(\d+)\.safetensors$", next(iter(shards.values())).name)[1])
    if missing := set(range(1, count + 1)) - set(shards):
        raise UserError(f"{folder} lacks the shard {min(missing)} of {count}")
    return {name: value for path in shards.values() for name, value in load_weights(path)[0].items()}


def build(config: dict) -> nn.Module:
    """A stock diffusers network; the authors' class and block names with MV2D are stock's with 2D."""
    import diffusers
    config = json.loads(json.dumps(config).replace("MV2D", "2D"))
    cls = getattr(diffusers, config["_class_name"])
    return cls(**{name: value for name, value in config.items() if name in inspect.signature(cls.__init__).parameters})


def build_both(base: str) -> tuple[nn.Module, nn.Module]:
    """Denoiser and VAE of the published sizes, untrained."""
    about = PUBLISHED[base]
    return build(about["net_config"]), build(about["vae_config"] | {"_class_name": "AutoencoderKL"})


def count(base: str, add_lora: Callable[[nn.Module, list[str]], nn.Module]) -> dict | None:
    """Parameters of a base that is too large to be run on a CPU (above 1e9), counted without memory; None of others."""
    if "net_config" not in PUBLISHED.get(base, {}):
        return None
    with torch.device("meta"):
        net, vae = build_both(base)
        if net.num_parameters() < 1e9:
            return None
        parts = {"net": net.num_parameters(), "vae": vae.num_parameters()}
        lora = add_lora(net, PUBLISHED[base]["lora_targets"])
    trained = sum(weight.numel() for name, weight in lora.named_parameters() if "lora_" in name)
    return {"device": "CPU: counted only, nothing was run; this base needs a GPU", "parameters": parts | {"LoRA, trained": trained}}


class MultiViewAttnProcessor:
    """Self-attention over all views of an object: (b v) n d -> b (v n) d. The rest stays per view, and stock."""

    def __init__(self, views: int):
        self.views = views

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: None = None,
                 attention_mask: None = None, **unused) -> Tensor:
        rows, tokens, width = hidden_states.shape
        joined = hidden_states.reshape(rows // self.views, self.views * tokens, width)
        q, k, v = (layer(joined).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                   for layer in (attn.to_q, attn.to_k, attn.to_v))                  # (b, heads, v n, d)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out)).reshape(rows, tokens, -1)


def join_views(net: nn.Module, views: int) -> None:
    """Make every self-attention (`attn1`) of a stock diffusers network multi-view, as DiffSplat does."""
    net.set_attn_processor({name: MultiViewAttnProcessor(views) if ".attn1." in name else processor
                            for name, processor in net.attn_processors.items()})


def read_network(config: dict, weights: dict[str, Tensor], where: Path) -> nn.Module:
    for name in ("conv_in.weight", "pos_embed.proj.weight"):    # the Pluecker rays' channels may not be in the config
        if name in weights:
            config = config | {"in_channels": weights[name].shape[1]}
    try:        # all of SD3's tables are in its file, and they are large: made empty, it takes the file's tensors as they are
        with torch.device("meta" if config.get("pos_embed_max_size") else "cpu"):
            net = build(config)
    except Exception as error:
        raise UserError(f"{where}: no {config['_class_name']} can be made from its config.json ({error})") from None
    try:
        net.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    except RuntimeError as error:
        what = " ".join(str(error).split("\n")[1].split())[:200]
        raise UserError(f"the weights {where} do not fit {config['_class_name']}: {what}") from None
    return net


class TextEncoder:
    """Prompts -> (embeds (B, L, D), mask (B, L) or None) by T5 (300 tokens) or CLIP (77, all of which count).

    Every prompt is encoded once and kept on disk by model, dtype, length and prompt; files are replaced in one go, so that
    several processes may share the folder. The encoder is loaded when a prompt is new, and freed at once.
    """

    folders = "text_encoder", "tokenizer"
    dims = {"embeds": 2}                                        # what is kept of a prompt, and of how many dimensions

    def __init__(self, base: str, root: Path | None, device: torch.device | str):
        about = PUBLISHED[base]
        self.clip, self.length, self.device = "clip" in about["text"], about["length"], device
        self.whole = self.clip                                  # padding counts as text
        self.what = f"the text encoder of {base} ({about['text']})", f"about {about['download']} with the weights"
        self.repo, self.root = about["text"], root
        self.source = self.repo, [(str(path), path.stat().st_size, path.stat().st_mtime_ns)     # other files, other key
                                  for part in self.folders if root
                                  for path in sorted((root.resolve() / part).glob("*"))]
        half = torch.device(device).type == "cuda" and "text_precision" not in about
        self.dtype = torch.bfloat16 if half else torch.float32
        self.cache, self.unwritten = cache_folder("text"), {}   # unwritten: prompt -> what could not be put there

    def path(self, prompt: str) -> Path:
        key = hashlib.sha256(repr((self.source, str(self.dtype), self.length, prompt)).encode()).hexdigest()
        return self.cache / key[:2] / f"{key}.safetensors"

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor | None]:
        self.prepare(prompts)
        rows = [self.read(prompt)["embeds"] for prompt in prompts]
        embeds = torch.stack([nn.functional.pad(row, (0, 0, 0, self.length - len(row))) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = None if self.whole else (torch.arange(self.length) < lengths[:, None]).to(self.device)
        return embeds.to(self.device), mask

    def prepare(self, prompts: list[str]) -> None:
        """Encode what is not on disk yet; nothing is kept in memory, prompt lists may be long."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if self.read(prompt) is None]:
            folders = [Path(self.place(part)["pretrained_model_name_or_path"]) for part in self.folders]
            with fetching(*self.what, local=folders[0] if all(folder.is_dir() for folder in folders) else None):
                self.encode(new)

    def read(self, prompt: str) -> dict[str, Tensor] | None:
        """embeds (L, D) of the valid tokens, of SD3's CLIP pooled (P,) too; None if there is no such file, or it is damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        if prompt in self.unwritten:
            return self.unwritten[prompt]
        try:
            found = load_file(self.path(prompt))
        except (OSError, SafetensorError):
            return None
        dims = {name: value.dim() for name, value in found.items() if value.is_floating_point() and value.isfinite().all()}
        return found if dims == self.dims else None

    def too_long(self, prompts: list[str]) -> int:
        """How many of the prompts have more tokens than are read."""
        long = [prompt for prompt in dict.fromkeys(prompts) if len(prompt.encode("utf-8")) > self.length - 2]
        try:
            tokenizer, count = self.tokenizer(self.length + 1) if long else None, 0
        except Exception:                                       # all is encoded, and the tokenizer is not here any more
            return 0
        for n in range(0, len(long), 1000):
            count += int((tokenizer(long[n:n + 1000])[1].sum(1) > self.length).sum())
        return count

    def place(self, part: str) -> dict:
        """Where from_pretrained finds one of `folders`: in our own folder if there, else on the hub."""
        if self.root and (self.root / part).is_dir():
            return {"pretrained_model_name_or_path": str(self.root / part)}
        return {"pretrained_model_name_or_path": self.repo} | ({} if self.repo.startswith("openai/") else {"subfolder": part})

    def tokenizer(self, length: int | None = None) -> Callable[[list[str]], tuple[Tensor, Tensor]]:
        """Prompts -> token numbers (B, L), mask (B, L); L is at most the `length`, or what the encoder reads.

        T5's is published as a sentencepiece model only. It is used as it is: transformers converts it with a newer
        protobuf than the package hpsv2 allows.
        """
        from huggingface_hub import hf_hub_download
        from transformers import AutoTokenizer
        place, length = self.place(self.folders[1]), length or self.length
        own = Path(place["pretrained_model_name_or_path"])
        if self.whole or (own / "tokenizer.json").is_file():
            stock = AutoTokenizer.from_pretrained(**place)

            def tokens(prompts: list[str]) -> tuple[Tensor, Tensor]:
                found = stock(prompts, padding="max_length" if self.whole else "longest", max_length=length,
                              truncation=True, return_tensors="pt")
                return found.input_ids, found.attention_mask
            return tokens
        from sentencepiece import SentencePieceProcessor
        file = own / "spiece.model" if own.is_dir() else hf_hub_download(self.repo, "tokenizer/spiece.model")
        pieces = SentencePieceProcessor(model_file=str(file))

        def tokens(prompts: list[str]) -> tuple[Tensor, Tensor]:
            rows = [torch.tensor(ids[:length - 1] + [pieces.eos_id()]) for ids in pieces.encode(prompts)]
            pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
            return pad(rows, padding_value=pieces.pad_id()), pad([torch.ones_like(row) for row in rows])
        return tokens

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> None:
        """Fill the cache on disk; what cannot be written there is kept in memory."""
        from safetensors.torch import save
        from tqdm import tqdm
        clear_parts(self.cache)
        tokenizer, place = self.tokenizer(), self.place(self.folders[0])
        model, found = self.model_class().from_pretrained(**place, dtype=self.dtype, output_loading_info=True)
        if found["missing_keys"]:                               # else they would be random
            raise UserError(f"the text encoder in {place['pretrained_model_name_or_path']} lacks {min(found['missing_keys'])}; "
                            "copy it again")
        model = model.to(self.device).eval()
        for n in tqdm(range(0, len(prompts), 32), "encoding prompts", leave=False, disable=len(prompts) < 64):
            part = prompts[n:n + 32]
            ids, mask = tokenizer([prompt if self.whole else prompt.lower().strip() for prompt in part])    # as published
            encoded = self.run(model, ids.to(self.device), None if self.whole else mask.to(self.device))
            for row, prompt in enumerate(part):
                own = {name: value[row].cpu() for name, value in encoded.items()}
                if not self.whole:
                    own["embeds"] = own["embeds"][:mask[row].sum()]
                own = {name: value.contiguous() for name, value in own.items()}
                try:
                    write_atomic(self.path(prompt), save(own))
                except UserError as error:
                    if not self.unwritten:
                        say(f"encoded prompts are not kept for other runs: {error}")
                    self.unwritten[prompt] = own
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def model_class(self) -> type[nn.Module]:
        from transformers import CLIPTextModel, T5EncoderModel
        return CLIPTextModel if self.clip else T5EncoderModel

    def run(self, model: nn.Module, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """What is kept of each prompt: the last layer's output."""
        return {"embeds": model(ids, attention_mask=mask)[0]}


def hpsv2_package():
    """The package hpsv2, of which we use a table of file names and the benchmark's prompt lists. ImportError: not installed.

    Only here is it imported, and only when it is asked for: it pins old versions of pytest and protobuf, so that some will
    want to do without it.
    """
    import hpsv2.utils
    return hpsv2


def benchmark_prompts(style: str) -> list[str]:
    """A style of the HPDv2 benchmark, from its package, which fetches the lists."""
    if style not in ("photo", "anime", "concept-art", "paintings"):
        raise UserError(f"--prompts hpdv2:{style}: the styles are photo, anime, concept-art and paintings")
    with fetching("the HPDv2 benchmark prompts", "1 MB"):
        hpsv2 = hpsv2_package()
        return [" ".join(prompt.split()) for prompt in hpsv2.benchmark_prompts(style)]


def random_text(base: str, device: torch.device | str) -> Callable[[list[str]], tuple[Tensor | None, ...]]:
    """Stands for the text encoder where weights are random: unit Gaussians that depend on the prompt."""
    about = PUBLISHED[base]

    def row(prompt: str, *shape: int) -> Tensor:
        seed = int(hashlib.sha256(prompt.encode()).hexdigest()[:12], 16)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def encode(prompts: list[str]) -> tuple[Tensor | None, ...]:
        embeds = torch.stack([row(prompt, about["length"], about["text_dim"]) for prompt in prompts]).to(device)
        if "pooled_dim" in about:
            return embeds, None, torch.stack([row(prompt, about["pooled_dim"]) for prompt in prompts]).to(device)
        mask = (torch.arange(about["length"], device=device) < 20).repeat(len(prompts), 1)
        return embeds, None if "clip" in about["text"] else mask

    encode.prepare = lambda prompts: None                       # there is nothing to keep
    return encode
