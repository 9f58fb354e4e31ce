"""What a person hands in: prompts, rewards and bases of their own, LoRAs. How it is found, read and checked.

Whatever a person can mend is a UserError.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn

from support import PromptError, UserError, brief, load_weights, published, say_too_long


MAX_PROMPT = 10_000     # characters: text encoders take 77 to 300 tokens, so a longer line is a mistake


def load_prompts(spec: str) -> list[str]:
    """The prompts of a text file with one a line, the prompt itself, or hpdv2:photo, a style of that benchmark."""
    if not spec.strip():
        raise UserError("the prompt is empty; write what to make, for example --prompts \"a red cube\"")
    if spec.startswith("hpdv2:"):
        return published.benchmark_prompts(spec.removeprefix("hpdv2:"))
    if os.path.isfile(spec):
        try:
            lines = Path(spec).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"the prompt file {spec} is not UTF-8 text; write one prompt a line") from None
        except OSError as error:
            raise UserError(f"the prompt file {spec} cannot be read ({error.strerror})") from None
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_PROMPT:
                raise UserError(f"{spec}, line {number}: a prompt of {len(line)} characters ({brief(line, 60)}); "
                                f"write one prompt a line, of at most {MAX_PROMPT}")
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"the prompt file {spec} is empty; write one prompt a line")
        return prompts
    one_word = len(spec.split()) == 1                           # "a lamp, black/white, 1.5 m" is a prompt
    if spec.endswith(".txt") or os.path.isdir(spec) or one_word and (Path(spec).suffix or os.sep in spec):
        raise UserError(f"there is no prompt file {brief(spec)}")
    if len(spec) > MAX_PROMPT:
        raise UserError(f"the prompt has {len(spec)} characters ({brief(spec, 60)}); at most {MAX_PROMPT} work")
    return [spec.strip()]


def prepare(base, reward: Callable | None, prompts: list[str], *specs: str) -> None:
    """base.prepare for all prompts of a run and the empty one.

    A prompt that cannot be used is named with its line in `specs`, what load_prompts read them from. One line each
    says how many prompts are too long for base and reward.
    """
    try:
        base.prepare([*prompts, ""])
    except PromptError as error:
        for spec in filter(os.path.isfile, specs):
            for number, line in enumerate(Path(spec).read_text(encoding="utf-8-sig").splitlines(), 1):
                if line.strip() == error.prompt:
                    raise UserError(f"{spec}, line {number}: {error}") from None
        raise
    readers = getattr(reward, "functions", {}) | {"the base's text encoder": getattr(base, "text", None)}
    for title, reader in readers.items():
        if hasattr(reader, "too_long"):
            say_too_long(title, reader.too_long(prompts), len(prompts))


def reward_terms(spec: str) -> list[tuple[str, str]]:
    """The names and weights (as they were written, "" for none) in "aesthetic=1,dnc=0.3" or "my_file.py:fn=2,dnc".

    Files may have "=" and "," in their paths: what names a file that is there is one name. UserError: a weight is no
    number.
    """
    pieces, terms = spec.split(","), []
    while pieces:
        for count in range(len(pieces), 0, -1):
            match = re.fullmatch(r"\s*(.+\.py):(\w+)\s*(?:=([^=,]*))?", ",".join(pieces[:count]))
            if match and Path(match[1]).is_file():
                terms.append((f"{match[1]}:{match[2]}", match[3] or ""))
                break
        else:
            count = 1
            name, _, weight = pieces[0].partition("=")
            terms.append((name.strip(), weight.strip()))
        del pieces[:count]
    for name, weight in terms:
        with contextlib.suppress(ValueError):
            if math.isfinite(float(weight or 1)) and float(weight or 1) != 0:
                continue
        raise UserError(f"the weight in --reward {name}={weight} is 0 or not a number; write dnc=0.3, say")
    return terms


def absolute_function(name: str) -> str:
    """"file.py:function" with the full path of the file, so that a run finds it from anywhere; else as it is."""
    path, _, function = name.rpartition(":")
    return f"{absolute(path)}:{function}" if ".py:" in name else name


def absolute_reward(spec: str) -> str:
    """The same reward with the full paths of its files."""
    return ",".join(absolute_function(name) + (f"={weight}" if weight else "") for name, weight in reward_terms(spec))


def run_name(base: str, reward: str, method: str, seed: int) -> str:
    """What a run is called that is not given a name."""
    names = [base, *(name for name, _ in reward_terms(reward))]
    parts = [Path(name.rpartition(":")[0] or name).stem if ".py:" in name else name for name in names]
    return "-".join([*parts, *[method] * (method != "nabla"), f"seed{seed}"])


def reward_files(spec: str) -> list[Path]:
    """The files of a reward of one's own: those that `spec` names, and what they import from beside them."""
    found = [Path(name.rpartition(":")[0]) for name, _ in reward_terms(spec) if ".py:" in name]
    for file in found:                                          # grows while it is walked
        try:
            nodes = [*ast.walk(ast.parse(file.read_bytes()))]
        except (OSError, SyntaxError, ValueError):              # load_function says so
            continue
        names = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        for name in {name.split(".")[0] for name in names} - {"r2d3", "kernels", "support"}:
            beside = [file.parent / f"{name}.py", *sorted((file.parent / name).rglob("*.py"))]
            found += [path for path in beside if path.is_file() and path not in found]
    return found


