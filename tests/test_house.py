"""The house: what is where, what can be lifted out of it, what it can do without, and that its words are true."""
import ast
import dataclasses
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import r2d3
from support import cli, load_weights, published

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "r2d3.py", *(path for folder in ("kernels", "support", "bases", "experiments") for path in (ROOT / folder).glob("*.py"))]
QUICK = {"epochs": 1, "batch_size": 2, "updates_per_epoch": 1, "samples_per_prompt": 2, "steps": 6, "view_size": 16}


def python(*arguments, path="", cwd=ROOT):
    """Run python in a process of its own; its exit code and what it printed."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, encoding="utf-8",
                          env=os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr


# ---- The tree, and which way its arrows run ---------------------------------------------------------------------


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_arrows_run_one_way():
    for path in (ROOT / "kernels").glob("*.py"):
        assert not imports(path) & {"support", "r2d3", "bases", "experiments", "diffusers", "numpy"}, path
    for name in ("splat", "matching"):
        ours = imports(ROOT / f"kernels/{name}.py")
        assert ours - set(sys.stdlib_module_names) <= {"torch", "triton", "__future__"}, ours
    for path in (ROOT / "support").glob("*.py"):
        assert not imports(path) & {"r2d3", "bases", "experiments"}, path
    for path in (ROOT / "bases").glob("*.py"):
        assert not imports(path) & {"bases", "experiments"}, path
    assert not imports(ROOT / "r2d3.py") & {"bases", "experiments"}
    assert not (ROOT / "assets").exists()


def test_no_module_of_one_system_and_every_encoding_named():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "resource" not in imports(path), path
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            binary = any(isinstance(a, ast.Constant) and isinstance(a.value, str) and "b" in a.value for a in node.args)
            if name in ("read_text", "write_text") or name == "open" and isinstance(node.func, ast.Name) and not binary:
                assert any(keyword.arg == "encoding" for keyword in node.keywords), f"{path}:{node.lineno}"


def test_lines_and_length():
    for path in [ROOT / "r2d3.py", *(ROOT / "kernels").glob("*.py")]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert max(map(len, lines)) <= 110, path
    lines = (ROOT / "r2d3.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 1600
    assert sum(len(line) >= 100 for line in lines) < 80


def test_no_function_of_the_script_is_long():
    tree = ast.parse((ROOT / "r2d3.py").read_text(encoding="utf-8"))
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree)
               if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}
    assert len(lengths) > 60
    assert {name: length for name, length in lengths.items() if length > 55} == {}


def test_importing_does_nothing():
    code, text = python("-c", "import r2d3, sys; print([m for m in ('diffusers', 'peft', 'transformers', 'tyro') if m in sys.modules])")
    assert code == 0 and text.strip() == "[]", text


def test_three_things_copied_are_enough(tmp_path):
    shutil.copy(ROOT / "r2d3.py", tmp_path)
    for folder in ("kernels", "support"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "mine.txt").write_text("a red cube\na blue cone\n", encoding="utf-8")
    code, text = python("r2d3.py", "cost", "--prompts", "mine.txt", "--batch-size", "2", "--steps", "6", "--view-size", "16", cwd=tmp_path)
    assert code == 0 and json.loads(text[text.index("{"):])["judged"] == 2, text[-2000:]


@pytest.fixture
def hub_kernels(tmp_path):
    """What pip leaves of the Hugging Face package `kernels`, as far as importlib.metadata sees it."""
    about = tmp_path / "site/kernels-0.18.2.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n", encoding="utf-8")
    return tmp_path / "site"


LOADS = "import diffusers, peft, transformers\nfrom transformers import CLIPTextModel, T5EncoderModel\nfrom diffusers import AutoencoderKL\nprint('loaded')"


@pytest.mark.slow
def test_the_hub_package_kernels_may_be_installed(hub_kernels, tmp_path):
    code, text = python("-c", f"import r2d3\n{LOADS}", path=hub_kernels)
    assert code == 0 and "loaded" in text, text[-2000:]
    (tmp_path / "elsewhere").mkdir()
    code, text = python(ROOT / "r2d3.py", "cost", "--batch-size", "2", "--steps", "6", "--view-size", "16", path=hub_kernels,
                        cwd=tmp_path / "elsewhere")
    assert code == 0 and "peak_GB" in text, text[-2000:]
    installed = importlib.util.find_spec("transformers.integrations.hub_kernels")
    if installed and "from kernels import" in Path(installed.origin).read_text(encoding="utf-8"):       # else it is no trap
        code, text = python("-c", f"import kernels\n{LOADS}", path=hub_kernels)
        assert code != 0, "transformers does not fall into the trap any more: hide_hub_kernels can go"


@pytest.mark.slow
def test_hpsv2_may_be_missing(tmp_path):
    (tmp_path / "hpsv2").mkdir()
    (tmp_path / "hpsv2/__init__.py").write_text("raise ImportError('hidden by a test')\n", encoding="utf-8")
    code, text = python("r2d3.py", "cost", "--reward", "hpsv2", "--batch-size", "2", "--steps", "6", "--view-size", "16", path=tmp_path)
    assert code == 0, text[-2000:]
    for arguments in (["--prompts", "hpdv2:photo"], ["--reward", "hps-v2.1"]):
        code, text = python("r2d3.py", "cost", *arguments, path=tmp_path)
        assert code == 2 and "hidden by a test" in text and "Traceback" not in text, text[-2000:]


# ---- Config -----------------------------------------------------------------------------------------------------


def test_every_setting_has_a_group_a_help_and_a_reader():
    fields = [field.name for field in dataclasses.fields(r2d3.Config)]
    assert len(fields) <= 45
    groups = cli.groups(r2d3.Config)
    assert [name for group in groups for name in group.helps] == fields                     # once each, in this order
    assert all(len(text) > 15 for group in groups for text in group.helps.values())
    read = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES if path.parent.name != "experiments")
    for name in fields:
        assert re.search(rf"config\.{name}\b|settings\[\"{name}\"\]|\"{name}\"", read.replace(f"    {name}:", "")), name


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "cost"])
def test_help_shows_what_a_command_reads(command, capsys):
    with pytest.raises(SystemExit):
        r2d3.parse([command, "--help"])
    text = capsys.readouterr().out
    for group in cli.groups(r2d3.Config):
        for name in group.helps:
            option = f"--{name.replace('_', '-')}"
            assert bool(re.search(rf"^[^\w-]*{option}[ ,]", text, re.MULTILINE)) == (command in group.commands), (command, name)
            if command not in group.commands:
                with pytest.raises(r2d3.UserError, match=f"{option} is not for {command}"):
                    r2d3.parse([command, option, "1"])


def test_train_may_be_left_out():
    assert r2d3.parse(["--seed", "3"]) == r2d3.parse(["train", "--seed", "3"]) == (r2d3.train, r2d3.Config(seed=3))


@pytest.mark.parametrize("base", sorted({"shapes", *published.PUBLISHED, *r2d3.PLUGINS}))
def test_a_recipe_sets_its_choices_on_any_base(base):
    choices = {"paper": ("step", "score", "guided", "always", "squared", 0.0),
               "fast": ("sample", "eps", "conditional", "always", "squared", 0.25)}
    names = ("estimator", "matching", "branch", "last_step", "time_weight", "skip_below")
    flow = {"last_step": "never", "matching": "v"} if base == "diffsplat-sd35" else {}
    for recipe, wanted in choices.items():
        config = r2d3.resolve(r2d3.Config(base=base, recipe=recipe, device="cpu"))
        assert {name: getattr(config, name) for name in names} == dict(zip(names, wanted)) | flow
        given = r2d3.resolve(r2d3.Config(base=base, recipe=recipe, device="cpu", matching="kl", beta=7.0, skip_below=0.5))
        assert (given.matching, given.beta, given.skip_below, given.branch) == ("kl", 7.0, 0.5, wanted[2])
    usual = r2d3.resolve(r2d3.Config(base=base, device="cpu"))
    assert usual.recipe == ("fast" if base == "shapes" else "paper")


def test_the_papers_settings():
    lambdas = {"aesthetic": (2e6, 3e3), "hpsv2": (1e7, 5e3), "normal": (1e6, 1e4), "dnc": (1e6, 1e4)}
    for reward, (beta, reg_weight) in lambdas.items():
        config = r2d3.resolve(r2d3.Config(base="diffsplat-pixart", reward=reward, device="cpu"))
        assert (config.beta, config.reg_weight, config.lr, config.fraction) == (beta, reg_weight, 1e-4, 0.4)
        assert (config.elevation_jitter, config.azimuth_jitter, config.views) == (20, 60, 4)
    for base, wanted in {"diffsplat-pixart": ("dpm", 20, 16), "diffsplat-sd15": ("ddim", 20, 8), "gaussiancube": ("dpm", 50, 8)}.items():
        config = r2d3.resolve(r2d3.Config(base=base, device="cpu"))
        assert (config.sampler, config.steps, config.lora_rank) == wanted
    assert r2d3.resolve(r2d3.Config(device="cpu"), "evaluate").samples_per_prompt == 32


def test_another_versions_settings_load_and_what_is_unknown_is_named(tmp_path, capsys):
    other = {"reward": "dnc", "reg_weight": 3.0, "checkpoint": True, "scorer": "auto", "stratify": True, "steps": 12}
    (tmp_path / "config.json").write_text(json.dumps({"config": other}), encoding="utf-8")
    config = r2d3.run_config(str(tmp_path))
    assert (config.reward, config.reg_weight, config.checkpoint, config.steps) == ("dnc", 3.0, True, 12)
    assert "not read: scorer, stratify\n" in capsys.readouterr().out


# ---- A base of one's own ----------------------------------------------------------------------------------------


class Blob(r2d3.Base):
    """A base of another shape: a flat latent of 24 numbers, an MLP, eight Gaussians."""

    lora_targets, latent_shape, eval_size = ["0", "2"], (24,), 16

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(24 + 8 + 1, 32), nn.SiLU(), nn.Linear(32, 24)).requires_grad_(False)

    def encode(self, prompts):
        rows = [[float(len(prompt)), *map(float, map(ord, (prompt + "       ")[:7]))] for prompt in prompts]
        return r2d3.Cond(torch.tensor(rows)[:, None] / 100, None)

    def predict(self, x, t, cond):
        return self.net(torch.cat([x, cond.embeds[:, 0], t[:, None].float() / 1000], 1))

    def decode(self, x0):
        means, colors = x0.unflatten(1, (8, 3)).tanh().mul(0.3), x0.unflatten(1, (8, 3)).sigmoid()
        one = torch.ones_like(means[..., :1])
        return r2d3.Gaussians(means, 0.08 * one.expand(-1, -1, 3), F.pad(one, (0, 3)), 0.9 * one[..., 0], colors)


@pytest.mark.parametrize("estimator", ["step", "sample", "identity"])
def test_a_base_of_ones_own(tmp_path, estimator):
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n", encoding="utf-8")
    files = {"prompts": str(tmp_path / "prompts.txt"), "test_prompts": str(tmp_path / "prompts.txt"), "device": "cpu"}
    config = r2d3.Config(reward="colorfulness", out=str(tmp_path / "run"), estimator=estimator, **files, **QUICK)
    # An image-text network is needed to measure alignment: the base's own, or CLIP, which would be fetched.
    Blob.tower = r2d3.load_base(r2d3.Config(), "cpu").tower
    Blob.tower.text = lambda prompts: F.normalize(torch.ones(len(prompts), 64), dim=-1)
    summary = r2d3.train(config, base=Blob())
    assert summary["base"] == "Blob" and summary["updates"] == 1 and summary["judged"] >= 2
    assert (tmp_path / "run/report.html").is_file() and (tmp_path / "run/lora/adapter_model.safetensors").is_file()
    written = r2d3.sample(r2d3.Config(prompts="one", run=str(tmp_path / "run"), out=str(tmp_path / "made"), device="cpu",
                                      samples_per_prompt=1, steps=6), base=Blob())
    assert [path.suffix for path in written] == [".ply"] and written[0].stat().st_size > 500
    again = r2d3.evaluate(r2d3.Config(reward="colorfulness", run=str(tmp_path / "run"), out=str(tmp_path / "evaluated"), **files,
                                      samples_per_prompt=2, steps=6), base=Blob())
    assert again["reward"]["after"] == pytest.approx(summary["reward"]["after"], abs=1e-5)


def test_a_base_that_lacks_a_method_is_told():
    with pytest.raises(TypeError, match="decode"):
        type("Half", (r2d3.Base,), {"encode": Blob.encode, "predict": Blob.predict})()


# ---- Random numbers belong to objects ----------------------------------------------------------------------------


def finetuned(tmp_path, name, **changes):
    config = r2d3.Config(out=str(tmp_path / name), device="cpu", eval_prompts=3, **QUICK | {"batch_size": 4, "updates_per_epoch": 2} | changes)
    return r2d3.train(config)


@pytest.mark.slow
def test_sizes_of_batches_change_no_result(tmp_path):
    """Measured on this test: 2e-7 in the reward, 3e-6 in the LoRA's weights (an Adam step is 1e-3)."""
    whole = finetuned(tmp_path, "whole")
    parts = finetuned(tmp_path, "parts", micro_batch=3, eval_batch=4)
    assert parts["reward"]["before"] == pytest.approx(whole["reward"]["before"], abs=2e-6)
    assert parts["reward"]["after"] == pytest.approx(whole["reward"]["after"], abs=2e-5)
    one, two = (load_weights(tmp_path / name / "lora/adapter_model.safetensors")[0] for name in ("whole", "parts"))
    assert max((one[key] - two[key]).abs().max() for key in one) < 1e-4


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    whole = finetuned(tmp_path, "whole", batch_size=4)
    arguments = ["--out", tmp_path / "two", "--batch-size", 2, "--epochs", 1, "--updates-per-epoch", 2, "--samples-per-prompt", 2,
                 "--steps", 6, "--view-size", 16, "--eval-prompts", 3, "--device", "cpu"]
    code, text = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, ROOT / "r2d3.py", *arguments)
    assert code == 0, text[-3000:]
    shared = json.loads((tmp_path / "two/summary.json").read_text(encoding="utf-8"))
    assert shared["judged"] == whole["judged"]
    for metric in ("reward", "alignment", "coverage"):
        assert shared[metric]["before"] == pytest.approx(whole[metric]["before"], abs=2e-5)
        assert shared[metric]["after"] == pytest.approx(whole[metric]["after"], abs=2e-4)


