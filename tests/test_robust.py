"""Nothing lost, nothing silent: faults that were found by trying to break r2d3, each with the right behaviour."""
import ast
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import r2d3
from support import (
    UserError,
    brief,
    cache_folder,
    clear_parts,
    cli,
    folders,
    inputs,
    metrics,
    processes,
    published,
    report,
    scorers,
    shapes,
    to_json,
    write_atomic,
)

ROOT = Path(__file__).resolve().parents[1]
TINY = r2d3.Config(epochs=1, batch_size=2, steps=4, fraction=1.0, views=2, view_size=16, samples_per_prompt=1,
                   updates_per_epoch=1, eval_batch=2, lr=1e-3)
REWARD = """from __future__ import annotations
from dataclasses import dataclass
from beside import SCALE

@dataclass
class Settings:
    scale: float = SCALE

def score(render, prompts):
    return (render.image.mean((2, 3, 4)) * Settings().scale).bfloat16()
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prompt lists, and a reward of one's own in bf16 that imports a file beside it."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "train.txt").write_text("a red cube\na blue cone\na green cylinder\n", encoding="utf-8")
    (folder / "test.txt").write_text("a big green cylinder\na small red cube\na big green cylinder\n", encoding="utf-8")
    (folder / "own,x=1").mkdir()
    (folder / "own,x=1/mine.py").write_text(REWARD, encoding="utf-8")
    (folder / "own,x=1/beside.py").write_text("SCALE = 2.0\n", encoding="utf-8")
    return folder


def tiny(home, out, **changes):
    given = {"prompts": str(home / "train.txt"), "test_prompts": str(home / "test.txt"), "out": str(out)}
    return dataclasses.replace(TINY, **given | changes)


@pytest.fixture(scope="module")
def own(home, tmp_path_factory):
    """A finished run with that reward, given by a relative path."""
    out, before = tmp_path_factory.mktemp("runs") / "own", os.getcwd()
    os.chdir(home)
    try:
        summary = r2d3.train(tiny(home, out, reward="own,x=1/mine.py:score=2,dnc"))
    finally:
        os.chdir(before)
    return out, summary


@pytest.fixture(scope="module")
def base():
    return r2d3.load_base(r2d3.resolve(r2d3.Config(device="cpu")), "cpu")


def job_of(base, reward=None, steps=2, **settings):
    """A job on the base, which nothing was trained of yet."""
    config = r2d3.resolve(dataclasses.replace(TINY, device="cpu", steps=steps, guidance=2.0, **settings))
    return r2d3.Job(base, reward, base.schedule("dpm", steps), base.encode([""]), config)


def fresh_base():
    return r2d3.load_base(r2d3.resolve(r2d3.Config(device="cpu")), "cpu")


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700, text
    return text


# ---- 1 and 12: rewards of one's own ---------------------------------------------------------------------------


def pictures(objects=2, views=3, requires_grad=True):
    image = torch.rand(objects, views, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(image=image.requires_grad_(requires_grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_become_float32(dtype):
    render = pictures()
    score = inputs.call_reward(lambda render, prompts: render.image.mean((2, 3, 4)).to(dtype), "mine", render, ["a", "b"])
    assert score.dtype == torch.float32 and score.requires_grad
    score.sum().backward()
    assert render.image.grad.abs().sum() > 0
    whole = torch.ones(2, 3, dtype=torch.long)
    counted = inputs.call_reward(lambda render, prompts: whole, "mine", pictures(requires_grad=False), [])
    assert counted.dtype == torch.float32


def several_lines(render, prompts):
    raise ValueError("first\nsecond " + "x" * 1000)


@pytest.mark.parametrize("function, words", [
    (lambda render, prompts: render.image.detach().mean((2, 3, 4)).numpy(), "returned a ndarray"),
    (lambda render, prompts: 1.0, "returned a float"),
    (lambda render, prompts: None, "returned a NoneType"),
    (lambda render, prompts: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "returned a Tensor"),
    (lambda render, prompts: render.image.mean((2, 3, 4)) * 1j, "wanted real numbers"),
    (lambda render, prompts: render.image.mean((2, 3, 4)).to_sparse(), "wanted real numbers"),
    (lambda render, prompts: render.image.mean((1, 2, 3, 4)), "returned (2,); wanted (objects, views), here (2, 3)"),
    (lambda render, prompts: render.image.detach().mean((2, 3, 4)), "no gradient"),
    (lambda render, prompts: torch.ones(2, 3, dtype=torch.bool), "no gradient"),
    (lambda render, prompts: render.image.mean((2, 3, 4)) / 0, "not finite: [inf, inf, inf] for 'a'; mend it"),
    (lambda render, prompts: sys.exit(), "it called sys.exit(None) (test_robust.py, line"),
    (several_lines, "ValueError: first second xxx"),
], ids=range(12))
def test_what_a_reward_returns_is_checked_at_the_door(function, words):
    with pytest.raises(UserError) as caught:
        inputs.call_reward(function, "mine", pictures(), ["a", "b"])
    assert words in one_line(caught)


def test_a_reward_in_bf16_trains(own):
    out, summary = own
    assert summary["reward"]["before"] is not None and summary["reward"]["change"] != 0
    assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["reward"] == summary["reward"]


@pytest.mark.parametrize("text, words", [
    ("import sys\nsys.exit()", "it called sys.exit(None) (bad.py, line 2)"),
    ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found' (bad.py, line 1)"),
    ("raise ValueError('a\\nb\\nc')", "ValueError: a b c (bad.py, line 1)"),
    ("def score(:", "SyntaxError"),
    ("score = 3", "has no function 'score'"),
], ids=range(5))
def test_reward_files_that_cannot_be_loaded(tmp_path, text, words):
    (tmp_path / "bad.py").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        inputs.load_function(f"{tmp_path / 'bad.py'}:score")
    assert words in one_line(caught)


def test_paths_with_commas_and_equal_signs(home, monkeypatch):
    mine = f"{home / 'own,x=1/mine.py'}:score"
    assert inputs.reward_terms(f"aesthetic=1,{mine}=0.5,dnc") == [("aesthetic", "1"), (mine, "0.5"), ("dnc", "")]
    assert inputs.reward_terms("aesthetic=1,dnc=0.3") == [("aesthetic", "1"), ("dnc", "0.3")]
    assert inputs.reward_terms("nowhere.py:f=2") == [("nowhere.py:f", "2")]
    for wrong in ("dnc=x", "dnc=0", "dnc=nan", f"{mine}=inf"):
        with pytest.raises(UserError, match="is 0 or not a number"):
            inputs.reward_terms(wrong)
    monkeypatch.chdir(home)
    assert inputs.absolute_reward("own,x=1/mine.py:score=2,dnc") == f"{mine}=2,dnc"
    assert [path.name for path in inputs.reward_files(mine)] == ["mine.py", "beside.py"]
    assert r2d3.resolve(r2d3.Config(reward="own,x=1/mine.py:score=2,dnc")).out == "runs/shapes-mine-dnc-seed0"


# ---- 2: what a number depends on -----------------------------------------------------------------------------


def test_another_reward_file_is_refused_on_resume(own, home):
    out, _ = own
    about = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert about["config"]["reward"] == f"{home}/own,x=1/mine.py:score=2,dnc" and len(about["identity"]["reward"]) == 2
    assert (out / "source/reward/mine.py").read_text(encoding="utf-8") == REWARD
    resumed = dataclasses.replace(r2d3.run_config(str(out)), run=None, resume=True)
    for name in ("mine.py", "beside.py"):
        file = home / "own,x=1" / name
        whole = file.read_text(encoding="utf-8")
        file.write_text(whole + "\n# another\n", encoding="utf-8")
        with pytest.raises(UserError) as caught:
            r2d3.train(resumed)
        file.write_text(whole, encoding="utf-8")
        assert f"{name} is not what {out} began with" in one_line(caught)
    assert r2d3.train(resumed)["updates"] == 1                  # as it was: it goes on, here to the evaluation


def test_the_weights_belong_to_a_run(capsys, own):
    base = fresh_base()
    now = folders.identify(base, "dnc")
    assert folders.changed(now, folders.identify(fresh_base(), "dnc")) is None
    with torch.no_grad():
        next(base.vae.parameters()).mul_(1.1)
    other = folders.identify(base, "dnc")
    assert folders.changed(now, other) == "the base, by its weights,"
    with pytest.raises(UserError, match="the base, by its weights, is not what there began with"):
        folders.check_identity(base, "dnc", Path("there"), {"identity": now}, 1)
    assert folders.check_identity(base, "dnc", Path("there"), {}, 1) == other        # a run from before there were hashes
    folders.warn_if_changed(str(own[0]), base, "dnc")
    assert "is not what" in capsys.readouterr().err
    base.latent_std = 1.1 * base.latent_std
    assert folders.changed(other, folders.identify(base, "dnc")) == "the base, by its weights,"
    folders.warn_if_changed(str(own[0]), fresh_base(), "dnc")
    assert capsys.readouterr().err == ""


# ---- 3: NaN ----------------------------------------------------------------------------------------------------

COMPARES_VIEWS = """def score(render, prompts):
    assert render.image.shape[1] == 2 and render.image.shape[-1] == 16, "the views and the size of the run"
    return render.image.unfold(3, 9, 9).mean((2, 3, 4, 5)) + render.image.std(1, keepdim=True).mean((2, 3, 4))
