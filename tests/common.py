"""What several tests call: plug-in bases, and pieces of r2d3.Job with a base, a schedule and prompts given one by one."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

import r2d3
from support import inputs, published

ROOT = Path(__file__).resolve().parents[1]


def plugin(name: str) -> ModuleType:
    """The module bases/NAME.py, the same one that r2d3 loads."""
    return sys.modules[inputs.load_function(f"{ROOT / 'bases' / name}.py:load", "--base", inputs.BASE).__module__]


def shrink_pictures(monkeypatch) -> None:
    """The evaluations of published bases look at pictures of 28 pixels, whose size the tiny CLIPs take."""
    load = published.load

    def smaller(*args):
        parts = load(*args)
        parts["settings"]["eval_size"] = 28
        return parts

    monkeypatch.setattr(published, "load", smaller)


def settings(**given: object) -> r2d3.Config:
    """A Config for pieces that read a few fields of it."""
    return r2d3.Config(**{"device": "cpu", "views": 2, "view_size": 16, **given})


def predict_both(base, x: Tensor, t: Tensor, cond: r2d3.Cond, null: r2d3.Cond, guidance: float):
    """Both halves of classifier-free guidance."""
    return r2d3.Job(base, None, None, null, None).predict(x, t, cond, guidance)


def predict_guided(base, x: Tensor, t: Tensor, cond: r2d3.Cond, null: r2d3.Cond, guidance: float) -> Tensor:
    """The prediction that the sampler uses."""
    return r2d3.guide(*predict_both(base, x, t, cond, null, guidance), guidance)


def halves(base, cond: r2d3.Cond, null: r2d3.Cond, guidance: float) -> Callable:
    """The predict(x, t) that the functions of section 2 take."""
    return partial(predict_both, base, cond=cond, null=null, guidance=guidance)


def rollout(base, schedule, cond: r2d3.Cond, null: r2d3.Cond, guidance: float,
            generators: list[torch.Generator], **options):
    """Trajectories of a base, from noise that the same generators draw first."""
    start = r2d3.noise_like(torch.empty(len(generators), *base.latent_shape, device=base.device), generators)
    return r2d3.rollout(halves(base, cond, null, guidance), schedule, start, generators, guidance=guidance, **options)


def make_judge(base, reward, **given: object) -> Callable:
    """judge(x0, prompts, generators) of a base and a reward."""
    return r2d3.Job(base, reward, None, None, settings(**given)).judge


def measure(base, reward, features, schedule, prompts: list[str], config, seed: int, label: str, rank: int = 0,
            world: int = 1):
    """r2d3.measure of a base."""
    job = r2d3.Job(base, reward, schedule, base.encode([""]), config, rank, world)
    return r2d3.measure(job, features, prompts, seed, label)


def diffsplat(net, vae, text, device: str = "cpu", **settings: object) -> r2d3.DiffSplat:
    """A DiffSplat of these networks; `settings` are what shapes.load and published.load would say of them."""
    usual = {"guidance": 1.0, "betas": {}, "latent_mean": torch.zeros(1), "latent_std": torch.ones(1),
             "scale_range": (0.1, 0.2), "depth_scale": 1.0, "half_image_shift": False, "eval_size": 16, "lora_targets": []}
    return r2d3.DiffSplat(net, vae, text, usual | settings, device)