def test_an_object_is_the_same_alone_and_among_others():
    base = r2d3.load_base(r2d3.Config(), "cpu")
    job = r2d3.Job(base, None, base.schedule("dpm", 6), base.encode([""]), r2d3.Config(guidance=2.0))

    def made(*named):
        generators = [r2d3.seeded(7, prompt, number) for prompt, number in named]
        return job.rollout([prompt for prompt, _ in named], generators, keep=False)

    alone, among = made(("a red cube", 3)), made(("a blue cone", 0), ("a red cube", 0), ("a red cube", 3))
    assert (among[2] - alone[0]).abs().max() < 1e-4 and (among[2] - among[1]).abs().max() > 0.5


def test_cameras_stay_within_their_half_widths():
    generators = [r2d3.seeded(n) for n in range(400)]
    c2w, _ = r2d3.sample_cameras(4, 20.0, 60.0, generators)
    away = c2w[..., :3, 3] / r2d3.RADIUS
    elevation = away[..., 1].asin().rad2deg()
    azimuth = torch.atan2(away[..., 0], away[..., 2]).rad2deg()[:, 0]
    assert -10.01 < elevation.min() < -8 and 28 < elevation.max() < 30.01
    assert -60.01 < azimuth.min() < -55 and 55 < azimuth.max() < 60.01


