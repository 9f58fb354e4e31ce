"""Tables and plots of the comparison's rows (experiments/compare.py), and the sweep's choice.

    python experiments/tables.py                    # Markdown tables; results/compare.png
    python experiments/tables.py --add runs/NAME    # first keep what a run of r2d3.py has measured, as a row

Only rows of the embedded base as it is now count: every row holds the hash of the base that it was measured on. All
changes are from the untouched base, on the same noise. Intervals are 95%, by a bootstrap that draws seeds of training
and, of each, prompts: they cover other seeds and other prompts. What is not measured by prompt (FID, KL,
histograms) has an interval over seeds (Student's t), where there are several.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import tilt
from support import load_weights, to_bytes, write_atomic

ROWS = ROOT / "experiments/results/compare.jsonl"
# What is measured, in the order of the tables.
METRICS = {"reward": "reward", "alignment": "alignment", "retrieved": "R@1", "named": "named right",
           "hues": "hues right", "dnc": "dnc", "coverage": "coverage", "diversity": "diversity",
           "fid_to_base": "FID to the base", "open_colors": "open colours", "open_shapes": "open shapes"}
LOOKS = {"E8 score": ("C0", "o"), "E8 kl": ("C9", "v"), "E8 eps": ("C3", "D"), "E7 score (the paper's)": ("C4", "P"),
         "E7 kl": ("C6", "<"), "E7 eps": ("C8", ">"), "ReFL": ("C2", "^"), "DRaFT": ("C1", "s"), "DDPO": ("C7", "x")}
BOOTSTRAP = 2000
MOST_DNC_LOST = 0.005       # that the rule forgives, see `admissible`


def base_hash() -> str:
    """Which embedded base this is: a hash of its weights, not of what was measured of them."""
    weights = load_weights(ROOT / "support/shapes.safetensors")[0]
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def read(rows: Path, base: str | None = None) -> list[dict]:
    """All rows of a file, or those that were measured on one base."""
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True) if rows.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]         # not one that another process is writing
    return [row for row in map(json.loads, whole) if base in (None, row.get("base"))]


def of(rows: list[dict], experiment: str, reward: str | None = None, name: str | None = None) -> list[dict]:
    return [row for row in rows if row["experiment"] == experiment and reward in (None, row["reward"])
            and name in (None, row.get("name")) and "diverged" not in row]


def paths(rows: list[dict]) -> list[list[dict]]:
    """The rows of each trial with its LoRA in full, in the order of their marks."""
    found = {}
    for row in rows:
        if row.get("scale", 1.0) == 1:
            found.setdefault(json.dumps(row["settings"], sort_keys=True), []).append(row)
    return [sorted(path, key=lambda row: row["judged"]) for path in found.values()]


def deviation(rows: list[dict], reward: str) -> float:
    """The unit of gains: how far the reward spreads within a prompt, among objects of the base (rows of the tilt)."""
    return of(rows, "tilt", reward)[0]["spread"]


# ---- Intervals ------------------------------------------------------------------------------------------------------


def draws(rows: list[dict], metric: str) -> np.ndarray:
    """Means (BOOTSTRAP,) of a metric's change over drawn seeds and, of each seed, drawn prompts. One row per seed.

    All metrics and all rows of as many seeds get the same draws, so that differences and ratios can be taken.
    """
    values = np.array([row["by_prompt"][metric] for row in rows])               # (seeds, prompts)
    generator = np.random.default_rng(0)
    seeds = generator.integers(len(values), size=(BOOTSTRAP, len(values), 1))
    prompts = generator.integers(values.shape[1], size=(BOOTSTRAP, 1, values.shape[1]))
    return values[seeds, prompts].mean((1, 2))


def interval(rows: list[dict], metric: str) -> tuple[float, float]:
    """95% of a metric's mean change."""
    low, high = np.quantile(draws(rows, metric), [0.025, 0.975])
    return float(low), float(high)


