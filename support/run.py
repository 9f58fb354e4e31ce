"""What a run reads and leaves: prompt files, reward files, LoRAs, settings, checkpoints; and how processes share work.

r2d3.py decides what is in them; here is how they are found, checked and written. Whatever a person can mend is a
UserError.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn as nn

from support import UserError, cache_folder, load_weights, published, to_bytes, write_atomic

# ---- Prompts, rewards, LoRAs: what a person hands in --------------------------------------------------------------


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
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"the prompt file {spec} is empty; write one prompt a line")
        return prompts
    one_word = len(spec.split()) == 1                           # "a lamp, black/white, 1.5 m" is a prompt
    if spec.endswith(".txt") or os.path.isdir(spec) or one_word and (Path(spec).suffix or os.sep in spec):
        raise UserError(f"there is no prompt file {spec}")
    return [spec.strip()]


def load_function(spec: str) -> Callable:
    """The function that "file.py:function" names."""
    path, _, function = spec.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"there is no file {path} for --reward {spec}")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, function, None)):
        raise UserError(f"{path} has no function {function!r}; --reward {spec} needs "
                        f"def {function}(render, prompts) -> scores (objects, views)")
    return getattr(module, function)


def call_reward(function: Callable, title: str, render, prompts: list[str]) -> torch.Tensor:
    """function(render, prompts), checked: scores (B, V) that have a gradient where the pictures have one."""
    try:
        score = function(render, prompts)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(f"--reward {title} failed: {type(error).__name__}: {error}") from error
    got, wanted = getattr(score, "shape", type(score).__name__), render.image.shape[:2]
    if got != wanted:
        raise UserError(f"--reward {title} returned {got}; wanted (objects, views), here {wanted}")
    if torch.is_grad_enabled() and render.image.requires_grad and not score.requires_grad:
        raise UserError(f"--reward {title} cannot be trained: it has no gradient to the pictures")
    return score


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


def load_lora(net: nn.Module, path: Path) -> nn.Module:
    """The network with a saved LoRA of scale 1: a run's lora/ folder, or what Nabla-R2D3's code saved."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"there is no LoRA in {path}: no adapter_model or pytorch_lora_weights.safetensors")
    weights = {"base_model.model." + re.sub(r"^(base_model\.model|unet)\.", "", name): value
               for name, value in load_weights(files[0])[0].items()}
    down = {name: value for name, value in weights.items() if "lora_A" in name}
    if not down or {name.replace("lora_A", "lora_B") for name in down} != weights.keys() - down.keys():
        raise UserError(f"{files[0]} is not a whole LoRA: it needs a lora_A and a lora_B for every layer")
    layers = [name.removeprefix("base_model.model.").split(".lora_A")[0] for name in down]
    rank = next(iter(down.values())).shape[0]
    try:
        net = get_peft_model(net, LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
        if unknown := set_peft_model_state_dict(net, weights).unexpected_keys:
            raise KeyError(f"it has no {unknown[0]}")
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{files[0]} does not fit this base ({' '.join(str(error).split())[:150]})") from None
    return net


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


def read_settings(folder: Path, known: list[str]) -> dict:
    """The settings in a run's config.json; those that are not `known` (an older run's) are named in one line."""
    path = folder / "config.json"
    try:
        settings = {RENAMED.get(name, name): value
                    for name, value in json.loads(path.read_text(encoding="utf-8"))["config"].items()}
    except OSError:
        raise UserError(f"--run {folder}: there is no run in that folder") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); is it whole?") from None
    if unknown := sorted(settings.keys() - set(known)):
        print(f"{path} is of an older version; not read: {', '.join(unknown)}")
    return {name: value for name, value in settings.items() if name in known}


def open_run(settings: dict, prompts: str, free: set[str]) -> tuple[dict, dict | None]:
    """Check that the folder settings["out"] is ours to write to; `prompts` is the digest of the prompt lists.

    Returns the settings, in which None now means what the run had, and the checkpoint to go on from, or None. With
    "resume" all settings but the `free` ones must be those that the run began with.
    """
    out = Path(settings["out"])
    checkpoint = out / "checkpoint/state.pt"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    if not checkpoint.is_file():
        if settings["resume"]:
            raise UserError(f"--resume: there is no checkpoint in {out}; leave --resume out to begin")
        if out.is_dir() and not (out / "config.json").is_file() and any(out.iterdir()):
            raise UserError(f"{out} is not empty and holds no run; name another folder with --out")
        return settings, None
    if not settings["resume"]:
        raise UserError(f"{out} already holds a run; go on with --resume, or begin another with --out")
    before = read_settings(out, list(settings))
    fixed = {name: value for name, value in before.items() if name not in free}
    settings = settings | {name: value for name, value in fixed.items() if settings[name] is None}
    for name, value in fixed.items():
        if settings[name] != value:
            raise UserError(f"{out} belongs to a run with other settings ({name} was {value}, now {settings[name]}); "
                            "name another folder with --out")
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        epoch, same = state["epoch"], state["prompts"] == prompts
    except Exception as error:
        raise UserError(f"{checkpoint} cannot be read ({type(error).__name__}); name another folder with "
                        "--out, what is in this one can still be used with --run") from None
    if not same:
        raise UserError(f"the prompts are not those {out} began with, or the number of processes is not; "
                        "restore them or name another --out")
    if epoch > settings["epochs"]:
        raise UserError(f"{out} has {epoch} epochs already; give --epochs {epoch} or more")
    return settings, state


