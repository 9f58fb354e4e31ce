"""What a run reads and leaves: prompt files, reward files, LoRAs, settings, checkpoints; and how processes share work.

r2d3.py decides what is in them; here is how they are found, checked and written. Whatever a person can mend is a
UserError.
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
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn as nn

from support import (PromptError, UserError, brief, cache_folder, check_writable, clear_parts, cli, load_weights,
                     published, say, say_too_long, to_bytes, to_json, write_atomic)

# ---- Prompts, rewards, LoRAs: what a person hands in --------------------------------------------------------------


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


def absolute_reward(spec: str) -> str:
    """The same reward with the full paths of its files, so that a run finds them from anywhere."""
    def full(name: str) -> str:
        path, colon, function = name.rpartition(":")
        return f"{absolute(path)}:{function}" if colon else name
    return ",".join(full(name) + (f"={weight}" if weight else "") for name, weight in reward_terms(spec))


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


def load_function(spec: str) -> Callable:
    """The function that "file.py:function" names. What it imports may lie beside it."""
    path, _, function = spec.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"there is no file {path} for --reward {spec}")
    file = Path(path).resolve()
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"     # no other module's name
    module_spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(module_spec)       # where dataclasses look for it
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))                       # last, so that it hides nobody else's
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} cannot be loaded: {what_failed(error, file)}") from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"{path} has no function {function!r}; --reward {spec} needs "
                        f"def {function}(render, prompts) -> scores (objects, views)")
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


# ---- Folders: what a run leaves, and how it goes on ---------------------------------------------------------------


def absolute(path: str | None) -> str | None:
    """The full path of a file or folder that is there, so that a run finds it from anywhere; else what was given."""
    return str(Path(path).resolve()) if path and path != "random" and os.path.exists(path) else path


def evaluation_folder(tuned: str | None, out: str) -> str:
    """Where an evaluation goes: into the run that is evaluated, or beside the LoRA's or the base's name."""
    if tuned and Path(tuned, "config.json").is_file():
        return f"{tuned}/evaluation"
    name = "-" + "-".join(Path(tuned).resolve().with_suffix("").parts[-2:]) if tuned else ""
    return f"{out}-evaluation{name}"


RENAMED = {"lam": "reg_weight", "checkpoint_net": "checkpoint"}     # settings of older runs


def read_settings(folder: Path, config_class: type) -> dict:
    """The settings in a run's config.json; those that are no fields (an older run's) are named in one line."""
    path = folder / "config.json"
    try:
        settings = {RENAMED.get(name, name): value
                    for name, value in json.loads(path.read_text(encoding="utf-8"))["config"].items()}
    except OSError:
        raise UserError(f"--run {folder}: there is no run in that folder") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({brief(error)}); is it whole?") from None
    unknown, wrong = cli.check_types(config_class, settings)
    if wrong:
        raise UserError(f"{path}: {wrong}; was it edited by hand?")
    if unknown:
        print(f"{path} is of an older version; not read: {', '.join(unknown)}")
    return {name: value for name, value in settings.items() if name not in unknown}


# What is locked: the folder, and the open file whose lock the system takes back when this process ends, in any way.
LOCKED: list[tuple[Path, object]] = []


def lock(folder: Path, *subfolders: str) -> None:
    """Make the folder and keep other processes' runs out of it until `unlocking` ends.

    Clears what a killed run left half written. UserError: somebody is at work in it, or it cannot be written to.
    """
    with contextlib.suppress(ImportError):                      # Windows has no such lock
        import fcntl
        path = folder / ".lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while True:
                file = open(path, "a+", encoding="utf-8")       # noqa: SIM115, held until `unlock`
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                        break
                file.close()                                    # its owner was just removing it: once more
        except BlockingIOError:
            owner = brief(path.read_text(encoding="utf-8")) or "another process"
            raise UserError(f"{folder} is in use by {owner}; wait until it is done, or name another folder with --out"
                            ) from None
        except OSError as error:
            raise UserError(f"{folder} cannot be written to ({error.strerror}); mend that, or name another folder with "
                            "--out") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        LOCKED.append((folder, file))
    clear_parts(folder)
    check_writable(folder, *(folder / name for name in subfolders))


@contextlib.contextmanager
def unlocking() -> Iterator[None]:
    """After its body, also as a decorator, what was locked is free again. Ctrl-C says what is left in the folder."""
    try:
        yield
    except KeyboardInterrupt:
        saved = [folder for folder, _ in LOCKED if (folder / "checkpoint/state.pt").is_file()]
        raise KeyboardInterrupt(f"{saved[0]} keeps all finished epochs, --resume goes on after them" if saved else
                                "nothing was finished yet, so there is nothing to go on from: begin again") from None
    finally:
        while LOCKED:
            folder, file = LOCKED.pop()
            with contextlib.suppress(OSError):
                (folder / ".lock").unlink()
                folder.rmdir()                                  # if nothing came of it
            file.close()


# What may differ between a run and its continuation (of prompts only the files' names, not the words).
FREE_ON_RESUME = {"resume", "epochs", "out", "run", "device", "backend", "micro_batch", "checkpoint",
                  "prompts", "test_prompts"}


def open_run(settings: dict, config_class: type, prompts: str, free: set[str], rank: int = 0,
             world: int = 1) -> tuple[dict, dict | None]:
    """Check that the folder settings["out"] is ours to write to, and lock it; `prompts` is the prompt lists' digest.

    Returns the settings, in which None now means what the run had, and the checkpoint to go on from, or None. With
    "resume" all settings but the `free` ones must be those that the run began with.
    """
    out, state = Path(settings["out"]), None
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if rank == 0:
        lock(out)
    gather(None, world)                                         # nobody looks at the folder before it is locked
    checkpoint = out / "checkpoint/state.pt"
    if checkpoint.is_file():
        settings, state = go_on(settings, config_class, prompts, free, checkpoint)
    elif settings["resume"]:
        raise UserError(f"--resume: there is no checkpoint in {out}; leave --resume out to begin")
    elif not (out / "config.json").is_file() and foreign(out):
        raise UserError(f"{out} is not empty and holds no run; name another folder with --out")
    gather(None, world)                                         # all have looked: from here on the folder is written to
    if rank == 0:
        check_writable(out / "lora", out / "checkpoint", out / "samples")
    gather(None, world)
    return settings, state


def foreign(folder: Path) -> bool:
    """Whether there is anything in the folder but a lock and empty folders."""
    return any(path.name != ".lock" for path in folder.rglob("*") if not path.is_dir())


def go_on(settings: dict, config_class: type, prompts: str, free: set[str], checkpoint: Path) -> tuple[dict, dict]:
    """`open_run` for a folder that has a checkpoint."""
    out = checkpoint.parent.parent
    if not settings["resume"]:
        raise UserError(f"{out} already holds a run; go on with --resume, or begin another with --out")
    before = read_settings(out, config_class)
    fixed = {name: value for name, value in before.items() if name not in free}
    settings = settings | {name: value for name, value in fixed.items() if settings[name] is None}
    for name, value in fixed.items():
        if settings[name] != value:
            raise UserError(f"{out} belongs to a run with other settings ({name} was {value}, now {settings[name]}); "
                            "name another folder with --out")
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        kinds = {"epoch": int, "prompts": str, "rows": list, "lora": dict, "history": dict, "optimizer": dict}
        for name, kind in kinds.items():
            if not isinstance(state[name], kind):
                raise TypeError(f"{name} is a {type(state[name]).__name__}")
        if not state["rows"] or not all({"update", "epoch", "judged"} <= row.keys() for row in state["rows"]):
            raise ValueError("rows are missing")
    except Exception as error:
        raise UserError(f"{checkpoint} cannot be read ({brief(error, 100)}); name another folder with "
                        "--out, what is in this one can still be used with --run") from None
    if state["prompts"] != prompts:
        raise UserError(f"the prompts are not those {out} began with, or the number of processes is not; "
                        "restore them or name another --out")
    if state["epoch"] > settings["epochs"]:
        raise UserError(f"{out} has {state['epoch']} epochs already; give --epochs {state['epoch']} or more")
    return settings, state


def identify(base, reward: str) -> dict:
    """What a run's numbers depend on besides its settings: hashes of the base's weights and of the reward's own files.

    Weights count as bf16, so that they are the same on a GPU as on a CPU, and wherever they were read from.
    """
    weights = hashlib.sha256()
    for name, part in sorted(vars(base).items()):
        tensors = part.state_dict() if isinstance(part, nn.Module) else {}
        if torch.is_tensor(part) and name.endswith(("mean", "std")):        # of latents: read with the weights
            tensors = {"": part}
        for key, value in tensors.items():
            weights.update(f"{name}.{key} {tuple(value.shape)}".encode())
            weights.update(value.detach().to("cpu", torch.bfloat16).reshape(-1).view(torch.uint8).numpy())
    return {"weights": weights.hexdigest(),
            "reward": {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in reward_files(reward)}}


def changed(before: dict | None, now: dict) -> str | None:
    """What is not as it was, in words; None if all is, or if nobody knows (an older run)."""
    if not isinstance(before, dict) or not isinstance(before.get("reward"), dict):
        return None
    if before.get("weights") != now["weights"]:
        return "the base, by its weights,"
    files = {path for path, digest in before["reward"].items() if now["reward"].get(path) != digest}
    files |= now["reward"].keys() - before["reward"].keys()
    return f"the reward's file {min(files)}" if files else None


def check_identity(base, reward: str, out: Path, state: dict | None, world: int) -> dict:
    """`identify`, the same in all processes and, where a run goes on from `state`, the same as it began with."""
    mine = identify(base, reward)
    for other in gather(mine, world, LOADING_WAIT):
        if what := changed(other, mine):
            raise UserError(f"{what} is not the same for all processes; copy it again")
    if state and (what := changed(state.get("identity"), mine)):
        raise UserError(f"{what} is not what {out} began with, so that its numbers could not be compared; restore it "
                        f"(copies of the run's code are in {out / 'source'}), or begin another run with --out")
    return mine


def warn_if_changed(tuned: str, base, reward: str) -> None:
    """Say it if base or reward are not what the run in the folder `tuned` was made with."""
    now = identify(base, reward)
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        about = json.loads(Path(tuned, "config.json").read_text(encoding="utf-8"))
        before = dict(about["identity"])
        if about["config"]["reward"] and before["reward"].keys() != now["reward"].keys():
            before["reward"] = now["reward"]                    # another reward was asked for
        if what := changed(before, now):
            say(f"{what} is not what {tuned} was trained with")


def begin(out: Path, home: Path, about: dict, state: dict | None) -> None:
    """Write config.json, and for a run that does not go on from a checkpoint the source it is made with."""
    write_atomic(out / "config.json", to_json(about))
    if not state:
        copy_source(home, out / "source", about["config"]["reward"])


def copy_source(home: Path, folder: Path, reward: str) -> None:
    """The code that a run was made with, beside its results; a reward of one's own in source/reward."""
    for pattern in ("r2d3.py", "kernels/*.py", "support/*.py", "support/*.js"):
        for source in home.glob(pattern):
            write_atomic(folder / source.relative_to(home), source.read_bytes())
    for source in reward_files(reward):
        write_atomic(folder / "reward" / source.name, source.read_bytes())


