"""The comparison: every method from the same start, on four rewards, measured against the exact optimum.

    python experiments/compare.py --experiment tilt                       # once: 256 samples a prompt of the base
    python experiments/compare.py --reward aesthetic                      # the compared methods on one reward, 3 seeds
    python experiments/compare.py --experiment tune compare ablate beta   # all of it
    python experiments/tables.py                                          # tables and plots of the rows there are

A trial is one fine-tuning. Its cost is counted in objects whose reward the training asks for ("evaluations", each in
`views` pictures). Marks are numbers of evaluations: at the end of the epoch that reaches one the model is measured,
which makes one row of experiments/results/compare.jsonl. A row that is there is not made again, an interrupted trial
goes on from its last mark, and what another process is making is left to it: the command can be given twice at once
(with OMP_NUM_THREADS=1 each). All trials of a seed draw their prompts from the same permutations, and all measurements
have the same noise and views.

Experiments:

    tilt      samples of the untouched base; with weights exp(beta r) they are the optimum for every beta (tilt.py)
    tune      three strengths of every method, how hard it pulls: trained on three quarters of the training prompts,
              measured on 24 others, 2 objects each
    compare   of every method the strength that the sweep chose (tables.chosen), on 24 unseen prompts, 4 objects each,
              with three seeds
    ablate    one change each of the settings of "per sample", measured alike, one seed
    beta      per sample without a time weight, for three small betas, on the prompts and with the views that are
              measured: where does it end, and is that where the exact tilt is? And what could hold it back

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
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

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

ROWS, WORK = ROOT / "experiments/results/compare.jsonl", ROOT / "runs/compare"
REWARDS = ["aesthetic", "hpsv2", "normal", "dnc"]
PROMPTS = 24                    # what a trial is measured on: so many prompts, of the three kinds in turn,
SAMPLES = {True: 4, False: 2}   # and so many objects of each, of unseen prompts and in the sweep
DRAWS = 64                      # such sets of objects make the draw of the exact tilt: 256 of every prompt

# ---- The settings that are compared: by name, what differs from r2d3.py's defaults for the embedded base -------------

# How strongly a method pulls is one number: beta for those that know it, in standard deviations of the reward within a
# prompt, and the learning rate for those that climb until they are stopped. Every method has three to choose from.
BETAS = [{"beta": "5sd"}, {"beta": "15sd"}, {"beta": "45sd"}]
CLIMB = [{"lr": 2e-4}, {"lr": 5e-4}, {"lr": 1e-3}]
# Under the paper's recipe beta is not what holds the reward back: its lambda is at most levels more than fifty times
# k^2, the weight of the match. So the recipe is tried as it is published, and with two smaller lambdas.
LAMBDAS = [{"beta": "15sd"}, {"beta": "15sd", "reg_weight": 30.0}, {"beta": "15sd", "reg_weight": 1.0}]

#         name               settings                                 strengths  marks (evaluations)
METHODS = {
    "per sample":          ({"method": "nabla"},                       BETAS, [16, 64]),
    "the paper's recipe":  ({"method": "nabla", "recipe": "paper"},    LAMBDAS, [192, 384]),
    "ReFL":                ({"method": "refl", "batch_size": 2},       CLIMB, [8, 24, 64]),
    "DRaFT":               ({"method": "draft", "batch_size": 2},      CLIMB, [8, 24, 64]),
    "DDPO":                ({"method": "ddpo"},                        CLIMB, [64, 128]),
}
#         name                                        a change of "per sample" (at the strength that the sweep chose)
ABLATIONS = {
    "as compared":                                    {},
    "reward asked at every step (E7)":                {"estimator": "step"},
    "no Jacobian (identity)":                         {"estimator": "identity"},
    "matching kl":                                    {"matching": "kl"},
    "matching score (E4)":                            {"matching": "score"},
    "w(s) = 1 (no time weight)":                      {"time_weight": "none"},
    "w(s) = alpha":                                   {"time_weight": "linear"},
    "last step never":                                {"last_step": "never"},
    "lambda 0 (no regulariser)":                      {"reg_weight": 0.0},
    "fraction 1":                                     {"fraction": 1.0},
    "reward gradient at every level":                 {"skip_below": 0.0},
    "four views":                                     {"views": 4},
}
# What theory says about the end of training (tests/test_beta.py): w = 1, the Jacobian kept, every level asked,
# nothing that holds back; the reward from the very views that are measured.
EXACT = {"method": "nabla", "time_weight": "none", "skip_below": 0.0, "reg_weight": 0.0, "branch": "guided", "lr": 5e-4,
         "views": 4, "view_size": 64, "elevation_jitter": 0.0, "azimuth_jitter": 0.0}
SMALL_BETAS = {f"beta {beta}": ({"beta": beta}, [64, 128, 256, 512, 1024]) for beta in ("0.5sd", "1sd", "2sd")}
# And what could hold it back, one change each. E7 asks for twelve times as many rewards for as many updates.
SMALL_BETAS |= {
    "beta 1sd, lr 1e-3":         ({"beta": "1sd", "lr": 1e-3}, [64, 128, 256]),
    "beta 1sd, LoRA of rank 64": ({"beta": "1sd", "lora_rank": 64}, [64, 128, 256]),
    "beta 1sd, fraction 1":      ({"beta": "1sd", "fraction": 1.0}, [64, 128, 256]),
    "beta 1sd, E7":              ({"beta": "1sd", "estimator": "step"}, [768, 1536, 3072]),
}


class Trial(dict):
    """One fine-tuning: experiment, name, reward, settings (seed included). Its marks are not part of what it is."""

    def __init__(self, experiment: str, name: str, reward: str, settings: dict, marks: list[int]):
        super().__init__(experiment=experiment, name=name, reward=reward, settings=settings)
        self.marks = marks


def trials(experiment: str, reward: str, seeds: list[int], known: list[dict]) -> list[Trial]:
    """All trials of an experiment; `known` rows of the sweep say which strength of a method is compared."""
    if experiment == "tune":
        return [Trial("tune", name, reward, {**settings, **strength, "seed": 0}, marks)
                for name, (settings, strengths, marks) in METHODS.items() for strength in strengths]
    if experiment == "beta":
        return [Trial("beta", name, reward, {**EXACT, **change, "seed": 0}, marks)
                for name, (change, marks) in SMALL_BETAS.items()]
    picked = {name: tables.chosen(known, reward, name) for name in METHODS}
    picked = {name: settings for name, settings in picked.items() if settings}
    if experiment == "compare":
        return [Trial("compare", name, reward, {**settings, "seed": seed}, METHODS[name][2])
                for seed in seeds for name, settings in picked.items()]
    return [Trial("ablate", name, reward, {**picked["per sample"], **change, "seed": 0},
                  [64, 192, 384] if "step" in change.values() else [64])       # in 384 E7 makes 64 updates too
            for name, change in ABLATIONS.items() if "per sample" in picked]


# ---- What a trial is measured with -----------------------------------------------------------------------------------


class World:
    """The base, the prompts, and the untouched base's measurements, with which every trial is compared.

    `unseen`: train on the training prompts, measure on the test prompts; else split the training prompts for both.
    """

    def __init__(self, unseen: bool, work: Path = WORK, samples: int | None = None, **settings):
        self.unseen, self.work = unseen, work
        self.config = r2d3.resolve(r2d3.Config(samples_per_prompt=samples or SAMPLES[unseen], device="cpu", **settings))
        self.base = r2d3.load_base(self.config, "cpu")
        self.config = dataclasses.replace(self.config, guidance=self.base.guidance)
        self.weights = tables.base_hash()
        self.rewards = {name: r2d3.load_reward(name, self.base, "cpu") for name in REWARDS}
        self.schedule = self.base.schedule(self.config.sampler, self.config.steps)
        self.features = metrics.load_features(self.base.tower, "cpu")
        self.prompts, test = (r2d3.load_prompts(spec) for spec in (self.config.prompts, self.config.test_prompts))
        groups = [self.prompts[n:n + 3] for n in range(0, len(self.prompts), 3)]       # closed, open, hard
        held_out = [prompt for group in groups[::4] for prompt in group]
        if not unseen:
            self.prompts = [prompt for prompt in self.prompts if prompt not in held_out]
        self.measured = (test if unseen else held_out)[:PROMPTS]
        work.mkdir(parents=True, exist_ok=True)
        self.before, self.reference = self.untouched(0), self.untouched(1)
        _, several = self.untouched(2, held_out[:PROMPTS], 8)           # one unit for all trials, whatever measures them
        self.spread = {name: values.std(1).mean().item() for name, values in several.items()}
        # Histograms need many objects. These are the first of the exact tilt's draw; the sweep makes do with few.
        many = [self.untouched(3 + n)[0].features for n in range(16 if unseen and samples is None else 1)]
        self.prior_open = histograms(named_open(self, torch.cat(many, 1)), equal(torch.cat(many, 1)))

    def untouched(self, seed: int, prompts: list[str] | None = None, samples: int | None = None
                  ) -> tuple[metrics.Measurement, dict[str, Tensor]]:
        """The base's own measurement, kept between runs under the name of everything that it depends on."""
        prompts, samples = prompts or self.measured, samples or self.config.samples_per_prompt
        config = dataclasses.replace(self.config, prompts="", test_prompts="", out="")       # paths
        what = repr((config, prompts, samples, self.weights, metrics.Measurement._fields, REWARDS))
        path = self.work / f"base-{hashlib.sha256(what.encode()).hexdigest()[:16]}-{seed}.pt"
        if path.is_file():
            measurement, rewards = torch.load(path, weights_only=True)
            return metrics.Measurement(**measurement), rewards
        measurement, rewards = self.measure(seed, prompts, samples)
        write_atomic(path, to_bytes(partial(torch.save, (measurement._asdict(), rewards))))
        return measurement, rewards

    def measure(self, seed: int, prompts: list[str] | None = None, samples: int | None = None
                ) -> tuple[metrics.Measurement, dict[str, Tensor]]:
        """What r2d3.measure measures, and all four rewards (P, S) of the same objects."""
        seen = {name: [] for name in REWARDS}

        def all_rewards(pictures: r2d3.Render, prompts: list[str]) -> Tensor:
            for name, reward in self.rewards.items():
                seen[name].append(reward(pictures, prompts).mean(1))
            return torch.zeros(len(prompts), 1)

        config = dataclasses.replace(self.config, samples_per_prompt=samples or self.config.samples_per_prompt)
        measured = r2d3.measure(self.base, all_rewards, self.features, self.schedule, prompts or self.measured, config,
                                seed, "measuring")
        return measured, {name: torch.cat(parts).view(measured.reward.shape) for name, parts in seen.items()}

    @torch.no_grad()
    def path_kl(self, samples: int = 2) -> list[float]:
        """KL divergence of the fine-tuned sampler from the untouched one, step by step: nats, means over objects.

        Both take Gaussian steps of the same std, so step i adds |mean - mean_ref|^2 / (2 std^2), along trajectories of
        the fine-tuned sampler. The sum over all steps bounds the KL divergence of what is sampled from above.
        """
        base, schedule, null, guidance = self.base, self.schedule, self.base.encode([""]), self.config.guidance
        named = [prompt for prompt in self.measured for _ in range(samples)]
        generators = [r2d3.seeded("kl", n) for n in range(len(named))]
        total = torch.zeros(len(schedule))
        for start in range(0, len(named), self.config.eval_batch):
            rows = slice(start, start + self.config.eval_batch)
            cond = base.encode(named[rows])
            trajectory = r2d3.rollout(base, schedule, cond, null, guidance, generators[rows])
            with base.net.disable_adapter():
                for i in range(len(schedule)):
                    x = trajectory.x[:, i]
                    reference = r2d3.predict_guided(base, x, schedule.t(i).expand(len(x)), cond, null, guidance)
                    mean, std = schedule.transition(x, trajectory.eps[:, i], i)
                    total[i] += ((mean - schedule.transition(x, reference, i)[0]) / std).square().sum() / 2
        return (total / len(named)).tolist()


