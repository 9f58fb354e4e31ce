"""experiments/compare.py: trials go on where they stopped, tables say what the rows say, and the README says what the tables say."""
import fcntl
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

import compare  # noqa: E402

import r2d3  # noqa: E402

TINY = compare.NABLA | {"batch_size": 2, "updates_per_epoch": 2, "view_size": 16, "fraction": 0.2, "seed": 0, "reward": "aesthetic"}
ABOUT = {"experiment": "compare", "name": "tiny", "cmd": "a test"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r2d3, "load_prompts", lambda spec: ["a red cube", "a blue cone", "a green sphere"])
        return compare.World("aesthetic", 2, True, tmp_path_factory.mktemp("world"))


def test_the_sweep_is_measured_on_prompts_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(compare.World, "measure", lambda self, seed: compare.metrics.Measurement(
        *[r2d3.torch.zeros(1)] * len(compare.metrics.Measurement._fields)))
    worlds = {unseen: compare.World("aesthetic", 1, unseen, tmp_path) for unseen in (True, False)}
    train, test = (r2d3.load_prompts(str(ROOT / f"prompts/shapes_{part}.txt")) for part in ("train", "test"))
    assert (worlds[True].prompts, worlds[True].test_prompts) == (train, test)
    tuned, judged = worlds[False].prompts, worlds[False].test_prompts
    assert len(judged) == 50 and not {*tuned} & {*judged} and {*tuned, *judged} == {*train} and not {*judged} & {*test}
    assert len(list(tmp_path.glob("base-*.pt"))) == 4           # neither takes the other's base measurements


def test_every_method_is_tuned_alike():
    for reward in compare.BETA:
        settings = [json.dumps(settings, sort_keys=True) for _, settings, _ in compare.trials("tune", reward, [0], False, compare.ROWS)]
        count = [sum(f'"method": "{method}"' in one for one in settings) for method in ("nabla", "draft", "refl")]
        assert len({*settings}) == len(settings) and len({*count}) == 1


def strip(row):
    return {name: value for name, value in row.items() if name not in ("train_seconds", "commit")}