"""


@pytest.mark.parametrize("text, words", [
    ("def score(render, prompts):\n    return render.image.mean((2, 3, 4)) * float('nan')", "is not finite"),
    ("def score(render, prompts):\n    return (render.image.mean((2, 3, 4)) * 0).sqrt()",
     "has a gradient that is not finite"),
    ("def score(render, prompts):\n    s = render.image ** 2\n    render.image.mul_(0)\n    return s.mean((2, 3, 4))",
     "has no gradient"),
    ("import torch\nW = torch.ones(1, 2, requires_grad=True)\ndef score(render, prompts):\n    return W * 1",
     "has no gradient"),
    (COMPARES_VIEWS, None),
], ids=("value", "gradient", "in place", "unconnected", "compares views"))
def test_the_trial_call_finds_it_before_the_work(home, tmp_path, monkeypatch, text, words):
    """With the views and the size of the run, through decoder and renderer: before anything is sampled or measured."""
    (tmp_path / "it.py").write_text(text, encoding="utf-8")

    def work(*args, **more):
        raise ArithmeticError("the work began")

    monkeypatch.setattr(r2d3, "rollout", work)
    with pytest.raises((UserError, ArithmeticError)) as caught:
        r2d3.train(tiny(home, tmp_path / "out", reward=f"{tmp_path / 'it.py'}:score"))
    assert (words or "the work began") in one_line(caught)
    assert words is None or not (tmp_path / "out").exists()     # and nothing is left


def measurement(P=3, S=2, V=2, D=4, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.rand(P, S, generator=generator) for _ in range(5)]
    features = torch.nn.functional.normalize(torch.randn(P, S, V, D, generator=generator), dim=-1)
    latents = torch.zeros(len(metrics.shown(P)), 1)
    return metrics.Measurement(*numbers, features, 2 * features, latents)._replace(**changes)


def splats(objects, number):
    size = objects, number
    return r2d3.Gaussians(torch.rand(*size, 3) - 0.5, torch.full((*size, 3), 0.1), torch.ones(*size, 4),
                          torch.ones(*size), torch.ones(*size, 3))


def page(summary, captions, title="t", settings="s"):
    """report.html of two objects each, before and after."""
    n = len(captions)
    white = torch.zeros(n, 3, 8, 8)
    return report.files(white, white, captions, [splats(n, 5)] * 2, b"", [], summary, title, settings,
                        (1.4, r2d3.FXFY, 0.0))["report.html"]


def strict(text):
    def refuse(name):
        raise AssertionError(name)
    return json.loads(text, parse_constant=refuse)


def summary_of(*measurements):
    return {"scorer": "x", "seconds": 1.0, "features": "f", **metrics.compare(*measurements)}


def test_what_cannot_be_measured_is_null(capsys):
    before, bad = measurement(), measurement(seed=1)
    bad.reward[1, 0] = float("nan")
    bad.fid_features[0, 0, 0, 0] = float("inf")
    summary = summary_of(before, bad, before)
    row = strict(to_json(summary))["reward"]
    assert row["before"] == pytest.approx(before.reward.mean().item())
    assert row["after"] is row["change"] is row["standard_errors"] is None
    assert row["after_ci95"] == row["ci95"] == [None, None]
    assert summary["fid_to_base"]["after"] is None and summary["alignment"]["after"] is not None
    metrics.print_summary(summary)
    said = capsys.readouterr().out
    assert "nan" not in said.lower()
    assert "could not be measured, as it is not finite for some objects: reward, FID" in said
    assert re.search(r"reward +0\.\d{3} +-   - \.\. -", said)
    table = page(summary, ["a", "b"]).split("<h2>")[0]
    assert "<td>-" in table and "nan" not in table


def test_objects_that_are_empty_or_not_finite_are_said(capsys):
    parts = [tuple(tensor.flatten(0, 1) for tensor in measurement()[:-1]) + (torch.zeros(3, 1),)]
    parts[0][3][:2], parts[0][0][5] = 0, float("inf")
    measured = metrics.join(parts, 3, 2, "before")
    said = capsys.readouterr().err
    assert "before: 2 of 6 objects are empty" in said and "before: reward is not finite for 1 of 6 objects" in said
    empty = measurement(coverage=torch.zeros(3, 2))
    metrics.print_summary(summary_of(empty, measured, empty))   # no division by zero
    assert "objects are empty" in capsys.readouterr().out


def test_nothing_to_see_is_said(base, tmp_path, capsys, monkeypatch):
    """Splats that are not finite do not get into the file; a file without any is mentioned."""
    g = splats(1, 3)
    g.means[0, 1, 0] = float("nan")
    assert r2d3.export.write_ply(tmp_path / "a.ply", g) == 2
    monkeypatch.setattr(r2d3, "load_base", lambda config, device: base)
    monkeypatch.setattr(r2d3.Job, "rollout", lambda job, *args, **more: torch.full((1, *base.latent_shape), float("nan")))
    r2d3.sample(r2d3.Config(prompts="a red cube", out=str(tmp_path), samples_per_prompt=1, device="cpu"))
    assert "holds no splats" in capsys.readouterr().err


def test_json_has_null():
    assert strict(to_json({"a": [float("nan"), 1.5, (float("inf"),)], "b": {2, 1}, 3: Path("x")})) == {
        "a": [None, 1.5, [None]], "b": [1, 2], "3": "x"}


# ---- 4: LoRAs --------------------------------------------------------------------------------------------------


def saved_lora(base, folder, **settings):
    """What peft saves of a LoRA with these settings, and what the network says with it."""
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    usual = {"target_modules": ["to_q", "to_k", "ff.net.2"], "init_lora_weights": False}
    net = get_peft_model(base.net, LoraConfig(**usual | settings))
    net.save_pretrained(folder)
    answer = ask(base, net)
    net.unload()
    return answer


@torch.no_grad()
def ask(base, net):
    before, base.net = base.net, net
    try:
        x = torch.randn(1, *base.latent_shape, generator=torch.Generator().manual_seed(0))
        return base.predict(x, torch.tensor([500]), base.encode(["a red cube"]))
    finally:
        base.net = before


@pytest.mark.parametrize("settings", [
    {"r": 4, "lora_alpha": 16}, {"r": 4, "lora_alpha": 16, "use_rslora": True},
    {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 32}},
    {"r": 4, "lora_alpha": 8, "target_modules": r".*attn2\.to_(q|v)"},
], ids=str)
def test_a_loras_settings_are_honoured(base, tmp_path, settings):
    wanted = saved_lora(base, tmp_path, **settings)
    plain = ask(base, base.net)
    net = r2d3.inputs.load_lora(base.net, tmp_path)
    got = ask(base, net)
    net.unload()
    assert (got - wanted).abs().max() < 1e-5 < 1e-2 < (got - plain).abs().max()


def test_the_authors_file_has_alpha_8(base, tmp_path):
    """Of rank 4 it acts with a scale of 2; ours, under peft's names and without its settings, with 1."""
    doubled = saved_lora(base, tmp_path / "peft", r=4, lora_alpha=8)
    single = saved_lora(base, tmp_path / "single", r=4, lora_alpha=4)
    weights = load_file(tmp_path / "peft/adapter_model.safetensors")
    save_file({name.replace("base_model.model", "unet"): value for name, value in weights.items()},
              tmp_path / "pytorch_lora_weights.safetensors")
    made = {"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": ["to_q", "to_k", "ff.net.2"]}
    note = {"lora_adapter_metadata": json.dumps(made)}
    save_file({name.replace("base_model.model", "transformer"): value for name, value in weights.items()},
              tmp_path / "diffusers.safetensors", note)
    save_file(weights, tmp_path / "ours.safetensors")
    for name, wanted in (("pytorch_lora_weights", doubled), ("diffusers", doubled), ("ours", single)):
        net = r2d3.inputs.load_lora(base.net, tmp_path / f"{name}.safetensors")
        assert (ask(base, net) - wanted).abs().max() < 1e-5
        net.unload()
    assert (doubled - single).abs().max() > 1e-2