# ---- Colours and shapes that a prompt leaves open ---------------------------------------------------------------------


def named(world: World, features: Tensor) -> Iterator[tuple[list[make_shapes.Part], list[list[tuple[str, str]]]]]:
    """For every prompt what it says, and what the tower calls the parts of its objects, of features (P, S, V, D)."""
    for prompt, seen in zip(world.measured, features):
        said = make_shapes.parse_caption(prompt)
        yield said, make_shapes.name_features(world.base.tower, seen.mean(1), [said] * len(seen))


def named_open(world: World, features: Tensor) -> list[tuple[int, int, int, list[str]]]:
    """How the tower names what the prompts leave open: (prompt, slot, 0 for colour or 1 for shape, name per object).

    features (P, S, V, D): what the tower sees in the objects' pictures.
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
    sets = [world.untouched(3 + n) for n in range(DRAWS)]           # smaller seeds are what trials are compared with
    together = [torch.cat(tensors, 1) for tensors in list(zip(*(measured for measured, _ in sets)))[:-1]]
    joined = metrics.Measurement(*together, latents=sets[0][0].latents)
    rewards = {name: torch.cat([each[name] for _, each in sets], 1) for name in REWARDS}
    names = named_open(world, joined.features)
    kinds = [[str(parts) for parts in objects] for _, objects in named(world, joined.features)]
    own = histograms(names, equal(joined.features))
    rows = []
    for name in REWARDS:
        within = share_within(kinds, rewards[name])
        curve = tilt.optimum(joined._replace(reward=rewards[name]), world.reference[0])
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
                         "samples_per_prompt": joined.reward.shape[1], "spread": world.spread[name]})
    return rows


def run(world: World, trial: Trial, about: dict, rows: Path, wait: bool = False) -> None:
    """One trial: train with its settings, measure at every mark, append the rows that are not there yet."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    config, reward = configured(world, trial), world.rewards[trial["reward"]]
    prompts = world.measured if trial["experiment"] == "beta" else world.prompts
    what = {**trial, "base": world.weights, "identity": identity(config, prompts, world.measured)}
    path = world.work / f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]}.pt"
    with held(path.with_suffix(".lock"), wait) as ours:
        done = [row for row in tables.read(rows) if what.items() <= row.items()]
        marks = sorted({*trial.marks} - {row["mark"] for row in done})
        if not ours or not marks or any(row.get("diverged") for row in done):
            return
        judge = r2d3.make_judge(world.base, reward, views=config.views, view_size=config.view_size,
                                elevation_jitter=config.elevation_jitter, azimuth_jitter=config.azimuth_jitter)
        job = r2d3.Job(world.base, judge, world.schedule, world.base.encode([""]), config)
        try:
            optimizer = r2d3.start_lora(job)
            state = {"epoch": 0, "judged": 0, "updates": 0, "seconds": 0.0, "history": {}}
            saved = torch.load(path, weights_only=True) if path.is_file() else {"judged": math.inf}
            if saved["judged"] < marks[0]:                          # else there are new marks before it: from the start
                state = saved
                set_peft_model_state_dict(world.base.net, state.pop("lora"))
                optimizer.load_state_dict(state.pop("optimizer"))
            for mark in marks:
                diverged = train_to(mark, job, prompts, optimizer, state)
                row = {**what, "mark": mark, **about, "samples_per_prompt": world.config.samples_per_prompt,
                       "beta": config.beta, "judged": state["judged"], "updates": state["updates"],
                       "train_seconds": round(state["seconds"], 1), "spread": world.spread[trial["reward"]]}
                row |= {"diverged": diverged} if diverged else measured_row(world, trial["reward"])
                append(rows, [row])
                if "diverged" in row:
                    return
                networks = {"lora": get_peft_model_state_dict(world.base.net), "optimizer": optimizer.state_dict()}
                write_atomic(path, to_bytes(partial(torch.save, state | networks)))
                print(f"{trial['experiment']} {trial['reward']} {trial['name']} {trial['settings']}: "
                      f"{state['judged']} judged, {state['seconds']:.0f} s, {row['kl']:.2f} nats  "
                      + " ".join(f"{name} {change:+.3f}" for name, change in row["change"].items()), flush=True)
        finally:
            world.base.net = world.base.net.unload()


