"""experiments/bench.py: its inputs are what they claim to be, and a run writes complete rows."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

import bench  # noqa: E402

CPU = torch.device("cpu")
ROW = {"op", "shape", "backend", "pass", "dtype", "ms_p20", "ms_p50", "ms_p80", "peak_mb", "reps", "floor_ms",
       "floor", "gpu", "torch", "triton", "cuda", "commit", "date", "cmd"}


def test_scene_is_a_splat_grid_on_spheres():
    means, quats, scales, opacities, colors = bench.scene(2, 4, 4 * 32**2, CPU, seed=0)
    assert [tuple(x.shape) for x in (means, quats, scales, opacities, colors)] == [
        (2, 4096, 3), (2, 4096, 4), (2, 4096, 3), (2, 4096), (2, 4096, 3)]
    assert 0.3 < (opacities > 0).float().mean() < 0.5
    assert means.abs().max() < 0.6 and scales.min() > 0 and 0 <= colors.min() and colors.max() <= 1
    assert torch.allclose(quats.norm(dim=-1), torch.ones(2, 4096))
    again = bench.scene(2, 4, 4 * 32**2, CPU, seed=0)
    other = bench.scene(2, 4, 4 * 32**2, CPU, seed=1)
    assert torch.equal(again[0], means) and not torch.equal(other[0], means)


def test_cameras_look_at_the_origin():
    c2w = bench.cameras(1, 4, CPU)[0]
    assert torch.allclose(c2w[:, :3, :3] @ c2w[:, :3, :3].mT, torch.eye(3).expand(4, 3, 3), atol=1e-6)
    assert torch.allclose(c2w[:, :3, 3] + 1.4 * c2w[:, :3, 2], torch.zeros(4, 3), atol=1e-6)
    assert (c2w[:, 1, 3] > 0).all() and (c2w[:, 1, 1] < 0).all()  # above the object, y down


def test_mean_pairs_counts_until_the_early_exit():
    # Layers that fill the image: 0.5 leaves 2^-n of the light, so 14 of 20 are reached before T < 1e-4.
    n = 20
    layers = [torch.zeros(1, n, 3), torch.tensor([1.0, 0, 0, 0]).expand(1, n, 4),
              torch.full((1, n, 3), 100.0), torch.full((1, n), 0.5), torch.zeros(1, n, 3)]
    assert bench.mean_pairs(layers, 4, 64) == 14
    layers[3] = torch.full((1, n), 1 / 512)
    assert bench.mean_pairs(layers, 4, 64) == 0


def test_goals_are_judged(capsys):
    def row(op, shape, backend, ms, mb=1.0, name="forward+backward"):
        return {"op": op, "shape": shape, "dtype": "float32", "backend": backend, "pass": name,
                "ms_p50": ms, "peak_mb": mb, "floor_ms": 1.0}

    bench.goals([row("rasterize", "diffsplat", "triton", 1.0, 2.0),
                 row("rasterize", "diffsplat", "gsplat", 1.75),
                 row("rasterize", "diffsplat", "triton", 1.0, name="forward"),
                 row("rasterize", "diffsplat", "gsplat", 1.1, name="forward"),
                 row("rasterize", "diffsplat", "triton, graph", 1.05),
                 row("rasterize", "embedded", "triton", 1.0), row("rasterize", "embedded", "gsplat", 3.9),
                 {"op": "kernels", "shape": "diffsplat", "backend": "triton", "us": {"a": [2.0, 600.0], "b": [1.0, 400.0]}},
                 row("gradient_matching", "large", "triton", 1.2),
                 {"op": "cost", "what": "4 objects, --checkpoint", "peak_GB": 25.5}])
    lines = capsys.readouterr().out.splitlines()
    for line in ("diffsplat, forward + backward: gsplat's time / ours, wanted >= 1.6: met (1.75)",
                 "diffsplat, forward: the same, wanted >= 1.2: MISSED (1.10)",
                 "diffsplat: our peak memory / gsplat's, wanted <= 1.5: MISSED (2.00)",
                 "diffsplat: a captured graph / its kernels, wanted <= 1.1: met (1.05)",
                 "embedded, forward + backward: gsplat's time / ours, wanted >= 4: MISSED (3.90)",
                 "gaussiancube, forward: the same, wanted >= 1.2: not measured",
                 "gradient_matching, large: our time / the bandwidth floor, wanted <= 1.3: met (1.20)",
                 "the paper's base, 4 objects with --checkpoint: peak GB, wanted <= 24: MISSED (25.50)"):
        assert f"  {line}" in lines, line


def test_quick_run_appends_complete_rows(tmp_path):
    out = tmp_path / "bench.jsonl"
    out.write_text('{"op": "kept"}\n')
    options = ["--device", "cpu", "--out", str(out), "--quick", "--only", "time", "sweep", "matching"]
    done = subprocess.run([sys.executable, str(ROOT / "experiments/bench.py"), *options], cwd=ROOT, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kept, *rows = map(json.loads, out.read_text().splitlines())
    assert kept == {"op": "kept"} and {row["step"] for row in rows} == {"time", "sweep", "matching"}
    timed = [row for row in rows if "pass" in row]
    assert {row["pass"] for row in timed} == {"forward", "forward+backward"}
    for row in timed:
        keys = ROW | ({"M", "n"} if row["op"] == "gradient_matching" else {"B", "V", "N", "H", "W", "live"})
        assert row.keys() >= keys, keys - row.keys()
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] and row["floor_ms"] > 0 and row["host_ms"] > 0
        assert row["cmd"].startswith("python experiments/bench.py --device cpu") and row["cmd"].endswith("matching")
    assert {row["backend"] for row in timed if row["op"] == "rasterize"} == {"torch", "torch, picture"}
    sweep, = (row for row in rows if row["op"] == "sweep")
    assert sweep["variant"] == "8 x 8, 1 warp" and sweep["forward+backward"] > 0
    assert "---- cost" not in done.stdout and "the goals are a GPU's" in done.stdout
    assert "tiny" in done.stdout  # the table


def test_steps_are_stopped_and_left_out_in_time(tmp_path, monkeypatch, capfd):
    out = tmp_path / "bench.jsonl"
    monkeypatch.setattr(bench, "STEPS", {"environment": (bench.environment, 0.3, 0), "cost": (bench.cost, 300, 60)})
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--out", str(out), "--budget", "10", "--only", "environment",
                                     "cost"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    said = capfd.readouterr().out
    assert stop.value.code == 0 and not out.exists()
    assert "environment: stopped after 0 seconds" in said and "cost: left out, " in said


def step(name, path):
    """What a step writes when it is run in this process."""
    getattr(bench, name)(bench.Rows(path, name, CPU, "now", "test"), CPU, True)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_cost_is_read_from_r2d3(tmp_path, monkeypatch):
    said = 'a line\n{\n "objects": 4,\n "seconds": {"all": 3.0},\n "peak_GB": 1.5\n}\n'
    monkeypatch.setattr(bench, "run", lambda program, arguments, limit: (0, 9.0, "{\n \"a\": 1\n}\n" + said))
    row, = step("cost", tmp_path / "rows.jsonl")
    assert row["peak_GB"] == 1.5 and row["seconds"] == {"all": 3.0} and row["wall_s"] == 9.0
    monkeypatch.setattr(bench, "run", lambda program, arguments, limit: (None, 90.0, "out of time"))
    _, row = step("cost", tmp_path / "rows.jsonl")
    assert row["error"] == "exit code None: out of time"


def test_r2d3_is_called_as_documented():
    """The options of the cost step exist; a limit ends the child."""
    code, seconds, output = bench.run("r2d3.py", ["cost", "--help"], 60)
    words = {word for word in output.replace(",", " ").split() if word.startswith("--")}
    asked = {word for options, _, _ in bench.COST.values() for word in options if word.startswith("--")}
    assert code == 0 and {"--batch-size", "--micro-batch", "--estimator"} <= asked and asked | {"--weights"} <= words
    assert bench.run("r2d3.py", ["--help"], 0.1)[0] is None


def test_cost_of_an_epoch_with_ways_of_its_own():
    small = ["--batch-size", "2", "--updates-per-epoch", "1", "--view-size", "16", "--steps", "6"]
    code, _, output = bench.run("experiments/bench.py", ["--ways", "channels_last", *small, "--device", "cpu"], 200)
    assert code == 0 and "reward gradient" in output and output.count("epoch done") == 1, output[-2000:]


def test_wrong_results_are_not_timed(tmp_path, monkeypatch):
    really = bench.check(CPU)
    monkeypatch.setattr(bench, "check", lambda device: [*really, ("a", 1.0, 1e-3), ("b", float("nan"), 1e-3)])
    with pytest.raises(SystemExit) as stop:
        step("correct", tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert stop.value.code == 1 and [row["ok"] for row in rows] == [True] * 13 + [False, False, True]
    assert rows[-1]["what"] == "tests that need a GPU" and rows[-1]["failed"] == 0


def test_a_variant_is_another_module():
    module = bench.variant("16 x 8, 4 warps")
    sides, program = module._tiling(4, 256, 256)
    assert sides == {"TILE_X": 16, "TILE_Y": 8} and program["WARPS"] == program["num_warps"] == 4
    assert [bench.splat._tiling(views, 256, 256)[0]["TILE_Y"] for views in (4, 8, 12)] == [4, 4, 8]
    assert len(bench.VARIANTS) == 20
    assert bench.variant("lanes 256, 8 warps").LANES["BLOCK"] == 256


def test_the_readme_says_what_was_measured(capsys, monkeypatch):
    """experiments/README.md's table is made from the committed rows, and --show prints it."""
    rows = ROOT / "experiments/results/kernels.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench", "--show", str(rows)])
    bench.main()
    printed = capsys.readouterr().out.splitlines()
    table = [line for line in printed if line.startswith("| ")]
    assert len(table) == 1 + len(bench.SPLAT)
    text = (ROOT / "experiments/README.md").read_text(encoding="utf-8").splitlines()
    assert all(line in text for line in table)
    assert {json.loads(line)["gpu"] for line in rows.read_text().splitlines()} == {"NVIDIA H100 80GB HBM3"}
