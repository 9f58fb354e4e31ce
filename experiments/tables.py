"""Tables and plots of the comparison's rows (experiments/compare.py), and the sweep's choice.

    python experiments/tables.py                    # Markdown tables; results/compare.png

Only rows of the embedded base as it is now count: every row holds the hash of the base that it was measured on. All
changes are from the untouched base, on the same noise; means and 95% intervals (Student's t) over seeds of training.
All seeds are measured on the same prompts and noise: what another choice of those would change is not in the intervals.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
import tilt
from support import load_weights, to_bytes, write_atomic

ROWS = ROOT / "experiments/results/compare.jsonl"
# What is measured, in the order of the tables: the paper's three columns first.
METRICS = {"reward": "reward", "fid_to_base": "FID to the base", "alignment": "alignment", "retrieved": "R@1",
           "coverage": "coverage", "dnc": "dnc", "diversity": "diversity", "open_colors": "open colours",
           "open_shapes": "open shapes"}
LOOKS = {"per sample": ("C0", "o"), "the paper's recipe": ("C4", "P"), "ReFL": ("C2", "^"), "DRaFT": ("C1", "s"),
         "DDPO": ("C7", "x")}
STRENGTHS = 3           # how many strengths of a method the sweep tries
CHOSEN_AT = 1.0         # the gain, in standard deviations within a prompt, at which the sweep's strengths are compared


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


def of(rows: list[dict], experiment: str, reward: str, name: str | None = None) -> list[dict]:
    return [row for row in rows if row["experiment"] == experiment and row["reward"] == reward
            and name in (None, row.get("name")) and "diverged" not in row]


# ---- What rows say --------------------------------------------------------------------------------------------------


def paths(rows: list[dict]) -> list[list[dict]]:
    """The rows of each trial, in the order of their marks."""
    found = {}
    for row in rows:
        found.setdefault(json.dumps(row["settings"], sort_keys=True), []).append(row)
    return [sorted(path, key=lambda row: row["judged"]) for path in found.values()]


def reached(path: list[dict], gain: float, value: Callable[[dict], float], power: float = 1.0) -> float | None:
    """What `value` of one trial was when its reward had gained `gain`; None where it never gained so much.

    Up to the first mark `value` grows like gain ** power: means move with beta as the reward does, distances with its
    square. Between marks a power law through both; linear where one of the two is not positive or the sign changes.
    """
    start = 0.0, 0.0
    for row in path:
        (r0, v0), (r1, v1) = start, (row["change"]["reward"], value(row))
        if r0 <= gain <= r1 and r0 < r1:
            if r0 == 0:
                return v1 * (gain / r1) ** power
            if r0 > 0 and v0 * v1 > 0:
                return v0 * (gain / r0) ** (math.log(v1 / v0) / math.log(r1 / r0))
            return v0 + (v1 - v0) * (gain - r0) / (r1 - r0)
        start = r1, v1
    return None


def kl(row: dict) -> float:
    """The KL divergence of the whole sampler; a change of the last step, which is hardly seen, can be most of it."""
    return row["kl"]


def kl_but_last(row: dict) -> float:
    """The same up to the last step: of the latents before it."""
    return row["kl_but_last"]


def chosen(rows: list[dict], reward: str, name: str) -> dict | None:
    """The settings of a method that are compared, without the seed: of those in the sweep that gain CHOSEN_AT, the one
    that is then closest to the prior (KL divergence before the last step); where none gains so much, the one that gains
    most. Not one that diverged. None while the sweep of this method is not complete.
    """
    tried = [row for row in rows if row["experiment"] == "tune" and row["reward"] == reward and row["name"] == name]
    ends = [row for row in tried if "diverged" in row or row["mark"] == max(r["mark"] for r in tried)]
    broken = [row["settings"] for row in tried if "diverged" in row]
    found = paths([row for row in tried if row["settings"] not in broken])
    if len(paths(ends)) < STRENGTHS or not found:
        return None
    gain = CHOSEN_AT * found[0][0]["spread"]

    def merit(path: list[dict]) -> tuple[bool, float]:
        far = reached(path, gain, kl_but_last, 2)
        return (True, -far) if far is not None else (False, max(row["change"]["reward"] for row in path))

    return {key: value for key, value in max(found, key=merit)[0]["settings"].items() if key != "seed"}


def trials_of(rows: list[dict], reward: str, name: str) -> list[dict]:
    """All rows of the comparison of a method with the settings that the sweep chose, of every seed."""
    wanted = chosen(rows, reward, name)
    return [row for row in rows if row["experiment"] == "compare" and row["reward"] == reward and row["name"] == name
            and wanted in (None, {key: value for key, value in row["settings"].items() if key != "seed"})]


def compared(rows: list[dict], reward: str, name: str) -> list[list[dict]]:
    """The comparison's trials of a method, one path per seed that did not diverge, with the marks that all have."""
    ours = trials_of(rows, reward, name)
    broken = [row["settings"] for row in ours if "diverged" in row]
    found = paths([row for row in ours if row["settings"] not in broken])
    common = set.intersection(*({row["mark"] for row in path} for path in found)) if found else set()
    return [path for path in ([row for row in path if row["mark"] in common] for path in found) if path]