def copy_source(home: Path, folder: Path) -> None:
    """The code that a run was made with, beside its results."""
    for pattern in ("r2d3.py", "kernels/*.py", "support/*.py"):
        for source in home.glob(pattern):
            write_atomic(folder / source.relative_to(home), source.read_text(encoding="utf-8"))


def save_checkpoint(out: Path, net: nn.Module, optimizer: torch.optim.Optimizer, rows: list[dict], epoch: int,
                    prompts: str, history: dict) -> None:
    """All that resume needs, the log, and the LoRA in peft's format; each file is replaced in one go."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save
    lora = {name: value.cpu().contiguous() for name, value in get_peft_model_state_dict(net).items()}
    state = {"epoch": epoch, "prompts": prompts, "rows": rows, "lora": lora, "history": history,
             "optimizer": optimizer.state_dict()}
    write_atomic(out / "lora/adapter_model.safetensors", save(lora))
    about = {key: sorted(value) if isinstance(value, set) else value
             for key, value in net.peft_config["default"].to_dict().items()}
    write_atomic(out / "lora/adapter_config.json", json.dumps(about, indent=1, default=str))
    lines = [",".join(rows[0]), *(",".join(f"{value:.6g}" for value in row.values()) for row in rows)]
    write_atomic(out / "log.csv", "\n".join(lines) + "\n")
    # The checkpoint is what resume trusts, so it is written last, when the rest is there.
    write_atomic(out / "checkpoint/state.pt", to_bytes(lambda file: torch.save(state, file)))


def restore(net: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Put a checkpoint's LoRA and optimiser back."""
    from peft import set_peft_model_state_dict
    set_peft_model_state_dict(net, state["lora"])
    optimizer.load_state_dict(state["optimizer"])


def file_stamps(weights: Path, reward: str) -> list[tuple[str, int]]:
    """Names and times of the files that a score depends on: the weights' and the reward's own."""
    files = {weights, *weights.rglob("*"), *map(Path, re.findall(r"[^,=\s][^,=]*\.py(?=:)", reward))}
    return sorted((str(file), file.stat().st_mtime_ns) for file in files if file.is_file())


def scores_by_prompt(key: str, prompts: list[str], batch: int, score: Callable[[list[str]], torch.Tensor],
                     rank: int, world: int) -> dict[str, float]:
    """{prompt: its score}, from score(part) of up to `batch` prompts; kept on disk under `key`. Processes share the work."""
    from tqdm import tqdm
    path, scores = cache_folder("scores") / f"{key}-{rank}.json", {}
    with contextlib.suppress(OSError, ValueError):
        scores = json.loads(path.read_text(encoding="utf-8"))
    new = [prompt for prompt in prompts[rank::world] if prompt not in scores]
    for n in tqdm(range(0, len(new), batch), "scoring the prompts", leave=False, disable=rank > 0):
        part = new[n:n + batch]
        scores |= zip(part, score(part).nan_to_num(-torch.inf).tolist())
        write_atomic(path, json.dumps(scores))
    return {prompt: value for share in gather(scores, world) for prompt, value in share.items()}


# ---- Processes, time and memory -----------------------------------------------------------------------------------


def start_processes(device: str) -> tuple[str, int, int]:
    """Join the other processes if torchrun started us. Returns our device, our rank, and how many we are."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return device, 0, 1
    rank, on_gpu = int(os.environ["RANK"]), device.startswith("cuda")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=24))
    if on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return device, rank, world


def gather(value: object, world: int) -> list:
    """Every process's `value`, in the order of their ranks."""
    everyone = [value] * world
    if world > 1:
        torch.distributed.all_gather_object(everyone, value)
    return everyone


def mean(values: torch.Tensor, world: int) -> float:
    """The mean of all processes' values, of which each has as many."""
    return sum(gather(values.mean().item(), world)) / world


def add_up(weights: list[torch.Tensor], totals: dict[str, float], world: int) -> dict[str, float]:
    """Sum gradients over processes, in place, and the logged totals. A process may have had no part in an update."""
    if world > 1:
        for weight in weights:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            torch.distributed.all_reduce(weight.grad)
    shares = [share for share in gather(totals, world) if share]
    return {name: sum(share[name] for share in shares) for name in shares[0]}


SECONDS: dict[str, float] | None = None     # by phase; the command `cost` makes it a dict, else nothing is measured


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


def peak_memory_GB(device: str) -> float | None:
    """The most memory that this process has held: of the GPU, or of the machine where its system tells (Linux)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9
    return None
