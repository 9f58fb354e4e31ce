"""Fine-tuning end to end on the embedded base: it works, resumes bit for bit, loses nothing, stops when it must."""
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import r2d3
from support import UserError, fetching, metrics, report, write_atomic

ROOT = Path(__file__).resolve().parents[1]
TINY = r2d3.Config(epochs=2, batch_size=4, steps=6, views=2, view_size=24, samples_per_prompt=1,
                   updates_per_epoch=2, eval_batch=8, lr=1e-3)


@pytest.fixture(autouse=True, scope="module")
def small_pictures():
    """Evaluations of the embedded base in 32 pixels instead of 128, which would be most of a small run's time."""
    real = r2d3.load_base

    def load_base(config, device):
        base = real(config, device)
        base.eval_size = 32
        return base

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r2d3, "load_base", load_base)
        yield


@pytest.fixture(scope="module")
def prompt_files(tmp_path_factory):
    """Short prompt lists: train, test."""
    folder = tmp_path_factory.mktemp("prompts")
    for name, count in (("train", 12), ("test", 4)):
        lines = (ROOT / f"prompts/shapes_{name}.txt").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return {"prompts": str(folder / "train.txt"), "test_prompts": str(folder / "test.txt")}


def tiny(prompt_files, out, **changes):
    return dataclasses.replace(TINY, out=str(out), **prompt_files | changes)