# What a function of one's own has to look like.
REWARD = "(render, prompts) -> scores (objects, views)"
BASE = "(config, device) -> r2d3.Base"


def load_function(spec: str, option: str = "--reward", wanted: str = REWARD) -> Callable:
    """The function that "file.py:function" names. What it imports may lie beside it; a file is loaded once.

    UserError: no such file or function, or a file that fails; `option` and `wanted` are for that sentence.
    """
    path, _, function = spec.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"there is no file {path} for {option} {spec}")
    file = Path(path).resolve()
    content = hashlib.sha256(str(file).encode() + file.read_bytes()).hexdigest()
    name = f"{file.stem}_{content[:8]}"                         # no other module's name
    if name in sys.modules and callable(getattr(sys.modules[name], function, None)):
        return getattr(sys.modules[name], function)
    module_spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(module_spec)       # where dataclasses look for it
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))                       # last, so that it hides nobody else's
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{path} cannot be loaded: {what_failed(error, file)}") from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"{path} has no function {function!r}; {option} {spec} needs def {function}{wanted}")
    return getattr(module, function)


def what_failed(error: BaseException, file: Path | None = None) -> str:
    """An exception in somebody's code in one line, with the place in `file`, or the last place in any."""
    places = [place for place in traceback.extract_tb(error.__traceback__)
              if not file or Path(place.filename).resolve() == file]
    where = f" ({Path(places[-1].filename).name}, line {places[-1].lineno})" if places else ""
    said = f"it called sys.exit({error.code!r})" if isinstance(error, SystemExit) else brief(error)
    return said + ("" if isinstance(error, SyntaxError) else where)


def call_reward(function: Callable, title: str, render, prompts: list[str]) -> torch.Tensor:
    """function(render, prompts), checked: scores (B, V) in float32, with a gradient where the pictures have one.

    This is the door that every score comes through. While a gradient is wanted, scores must be finite too; evaluations
    count those that are not, and go on.
    """
    try:
        score = function(render, prompts)
    except (torch.OutOfMemoryError, UserError):
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward {title} failed: {what_failed(error)}") from error
    wanted = tuple(render.image.shape[:2])
    if not isinstance(score, torch.Tensor) or score.is_nested:
        raise UserError(f"--reward {title} returned a {type(score).__name__}; wanted a torch.Tensor (objects, views), "
                        f"here {wanted}")
    if tuple(score.shape) != wanted:
        raise UserError(f"--reward {title} returned {tuple(score.shape)}; wanted (objects, views), here {wanted}")
    if score.is_complex() or score.layout != torch.strided:
        raise UserError(f"--reward {title} returned {score.dtype}, {score.layout}; wanted real numbers, a torch.Tensor")
    training = torch.is_grad_enabled() and render.image.requires_grad
    if training and not score.requires_grad:
        raise UserError(f"--reward {title} cannot be trained: it has no gradient to the pictures")
    score = score.to(render.image.device, torch.float32)
    if training and not (finite := score.isfinite().all(1)).all():
        bad = int(finite.int().argmin())
        blame = "the model has diverged" if not render.image[bad].isfinite().all() else "mend it for such pictures"
        raise UserError(f"--reward {title} is not finite: {score[bad].tolist()} for {brief(prompts[bad], 100)!r}; "
                        f"{blame}")
    return score


def gradient(title: str, score: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """That of the summed scores of a reward, like the latents. UserError: autograd cannot follow it."""
    try:
        return torch.autograd.grad(score.sum(), latents)[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(f"--reward {title} has no gradient ({brief(error)}); does it change its pictures in place, or "
                        "is it not made from them?") from error


def check_finite(title: str, score: torch.Tensor, gradient: torch.Tensor) -> None:
    """Raise UserError if rewards, or the gradients made of them, are not finite."""
    for what, value in (("is", score), ("has a gradient that is", gradient)):
        if not value.isfinite().all():
            first = value[~value.isfinite()][0].item()
            raise UserError(f"--reward {title} {what} not finite ({first}); does it divide by 0, or take the root or "
                            "norm of 0? add a small number there; or has the model diverged? try a smaller --lr or "
                            "--beta")


def find_lora(path: str) -> Path:
    """The LoRA of a run's folder, or the LoRA file or folder itself."""
    place = Path(path)
    if not place.exists():
        raise UserError(f"--run {path}: there is no such file or folder")
    if (place / "config.json").is_file():
        if not (place / "lora/adapter_model.safetensors").is_file():
            raise UserError(f"--run {path}: there is no finished epoch of a run in that folder")
        return place / "lora"
    return place


# What a LoRA's adapter_config.json may say: these settings are honoured, those that change nothing once it is trained
# are left aside, and any other that is not as peft has it by default is refused.
HONOURED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
            "layers_to_transform", "layers_pattern"}
LEFT_ASIDE = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
              "peft_version", "auto_mapping", "init_lora_weights", "eva_config", "runtime_config", "megatron_core"}
