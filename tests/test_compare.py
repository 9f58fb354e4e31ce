"""experiments/compare.py and tables.py: trials go on where they stopped, tables say what the rows say, the README what the tables say."""
import fcntl
import json
import math
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

import compare  # noqa: E402
import make_shapes  # noqa: E402
import tables  # noqa: E402

import r2d3  # noqa: E402
from support import load_weights  # noqa: E402

ABOUT = {"cmd": "a test"}
TINY = {"method": "nabla", "beta": "5sd", "batch_size": 2, "updates_per_epoch": 2, "view_size": 16, "fraction": 0.2,
        "steps": 6, "seed": 0}


def tiny(**changes):
    return compare.Trial("compare", "per sample", "aesthetic", TINY | changes, [1])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    prompts = ["a red cube", "a cone", "something green on a ring"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r2d3, "load_prompts", lambda spec: prompts)
        return compare.World(True, tmp_path_factory.mktemp("world"), samples=2, steps=6)


def test_the_sweep_is_measured_on_prompts_of_its_own(tmp_path, monkeypatch):
    fields = compare.metrics.Measurement._fields
    empty = compare.metrics.Measurement(*[torch.zeros(compare.PROMPTS, 1, 4, 64)] * len(fields))
    some = {reward: torch.rand(2, 3) for reward in compare.REWARDS}
    monkeypatch.setattr(compare.World, "measure", lambda self, seed, prompts, samples: (empty, some))
    worlds = {unseen: compare.World(unseen, tmp_path) for unseen in (True, False)}
    train, test = (r2d3.load_prompts(str(ROOT / f"prompts/shapes_{part}.txt")) for part in ("train", "test"))
    assert (worlds[True].prompts, worlds[True].measured) == (train, test[:compare.PROMPTS])
    tuned, judged = worlds[False].prompts, worlds[False].measured
    assert len(judged) == compare.PROMPTS and not {*tuned} & {*judged} and {*tuned, *judged} <= {*train}
    assert not {*judged} & {*test} and worlds[True].spread == worlds[False].spread
    kinds = [make_shapes.group(make_shapes.parse_caption(prompt)) for prompt in judged]
    assert [kinds.count(kind) for kind in ("closed", "open", "hard")] == [8, 8, 8]
    # Neither takes the other's measurements of the base: three of each, and the draws for the histograms.
    assert len(list(tmp_path.glob("base-*.pt"))) == 3 + 16 + 3 + 1


def test_every_method_is_tuned_alike():
    found = compare.trials("tune", "hpsv2", [0], [])
    counts = [sum(trial["name"] == name for trial in found) for name in compare.METHODS]
    assert {*counts} == {3} and len({json.dumps(trial) for trial in found}) == len(found)
    assert compare.trials("compare", "hpsv2", [0, 1], []) == []         # nothing was tuned yet
    assert {*compare.METHODS} == {*tables.LOOKS}


def strip(row):
    return {name: value for name, value in row.items() if name not in ("train_seconds", "commit")}


def test_a_trial_goes_on_where_it_stopped(world, tmp_path):
    trial = tiny()
    for marks, name in (([1, 6], "straight"), ([1], "resumed"), ([1, 6], "resumed"), ([1, 6], "resumed")):
        trial.marks = marks
        world.work = tmp_path / name
        world.work.mkdir(exist_ok=True)
        compare.run(world, trial, ABOUT, tmp_path / f"{name}.jsonl")
    straight, resumed = (tables.read(tmp_path / f"{name}.jsonl") for name in ("straight", "resumed"))
    assert [row["mark"] for row in straight] == [1, 6] and [strip(row) for row in straight] == [strip(row) for row in resumed]
    assert straight[0]["judged"] >= 1 and straight[1]["judged"] >= 6 and straight[1]["change"]["reward"] != 0
    assert straight[1]["kl"] > straight[1]["kl_but_last"] > 0
    assert straight[0]["change"]["reward"] == pytest.approx(straight[0]["change"]["reward_aesthetic"], abs=1e-6)
    trial.marks = [1, 2, 6]                                     # a mark before its state
    compare.run(world, trial, ABOUT, tmp_path / "resumed.jsonl")
    assert [row["mark"] for row in tables.read(tmp_path / "resumed.jsonl")] == [1, 6, 2]
    assert tables.read(tmp_path / "resumed.jsonl", "another base") == []


