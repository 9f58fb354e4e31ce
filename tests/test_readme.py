"""README.md is what a newcomer has: its snippets run as they stand, its commands parse, its links lead somewhere."""

import builtins
import dis
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import r2d3

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "r2d3.py").read_text(encoding="utf-8")
BEGIN, END = "# ---- begin of the block to copy ----\n", "# ---- end of the block to copy ----\n"


def snippet(mark: str) -> str:
    """The one python block of the README that holds `mark`."""
    block, = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if mark in block]
    return block


def run(folder: Path, *command: object) -> str:
    """What a python command prints, in a folder from which nothing of this repository can be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def lifted(tmp_path: Path) -> Path:
    """A folder with what the README tells to copy for the loss alone, and nothing else."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/matching.py").write_bytes((ROOT / "kernels/matching.py").read_bytes())
    (tmp_path / "nabla.py").write_text(SCRIPT.split(BEGIN)[1].split(END)[0], encoding="utf-8")
    return tmp_path


def test_the_loss_can_be_lifted_and_finds_the_exact_tilt(lifted):
    (lifted / "snippet.py").write_text(snippet("# the loss in your own code"), encoding="utf-8")
    before, after, exact = map(float, re.findall(r"-?\d+\.\d+", run(lifted, "snippet.py")))
    assert abs(before) < 0.1 and 0.6 < exact < 0.9
    assert after == pytest.approx(exact, abs=0.1)


def test_the_lifted_block_names_nothing_that_it_does_not_bring(lifted):
    """Also where the snippet does not go: every global that a function of the block reads is there."""
    code = compile((lifted / "nabla.py").read_text(encoding="utf-8"), "nabla.py", "exec")
    namespace: dict = {"__name__": "nabla"}
    exec(code, namespace)

    def globals_of(code: types.CodeType) -> set[str]:
        own = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
        return own.union(*(globals_of(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))

    functions = [name for name in ("rollout", "pick_transitions", "reward_gradient", "match_weights", "nabla_loss",
                                   "NoiseSchedule", "per_sample", "seeded", "noise_like", "guide") if name in namespace]
    assert len(functions) == 10
    missing = {name for name in globals_of(code) if name not in namespace and not hasattr(builtins, name)}
    assert not missing


def test_the_block_is_short_and_comes_first():
    lines = SCRIPT.splitlines()
    begin, end = (lines.index(mark.rstrip()) for mark in (BEGIN, END))
    assert begin < 110 and end - begin < 300


def test_the_reward_of_the_readme_is_one(tmp_path):
    (tmp_path / "my_reward.py").write_text(snippet("my_reward.py"), encoding="utf-8")
    base = r2d3.load_base(r2d3.Config(), "cpu")
    reward = r2d3.load_reward(f"{tmp_path / 'my_reward.py'}:warm", base, "cpu")
    pictures = r2d3.render(base.decode(torch.zeros(2, *base.latent_shape)), *base.cameras(2), 16)
    assert reward(pictures, ["a", "b"]).shape == (2, 4)


def test_the_base_of_the_readme_trains_and_samples_from_the_command_line(tmp_path):
    (tmp_path / "my_base.py").write_text(snippet("my_base.py"), encoding="utf-8")
    (tmp_path / "words.txt").write_text("a red cube\na blue sphere\n", encoding="utf-8")
    small = ["--epochs", 1, "--batch-size", 2, "--updates-per-epoch", 1, "--samples-per-prompt", 2, "--steps", 6,
             "--view-size", 16, "--device", "cpu"]
    run(tmp_path, ROOT / "r2d3.py", "--base", "my_base.py:load", "--prompts", "words.txt", "--test-prompts",
        "words.txt", "--reward", "colorfulness", "--out", "run", *small)
    assert (tmp_path / "run/report.html").is_file()
    made = run(tmp_path, ROOT / "r2d3.py", "sample", "--prompts", "a red cube", "--run", "run", "--samples-per-prompt", 1)
    assert Path(tmp_path, made.split()[0]).suffix == ".ply"


def test_links_lead_to_files():
    for target, line in re.findall(r"\]\(([\w./-]+)(?:#L(\d+))?\)", README):
        assert (ROOT / target).exists(), target
        if line:
            assert (ROOT / target).read_text(encoding="utf-8").splitlines()[int(line) - 1].strip(), (target, line)


def test_commands_parse():
    commands = re.findall(r"python r2d3\.py ([^`\n#]*)", README)
    assert len(commands) > 8
    for command in commands:
        words = [word.strip("\"'") for word in re.findall(r'"[^"]*"|\S+', command) if word != "..."]
        if "--run" not in words and not any(".py:" in word for word in words):      # of files that are not there
            r2d3.parse(words)


def test_the_map_points_at_the_sections():
    lines = SCRIPT.splitlines()
    named = re.findall(r"\[([\w ,\n]+)\]\(r2d3\.py#L(\d+)\)", README.partition("## Map")[2].partition("\n## ")[0])
    assert len(named) == 8
    for title, line in named:
        banner = lines[int(line) - 1].lower()
        assert re.match(r"# \d\. ", banner) and " ".join(title.lower().split()) in banner, (title, line)