def test_loras_that_are_refused(base, tmp_path):
    def refused(words, change=None, **about):
        saved_lora(base, tmp_path, r=4)
        if change:
            weights = load_file(tmp_path / "adapter_model.safetensors")
            change(weights)
            save_file(weights, tmp_path / "adapter_model.safetensors")
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | about), encoding="utf-8")
        with pytest.raises(UserError) as caught:
            r2d3.inputs.load_lora(base.net, tmp_path)
        assert words in one_line(caught), caught.value

    def lacks_a_layer(weights):
        first = next(name for name in weights if "lora_A" in name)
        del weights[first], weights[first.replace("lora_A", "lora_B")]

    def integers(weights):
        for name in weights:
            weights[name] = weights[name].long()

    refused("it lacks ", lacks_a_layer)
    refused("torch.int64, which is no float", integers)
    refused("is not finite", lambda weights: next(iter(weights.values())).fill_(float("nan")))
    refused("not a whole LoRA", lambda weights: weights.pop(next(iter(weights))))
    refused("made with use_dora = True", use_dora=True)
    refused("made with something_new = 7", something_new=7)
    refused("made with modules_to_save", modules_to_save=["proj_out"])
    refused("began with pissa, which changes the base", init_lora_weights="pissa")
    refused("is a LOHA, not a LoRA", peft_type="LOHA")
    refused("does not fit this base", r="four")
    (tmp_path / "adapter_config.json").write_text("[1", encoding="utf-8")
    with pytest.raises(UserError, match="settings of the LoRA .* cannot be read"):
        r2d3.inputs.load_lora(base.net, tmp_path)
    for name in "ab":
        (tmp_path / "two").mkdir(exist_ok=True)
        save_file({"x.lora_A.weight": torch.ones(2, 2)}, tmp_path / f"two/{name}.safetensors")
    with pytest.raises(UserError, match="holds several files"):
        r2d3.inputs.load_lora(base.net, tmp_path / "two")


