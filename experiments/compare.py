"""The comparison: every method from the same start, on four rewards, measured against the exact optimum.

    python experiments/compare.py --experiment tilt dial        # once: the exact optimum; the unit of beta
    python experiments/compare.py --experiment sweep            # every method's strengths, one seed
    python experiments/compare.py --experiment compare          # what the sweep chose, three seeds
    python experiments/compare.py --experiment ablate           # one change each
    python experiments/tables.py                                # tables and plots of the rows there are

A trial is one fine-tuning. Its cost is counted in objects whose reward the training asks for ("rewards asked", each in
`views` pictures). Marks are numbers of rewards asked: at the end of the epoch that reaches one, the LoRA is kept. What
is measured of it is a row of experiments/results/compare.jsonl: on which prompts, and at which scale of the LoRA (its
half, its quarter: a dial that needs no training). A row that is there is not made again, an interrupted trial goes on
from its last mark, and what another process is making is left to it. --jobs N starts N such processes, on one GPU or
on as many cores. All trials of a seed draw their prompts from the same permutations, all measurements have the same
noise and views.

Experiments:

    tilt      samples of the untouched base; with weights exp(beta r) they are the optimum for every beta (tilt.py)
    dial      how far a beta of 1 moves the target, in units of eps, for every reward, estimator and matching
    sweep     strengths of every method over decades, one seed, measured on 24 prompts that are used for nothing else
    scales    of every method the largest strength of the sweep, its LoRA turned down: methods at equal gain
    compare   of every method the strength that the sweep chose (tables.chosen), on 24 other prompts, three seeds
    ablate    one change each of what the sweep chose, one seed, on the same prompts as the comparison
    beta      w = 1 and lambda 0, for three small betas, trained on the prompts and views that are measured: where does
              it end, and is that where the exact tilt is? And what could hold it back

E4, E7 and the like are the formulas at the head of r2d3.py; what a setting means is said at its Config.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import make_shapes
import r2d3
import tables
import tilt
from support import metrics, report, to_bytes, write_atomic

ROWS = ROOT / "experiments/results/compare.jsonl"
WORK = ROOT / "runs/compare"
REWARDS = ["aesthetic", "hpsv2", "normal", "dnc"]
PROMPTS = 24        # a trial is measured on so many unseen prompts, of the three kinds in turn,
SAMPLES = 4         # and so many objects of each
DRAWS = 64          # such sets of objects make the draw of the exact tilt: 256 of every prompt
OPEN_DRAWS = 4      # and so many the histograms of what prompts leave open

# ---- The settings that are compared ---------------------------------------------------------------------------------
# They are written out, so that rows stay what they are when a default of r2d3.py changes. All that a training depends
# on is listed in DEPENDS: two trials with the same values of these (and the same base and prompts) are the same one.

COMMON = {"sampler": "dpm", "steps": 30, "guidance": 1.0, "views": 2, "view_size": 48, "elevation_jitter": 20.0,
          "azimuth_jitter": 60.0, "batch_size": 16, "updates_per_epoch": 16, "lr": 1e-3, "lora_rank": 8}
DEPENDS = [*COMMON, "reward", "method", "draft_steps", "beta", "reg_weight", "estimator", "matching", "time_weight",
           "fraction", "last_step", "skip_below", "min_quantile", "seed"]
# As published, lambda included, which the recipe takes from the reward.
PAPER = COMMON | {"method": "nabla", "recipe": "paper"}
# Where noise levels weigh alike lambda has to be small: the paper's belongs to a match of scores, k squared as large.
EVEN = PAPER | {"reg_weight": 1.0}
# With E8 a reward is asked for once per object, so levels at which g hardly moves the target may do without it.
ONCE = {"estimator": "sample"}
EVEN_ONCE = EVEN | ONCE | {"skip_below": 0.25}
CLIMB = COMMON | {"batch_size": 2, "updates_per_epoch": 1}


# Rewards asked when a trial is measured; the sweep is measured at the last. E7 asks for a reward at each of the twelve
# steps that are trained of an object, E8 and the climbers once per object, DDPO without a gradient.
MARKS = {"aesthetic": [64], "hpsv2": [64, 192], "normal": [32, 96], "dnc": [32, 96]}


class Method(NamedTuple):
    """What is the same for all strengths; the dial that makes a strength; how many times MARKS it is measured at."""

    settings: dict
    dial: str
    times: int = 1


METHODS = {
    "E8 score": Method(PAPER | ONCE, "beta"),
    "E8 kl": Method(EVEN_ONCE | {"matching": "kl"}, "beta"),
    "E8 eps": Method(EVEN_ONCE | {"matching": "eps"}, "beta"),
    "E7 score (the paper's)": Method(PAPER, "beta", 12),
    "E7 kl": Method(EVEN | {"matching": "kl"}, "beta", 12),
    "E7 eps": Method(EVEN | {"matching": "eps"}, "beta", 12),
    "ReFL": Method(CLIMB | {"method": "refl"}, "lr"),
    "DRaFT": Method(CLIMB | {"method": "draft"}, "lr"),
    "DDPO": Method(COMMON | {"method": "ddpo", "updates_per_epoch": 4, "last_step": "never"}, "lr", 32),
}
# Strengths by method and reward: by factors of ten, then of about three around the best, until the best lies inside
# (tables.chosen says whether it does).
CLIMBS = {"ReFL": [1e-4, 3e-4, 1e-3], "DRaFT": [1e-4, 3e-4, 1e-3]}
STRENGTHS = {
    "aesthetic": {"E8 score": [3e3, 1e4, 3e4, 1e5], "E8 kl": [1e3, 3e3, 1e4], "E8 eps": [1e2, 3e2, 1e3],
                  "E7 score (the paper's)": [1e4, 1e5, 1e6], **CLIMBS},
    "hpsv2": {"E8 score": [1e5, 1e6, 1e7], "E8 kl": [1e3, 1e4, 1e5], "E8 eps": [1e2, 1e3, 1e4],
              "E7 score (the paper's)": [1e5, 1e6, 1e7], **CLIMBS},
    "normal": {"E8 eps": [3e3, 1e4, 3e4], "E8 score": [3e5, 1e6, 3e6], **CLIMBS},
    "dnc": {"E8 eps": [5e2, 1.5e3, 2.5e3, 5e3], "E8 score": [1e5, 3e5, 1e6], **CLIMBS},
}
# What theory says about the end of training (tests/test_beta.py): w = 1, the Jacobian kept, every level asked,
# nothing that holds back; the reward from the very prompts and views that are measured. beta in deviations.
EXACT = EVEN | ONCE | {"matching": "eps", "time_weight": "none", "reg_weight": 0.0, "lr": 5e-4, "views": 4,
                       "view_size": 64, "elevation_jitter": 0.0, "azimuth_jitter": 0.0}
SMALL_BETAS = {f"beta {beta:g}sd": ({}, beta, [64, 128, 256, 512, 1024]) for beta in (0.5, 1, 2)}
# And what could hold it back, one change each. E7 asks for twelve times as many rewards for as many updates.
SMALL_BETAS |= {
    "beta 1sd, lr 1e-3":         ({"lr": 1e-3}, 1, [64, 128, 256]),
    "beta 1sd, LoRA of rank 64": ({"lora_rank": 64}, 1, [64, 128, 256]),
    "beta 1sd, fraction 1":      ({"fraction": 1.0}, 1, [64, 128, 256]),
    "beta 1sd, E7":              ({"estimator": "step"}, 1, [768, 1536, 3072]),
}
SCALES = [1.0, 0.5]             # of the LoRA, at the last mark of what is compared
TURNED_DOWN = [0.6]             # and of every method's largest strength


class Trial(NamedTuple):
    """One fine-tuning; at which rewards asked it is measured, and at the last of them at which scales of the LoRA."""

    experiment: str
    name: str
    reward: str
    settings: dict              # that differ between the trials of a method, and the seed
    config: dict                # of r2d3.Config, all of them
    marks: list[int]
    scales: list[float] = [1.0]

    @property
    def measured_on(self) -> str:
        return "sweep" if self.experiment in ("sweep", "scales") else "unseen"

    def row(self) -> dict:
        return {name: getattr(self, name) for name in ("experiment", "name", "reward", "settings")}


def trials(experiment: str, reward: str, seeds: list[int], known: list[dict]) -> list[Trial]:
    """All trials of an experiment; `known` rows of the sweep say which strength of a method is compared."""
    def trial(name: str, settings: dict, scales: list[float]) -> Trial:
        config = METHODS[name].settings | settings | {"reward": reward}
        marks = [METHODS[name].times * mark for mark in MARKS[reward]]
        marks = marks if experiment == "compare" else marks[-1:]
        return Trial(experiment, name, reward, settings, config, marks, scales)

    if experiment == "sweep":
        return [trial(name, {METHODS[name].dial: strength, "seed": 0}, [1.0])
                for name, strengths in STRENGTHS[reward].items() for strength in strengths]
    if experiment == "scales":
        return [trial(name, {METHODS[name].dial: max(strengths), "seed": 0}, TURNED_DOWN)
                for name, strengths in STRENGTHS[reward].items()]
    if experiment == "beta":
        found = []
        for name, (change, beta, marks) in SMALL_BETAS.items():
            settings = change | {"beta": round(beta / tables.deviation(known, reward), 4), "seed": 0}
            found.append(Trial("beta", name, reward, settings, EXACT | settings | {"reward": reward}, marks))
        return found
    chosen = {name: tables.chosen(known, reward, name) for name in STRENGTHS[reward]}
    if experiment == "compare":
        return [trial(name, choice.settings | {"seed": seed}, SCALES)
                for seed in seeds for name, choice in chosen.items() if choice and choice.inside]
    found = []
    for title, (name, change) in ABLATIONS.items():
        if chosen.get(name):
            one = trial(name, chosen[name].settings | change | {"seed": 0}, [1.0])
            found.append(one._replace(name=title))
    return found


#   name                                     what it is a change of, and the change
ABLATIONS = {
    "E8 score":                                ("E8 score", {}),
    "E8 score, |u| bounded":                   ("E8 score", {"bounded": True}),
    "E8 score, four views":                    ("E8 score", {"views": 4}),
    "E8 score, twice the objects an update":   ("E8 score", {"batch_size": 32}),
    "E8 score, w = 1":                         ("E8 score", {"time_weight": "none"}),
    "E8 score, last step never":               ("E8 score", {"last_step": "never"}),
    "E8 score, lambda 1":                      ("E8 score", {"reg_weight": 1.0}),
    "E8 eps":                                  ("E8 eps", {}),
    "E8 eps, no Jacobian (identity)":          ("E8 eps", {"estimator": "identity"}),
    "E8 eps, w = 1":                           ("E8 eps", {"time_weight": "none"}),
}


# ---- What a trial is measured with ----------------------------------------------------------------------------------


class World:
    """The base, the prompts, and the untouched base's measurements, with which every trial is compared.

    Trials are trained on all training prompts. Test prompts 0 to 23 are what is reported ("unseen"), 24 to 47 are what
    the sweep is measured on ("sweep").
    """

    def __init__(self, work: Path = WORK, device: str = "cpu", samples: int = SAMPLES, **settings):
        self.work = work
        config = r2d3.Config(samples_per_prompt=samples, device=device, **COMMON | settings)
        self.config = r2d3.resolve(config)
        self.base = r2d3.load_base(self.config, device)
        self.weights = tables.base_hash()
        self.rewards = {name: r2d3.load_reward(name, self.base, device) for name in REWARDS}
        self.schedule = self.base.schedule(self.config.sampler, self.config.steps)
        self.null = self.base.encode([""])
        self.features = metrics.load_features(self.base.tower, device)
        self.prompts, self.measured = self.load_prompts(self.config)
        work.mkdir(parents=True, exist_ok=True)
        # Now, while there is no LoRA on the base.
        self.before = {which: self.untouched(0, which) for which in self.measured}
        self.reference = {which: self.untouched(1, which)[0] for which in self.measured}
        many = torch.cat([self.untouched(3 + n, "unseen")[0].features for n in range(OPEN_DRAWS)], 1)
        self.prior_open = histograms(named_open(self, many), equal(many))

    @staticmethod
    def load_prompts(config: r2d3.Config) -> tuple[list[str], dict[str, list[str]]]:
        test = r2d3.inputs.load_prompts(config.test_prompts)
        return r2d3.inputs.load_prompts(config.prompts), {"unseen": test[:PROMPTS], "sweep": test[PROMPTS:2 * PROMPTS]}

    def untouched(self, seed: int, which: str) -> tuple[metrics.Measurement, dict[str, Tensor]]:
        """The base's own measurement, kept between runs under the name of everything that it depends on."""
        prompts, samples = self.measured[which], self.config.samples_per_prompt
        what = repr((prompts, samples, self.weights, COMMON, self.config.steps, REWARDS, metrics.Measurement._fields))
        path = self.work / f"base-{hashlib.sha256(what.encode()).hexdigest()[:16]}-{seed}.pt"
        if path.is_file():
            measurement, rewards = torch.load(path, weights_only=True)
            return metrics.Measurement(**measurement), rewards
        measurement, rewards = self.measure(seed, which)
        write_atomic(path, to_bytes(partial(torch.save, (measurement._asdict(), rewards))))
        return measurement, rewards

    def job(self, reward: r2d3.Reward | None = None) -> r2d3.Job:
        """What r2d3's functions want of this world; `reward` judges, None where nothing is judged."""
        return r2d3.Job(self.base, reward, self.schedule, self.null, self.config)

    def measure(self, seed: int, which: str) -> tuple[metrics.Measurement, dict[str, Tensor]]:
        """What r2d3.measure measures; of the same objects all four rewards (P, S), and which share of hues is right."""
        seen = {name: [] for name in (*REWARDS, "hues")}

        def all_rewards(pictures: r2d3.Render, prompts: list[str]) -> Tensor:
            for name, reward in self.rewards.items():
                seen[name].append(reward(pictures, prompts).mean(1))
            seen["hues"].append(hues_right(pictures, prompts))
            return torch.zeros(len(prompts), 1)

        measured = r2d3.measure(self.job(all_rewards), self.features, self.measured[which], seed, "measuring")
        shape = measured.reward.shape
        return measured, {name: torch.cat(parts).view(shape).cpu() for name, parts in seen.items()}

    @torch.no_grad()
    def path_kl(self) -> list[float]:
        """KL divergence of the fine-tuned sampler from the untouched one, step by step: nats, means over objects.

        Both take Gaussian steps of the same std, so step i adds |mean - mean_ref|^2 / (2 std^2), along trajectories of
        the fine-tuned sampler, one of every unseen prompt. The sum over all steps bounds the KL divergence of what is
        sampled from above.
        """
        base, schedule, job = self.base, self.schedule, self.job()
        prompts = self.measured["unseen"]
        cond = base.encode(prompts)
        generators = [r2d3.seeded("kl", n) for n in range(len(prompts))]
        trajectory = job.rollout(prompts, generators)
        total = []
        with base.net.disable_adapter():
            for i in range(len(schedule)):
                x = trajectory.x[:, i]
                t = schedule.t(i).expand(len(x))
                reference = job.predict_guided(x, t, cond)
                mean, std = schedule.transition(x, trajectory.eps[:, i], i)
                moved = (mean - schedule.transition(x, reference, i)[0]) / std
                total.append(moved.square().sum().item() / 2 / len(prompts))
        return total


