"""The paper's comparison: nabla-R2D3, ReFL, DRaFT and DDPO from the same start, judged as they go.

    python assets/compare.py --reward aesthetic                 # four methods, 3 seeds: hours on two cores
    python assets/compare.py --reward aesthetic --quick         # one seed, a short budget: minutes; rows of its own
    python assets/compare.py --experiment tune ablate           # the sweeps behind the settings; the ablations
    python assets/compare.py --table                            # tables of all rows there are, and the plots

A trial is one fine-tuning. Its cost is counted in objects that the reward judges in training ("evaluations"; each in
`views` pictures), and at every mark on that count the model is measured on the unseen prompts: one row of
assets/results/compare.jsonl. All trials share the order of the prompts, the noise and the views of the measurements. An
interrupted trial goes on from its last mark; what is there already, or is being made by another process, is skipped: the
command can be given again, and twice at once (with OMP_NUM_THREADS=1 each).
"""

import argparse
import dataclasses
import fcntl
import hashlib
import json
import math
import os
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
from assets import metrics

METRICS = {"reward": "reward", "alignment": "alignment", "retrieved": "R@1", "coverage": "coverage", "dnc": "dnc",
           "diversity": "diversity", "fid_to_base": "FID to the base"}
ROWS, WORK = ROOT / "assets/results/compare.jsonl", ROOT / "runs/compare"

# Settings that are not named here are r2d3.py's defaults for the embedded base, as far as they are not in START.
START = {"beta": 1000.0, "batch_size": 16, "lr": 1e-3, "updates_per_epoch": 16, "skip_below": 0.25}
NABLA = START | {"method": "nabla"}
DRAFT = START | {"method": "draft", "batch_size": 8, "updates_per_epoch": 1}
REFL = START | {"method": "refl", "batch_size": 8, "updates_per_epoch": 1}
DDPO = START | {"method": "ddpo", "updates_per_epoch": 4, "last_step": "never", "ddpo_clip": 1e-2}
HASTE = {"lr": 3e-3, "batch_size": 4}                           # ", fast": few judged objects per update, large steps
FAST = NABLA | HASTE | {"beta": 3000.0, "updates_per_epoch": 4}
EARLY = [16, 32, 64, 128, 256]
BETA = {"aesthetic": 1.0, "hpsv2": 0.25, "dnc": 0.5}  # by the size of the reward's gradient at the late levels
GAINS = {"aesthetic": (0.05, 0.1, 0.15, 0.2, 0.25), "hpsv2": (0.005, 0.01, 0.02), "dnc": (0.005, 0.01, 0.02)}

ABLATIONS = {
    "matching score (E4)": {"matching": "score"},
    "matching score, last step never": {"matching": "score", "last_step": "never"},
    "last step stratified": {"last_step": "stratified"},
    "last step never": {"last_step": "never"},
    "guided prediction matched": {"branch": "guided"},
    "lambda 0 (no prior regulariser)": {"lam": 0.0},
    "lambda 10": {"lam": 10.0},
    "w(s) = 1 (no time weight)": {"time_weight": "none"},
    "w(s) = alpha": {"time_weight": "linear"},
    "no Jacobian of the network": {"jacobian": False},
    "fraction 0.2": {"fraction": 0.2},
    "fraction 1.0": {"fraction": 1.0},
    "uniform transitions": {"stratify": False},
    "one view": {"views": 1},
    "four views": {"views": 4},
    "reward gradient at every level": {"skip_below": 0.0},
    "only levels 10 to 18 trained": {"skip_below": 0.0, "train_from": 0.5, "last_step": "never"},
    "4 updates per epoch": {"updates_per_epoch": 4},
    "each gradient used twice": {"updates_per_gradient": 2},
    "beta 300": {"beta": 300.0},
}