def configured(world: World, trial: Trial) -> r2d3.Config:
    """The trial's Config; beta in standard deviations becomes a number."""
    config = r2d3.resolve(r2d3.Config(device="cpu", out=str(world.work), reward=trial["reward"], **trial["settings"]))
    beta = config.beta
    if isinstance(beta, str):
        beta = float(beta.removesuffix("sd")) / world.spread[trial["reward"]]
    return dataclasses.replace(config, guidance=config.guidance or world.base.guidance, beta=beta)


def identity(config: r2d3.Config, *prompts: list[str]) -> str:
    """A hash of all settings that training depends on, presets included, and of the prompts."""
    free = ("out", "epochs", "resume", "prompts", "test_prompts", "eval_batch", "eval_prompts", "samples_per_prompt")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    return hashlib.sha256(repr((settings, prompts)).encode()).hexdigest()[:12]


def train_to(mark: int, job: r2d3.Job, prompts: list[str], optimizer: torch.optim.Optimizer, state: dict) -> str | None:
    """Train until so many objects have been judged; `state` counts. Returns what diverged, or None."""
    while state["judged"] < mark:
        started = time.perf_counter()
        try:
            for row in r2d3.train_epoch(job, prompts, optimizer, state["epoch"], state["history"]):
                state["judged"] += row["judged"]
                state["updates"] += 1
        except r2d3.UserError as error:
            if "not finite" not in str(error):
                raise
            return str(error)
        state["epoch"] += 1
        state["seconds"] += time.perf_counter() - started
    return None


