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
TINY = {"beta": 1e5, "batch_size": 2, "updates_per_epoch": 2, "view_size": 16, "fraction": 0.4, "steps": 6, "seed": 0}


def tiny(experiment="compare", marks=(1,), scales=(1.0,), **changes):
    config = compare.PAPER | compare.ONCE | TINY | changes | {"reward": "aesthetic"}
    return compare.Trial(experiment, "E8 score", "aesthetic", {"beta": config["beta"], "seed": 0}, config, [*marks], [*scales])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    unseen, others = ["a red cube", "a cone", "something green on a ring"], ["a blue ring", "a sphere on a cube"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.World, "load_prompts", staticmethod(lambda config: (unseen, {"unseen": unseen, "sweep": others})))
        return compare.World(tmp_path_factory.mktemp("world"), samples=2, steps=6)


def test_what_is_measured_is_never_trained_on():
    train, test = (r2d3.inputs.load_prompts(str(ROOT / f"prompts/shapes_{part}.txt")) for part in ("train", "test"))
    loaded = compare.World.load_prompts(r2d3.resolve(r2d3.Config()))
    assert loaded == (train, {"unseen": test[:24], "sweep": test[24:48]})
    assert not {*train} & {*test}
    for judged in loaded[1].values():
        kinds = [make_shapes.group(make_shapes.parse_caption(prompt)) for prompt in judged]
        assert [kinds.count(kind) for kind in ("closed", "open", "hard")] == [8, 8, 8]


def test_every_method_is_tuned_alike():
    """At least three strengths each, on every reward that has any; the comparison takes what lies inside."""
    for reward in compare.REWARDS:
        found = compare.trials("sweep", reward, [0], [])
        names = [trial.name for trial in found]
        assert {*names} <= {*compare.METHODS} == {*tables.LOOKS}
        assert min(names.count(name) for name in names) >= 3
        assert len({json.dumps(trial.row(), sort_keys=True) for trial in found}) == len(found)
        assert compare.trials("compare", reward, [0, 1], [optimum(0.0, 0.0, 0.0, reward=reward)]) == []


def strip(row):
    return {name: value for name, value in row.items() if name not in ("train_seconds", "commit")}


def test_a_trial_goes_on_where_it_stopped(world, tmp_path):
    for marks, name in (([1, 6], "straight"), ([1], "resumed"), ([1, 6], "resumed"), ([1, 6], "resumed")):
        world.work = tmp_path / name
        world.work.mkdir(exist_ok=True)
        compare.run(world, tiny(marks=marks), ABOUT, tmp_path / f"{name}.jsonl")
    straight, resumed = (tables.read(tmp_path / f"{name}.jsonl") for name in ("straight", "resumed"))
    assert [row["mark"] for row in straight] == [1, 6] and [strip(row) for row in straight] == [strip(row) for row in resumed]
    assert straight[0]["judged"] >= 1 and straight[1]["judged"] >= 6 and straight[1]["change"]["reward"] != 0
    assert straight[1]["kl"] > straight[1]["kl_but_last"] > 0
    assert straight[0]["change"]["reward"] == pytest.approx(straight[0]["change"]["reward_aesthetic"], abs=1e-6)
    assert straight[0]["change"]["dnc"] == pytest.approx(straight[0]["change"]["reward_dnc"], abs=1e-6)
    compare.run(world, tiny(marks=[1, 2, 6]), ABOUT, tmp_path / "resumed.jsonl")       # a mark between those there are
    assert [row["mark"] for row in tables.read(tmp_path / "resumed.jsonl")] == [1, 6, 2]
    assert tables.read(tmp_path / "resumed.jsonl", "another base") == []