TUNE = [     # seed 0, one object per prompt
    (NABLA | {"beta": 300.0, "skip_below": 0.0, "updates_per_epoch": 4}, [256, 512, 1024]),
    (NABLA | {"beta": 3000.0, "skip_below": 0.0}, [128, 256, 512]),
    (NABLA | {"beta": 3000.0, "last_step": "never", "skip_below": 0.0, "train_from": 0.5}, [64, 128, 256, 512]),
    (NABLA | {"beta": 10000.0, "last_step": "never", "skip_below": 0.0, "train_from": 0.5}, [64, 128, 256, 512]),
    (NABLA | {"beta": 3000.0, "branch": "guided", "last_step": "never", "skip_below": 0.0, "train_from": 0.5}, [64, 128, 256, 512]),
    (NABLA | {"last_step": "never", "skip_below": 0.0, "train_from": 0.5, "updates_per_epoch": 32}, [64, 128, 256, 512]),
    (NABLA | {"batch_size": 8, "beta": 3000.0, "last_step": "never", "skip_below": 0.0, "train_from": 0.5}, [32, 64, 128, 256]),
    (NABLA | {"batch_size": 8, "beta": 3000.0, "last_step": "never", "skip_below": 0.0, "train_from": 0.5, "updates_per_epoch": 8, "updates_per_gradient": 4}, [32, 64, 128, 256]),
    (NABLA | {"batch_size": 8, "beta": 10000.0, "last_step": "never", "lr": 0.0003, "skip_below": 0.0, "train_from": 0.5, "updates_per_epoch": 8, "updates_per_gradient": 2}, [32, 64, 128, 256]),
    (NABLA | {"beta": 300.0, "last_step": "never", "skip_below": 0.0, "train_from": 0.5, "updates_per_epoch": 32}, [64, 128, 256]),
    (NABLA | {"batch_size": 8, "beta": 3000.0, "last_step": "never", "skip_below": 0.0, "train_from": 0.5, "updates_per_gradient": 2}, [32, 64]),
    (NABLA | {"beta": 3000.0, "updates_per_epoch": 8}, [32, 64, 128, 256]),
    (NABLA | {"beta": 3000.0}, [32, 64, 128, 256]),
    (NABLA, [32, 64, 128, 256]),
    (NABLA | {"updates_per_gradient": 2}, [32, 64, 128, 256]),
    (NABLA | {"batch_size": 4, "beta": 3000.0, "lr": 0.003, "updates_per_epoch": 4}, [16, 32, 64, 128, 256]),
    (NABLA | {"batch_size": 4, "lr": 0.002, "updates_per_epoch": 8}, [16, 32, 64, 128, 256]),
    (NABLA | {"batch_size": 4, "beta": 2000.0, "lr": 0.003, "updates_per_epoch": 4, "updates_per_gradient": 2}, [16, 32, 64, 128, 256]),
    (NABLA | {"batch_size": 2, "beta": 3000.0, "lr": 0.003, "updates_per_epoch": 4}, [16, 32, 64, 128]),
    (NABLA | {"batch_size": 4, "beta": 5000.0, "lr": 0.003, "updates_per_epoch": 8}, [16, 32, 64, 128]),
    (NABLA | {"batch_size": 4, "beta": 3000.0, "lr": 0.003, "skip_below": 0.6, "updates_per_epoch": 8}, [16, 32, 64]),
    (DRAFT, [16, 32, 64, 128, 256]),
    (DRAFT | {"lr": 0.0003}, [16, 32, 64, 128, 256]),
    (DRAFT | {"lr": 0.0001}, [32, 64, 128, 256]),
    (DRAFT | {"batch_size": 4, "lr": 0.003}, [16, 32, 64, 128]),
    (DRAFT | {"draft_noises": 2}, [16, 32, 64, 128]),
    (DRAFT | {"draft_steps": 2}, [16, 32, 64, 128]),
    (DRAFT | {"batch_size": 16}, [32, 64, 128]),
    (DRAFT | {"draft_steps": 3, "lr": 0.0003}, [32, 64, 128]),
    (REFL | {"lr": 0.0003}, [32, 64, 128, 256]),
    (REFL, [16, 32, 64, 128]),
    (REFL | {"batch_size": 4, "lr": 0.003}, [16, 32, 64]),
    (REFL | {"lr": 0.0001}, [64, 128, 256]),
    (REFL | {"batch_size": 4}, [16, 32, 64]),
    (REFL | {"batch_size": 16}, [32, 64, 128]),
    (REFL | {"lr": 0.002}, [16, 32, 64]),
    (DDPO, [64, 256]),
    (DDPO | {"ddpo_clip": 0.1, "lr": 0.003}, [64, 256]),
    (DDPO | {"ddpo_clip": 0.0001, "lr": 0.0003}, [128, 256]),
    (DDPO | {"lr": 0.0001}, [128, 256]),
    (DDPO | {"ddpo_clip": 0.1, "lr": 0.0003, "updates_per_epoch": 1}, [128, 256]),
]