# ---- README -----------------------------------------------------------------------------------------------------


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_reward_of_the_readme_is_one(tmp_path):
    block, = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "my_reward.py" in block]
    (tmp_path / "my_reward.py").write_text(block, encoding="utf-8")
    base = r2d3.load_base(r2d3.Config(), "cpu")
    reward = r2d3.load_reward(f"{tmp_path / 'my_reward.py'}:warm", base, "cpu")
    x0 = torch.zeros(2, *base.latent_shape)
    pictures = r2d3.render(base.decode(x0), *base.cameras(2), 16)
    assert reward(pictures, ["a", "b"]).shape == (2, 4)


def test_the_readmes_links_and_commands():
    for target, line in re.findall(r"\]\(([\w./-]+)(?:#L(\d+))?\)", README):
        assert (ROOT / target).exists(), target
        if line:
            text = (ROOT / target).read_text(encoding="utf-8").splitlines()[int(line) - 1]
            assert text.strip(), (target, line)
    for command in re.findall(r"python r2d3\.py ([^`\n#]*)", README):
        words = [word.strip("\"'") for word in re.findall(r'"[^"]*"|\S+', command)]
        words = [word for word in words if word not in ("...",)]
        if "--help" in words or "--run" in words:                                           # of a run that is not there
            continue
        r2d3.parse(list(words))


def test_docstrings_are_there():
    for name, thing in vars(r2d3).items():
        if inspect.isfunction(thing) and thing.__module__ == "r2d3" or inspect.isclass(thing) and thing.__module__ == "r2d3":
            assert (thing.__doc__ or "").strip(), name


def test_the_commit_of_the_code(tmp_path, monkeypatch):
    """Rows that were added are no change; a copy in somebody else's repository has no commit."""
    from support import report

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    for name in ("support/report.py", "experiments/results/rows.jsonl", "runs/source/support/report.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    monkeypatch.setattr(report, "__file__", str(tmp_path / "support/report.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.git_commit() is None                                  # no repository
    git("init", "-q")
    assert report.git_commit() is None                                  # no commit
    git("add", "support", "experiments")
    git("commit", "-qm", "a")
    commit = report.git_commit()
    assert len(commit) == 40
    (tmp_path / "experiments/results/rows.jsonl").write_text("2\n")
    assert report.git_commit() == commit
    (tmp_path / "support/report.py").write_text("2\n")
    assert report.git_commit() == f"{commit}-dirty"
    monkeypatch.setattr(report, "__file__", str(tmp_path / "runs/source/support/report.py"))
    assert report.git_commit() is None                                  # copied into another one
