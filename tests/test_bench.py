"""kernels.bench: its inputs are what they claim to be, and a run writes complete rows."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kernels import bench  # noqa: E402

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
    def row(op, shape, backend, ms, mb=1.0):
        return {"op": op, "shape": shape, "dtype": "float32", "backend": backend, "pass": "forward+backward",
                "ms_p50": ms, "peak_mb": mb, "floor_ms": 1.0}

    bench.goals([row("rasterize", "diffsplat", "triton", 1.0, 2.0),
                 row("rasterize", "diffsplat", "gsplat", 1.5),
                 row("gradient_matching", "large", "triton", 1.2)])
    lines = capsys.readouterr().out.splitlines()
    assert any("diffsplat: gsplat's time / ours, wanted >= 1.3: met (1.50)" in line for line in lines)
    assert any("diffsplat: gsplat's peak memory / ours, wanted >= 1: MISSED (0.50)" in line for line in lines)
    assert any("bandwidth floor, wanted <= 1.3: met (1.20)" in line for line in lines)
    assert any("eager PyTorch's time / ours, wanted >= 5: not measured" in line for line in lines)


@pytest.mark.parametrize("op, keys", [("matching", {"M", "n"}), ("splat", {"B", "V", "N", "H", "W", "live"})])
def test_quick_run_appends_complete_rows(tmp_path, op, keys):
    out = tmp_path / "bench.jsonl"
    out.write_text('{"op": "kept"}\n')
    done = subprocess.run(
        [sys.executable, "-m", "kernels.bench", "--quick", "--op", op, "--device", "cpu", "--out", str(out)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kept, *rows = map(json.loads, out.read_text().splitlines())
    assert kept == {"op": "kept"} and {row["pass"] for row in rows} == {"forward", "forward+backward"}
    for row in rows:
        assert row.keys() >= ROW | keys, (ROW | keys) - row.keys()
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] and row["floor_ms"] > 0