def trials(experiment: str, reward: str, seeds: list[int], quick: bool) -> list[tuple[str, dict, list[int], int]]:
    """Name, settings, marks and objects per test prompt of every trial."""
    scaled = {name: settings | {"beta": settings["beta"] * BETA[reward]} for name, settings in
              (("nabla-R2D3", NABLA), ("nabla-R2D3, beta 3000", NABLA | {"beta": 3000.0}), ("nabla-R2D3, fast", FAST))}
    if experiment == "compare":
        methods = {name: (settings, [32, *EARLY[2:]]) for name, settings in scaled.items()}
        methods |= {"DRaFT-1": (DRAFT, EARLY), "DRaFT-1, fast": (DRAFT | HASTE, EARLY[:3]), "ReFL": (REFL, EARLY),
                    "ReFL, fast": (REFL | HASTE, EARLY[:3]), "DDPO": (DDPO, [128, 256])}
        if quick:
            return [(name, settings | {"seed": 0}, [mark for mark in marks if mark in (16, 64, 128)], 1)
                    for name, (settings, marks) in methods.items()]
        return [(name, settings | {"seed": seed}, marks, 2) for seed in seeds for name, (settings, marks) in methods.items()]
    if experiment == "tune":
        return [(settings["method"], START | settings | {"seed": 0}, marks, 1) for settings, marks in TUNE]
    return [(name, scaled["nabla-R2D3"] | change | {"seed": 0}, [256], 2) for name, change in ABLATIONS.items()]


class World:
    """The base, a reward and the two measurements of the base that every trial is compared with."""

    def __init__(self, reward: str, samples: int, work: Path):
        self.config = r2d3.resolve(r2d3.Config(reward=reward, samples_per_prompt=samples, device="cpu"))
        self.base = r2d3.load_base(self.config, self.config.device)
        self.config = dataclasses.replace(self.config, guidance=self.base.guidance)
        self.reward = r2d3.load_reward(reward, self.base, self.config.device)
        self.schedule = r2d3.NoiseSchedule.from_diffusers(self.config.sampler, self.config.steps, **self.base.betas)
        self.features = metrics.load_features(self.base.tower, self.config.device)
        self.prompts = r2d3.load_prompts(self.config.prompts)
        self.test_prompts = r2d3.load_prompts(self.config.test_prompts)
        self.null = self.base.encode([""])
        self.net = self.base.net
        self.before, self.reference = (self.measure_base(seed, work) for seed in (0, 1))

    def measure_base(self, seed: int, work: Path) -> metrics.Measurement:
        path = work / f"base-{self.config.reward}-{self.config.samples_per_prompt}-{seed}.pt"
        if path.is_file():
            return metrics.Measurement(**torch.load(path, weights_only=True))
        measured = self.measure(seed)
        r2d3.write_atomic(path, r2d3.to_bytes(lambda file: torch.save(measured._asdict(), file)))
        return measured

    def measure(self, seed: int) -> metrics.Measurement:
        return r2d3.measure(self.base, self.reward, self.features, self.schedule, self.test_prompts, self.config, seed, "")


