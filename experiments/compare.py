"""The paper's comparison: nabla-R2D3, ReFL, DRaFT and DDPO from the same start, judged as they go.

    python experiments/compare.py --reward aesthetic                 # four methods, 3 seeds: 1.4 core-hours
    python experiments/compare.py --reward aesthetic --quick         # one seed, a short budget: 6 minutes; rows of its own
    python experiments/compare.py --experiment tune ablate           # the sweeps behind the settings; the ablations
    python experiments/compare.py --experiment recipe              # --recipe paper beside --recipe fast, 3 seeds
    python experiments/compare.py --table                            # tables of all rows there are, and the plots

A trial is one fine-tuning. Its cost is counted in objects whose reward the update uses ("evaluations"; each in `views`
pictures), and at every mark on that count the model is measured: one row of experiments/results/compare.jsonl. What is there
already is not made again; --rows FILE begins anew. An interrupted trial goes on from its last mark, and what another
process is making is skipped: the command can be given twice at once (with OMP_NUM_THREADS=1 each).

All trials of a seed draw their prompts from the same permutations (an epoch takes as many of one as its batch has), and
all measurements have the same noise and views. The comparison and the ablations are measured on the unseen prompts; the
sweep ("tune") trains on three quarters of the training prompts and is measured on the others; what is compared is
picked from its rows by `chosen`.
"""

import argparse
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
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import r2d3
from support import metrics, to_bytes, write_atomic

METHODS = {"sample": ("nabla-R2D3, per sample", "C0", "o"), "step": ("nabla-R2D3, per step", "C9", "D"),
           "draft": ("DRaFT", "C1", "s"), "refl": ("ReFL", "C2", "^"), "ddpo": ("DDPO", "C7", "x")}     # see kind()
METRICS = {"reward": "reward", "alignment": "alignment", "retrieved": "R@1", "coverage": "coverage", "dnc": "dnc",
           "diversity": "diversity", "fid_to_base": "FID to the base"}
ROWS, WORK = ROOT / "experiments/results/compare.jsonl", ROOT / "runs/compare"

# Settings that are not named here are r2d3.py's defaults for the embedded base, as far as they are not in START.
START = {"beta": 1000.0, "batch_size": 16, "lr": 1e-3, "updates_per_epoch": 16, "skip_below": 0.25, "estimator": "step"}
STEP = START | {"method": "nabla"}                              # the reward is asked at every trained step (E7), our matching
NABLA = STEP | {"estimator": "sample"}                          # once per object (E8): the default
NIMBLE = NABLA | {"batch_size": 2, "lr": 2.5e-4, "updates_per_epoch": 4, "beta": 4000.0}
DRAFT = START | {"method": "draft", "batch_size": 8, "updates_per_epoch": 1}
REFL = START | {"method": "refl", "batch_size": 8, "updates_per_epoch": 1}
DDPO = START | {"method": "ddpo", "updates_per_epoch": 4, "last_step": "never", "ddpo_clip": 1e-2}
# What a label leaves out: the defaults of r2d3.py; per step the same but for the place where the reward is asked.
OWN = {"sample": NABLA, "step": STEP, "draft": DRAFT | {"batch_size": 2, "lr": 2e-4}, "refl": REFL | {"batch_size": 1, "lr": 2e-4},
       "ddpo": DDPO}