def files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def two_epochs(prompt_files, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "two"
    return out, r2d3.train(tiny(prompt_files, out))


def test_everything_is_left_behind(two_epochs):
    out, summary = two_epochs
    assert {"config.json", "log.csv", "summary.json", "curves.png", "report.html", "samples/before_after.png",
            "samples/turntable.gif", "lora/adapter_model.safetensors", "lora/adapter_config.json",
            "checkpoint/state.pt", "source/r2d3.py", "source/kernels/splat.py"} <= files(out)
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary
    for name in ("reward", "alignment", "coverage", "diversity", "fid_to_base"):
        assert summary[name].keys() >= {"before", "after", "ci95"}
        low, high = summary[name]["ci95"]
        change = summary[name]["after"] - summary[name]["before"]
        assert low - 1e-6 <= change <= high + 1e-6 or name == "fid_to_base"
    about = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert about["config"]["epochs"] == 2 and about["versions"]["torch"] and about["seed"] == 0
    rows = (out / "log.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 5 and rows[0].startswith("update,epoch,reward")
    page = (out / "report.html").read_text(encoding="utf-8")
    words = re.sub("[A-Za-z0-9+/=]{200,}", "", page)           # base64, in which any four letters may follow each other
    assert "http" not in words.replace("http-equiv", "") and page.count("data:image/") == 3


def test_lora_loads_with_peft(two_epochs, prompt_files):
    from peft import PeftModel
    out, _ = two_epochs
    config = r2d3.resolve(tiny(prompt_files, out))
    base = r2d3.load_base(config, "cpu")
    model = PeftModel.from_pretrained(base.net, str(out / "lora"))
    changed = [p.abs().max() for name, p in model.named_parameters() if "lora_B" in name]
    assert len(changed) > 20 and sum(value > 0 for value in changed) > 20


@pytest.mark.slow
def test_two_epochs_and_two_more_equal_four(two_epochs, prompt_files, tmp_path):
    out, _ = two_epochs
    straight = r2d3.train(tiny(prompt_files, tmp_path / "four", epochs=4))
    resumed = r2d3.train(tiny(prompt_files, out, epochs=4, resume=True))
    ours, theirs = (torch.load(folder / "checkpoint/state.pt", weights_only=True)
                    for folder in (out, tmp_path / "four"))
    assert ours["lora"].keys() == theirs["lora"].keys()
    for name, value in ours["lora"].items():
        assert torch.equal(value, theirs["lora"][name]), name
    for key in ("reward", "alignment", "coverage"):
        assert resumed[key]["after"] == straight[key]["after"]
    with pytest.raises(UserError, match="already holds"):
        r2d3.train(tiny(prompt_files, out, epochs=4))
    with pytest.raises(UserError, match="lr was 0.001"):
        r2d3.train(tiny(prompt_files, out, epochs=4, resume=True, lr=0.5))
    with pytest.raises(UserError, match="4 epochs already"):
        r2d3.train(tiny(prompt_files, out, epochs=1, resume=True))
    with pytest.raises(UserError, match="prompts are not those"):
        more = tmp_path / "more.txt"
        more.write_text(Path(prompt_files["prompts"]).read_text(encoding="utf-8") + "\na red cube\n", encoding="utf-8")
        r2d3.train(tiny({**prompt_files, "prompts": str(more)}, out, epochs=5, resume=True))


@pytest.mark.slow
def test_ddpo_goes_on_with_its_rewards(prompt_files, tmp_path):
    """What it has seen of every prompt is part of the checkpoint; 12 prompts, so that each comes up again."""
    for folder, parts in (("straight", [3]), ("resumed", [1, 3])):
        for epochs in parts:
            r2d3.train(tiny(prompt_files, tmp_path / folder, method="ddpo", batch_size=12, epochs=epochs,
                            resume=epochs > parts[0]))
    one, other = (torch.load(tmp_path / name / "checkpoint/state.pt", weights_only=True)
                  for name in ("straight", "resumed"))
    assert one["history"] == other["history"] and sum(len(seen) for seen in one["history"].values()) == 36
    assert all(torch.equal(value, other["lora"][name]) for name, value in one["lora"].items())
    for state in (one, other):
        assert [row["judged"] for row in state["rows"]] == [12, 12, 24, 24, 36, 36]


def test_a_transition_has_its_own_samples_gradient(prompt_files, tmp_path, monkeypatch):
    """E8's u belongs to the object whose step it is; and no weight collects a gradient while g is made."""
    made, seen, watched = {}, [], []
    judged, real, nabla_step = r2d3.judge_samples, r2d3.reward_gradient, r2d3.nabla_step

    def judge_samples(job, x0, *rest, **more):
        made["x0"] = x0
        return *judged(job, x0, *rest, **more)[:2], x0.clone()                      # so that u tells whose it is

    def gradient(predict, *rest, **more):
        asked, weights = [], [*watched[-1].parameters()]
        result = real(lambda x, t: asked.append([w.requires_grad for w in weights]) or predict(x, t), *rest, **more)
        assert asked and not any(map(any, asked))
        return result

    def step(job, batch):
        seen.append(batch)
        watched.append(job.base.net)
        result = nabla_step(job, batch)
        assert any(weight.requires_grad for weight in job.base.net.parameters())
        return result

    monkeypatch.setattr(r2d3, "judge_samples", judge_samples)
    monkeypatch.setattr(r2d3, "reward_gradient", gradient)
    monkeypatch.setitem(r2d3.METHODS, "nabla", step)
    r2d3.train(tiny(prompt_files, tmp_path / "run", epochs=1, skip_below=0.0, fraction=1.0))
    ends = [(batch.u[m], batch.x_s[m]) for batch in seen for m in range(len(batch.i)) if batch.i[m] == 5]
    assert len(ends) == 4 and all(torch.equal(u, x_s) for u, x_s in ends)           # the last step's x_s is the sample
    assert all(any(torch.equal(u, x0) for x0 in made["x0"]) for batch in seen for u in batch.u)


def test_fewer_test_prompts(prompt_files, tmp_path):
    """--eval-prompts: the first so many; a continuation has the run's number, an evaluation all."""
    out = tmp_path / "run"
    assert r2d3.train(tiny(prompt_files, out, epochs=1, eval_prompts=2))["prompts"] == 2
    assert r2d3.train(tiny(prompt_files, out, epochs=2, resume=True))["prompts"] == 2
    _, config = r2d3.parse(["evaluate", "--run", str(out)])
    assert config.eval_prompts is None and config.seed == 0 and config.lr == 1e-3
    about = json.loads((out / "config.json").read_text(encoding="utf-8"))
    del about["config"]["estimator"], about["config"]["eval_prompts"]      # a run from before there was a choice
    (out / "config.json").write_text(json.dumps(about), encoding="utf-8")
    assert r2d3.run_config(str(out)).estimator is None and r2d3.run_config(str(out)).lr == 1e-3


@pytest.mark.parametrize("estimator", ["step", "sample", "identity"])
def test_the_reward_is_asked_where_it_says(prompt_files, tmp_path, monkeypatch, estimator):
    """At every trained step's estimate, or only of the finished samples, which the log needs anyway."""
    asked, judge = [], r2d3.Job.judge

    def watched(job, x0, *rest):
        asked.append((len(x0), x0.requires_grad))
        return judge(job, x0, *rest)

    monkeypatch.setattr(r2d3.Job, "judge", watched)
    r2d3.train(tiny(prompt_files, tmp_path / "run", epochs=1, skip_below=0.0, estimator=estimator))
    trial = [(1, True)]                                         # before the work, see test_robust.py
    assert asked == trial + ([(4, False), (4, True), (4, True)] if estimator == "step" else [(4, True)])


@pytest.mark.slow
def test_damaged_run_folders(prompt_files, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    r2d3.train(tiny(prompt_files, out, epochs=1, guidance=3.0))
    assert r2d3.train(tiny(prompt_files, out, epochs=2, resume=True))["updates"] == 4  # guidance: as the run had it
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["config"]["guidance"] == 3.0
    lora = (out / "lora/adapter_model.safetensors").read_bytes()
    for name, content, arguments in (
            ("lora/adapter_model.safetensors", lora[:1000], ["sample", "--prompts", "a red cube", "--run", str(out)]),
            ("config.json", b"{", ["evaluate", "--run", str(out)]),
            ("checkpoint/state.pt", b"junk", None)):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(content)
        if arguments is None:
            with pytest.raises(UserError, match="cannot be read"):
                r2d3.train(tiny(prompt_files, out, epochs=3, resume=True))
        else:
            monkeypatch.setattr(sys, "argv", ["r2d3.py", *arguments])
            assert r2d3.main() == 2 and "cannot be read" in capsys.readouterr().err
        (out / name).write_bytes(whole)
    (out / "checkpoint/before.pt").write_bytes(b"junk")  # only a cache: it is measured again
    assert r2d3.train(tiny(prompt_files, out, epochs=3, resume=True))["updates"] == 6
    monkeypatch.setattr(sys, "argv", ["r2d3.py", "sample", "--prompts", "a red cube", "--run", str(out), "--out",
                                      str(tmp_path / "made"), "--samples-per-prompt", "4"])
    assert r2d3.main() == 0 and len(list((tmp_path / "made").glob("*.ply"))) == 4


@pytest.mark.slow
def test_kill_loses_nothing_saved(prompt_files, tmp_path):
    """kill -9 in the middle of the third epoch; the second one's checkpoint is whole, and resume goes on from it."""
    out = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "r2d3.py"), "--out", str(out), "--epochs", "50"]
    for name, value in (dataclasses.asdict(TINY) | prompt_files).items():
        if value is not None and name not in ("epochs", "resume", "out") and value != getattr(r2d3.Config(), name):
            command += [f"--{name.replace('_', '-')}", str(value)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    deadline = time.time() + 120
    while time.time() < deadline and not (out / "checkpoint/state.pt").is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = torch.load(out / "checkpoint/state.pt", weights_only=True)
    assert state["epoch"] >= 1 and len(state["rows"]) == 2 * state["epoch"]
    summary = r2d3.train(tiny(prompt_files, out, epochs=state["epoch"] + 1, resume=True))
    assert summary["updates"] == 2 * (state["epoch"] + 1)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    write_atomic(path, b"old")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="No space left on device"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_a_loss_that_is_not_finite_stops_the_run(prompt_files, tmp_path):
    """A reward that is not finite is found before the work; predictions that overflow, at the update where they do."""
    own = "def score(render, prompts):\n    return render.image.mean((2, 3, 4)).log() * 0 / 0\n"
    (tmp_path / "bad.py").write_text(own, encoding="utf-8")
    with pytest.raises(UserError, match=r"bad.py:score is not finite: \[nan, nan\] for '"):
        r2d3.train(tiny(prompt_files, tmp_path / "bad", reward=f"{tmp_path / 'bad.py'}:score"))
    with pytest.raises(UserError) as stop:
        r2d3.train(tiny(prompt_files, tmp_path / "bad", lr=1e30))
    for words in ("not finite: the reward gradient at sampler step", "epoch 0, update 1", "no checkpoint yet",
                  "smaller --lr"):
        assert words in str(stop.value)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"reward": "hpsv2"}, {"reward": "normal"}, {"reward": "dnc", "matching": "score", "branch": "guided"},
    {"reward": "aesthetic=1,dnc=0.3", "sampler": "ddim", "last_step": "stratified"},
    {"last_step": "never", "time_weight": "linear", "guidance": 1.0}, {"estimator": "identity", "matching": "v"},
    {"matching": "kl", "elevation_jitter": 0.0, "azimuth_jitter": 0.0, "lora_rank": 2},
    {"method": "refl"}, {"method": "draft", "draft_steps": 2}, {"method": "draft", "draft_steps": 1, "guidance": 1.0},
    {"method": "ddpo", "updates_per_epoch": 4}, {"recipe": "paper", "matching": "v"},
    {"batch_size": 3, "micro_batch": 5, "steps": 3, "fraction": 1.0, "views": 3, "time_weight": "none"},
], ids=str)
def test_options_run_and_learn_something(prompt_files, tmp_path, changes):
    summary = r2d3.train(tiny(prompt_files, tmp_path / "run", **(dict(epochs=1) | changes)))
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    moved = [value.abs().max().item() for name, value in state["lora"].items() if "lora_B" in name]
    assert max(moved) > 0 and summary["reward"]["before"] != summary["reward"]["after"]