# ---- What the objects are: by their hues, and by what the tower calls them ------------------------------------------

LEAST_SATURATION = 0.12     # below it a pixel is gray: named colours have 0.35 and more, gray at most 0.04
LEAST_SHARE = 1 / 3         # of an equal part of the object's pixels that a named colour needs to count as there


def hues_right(pictures: r2d3.Render, prompts: list[str]) -> Tensor:
    """Of the colours that a prompt names, the share that is there: (B,), 1 where it names none.

    A judge without a network, which nothing was trained against: the pixels of the object, each of the nearest hue.
    """
    image = pictures.image.movedim(2, -1)                                               # (B, V, H, W, 3)
    most, least = image.amax(-1), image.amin(-1)
    red, green, blue = image.unbind(-1)
    angle = torch.rad2deg(torch.atan2(3 ** 0.5 * (green - blue), 2 * red - green - blue))
    hues = torch.tensor([hue for hue in make_shapes.HUES.values() if hue is not None], device=image.device)
    far = ((angle[..., None] - hues + 180) % 360 - 180).abs()                           # (B, V, H, W, hues)
    gray = most - least < LEAST_SATURATION * most
    kinds = torch.where(gray, len(hues), far.argmin(-1))                                # gray is the last of HUES
    shown = pictures.alpha[:, :, 0] > 0.5
    right = []
    for prompt, kind, inside in zip(prompts, kinds, shown):
        parts = make_shapes.parse_caption(prompt)
        share = torch.bincount(kind[inside], minlength=len(make_shapes.HUES)) / inside.sum().clamp(min=1)
        share = dict(zip(make_shapes.HUES, share.tolist()))
        said = [color for _, color, _ in parts if color]
        there = [share[color] >= LEAST_SHARE * said.count(color) / len(parts) for color in said]
        right.append(sum(there) / len(there) if there else 1.0)
    return torch.tensor(right)