def test_scales_and_other_prompts_need_no_training(world, tmp_path, monkeypatch):
    """Half of the LoRA is measured from what was kept; none of it is the base. The sweep's training is the comparison's."""
    world.work = tmp_path
    compare.run(world, tiny("sweep"), ABOUT, tmp_path / "rows.jsonl")
    monkeypatch.setattr(r2d3, "train_epoch", None)
    compare.run(world, tiny(scales=[1.0, 0.5, 0.0]), ABOUT, tmp_path / "rows.jsonl")
    swept, whole, half, none = tables.read(tmp_path / "rows.jsonl")
    assert (swept["measured_on"], whole["measured_on"]) == ("sweep", "unseen") and swept["identity"] == whole["identity"]
    assert len(swept["by_prompt"]["reward"]) == 2 and len(whole["by_prompt"]["reward"]) == 3
    assert [row["scale"] for row in (whole, half, none)] == [1, 0.5, 0]
    assert 0 < half["kl"] < whole["kl"] and none["kl"] == none["change"]["reward"] == none["change"]["fid_to_base"] == 0
    assert whole["change"]["reward"] == pytest.approx(sum(whole["by_prompt"]["reward"]) / 3, abs=1e-5)
    assert not [name for name, _ in world.base.net.named_parameters() if "lora" in name]


def test_hues_are_seen_without_a_network():
    """Half red, half blue on white; gray is what has no hue; a colour that is named twice needs twice the pixels."""
    image = torch.ones(1, 1, 3, 8, 8)
    image[..., :4, :] = torch.tensor([0.8, 0.1, 0.1])[:, None, None]
    image[..., 4:6, :] = torch.tensor([0.15, 0.3, 0.9])[:, None, None]
    alpha = torch.zeros(1, 1, 1, 8, 8)
    alpha[..., :6, :] = 1
    pictures = r2d3.Render(image, alpha, alpha, alpha, image)
    found = {prompt: compare.hues_right(pictures, [prompt]).item() for prompt in (
        "a red cube", "a red cube on a blue ring", "a blue cube on a green ring", "a cone", "a green cone", "a gray cone")}
    assert [*found.values()] == [1, 1, 0.5, 1, 0, 0]
    pictures.image[...] = 0.5
    assert compare.hues_right(pictures, ["a gray cone on a red cube"]).item() == 0.5
    for name, hue in make_shapes.HUES.items():
        tone = make_shapes.colorsys.hsv_to_rgb((hue or 0) / 360, 0.6 if hue is not None else 0.0, 0.8)
        pictures.image[...] = torch.tensor(tone)[:, None, None]
        assert [compare.hues_right(pictures, [f"a {other} cube"]).item() for other in make_shapes.HUES] == [
            float(other == name) for other in make_shapes.HUES]