def test_a_trial_that_another_process_has_is_left_alone(world, tmp_path):
    world.work = tmp_path
    trial = tiny()
    compare.run(world, trial, ABOUT, tmp_path / "rows.jsonl")
    trial.marks = [6]
    lock, = tmp_path.glob("*.lock")
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        compare.run(world, trial, ABOUT, tmp_path / "rows.jsonl")
    assert len(tables.read(tmp_path / "rows.jsonl")) == 1


def test_a_trial_that_diverges_is_a_row(world, tmp_path):
    world.work = tmp_path
    trial = tiny(beta=1e30, lr=1e30)
    trial.marks = [30]
    for wait in (False, True):
        compare.run(world, trial, ABOUT, tmp_path / "rows.jsonl", wait)
    row, = tables.read(tmp_path / "rows.jsonl")
    assert "not finite" in row["diverged"] and tables.of([row], "compare", "aesthetic") == []


def test_the_divergence_is_that_of_the_steps(world):
    """Nothing for a LoRA that does nothing; else, by E6, half of (k std)^2 |eps - eps_ref|^2 at every step."""
    job = r2d3.Job(world.base, None, world.schedule, world.base.encode([""]), world.config)
    try:
        r2d3.start_lora(job)
        assert sum(world.path_kl()) == 0
        generator = torch.Generator().manual_seed(0)
        for name, weight in world.base.net.named_parameters():
            if "lora_B" in name:
                weight.data = 0.02 * torch.randn(weight.shape, generator=generator)
        steps, schedule, expected = world.path_kl(), world.schedule, []
        named = [prompt for prompt in world.measured for _ in range(2)]
        cond = world.base.encode(named)
        generators = [r2d3.seeded("kl", n) for n in range(len(named))]
        with torch.no_grad():
            trajectory = r2d3.rollout(world.base, schedule, cond, job.null, world.config.guidance, generators)
            for i in range(len(schedule)):
                x = trajectory.x[:, i]
                with world.base.net.disable_adapter():
                    ref = r2d3.predict_guided(world.base, x, schedule.t(i).expand(len(x)), cond, job.null, world.config.guidance)
                far = (trajectory.eps[:, i] - ref).square().flatten(1).sum(1).mean()
                expected.append(((schedule.k(i) * schedule.step(i)[2]) ** 2 * far / 2).item())
        assert min(expected) > 0 and steps == pytest.approx(expected, rel=1e-3)
    finally:
        world.base.net = world.base.net.unload()


def test_presets_belong_to_a_trial(world, monkeypatch):
    """A changed preset is another trial, though its row would name the same settings; where rows go is not."""
    config = compare.configured(world, tiny())
    assert config.beta == pytest.approx(5 / world.spread["aesthetic"])
    same = r2d3.dataclasses.replace(config, out="elsewhere", epochs=99)
    assert compare.identity(config, ["a"]) == compare.identity(same, ["a"])
    assert compare.identity(config, ["a"]) != compare.identity(config, ["b"])
    assert compare.identity(config, ["a"]) != compare.identity(r2d3.dataclasses.replace(config, steps=7), ["a"])


def test_the_exact_tilt_is_rows(world, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "DRAWS", 8)
    world.work = tmp_path
    rows = compare.exact_tilt(world, ABOUT)
    for reward in compare.REWARDS:
        curve = tables.optimum(rows, reward)
        start = curve[0]
        assert start["gain"] == start["open_colors"] == 0 and start["kl"] == pytest.approx(0, abs=1e-9)
        assert start["fid_to_base"] == pytest.approx(0, abs=1e-6)       # equal weights are no farther than by chance
        gains = [point["gain"] for point in curve]
        assert gains == sorted(gains) and gains[-1] > 0 and curve[-1]["effective"] == pytest.approx(8, rel=0.05)
        assert curve[-1][f"reward_{reward}"] == pytest.approx(curve[-1]["gain"], abs=1e-6)
    assert tables.at_beta(curve, curve[1]["beta"]) == pytest.approx(curve[1]["gain"])
    assert tables.at_beta(curve, 2 * curve[-1]["beta"]) is None


def test_open_slots_are_named(world):
    """"a cone" leaves its colour open, "something green" its shape, "a ring" its colour."""
    names = compare.named_open(world, world.before[0].features)
    assert [(n, slot, which) for n, slot, which, _ in names] == [(1, 0, 0), (2, 0, 1), (2, 1, 0)]
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)
    labels = [(1, 0, 0, ["red", "blue"]), (2, 1, 0, ["red", "cyan"]), (2, 0, 1, ["cone", "cube"])]
    colors, shapes = compare.histograms(labels, weights)
    assert colors["red"] == 0.625 and colors["cyan"] == 0.375 and colors["blue"] == 0
    assert shapes["cone"] == 0.25 and shapes["cube"] == 0.75
    assert sum(colors.values()) == sum(shapes.values()) == 1