def run(world: World, settings: dict, marks: list[int], about: dict, rows: Path, work: Path) -> None:
    """One trial: train with `settings`, measure at every mark, append the rows that are not there yet."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    path = work / f"{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]}.pt"
    lock = open(path.with_suffix(".lock"), "w")                 # noqa: SIM115, held until the process or the trial ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    samples = world.config.samples_per_prompt
    done = [row for row in read(rows) if row["settings"] == settings and row["samples_per_prompt"] == samples]
    marks = [mark for mark in marks if all(row["mark"] != mark for row in done)]
    if not marks or any(row.get("diverged") for row in done):
        return
    given = {name: value for name, value in settings.items() if name != "reward"}
    config = r2d3.resolve(dataclasses.replace(r2d3.Config(reward=settings["reward"], device="cpu", out=str(work)), **given))
    config = dataclasses.replace(config, guidance=world.base.guidance)
    world.base.net = r2d3.add_lora(world.net, config.lora_rank, config.seed)
    try:
        weights = [weight for weight in world.base.net.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay)
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
                    for row in r2d3.train_epoch(world.base, world.reward, world.schedule, world.prompts, world.null,
                                                optimizer, config, state["epoch"], 0, 1, state["history"]):
                        state["judged"] += row["judged"]
                        state["updates"] += 1
                except r2d3.UserError as error:
                    diverged = str(error)
                state["epoch"] += 1
                state["seconds"] += time.perf_counter() - started
            row = {**about, "settings": settings, "mark": mark, "samples_per_prompt": samples,
                   "judged": state["judged"], "updates": state["updates"], "epochs": state["epoch"],
                   "train_seconds": round(state["seconds"], 1), "scorer": world.reward.title}
            if diverged:
                append(rows, row | {"diverged": diverged})
                return
            after = world.measure(0)
            result = metrics.compare(world.before, after, world.reference)
            append(rows, row | {name: result[name] for name in METRICS})
            lora = get_peft_model_state_dict(world.base.net)
            saved = state | {"lora": lora, "optimizer": optimizer.state_dict()}
            r2d3.write_atomic(path, r2d3.to_bytes(partial(torch.save, saved)))
            print(f"{about['experiment']:<8} {about['name']:<28} seed {config.seed} {state['judged']:>6} judged "
                  f"{state['updates']:>4} updates {state['seconds']:>5.0f} s  " +
                  " ".join(f"{name} {result[name]['after']:.3f} ({result[name]['change']:+.3f})" for name in METRICS),
                  flush=True)
    finally:
        world.net = world.base.net = world.base.net.unload()
        lock.close()


def read(rows: Path) -> list[dict]:
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []


def append(rows: Path, row: dict) -> None:
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    rows.parent.mkdir(parents=True, exist_ok=True)
    with open(rows, "a") as file:
        file.write(json.dumps(row | {"commit": git.stdout.strip()}) + "\n")


def curves(rows: list[dict], reward: str) -> dict[str, dict[int, list[dict]]]:
    """The comparison's rows by name and mark: one per seed."""
    found = {}
    for row in rows:
        if row["experiment"] == "compare" and row["settings"]["reward"] == reward and "diverged" not in row:
            found.setdefault(row["name"], {}).setdefault(row["mark"], []).append(row)
    return {name: dict(sorted(marks.items())) for name, marks in found.items()}


