"""The command line: every option is documented and read, the README's commands parse, mistakes get one sentence."""
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import r2d3

ROOT = Path(__file__).resolve().parents[1]


def run(monkeypatch, capsys, *arguments):
    """Exit code and stderr of `python r2d3.py ...`, in this process."""
    monkeypatch.setattr(sys, "argv", ["r2d3.py", *map(str, arguments)])
    code = r2d3.main()
    return code, capsys.readouterr().err


def test_import_is_silent_and_light():
    code = ("import sys, r2d3; heavy = {'diffusers', 'transformers', 'peft', 'open_clip', 'matplotlib', 'tyro'};"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
            "import torch; assert not torch.cuda.is_initialized()")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def readme_commands():
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(text for language, text in blocks if language == "bash").replace("\\\n", " ").splitlines()
    found = [part.strip() for line in lines for part in line.split("#")[0].split("&&")]
    return [line for line in found if line.startswith("python ")]


def test_readme_commands_parse(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/shapes-aesthetic-seed0"  # the run that the README's first command leaves
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"config": dataclasses.asdict(r2d3.Config())}))
    commands = readme_commands()
    assert any(command == "python r2d3.py --reward aesthetic" for command in commands)
    for command in commands:
        program, *arguments = shlex.split(command)[1:]
        if program == "r2d3.py" and arguments != ["--help"]:
            r2d3.resolve(r2d3.parse(arguments)[1])
        elif program not in ("-m", "r2d3.py"):
            assert (ROOT / program).is_file(), command