# ---- 6 and 7 -------------------------------------------------------------------------------------------------------


def test_the_same_prompt_twice_is_found_both_times(own, home):
    """The list has one of its three prompts twice; R@1 of the base is 1 for all of them, or for none of the two."""
    kept = torch.load(own[0] / "checkpoint/before.pt", weights_only=True)
    assert kept["retrieved"].shape == (3, 1) and kept["retrieved"][0] == kept["retrieved"][2] == 1
    def see(images):
        return images

    features = metrics.Features("t", see, lambda prompts: torch.tensor([[1.0, 0]] * len(prompts)), see, see)
    texts = metrics.text_features(features, ["a", "A", "a"])
    assert len(texts[1]) == 2                                   # two that mean the same to the network are both right
    seen = SimpleNamespace(image=torch.tensor([[[1.0, 0]], [[1.0, 0]]]), alpha=torch.ones(2, 1, 1, 2, 2))
    assert metrics.look(seen, ["a", "A"], texts, features, torch.zeros(2), torch.zeros(2))[2].tolist() == [1, 1]


def test_one_prompt_has_no_interval(capsys):
    summary = summary_of(*(measurement(P=1, seed=seed) for seed in range(3)))
    assert summary["reward"]["ci95"] == [None, None] and summary["reward"]["standard_errors"] is None
    assert summary["fid_to_base"]["ci95"] == [None, None] and summary["fid_to_base"]["after"] > 0
    metrics.print_summary(summary)
    assert "standard errors" not in capsys.readouterr().out
    moved = metrics.entry(torch.tensor(1.0), torch.tensor(2.0), torch.full((9,), 1.0), torch.full((9,), 2.0))
    assert moved["standard_errors"] is None                      # not millions, which is rounding


def test_prompts_that_are_too_long_are_counted(capsys, base):
    from support import say_too_long
    say_too_long.cache_clear()
    long = ["a " + "very " * 100 + "red cube", "a red cube", "x" * 74, "red " * 76, "red " * 75]
    assert scorers.too_long(long) == scorers.HPSv2.too_long(long) == 2
    reward = SimpleNamespace(functions={"hpsv2 (HPS)": SimpleNamespace(too_long=scorers.too_long), "dnc": len})
    text = SimpleNamespace(too_long=lambda prompts: 0)
    inputs.prepare(SimpleNamespace(prepare=lambda prompts: None, text=text), reward, long)
    features = metrics.Features("t", len, lambda prompts: torch.zeros(len(prompts), 2), len, len, scorers.too_long)
    for _ in range(3):
        metrics.text_features(features, long)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("r2d3: 2 of 5 prompts are longer than hpsv2 (HPS) can read")
    assert "the alignment" in lines[1]


def test_rewards_see_pictures_between_0_and_1(base):
    seen = []

    def reward(render, prompts):
        seen.append(render.image)
        return render.image.mean((2, 3, 4))

    job_of(base, reward, views=2, view_size=16).judge(torch.zeros(1, *base.latent_shape), ["a red cube"], [r2d3.seeded(0)])
    assert seen[0].min() >= 0 and seen[0].max() == 1 and len(seen[0].unique()) > 100


# ---- 8, 9, 10, 11: folders, locks, caches --------------------------------------------------------------------


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def settings_for(out, **changes):
    return dataclasses.asdict(r2d3.resolve(r2d3.Config(out=str(out), device="cpu", **changes)))