def test_a_bound_on_the_gradient(world):
    lengths = torch.tensor([1.0, 2.0, 8.0])
    u = torch.nn.functional.normalize(torch.randn(3, 4, 5).flatten(1), dim=1).view(3, 4, 5) * lengths[:, None, None]
    assert compare.bound(u).flatten(1).norm(dim=1).tolist() == pytest.approx([1, 2, 2])
    x0 = torch.randn(2, *world.base.latent_shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for bounded in (False, True):
        trial = tiny(bounded=bounded)
        job = compare.job_of(world, trial, compare.configured(world, trial))
        leaf = x0.clone().requires_grad_()
        reward, _ = job.judge(leaf, ["a red cube"] * 2, [r2d3.seeded(n) for n in range(2)])
        gradients.append(torch.autograd.grad(reward.sum(), leaf)[0].flatten(1))
    free, held = gradients
    assert held.norm(dim=1).tolist() == pytest.approx([free.norm(dim=1).min().item()] * 2, rel=1e-4)
    assert torch.nn.functional.cosine_similarity(free, held).tolist() == pytest.approx([1, 1])


def test_a_trial_that_another_process_has_is_left_alone(world, tmp_path):
    world.work = tmp_path
    compare.run(world, tiny(), ABOUT, tmp_path / "rows.jsonl")
    lock, = tmp_path.glob("*.lock")
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        compare.run(world, tiny(marks=[6]), ABOUT, tmp_path / "rows.jsonl")
    assert len(tables.read(tmp_path / "rows.jsonl")) == 1


def test_a_trial_that_diverges_is_a_row(world, tmp_path):
    world.work = tmp_path
    trial = tiny(beta=1e30, lr=1e30, marks=[30, 60])
    for wait in (False, True):
        compare.run(world, trial, ABOUT, tmp_path / "rows.jsonl", wait)
    row, = tables.read(tmp_path / "rows.jsonl")
    assert "not finite" in row["diverged"] and tables.of([row], "compare", "aesthetic") == []


def test_the_divergence_is_that_of_the_steps(world):
    """Nothing for a LoRA that does nothing; else, by E6, half of (k std)^2 |eps - eps_ref|^2 at every step."""
    job = world.job()
    try:
        r2d3.start_lora(job)
        assert sum(world.path_kl()) == 0
        generator = torch.Generator().manual_seed(0)
        for name, weight in world.base.net.named_parameters():
            if "lora_B" in name:
                weight.data = 0.02 * torch.randn(weight.shape, generator=generator)
        steps, schedule, expected = world.path_kl(), world.schedule, []
        named = world.measured["unseen"]
        cond = world.base.encode(named)
        generators = [r2d3.seeded("kl", n) for n in range(len(named))]
        with torch.no_grad():
            trajectory = job.rollout(named, generators)
            for i in range(len(schedule)):
                x = trajectory.x[:, i]
                with world.base.net.disable_adapter():
                    ref = job.predict_guided(x, schedule.t(i).expand(len(x)), cond)
                far = (trajectory.eps[:, i] - ref).square().flatten(1).sum(1).mean()
                expected.append(((schedule.k(i) * schedule.step(i)[2]) ** 2 * far / 2).item())
        assert min(expected) > 0 and steps == pytest.approx(expected, rel=1e-3)
    finally:
        world.base.net = world.base.net.unload()


def test_what_a_trial_is(world):
    """Settings that training depends on make another trial, presets too; where files go and what is measured do not."""
    own = compare.identity(world, tiny())
    assert own == compare.identity(world, tiny("sweep", marks=[7], scales=[0.5])._replace(name="other"))
    for change in ({"beta": 2e5}, {"seed": 1}, {"fraction": 0.3}, {"reg_weight": 7.0}, {"bounded": True}, {"views": 4}):
        assert compare.identity(world, tiny(**change)) != own
    free = {"base", "weights", "precision", "checkpoint", "device", "backend", "prompts", "recipe", "micro_batch", "epochs",
            "resume", "test_prompts", "eval_prompts", "out", "samples_per_prompt", "eval_batch", "run", "mesh", "merge",
            "protocol", "branch"}
    assert free | {*compare.DEPENDS} >= {field.name for field in r2d3.dataclasses.fields(r2d3.Config)}


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


def test_the_dial_says_how_far_the_target_moves(world):
    """Where all levels weigh alike it is the mean over them; E7 and E8 have a unit each; tables say which beta is 10%."""
    rows = [compare.dial(world, "aesthetic", estimator, ABOUT, batch_size=3, steps=6, view_size=16) for estimator in ("sample", "step")]
    for row in rows:
        assert 0 < row["target"]["score"] < row["target"]["kl"] < row["target"]["eps"]
    assert rows[0]["target"]["eps"] != rows[1]["target"]["eps"]
    assert rows[0]["target"]["eps"] == pytest.approx(rows[1]["target"]["eps"], rel=0.5)
    text = tables.dials([rows[0] | {"target": {"score": 2e-6, "kl": 3e-5, "eps": 1e-4}}])
    assert "| aesthetic | E8 | 2e-06 | 3e-05 | 0.0001 | 5.0e+04 | 3.3e+03 | 1.0e+03 |" in text


def test_open_slots_are_named(world):
    """"a cone" leaves its colour open, "something green" its shape, "a ring" its colour."""
    names = compare.named_open(world, world.before["unseen"][0].features)
    assert [(n, slot, which) for n, slot, which, _ in names] == [(1, 0, 0), (2, 0, 1), (2, 1, 0)]
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)
    labels = [(1, 0, 0, ["red", "blue"]), (2, 1, 0, ["red", "cyan"]), (2, 0, 1, ["cone", "cube"])]
    colors, shapes = compare.histograms(labels, weights)
    assert colors["red"] == 0.625 and colors["cyan"] == 0.375 and colors["blue"] == 0
    assert shapes["cone"] == 0.25 and shapes["cube"] == 0.75
    assert sum(colors.values()) == sum(shapes.values()) == 1