def made(name, seed, judged, gain, far, experiment="compare", reward="aesthetic", **settings):
    change = dict.fromkeys(tables.METRICS, 0.0) | {"reward": gain, "alignment": -gain / 10, "fid_to_base": gain / 20}
    return ABOUT | {"experiment": experiment, "name": name, "reward": reward, "mark": judged, "judged": judged,
                    "updates": judged, "settings": {"seed": seed, "beta": "5sd"} | settings, "spread": 0.1, "kl": far,
                    "kl_but_last": far / 2, "change": change, "before": dict.fromkeys(tables.METRICS, 0.5), "base": "x"}


def optimum(gain, far, beta, spread=0.1):
    return made("", 0, 0, gain, far, "tilt") | {"beta": beta, "effective": 20.0, "spread": spread}


def test_equal_reward_is_read_off_the_curve():
    path = [made("DDPO", 0, 10, 0.1, 1.0), made("DDPO", 0, 20, 0.3, 5.0)]
    assert tables.reached(path, 0.2, tables.kl) == pytest.approx(2 ** (math.log(5) / math.log(3)))
    assert tables.reached(path, 0.05, tables.kl) == pytest.approx(0.5)                  # from the untouched base: a mean
    assert tables.reached(path, 0.05, tables.kl, 2) == pytest.approx(0.25)              # and a squared distance
    assert tables.reached(path, 0.4, tables.kl) is None
    rising = [made("a", 0, 10, 0.1, 1.0), made("a", 0, 20, 0.3, -3.0)]                  # no power law through zero
    assert tables.reached(rising, 0.2, tables.kl) == pytest.approx(-1.0)
    fallen = [made("a", 0, 10, -0.1, 1.0), made("a", 0, 20, 0.1, 3.0)]                  # nor one from a loss of reward
    assert tables.reached(fallen, 0.05, tables.kl) == pytest.approx(2.5)
    mean, half = tables.mean_and_half([1.0, 2.0, 6.0])
    assert mean == 3 and half == pytest.approx(4.3027 * (7 / 3) ** 0.5, rel=1e-4)       # t for 2 degrees of freedom
    rows = [*path, *(made("DDPO", 1, judged, gain, far) for judged, gain, far in ((10, 0.1, 1.0), (20, 0.2, 3.0))),
            made("DDPO", 1, 40, 0.9, 9.0),                                              # a mark that seed 0 lacks
            optimum(0.0, 0.0, 0.0), optimum(0.15, 0.5, 10.0)]
    text = tables.tables(rows)
    assert "| 1 sd | **exact tilt** | – | 0.33 | – | +0.005 | 0 |" in text
    assert "| 0.5 sd | DDPO | at most 10 ± 0 | 0.2" in text
    assert "| 1 sd | DDPO | 10 ± 0 | 1.0 ± 0.0 | 0.5 ± 0.0 | +0.005 ± 0.000 |" in text
    assert "| DDPO | beta 5sd | 20 | 20 |" in text and "| 3 sd | DDPO | not by 20 (2 of 2 seeds) |" in text
    lost = made("DDPO", 2, 10, 0.1, 1.0) | {"diverged": "nan"}
    assert "| DDPO (1 of 3 diverged) |" in tables.comparison([*rows, lost], "aesthetic")


def test_the_sweep_chooses_what_is_compared():
    """The strength that is closest to the prior where the reward has gained one deviation; else the largest gain."""
    rows = [made("ReFL", 0, judged, gain, far, "tune", lr=lr) for lr, path in {
        1e-4: [(20, 0.05, 0.1), (40, 0.06, 0.1)], 2e-4: [(20, 0.08, 0.4), (40, 0.2, 4.0)],
        3e-4: [(20, 0.12, 2.0), (40, 0.3, 9.0)]}.items() for judged, gain, far in path]
    assert tables.chosen(rows, "aesthetic", "ReFL") == {"beta": "5sd", "lr": 2e-4}
    assert tables.chosen(rows[:5], "aesthetic", "ReFL") is None                         # the sweep is not complete
    weak = [row | {"change": row["change"] | {"reward": row["change"]["reward"] / 10}} for row in rows]
    assert tables.chosen(weak, "aesthetic", "ReFL")["lr"] == 3e-4
    broken = [*rows[:3], *rows[4:], rows[3] | {"diverged": "nan"}]     # at its last mark
    assert tables.chosen(broken, "aesthetic", "ReFL")["lr"] == 3e-4
    assert tables.chosen(rows, "aesthetic", "DRaFT") is None and tables.chosen(rows, "dnc", "ReFL") is None
    again, = [trial for trial in compare.trials("compare", "aesthetic", [2], rows)]
    assert again["settings"] == {"beta": "5sd", "lr": 2e-4, "seed": 2} and again["name"] == "ReFL"
    other = made("ReFL", 0, 5, 0.1, 1.0, lr=9e-4)               # an earlier trial that the sweep did not choose
    kept = made("ReFL", 0, 5, 0.1, 1.0, lr=2e-4)
    assert tables.compared([*rows, other, kept], "aesthetic", "ReFL") == [[kept]]