def optimum(rows: list[dict], reward: str) -> list[dict]:
    """The exact tilt's curve: gain, KL and all changes, by beta."""
    return [row["change"] | {"gain": row["change"]["reward"], "kl": row["kl"], "beta": row["beta"],
                             "effective": row["effective"], "spread": row["spread"]}
            for row in of(rows, "tilt", reward)]


def above(rows: list[dict], reward: str) -> list[dict]:
    """Rows that gained more than the optimum does with the same KL divergence, which nothing can: a check of the code.

    A quarter of a deviation is allowed for chance: gains are means over 96 objects.
    """
    curve = optimum(rows, reward)
    wrong = []
    for row in rows if curve else []:
        if row["reward"] != reward or row["experiment"] not in ("compare", "ablate", "beta") or "diverged" in row:
            continue
        gain = min(row["change"]["reward"] - 0.25 * row["spread"], curve[-1]["gain"])
        best = tilt.at_gain(curve, gain)
        if best and row["kl"] < best["kl"]:
            wrong.append(row)
    return wrong


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval (Student's t over the seeds); 0 for one seed."""
    from scipy import stats
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, 0.0
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return mean, float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


# ---- Tables -----------------------------------------------------------------------------------------------------------


def number(values: list[float | None], how: str = "+.3f") -> str:
    """Mean ± half of the interval; "–" where a seed has no value."""
    if None in values or not values:
        return "–"
    mean, half = mean_and_half(values)
    return f"{mean:{how}}" + (f" ± {half:{how.lstrip('+')}}" if len(values) > 1 else "")


def table(title: str, columns: list[str], lines: list[list[str]]) -> str:
    if not lines:
        return ""
    text = [f"\n### {title}\n", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(text + ["| " + " | ".join(line) + " |" for line in lines]) + "\n"


def strength(settings: dict) -> str:
    """What the sweep varies of a method."""
    words = [f"{word} {settings[name]}" for name, word in (("beta", "beta"), ("reg_weight", "lambda"), ("lr", "lr"))
             if name in settings]
    return ", ".join(words)


def comparison(rows: list[dict], reward: str) -> str:
    """One table in the paper's form: every method at its last mark, beside the base; and the distance to the optimum."""
    curve, lines = optimum(rows, reward), []
    for name in LOOKS:
        last = [path[-1] for path in compared(rows, reward, name)]
        lost = paths([row for row in trials_of(rows, reward, name) if "diverged" in row])
        title = name + (f" ({len(lost)} of {len(last) + len(lost)} diverged)" if lost else "")
        if not last:
            lines += [[title, strength(lost[0][0]["settings"])] + ["–"] * (5 + len(METRICS))] if lost else []
            continue
        best = [tilt.at_gain(curve, row["change"]["reward"]) for row in last]
        lines.append([title, strength(last[0]["settings"]),
                      *(f"{sum(row[count] for row in last) / len(last):.0f}" for count in ("judged", "updates")),
                      *(number([row["change"].get(metric) for row in last], "+.4f" if metric == "reward" else "+.3f")
                        for metric in METRICS),
                      *(number([row[key] for row in last], ".1f") for key in ("kl", "kl_but_last")),
                      number([point and point["kl"] for point in best], ".2f")])
    for row in of(rows, "compare", reward)[:1]:
        values = (row["before"].get(metric) for metric in METRICS)
        lines.insert(0, ["the base", "", "0", "0", *(number([value], ".3f") for value in values), "0", "0", "0"])
    columns = ["method", "strength", "evaluations", "updates", *METRICS.values(), "KL, at most (nats)",
               "without the last step", "optimum's KL"]
    return table(f"{reward}: change from the base at the last mark", columns, lines)


PAID = [name for name in METRICS if name not in ("reward", "fid_to_base")]


def at_equal_reward(rows: list[dict], reward: str) -> str:
    """What each method and the exact tilt have paid when the reward has gained so many deviations within a prompt.
    That a method did not gain so much is said once.

    The distance to the optimum is how much farther from the base a method's samples are than the exact tilt's, by FID.
    """
    curve, lines = optimum(rows, reward), []
    if not curve:
        return ""
    spread, left = curve[0]["spread"], [name for name in LOOKS if compared(rows, reward, name)]
    for gain in (0.25, 0.5, 1.0, 1.5, 2.0, 3.0):
        best = tilt.at_gain(curve, gain * spread)
        if best:
            lines.append([f"{gain:g} sd", "**exact tilt**", "–", f"{best['kl']:.2f}", "–",
                          f"{best['fid_to_base']:+.3f}", "0", *(f"{best[metric]:+.3f}" for metric in PAID)])
        for name in [*left]:
            line = paid_at(compared(rows, reward, name), gain * spread, best)
            lines.append([f"{gain:g} sd", name, *line])
            if line[0].startswith("not"):
                left.remove(name)
    return table(f"{reward}: at equal reward (1 sd = {spread:.4f}, the reward's deviation within a prompt)",
                 ["gained", "method", "evaluations", "KL, at most (nats)", "without the last step",
                  METRICS["fid_to_base"], "distance to the optimum", *(METRICS[name] for name in PAID)], lines)


def paid_at(every: list[list[dict]], gain: float, best: dict | None) -> list[str]:
    """The cells of a method in `at_equal_reward`, from its paths, one per seed; or that some seed never gained it."""
    def seeds(value: Callable[[dict], float], power: float = 1.0) -> list[float | None]:
        return [reached(path, gain, value, power) for path in every]

    fid = seeds(lambda row: row["change"]["fid_to_base"], 2)
    if None in fid:
        most = max(path[-1]["judged"] for path in every)
        return [f"not by {most} ({fid.count(None)} of {len(fid)} seeds)", *["–"] * (4 + len(PAID))]
    distance = [value - best["fid_to_base"] for value in fid] if best else []
    judged = [max(path[0]["judged"], reached(path, gain, lambda row: row["judged"])) for path in every]
    before_first = any(path[0]["change"]["reward"] > gain for path in every)        # then its cost is not known exactly
    return [("at most " if before_first else "") + number(judged, ".0f"),
            number(seeds(kl, 2), ".1f"), number(seeds(kl_but_last, 2), ".1f"), number(fid), number(distance),
            *(number(seeds(partial(changed, metric=metric))) for metric in PAID)]


def changed(row: dict, metric: str) -> float:
    return row["change"][metric]


def optima(rows: list[dict], rewards: list[str]) -> str:
    """What one deviation of each reward costs at the optimum, and how much of it lies within kinds of objects."""
    lines = []
    for reward in rewards:
        curve = optimum(rows, reward)
        best = tilt.at_gain(curve, curve[0]["spread"]) if curve else None
        if best:
            within = of(rows, "tilt", reward)[0].get("share_within")
            lines.append([reward, f"{curve[0]['spread']:.4f}", number([within], ".2f"),
                          f"{best['kl']:.2f}", *(f"{best[metric]:+.3f}" for metric in METRICS if metric != "reward")])
    return table("the exact tilt where the reward has gained one deviation within a prompt",
                 ["reward", "deviation", "share within kinds", "KL (nats)",
                  *(title for metric, title in METRICS.items() if metric != "reward")], lines)


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
                 ["beta", "exact tilt", "trained (evaluations)", "the last, of the exact tilt's"], lines)


def at_beta(curve: list[dict], beta: float) -> float | None:
    """The optimum's gain at a beta, between the curve's points."""
    for left, right in zip(curve, curve[1:]):
        if left["beta"] <= beta <= right["beta"]:
            share = (beta - left["beta"]) / (right["beta"] - left["beta"])
            return left["gain"] + share * (right["gain"] - left["gain"])
    return None


def trials_table(rows: list[dict], experiment: str, reward: str) -> str:
    """Every row of the sweep or of the ablations."""
    lines = [[row["name"], strength(row["settings"]), str(row["judged"]), str(row["updates"]),
              *(f"{row[key]:.1f}" for key in ("kl", "kl_but_last")),
              *(f"{row['change'][metric]:+.3f}" for metric in METRICS)] for row in of(rows, experiment, reward)]
    return table(f"{reward}: {experiment}", ["trial", "strength", "evaluations", "updates", "KL, at most (nats)",
                                                "without the last step", *METRICS.values()], lines)


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
    text = "".join(make(rows, reward) for make in (comparison, at_equal_reward, small_betas) for reward in rewards)
    trials = (trials_table(rows, experiment, reward) for experiment in ("ablate", "tune") for reward in rewards)
    return optima(rows, rewards) + text + "".join(trials)


def plot(rows: list[dict], path: Path) -> None:
    """Gain, in deviations within a prompt, against KL divergence, all of it and without the sampler's last step, and
    against FID: one row per reward. Faint: all strengths of the sweep.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    rewards = [*dict.fromkeys(row["reward"] for row in rows if row["experiment"] == "compare")]
    figure = Figure(figsize=(11.0, 0.6 + 3.0 * max(len(rewards), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(max(len(rewards), 1), 3, squeeze=False)
    for row, reward in zip(panels, rewards):
        curve = optimum(rows, reward)
        spread = curve[0]["spread"] if curve else 1.0
        costs = {"KL from the base, at most (nats)": kl,
                 "KL without the last step": lambda row: row.get("kl_but_last", row["kl"]),
                 "FID to the base": lambda row: (row["change"] if "change" in row else row)["fid_to_base"]}
        for axes, (title, cost) in zip(row, costs.items()):
            if curve:
                axes.plot([cost(point) for point in curve], [point["gain"] / spread for point in curve], "k-",
                          linewidth=2.5, label="exact tilt (optimum)")
            for name, (color, marker) in LOOKS.items():
                for trial in paths(of(rows, "tune", reward, name)):
                    x, y = zip(*((cost(row), row["change"]["reward"] / spread) for row in trial))
                    axes.plot(x, y, color=color, marker=".", linewidth=0.6, markersize=3, alpha=0.35)
                for number, trial in enumerate(compared(rows, reward, name)):
                    x, y = zip((0, 0), *((cost(row), row["change"]["reward"] / spread) for row in trial))
                    axes.plot(x, y, color=color, marker=marker, linewidth=1, markersize=4,
                              label=None if number else name)
            axes.set(xlabel=title)
            axes.grid(alpha=0.3)
        row[0].set(ylabel=f"{reward}: gain (sd within a prompt)")
        for axes in row[:2]:
            axes.set(xscale="symlog")
            axes.set_xlim(left=0)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=7, fontsize=9)
    write_atomic(path, to_bytes(partial(figure.savefig, format="png", dpi=110)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=Path, default=ROWS)
    args = parser.parse_args()
    known = read(args.rows, base_hash())
    about = load_weights(ROOT / "support/shapes.safetensors")[1]
    print(base_table(json.loads(about["quality"])), tables(known))
    for reward in dict.fromkeys(row["reward"] for row in known):
        for row in above(known, reward):
            print(f"above the optimum, which cannot be: {row['name']} {row['settings']} {row['reward']} {row['mark']}")
    plot(known, args.rows.with_suffix(".png"))


if __name__ == "__main__":
    main()