def test_killed_while_the_first_file_was_written(tmp_path):
    out = tmp_path / "run"
    (out / "checkpoint").mkdir(parents=True)
    parts = [out / f"config.json.part{dead_pid()}", out / f"checkpoint/state.pt.part{dead_pid()}"]
    for part in parts:
        part.write_bytes(b"{")
    with folders.unlocking():
        assert folders.open_run(settings_for(out), r2d3.Config, "", set())[1] is None
    assert not any(part.exists() for part in parts)
    out.mkdir()
    mine = out / f"x.part{os.getpid()}"                          # somebody is writing it
    mine.write_bytes(b"")
    clear_parts(out)
    assert mine.exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").write_bytes(b"")
    with pytest.raises(UserError, match="is not empty and holds no run"), folders.unlocking():
        folders.open_run(settings_for(tmp_path / "other"), r2d3.Config, "", set())


def test_two_runs_into_one_folder(tmp_path):
    out = tmp_path / "run"
    hold = (f"import fcntl, sys, time; file = open({str(out / '.lock')!r}, 'a+'); fcntl.flock(file, fcntl.LOCK_EX); "
            "file.write('process 7 on here'); file.flush(); print('held', flush=True); time.sleep(60)")
    out.mkdir()
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(UserError) as caught, folders.unlocking():
            folders.open_run(settings_for(out), r2d3.Config, "", set())
        assert "is in use by process 7 on here" in one_line(caught)
    finally:
        other.kill()                                             # its lock is gone with it
        other.wait()
    with folders.unlocking():
        folders.open_run(settings_for(out), r2d3.Config, "", set())
        assert f"process {os.getpid()} " in (out / ".lock").read_text(encoding="utf-8")
        with pytest.raises(UserError, match="is in use by process"):
            folders.lock(out)
    assert not (out / ".lock").exists()


def test_what_cannot_be_written_fails_before_the_work(base, tmp_path, monkeypatch):
    monkeypatch.setattr(r2d3, "load_base", lambda config, device: base)
    monkeypatch.setattr(r2d3, "rollout", lambda *args, **more: pytest.fail("the work began"))
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/samples").write_bytes(b"")
    for command, out in ((r2d3.sample, "file"), (r2d3.evaluate, "file"), (r2d3.evaluate, "out")):
        with pytest.raises(UserError) as caught:
            command(r2d3.Config(prompts="a red cube", out=str(tmp_path / out), device="cpu"))
        assert str(tmp_path / out) in one_line(caught) and "name another folder" in str(caught.value)

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as caught:
        r2d3.sample(r2d3.Config(prompts="a red cube", out=str(tmp_path / "new"), device="cpu"))
    assert str(tmp_path / "new") in one_line(caught) and "No space left on device" in str(caught.value)
    assert [*(tmp_path / "new").iterdir()] == []


@pytest.mark.parametrize("content", ["[]", "null", "3", '{"a": "x", "b": null, "c": 2}', '{"a": NaN}', "{",
                                     "[" * 100000, None])
def test_the_cache_of_scores_may_hold_anything(tmp_path, monkeypatch, capsys, content):
    asked = []

    def score(part):
        asked.extend(part)
        return torch.tensor([float("nan") if prompt == "b" else 1.0 for prompt in part])

    folder = cache_folder("scores")
    if content is None:                                          # it cannot be written
        folder.parent.mkdir(parents=True)
        folder.write_bytes(b"")
    else:
        folder.mkdir(parents=True)
        (folder / "key.json").write_text(content, encoding="utf-8")
    scores = folders.scores_by_prompt("key", ["a", "b", "c"], 2, score, 0, 1)
    assert scores["b"] == -float("inf") and scores["c"] in (1.0, 2.0) and "a" in asked
    said = capsys.readouterr().err
    assert "1 of 3 prompts got no finite score" in said and ("are not kept" in said) == (content is None)
    if content is not None:
        assert strict((folder / "key.json").read_text(encoding="utf-8"))["b"] is None
        asked.clear()
        assert folders.scores_by_prompt("key", ["a", "b", "c"], 2, score, 0, 1) == scores and not asked


def test_a_kept_measurement_of_another_size_is_made_anew(tmp_path):
    kept = measurement(P=14)
    torch.save(kept._asdict(), tmp_path / "before.pt")
    assert torch.equal(metrics.load_measurement(tmp_path / "before.pt", 14, 2).reward, kept.reward)
    assert metrics.load_measurement(tmp_path / "before.pt", 14, 3) is None
    assert metrics.load_measurement(tmp_path / "nowhere.pt", 14, 2) is None


class Encoder(torch.nn.Module):
    """Stands for T5: a vector of three numbers per token."""

    def forward(self, ids, attention_mask):
        return [ids[..., None].float() + torch.arange(3.0)]


@pytest.fixture
def text_encoder(monkeypatch, tmp_path):
    import transformers
    made = Encoder(), {"missing_keys": []}
    monkeypatch.setattr(transformers.T5EncoderModel, "from_pretrained", lambda **place: made)

    def tokenizer(self, length=None):
        def tokens(prompts):
            counts = [min(len(prompt.split()) + 1, length or self.length) for prompt in prompts]
            rows = [torch.ones(count, dtype=torch.long) for count in counts]
            return (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),) * 2
        return tokens

    monkeypatch.setattr(published.TextEncoder, "tokenizer", tokenizer)
    return published.TextEncoder("diffsplat-pixart", None, "cpu")


@pytest.mark.parametrize("content", [
    {"other": torch.ones(2, 3)}, {"embeds": torch.ones(2, 3, dtype=torch.long)}, {"embeds": torch.ones(3)},
    {"embeds": torch.full((2, 3), float("nan"))}, b"junk", b""], ids=range(6))