def test_nothing_may_lie_above_the_optimum():
    curve = [optimum(0.0, 0.0, 0.0), optimum(0.1, 0.5, 10.0), optimum(0.2, 2.0, 20.0)]
    honest, wrong, far = made("ReFL", 0, 5, 0.2, 2.5), made("ReFL", 1, 5, 0.2, 0.4), made("ReFL", 2, 5, 0.9, 1.9)
    assert tables.above([*curve, honest, wrong, far], "aesthetic") == [wrong, far]


def test_small_betas_are_held_against_the_tilt():
    rows = [optimum(0.0, 0.0, 0.0), optimum(0.1, 0.5, 10.0)]
    rows += [made("beta 1sd", 0, judged, gain, 1.0, "beta") | {"beta": 5.0} for judged, gain in ((64, 0.02), (128, 0.045))]
    assert "| 1sd | +0.0500 | +0.0200 (64), +0.0450 (128) | 0.90 |" in tables.small_betas(rows, "aesthetic")


def test_the_readme_has_the_base_as_it_was_measured():
    quality = json.loads(load_weights(ROOT / "support/shapes.safetensors")[1]["quality"])
    text = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    quoted = [line for line in text.partition("## 1.")[2].partition("\n## ")[0].splitlines() if line.startswith("| ")]
    assert len(quoted) > 10 and {*quoted} <= {*tables.base_table(quality).splitlines()}


def test_the_committed_rows_are_the_claim(tmp_path):
    """Every trial is there once, nothing beats the optimum, and the README's tables are made from the rows."""
    rows = tables.read(tables.ROWS, tables.base_hash())
    keys = [json.dumps([row.get(name) for name in ("experiment", "name", "reward", "settings", "mark", "beta")],
                       sort_keys=True) for row in rows]
    assert len({*keys}) == len(keys) > 0, "the embedded base has changed: make the rows again (experiments/compare.py)"
    done = [reward for reward in compare.REWARDS if tables.of(rows, "compare", reward)]
    assert done == compare.REWARDS
    for reward in compare.REWARDS:
        assert len(tables.optimum(rows, reward)) > 3 and tables.above(rows, reward) == []
    for reward in done:
        for experiment in ("tune", "compare"):
            found = compare.trials(experiment, reward, [0, 1, 2], rows)
            assert len(found) == 15, (reward, experiment)
            for trial in found:
                there = [row for row in rows if trial.items() <= row.items()]
                assert {*trial.marks} <= {row["mark"] for row in there} or any("diverged" in row for row in there), trial
    text, lines = (ROOT / "experiments/README.md").read_text(encoding="utf-8"), tables.tables(rows).splitlines()
    for title in ("## 2.", "## 3.", "## 5.", "## 6."):
        section = text.partition(title)[2].partition("\n## ")[0].partition("\n# ")[0]
        quoted = [line for line in section.splitlines() if line.startswith("| ")]
        assert len(quoted) >= 4 and {*quoted} <= {*lines}, {*quoted} - {*lines}
    tables.plot(rows, tmp_path / "plot.png")


def test_share_of_the_variance_within_kinds():
    torch.manual_seed(0)
    names = [["red", "blue"] * 500, ["red"] * 1000]
    inside = torch.randn(2, 1000) * 0.5
    apart = torch.tensor([[1.0, -1.0] * 500, [0.0] * 1000])
    both = compare.share_within(names, inside + apart)
    assert both == pytest.approx((0.25 + 0.25) / (1.25 + 0.25), rel=0.1)
    assert compare.share_within(names[1:], inside[1:]) == pytest.approx(1.0)
    assert compare.share_within(names[:1], apart[:1]) == pytest.approx(0.0)
