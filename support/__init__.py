"""What r2d3.py stands on and what is not the method. These files import kernels at most, never r2d3:

    shapes.py        the embedded base: its networks and how its file is read (experiments/make_shapes.py makes it)
    published.py     the published bases: where they are, how they are read, their text encoders
    cameras.py       poses, intrinsics, rays
    scorers.py       what judges pictures: formulas, embedded networks, the published ones
    metrics.py       what evaluations measure
    report.py        the page and the pictures that a run leaves
    export.py        .ply, .glb, merged weights, and the index of sampled objects
    viewer.py, .js   objects that turn in a browser, without a network
    inputs.py        what a person hands in: prompts, rewards and bases of their own, LoRAs
    folders.py       what a run leaves: folder, lock, settings, checkpoint, identity
    processes.py     how processes share work, and what it takes
    presets.py       the settings that nobody gives, by base
    costs.py         what an epoch of training takes
    speed.py         compiled blocks and channels_last for a GPU, for experiments/bench.py
    checks.py        what any working base does, from a measurement of it
    nft.py           DiffusionNFT's loss, for rewards without a gradient; no --method yet
    cli.py           the command line, made from the Config's source

This file holds what all of them share: errors that people can mend, and files that are never half written.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor


def hide_hub_kernels() -> None:
    """Keep transformers from taking our folder kernels/ for the Hugging Face package of the same name.

    Where that package is installed, transformers sees its version and imports names from `kernels`, which are not in
    ours. So it is told that there is no such package, before it loads any model. Without the package nothing is done.
    """
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return
    from transformers import utils
    for module in (utils, utils.import_utils):
        module.is_kernels_available = lambda *args, **options: False


hide_hub_kernels()


class UserError(ValueError):
    """Something the caller can mend: printed as one sentence, exit code 2, no traceback."""


class PromptError(UserError):
    """One prompt that cannot be used; whoever knows the file that it came from adds where it stands."""

    def __init__(self, message: str, prompt: str):
        super().__init__(message)
        self.prompt = prompt


def brief(error: object, length: int = 200) -> str:
    """An exception, or any text, in one line of about `length` characters."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    text = " ".join(text.split())
    return (text if len(text) <= length else text[:length - 3] + "...").rstrip(": ")


def say(line: str) -> None:
    """One line that people should see, on stderr; of several processes the first one says it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"r2d3: {line}", file=sys.stderr, flush=True)


@functools.cache
def say_once(line: str) -> None:
    say(line)


def say_not_finite(what: str, tensors: Iterable[Tensor]) -> None:
    """One line, once, if there are numbers in `tensors` that are not finite. On a GPU the host waits to know."""
    if sum((~tensor.detach().isfinite()).sum() for tensor in tensors):
        say_once(f"there are numbers in {what} that are not finite")


@functools.cache
def say_too_long(what: str, count: int, total: int) -> None:
    """One line, once, if `what` does not read all of some prompts."""
    if count:
        say(f"{count} of {total} prompts are longer than {what} can read; their ends do not count there")


def write_atomic(path: Path, content: bytes | str) -> None:
    """All of the new file or all of the old one, also after kill -9, on a full disk or in a power cut.

    UserError: it cannot be written, with the reason and what to do.
    """
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); make room, mend the permissions, or "
                        "name another folder") from None


def check_writable(*folders: Path) -> None:
    """Make the folders and a small file in each, and remove what is new again: what fails fails before the work.

    UserError: a file is in the way, the disk is full, the folder is read-only.
    """
    for folder in folders:
        for place in (folder, *folder.parents):
            if place.exists() and not place.is_dir():
                raise UserError(f"{place} is a file, where a folder should be; remove it or name another folder")
        probe = folder / f"probe{os.getpid()}"
        write_atomic(probe, b"0" * 4096)
        probe.unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()                                      # it stays where something is in it


def clear_parts(folder: Path) -> None:
    """Remove what write_atomic could not finish because its process was killed: of a big state that is gigabytes."""
    for part in [*folder.rglob("*.part*")]:
        match = re.search(r"\.part(\d+)$", part.name)
        if match and not alive(int(match[1])):
            with contextlib.suppress(OSError):
                part.unlink()


def alive(pid: int) -> bool:
    """Whether this machine has such a process; on Windows, where asking would end it, always true."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:                                     # somebody else's
        return True
    return True


def to_json(value: object) -> str:
    """JSON as it is defined: numbers that are not finite, which it does not have, become null."""
    def clean(value: object) -> object:
        if isinstance(value, dict):
            return {str(key): clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return sorted(map(clean, value))
        return None if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps(clean(value), indent=1, allow_nan=False, default=str)


def to_bytes(save: Callable) -> bytes:
    """What save(file) writes."""
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file."""
    from safetensors import SafetensorError, safe_open
    if not path.is_file():
        raise UserError(f"there is no file of weights at {path}")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights {path} cannot be read, is the file complete? ({brief(error)})") from None


def cache_folder(name: str) -> Path:
    """Where what is slow to make is kept from run to run: ~/.cache/r2d3, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "r2d3" / name


@contextlib.contextmanager
def fetching(what: str, size: str, local: Path | None = None) -> Iterator[None]:
    """Whatever goes wrong while published data is fetched, or read from a `local` folder, becomes one sentence."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise UserError(f"{what}: {error}; pip install -r requirements.txt brings what is needed") from None
    except Exception as error:
        why = brief(error)
        if "gated" in why.lower():                              # huggingface_hub's word, and transformers'
            raise UserError(f"{what} needs a licence: agree to it on the model's page on the Hugging Face hub, then run "
                            "hf auth login here") from None
        if local:
            raise UserError(f"{what} in {local} cannot be read ({why}); is it complete?") from None
        raise UserError(f"{what} could not be fetched or read ({why}); a network is needed once, for {size}; "
                        "--base shapes with its own scorers and prompts needs none") from None
