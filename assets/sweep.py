"""Try settings of the default run and keep one row for each: reward gain, diversity, alignment, FID, coverage.

    python assets/sweep.py --beta 1000 3000 10000 --lam 1 --epochs 6            # every combination; skips known rows
    python assets/sweep.py --table                                              # the rows as a Markdown table

Rows go to assets/results/sweep.jsonl; the defaults of `shapes` in r2d3.py (PRESETS) were chosen from them.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import r2d3  # noqa: E402

SETTINGS = {"reward": str, "beta": float, "lam": float, "epochs": int, "lr": float, "matching": str, "branch": str,
            "last_step": str, "seed": int}
METRICS = ("reward", "alignment", "retrieved", "coverage", "diversity", "fid_to_base")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    choices = {"matching": ["eps", "score"], "branch": ["guided", "conditional"],
               "last_step": ["always", "stratified", "never"]}
    for name, kind in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs="+", choices=choices.get(name),
                            help="one or more values")
    parser.add_argument("--rows", type=Path, default=ROOT / "assets/results/sweep.jsonl", help="the file to append to")
    parser.add_argument("--table", action="store_true", help="print the rows as a table and stop")
    args = parser.parse_args()
    known = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.is_file() else []
    if args.table:
        print("| trained | branch | beta | lambda | epochs | lr | seed | reward | alignment | R@1 | coverage | diversity | FID |")
        print("|" + "---|" * 13)
        for row in known:
            settings = row["settings"]
            cells = [settings["reward"], settings["branch"]]
            cells += [f"{settings[name]:g}" for name in ("beta", "lam", "epochs", "lr", "seed")]
            cells += [f"{row[name]['before']:.3f} -> {row[name]['after']:.3f}" for name in METRICS]
            print("| " + " | ".join(cells) + " |")
        return
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name)}
    for values in itertools.product(*given.values()):
        with tempfile.TemporaryDirectory() as folder:
            config = r2d3.resolve(r2d3.Config(out=f"{folder}/run", **dict(zip(given, values))))
            settings = {name: getattr(config, name) for name in SETTINGS}
            if any(row["settings"] == settings for row in known):
                continue
            print(settings)
            try:
                summary = r2d3.train(config)
            except r2d3.UserError as error:
                print(f"left out: {error}")
                continue
            about = json.loads(Path(config.out, "config.json").read_text())
        row = {"settings": settings, **{name: summary[name] for name in METRICS}, "scorer": summary["scorer"],
               "updates": summary["updates"], "seconds": round(summary["seconds"]), "commit": about["git_commit"],
               "cmd": f"python assets/sweep.py {' '.join(sys.argv[1:])}"}
        known.append(row)
        args.rows.parent.mkdir(parents=True, exist_ok=True)
        with open(args.rows, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