def save_checkpoint(out: Path, net: nn.Module, optimizer: torch.optim.Optimizer, rows: list[dict], epoch: int,
                    prompts: str, history: dict, identity: dict) -> None:
    """All that resume needs, the log, and the LoRA in peft's format; each file is replaced in one go."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save
    lora = {name: value.cpu().contiguous() for name, value in get_peft_model_state_dict(net).items()}
    state = {"epoch": epoch, "prompts": prompts, "rows": rows, "lora": lora, "history": history,
             "identity": identity, "optimizer": optimizer.state_dict()}
    write_atomic(out / "lora/adapter_model.safetensors", save(lora))
    write_atomic(out / "lora/adapter_config.json", to_json(net.peft_config["default"].to_dict()))
    lines = [",".join(rows[0]), *(",".join(f"{value:.6g}" for value in row.values()) for row in rows)]
    write_atomic(out / "log.csv", "\n".join(lines) + "\n")
    # The checkpoint is what resume trusts, so it is written last, when the rest is there.
    write_atomic(out / "checkpoint/state.pt", to_bytes(lambda file: torch.save(state, file)))


def stop_diverged(what: str, epoch: int, update: int, config) -> None:
    """Raise a UserError that says what is not finite and what is left of the run with these settings."""
    what, state = what.replace("_", " "), Path(config.out, "checkpoint/state.pt")
    left = f"the last good checkpoint is {state}" if state.is_file() else "there is no checkpoint yet"
    mend = f"look at what --reward {config.reward} does there, or " if "reward" in what else ""
    raise UserError(f"not finite: the {what} (epoch {epoch}, update {update}); {left}; {mend}try a smaller --lr or "
                    "--beta")


def restore(net: nn.Module, optimizer: torch.optim.Optimizer, state: dict, out: Path) -> None:
    """Put a checkpoint's LoRA and optimiser back."""
    try:
        set_lora(net, state["lora"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{out / 'checkpoint/state.pt'} does not fit its run ({brief(error, 100)}); name another "
                        "folder with --out") from None


def load_scores(path: Path) -> dict[str, float | None]:
    """What a cache of scores holds of use: it may hold anything, or nothing."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {prompt: value for prompt, value in found.items()
                    if value is None or type(value) in (int, float) and math.isfinite(value)}
    return {}


# What the score of a prompt depends on, besides the weights and the reward's file.
SCORED_WITH = ("base", "reward", "sampler", "steps", "guidance", "views", "view_size", "elevation_jitter", "azimuth_jitter")


def scores_by_prompt(key: str, prompts: list[str], batch: int, score: Callable[[list[str]], torch.Tensor],
                     rank: int, world: int) -> dict[str, float]:
    """{prompt: its score}, from score(part) of up to `batch` prompts; -inf where that is not finite. Kept under `key`.

    Processes share the work, and meet after every batch, so that none waits for longer than that.
    """
    from tqdm import tqdm
    path, scores, kept = cache_folder("scores") / f"{key}.json", {}, True
    clear_parts(path.parent)
    for share in gather(load_scores(path), world):
        scores |= share
    new = [prompt for prompt in prompts if prompt not in scores]
    for n in tqdm(range(0, len(new), batch * world), "scoring the prompts", leave=False, disable=rank > 0):
        part = new[n:n + batch * world][rank::world]
        mine = zip(part, score(part).tolist() if part else ())
        for share in gather({prompt: value if math.isfinite(value) else None for prompt, value in mine}, world):
            scores |= share
        if rank == 0 and kept:
            try:
                write_atomic(path, to_json(scores))
            except UserError as error:
                kept = say(f"the scores are not kept for other runs: {error}")
    if unknown := [prompt for prompt in prompts if scores[prompt] is None]:
        say(f"{len(unknown)} of {len(prompts)} prompts got no finite score, and count as the lowest "
            f"({brief(unknown[0], 60)})")
    return {prompt: -math.inf if scores[prompt] is None else scores[prompt] for prompt in prompts}


# ---- Processes, time and memory -----------------------------------------------------------------------------------


# How long processes wait for each other. They meet after every update and every batch of an evaluation, which takes
# minutes at most; while they load, one may be downloading. Whoever does not come by then has stopped.
WAIT, LOADING_WAIT = timedelta(minutes=30), timedelta(hours=6)
GROUPS: dict[timedelta, object] = {}        # through which objects are exchanged, by how long they wait


def start_processes(device: str) -> tuple[str, int, int]:
    """Join the other processes if torchrun started us. Returns our device, our rank, and how many we are."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return device, 0, 1
    rank, on_gpu = int(os.environ["RANK"]), device.startswith("cuda")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=WAIT)
    if not GROUPS:                          # on CPUs, also beside GPUs: there a missing process is an exception
        for wait in (WAIT, LOADING_WAIT):
            GROUPS[wait] = torch.distributed.new_group(backend="gloo", timeout=wait)
    if on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return device, rank, world