def made(name, seed, judged, gain, far, experiment="compare", reward="aesthetic", scale=1.0, spread=0.004, **settings):
    """A row; prompts gain `gain` plus and minus `spread`, lose a tenth of it in alignment, and more FID the more they gain."""
    change = dict.fromkeys(tables.METRICS, 0.0) | {"reward": gain, "alignment": -gain / 10, "fid_to_base": gain / 20}
    by_prompt = {name: [change[name] + spread * sign for sign in (-1, 1, -1, 1)] for name in compare.BY_PROMPT}
    return ABOUT | {"experiment": experiment, "name": name, "reward": reward, "mark": judged, "judged": judged,
                    "updates": judged, "settings": {"seed": seed, "lr": 1e-3} | settings, "scale": scale, "kl": far,
                    "train_seconds": 2.0 * judged, "kl_but_last": far / 2, "change": change, "by_prompt": by_prompt,
                    "before": dict.fromkeys(tables.METRICS, 0.5), "base": "x"}


def optimum(gain, far, beta, spread=0.1, reward="aesthetic"):
    return made("", 0, 0, gain, far, "tilt", reward) | {"beta": beta, "effective": 20.0, "spread": spread,
                                                        "share_within": 0.5}


def swept(gains, name="ReFL", lost=None):
    """A sweep: gains by lr and mark; prompts lose `lost` of alignment at the strengths that it names."""
    rows = [optimum(0.0, 0.0, 0.0)]
    for lr, path in gains.items():
        for judged, gain in path.items():
            rows.append(made(name, 0, judged, gain, 1.0, "sweep", lr=lr))
            rows[-1]["by_prompt"]["alignment"] = [-0.02, -0.03, -0.02, -0.03] if lr in (lost or []) else [-0.1, 0.1] * 2
    return rows


GAINS = {1e-4: {20: 0.02, 40: 0.03}, 1e-3: {20: 0.03, 40: 0.06}, 1e-2: {20: 0.01, 40: 0.09}}


def test_the_rule_takes_the_most_gain_at_no_measurable_loss():
    choice = tables.chosen(swept(GAINS, lost=[1e-2]), "aesthetic", "ReFL")
    assert choice.settings == {"lr": 1e-3} and choice.inside and choice.row["mark"] == 40
    assert not tables.chosen(swept(GAINS), "aesthetic", "ReFL").inside                  # 1e-2 is the largest that was tried
    assert tables.chosen(swept(GAINS), "aesthetic", "ReFL").settings == {"lr": 1e-2}
    near = {1e-4: {20: 0.001}, 3e-4: {20: 0.055}, 1e-3: {40: 0.06}, 1e-2: {20: -0.1}}   # within a tenth: FID decides
    assert tables.chosen(swept(near), "aesthetic", "ReFL").settings == {"lr": 3e-4}
    assert tables.chosen(swept(GAINS), "aesthetic", "DRaFT") is None is tables.chosen(swept(GAINS), "dnc", "ReFL")
    row = swept(GAINS)[1]
    assert tables.admissible(row)
    for lost, kept in ((-0.008, True), (-0.01, False)):                 # give or take 0.004
        assert tables.admissible(row | {"by_prompt": row["by_prompt"] | {"dnc": [lost - 0.004, lost + 0.004] * 2}}) == kept
    assert not tables.admissible(row | {"by_prompt": row["by_prompt"] | {"retrieved": [-0.1, 0.0, -0.1, -0.1]}})
    worse = {"by_prompt": row["by_prompt"] | {"alignment": [-0.1, -0.2, -0.1, -0.1]}}
    assert not tables.admissible(row | worse)