@pytest.mark.parametrize("arguments, words", [
    (["--reward", "beauty"], ["'beauty'", "aesthetic", "file.py:function"]),
    (["--reward", "aesthetic=x"], ["weight", "dnc=0.3"]),
    (["--reward", "nowhere.py:f"], ["nowhere.py"]),
    (["--base", "teapot"], ["teapot", "shapes"]),
    (["--colour", "red"], ["--colour"]),
    (["--steps", "many"], ["--steps", "many"]),
    (["--steps", "0"], ["--steps", "above zero"]),
    (["--steps", "501"], ["501", "500"]),
    (["--scorer", "laion"], ["--scorer"]),
    (["--sampler", "euler"], ["--sampler euler", "rectified flow"]),
    (["sample", "--prompts", "a red cube", "--resume"], ["--resume", "not for sample"]),
    (["--lr", "inf"], ["--lr"]),
    (["--seed", "9" * 26], ["--seed"]),
    (["--lora-rank", "100000"], ["--lora-rank", "1024"]),
    (["--view-size", "2"], ["--view-size", "8"]),
    (["--elevation-jitter", "81"], ["--elevation-jitter", "80"]),
    (["--eval-size", "28"], ["--eval-size"]),
    (["--beta", "2std"], ["--beta"]),
    (["--estimator", "once"], ["step", "sample", "identity"]),
    (["--reward", "aesthetic=nan"], ["weight"]),
    (["--views", "-1"], ["--views"]),
    (["--view-size", "0"], ["--view-size"]),
    (["--batch-size", "0"], ["--batch-size"]),
    (["--lr", "0"], ["--lr"]),
    (["--reg-weight", "-1"], ["--reg-weight", "negative"]),
    (["--fraction", "1.5"], ["--fraction"]),
    (["--steps", "1", "--last-step", "never"], ["no step of the sampler is trained", "--steps 5"]),
    (["--dry-run"], ["--dry-run"]),
    (["cost", "--epochs", "2"], ["--epochs", "not for cost"]),
    (["--prompts", "a red teapot"], ["'teapot'", "cube"]),
    (["--prompts", "a red cube on a blue cube on a green cube on a red cube"], ["words"]),
    (["--prompts", "nowhere.txt"], ["nowhere.txt"]),
    (["--prompts", ""], ["empty"]),
    (["--steps", "4"], ["no step of the sampler", "--fraction"]),
    (["--draft-steps", "-1"], ["--draft-steps", "above zero"]),
    (["--draft-steps", "0"], ["--draft-steps", "above zero"]),
    (["--draft-steps", "31"], ["--draft-steps", "30"]),
    (["--method", "ppo"], ["nabla", "ddpo"]),
    (["sample", "--prompts", "a red cube", "--lora", "nowhere"], ["--lora"]),
    (["sample", "--prompts", "a red cube", "--run", "nowhere.safetensors"], ["nowhere.safetensors"]),
    (["--weights", "nowhere.safetensors"], ["nowhere.safetensors", "no file of weights"]),
    (["--run", "somewhere"], ["--run", "not for train"]),
    (["--mesh"], ["--mesh", "not for train"]),
    (["evaluate", "--protocol", "paper", "--samples-per-prompt", "1"], ["--protocol paper", "--samples-per-prompt 2"]),
    (["evaluate", "--prompts", "a red cube"], ["--prompts", "not for evaluate"]),
    (["evaluate", "--out", "/dev/null/here", "--eval-prompts", "1"], ["/dev/null/here", "annot be written"]),
    (["--resume"], ["--resume", "no checkpoint"]),
    (["--backend", "triton", "--device", "cpu"], ["--backend triton", "GPU"]),
    (["--device", "abacus"], ["abacus"]),
    (["sample"], ["--prompts"]),
    (["sample", "--prompts", "a red cube", "--run", "nowhere"], ["nowhere"]),
    (["evaluate", "--run", "nowhere"], ["nowhere"]),
])
def test_mistakes_get_one_sentence(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, text = run(monkeypatch, capsys, *arguments)
    assert code == 2 and "Traceback" not in text and len(text.strip().splitlines()) <= 2, text
    for word in words:
        assert word in text, text
    assert not list(tmp_path.rglob("*.pt"))


def test_files_that_are_not_what_they_should_be(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    code, text = run(monkeypatch, capsys, "--prompts", "empty.txt")
    assert code == 2 and "empty.txt is empty" in text
    (tmp_path / "latin.txt").write_bytes("ein grüner Würfel".encode("latin-1"))
    code, text = run(monkeypatch, capsys, "--prompts", "latin.txt")
    assert code == 2 and "not UTF-8" in text

    whole = (ROOT / "support/shapes.safetensors").read_bytes()
    for name, content in {"truncated": whole[:100_000], "header only": whole[:4], "nothing": b""}.items():
        (tmp_path / "weights.safetensors").write_bytes(content)
        code, text = run(monkeypatch, capsys, "--weights", "weights.safetensors")
        assert code == 2 and "weights.safetensors" in text and "complete" in text, (name, text)

    (tmp_path / "mine.py").write_text("def other(render, prompts): pass\n", encoding="utf-8")
    code, text = run(monkeypatch, capsys, "--reward", "mine.py:score")
    assert code == 2 and "no function 'score'" in text
    for body, word in (("return render.image.mean()", "returned"), ("return 1 / 0", "ZeroDivisionError"),
                       ("return render.image.detach().mean((2, 3, 4))", "no gradient")):
        (tmp_path / "mine.py").write_text(f"def score(render, prompts):\n    {body}\n", encoding="utf-8")
        code, text = run(monkeypatch, capsys, "--reward", "mine.py:score", "--out", "unused")
        assert code == 2 and word in text and not (tmp_path / "unused").exists(), text
    (tmp_path / "broken.py").write_text("def score(:\n")
    code, text = run(monkeypatch, capsys, "--reward", "broken.py:score")
    assert code == 2 and "broken.py" in text and "Traceback" not in text

    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("years of work", encoding="utf-8")
    code, text = run(monkeypatch, capsys, "--out", "full")
    assert code == 2 and "full" in text and (tmp_path / "full/thesis.tex").read_text(encoding="utf-8") == "years of work"
    code, text = run(monkeypatch, capsys, "--out", "mine.py")
    assert code == 2 and "is a file" in text


def test_weights_of_another_network_are_refused(monkeypatch, capsys, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file
    with safe_open(ROOT / "support/shapes.safetensors", "pt") as file:
        state, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    state["net.proj_out.bias"] = state["net.proj_out.bias"][:-1].clone()
    save_file(state, tmp_path / "shape.safetensors", about)
    del state["net.proj_out.bias"]
    save_file(state, tmp_path / "missing.safetensors", about)
    save_file(state, tmp_path / "foreign.safetensors", {"config": json.dumps({"hidden": 3})})
    save_file(state, tmp_path / "bare.safetensors")
    monkeypatch.chdir(tmp_path)
    for name, word in {"shape": "proj_out.bias", "missing": "proj_out.bias", "foreign": "make_shapes", "bare": "make_shapes"}.items():
        code, text = run(monkeypatch, capsys, "--weights", f"{name}.safetensors")
        assert code == 2 and word in text, text


def test_readme_pictures_exist():
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(pictures) >= 2 and all((ROOT / picture).is_file() for picture in pictures)