def test_a_trial_goes_on_where_it_stopped(world, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    compare.run(world, TINY, [1, 6], ABOUT, tmp_path / "straight.jsonl", tmp_path / "one")
    for marks in ([1], [1, 6], [1, 6]):
        compare.run(world, TINY, marks, ABOUT, tmp_path / "resumed.jsonl", tmp_path / "two")
    straight, resumed = (compare.read(tmp_path / f"{name}.jsonl") for name in ("straight", "resumed"))
    assert [row["mark"] for row in straight] == [1, 6] and [strip(row) for row in straight] == [strip(row) for row in resumed]
    assert straight[0]["judged"] >= 1 and straight[1]["judged"] >= 6 and straight[1]["reward"]["change"] != 0
    compare.run(world, TINY, [1, 2, 6], ABOUT, tmp_path / "resumed.jsonl", tmp_path / "two")       # a mark before its state
    assert [row["mark"] for row in compare.read(tmp_path / "resumed.jsonl")] == [1, 6, 2]


def test_a_trial_that_another_process_has_is_left_alone(world, tmp_path):
    compare.run(world, TINY, [1], ABOUT, tmp_path / "rows.jsonl", tmp_path)
    lock, = tmp_path.glob("*.lock")
    with open(lock, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        compare.run(world, TINY, [6], ABOUT, tmp_path / "rows.jsonl", tmp_path)
    assert len(compare.read(tmp_path / "rows.jsonl")) == 1


def test_a_trial_that_diverges_is_a_row(world, tmp_path):
    broken = TINY | {"beta": 1e30, "lr": 1e30}
    for _ in range(2):
        compare.run(world, broken, [30], ABOUT, tmp_path / "rows.jsonl", tmp_path)
    row, = compare.read(tmp_path / "rows.jsonl")
    assert "not finite" in row["diverged"] and "not finite" in compare.tables([row | {"experiment": "tune"}])
    assert compare.sweeps([row | {"experiment": "tune"}]) == {}


def made(name, seed, mark, gain, alignment, **more):
    metrics = {metric: {"change": 0.0, "after": 0.0} for metric in compare.METRICS}
    metrics |= {"reward": {"change": gain, "after": gain}, "alignment": {"change": alignment, "after": 0.0}}
    return ABOUT | {"name": name, "settings": {"seed": seed, "reward": "aesthetic", "method": "nabla", "estimator": "step"} | more, "mark": mark,
                    "judged": mark, "updates": mark, "train_seconds": 1.0, "samples_per_prompt": 2, "scorer": "-", **metrics}


def test_equal_reward_is_read_off_the_curve():
    rows = [made("a", 0, 10, 0.1, -0.01), made("a", 0, 20, 0.3, -0.05), made("a", 1, 10, 0.2, -0.02), made("a", 1, 20, 0.1, -0.5)]
    marks = compare.curves(rows, "aesthetic")["nabla-R2D3, per step"]
    assert compare.at_equal_reward(marks, 0.2, "alignment") == pytest.approx([-0.0276, -0.02], abs=1e-4)    # 2^(log 5 / log 3)
    assert compare.at_equal_reward(marks, 0.2, "judged") == pytest.approx([15.486, 10], abs=1e-3)            # 2^(log 2 / log 3)
    assert compare.at_equal_reward(marks, 0.1, "alignment") == pytest.approx([-0.01, -0.01])
    assert compare.at_equal_reward(marks, 0.05, "alignment") == pytest.approx([-0.005, -0.005])     # from the untouched base
    assert compare.at_equal_reward(marks, 0.25, "alignment") is None                                # one seed never got there
    mean, half = compare.spread([1.0, 2.0, 6.0])
    assert mean == 3 and half == pytest.approx(4.3027 * (7 / 3) ** 0.5, rel=1e-4)                    # t for 2 degrees of freedom
    assert "-0.024 ± 0.048" in compare.tables(rows)
    sweep = compare.tables([row | {"experiment": "tune"} for row in rows if row["settings"]["seed"] == 0])
    assert "| nabla-R2D3, per step | 13 | -0.018 |" in sweep and "| +0.300 |" in sweep
    rising = [made("a", 0, 10, 0.1, 0.01), made("a", 0, 20, 0.3, -0.03)]        # no power law through a change of sign
    assert compare.reached(rising, 0.2, "alignment") == pytest.approx(-0.01)


def test_the_sweep_chooses_what_is_compared():
    """Of every kind what loses least at +0.2 and what gets there first, of what gains a tenth more; else the largest gain."""
    rows = [made("-", 0, mark, gain, lost, lr=lr) | {"experiment": "tune"} for lr, path in {
        1e-4: [(20, 0.12, -0.004), (60, 0.25, -0.01)],
        2e-4: [(10, 0.12, -0.008), (30, 0.25, -0.02)],
        3e-4: [(5, 0.12, -0.001), (15, 0.21, -0.002)],                          # gains 0.2, but not a tenth more
    }.items() for mark, gain, lost in path]
    rows += [made("-", 0, 30, 0.05 * n, -0.01, method="ddpo", lr=n * 1e-4) | {"experiment": "tune"} for n in (1, 2)]
    found = {settings["lr"] if settings["method"] == "nabla" else settings["method"]: (marks, reasons)
             for settings, marks, reasons in compare.chosen(rows, "aesthetic")[2:]}     # after the two defaults
    assert {name: reasons for name, (_, reasons) in found.items()} == {
        1e-4: ["least lost"], 2e-4: ["fewest evaluations"], "ddpo": ["most gained"]}
    assert found[2e-4][0] == [12, 16, 24, 32, 64]               # around 21 evaluations, and one late mark
    trial = made("-", 0, 20, 0.1, -0.01, lr=2e-4)
    more = [trial, trial | {"settings": trial["settings"] | {"seed": 1}}, trial | {"mark": 30}]
    assert [[*marks] for marks in compare.curves([*rows, *more], "aesthetic").values()] == [[20]]     # of 30 a seed lacks
    other = made("-", 0, 20, 0.1, -0.01, lr=9e-4)               # an earlier trial that the sweep did not choose
    assert [*compare.curves([*rows, trial, other], "aesthetic")] == [compare.label(trial["settings"])]


def test_one_object_has_no_diversity():
    row = made("a", 0, 10, 0.1, -0.01)
    assert compare.cell([row], "diversity") == "+0.000" and compare.cell([row | {"samples_per_prompt": 1}], "diversity") == "–"


def test_the_committed_rows_are_the_claim(tmp_path):
    """Three seeds of each method, every setting once, and the README's tables are made from them."""
    rows = compare.read(compare.ROWS)
    keys = [json.dumps([row[name] for name in ("experiment", "settings", "mark", "samples_per_prompt", "prompts")], sort_keys=True)
            for row in rows]
    assert len(set(keys)) == len(keys)
    for seed in range(3):                                       # every trial of the comparison is there, to its last mark
        for name, settings, marks in compare.trials("compare", "aesthetic", [seed], False, compare.ROWS):
            found = [row["mark"] for row in rows if row["experiment"] == "compare" and row["settings"] == settings]
            assert {*marks} <= {*found}, name
    assert set(compare.ABLATIONS) <= {row["name"] for row in rows if row["experiment"] == "ablate"}
    for reward in compare.BETA:                                 # every trial of the sweep is there
        wanted = [settings for _, settings, _ in compare.trials("tune", reward, [0], False, compare.ROWS)]
        there = [row["settings"] for row in rows if row["experiment"] == "tune"]
        assert all(settings in there for settings in wanted), reward
    assert {row["settings"]["reward"] for row in rows} == {"aesthetic", "hpsv2", "dnc"}
    assert {(row["name"], row["settings"]["seed"]) for row in rows if row["experiment"] == "recipe"} == {
        (f"--recipe {recipe}", seed) for recipe in ("fast", "paper") for seed in range(3)}
    text, lines = (ROOT / "experiments/README.md").read_text(encoding="utf-8"), compare.tables(rows).splitlines()
    for title in ("## 1.", "## 3.", "## 5."):
        section = text.partition(title)[2].partition("\n## ")[0]
        quoted = [line for line in section.splitlines() if line.startswith("| ")]
        assert len(quoted) >= 5 and set(quoted) <= set(lines), set(quoted) - set(lines)
    compare.plot(rows, "aesthetic", tmp_path / "plot.png")
    compare.plot_sweep(rows, tmp_path / "sweep.png")
    assert min((tmp_path / name).stat().st_size for name in ("plot.png", "sweep.png")) > 20_000


def test_the_first_table_is_the_committed_run():
    """experiments/results/default.json is the summary.json of the README's first command."""
    summary = json.loads((ROOT / "experiments/results/default.json").read_text(encoding="utf-8"))
    names = {"reward": "**reward: colourfulness**", "alignment": "alignment: image-text cosine", "retrieved": "retrieval R@1",
             "coverage": "alpha coverage", "dnc": "geometry: depth-normal consistency", "diversity": "diversity",
             "fid_to_base": "FID to the base"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for metric, name in names.items():
        value = summary[metric]
        after = f"{value['after']:.3f}" if metric != "reward" else f"**{value['after']:.3f}**"
        low, high = value["ci95"]
        assert f"| {name} | {value['before']:.3f} | {after} | {low:+.3f} .. {high:+.3f} |" in readme