KEEP_THE_BASE = (None, True, False, "gaussian", "orthogonal", "eva")    # beginnings of a LoRA that leave the base alone


def lora_settings(file: Path, about: dict[str, str]) -> dict | None:
    """What is known of how a LoRA was made: adapter_config.json beside peft's file, or diffusers' note in `about`, the
    file's metadata; None if nothing is. UserError for what is not supported here.
    """
    from peft import LoraConfig
    beside, note = file.with_name("adapter_config.json"), about.get("lora_adapter_metadata")
    try:
        if file.name == "adapter_model.safetensors" and beside.is_file():
            settings = dict(**json.loads(beside.read_text(encoding="utf-8")))
        elif note:
            settings = {re.sub(r"^(unet|transformer)\.", "", name): value for name, value in json.loads(note).items()}
        else:
            return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the settings of the LoRA {file} cannot be read ({brief(error)})") from None
    if "LORA" not in str(settings.get("peft_type", "LORA")):
        raise UserError(f"{file} is a {settings['peft_type']}, not a LoRA")
    usual = LoraConfig().to_dict() | {"init_lora_weights": settings.get("init_lora_weights")}
    if settings.get("init_lora_weights") not in KEEP_THE_BASE:
        raise UserError(f"the LoRA {file} began with {settings['init_lora_weights']}, which changes the base too; that "
                        "is not supported")
    for name, value in settings.items():
        if name not in HONOURED | LEFT_ASIDE and value != usual.get(name) and value not in (None, False, {}, []):
            raise UserError(f"the LoRA {file} was made with {name} = {brief(value, 60)}, which is not supported")
    return {name: value for name, value in settings.items() if name in HONOURED and value is not None}


def load_lora(net: nn.Module, path: Path) -> nn.Module:
    """The network with a saved LoRA: a run's lora/ folder, one of peft's or diffusers', or Nabla-R2D3's code's.

    The strength is what its settings say. Without settings, a file of Nabla-R2D3's code (its names begin with unet.)
    has peft's default alpha of 8, a scale of 8 / rank; ours have a scale of 1.
    """
    from peft import LoraConfig, get_peft_model
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    known = [file for file in files if file.name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")]
    if not files:
        raise UserError(f"there is no LoRA in {path}: no adapter_model or pytorch_lora_weights.safetensors")
    file = (known or files)[0]
    if len(files) > 1 and not known:
        raise UserError(f"{path} holds several files; name the LoRA's: --run {file}")
    tensors, about = load_weights(file)
    weights = {"base_model.model." + re.sub(r"^(base_model\.model|unet|transformer)\.", "", name): value
               for name, value in tensors.items()}
    down = {name: value for name, value in weights.items() if "lora_A" in name}
    if not down or {name.replace("lora_A", "lora_B") for name in down} != weights.keys() - down.keys():
        raise UserError(f"{file} is not a whole LoRA: it needs a lora_A and a lora_B for every layer, and nothing else")
    settings = lora_settings(file, about)
    if settings is None:
        rank = max(next(iter(down.values())).shape[:1], default=1)
        theirs = all(name.startswith("unet.") for name in tensors)
        settings = {"r": rank, "lora_alpha": 8 if theirs else rank,
                    "target_modules": [name.removeprefix("base_model.model.").split(".lora_A")[0] for name in down]}
    try:
        net = get_peft_model(net, LoraConfig(**settings))
        set_lora(net, weights)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        why = brief(error.args[0] if error.args else error, 150)
        raise UserError(f"{file} does not fit this base ({why})") from None
    return net


def set_lora(net: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put all weights of a LoRA into the network. ValueError: some are missing, unknown, no floats, or not finite."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    wanted = get_peft_model_state_dict(net).keys()
    if missing := sorted(wanted - weights.keys()):
        raise ValueError(f"it lacks {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
    if unknown := sorted(weights.keys() - wanted):
        raise ValueError(f"it has no {unknown[0]}")
    for name, value in weights.items():
        if not value.is_floating_point() or not value.isfinite().all():
            what = "not finite" if value.is_floating_point() else f"{value.dtype}, which is no float"
            raise ValueError(f"{name} is {what}")
    set_peft_model_state_dict(net, weights)


def absolute(path: str | None) -> str | None:
    """The full path of a file or folder that is there, so that a run finds it from anywhere; else what was given."""
    return str(Path(path).resolve()) if path and path != "random" and os.path.exists(path) else path