@pytest.mark.slow
def test_fine_tuning_raises_the_reward_on_unseen_prompts(prompt_files, tmp_path):
    """The real method with the real defaults, less of it: the held-out reward goes up by several standard errors."""
    config = r2d3.Config(out=str(tmp_path / "run"), epochs=3, samples_per_prompt=1, batch_size=8, view_size=32)
    lines = (ROOT / "prompts/shapes_test.txt").read_text(encoding="utf-8").splitlines()[:24]
    (tmp_path / "test.txt").write_text("\n".join(lines), encoding="utf-8")
    summary = r2d3.train(dataclasses.replace(config, test_prompts=str(tmp_path / "test.txt")))
    assert summary["reward"]["change"] > 0 and summary["reward"]["standard_errors"] > 3, summary["reward"]
    rows = [line.split(",") for line in (tmp_path / "run/log.csv").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 1 + 3 * 16 and rows[-1][rows[0].index("judged")] == "24"


def test_sample_writes_what_viewers_open(two_epochs, tmp_path):
    out, _ = two_epochs
    config = dataclasses.replace(r2d3.run_config(str(out)), prompts="a red cube", out=str(tmp_path),
                                 samples_per_prompt=2)
    written = r2d3.sample(config)
    assert [path.name for path in written] == ["a-red-cube-seed0-0.ply", "a-red-cube-seed0-1.ply"]
    for path in written:
        content = path.read_bytes()
        header = content[:content.index(b"end_header\n") + 11].decode().splitlines()
        count = int(header[2].split()[-1])
        assert header[0] == "ply" and len(content) == len("\n".join(header)) + 1 + count * 17 * 4 and count > 50
        assert path.with_suffix(".png").is_file() and path.with_suffix(".gif").is_file()


def test_sample_without_a_run_samples_the_base(two_epochs, tmp_path):
    settings = {"prompts": "a red cube", "steps": 6, "samples_per_prompt": 1}
    base, = r2d3.sample(r2d3.Config(out=str(tmp_path / "base"), **settings))
    tuned, = r2d3.sample(r2d3.Config(out=str(tmp_path / "tuned"), run=str(two_epochs[0]), **settings))
    assert base.read_bytes() != tuned.read_bytes()
    again, = r2d3.sample(r2d3.Config(out=str(tmp_path / "again"), **settings))
    assert again.read_bytes() == base.read_bytes()


def test_evaluate_a_run_and_the_base(two_epochs):
    out, summary = two_epochs
    again = r2d3.evaluate(dataclasses.replace(r2d3.run_config(str(out)), out=None))
    for name in metrics.METRICS:
        assert again[name]["before"] == pytest.approx(summary[name]["before"], rel=1e-4)
    assert {"config.json", "summary.json", "report.html", "samples/before_after.png",
            "samples/turntable.gif"} == files(out / "evaluation")
    assert json.loads((out / "evaluation/summary.json").read_text(encoding="utf-8")) == again
    about = json.loads((out / "evaluation/config.json").read_text(encoding="utf-8"))
    assert about["config"]["steps"] == 6 and about["config"]["run"] == str(out)
    assert about["versions"] and about["command"]
    base = r2d3.evaluate(dataclasses.replace(r2d3.run_config(str(out)), run=None, out=str(out / "base")))
    assert base["run"] is None and base["reward"]["change"] == 0
    assert base["reward"]["after"] == again["reward"]["before"]
    assert (out / "base/report.html").is_file()


def test_evaluate_makes_32_objects_of_a_prompt(two_epochs, tmp_path):
    """The paper's number, also for a run that was trained with another; and the number given, if one is."""
    (tmp_path / "one.txt").write_text("a red cube\n", encoding="utf-8")
    for more, number in ((["--run", str(two_epochs[0])], 32), (["--samples-per-prompt", "3"], 3)):
        command, config = r2d3.parse(["evaluate", "--test-prompts", str(tmp_path / "one.txt"), "--steps", "3",
                                      "--out", str(tmp_path / str(number)), *more])
        summary = command(config)
        assert summary["samples_per_prompt"] == number and summary["fid_to_base"]["images"] == 4 * number


class Seeing(torch.nn.Module):
    """Stands for a network of pictures: what it is given is kept, what it says depends on the pictures' means."""

    def __init__(self, dim, size=None):
        super().__init__()
        self.dim, self.given = dim, []
        self.visual = SimpleNamespace(image_size=(size, size))

    def forward(self, images):
        self.given.append(images)
        return images.mean((2, 3)) @ torch.linspace(-1, 1, 3 * self.dim).view(3, self.dim).cos()

    encode_image = embed = forward

    def encode_text(self, tokens):
        return tokens.float()[:, :self.dim] + 1


@pytest.mark.parametrize("more", [False, True])
def test_features_of_bases_without_a_tower(monkeypatch, more):
    """CLIP, Inception, and DreamSim where it is installed. The packages are stood for by what they offer."""
    import open_clip
    clip, dream, inception = Seeing(8, 20), Seeing(5), Seeing(7)
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained: clip)
    monkeypatch.setattr(metrics, "inception", lambda device: inception)
    if more:
        monkeypatch.setitem(sys.modules, "dreamsim", SimpleNamespace(dreamsim=lambda pretrained, device: (dream, None),
                                                                     __spec__=object()))
    config = r2d3.resolve(r2d3.Config(samples_per_prompt=2, steps=3, guidance=2.0))
    base = r2d3.load_base(config, "cpu")
    base.tower = None
    features = metrics.load_features(base.tower, "cpu")
    assert ("DreamSim" in features.title) == more and "Inception" in features.title
    reward = r2d3.load_reward("dnc", base, "cpu")
    schedule = r2d3.NoiseSchedule.from_diffusers("dpm", 3)
    got = common.measure(base, reward, features, schedule, ["a red cube", "a blue cone"], config, 0, "")
    assert got.features.shape == (2, 2, 4, 5 if more else 8) and got.fid_features.shape == (2, 2, 4, 7)
    assert clip.given[0].shape == (16, 3, 20, 20) and clip.given[0].abs().max() > 1.2          # resized and normalised
    assert inception.given[0].max() <= 1.001 and (not more or dream.given[0].shape == (16, 3, 224, 224))
    assert (got.alignment.abs() <= 1).all() and got.alignment.std() > 0
    assert close_to_one(got.features.norm(dim=-1))


def close_to_one(values):
    return (values - 1).abs().max() < 1e-5


def test_features_without_network(monkeypatch):
    import open_clip
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **more: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(UserError, match="network"), fetching("the networks that measure", "0.6 GB"):
        metrics.load_features(None, "cpu")


def test_a_turntable_turns_once_around():
    from io import BytesIO

    from PIL import Image
    g = r2d3.Gaussians(torch.tensor([[[0.2, 0.0, 0.0]]]), torch.full((1, 1, 3), 0.05), torch.tensor([[[1.0, 0, 0, 0]]]),
                       torch.ones(1, 1), torch.zeros(1, 1, 3))
    job = r2d3.Job(r2d3.Base, None, None, None, common.settings())
    made = report.turntable.func(partial(r2d3.draw, job), g, 32)            # conftest.py shortens the others
    full = Image.open(BytesIO(made))
    assert full.n_frames == 36 and full.size == (32, 32)
    darkest = []
    for frame in range(36):
        full.seek(frame)
        rows = torch.tensor(list(full.convert("L").getdata())).view(32, 32).sum(0)
        darkest.append(int(rows.argmin()))
    assert min(darkest) < 12 and max(darkest) > 20 and abs(darkest[0] - darkest[-1]) <= 2   # to both sides, and back