def measured_row(world: World, reward: str) -> dict:
    """What changed from the untouched base to the network as it is now, on the same noise."""
    after, rewards = world.measure(0)
    before, base_rewards = world.before
    reference, reference_rewards = world.reference
    result = metrics.compare(before._replace(reward=base_rewards[reward]), after._replace(reward=rewards[reward]),
                             reference._replace(reward=reference_rewards[reward]))
    # Histograms as with FID: how far from another draw of the base, and what of that is only chance ("before").
    own, now = (histograms(named_open(world, m.features), equal(m.features)) for m in (before, after))
    floor, far = moved(own, world.prior_open), moved(now, world.prior_open)
    change = {name: result[name]["change"] for name in tables.METRICS if name in result}
    change |= {f"reward_{name}": (rewards[name] - base_rewards[name]).mean().item() for name in REWARDS}
    change |= {name: far[name] - floor[name] for name in far}
    steps, levels = world.path_kl(), {name: result[name]["before"] for name in tables.METRICS if name in result}
    if any(value is None or not math.isfinite(value) for value in (*change.values(), *steps)):
        return {"diverged": "not finite when measured"}
    return {"kl": sum(steps), "kl_but_last": sum(steps[:-1]), "change": change, "before": levels | floor, "open": now}


def append(rows: Path, new: list[dict]) -> None:
    commit = report.git_commit()
    rows.parent.mkdir(parents=True, exist_ok=True)
    with open(rows, "ab", buffering=0) as file:             # in one go: another process may be reading
        file.write("".join(json.dumps(row | {"commit": commit}) + "\n" for row in new).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experiment", nargs="+", default=["compare"],
                        choices=["tilt", "tune", "compare", "ablate", "beta"])
    parser.add_argument("--reward", nargs="+", default=REWARDS, choices=REWARDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the comparison")
    parser.add_argument("--only", help="only trials whose name holds this word")
    parser.add_argument("--rows", type=Path, default=ROWS, help="where the rows are; another file begins anew")
    args = parser.parse_args()
    about, worlds = {"cmd": shlex.join(["python", *sys.argv])}, {}
    for experiment in args.experiment:
        unseen = experiment != "tune"
        world = worlds[unseen] = worlds.get(unseen) or World(unseen)
        if experiment == "tilt":
            with held(WORK / "tilt.lock", wait=True):
                if not any(row["experiment"] == "tilt" for row in tables.read(args.rows, world.weights)):
                    append(args.rows, exact_tilt(world, about))
            continue
        for wait in (False, True):              # first what nobody makes; then what others began, until all are done
            for reward in args.reward:
                for trial in trials(experiment, reward, args.seeds, tables.read(args.rows, world.weights)):
                    if not args.only or args.only in trial["name"]:
                        run(world, trial, about, args.rows, wait)


if __name__ == "__main__":
    main()
