"""assets/compare.py: trials go on where they stopped, tables say what the rows say, and the README says what the tables say."""
import fcntl
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "assets"))
sys.path.insert(0, str(ROOT))

import compare  # noqa: E402

import r2d3  # noqa: E402

TINY = compare.NABLA | {"batch_size": 2, "updates_per_epoch": 2, "view_size": 16, "fraction": 0.2, "seed": 0, "reward": "aesthetic"}
ABOUT = {"experiment": "compare", "name": "tiny", "cmd": "a test"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r2d3, "load_prompts", lambda spec: ["a red cube", "a blue cone", "a green sphere"])
        return compare.World("aesthetic", 2, tmp_path_factory.mktemp("world"))


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


def made(name, seed, mark, gain, alignment):
    metrics = {metric: {"change": 0.0, "after": 0.0} for metric in compare.METRICS}
    metrics |= {"reward": {"change": gain, "after": gain}, "alignment": {"change": alignment, "after": 0.0}}
    return ABOUT | {"name": name, "settings": {"seed": seed, "reward": "aesthetic"}, "mark": mark, "judged": mark,
                    "updates": mark, "train_seconds": 1.0, "scorer": "-", **metrics}


def test_equal_reward_is_read_off_the_curve():
    rows = [made("a", 0, 10, 0.1, -0.01), made("a", 0, 20, 0.3, -0.05), made("a", 1, 10, 0.2, -0.02), made("a", 1, 20, 0.1, -0.5)]
    marks = compare.curves(rows, "aesthetic")["a"]
    assert compare.at_equal_reward(marks, 0.2, "alignment") == pytest.approx([-0.03, -0.02])
    assert compare.at_equal_reward(marks, 0.2, "judged") == pytest.approx([15, 10])
    assert compare.at_equal_reward(marks, 0.05, "alignment") == pytest.approx([-0.005, -0.005])     # from the untouched base
    assert compare.at_equal_reward(marks, 0.25, "alignment") is None                                # one seed never got there
    mean, half = compare.spread([1.0, 2.0, 6.0])
    assert mean == 3 and half == pytest.approx(4.3027 * (7 / 3) ** 0.5, rel=1e-4)                    # t for 2 degrees of freedom
    assert "-0.025 ± 0.064" in compare.tables(rows)


def test_the_committed_rows_are_the_claim(tmp_path):
    """Three seeds of each method, every setting once, and the README's table is made from them."""
    rows = [row for row in compare.read(compare.ROWS)]
    keys = [json.dumps([row["settings"], row["mark"], row["samples_per_prompt"]], sort_keys=True) for row in rows]
    assert len(set(keys)) == len(keys)
    methods = {name for name, *_ in compare.trials("compare", "aesthetic", [0], quick=False)}
    for name in methods:
        found = [row for row in rows if row["experiment"] == "compare" and row["name"] == name
                 and row["settings"]["reward"] == "aesthetic"]
        assert {row["settings"]["seed"] for row in found} >= {0, 1, 2}, name
        assert {row["settings"]["method"] for row in found} == {name.split("-")[0].split(",")[0].lower()}
    assert set(compare.ABLATIONS) <= {row["name"] for row in rows if row["experiment"] == "ablate"}
    assert {row["settings"]["reward"] for row in rows} == {"aesthetic", "hpsv2", "dnc"}
    readme = (ROOT / "README.md").read_text()
    lines = compare.tables(rows).splitlines()
    quoted = [line for line in readme.splitlines() if line.startswith("| +0.") and "evaluations" not in line]
    assert len(quoted) >= 10 and set(quoted) <= set(lines), set(quoted) - set(lines)
    compare.plot(rows, "aesthetic", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 20_000