def test_no_table_has_a_method_whose_choice_lies_at_an_edge():
    ours = [made("ReFL", seed, 40, 0.06, 1.0, lr=lr) for seed in (0, 1) for lr in (1e-3, 1e-2)]
    inside = swept(GAINS, lost=[1e-2]) + ours
    assert "| ReFL | lr 1e-3 | 2 | 40 |" in tables.comparison(inside, "aesthetic")
    assert "**ReFL** | **lr 1e-3**" in tables.sweep(inside, "aesthetic")
    edge = swept(GAINS) + ours
    assert tables.comparison(edge, "aesthetic") == "" and "at an edge: not compared" in tables.sweep(edge, "aesthetic")
    again = [trial for trial in compare.trials("compare", "aesthetic", [2], inside)]
    assert [trial.settings for trial in again] == [{"lr": 1e-3, "seed": 2}] and again[0].name == "ReFL"
    assert compare.trials("compare", "aesthetic", [2], edge) == []


def test_intervals_cover_seeds_and_prompts():
    alike = [made("ReFL", seed, 40, 0.06, 1.0, spread=0.0) for seed in (0, 1)]
    assert tables.interval(alike, "reward") == pytest.approx((0.06, 0.06))
    prompts = [made("ReFL", seed, 40, 0.06, 1.0, spread=0.04) for seed in (0, 1)]
    seeds = [made("ReFL", seed, 40, gain, 1.0, spread=0.0) for seed, gain in enumerate((0.02, 0.1))]
    for rows in (prompts, seeds):       # +-0.04 over four prompts, which both seeds share; over two seeds
        low, high = tables.interval(rows, "reward")
        assert low == pytest.approx(0.02, abs=0.005) and high == pytest.approx(0.1, abs=0.005)
    mean, half = tables.over_seeds([1.0, 2.0, 6.0])
    assert mean == 3 and half == pytest.approx(4.3027 * (7 / 3) ** 0.5, rel=1e-4)       # t for 2 degrees of freedom


def test_equal_gain_is_read_off_the_marks_and_the_scales():
    rows = swept(GAINS, lost=[1e-2]) + [optimum(0.15, 0.5, 10.0)]
    rows += [made("ReFL", seed, judged, gain, 1.0) for seed in (0, 1) for judged, gain in ((20, 0.04), (40, 0.16))]
    rows += [made("ReFL", seed, 40, 0.08, 1.0, scale=0.5) for seed in (0, 1)] + [made("ReFL", 1, 80, 0.9, 9.0)]
    seeds = tables.compared(rows, "aesthetic", "ReFL")
    assert [tables.gain(point) for point in seeds.marks] == pytest.approx([0.04, 0.16])         # 80 is not in both seeds
    assert [tables.gain(point) for point in seeds.scales] == pytest.approx([0.08, 0.16])
    text = tables.at_equal_gain(rows, "aesthetic", (0.2, 1.0, 2.0))
    assert "| 1 sd | **exact tilt** | – | – | – | +0.005 | -0.010 |" in text
    assert "| 0.2 sd | ReFL | at most 20 | at most 20 | at most 40 | +0.001 | -0.002 (" in text
    assert "| 1 sd | ReFL | 30 | 30 | 60 | +0.005 | -0.010 (" in text and "| 2 sd | ReFL | not by 40 |" in text
    lost = made("ReFL", 2, 20, 0.1, 1.0) | {"diverged": "nan"}
    assert "| ReFL (1 diverged) |" in tables.comparison([*rows, lost], "aesthetic")
    assert tables.where([0.1, 0.05, 0.3], 0.2) == (2, pytest.approx(0.6)) and tables.where([0.1], 0.2) is None