def test_the_cache_of_encoded_prompts_may_hold_anything(text_encoder, content):
    wanted = text_encoder(["a red cube", "a"])[0]
    path = text_encoder.path("a red cube")
    save_file(content, path) if isinstance(content, dict) else path.write_bytes(content)
    assert torch.equal(text_encoder(["a red cube", "a"])[0], wanted) and wanted.shape == (2, 300, 3)


def test_encoded_prompts_that_cannot_be_kept(text_encoder, capsys):
    text_encoder.cache.parent.mkdir(parents=True)
    text_encoder.cache.write_bytes(b"")
    embeds, mask = text_encoder(["a red cube", "a"])
    assert mask.sum(1).tolist() == [4, 2] and torch.equal(embeds, text_encoder(["a red cube", "a"])[0])
    assert capsys.readouterr().err.count("are not kept for other runs") == 1
    assert text_encoder.too_long(["a " * 299, "a " * 300, "a " * 300 + "b", "a" * 400]) == 2


# ---- 13: text ------------------------------------------------------------------------------------------------------


def test_the_encoding_of_text_files_is_named():
    """In r2d3.py, kernels and support, and where experiments read or write: no locale decides what a file holds."""
    folders = [path for folder in ("support", "kernels", "experiments") for path in ROOT.glob(f"{folder}/*.py")]
    for path in (ROOT / "r2d3.py", *folders):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            binary = any("b" in str(getattr(argument, "value", "")) for argument in node.args[1:2])
            where = f"{path.name}, line {node.lineno}"
            if name in ("read_text", "write_text") or name == "open" and isinstance(node.func, ast.Name) and not binary:
                assert "encoding" in given, where
            assert not (name == "run" and "text" in given and "encoding" not in given), where