Named = list[tuple[list[make_shapes.Part], list[list[tuple[str, str]]]]]


def named(world: World, features: Tensor, which: str = "unseen") -> Named:
    """For every prompt what it says, and what the tower calls the parts of its objects, of features (P, S, V, D)."""
    found = []
    for prompt, seen in zip(world.measured[which], features.to(world.base.device)):
        said = make_shapes.parse_caption(prompt)
        found.append((said, make_shapes.name_features(world.base.tower, seen.mean(1), [said] * len(seen))))
    return found


def named_right(names: Named) -> list[float]:
    """Share of the parts that are what their prompt says, by prompt."""
    return [make_shapes.named_right(objects, [said] * len(objects)) for said, objects in names]


def named_open(world: World, features: Tensor) -> list[tuple[int, int, int, list[str]]]:
    """How the tower names what the unseen prompts leave open: (prompt, slot, 0 for colour or 1 for shape, name per
    object). features (P, S, V, D): what the tower sees in the objects' pictures.
    """
    found = []
    for n, (said, names) in enumerate(named(world, features)):
        found += [(n, slot, which, [pairs[slot][which] for pairs in names])
                  for slot, part in enumerate(said) for which in (0, 1) if not part[1 + which]]
    return found


def histograms(names: list[tuple[int, int, int, list[str]]], weights: Tensor) -> list[dict[str, float]]:
    """Of colours and of shapes that prompts leave open: each slot counts the same, its objects by weights (P, S)."""
    result = []
    for which, among in ((0, list(make_shapes.HUES)), (1, make_shapes.SHAPES)):
        slots = [(n, labels) for n, _, kind, labels in names if kind == which]
        rows = torch.stack([weights[n] for n, _ in slots]) if slots else weights[:0]
        result.append(tilt.weighted_histogram([labels for _, labels in slots], rows, among))
    return result


