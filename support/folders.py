"""What a run leaves: its folder, lock, settings, checkpoint and identity; and how it goes on from them.

r2d3.py decides what is in these files; here is how they are found, checked and written. Whatever a person can mend is
a UserError.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn as nn

from support import (UserError, brief, cache_folder, check_writable, clear_parts, cli, processes, say, to_bytes,
                     to_json, write_atomic)
from support.inputs import reward_files, set_lora


def begin_evaluation(given: str | None, config, rank: int) -> str:
    """The folder that an evaluation writes to, locked. UserError: it is a run's own, or cannot be written to."""
    if given and Path(given, "checkpoint").is_dir():
        raise UserError(f"--out {given} is a run, whose report would be lost; name another folder")
    out = given or evaluation_folder(config.run, config.out)
    if rank == 0:
        lock(Path(out), "samples")
    return out


def evaluation_folder(tuned: str | None, out: str) -> str:
    """Where an evaluation goes: into the run that is evaluated, or beside the LoRA's or the base's name."""
    if tuned and Path(tuned, "config.json").is_file():
        return f"{tuned}/evaluation"
    name = "-" + "-".join(Path(tuned).resolve().with_suffix("").parts[-2:]) if tuned else ""
    return f"{out}-evaluation{name}"


def read_settings(folder: Path, config_class: type) -> dict:
    """The settings in a run's config.json; those that are no fields (another version's) are named in one line."""
    path = folder / "config.json"
    try:
        settings = dict(**json.loads(path.read_text(encoding="utf-8"))["config"])
    except OSError:
        raise UserError(f"--run {folder}: there is no run in that folder") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({brief(error)}); is it whole?") from None
    unknown, wrong = cli.check_types(config_class, settings)
    if wrong:
        raise UserError(f"{path}: {wrong}; was it edited by hand?")
    if unknown:
        print(f"{path} is of another version; not read: {', '.join(unknown)}")
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
    processes.gather(None, world)                                         # nobody looks at the folder before it is locked
    checkpoint = out / "checkpoint/state.pt"
    if checkpoint.is_file():
        settings, state = go_on(settings, config_class, prompts, free, checkpoint)
    elif settings["resume"]:
        raise UserError(f"--resume: there is no checkpoint in {out}; leave --resume out to begin")
    elif not (out / "config.json").is_file() and foreign(out):
        raise UserError(f"{out} is not empty and holds no run; name another folder with --out")
    processes.gather(None, world)                                         # all have looked: from here on the folder is written to
    if rank == 0:
        check_writable(out / "lora", out / "checkpoint", out / "samples")
    processes.gather(None, world)
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
    for other in processes.gather(mine, world, processes.LOADING_WAIT):
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
    for pattern in ("r2d3.py", "kernels/*.py", "support/*.py", "support/*.js", "bases/*.py"):
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


def stop_diverged(what: str, when: str, config) -> None:
    """Raise a UserError that says what is not finite and what is left of the run with these settings."""
    what, state = what.replace("_", " "), Path(config.out, "checkpoint/state.pt")
    left = f"the last good checkpoint is {state}" if state.is_file() else "there is no checkpoint yet"
    mend = f"look at what --reward {config.reward} does there, or " if "reward" in what else ""
    raise UserError(f"not finite: the {what} ({when}); {left}; {mend}try a smaller --lr or --beta")


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


def without_lowest(prompts: list[str], config, score: Callable[[list[str]], torch.Tensor], identity: dict, rank: int,
                   world: int) -> list[str]:
    """The prompts without the share config.min_quantile of them that has the lowest scores, score(part) (P,).

    Processes share the work; scores are kept for all runs with this base and reward, whose `identity` it is.
    """
    what = [identity, *(getattr(config, name) for name in SCORED_WITH)]
    key = hashlib.sha256(repr(what).encode()).hexdigest()
    different = [*dict.fromkeys(prompts)]
    scores = scores_by_prompt(key, different, config.eval_batch, score, rank, world)
    lowest = {*sorted(different, key=scores.get)[:int(config.min_quantile * len(different))]}
    return [prompt for prompt in prompts if prompt not in lowest]


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
    for share in processes.gather(load_scores(path), world):
        scores |= share
    new = [prompt for prompt in prompts if prompt not in scores]
    for n in tqdm(range(0, len(new), batch * world), "scoring the prompts", leave=False, disable=rank > 0):
        part = new[n:n + batch * world][rank::world]
        mine = zip(part, score(part).tolist() if part else ())
        for share in processes.gather({prompt: value if math.isfinite(value) else None for prompt, value in mine}, world):
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