def over_seeds(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval (Student's t over the seeds); 0 for one seed."""
    from scipy import stats
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, 0.0
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


# ---- The rule that chooses ------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """What the sweep chose of a method."""

    settings: dict      # without the seed
    row: dict           # its best row
    inside: bool        # whether a smaller and a larger strength were tried


def admissible(row: dict) -> bool:
    """No measurable loss: the intervals of alignment and R@1 reach 0, that of dnc reaches -0.005. (Of these the
    reward itself passes where it gains.)
    """
    least = {"alignment": 0.0, "retrieved": 0.0, "dnc": -MOST_DNC_LOST}
    return all(interval([row], metric)[1] >= value for metric, value in least.items())


def dial(settings: dict) -> tuple[str, float]:
    """Name and value of the strength."""
    name = "beta" if "beta" in settings else "lr"
    return name, settings[name]


def chosen(rows: list[dict], reward: str, name: str) -> Choice | None:
    """The rule, the same for all: of a method's strengths in the sweep the one that gains most, at any of its marks, at
    no measurable loss (`admissible`); of gains within a tenth of a deviation of the most, the smallest FID to the base.
    None where nothing was swept.
    """
    swept = [row for row in rows if row["experiment"] == "sweep" and row["reward"] == reward and row["name"] == name]
    good = [row for row in swept if "diverged" not in row and row["change"]["reward"] > 0 and admissible(row)]
    if not good:
        return None
    most = max(row["change"]["reward"] for row in good)
    near = [row for row in good if row["change"]["reward"] >= most - 0.1 * deviation(rows, reward)]
    best = min(near, key=lambda row: row["change"]["fid_to_base"])
    strengths = {dial(row["settings"])[1] for row in swept}
    own = dial(best["settings"])[1]
    settings = {key: value for key, value in best["settings"].items() if key != "seed"}
    return Choice(settings, best, min(strengths) < own < max(strengths))


# ---- Trials of the comparison ---------------------------------------------------------------------------------------


class Seeds(NamedTuple):
    """A method's trials with the strength that the sweep chose: `marks` along training, `scales` of its last LoRA.

    Each is a list of points, a point one row per seed.
    """

    marks: list[list[dict]]
    scales: list[list[dict]]
    diverged: int


def compared(rows: list[dict], reward: str, name: str) -> Seeds | None:
    """None where the choice lies at an edge of its sweep, or was not compared: then no table has the method."""
    choice = chosen(rows, reward, name)
    if not choice or not choice.inside:
        return None
    every = [row for row in rows if row["experiment"] == "compare" and row["reward"] == reward and row["name"] == name
             and choice.settings == {key: value for key, value in row["settings"].items() if key != "seed"}]
    broken = {row["settings"]["seed"] for row in every if "diverged" in row}
    ours = [row for row in every if row["settings"]["seed"] not in broken]
    seeds = sorted({row["settings"]["seed"] for row in ours})

    def points(key: str, some: list[dict]) -> list[list[dict]]:
        found = {}
        for row in sorted(some, key=lambda row: row["settings"]["seed"]):
            found.setdefault(row[key], []).append(row)
        return [found[value] for value in sorted(found) if len(found[value]) == len(seeds)]      # that all seeds have

    marks = points("mark", [row for row in ours if row["scale"] == 1])
    if not marks:
        return None
    last = marks[-1][0]["mark"]
    return Seeds(marks, points("scale", [row for row in ours if row["mark"] == last]), len(broken))


def gain(point: list[dict]) -> float:
    return mean_of(point, "reward")


def mean_of(point: list[dict], metric: str) -> float:
    return math.fsum(row["change"][metric] for row in point) / len(point)


def where(gains: list[float], wanted: float) -> tuple[int, float] | None:
    """Between which points, which follow the untouched base (0), `wanted` is first reached: the number of the second,
    and the share of the way from the first; None where it never is.
    """
    before = 0.0
    for n, now in enumerate(gains):
        if before <= wanted <= now and before < now:
            return n, (wanted - before) / (now - before)
        before = now
    return None


def at_gain(points: list[list[dict]], wanted: float, value: Callable[[list[dict]], float | np.ndarray]
            ) -> float | np.ndarray | None:
    """`value` of a point where the mean gain is `wanted`, linear between points; the untouched base has 0."""
    found = where([gain(point) for point in points], wanted)
    if found is None:
        return None
    n, share = found
    first = value(points[n - 1]) if n else 0.0
    return first + share * (value(points[n]) - first)


def optimum(rows: list[dict], reward: str) -> list[dict]:
    """The exact tilt's curve: gain, KL and all changes, by beta."""
    return [row["change"] | {"gain": row["change"]["reward"], "kl": row["kl"], "beta": row["beta"],
                             "effective": row["effective"]}
            for row in of(rows, "tilt", reward)]


def above(rows: list[dict], reward: str) -> list[dict]:
    """Rows that gained more than the optimum does with the same KL divergence, which nothing can: a check of the code.

    A quarter of a deviation is allowed for chance: gains are means over 96 objects.
    """
    curve = optimum(rows, reward)
    wrong = []
    for row in rows if curve else []:
        if row["reward"] != reward or row["experiment"] == "tilt" or "kl" not in row:
            continue
        most = min(row["change"]["reward"] - 0.25 * deviation(rows, reward), curve[-1]["gain"])
        best = tilt.at_gain(curve, most)
        if best and row["kl"] < best["kl"]:
            wrong.append(row)
    return wrong


# ---- Tables ---------------------------------------------------------------------------------------------------------


def table(title: str, columns: list[str], lines: list[list[str]]) -> str:
    if not lines:
        return ""
    text = [f"\n### {title}\n", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(text + ["| " + " | ".join(line) + " |" for line in lines]) + "\n"


def digits(reward: str) -> int:
    """How many decimals show a gain: rewards differ in how far they spread."""
    return 4 if reward in ("normal", "dnc") else 3


def strength(settings: dict) -> str:
    """What the sweep varies of a method."""
    name, value = dial(settings)
    exponent = math.floor(math.log10(value) + 1e-9)
    return f"{name} {value / 10 ** exponent:.3g}e{exponent}"


def cell(point: list[dict], metric: str, places: int = 3) -> str:
    """The mean change and its 95% interval."""
    mean = mean_of(point, metric)
    if metric in point[0]["by_prompt"]:
        low, high = interval(point, metric)
        return f"{mean:+.{places}f} ({low:+.{places}f} .. {high:+.{places}f})"
    return f"{mean:+.{places}f}" + (f" ± {over_seeds([r['change'][metric] for r in point])[1]:.{places}f}"
                                    if len(point) > 1 else "")


def sweep(rows: list[dict], reward: str) -> str:
    """Every strength at its last mark; the choice in bold, with the mark at which it gains most."""
    lines = []
    for name in LOOKS:
        choice = chosen(rows, reward, name)
        every = of(rows, "sweep", reward, name)
        for row in sorted(every, key=lambda row: (dial(row["settings"])[1], row["mark"])):
            best = choice is not None and row == choice.row
            mark = "**" if best else ""
            edge = " (at an edge: not compared)" if best and not choice.inside else ""
            lines.append([f"{mark}{name}{mark}{edge}", f"{mark}{strength(row['settings'])}{mark}", str(row["judged"]),
                          str(row["updates"]), cell([row], "reward", digits(reward)),
                          "yes" if admissible(row) else "no",
                          *(f"{row['change'][metric]:+.3f}" for metric in [*METRICS][1:9])])
    return table(f"{reward}: the sweep, one seed, prompts that nothing else uses; in bold what the rule chose",
                 ["method", "strength", "rewards asked", "updates", "reward", "no measurable loss",
                  *[*METRICS.values()][1:9]], lines)


def comparison(rows: list[dict], reward: str) -> str:
    """Every method at its last mark, and at the scale of its LoRA... in full."""
    lines = []
    for name in LOOKS:
        seeds = compared(rows, reward, name)
        if not seeds:
            continue
        last = seeds.marks[-1]
        title = name + (f" ({seeds.diverged} diverged)" if seeds.diverged else "")
        seconds = sum(row["train_seconds"] for row in last) / len(last)
        lines.append([title, strength(last[0]["settings"]), str(len(last)), str(last[0]["judged"]),
                      str(last[0]["updates"]), f"{seconds:.0f}", cell(last, "reward", digits(reward)),
                      *(cell(last, metric) for metric in [*METRICS][1:])])
    return table(f"{reward}: change from the base at the end of training",
                 ["method", "strength", "seeds", "rewards asked", "updates", "seconds", *METRICS.values()], lines)


PAID = ["alignment", "retrieved", "named", "hues", "dnc", "diversity"]


def paid(points: list[list[dict]], wanted: float, metric: str) -> str:
    """A metric's change where the reward has gained `wanted`, and its interval."""
    mean = at_gain(points, wanted, lambda point: mean_of(point, metric))
    if metric not in points[0][0]["by_prompt"]:
        return f"{mean:+.3f}"
    spread = at_gain(points, wanted, lambda point: draws(point, metric))
    low, high = np.quantile(spread, [0.025, 0.975])
    return f"{mean:+.3f} ({low:+.3f} .. {high:+.3f})"


def at_equal_gain(rows: list[dict], reward: str, gains: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)) -> str:
    """What each method and the exact tilt have paid when the reward has gained so many deviations within a prompt: the
    cost along its training, the losses where its LoRA is turned down to that gain.
    """
    curve, lines = optimum(rows, reward), []
    if not curve:
        return ""
    spread = deviation(rows, reward)
    left = {name: seeds for name in LOOKS if (seeds := compared(rows, reward, name))}
    for wanted in gains:
        best = tilt.at_gain(curve, wanted * spread)
        if best:
            lines.append([f"{wanted:g} sd", "**exact tilt**", "–", "–", "–", f"{best['fid_to_base']:+.3f}",
                          *(f"{best[metric]:+.3f}" if metric in best else "–" for metric in PAID)])
        for name, seeds in [*left.items()]:
            asked, updates, seconds = (at_gain(seeds.marks, wanted * spread, partial(count, of=key))
                                       for key in ("judged", "updates", "train_seconds"))
            if where([gain(point) for point in seeds.scales], wanted * spread) is None:
                lines.append([f"{wanted:g} sd", name, f"not by {seeds.marks[-1][0]['judged']}",
                              *["–"] * (3 + len(PAID))])
                del left[name]
                continue
            first = gain(seeds.marks[0]) > wanted * spread
            words = [f"{'at most ' if first else ''}{value:.0f}" if value is not None else "–" for value in
                     ((count(seeds.marks[0], of=key) for key in ("judged", "updates", "train_seconds"))
                      if first else (asked, updates, seconds))]
            lines.append([f"{wanted:g} sd", name, *words, paid(seeds.scales, wanted * spread, "fid_to_base"),
                          *(paid(seeds.scales, wanted * spread, metric) for metric in PAID)])
    return table(f"{reward}: at equal gain (1 sd = {spread:.4f}, the reward's deviation within a prompt)",
                 ["gained", "method", "rewards asked", "updates", "seconds", METRICS["fid_to_base"],
                  *(METRICS[name] for name in PAID)], lines)


def curve_of(rows: list[dict], reward: str, name: str) -> list[list[dict]]:
    """A method's points in the order of their gain: every strength of the sweep, and the largest one turned down."""
    full, low = (of(rows, experiment, reward, name) for experiment in ("sweep", "scales"))
    last = max((row["mark"] for row in full), default=None)
    points = [row for row in full + low if row["mark"] == last and row["change"]["reward"] > 0]
    return [[row] for row in sorted(points, key=lambda row: row["change"]["reward"])]


def swept_gain(rows: list[dict], reward: str, gains: tuple[float, ...] = (2.0, 5.5)) -> str:
    """What is lost at equal gain: linear between a method's nearest two points."""
    lines, unit = [], deviation(rows, reward)
    for wanted in gains:
        for name in LOOKS:
            points = curve_of(rows, reward, name)
            if len(points) > 2 and gain(points[-1]) >= wanted * unit:
                lines.append([f"{wanted:g} sd", name,
                              *(paid(points, wanted * unit, metric) for metric in (*PAID, "fid_to_base"))])
    return table(f"{reward}: at equal gain (1 sd = {unit:.4f}), between the sweep's strengths",
                 ["gained", "method", *(METRICS[name] for name in (*PAID, "fid_to_base"))], lines)


def count(point: list[dict], of: str) -> float:
    return sum(row[of] for row in point) / len(point)


def optima(rows: list[dict], rewards: list[str]) -> str:
    """What one deviation of each reward costs at the optimum, and how much of it lies within kinds of objects."""
    lines, metrics = [], [metric for metric in METRICS if metric not in ("reward", "named", "hues")]
    for reward in rewards:
        curve = optimum(rows, reward)
        best = tilt.at_gain(curve, deviation(rows, reward)) if curve else None
        if best:
            within = of(rows, "tilt", reward)[0]["share_within"]
            lines.append([reward, f"{deviation(rows, reward):.4f}", f"{within:.2f}", f"{best['kl']:.2f}",
                          *(f"{best[metric]:+.3f}" for metric in metrics)])
    return table("the exact tilt where the reward has gained one deviation within a prompt",
                 ["reward", "deviation", "share within kinds", "KL (nats)", *(METRICS[metric] for metric in metrics)],
                 lines)


def ablations(rows: list[dict], reward: str) -> str:
    """One change each of what the sweep chose, on the prompts of the comparison; one seed."""
    lines = [[row["name"], strength(row["settings"]), str(row["judged"]), str(row["updates"]),
              f"{row['kl_but_last']:.1f}", cell([row], "reward", digits(reward)),
              *(f"{row['change'][metric]:+.3f}" for metric in [*METRICS][1:9])] for row in of(rows, "ablate", reward)]
    return table(f"{reward}: one change each, one seed", ["trial", "strength", "rewards asked", "updates",
                 "KL without the last step, at most", *[*METRICS.values()][:9]], lines)


ESTIMATORS = {"sample": "E8", "step": "E7"}


def dials(rows: list[dict]) -> str:
    """How far a beta of 1 moves the target, and what beta moves it by a tenth of eps."""
    lines = [[row["reward"], ESTIMATORS[row["name"]], *(f"{value:.2g}" for value in row["target"].values()),
              *(f"{0.1 / value:.1e}" for value in row["target"].values())] for row in of(rows, "dial")]
    matchings = ("score", "kl", "eps")
    return table("the target beta w g / k in units of eps (root mean square, levels weighed as the loss does)",
                 ["reward", "g", *(f"{name}: per unit of beta" for name in matchings),
                  *(f"{name}: beta for 10%" for name in matchings)], lines)


def small_betas(rows: list[dict], reward: str) -> str:
    """Where training with a small beta ends, and what the exact tilt gains with the same beta."""
    lines = []
    for path in paths(of(rows, "beta", reward)):
        curve = optimum(rows, reward)
        exact = at_beta(curve, path[-1]["beta"])
        trained = [f"{row['change']['reward']:+.4f} ({row['judged']})" for row in path]
        share = f"{path[-1]['change']['reward'] / exact:.2f}" if exact else "–"
        lines.append([path[0]["name"].removeprefix("beta "), f"{exact:+.4f}" if exact else "–", ", ".join(trained),
                      share])
    return table(f"{reward}: gain with small betas",
                 ["beta", "exact tilt", "trained (rewards asked)", "the last, of the exact tilt's"], lines)


def at_beta(curve: list[dict], beta: float) -> float | None:
    """The optimum's gain at a beta, between the curve's points."""
    for left, right in zip(curve, curve[1:]):
        if left["beta"] <= beta <= right["beta"]:
            share = (beta - left["beta"]) / (right["beta"] - left["beta"])
            return left["gain"] + share * (right["gain"] - left["gain"])
    return None


def run_row(folder: Path) -> dict:
    """The row of one run of r2d3.py: its command, and what its summary says."""
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    words = about["command"]
    if "--out" in words:
        words = words[:words.index("--out")] + words[words.index("--out") + 2:]
    measured = {name: {key: summary[name][key] for key in ("change", "ci95")} for name in METRICS if name in summary}
    return {"experiment": "run", "reward": about["config"]["reward"], "name": " ".join(words[1:]), "base": base_hash(),
            "settings": {"seed": about["seed"]}, "measured": measured, "commit": about["git_commit"],
            **{name: summary[name] for name in ("judged", "updates", "prompts", "samples_per_prompt", "seconds")}}


def runs(rows: list[dict]) -> str:
    """Commands of r2d3.py, and what each measured: a change and its 95% interval over prompts."""
    lines = []
    for row in of(rows, "run"):
        gained = row["measured"]["reward"]
        places = digits(row["reward"])
        low, high = gained["ci95"]
        lines.append([f"`{row['name']}`", str(row["judged"]), str(row["updates"]),
                      f"{gained['change']:+.{places}f} ({low:+.{places}f} .. {high:+.{places}f})",
                      f"{gained['change'] / deviation(rows, row['reward']):.2f}",
                      *(f"{row['measured'][name]['change']:+.3f}" for name in RUN_METRICS)])
    return table("commands of r2d3.py", ["settings", "rewards asked", "updates", "reward", "in deviations",
                                         *(METRICS[name] for name in RUN_METRICS)], lines)


RUN_METRICS = ("alignment", "retrieved", "dnc", "coverage", "diversity", "fid_to_base")


def base_table(quality: dict) -> str:
    """What make_shapes.py measured of the embedded base, by kind of prompt: true scenes, those decoded, and samples."""
    sources, kinds = ("true", "decoded", "samples"), ("closed", "open", "hard")
    lines = []
    for key, title in (("named_right", "objects named right"), ("dnc", "dnc"), ("normal", "normal agreement"),
                       ("spread_of_colorfulness", "colourfulness, sd within a prompt")):
        lines += [[title, source, *(f"{quality[key][kind][source]:.3f}" for kind in kinds)] for source in sources]
    lines.append(["the same, of the true scenes' share", "samples",
                  *(f"{quality['spread_of_colorfulness'][kind]['share']:.2f}" for kind in kinds)])
    for key, title in (("open_colors", "colours"), ("open_shapes", "shapes")):
        lines += [[f"{title} left open, total variation from the data's", source, "–",
                   f"{quality[key][f'total_variation_{source}']:.3f}", "–"] for source in ("true", "samples")]
    return table("the embedded base", ["measured", "of", *kinds], lines)


def tables(rows: list[dict]) -> str:
    rewards = [*dict.fromkeys(row["reward"] for row in rows)]
    made = (make(rows, reward) for make in (comparison, at_equal_gain, swept_gain, sweep, ablations, small_betas)
            for reward in rewards)
    return optima(rows, rewards) + dials(rows) + runs(rows) + "".join(made)


# ---- The plot -------------------------------------------------------------------------------------------------------


def plot(rows: list[dict], path: Path) -> None:
    """Gain, in deviations within a prompt, over what is lost: every strength of the sweep, and dotted the largest one
    turned down. One line of panels per reward of which two methods were swept.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    rewards = [*dict.fromkeys(row["reward"] for row in rows if row["experiment"] == "sweep")]
    rewards = [reward for reward in rewards if len({row["name"] for row in of(rows, "sweep", reward)}) > 1]
    lost = {"alignment": ("alignment lost", -1), "named": ("share of objects named right, lost", -1),
            "dnc": ("dnc lost", -1), "fid_to_base": ("FID to the base, gained", 1)}
    figure = Figure(figsize=(13.0, 0.6 + 3.2 * max(len(rewards), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(max(len(rewards), 1), len(lost), squeeze=False)
    handles = {}
    for line, reward in zip(panels, rewards):
        unit, curve = deviation(rows, reward), optimum(rows, reward)
        for axes, (metric, (title, sign)) in zip(line, lost.items()):
            for name, (color, marker) in LOOKS.items():
                full = sorted(of(rows, "sweep", reward, name), key=lambda row: dial(row["settings"])[1])
                low = sorted(of(rows, "scales", reward, name), key=lambda row: row["scale"])
                for some, style in ((full, "-"), (low + full[-1:] if low else [], ":")):
                    x = [0, *(sign * row["change"][metric] for row in some)]
                    y = [0, *(row["change"]["reward"] / unit for row in some)]
                    if some:
                        drawn, = axes.plot(x, y, style, color=color, marker=marker, linewidth=1.2, markersize=4)
                        handles.setdefault(name, drawn)
            if curve and metric in curve[0]:
                x, y = zip(*((sign * point[metric], point["gain"] / unit) for point in curve))
                handles["exact tilt (optimum)"], = axes.plot(x, y, "k-", linewidth=2.5)
            axes.set(xlabel=title)
            axes.grid(alpha=0.3)
        line[0].set(ylabel=f"{reward}: gain (deviations within a prompt)")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=8, fontsize=9)
    write_atomic(path, to_bytes(partial(figure.savefig, format="png", dpi=110)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--add", type=Path, nargs="+", default=[], help="folders of runs of r2d3.py, to keep as rows")
    args = parser.parse_args()
    with open(args.rows, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(run_row(folder)) + "\n" for folder in args.add)
    known = read(args.rows, base_hash())
    about = load_weights(ROOT / "support/shapes.safetensors")[1]
    print(base_table(json.loads(about["quality"])), tables(known))
    for reward in dict.fromkeys(row["reward"] for row in known):
        for row in above(known, reward):
            print(f"above the optimum, which cannot be: {row['name']} {row['settings']} {row['reward']} {row['mark']}")
    plot(known, args.rows.with_suffix(".png"))


if __name__ == "__main__":
    main()