def share_within(names: list[list[str]], rewards: Tensor) -> float:
    """Of the variance of rewards (P, S) within a prompt, the share among objects of the same name.

    The rest is between kinds of objects, such as red and orange cubes: a gradient of the reward at the one does not
    know the other. Objects whose name no other one of their prompt has are left out. Names are the tower's, its errors
    included, and do not tell sizes.
    """
    within = whole = 0.0
    for own, values in zip(names, rewards.double()):
        groups = [values[[name == kind for name in own]] for kind in {*own}]
        groups = [group for group in groups if len(group) > 1]
        if groups:
            count = sum(map(len, groups))
            within += sum(len(group) * group.var().item() for group in groups) / count
            whole += torch.cat(groups).var().item()
    return within / whole if whole else math.nan


def moved(some: list[dict[str, float]], others: list[dict[str, float]]) -> dict[str, float]:
    """Total variation between two pairs of histograms."""
    return {f"open_{name}": tilt.total_variation(a, b) for name, a, b in zip(("colors", "shapes"), some, others)}


def equal(features: Tensor) -> Tensor:
    """Equal weights (P, S)."""
    return torch.full(features.shape[:2], 1 / features.shape[1], dtype=torch.float64)


# ---- Running --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(path: Path, wait: bool) -> Iterator[bool]:
    """Whether this process alone has the lock `path`; with `wait` it comes when another lets it go."""
    with open(path, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def exact_tilt(world: World, about: dict) -> list[dict]:
    """The optimum's curve for every reward, as rows."""
    sets = [world.untouched(3 + n, "unseen") for n in range(DRAWS)]     # smaller seeds: what trials are compared with
    reference = world.reference["unseen"]
    together = [torch.cat(tensors, 1) for tensors in list(zip(*(measured for measured, _ in sets)))[:-1]]
    joined = metrics.Measurement(*together, latents=sets[0][0].latents)
    rewards = {name: torch.cat([each[name] for _, each in sets], 1) for name in REWARDS}
    names = named_open(world, joined.features)
    kinds = [[str(parts) for parts in objects] for _, objects in named(world, joined.features)]
    own = histograms(names, equal(joined.features))
    rows = []
    for name in REWARDS:
        within = share_within(kinds, rewards[name])
        curve = tilt.optimum(joined._replace(reward=rewards[name]), reference)
        for point in curve:
            weights = tilt.tilt_weights(rewards[name], point["beta"])
            change = {key: point[key] - curve[0][key] for key in ("reward", "alignment", "retrieved", "coverage", "dnc",
                                                                  "diversity")}
            change |= {f"reward_{other}": (weights * (rewards[other] - rewards[other].mean(1, keepdim=True))).sum(1)
                       .mean().item() for other in REWARDS}
            change["fid_to_base"] = point["fid_to_base"] - point["fid_by_chance"]
            by_chance = [moved(histograms(names, other), own) for other in tilt.shuffled(weights)]
            for key, value in moved(histograms(names, weights), own).items():
                change[key] = value - sum(one[key] for one in by_chance) / len(by_chance)
            rows.append({"experiment": "tilt", "reward": name, "base": world.weights, **about, "beta": point["beta"],
                         "kl": point["kl"], "effective": point["effective"], "change": change,
                         "share_within": within,
                         "samples_per_prompt": joined.reward.shape[1], "spread": rewards[name].std(1).mean().item()})
    return rows


def configured(world: World, trial: Trial) -> r2d3.Config:
    settings = {name: value for name, value in trial.config.items() if name != "bounded"}
    config = r2d3.Config(device=world.config.device, out=str(world.work), **settings)
    return r2d3.resolve(config)


def identity(world: World, trial: Trial) -> str:
    """A hash of all that a training depends on: the settings that are listed, base and prompts; not its marks."""
    config = configured(world, trial)
    settings = {name: getattr(config, name) for name in DEPENDS}
    what = settings, trial.config.get("bounded", False), world.weights, prompts_of(world, trial)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def prompts_of(world: World, trial: Trial) -> list[str]:
    """What a trial is trained on."""
    return world.measured["unseen"] if trial.experiment == "beta" else world.prompts


def dial(world: World, reward: str, estimator: str, about: dict, **changes) -> dict:
    """What a beta of 1 asks of the untouched base: the root mean square of beta w g / k, the way the loss's target is
    away from eps_ref in units of eps, for every matching, which weighs levels by c^2. Of the first epoch's objects and
    steps.
    """
    settings = PAPER | {"reward": reward, "estimator": estimator, "beta": 1.0, "seed": 0} | changes
    trial = Trial("dial", estimator, reward, {"estimator": estimator}, settings, [])
    config = configured(world, trial)
    job = job_of(world, trial, config)
    named = r2d3.draw_prompts(world.prompts, config.batch_size, r2d3.seeded(0, 0, "prompts"))
    pairs = torch.tensor([(n, i) for n in range(config.batch_size)
                          for i in r2d3.pick_steps(config, r2d3.seeded(0, 0, n, "steps"))])
    transitions, _ = r2d3.sample_epoch(job, named, 0, pairs, {})
    squares, found = [], {}
    for rows in torch.arange(len(pairs)).split(config.micro_batch):
        g, _ = r2d3.gradient_of_reward(job, transitions.at(rows))
        squares.append(g.square().flatten(1).mean(1).double().cpu())
    square = torch.cat(squares)
    for matching in ("score", "kl", "eps"):
        c, pull = r2d3.match_weights(world.schedule, pairs[:, 1], beta=1.0, matching=matching, time_weight="squared")
        found[matching] = ((pull ** 2 * square).sum() / (c ** 2).sum()).sqrt().item()
    return {"experiment": "dial", "reward": reward, "name": estimator, "settings": {"seed": 0}, "base": world.weights,
            **about, "target": found}


def run(world: World, trial: Trial, about: dict, rows: Path, wait: bool = False) -> None:
    """One trial: train with its settings to every mark, measure there, append the rows that are not there yet."""
    key = identity(world, trial)
    what = trial.row() | {"identity": key, "base": world.weights}
    with held(world.work / f"{key}.lock", wait) as ours:
        if not ours:
            return
        done = [row for row in tables.read(rows) if what.items() <= row.items()]
        for mark in trial.marks:
            scales = trial.scales if mark == trial.marks[-1] else [1.0]
            there = [row.get("scale") for row in done if row["mark"] == mark]
            missing = [scale for scale in scales if scale not in there]
            if any("diverged" in row for row in done):
                return
            if missing:
                done += one_mark(world, trial, what | {"mark": mark} | about, missing, rows)


def one_mark(world: World, trial: Trial, what: dict, scales: list[float], rows: Path) -> list[dict]:
    """Train to a mark, measure at scales of the LoRA; the rows, which are appended."""
    config = configured(world, trial)
    job = job_of(world, trial, config)
    new = []
    try:
        optimizer = r2d3.start_lora(job)
        state = train_to(what["mark"], world, trial, job, optimizer)
        what |= {"judged": state["judged"], "updates": state["updates"], "train_seconds": round(state["seconds"], 1),
                 "measured_on": trial.measured_on}
        if "diverged" in state:
            new = [what | {"diverged": state["diverged"]}]
        for scale in scales if not new else []:
            with scaled(world.base.net, scale):
                row = what | {"scale": scale} | measured_row(world, trial)
            new.append(row)
            print(f"{trial.experiment} {trial.reward} {trial.name} {trial.settings} x{scale}: {row['judged']} judged, "
                  f"{row['train_seconds']} s  "
                  + " ".join(f"{name} {change:+.4f}" for name, change in row["change"].items()), flush=True)
        append(rows, new)
    finally:
        world.base.net = world.base.net.unload()
    return new


class BoundedJob(r2d3.Job):
    """A run whose rewards have gradients of bounded length with respect to the latents."""

    def judge(self, x0: Tensor, prompts: list[str],
              generators: list[torch.Generator]) -> tuple[Tensor, r2d3.Render]:
        if x0.requires_grad:
            x0 = x0.clone()
            x0.register_hook(bound)
        return super().judge(x0, prompts, generators)


def job_of(world: World, trial: Trial, config: r2d3.Config) -> r2d3.Job:
    """The trial as r2d3 trains it."""
    kind = BoundedJob if trial.config.get("bounded") else r2d3.Job
    return kind(world.base, world.rewards[trial.reward], world.schedule, world.null, config)


def bound(u: Tensor) -> Tensor:
    """Gradients u (B, *latent) of as many objects, none longer than their median."""
    length = u.flatten(1).norm(dim=1)
    return u * r2d3.per_sample((length.median() / length.clamp(min=1e-30)).clamp(max=1), u)


@contextlib.contextmanager
def scaled(net: torch.nn.Module, scale: float) -> Iterator[None]:
    """The network with its LoRA at a share of its strength: its matrices B times `scale`."""
    weights = [weight for name, weight in net.named_parameters() if "lora_B" in name]
    kept = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.data *= scale
    try:
        yield
    finally:
        for weight, own in zip(weights, kept):
            weight.data = own


def train_to(mark: int, world: World, trial: Trial, job: r2d3.Job, optimizer: torch.optim.Optimizer) -> dict:
    """Train until so many objects have been judged, from the last mark that is kept; the state that `job`'s network and
    `optimizer` then have: epoch, judged, updates, seconds, and "diverged" if it did. It is kept for other marks,
    scales and experiments.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    key, net, prompts = identity(world, trial), job.base.net, prompts_of(world, trial)
    state = {"epoch": 0, "judged": 0, "updates": 0, "seconds": 0.0, "history": {}}
    kept = {int(path.stem.split("-")[1]): path for path in world.work.glob(f"{key}-*.pt")}
    if earlier := [number for number in kept if number <= mark]:
        state = torch.load(kept[max(earlier)], weights_only=True, map_location=job.base.device)
        set_peft_model_state_dict(net, state.pop("lora"))
        optimizer.load_state_dict(state.pop("optimizer"))
    trained = state["judged"] < mark
    while state["judged"] < mark:
        started = time.perf_counter()
        try:
            for row in r2d3.train_epoch(job, prompts, optimizer, state["epoch"], state["history"]):
                state["judged"] += row["judged"]
                state["updates"] += 1
        except r2d3.UserError as error:
            if "not finite" not in str(error):
                raise
            return state | {"diverged": str(error)}
        state["epoch"] += 1
        state["seconds"] += time.perf_counter() - started
    if trained:
        networks = {"lora": get_peft_model_state_dict(net), "optimizer": optimizer.state_dict()}
        write_atomic(world.work / f"{key}-{mark}.pt", to_bytes(partial(torch.save, state | networks)))
    return state


BY_PROMPT = ("reward", "alignment", "retrieved", "coverage", "dnc", "diversity", "named", "hues")


def by_prompt(world: World, which: str, reward: str, measured: metrics.Measurement,
              rewards: dict[str, Tensor]) -> dict[str, list[float]]:
    """What is measured of every prompt, means over its objects."""
    values = {name: getattr(measured, name).mean(1) for name in ("alignment", "retrieved", "coverage", "dnc")}
    values |= {"reward": rewards[reward].mean(1), "diversity": metrics.diversity(measured.features),
               "hues": rewards["hues"].mean(1)}
    return {name: value.tolist() for name, value in values.items()} | {
        "named": named_right(named(world, measured.features, which))}


def measured_row(world: World, trial: Trial) -> dict:
    """What changed from the untouched base to the network as it is now, on the same noise: means, and by prompt."""
    which, reward = trial.measured_on, trial.reward
    measured, rewards = world.measure(0, which)
    base, base_rewards = world.before[which]
    far = world.reference[which].fid_features.flatten(0, 2)
    now, own = by_prompt(world, which, reward, measured, rewards), by_prompt(world, which, reward, base, base_rewards)
    moves = {name: [round(a - b, 6) for a, b in zip(now[name], own[name])] for name in BY_PROMPT}
    levels = {name: math.fsum(values) / len(values) for name, values in own.items()}
    levels["fid_to_base"] = metrics.frechet_distance(base.fid_features.flatten(0, 2), far).item()
    change = {name: math.fsum(values) / len(values) for name, values in moves.items()}
    change["fid_to_base"] = metrics.frechet_distance(measured.fid_features.flatten(0, 2), far).item()
    change["fid_to_base"] -= levels["fid_to_base"]
    change |= {f"reward_{name}": (rewards[name] - base_rewards[name]).mean().item() for name in REWARDS}
    row = {"change": change, "before": levels, "by_prompt": moves}
    if which == "unseen":
        # Histograms as with FID: how far from other draws of the base, minus what of that is only chance.
        floor = moved(histograms(named_open(world, base.features), equal(base.features)), world.prior_open)
        change |= {name: value - floor[name] for name, value in moved(
            histograms(named_open(world, measured.features), equal(measured.features)), world.prior_open).items()}
        steps = world.path_kl()
        row |= {"kl": sum(steps), "kl_but_last": sum(steps[:-1])}
    if not all(math.isfinite(value) for value in (*change.values(), row.get("kl", 0.0))):
        return {"diverged": "not finite when measured", "change": {}}
    return row


def append(rows: Path, new: list[dict]) -> None:
    commit = report.git_commit()
    rows.parent.mkdir(parents=True, exist_ok=True)
    with open(rows, "ab", buffering=0) as file:             # in one go: another process may be reading
        file.write("".join(json.dumps(row | {"commit": commit}) + "\n" for row in new).encode())


def work_on(args: argparse.Namespace, about: dict) -> None:
    """Everything that is asked for and that no other process makes; then what others began, until all is there."""
    world = World(device=args.device)
    for experiment in args.experiment:
        if experiment == "tilt":
            with held(WORK / "tilt.lock", wait=True):
                if not any(row["experiment"] == "tilt" for row in tables.read(args.rows, world.weights)):
                    append(args.rows, exact_tilt(world, about))
            continue
        if experiment == "dial":
            known = [(row["reward"], row["name"]) for row in tables.of(tables.read(args.rows, world.weights), "dial")]
            append(args.rows, [dial(world, reward, estimator, about) for reward in args.reward
                               for estimator in ("sample", "step") if (reward, estimator) not in known])
            continue
        for wait in (False, True):
            for reward in args.reward:
                for trial in trials(experiment, reward, args.seeds, tables.read(args.rows, world.weights)):
                    title = f"{trial.name} {tables.strength(trial.settings)}"
                    if not args.only or any(word in title for word in args.only):
                        run(world, trial, about, args.rows, wait)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experiment", nargs="+", default=["compare"],
                        choices=["tilt", "dial", "sweep", "scales", "compare", "ablate", "beta"])
    parser.add_argument("--reward", nargs="+", default=REWARDS, choices=REWARDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the comparison")
    parser.add_argument("--only", nargs="+", help="only trials whose name or strength holds one of these words")
    parser.add_argument("--rows", type=Path, default=ROWS, help="where the rows are; another file begins anew")
    parser.add_argument("--device", default="cpu", help="cpu, or a GPU such as cuda")
    parser.add_argument("--jobs", type=int, default=1, help="trials at once, on one GPU or on as many cores")
    args = parser.parse_args()
    about = {"cmd": shlex.join(["python", *sys.argv])}
    others = []
    if args.jobs > 1:
        torch.set_num_threads(1)
        alone = [*sys.argv, "--jobs", "1"]              # the last --jobs counts
        others = [subprocess.Popen([sys.executable, *alone], env=os.environ | {"OMP_NUM_THREADS": "1"})
                  for _ in range(args.jobs - 1)]
    work_on(args, about)
    if failed := [process for process in others if process.wait()]:
        sys.exit(f"{len(failed)} of {args.jobs} processes failed")


if __name__ == "__main__":
    main()