def test_a_run_of_the_script_is_a_row(tmp_path):
    """Its command without where it wrote to, and its summary's changes, in deviations too."""
    about = {"config": {"reward": "dnc"}, "seed": 3, "git_commit": "abc",
             "command": ["r2d3.py", "--reward", "dnc", "--out", "somewhere", "--epochs", "2"]}
    metric = {"before": 0.9, "after": 0.92, "change": 0.02, "ci95": [0.01, 0.03], "standard_errors": 4.0}
    summary = {name: metric for name in ("reward", *tables.RUN_METRICS)}
    summary |= {"judged": 32, "updates": 32, "prompts": 24, "samples_per_prompt": 4, "seconds": 9.0, "other": 1}
    for name, content in (("config", about), ("summary", summary)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    row = tables.run_row(tmp_path)
    assert row["base"] == tables.base_hash() and row["commit"] == "abc"
    text = tables.runs([optimum(0.0, 0.0, 0.0, spread=0.04, reward="dnc"), row])
    assert "| `--reward dnc --epochs 2` | 32 | 32 | +0.0200 (+0.0100 .. +0.0300) | 0.50 | +0.020 |" in text


def test_a_sweep_is_read_at_equal_gain():
    """Between the two points that are nearest, of strengths and of the largest one turned down; at its last mark."""
    rows = swept(GAINS) + [made("ReFL", 0, 40, 0.07, 1.0, "scales", scale=0.6, lr=1e-2)]
    assert [tables.gain(point) for point in tables.curve_of(rows, "aesthetic", "ReFL")] == [0.03, 0.06, 0.07, 0.09]
    rows[-1]["by_prompt"]["alignment"] = [0.0] * 4
    rows[-2]["by_prompt"]["alignment"] = [-0.02] * 4                # of the largest strength in full, which gains 0.09
    rows[-1]["change"]["alignment"], rows[-2]["change"]["alignment"] = 0.0, -0.02
    text = tables.swept_gain(rows, "aesthetic", (0.8, 1.0))
    assert "| 0.8 sd | ReFL | -0.010 (-0.010 .. -0.010) |" in text and "| 1 sd |" not in text
    strongest = compare.trials("scales", "aesthetic", [0], [])
    assert {trial.settings.get("lr") for trial in strongest if trial.name == "ReFL"} == {1e-3}
    assert {trial.measured_on for trial in strongest} == {"sweep"} and len(strongest) == len(compare.STRENGTHS["aesthetic"])


def test_nothing_may_lie_above_the_optimum():
    curve = [optimum(0.0, 0.0, 0.0), optimum(0.1, 0.5, 10.0), optimum(0.2, 2.0, 20.0)]
    honest, wrong, far = made("ReFL", 0, 5, 0.2, 2.5), made("ReFL", 1, 5, 0.2, 0.4), made("ReFL", 2, 5, 0.9, 1.9)
    assert tables.above([*curve, honest, wrong, far], "aesthetic") == [wrong, far]


def test_small_betas_are_held_against_the_tilt():
    rows = [optimum(0.0, 0.0, 0.0), optimum(0.1, 0.5, 10.0)]
    rows += [made("beta 1sd", 0, judged, gain, 1.0, "beta", beta=5.0) | {"beta": 5.0} for judged, gain in ((64, 0.02), (128, 0.045))]
    assert "| 1sd | +0.0500 | +0.0200 (64), +0.0450 (128) | 0.90 |" in tables.small_betas(rows, "aesthetic")


def test_the_readme_has_the_base_as_it_was_measured():
    quality = json.loads(load_weights(ROOT / "support/shapes.safetensors")[1]["quality"])
    text = (ROOT / "experiments/README.md").read_text(encoding="utf-8")
    quoted = [line for line in text.partition("## 1.")[2].partition("\n## ")[0].splitlines() if line.startswith("| ")]
    assert len(quoted) > 10 and {*quoted} <= {*tables.base_table(quality).splitlines()}


def test_the_committed_rows_are_the_claim(tmp_path):
    """Every row is there once, nothing beats the optimum, and the README's tables are made from the rows."""
    rows = tables.read(tables.ROWS, tables.base_hash())
    keys = [json.dumps([row.get(name) for name in ("experiment", "name", "reward", "settings", "mark", "scale", "beta")],
                       sort_keys=True) for row in rows]
    assert len({*keys}) == len(keys) > 0, "the embedded base has changed: make the rows again (experiments/compare.py)"
    for reward in compare.REWARDS:
        assert len(tables.optimum(rows, reward)) > 3 and tables.above(rows, reward) == []
    text, lines = (ROOT / "experiments/README.md").read_text(encoding="utf-8"), tables.tables(rows).splitlines()
    for title in ("## 2.", "## 3.", "## 4.", "## 5."):
        section = text.partition(title)[2].partition("\n## ")[0].partition("\n# ")[0]
        quoted = [line for line in section.splitlines() if line.startswith("| ")]
        assert len(quoted) >= 3 and {*quoted} <= {*lines}, {*quoted} - {*lines}
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
