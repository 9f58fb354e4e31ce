"""The paper's comparison: nabla-R2D3, ReFL, DRaFT and DDPO from the same start, judged as they go.

    python assets/compare.py --reward aesthetic             # the committed comparison: 3 seeds, hours on two cores
    python assets/compare.py --reward aesthetic --quick     # one seed, a short budget: minutes
    python assets/compare.py --experiment tune ablate       # the sweeps behind the settings; the ablations
    python assets/compare.py --reward aesthetic --table     # tables and plots of the rows there are

A trial is one fine-tuning. Its cost is counted in objects judged by the reward while training ("reward evaluations";
every one in `views` pictures), and whenever that count passes a mark the model is measured on the unseen prompts:
one row of assets/results/compare.jsonl. All trials share the prompts' order, the evaluation's noise and its views. A trial
that was interrupted goes on from its last mark; one whose rows are all there is skipped.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import r2d3  # noqa: E402

METRICS = ("reward", "alignment", "retrieved", "coverage", "dnc", "diversity", "fid_to_base")


class World:
    """The base, a reward and the two measurements of the base that every trial is compared with."""

    def __init__(self, reward: str, samples: int, work: Path):
        self.config = r2d3.resolve(r2d3.Config(reward=reward, samples_per_prompt=samples, device="cpu"))
        self.base = r2d3.load_base(self.config, self.config.device)
        self.config = dataclasses.replace(self.config, guidance=self.base.guidance)
        self.reward = r2d3.load_reward(reward, self.base, self.config.device)
        self.schedule = r2d3.NoiseSchedule.from_diffusers(self.config.sampler, self.config.steps, **self.base.betas)
        self.prompts = r2d3.load_prompts(self.config.prompts)
        self.test_prompts = r2d3.load_prompts(self.config.test_prompts)
        self.null = self.base.encode([""])
        self.net = self.base.net
        self.before, self.reference = (self.measure_base(seed, work) for seed in (0, 1))

    def measure_base(self, seed: int, work: Path) -> r2d3.Measurement:
        path = work / f"base-{self.config.reward}-{self.config.samples_per_prompt}-{seed}.pt"
        if path.is_file():
            return r2d3.Measurement(**torch.load(path, weights_only=True))
        measured = self.measure(seed)
        r2d3.write_atomic(path, r2d3.to_bytes(lambda file: torch.save(measured._asdict(), file)))
        return measured

    def measure(self, seed: int) -> r2d3.Measurement:
        return r2d3.measure(self.base, self.reward, self.schedule, self.test_prompts, self.config, seed, "")


def run(world: World, settings: dict, marks: list[int], about: dict, rows: Path, work: Path) -> None:
    """One trial: train with `settings`, measure at every mark, append the rows that are not there yet."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
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
        path = work / f"{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]}.pt"
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
            result = r2d3.compare(world.before, after, world.reference)
            append(rows, row | {name: result[name] for name in METRICS})
            lora = get_peft_model_state_dict(world.base.net)
            r2d3.write_atomic(path, r2d3.to_bytes(lambda file: torch.save(
                state | {"lora": lora, "optimizer": optimizer.state_dict()}, file)))
            print(f"{about['experiment']:<8} {about['name']:<28} seed {config.seed} {state['judged']:>6} judged "
                  f"{state['updates']:>4} updates {state['seconds']:>5.0f} s  " +
                  " ".join(f"{name} {result[name]['after']:.3f} ({result[name]['change']:+.3f})" for name in METRICS),
                  flush=True)
    finally:
        world.base.net = world.base.net.unload() if hasattr(world.base.net, "unload") else world.base.net
        world.net = world.base.net


def read(rows: Path) -> list[dict]:
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []


def append(rows: Path, row: dict) -> None:
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    rows.parent.mkdir(parents=True, exist_ok=True)
    with open(rows, "a") as file:
        file.write(json.dumps(row | {"commit": git.stdout.strip(), "cmd": " ".join(sys.argv)}) + "\n")