MARKS = [4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
BETA = {"aesthetic": 1.0, "hpsv2": 0.25, "dnc": 0.5}  # by the size of the reward's gradient at the late levels
CHOOSE_AT = {"aesthetic": 0.2, "hpsv2": 0.01, "dnc": 0.01}     # the gain at which the sweep's settings are compared
GAINS = {"aesthetic": (0.05, 0.1, 0.15, 0.2, 0.25), "hpsv2": (0.005, 0.01, 0.02), "dnc": (0.005, 0.01, 0.02)}

ABLATIONS = {
    "**the default**": {},
    "reward asked at every step (E7), our matching": {"estimator": "step"},
    "matching score (E4)": {"matching": "score", "skip_below": 0.0},
    "matching score, last step never": {"matching": "score", "skip_below": 0.0, "last_step": "never"},
    "last step stratified": {"last_step": "stratified"},
    "last step never": {"last_step": "never"},
    "guided prediction matched": {"branch": "guided"},
    "lambda 0 (no prior regulariser)": {"reg_weight": 0.0},
    "lambda 10": {"reg_weight": 10.0},
    "w(s) = 1 (no time weight)": {"time_weight": "none"},
    "w(s) = alpha": {"time_weight": "linear"},
    "fraction 0.2": {"fraction": 0.2},
    "fraction 1.0": {"fraction": 1.0},
    "one view": {"views": 1},
    "four views": {"views": 4},
    "reward gradient at every level": {"skip_below": 0.0},
    "4 updates per epoch": {"updates_per_epoch": 4},
    "48 objects and updates per epoch (staler rollouts)": {"batch_size": 48, "updates_per_epoch": 48},
    "guidance 1 in training": {"guidance": 1.0},
    "guidance 4 in training": {"guidance": 4.0},
    "beta 300": {"beta": 300.0},
    "beta 3000": {"beta": 3000.0},
}

STEP_SPEEDS = ((16, 1e-3, 16), (8, 2e-3, 8), (4, 2e-3, 8), (4, 3e-3, 4))        # batch, lr, updates per epoch
SMALL = [8, 16, 32, 64, 128]
DENSE = [4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
OTHER = ({"views": 4}, {"lora_rank": 4}, {"lora_rank": 16})
TUNE = [     # 27 settings of every method (of DDPO 18), seed 0
    *((STEP | {"batch_size": batch, "lr": lr, "updates_per_epoch": updates, "beta": beta},
       [32, 64, 128, 256] if batch == 16 else SMALL)
      for beta in (1000.0, 2000.0, 3000.0) for batch, lr, updates in STEP_SPEEDS),
    *((STEP | {"batch_size": 4, "lr": lr, "updates_per_epoch": 8, "beta": beta, "skip_below": share}, SMALL)
      for share, beta, lr in ((0.6, 1000.0, 2e-3), (0.6, 2000.0, 2e-3), (0.6, 3000.0, 3e-3),
                              (0.8, 1000.0, 2e-3), (0.8, 2000.0, 2e-3), (0.8, 3000.0, 3e-3))),
    *((NIMBLE | {"lr": lr, "beta": beta}, DENSE[2:9]) for lr in (1e-3, 5e-4) for beta in (2000.0, 4000.0)),
    *((NIMBLE | change, DENSE[2:9]) for change in ({"lr": 1e-3, "reg_weight": 10.0}, {"lr": 1e-3, "fraction": 1.0}, {})),
    *((NIMBLE | {"batch_size": 4, "updates_per_epoch": 8, "lr": lr}, DENSE[2:10]) for lr in (5e-4, 2.5e-4)),
    *((start | {"batch_size": batch, "lr": lr}, [16, 32, 64, 128] if batch * 1e-3 / lr > 2 else SMALL[:4])
      for start in (DRAFT, REFL) for batch in (4, 8, 16) for lr in (1e-3, 2e-3, 3e-3)),
    *((start | {"batch_size": batch, "lr": lr}, SMALL[:4])
      for start in (DRAFT, REFL) for batch, lr in ((4, 5e-4), (2, 5e-4), (2, 1e-3), (2, 2e-3))),
    *((DRAFT | change, [32, 64, 128]) for change in ({"lr": 3e-4}, {"draft_steps": 2}, {"draft_steps": 0})),
    *((DRAFT | {"batch_size": 4} | change, SMALL[:4]) for change in ({"draft_steps": 2}, {"draft_steps": 0})),
    *((REFL | {"batch_size": batch, "lr": 3e-4}, [32, 64, 128]) for batch in (4, 8, 16)),
    *((REFL | {"batch_size": 1, "lr": lr}, SMALL[:4]) for lr in (5e-4, 1e-3)),
    *((start | {"batch_size": batch, "lr": lr}, DENSE[4:])
      for start in (DRAFT, REFL) for batch, lr in ((1, 2e-4), (1, 3e-4), (2, 2e-4))),
    *((start | {"batch_size": 2, "lr": 5e-4} | change, DENSE[2:9]) for start in (DRAFT, REFL) for change in OTHER),
    *((start | {"batch_size": 1, "lr": 5e-4, "views": 4}, DENSE[2:9]) for start in (DRAFT, REFL)),
    *((DRAFT | {"batch_size": batch, "lr": lr}, DENSE[2:10]) for batch, lr in ((1, 5e-4), (2, 3e-4))),
    *((REFL | {"batch_size": batch, "lr": lr}, DENSE[4:]) for batch, lr in ((2, 3e-4), (4, 2e-4))),
    *((DDPO | {"lr": lr, "ddpo_clip": clip}, [256]) for lr in (3e-4, 1e-3, 3e-3) for clip in (1e-4, 1e-2, 0.1)),
    *((DDPO | change, [256]) for change in ({"last_step": "always"}, {"updates_per_epoch": 1, "ddpo_clip": 0.1},
                                            {"fraction": 1.0})),
    *((DDPO | {"fraction": 1.0} | change, [256]) for change in (
        {"lr": 3e-3}, {"lr": 3e-3, "ddpo_clip": 0.1}, {"lr": 3e-4}, {"ddpo_clip": 1e-4}, {"batch_size": 32},
        {"updates_per_epoch": 8})),
]
TUNE_OTHERS = [     # three settings of every method that has a gradient, for the other rewards
    *((STEP | {"beta": beta}, [128, 256]) for beta in (300.0, 1000.0, 3000.0)),
    *((start | {"lr": lr}, [64, 128]) for start in (DRAFT, REFL) for lr in (1e-4, 3e-4, 1e-3)),
]


def kind(settings: dict) -> str:
    """The method; of nabla-R2D3 whether the reward is asked at every "step" (E7) or once per "sample" (E8)."""
    return settings["estimator"] if settings["method"] == "nabla" else settings["method"]


def label(settings: dict) -> str:
    """What a trial is called: its kind, and what is not as OWN has it."""
    return ", ".join([METHODS[kind(settings)][0], *changes(settings, scaled(OWN[kind(settings)], settings["reward"]))])


def chosen(rows: list[dict], reward: str) -> list[tuple[dict, list[int], list[str]]]:
    """Settings that the comparison takes, marks around where the sweep says that they get there, and why.

    The default, and the same per step; and from the sweep of every kind the setting that loses least alignment at a gain of CHOOSE_AT
    and the one that takes fewest evaluations to it, of those that gain a tenth more; where none does, the one that gains most.
    """
    found = {}
    for name, marks in {"sample": [16, 32, 64, 96], "step": [32, 64, 128, 256]}.items() if reward in sweeps(rows) else ():
        settings = scaled(OWN[name], reward)
        found[json.dumps(settings, sort_keys=True)] = settings, marks, ["the default" if name == "sample" else "as the default"]
    for name in METHODS:
        paths = [path for path in sweeps(rows).get(reward, []) if kind(path[0]["settings"]) == name]
        gain = CHOOSE_AT[reward]
        able = [path for path in paths if reached(path, 1.1 * gain, "judged") is not None]       # with a margin for seeds
        if able:
            picks = {"least lost": max(able, key=lambda path: reached(path, gain, "alignment")),
                     "fewest evaluations": min(able, key=lambda path: reached(path, gain, "judged"))}
        else:
            paths.sort(key=lambda path: max(row["reward"]["change"] for row in path))
            picks = {"most gained": path for path in paths[-1:]}
        for why, path in picks.items():
            settings = {name: value for name, value in path[0]["settings"].items() if name != "seed"}
            cost = reached(path, gain, "judged") or path[-1]["mark"]
            late = max(mark for mark in MARKS if mark <= 4 * cost)      # has it settled, or does it run on?
            marks = [mark for mark in MARKS if cost / 2.1 <= mark <= 2.1 * cost or mark == late]
            found.setdefault(json.dumps(settings, sort_keys=True), (settings, marks, []))[2].append(why)
    return [*found.values()]


def scaled(settings: dict, reward: str) -> dict:
    return {"reward": reward} | settings | {"beta": settings["beta"] * BETA[reward]}


def trials(experiment: str, reward: str, seeds: list[int], quick: bool, rows: Path) -> list[tuple[str, dict, list[int]]]:
    """Name, settings and marks of every trial."""
    if experiment == "compare":
        sweep = read(rows)
        picked = chosen(sweep if reward in sweeps(sweep) else read(ROWS), reward)
        if quick:                                               # the first of every kind
            picked, seeds = [*{kind(one[0]): one for one in picked[::-1]}.values()], [0]
            picked = [(settings, [mark for mark in marks if mark <= 128], why) for settings, marks, why in picked]
        return [(label(settings), settings | {"seed": seed}, marks) for seed in seeds for settings, marks, _ in picked]
    if experiment == "tune":
        return [(label(scaled(settings, reward)), scaled(settings, reward) | {"seed": 0}, marks)
                for settings, marks in (TUNE if reward == "aesthetic" else TUNE_OTHERS)]
    if experiment == "recipe":                                  # marks: three and six epochs of either
        return [(f"--recipe {recipe}", {"reward": reward, "method": "nabla", "recipe": recipe, "seed": seed},
                 [share * n for n in (3, 6)])
                for seed in seeds for recipe, share in (("fast", 16), ("paper", 128))]
    return [(name, scaled(NABLA | change, reward) | {"seed": 0}, [96, 256] if "estimator" in change else [96])
            for name, change in ABLATIONS.items()]


class World:
    """The base, a reward and the two measurements of the base that every trial is compared with.

    `unseen`: train on the training prompts, measure on the test prompts; else split the training prompts for both.
    """

    def __init__(self, reward: str, samples: int, unseen: bool, work: Path):
        self.unseen = unseen
        self.config = r2d3.resolve(r2d3.Config(reward=reward, samples_per_prompt=samples, device="cpu"))
        self.base = r2d3.load_base(self.config, self.config.device)
        self.config = dataclasses.replace(self.config, guidance=self.base.guidance)
        self.reward = r2d3.load_reward(reward, self.base, self.config.device)
        self.schedule = self.base.schedule(self.config.sampler, self.config.steps)
        self.features = metrics.load_features(self.base.tower, self.config.device)
        self.prompts = r2d3.load_prompts(self.config.prompts)
        self.test_prompts = r2d3.load_prompts(self.config.test_prompts) if unseen else self.prompts[::4]
        if not unseen:
            self.prompts = [prompt for prompt in self.prompts if prompt not in self.test_prompts]
        self.net = self.base.net
        self.before, self.reference = (self.measure_base(seed, work) for seed in (0, 1))

    def measure_base(self, seed: int, work: Path) -> metrics.Measurement:
        weights = hashlib.sha256((r2d3.HERE / "support/shapes.safetensors").read_bytes()).hexdigest()
        what = (self.config, self.test_prompts, metrics.Measurement._fields, weights)
        path = work / f"base-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}-{seed}.pt"
        if path.is_file():
            return metrics.Measurement(**torch.load(path, weights_only=True))
        measured = self.measure(seed)
        write_atomic(path, to_bytes(lambda file: torch.save(measured._asdict(), file)))
        return measured

    def measure(self, seed: int) -> metrics.Measurement:
        return r2d3.measure(self.base, self.reward, self.features, self.schedule, self.test_prompts, self.config, seed, "")


def run(world: World, settings: dict, marks: list[int], about: dict, rows: Path, work: Path) -> None:
    """One trial: train with `settings`, measure at every mark, append the rows that are not there yet."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    what = {"experiment": about["experiment"], "settings": settings}
    path = work / f"{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]}.pt"
    lock = open(path.with_suffix(".lock"), "wb")                # noqa: SIM115, held until the process or the trial ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    measured = {"samples_per_prompt": world.config.samples_per_prompt,
                "prompts": "unseen" if world.unseen else "a quarter of the training prompts"}
    measured |= {"experiment": about["experiment"]}
    done = [row for row in read(rows) if row["settings"] == settings and measured.items() <= row.items()]
    marks = [mark for mark in marks if all(row["mark"] != mark for row in done)]
    if not marks or any(row.get("diverged") for row in done):
        return
    given = {name: value for name, value in settings.items() if name != "ddpo_clip"}
    config = r2d3.resolve(r2d3.Config(device="cpu", out=str(work), **given))
    config = dataclasses.replace(config, guidance=config.guidance or world.base.guidance)
    judge = r2d3.make_judge(world.base, world.reward, views=config.views, view_size=config.view_size,
                            elevation_jitter=config.elevation_jitter, azimuth_jitter=config.azimuth_jitter)
    job = r2d3.Job(world.base, judge, world.schedule, world.base.encode([""]), config)
    clip = r2d3.DDPO_CLIP["shapes"]
    r2d3.DDPO_CLIP["shapes"] = settings.get("ddpo_clip", clip)
    try:
        optimizer = r2d3.start_lora(job)
        state = {"epoch": 0, "judged": 0, "updates": 0, "seconds": 0.0, "history": {}}
        saved = torch.load(path, weights_only=True) if path.is_file() else {"judged": math.inf}
        if saved["judged"] < min(marks):                        # else there are new marks before it: from the start
            state = saved
            set_peft_model_state_dict(world.base.net, state.pop("lora"))
            optimizer.load_state_dict(state.pop("optimizer"))
        for mark in sorted(marks):
            diverged = None
            while state["judged"] < mark and not diverged:
                started = time.perf_counter()
                try:
                    for row in r2d3.train_epoch(job, world.prompts, optimizer, state["epoch"], state["history"]):
                        state["judged"] += row["judged"]
                        state["updates"] += 1
                except r2d3.UserError as error:
                    diverged = str(error)
                state["epoch"] += 1
                state["seconds"] += time.perf_counter() - started
            row = {**about, "settings": settings, "mark": mark, **measured,
                   "judged": state["judged"], "updates": state["updates"], "epochs": state["epoch"],
                   "train_seconds": round(state["seconds"], 1), "scorer": world.reward.title}
            if diverged:
                append(rows, row | {"diverged": diverged})
                return
            result = metrics.compare(world.before, world.measure(0), world.reference)
            append(rows, row | {name: result[name] for name in METRICS})
            lora = get_peft_model_state_dict(world.base.net)
            saved = state | {"lora": lora, "optimizer": optimizer.state_dict()}
            write_atomic(path, to_bytes(partial(torch.save, saved)))
            print(f"{about['experiment']:<8} {about['name']:<28} seed {config.seed} {state['judged']:>6} judged "
                  f"{state['updates']:>4} updates {state['seconds']:>5.0f} s  " +
                  " ".join(f"{name} {result[name]['after']:.3f} ({result[name]['change']:+.3f})" for name in METRICS),
                  flush=True)
    finally:
        world.net = world.base.net = world.base.net.unload()
        r2d3.DDPO_CLIP["shapes"] = clip
        lock.close()


def read(rows: Path) -> list[dict]:
    lines = rows.read_text(encoding="utf-8").splitlines() if rows.is_file() else []
    words = "every step (E7)", "every step (E7), our matching"      # what older rows of the ablations call it
    return [row | {"settings": renamed(row["settings"]), "name": row["name"].replace(words[1], words[0]).replace(*words)}
            for row in map(json.loads, lines)]


def renamed(settings: dict) -> dict:
    """An older row's settings under today's names. What is no setting any more keeps its name."""
    settings = {{"lam": "reg_weight", "reward_at": "estimator"}.get(name, name): value for name, value in settings.items()}
    if settings.pop("draft_noises", 0):
        settings["draft_steps"] = 0
    return settings


def append(rows: Path, row: dict) -> None:
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, encoding="utf-8")
    rows.parent.mkdir(parents=True, exist_ok=True)
    with open(rows, "a", encoding="utf-8") as file:
        file.write(json.dumps(row | {"commit": git.stdout.strip()}) + "\n")


def curves(rows: list[dict], reward: str) -> dict[str, dict[int, list[dict]]]:
    """The comparison's rows by name and mark, one per seed; only what the sweep chose, if there is a sweep, and only marks
    that all of its seeds have."""
    wanted = [label(settings) for settings, *_ in chosen(rows, reward)]
    found = {name: {} for name in wanted}
    for row in rows:
        if row["experiment"] == "compare" and row["settings"]["reward"] == reward and "diverged" not in row:
            name = label(row["settings"])
            if name in wanted or not wanted:
                found.setdefault(name, {}).setdefault(row["mark"], []).append(row)
    seeds = {name: max(map(len, marks.values()), default=0) for name, marks in found.items()}
    return {name: {mark: group for mark, group in sorted(marks.items()) if len(group) == seeds[name]}
            for name, marks in found.items() if marks}


def reached(path: list[dict], gain: float, metric: str) -> float | None:
    """What a metric of one trial had changed by when the reward had gained `gain`; None where it never gained so much.

    Between marks a power law, as costs grow faster than gains; where the sign changes, and up to the first mark, linear.
    """
    points = [(0.0, 0.0)] + [(row["reward"]["change"], row[metric]["change"] if metric in METRICS else row[metric])
                             for row in path]
    for (r0, m0), (r1, m1) in zip(points, points[1:]):
        if r0 <= gain <= r1 and r0 < r1:
            if r0 > 0 and m0 * m1 > 0:
                return m0 * (gain / r0) ** (math.log(m1 / m0) / math.log(r1 / r0))
            return m0 + (m1 - m0) * (gain - r0) / (r1 - r0)
    return None


def at_equal_reward(marks: dict[int, list[dict]], gain: float, metric: str) -> list[float] | None:
    """`reached`, one value per seed; None where some seed never gained so much."""
    by_seed = {}
    for rows in marks.values():
        for row in rows:
            by_seed.setdefault(row["settings"]["seed"], []).append(row)
    values = [reached(path, gain, metric) for _, path in sorted(by_seed.items())]
    return None if None in values else values


def spread(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval (Student's t over the seeds); 0 for one seed."""
    from scipy import stats
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, 0.0
    deviation = (sum((value - mean) ** 2 for value in values) / (n - 1)) ** 0.5
    return mean, float(stats.t.ppf(0.975, n - 1)) * deviation / n ** 0.5


def cell(rows: list[dict], metric: str) -> str:
    if metric == "diversity" and rows[0]["samples_per_prompt"] == 1:
        return "–"                                              # one object has no other to differ from
    return number([row[metric]["change"] for row in rows])


def number(values: list[float]) -> str:
    mean, half = spread(values)
    return f"{mean:+.3f}" + (f" ± {half:.3f}" if len(values) > 1 else "")


def changes(settings: dict, start: dict) -> list[str]:
    """The settings of a trial that are not as in `start`, in words."""
    words = {"batch_size": "batch", "updates_per_epoch": "updates", "skip_below": "skip below", "draft_steps": "K",
             "lora_rank": "rank", "ddpo_clip": "clip", "last_step": "last step", "reg_weight": "lambda"}
    return [f"{words.get(name, name)} {value:g}" if isinstance(value, (int, float)) else f"{words.get(name, name)} {value}"
            for name, value in settings.items()
            if start.get(name) != value and name not in ("seed", "method", "reward", "estimator")]


def table(title: str, columns: list[str], lines: list[list[str]]) -> str:
    text = [f"\n### {title}\n", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(text + ["| " + " | ".join(line) + " |" for line in lines]) + "\n"


def tables(rows: list[dict]) -> str:
    """All rows as Markdown: the comparison at equal reward, then at every mark; the sweep; trials; ablations."""
    text, names, others = "", list(METRICS.values()), list(METRICS)[1:]
    for reward in dict.fromkeys(row["settings"]["reward"] for row in rows if row["experiment"] == "compare"):
        why = {label(settings): reasons for settings, _, reasons in chosen(rows, reward)}
        lines = []
        for gain in GAINS[reward]:
            for name, marks in curves(rows, reward).items():
                judged = at_equal_reward(marks, gain, "judged")
                cells = [f"not by {max(marks)}"] + [""] * (len(others) + 1)
                if judged is not None:
                    cells = [f"{sum(of) / len(of):.0f}" for of in (judged, at_equal_reward(marks, gain, "train_seconds"))]
                    cells += [number(at_equal_reward(marks, gain, metric)) for metric in others]
                lines.append([f"{gain:+g}", name, ", ".join(why.get(name, [])), *cells])
        text += table(f"{reward}: at equal reward",
                      ["gained", "method", "of the sweep", "evaluations", "seconds", *names[1:]], lines)
        lines = [[name, *(f"{sum(row[key] for row in group) / len(group):.0f}" for key in ("judged", "updates")),
                  *(cell(group, metric) for metric in METRICS)]
                 for name, marks in curves(rows, reward).items() for group in marks.values()]
        text += table(f"{reward}: along the way", ["method", "evaluations", "updates", *names], lines)
    for reward, found in sweeps(rows).items():
        lines, gain = [], GAINS[reward][2]
        for path in found:
            costs = [reached(path, gain, metric) for metric in ("judged", *others)]
            best = max(row["reward"]["change"] for row in path)
            shown = [""] * len(costs) if costs[0] is None else [f"{costs[0]:.0f}", *(f"{cost:+.3f}" for cost in costs[1:])]
            lines.append([label(path[0]["settings"]), *shown, f"{best:+.3f}"])
        text += table(f"{reward}: the sweep, at a gain of {gain:g}",
                      ["setting", "evaluations", *names[1:], "largest gain"], lines)
        lines = []
        for gain in GAINS[reward]:
            for name, (title, *_) in METHODS.items():
                costs = [(reached(path, gain, "alignment"), reached(path, gain, "judged")) for path in found
                         if kind(path[0]["settings"]) == name]
                costs = [cost for cost in costs if cost[0] is not None]
                if costs:
                    lines.append([f"{gain:+g}", title, str(len(costs)), *(f"{cost:+.3f} ({judged:.0f})" for cost, judged in
                                                                         (max(costs), min(costs, key=lambda cost: cost[1])))])
        text += table(f"{reward}: the best of the sweep", ["gained", "method", "by how many settings",
                      "least alignment lost (evaluations)", "fewest evaluations: alignment lost (evaluations)"], lines)
    recipes = {}
    for row in rows:
        if row["experiment"] == "recipe":
            recipes.setdefault((row["name"], row["epochs"]), []).append(row)
    text += table("recipe", ["recipe", "epochs", "evaluations", "updates", *names],
                  [[name, str(epochs), *(f"{sum(row[key] for row in group) / len(group):.0f}" for key in ("judged", "updates")),
                    *(cell(group, metric) for metric in METRICS)] for (name, epochs), group in sorted(recipes.items())])
    for experiment in ("ablate", "tune", "explore"):
        lines = [[row["name"] if experiment == "ablate" else label(row["settings"]), str(row["judged"]), str(row["updates"]),
                  *([cell([row], metric) for metric in METRICS] if "diverged" not in row else [row["diverged"]])]
                 for row in rows if row["experiment"] == experiment]
        text += table(experiment, ["trial", "evaluations", "updates", *names], lines)
    return text


def sweeps(rows: list[dict]) -> dict[str, list[list[dict]]]:
    """The rows of the sweep's trials, by reward: one list per trial, in the order of the marks."""
    found = {}
    for row in rows:
        if row["experiment"] == "tune" and "diverged" not in row:
            trials = found.setdefault(row["settings"]["reward"], {})
            trials.setdefault(json.dumps(row["settings"], sort_keys=True), []).append(row)
    return {reward: [sorted(path, key=lambda row: row["mark"]) for path in trials.values()]
            for reward, trials in found.items()}


def plot(rows: list[dict], reward: str, path: Path) -> None:
    """Gain against evaluations and against what it cost: means over seeds, 95% intervals of the gain in the first panel.

    Dotted: the defaults; solid: what of the sweep lost least, or gained most; dashed: what took fewest evaluations.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    costs = {"judged": ("objects judged in training", 1), "alignment": ("alignment lost", -1),
             "fid_to_base": ("FID to the base gained", 1), "diversity": ("diversity changed", 1)}
    figure = Figure(figsize=(14, 4.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels, found = figure.subplots(1, 4, sharey=True), curves(rows, reward)
    for settings, _, why in chosen(rows, reward):
        name, method, line = label(settings), kind(settings), {"fewest evaluations": "--", "least lost": "-", "most gained": "-"}
        if name not in found:
            continue
        for axes, (key, (_, sign)) in zip(panels, costs.items()):
            drawn = [(spread([sign * (row[key] if key == "judged" else row[key]["change"]) for row in group])[0],
                      *spread([row["reward"]["change"] for row in group])) for group in found[name].values()]
            x, gain, half = zip(*drawn)
            axes.errorbar(x, gain, yerr=half if key == "judged" else None, color=METHODS[method][1], elinewidth=0.7,
                          marker=METHODS[method][2], markersize=5, linewidth=2, linestyle=line.get(why[0], ":"),
                          label=f"{name} ({', '.join(why)})")
    for axes, (key, (title, _)) in zip(panels, costs.items()):
        axes.set(xlabel=title)
        if reward == "aesthetic":                               # else nothing is gained, and some costs are below zero
            axes.set(ylim=(0, None), xscale="linear" if key == "diversity" else "log")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel=f"gain of the reward ({reward})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9, handlelength=5)
    write_atomic(path, to_bytes(partial(figure.savefig, format="png", dpi=110)))


def plot_sweep(rows: list[dict], path: Path) -> None:
    """Every setting of the sweep as a point: evaluations to a gain, and the alignment that it cost."""
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    for axes, gain in zip(panels, (0.1, 0.15, 0.2)):
        for method, (name, color, marker) in METHODS.items():
            paths = [path for path in sweeps(rows)["aesthetic"] if kind(path[0]["settings"]) == method]
            points = [(reached(path, gain, "judged"), reached(path, gain, "alignment")) for path in paths]
            points = [(judged, max(-lost, 1e-3)) for judged, lost in points if judged is not None]
            if method != "ddpo":                                # which gains too little
                axes.plot(*zip(*points), marker, color=color, label=f"{name}, {len(paths)} settings")
        axes.set(title=f"at a gain of {gain:g}", xscale="log", yscale="log", xlabel="objects judged in training")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="alignment lost")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
    write_atomic(path, to_bytes(partial(figure.savefig, format="png", dpi=110)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reward", default="aesthetic", choices=list(BETA), help="of the embedded base")
    parser.add_argument("--experiment", nargs="+", default=["compare"], choices=["compare", "tune", "ablate", "recipe"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the comparison")
    parser.add_argument("--quick", action="store_true",
                        help="one seed, one setting of every kind, up to about 128 evaluations, one object per prompt")
    parser.add_argument("--only", help="only trials whose name holds this word")
    parser.add_argument("--rows", type=Path, help="the file of the rows; default experiments/results/compare.jsonl, "
                                                  "or runs/compare/quick.jsonl")
    parser.add_argument("--table", action="store_true", help="print tables and draw plots of the rows there are, and stop")
    args = parser.parse_args()
    rows, worlds = args.rows or (WORK / "quick.jsonl" if args.quick else ROWS), {}
    for experiment in () if args.table else args.experiment:
        for name, settings, marks in trials(experiment, args.reward, args.seeds, args.quick, rows):
            if args.only and args.only not in name:
                continue
            unseen = experiment != "tune"
            if unseen not in worlds:
                worlds[unseen] = World(args.reward, 2 if unseen and not args.quick else 1, unseen, WORK)
            about = {"experiment": experiment, "name": name, "cmd": shlex.join(["python", *sys.argv])}
            run(worlds[unseen], settings, marks, about, rows, WORK)
    known = read(rows)
    print(tables(known))
    for reward in dict.fromkeys(row["settings"]["reward"] for row in known if row["experiment"] == "compare"):
        path = rows.with_name(f"{rows.stem}_{reward}.png")
        plot(known, reward, path)
        print(path)
    if "aesthetic" in sweeps(known):
        plot_sweep(known, rows.with_name(f"{rows.stem}_sweep.png"))


if __name__ == "__main__":
    main()