def gather(value: object, world: int, wait: timedelta = WAIT) -> list:
    """Every process's `value`, in the order of their ranks. UserError: one does not come within `wait`, or is gone."""
    everyone = [value] * world
    if world > 1:
        try:
            torch.distributed.all_gather_object(everyone, value, GROUPS[wait])
        except RuntimeError as error:
            raise UserError(f"process {os.environ['RANK']} waited in vain for the others: one has ended, or stood "
                            f"still for {wait} ({brief(error, 120)}); end them all, and go on with --resume") from None
    return everyone


def mean(values: torch.Tensor, world: int) -> float:
    """The mean of all processes' values, of which each has as many."""
    return sum(gather(values.mean().item(), world)) / world


def add_up(weights: list[torch.Tensor], totals: dict[str, float], world: int) -> dict[str, float]:
    """Sum gradients over processes, in place, and the logged totals. A process may have had no part in an update."""
    shares = [share for share in gather(totals, world) if share]        # first: it tells if a process is missing
    if world > 1:
        for weight in weights:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            torch.distributed.all_reduce(weight.grad)
    return {name: sum(share[name] for share in shares) for name in shares[0]}


SECONDS: dict[str, float] | None = None     # by phase; the command `cost` makes it a dict, else nothing is measured


@contextlib.contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Inside, weights need no gradients: for them every LoRA layer would keep its input, most of the memory,
    though only the gradient with respect to x_s is wanted.
    """
    trained = [weight for weight in net.parameters() if weight.requires_grad]
    try:
        net.requires_grad_(False)
        yield
    finally:
        for weight in trained:
            weight.requires_grad_()


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Adds the time that its body takes to SECONDS."""
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()        # else only the launch of the work would be timed
        return time.perf_counter()

    if SECONDS is None:
        yield
        return
    begun = now()
    yield
    SECONDS[name] = SECONDS.get(name, 0) + now() - begun


def count_parameters(base) -> dict[str, int]:
    """Parameters of every network that is an attribute of the base, and of the LoRA on `net`."""
    def count(part: nn.Module, trained: bool | None = None) -> int:
        return sum(weight.numel() for weight in part.parameters() if trained in (None, weight.requires_grad))

    parts = {name: count(part) for name, part in vars(base).items() if isinstance(part, nn.Module)}
    return parts | {"net": count(base.net, False), "LoRA, trained": count(base.net, True)}


def peak_memory_GB(device: str) -> float | None:
    """The most memory that this process has held: of the GPU, or of the machine where its system tells (Linux)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9
    return None