def spread(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval (Student's t over the seeds); 0 for one seed."""
    from scipy import stats
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, 0.0
    deviation = (sum((value - mean) ** 2 for value in values) / (n - 1)) ** 0.5
    return mean, float(stats.t.ppf(0.975, n - 1)) * deviation / n ** 0.5


def cell(rows: list[dict], metric: str, part: str = "change") -> str:
    mean, half = spread([row[metric][part] for row in rows])
    return f"{mean:+.3f}" + (f" ± {half:.3f}" if len(rows) > 1 else "")


def at_equal_reward(marks: dict[int, list[dict]], gain: float, metric: str) -> list[float] | None:
    """What a metric had changed by when the reward had gained `gain`, one value per seed: linear between marks.

    None where some seed never gained so much.
    """
    values = []
    for seed in sorted({row["settings"]["seed"] for rows in marks.values() for row in rows}):
        path = [(0.0, 0.0)] + [(row["reward"]["change"], row["judged"] if metric == "judged" else row[metric]["change"])
                               for rows in marks.values() for row in rows if row["settings"]["seed"] == seed]
        for (r0, m0), (r1, m1) in zip(path, path[1:]):
            if r0 <= gain <= r1:
                values.append(m0 + (m1 - m0) * (gain - r0) / (r1 - r0))
                break
        else:
            return None
    return values


def tables(rows: list[dict]) -> str:
    """All rows as Markdown: the comparison at equal reward, then at every mark; sweeps; ablations."""
    text = ""
    for reward in dict.fromkeys(row["settings"]["reward"] for row in rows if row["experiment"] == "compare"):
        found = curves(rows, reward)
        gains = GAINS[reward]
        text += f"\n### {reward}: at equal reward\n\n"
        text += "| gained | method | evaluations | " + " | ".join(list(METRICS.values())[1:]) + " |\n" + "|---" * 9 + "|\n"
        for gain in gains:
            for name, marks in found.items():
                judged = at_equal_reward(marks, gain, "judged")
                if judged is None:
                    text += f"| {gain:+g} | {name} | not by {max(marks)} | " + " | " * (len(METRICS) - 1) + "\n"
                    continue
                cells = []
                for metric in list(METRICS)[1:]:
                    mean, half = spread(at_equal_reward(marks, gain, metric))
                    cells.append(f"{mean:+.3f}" + (f" ± {half:.3f}" if len(judged) > 1 else ""))
                text += f"| {gain:+g} | {name} | {sum(judged) / len(judged):.0f} | " + " | ".join(cells) + " |\n"
        text += f"\n### {reward}: along the way\n\n"
        text += "| method | evaluations | updates | seconds | " + " | ".join(METRICS.values()) + " |\n" + "|---" * 11 + "|\n"
        for name, marks in found.items():
            for group in marks.values():
                means = [f"{sum(row[key] for row in group) / len(group):.0f}" for key in ("judged", "updates", "train_seconds")]
                text += f"| {name} | " + " | ".join(means + [cell(group, metric) for metric in METRICS]) + " |\n"
    for experiment in ("tune", "ablate"):
        some = [row for row in rows if row["experiment"] == experiment]
        if some:
            text += f"\n### {experiment}\n\n| trial | settings | evaluations | updates | " + " | ".join(METRICS.values())
            text += " |\n" + "|---" * (4 + len(METRICS)) + "|\n"
        for row in some:
            settings = {k: v for k, v in row["settings"].items() if START.get(k) != v and k not in ("seed", "method")}
            shown = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "reward" or value != "aesthetic")
            cells = [cell([row], metric) for metric in METRICS] if "diverged" not in row else [row["diverged"]]
            text += f"| {row['name']} | {shown} | {row['judged']} | {row['updates']} | " + " | ".join(cells) + " |\n"
    return text


def plot(rows: list[dict], reward: str, path: Path) -> None:
    """Reward against evaluations and against what it cost: thick lines are means over seeds with 95% intervals, thin ones
    single seeds. Costs below 0.001 are drawn at 0.001 (logarithmic axes)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    costs = {"judged": ("objects judged in training", 1, 8), "alignment": ("alignment lost", -1, 1e-3),
             "fid_to_base": ("FID to the base gained", 1, 1e-3), "diversity": ("diversity changed (either way)", 0, 1e-3)}
    figure = Figure(figsize=(14, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels, colors = figure.subplots(1, 4, sharey=True), {"nabla": "C0", "draft": "C1", "refl": "C2", "ddpo": "C7"}
    low = top = 0.0
    for name, marks in curves(rows, reward).items():
        group = next(iter(marks.values()))
        style = {"color": colors[group[0]["settings"]["method"]],
                 "linestyle": ":" if "fast" in name else "--" if "beta" in name else "-"}
        for axes, (key, (_, sign, least)) in zip(panels, costs.items()):
            def cost(row: dict, key: str = key, sign: int = sign) -> float:
                value = row["judged"] if key == "judged" else row[key]["change"]
                return abs(value) if sign == 0 else sign * value
            drawn = []
            for group in marks.values():
                gain, half = spread([row["reward"]["change"] for row in group])
                x, x_half = spread([cost(row) for row in group])
                drawn.append((max(x, least), gain, min(x_half, x - least) if x > least else 0.0, x_half, half))
                low, top = min(low, gain), max(top, gain)
            x, gain, left, right, half = zip(*drawn)
            axes.errorbar(x, gain, xerr=None if key == "judged" else (left, right), yerr=half, label=name, marker="o",
                          markersize=4, linewidth=2, elinewidth=0.6, alpha=0.9, **style)
            for seed in {row["settings"]["seed"] for group in marks.values() for row in group}:
                own = [row for group in marks.values() for row in group if row["settings"]["seed"] == seed]
                axes.plot([max(cost(row), least) for row in own], [row["reward"]["change"] for row in own], linewidth=0.5,
                          alpha=0.5, **style)
    for axes, (title, _, least) in zip(panels, costs.values()):
        axes.set(xlabel=title, xscale="log", ylim=(1.15 * low - 0.15 * top, 1.15 * top - 0.15 * low))
        axes.set_xlim(left=0.8 * least)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel=f"gain of the reward ({reward})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=8, fontsize=9)
    r2d3.write_atomic(path, r2d3.to_bytes(partial(figure.savefig, format="png", dpi=110)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reward", default="aesthetic", choices=list(BETA), help="of the embedded base")
    parser.add_argument("--experiment", nargs="+", default=["compare"], choices=["compare", "tune", "ablate"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the comparison")
    parser.add_argument("--quick", action="store_true", help="one seed, up to 64 evaluations, one object per prompt")
    parser.add_argument("--only", help="only trials whose name holds this word")
    parser.add_argument("--rows", type=Path, help="the file of the rows; default assets/results/compare.jsonl, "
                                                  "or runs/compare/quick.jsonl")
    parser.add_argument("--table", action="store_true", help="print tables and draw plots of the rows there are, and stop")
    args = parser.parse_args()
    rows = args.rows or (WORK / "quick.jsonl" if args.quick else ROWS)
    if not args.table:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
        worlds = {}
        for experiment in args.experiment:
            for name, settings, marks, samples in trials(experiment, args.reward, args.seeds, args.quick):
                if args.only and args.only not in name:
                    continue
                if samples not in worlds:
                    worlds[samples] = World(args.reward, samples, WORK)
                about = {"experiment": experiment, "name": name, "cmd": f"python {' '.join(sys.argv)}"}
                run(worlds[samples], {"reward": args.reward} | settings, marks, about, rows, WORK)
    known = read(rows)
    print(tables(known))
    for reward in dict.fromkeys(row["settings"]["reward"] for row in known if row["experiment"] == "compare"):
        path = (WORK / f"quick_{reward}.png") if args.quick else ROOT / f"assets/compare_{reward}.png"
        plot(known, reward, path)
        print(path)


if __name__ == "__main__":
    main()