def test_long_lines_and_unknown_words_are_named_with_their_line(tmp_path, base):
    file = tmp_path / "prompts.txt"
    file.write_text("a red cube\n\n" + "word " * 2_000_000 + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        r2d3.inputs.load_prompts(str(file))
    assert "prompts.txt, line 3: a prompt of 1" in one_line(caught) and len(str(caught.value)) < 400
    with pytest.raises(UserError) as caught:
        r2d3.inputs.load_prompts("word " * 2_000_000)
    assert len(one_line(caught)) < 400
    file.write_text("a red cube\n\n a purple " + "x" * 5000 + "\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        inputs.prepare(base, None, r2d3.inputs.load_prompts(str(file)), str(file))
    assert "prompts.txt, line 3: the base 'shapes' does not know the word" in one_line(caught)


# ---- 14: how it ends ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def signals_kept():
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def ended(work):
    with signals_kept():
        return cli.exit_code(work)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_say_what_is_true(tmp_path, own, capsys, number):
    def interrupted(folder):
        with folders.unlocking():
            folders.lock(folder)
            os.kill(os.getpid(), number)
            time.sleep(1)

    assert ended(lambda: interrupted(own[0])) == 130
    assert f"stopped; {own[0]} keeps all finished epochs, --resume goes on" in capsys.readouterr().err
    assert ended(lambda: interrupted(tmp_path / "new")) == 130
    assert "nothing was finished yet" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert ended(lambda: os.kill(os.getpid(), number) or time.sleep(1)) == 130
    said = capsys.readouterr().err
    assert "stopped; what was written is whole" in said and "resume" not in said


def test_ctrl_c_during_imports_leaves_no_traceback(tmp_path):
    slow = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    (tmp_path / "torch.py").write_text(slow, encoding="utf-8")
    done = subprocess.run([sys.executable, str(ROOT / "r2d3.py")], env=os.environ | {"PYTHONPATH": str(tmp_path)},
                          capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_error(monkeypatch, tmp_path):
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w", encoding="utf-8"))
    os.close(reader)
    finished = []
    assert ended(lambda: [print("x" * 100_000) for _ in range(3)] and finished.append(1)) == 0 and finished
    sys.stdout.close()


def test_a_terminal_without_the_letters(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict"))
    assert ended(lambda: print("a röd kub 立方体")) == 0
    sys.stdout.flush()
    assert raw.getvalue().startswith(b"a r?d kub ???")


@pytest.mark.parametrize("error, words", [
    (OSError(28, "No space left on device", "there/x"), "No space left on device: there/x"),
    (UserError("a sentence"), "r2d3: a sentence"), (torch.OutOfMemoryError("x"), "out of memory"),
], ids=range(3))
def test_errors_end_with_a_sentence(capsys, error, words):
    def work():
        raise error
    assert ended(work) == 2 and words in capsys.readouterr().err


def test_hand_edited_settings(own, tmp_path):
    about = json.loads((own[0] / "config.json").read_text(encoding="utf-8"))
    for name, value, words in (("steps", "20", "steps is '20', wanted int"), ("lr", [1], "lr is [1], wanted float"),
                               ("method", "nablo", "method is 'nablo', wanted 'nabla' or"),
                               ("seed", None, "seed is None"),
                               ("checkpoint", 1, "checkpoint is 1, wanted bool"), ("views", True, "views is True")):
        write_atomic(tmp_path / "config.json", json.dumps(about | {"config": about["config"] | {name: value}}))
        with pytest.raises(UserError) as caught:
            r2d3.run_config(str(tmp_path))
        assert words in one_line(caught)
    for whole in ([], {"config": []}, {"config": 3}, {}):
        write_atomic(tmp_path / "config.json", json.dumps(whole))
        with pytest.raises(UserError, match="cannot be read"):
            r2d3.run_config(str(tmp_path))
    assert r2d3.run_config(str(own[0])).steps == 4


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize("change", [
    {"epoch": "1"}, {"rows": []}, {"rows": [{"x": 1}]}, {"lora": {}}, {"optimizer": {"state": {}}}, {"history": None},
    {"lora": {"base_model.model.x.lora_A.weight": torch.ones(1)}}, None, b"junk", b"",
], ids=range(10))
def test_hand_edited_and_hostile_state(own, home, tmp_path, monkeypatch, change):
    """A sentence each; and a pickle with code in it is not run."""
    monkeypatch.chdir(tmp_path)
    out, file = own[0], own[0] / "checkpoint/state.pt"
    whole = file.read_bytes()
    try:
        if isinstance(change, dict):
            torch.save(torch.load(file, weights_only=True) | change, file)
        else:
            file.write_bytes(pickle.dumps(Hostile()) if change is None else change)
        with pytest.raises(UserError) as caught:
            r2d3.train(dataclasses.replace(r2d3.run_config(str(out)), run=None, resume=True))
        assert "state.pt" in one_line(caught) and not (tmp_path / "hacked").exists()
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("method", ["nabla", "refl", "draft", "ddpo"])
def test_few_steps_work_or_get_advice_that_helps(home, tmp_path, monkeypatch, method, steps):
    def work(*args, **more):
        raise ArithmeticError("the work began")

    monkeypatch.setattr(r2d3, "rollout", work)
    config = tiny(home, tmp_path / "out", method=method, steps=steps, fraction=0.4)
    for _ in range(2):
        with pytest.raises((UserError, ArithmeticError)) as caught:
            r2d3.train(config)
        if isinstance(caught.value, ArithmeticError):
            return
        advice = re.search(r"use --steps (\d+)", one_line(caught))
        config = dataclasses.replace(config, steps=int(advice[1]))
    pytest.fail(f"the advice did not help: {caught.value}")


# ---- 15: several processes ----------------------------------------------------------------------------------------


def test_an_evaluation_is_the_same_for_any_number_of_processes(base, monkeypatch):
    """Three processes, here threads, share the chunks; the numbers are the same to the bit, and each has them all."""
    features = metrics.load_features(base.tower, "cpu")
    job = job_of(base, r2d3.load_reward("dnc", base, "cpu"), samples_per_prompt=2)
    prompts = ["a red cube", "a blue cone", "a red cube", "a green cylinder"]
    alone = r2d3.measure(job, features, prompts, 0, "alone")
    shares, meet, made = [None] * 3, threading.Barrier(3), [None] * 3
    place = threading.local()

    def gather(value, world, wait=None):
        shares[place.rank] = value
        meet.wait()
        everyone = [*shares]
        meet.wait()
        return everyone

    def process(rank):
        place.rank = rank
        made[rank] = r2d3.measure(job._replace(rank=rank, world=3), features, prompts, 0, "shared")

    monkeypatch.setattr(processes, "gather", gather)
    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for measured in made:
        assert all(torch.equal(a, b) for a, b in zip(alone, measured))
    assert len(alone.latents) == 4 and len(alone.reward) == 4


def stand_still(rank, world, file, results):
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    processes.WAIT = timedelta(seconds=3)
    processes.start_processes("cpu")
    results.put((rank, processes.gather(rank, world, processes.WAIT)))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        processes.gather(rank, world, processes.WAIT)
    except UserError as error:
        results.put((rank, str(error)))


def test_a_stopped_process_ends_the_others_with_a_sentence(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()     # what is put is sent at once
    started = [context.Process(target=stand_still, args=(rank, 2, tmp_path / "meet", results)) for rank in range(2)]
    for process in started:
        process.start()
    try:
        assert sorted(results.get() for _ in range(2)) == [(0, [0, 1]), (1, [0, 1])]
        rank, said = results.get()
        assert rank == 0 and "waited in vain for the others" in said and "--resume" in said and "\n" not in said
    finally:
        for process in started:
            process.kill()
            process.join()
    assert processes.WAIT <= timedelta(hours=1) and processes.LOADING_WAIT <= timedelta(hours=12)


# ---- 16, 17, 18: memory and time --------------------------------------------------------------------------------


def test_an_evaluation_keeps_no_trajectories(base, own):
    """The samples alone own their memory; of all objects' latents only those that the report shows are kept."""
    job = job_of(base, steps=3)
    whole = job.rollout(["a red cube"] * 2, [r2d3.seeded(n) for n in range(2)])
    ends = job.rollout(["a red cube"] * 2, [r2d3.seeded(n) for n in range(2)], keep=False)
    assert torch.equal(whole.x[:, -1], ends) and ends.untyped_storage().nbytes() == 4 * ends.numel()
    assert whole.x.shape[1] == 4 and whole.eps.shape == whole.eps_text.shape == whole.x[:, 1:].shape
    kept = torch.load(own[0] / "checkpoint/before.pt", weights_only=True)
    assert len(kept["latents"]) == 3 and metrics.shown(100) == [n * 100 // 12 for n in range(12)]


def test_millions_of_prompts_are_checked_in_parts(monkeypatch):
    table, sizes = shapes.WordTable(["a", "red", "cube"], 4, 5), []
    real = table.tokens
    monkeypatch.setattr(table, "tokens", lambda prompts: sizes.append(len(prompts)) or real(prompts))
    table.prepare(["a red cube"] * 2500)
    assert sum(sizes) == 2500 and max(sizes) <= 1000
    seen = []

    def text(prompts):
        seen.append(len(prompts))
        return torch.zeros(len(prompts), 2)

    features = metrics.Features("t", len, text, len, len)
    metrics.text_features(features, [str(n) for n in range(1000)])
    assert sum(seen) == 1000 and max(seen) <= 256


def test_the_spread_of_fid_is_that_of_its_resamples(monkeypatch):
    """Cheap resamples are the distances themselves; also where second moments do not fit and are made each time."""
    sets = [measurement(P=20, S=4, D=6, seed=seed) for seed in range(3)]
    draws = torch.randint(20, (1000, 20), generator=torch.Generator().manual_seed(1))

    def distance(one, other, rows):
        return metrics.frechet_distance(*(m.fid_features[rows].flatten(0, 2) for m in (one, other)))

    wanted = torch.stack([torch.stack([distance(one, sets[2], rows) for rows in draws[:100]]) for one in sets[:2]])
    assert (metrics.fid_draws(*sets, draws) - wanted).abs().max() < 1e-7
    monkeypatch.setattr(metrics, "WIDE", 5)                      # as with Inception's 2,048
    monkeypatch.setattr(metrics, "FID_DRAWS_WIDE", 7)
    few = metrics.fid_draws(*sets, draws)
    assert few.shape == (2, 7) and (few - wanted[:, :7]).abs().max() < 1e-4
    big = [measurement(P=40, S=1, V=1, D=1000, seed=seed) for seed in range(3)]     # 40 x 1000 x 1000 does not fit
    monkeypatch.undo()
    monkeypatch.setattr(metrics, "FID_DRAWS_WIDE", 1)
    far = metrics.fid_draws(*big, torch.arange(40)[None])[0, 0]
    assert far == pytest.approx(distance(big[0], big[2], torch.arange(40)).item(), rel=1e-3)


def test_stopped_in_an_epoch_and_resumed_is_never_stopped(home, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle of the second epoch of three; what comes out in the end is the same to the bit."""
    monkeypatch.setattr(r2d3, "measure", lambda *args: measurement())
    monkeypatch.setattr(r2d3, "write_report", lambda *args: None)
    real, states = r2d3.train_epoch, []

    def interrupted(job, prompts, optimizer, epoch, history):
        for row in real(job, prompts, optimizer, epoch, history):
            if epoch == 1:
                raise KeyboardInterrupt
            yield row

    for out, stop in (("whole", False), ("stopped", True)):
        config = tiny(home, tmp_path / out, epochs=3, updates_per_epoch=2)
        if stop:
            monkeypatch.setattr(r2d3, "train_epoch", interrupted)
            assert ended(lambda: r2d3.train(config)) == 130
            assert "keeps all finished epochs" in capsys.readouterr().err
            monkeypatch.setattr(r2d3, "train_epoch", real)
            config = dataclasses.replace(config, resume=True)
        r2d3.train(config)
        states.append(torch.load(tmp_path / out / "checkpoint/state.pt", weights_only=True))
    assert states[0]["lora"].keys() == states[1]["lora"].keys() and states[0]["epoch"] == 3
    assert all(torch.equal(value, states[1]["lora"][name]) for name, value in states[0]["lora"].items())
    assert max(value.abs().max() for name, value in states[0]["lora"].items() if "lora_B" in name) > 0


# ---- security, and what else holds -----------------------------------------------------------------------------


def test_the_page_is_escaped_and_needs_no_network(own):
    text = (own[0] / "report.html").read_text(encoding="utf-8")
    scripts = re.findall("<script>(.*?)</script>", text, re.S)
    reach = r"https?:|fetch|XMLHttp|WebSocket|EventSource|sendBeacon|import[ (]"
    assert scripts and not any(re.search(reach, script) for script in scripts)
    rest = re.sub("<script>.*?</script>|data:image/[^\"]*", "", text, flags=re.S).replace(str(own[0]), "")
    assert not re.search(r"https?:|<script|<link|<iframe|<object|@import|url\(|href=|src=\"[^\"]|srcset", rest)
    hostile = "</pre></title></script><script>alert(1)</script><img src=x onerror=alert(1)>"
    summary = summary_of(*(measurement(seed=seed) for seed in range(3)))
    calm = page(summary, ["a", "b"])
    angry = page(summary | {"scorer": hostile, "features": hostile}, [hostile, hostile], hostile, hostile)
    for tag in ("<script", "</script", "<img", "</pre", "</title"):
        assert angry.count(tag) == calm.count(tag), tag
    assert "&lt;script&gt;alert(1)" in angry


def test_prompts_do_not_leave_the_folder(base, tmp_path, monkeypatch):
    monkeypatch.setattr(r2d3, "load_base", lambda config, device: base)
    monkeypatch.setattr(base.text, "tokens", lambda prompts: torch.ones(len(prompts), 14, dtype=torch.long))
    monkeypatch.setattr(r2d3.Job, "rollout", lambda job, prompts, *args, **more: torch.zeros(
        len(prompts), *base.latent_shape))
    (tmp_path / "prompts.txt").write_text("../../etc/passwd\n/elsewhere/x\n..\\..\\x\nCON\n", encoding="utf-8")
    made = r2d3.sample(r2d3.Config(prompts=str(tmp_path / "prompts.txt"), out=str(tmp_path / "in"), device="cpu",
                                   samples_per_prompt=1))
    assert len(made) == 4 and all(path.resolve().parent == (tmp_path / "in").resolve() for path in made)


def test_hostile_caches_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "before.pt").write_bytes(pickle.dumps(Hostile()))
    assert metrics.load_measurement(tmp_path / "before.pt", 3, 1) is None and not (tmp_path / "hacked").exists()


def test_one_line_of_anything():
    assert brief(ValueError("a\n b" + "c" * 999)).startswith("ValueError: a bccc") and len(brief("x" * 9999)) == 200
    assert brief(KeyboardInterrupt()) == "KeyboardInterrupt"
