"""What r2d3.py stands on and what is not the method. These files import kernels at most, never r2d3:

    shapes.py     the embedded base: its networks and how its file is read (experiments/make_shapes.py makes it)
    published.py  the published bases: where they are, how they are read, their text encoders
    scorers.py    the published 2D models that judge pictures
    metrics.py    what evaluations measure
    report.py     the page and the pictures that a run leaves
    run.py        prompt files, reward files, LoRAs, checkpoints; how processes share work
    cli.py        the command line, made from the Config's source

This file holds what all of them share: errors that people can mend, and files that are never half written.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor


class UserError(ValueError):
    """Something the caller can mend: printed as one sentence, exit code 2, no traceback."""


def write_atomic(path: Path, content: bytes | str) -> None:
    """All of the new file or all of the old one, also after kill -9, on a full disk or in a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
        raise UserError(f"the weights {path} cannot be read, is the file complete? ({error})") from None


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
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if "gated" in why.lower():                              # huggingface_hub's word, and transformers'
            raise UserError(f"{what} needs a licence: agree to it on the model's page on the Hugging Face hub, then run "
                            "hf auth login here") from None
        if local:
            raise UserError(f"{what} in {local} cannot be read ({why}); is it complete?") from None
        raise UserError(f"{what} could not be fetched or read ({why}); a network is needed once, for {size}; "
                        "--base shapes with its own scorers and prompts needs none") from None
