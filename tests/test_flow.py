"""Rectified flows: the transition against recorded float64 tables and diffusers' own steps, a VP base seen as a flow,
and DiffSplat on SD3.5 against recordings of the published code. Tiny, on the CPU, without network.
"""
import copy
import gc
import json
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]

from common import plugin, shrink_pictures  # noqa: E402

import r2d3  # noqa: E402
from r2d3 import Cond, Config, Job, NoiseSchedule, UserError, seeded  # noqa: E402
from support import published, scorers  # noqa: E402

NAME = "diffsplat-sd35"
sd35 = plugin("diffsplat_sd35")
TABLES = load_file(ROOT / "tests/data/sd3_schedule.safetensors")
REAL = json.loads((ROOT / "tests/data/sd3_real.json").read_text(encoding="utf-8"))


def data(name):
    """A recording, and the configuration of what made it."""
    path = ROOT / f"tests/data/{name}.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads((file.metadata() or {}).get("config", "{}"))


def weights(tensors, prefix="sd."):
    return {name.removeprefix(prefix): value.float() for name, value in tensors.items() if name.startswith(prefix)}


def close(got, want, tolerance):
    """The shapes are the same, and no element differs by more than a share of the largest one."""
    return got.shape == want.shape and ((got - want).abs().max() <= tolerance * want.abs().max()).item()


def flow(sigma, **more):
    """The schedule with these noise levels."""
    sigma = sigma.double()
    return NoiseSchedule(1000 * sigma[:-1], 1 - sigma, sigma, prediction="v", **more)


def recorded(grid):
    table = {name.split(".")[-1]: value for name, value in TABLES.items() if name.startswith(f"math.{grid}.")}
    return flow(torch.cat([table["sigma_t"], table["sigma_s"][-1:]])), table


# ---- the transition ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["euler20", "dpm20"])
def test_tables_are_the_recorded_ones(grid):
    """E2, E3 and k (E6), in float64: measured 2e-16. From sigma 1 to sigma 0 without a special case."""
    schedule, want = recorded(grid)
    c_x, c_0, std = schedule.step(torch.arange(20))
    assert (schedule.sigma[0] == 1) == (grid == "euler20") and schedule.sigma[-1] == 0
    for got, name in ((c_x, "c_x"), (c_0, "c0"), (std, "std")):
        assert got.isfinite().all() and (got - want[name]).abs().max() < 1e-12, name
        assert all(torch.equal(schedule.step(i)[("c_x", "c0", "std").index(name)], got[i]) for i in range(20))
    k = schedule.k(torch.arange(20))
    assert k[:-1].isfinite().all() and std[-1] == 0             # only the step without noise has no score
    assert ((k - want["k_v"])[:-1] / want["k_v"][:-1]).abs().max() < 1e-12
    weight = schedule.alpha[1:] ** 2 / k                        # what a match in v multiplies g with, finite everywhere
    assert (weight - want["w_over_k_v"]).abs().max() < 1e-12 and weight[-1] == 0 and weight.max() < 0.25
    schedule.prediction = "eps"
    k = schedule.k(torch.arange(1, 19))
    assert (k / want["k_eps"][1:19] - 1).abs().max() < 1e-12


@pytest.mark.parametrize("steps", [8, 20, 28])
def test_grids_are_the_published_ones(steps):
    """Recorded from diffusers 0.32.2 and DiffSplat's own copies; the network is told 1000 sigma, not rounded."""
    for sampler, name in (("euler", "euler"), ("ddim", "euler"), ("dpm", "stockdpm")):
        schedule = sd35.flow_schedule(sampler, steps, 3.0)
        sigma = TABLES[f"{name}{steps}.sigmas"].double()
        assert len(schedule) == steps and (schedule.sigma - sigma).abs().max() < 1e-7
        assert torch.equal(schedule.alpha, 1 - schedule.sigma) and isinstance(schedule, sd35.EulerFlow) == (sampler == "euler")
        told = schedule.t(torch.arange(steps + 1))
        assert told.dtype == torch.float32 and close(told, 1000 * sigma.float(), 1e-6) and told[-1] == 0
        integers = TABLES[f"{name}{steps}.timesteps"]
        if sampler == "dpm":
            assert torch.equal(told[:-1].long(), integers) and (told[:-1] - integers).max() > 0.1
        else:
            assert close(told[:-1], integers, 1e-6) and told[0] == 1000
    with pytest.raises(ValueError, match="dpm, ddim or euler"):
        sd35.flow_schedule("heun", steps, 3.0)


def test_a_sampler_that_a_base_does_not_have_is_one_sentence(vp):
    """euler is a flow's; and no grid has no steps."""
    with pytest.raises(ValueError, match="dpm or ddim"):
        NoiseSchedule.from_diffusers("euler", 20)
    for schedule in (NoiseSchedule.from_diffusers, lambda sampler, steps: sd35.flow_schedule(sampler, steps, 3.0)):
        with pytest.raises(ValueError, match="one step or more"):
            schedule("dpm", 0)
    with pytest.raises(UserError, match="--sampler euler, --steps 20: .* dpm or ddim") as error:
        r2d3.start_job(r2d3.resolve(Config(sampler="euler", steps=20, device="cpu")), vp)
    assert "\n" not in str(error.value)


def test_steps_are_the_recorded_ones():
    """Euler's, sde-dpmsolver++'s and ours on Euler's grid, with the recorded noise; measured 5e-7 of the largest."""
    x, v, noise = (TABLES[f"step.{name}"] for name in ("x", "v", "noise"))
    euler, ddim, dpm = (sd35.flow_schedule(sampler, 20, 3.0) for sampler in ("euler", "ddim", "dpm"))
    for i in (0, 1, 9, 17, 18, 19):
        for schedule, name in ((euler, "euler20"), (ddim, "sde20"), (dpm, "stockdpm20")):
            mean, std = schedule.transition(x, v, i)
            want = TABLES[f"{name}.step{i:02d}.prev"]
            assert close(mean + std * noise, want, 2e-6), (name, i)
            assert (std == 0).all() == (name == "euler20" or i == 19)
            if i < 18:                                          # at the end the prediction hardly counts
                assert not close(schedule.transition(x, 1.5 * v, i)[0] + std * noise, want, 1e-3), (name, i)
        assert close(ddim.transition(x, v, i)[0], TABLES[f"sde20.step{i:02d}.mean"], 2e-6)
        assert close(ddim.x0(x, v, i), TABLES[f"sde20.step{i:02d}.x0"], 2e-6)


@pytest.mark.parametrize("steps", [3, 28])
def test_a_step_is_diffusers_own(steps):
    """Its flow scheduler as it is installed, in turn over all steps with the same noise: measured 6e-7."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
    stochastic = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1, use_flow_sigmas=True,
                                             prediction_type="flow_prediction", flow_shift=3.0)
    for theirs, sampler in ((stochastic, "dpm"), (FlowMatchEulerDiscreteScheduler(shift=3.0), "euler")):
        theirs.set_timesteps(steps)
        schedule = sd35.flow_schedule(sampler, steps, 3.0)
        x = mine = torch.randn(2, 4, 3, 5, generator=seeded(0))
        for i, t in enumerate(theirs.timesteps):
            v = torch.randn(x.shape, generator=seeded(1, i))
            x = theirs.step(v, t, x, generator=seeded(2, i), return_dict=False)[0]
            mean, std = schedule.transition(mine, v, i)
            mine = mean + std * torch.randn(x.shape, generator=seeded(2, i))
            assert close(mine, x, 2e-6), (sampler, i)


def test_the_score_depends_on_v_by_k():
    """E6, with both scores written out, at levels mixed in a batch and at sigma 1; float64, measured 3e-13."""
    schedule = sd35.flow_schedule("ddim", 20, 3.0)
    i = torch.arange(19)
    x_t, x_s, v, other = (torch.randn(19, 6, generator=seeded(n), dtype=torch.float64) for n in range(4))

    def score(prediction):
        mean, std = schedule.transition(x_t, prediction, i)
        return -(x_s - mean) / std ** 2

    want = -schedule.k(i)[:, None] * (v - other)
    difference = (score(v) - score(other) - want).abs().amax(1) / want.abs().amax(1)
    assert difference.max() < 1e-10 and difference[0] < 1e-12
    clean, noise = x_t, x_s                                     # and the three predictions are one
    level = schedule.sigma[i, None]
    noisy, v = (1 - level) * clean + level * noise, noise - clean
    assert close(schedule.x0(noisy, v, i), clean, 1e-14)
    eps = NoiseSchedule(schedule.timesteps, schedule.alpha, schedule.sigma)
    assert close(eps.x0(noisy, noise, i)[1:], clean[1:], 1e-12)
    assert close(eps.k(i)[1:] * (1 - level[1:, 0]), schedule.k(i)[1:], 1e-12)
    for a, b in zip(eps.transition(noisy[1:], noise[1:], i[1:]), schedule.transition(noisy[1:], v[1:], i[1:])):
        assert close(a, b, 1e-12)


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_the_marginals_are_kept(sampler):
    """With the true x0, x_s has mean alpha_s x0 and variance sigma_s^2, over any step; float64."""
    schedule = sd35.flow_schedule(sampler, 28, 3.0)
    i = torch.arange(28)
    c_x, c_0, std = schedule.step(i)
    assert (c_x * schedule.alpha[i] + c_0 - schedule.alpha[i + 1]).abs().max() < 1e-14
    assert ((c_x * schedule.sigma[i]) ** 2 + std ** 2 - schedule.sigma[i + 1] ** 2).abs().max() < 1e-14
    assert sampler == "dpm" or c_x[0] == 0                      # memoryless: nothing of the first noise is left


# ---- a VP base as a flow -----------------------------------------------------------------------------------


class AsFlow(r2d3.DiffSplat):
    """A base that predicts eps, seen as the rectified flow that it also is: x_flow = x / (alpha + sigma), whose noise
    level is sigma / (alpha + sigma). A flow for tests and experiments that needs no weights of its own.
    """

    def __init__(self, base):
        from diffusers import DDIMScheduler
        vars(self).update(vars(base))
        alpha = DDIMScheduler(**base.betas).alphas_cumprod.double().sqrt()
        self.levels = torch.stack([alpha, (1 - alpha ** 2).sqrt()])                 # alpha, sigma of timesteps

    def schedule(self, sampler, steps):
        vp = NoiseSchedule.from_diffusers(sampler, steps, **self.betas)
        total = vp.alpha + vp.sigma
        return NoiseSchedule((1000 * vp.sigma / total)[:-1], vp.alpha / total, vp.sigma / total, prediction="v")

    def predict(self, x, t, cond):
        """v = eps - x0, from the timestep whose level is told."""
        level = self.levels[1] / self.levels.sum(0)
        step = (level - t[:, None].to(level) / 1000).abs().argmin(1)
        alpha, sigma = self.levels[:, step].reshape(2, -1, 1, 1, 1, 1)
        scaled = x * (alpha + sigma)
        eps = super().predict(scaled.float(), step, cond)
        return (eps - (scaled - sigma * eps) / alpha).float()


@pytest.fixture(scope="module")
def vp():
    return r2d3.load_base(r2d3.resolve(Config(device="cpu")), "cpu")


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_a_vp_base_as_a_flow_samples_the_same_objects(vp, sampler):
    """20 guided steps with the same noise, latents scaled to compare: measured 2e-6 of the largest."""
    schedules = [NoiseSchedule.from_diffusers(sampler, 20, **vp.betas), AsFlow(vp).schedule(sampler, 20)]
    scale = (schedules[0].alpha + schedules[0].sigma).float()
    cond, null = vp.encode(["a red cube", "a blue sphere"]), vp.encode([""])
    x = torch.randn(2, *vp.latent_shape, generator=seeded(0))
    paths = [[x], [x / scale[0]]]
    with torch.no_grad():
        for i in range(20):
            noise = torch.randn(x.shape, generator=seeded(1, i))
            for base, schedule, path in zip((vp, AsFlow(vp)), schedules, paths):
                job = Job(base, None, schedule, null, Config(guidance=vp.guidance))
                guided = job.predict_guided(path[-1], schedule.t(i).expand(2), cond)
                mean, std = schedule.transition(path[-1], guided, i)
                path.append(mean + std * noise)
            assert close(paths[1][-1] * scale[i + 1], paths[0][-1], 1e-5), i
    objects = [base.decode(path[-1] * factor) for base, path, factor in zip((vp, vp), paths, (1, scale[-1]))]
    for ours, theirs in zip(*objects):
        assert close(ours, theirs, 1e-4)


@pytest.mark.parametrize("matching", ["score", "kl", "eps"])
def test_a_vp_base_as_a_flow_is_trained_the_same(vp, matching):
    """The same transitions, scaled: reward gradient (E8), loss and its gradient in the LoRA, at all noise levels.

    Scores are those of x / total, so that a match of them is scaled by the square of total; one of eps is not. The
    weight w is 1: the paper's, alpha_s squared, is another one for a flow, whose alpha is alpha / total.
    """
    vp = copy.copy(vp)
    vp.net = r2d3.add_lora(copy.deepcopy(vp.net), vp.lora_targets, 4, 0)
    lora = [weight for name, weight in vp.net.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for n, weight in enumerate(lora):
            weight += 0.1 * torch.randn(weight.shape, generator=seeded(n))
    i = torch.tensor([0, 4, 9, 14, 19])
    cond, null = vp.encode(["a red cube"] * 5), vp.encode([""])
    clean, noise, other, u = (torch.randn(5, *vp.latent_shape, generator=seeded(n)) for n in range(4))
    schedule = vp.schedule("dpm", 20)
    found = []
    for base in (vp, AsFlow(vp)):
        total = (schedule.alpha + schedule.sigma) if base is not vp else torch.ones(21)
        alpha, sigma = schedule.alpha / total, schedule.sigma / total
        x_t, x_s = (r2d3.per_sample(alpha[level], u) * clean + r2d3.per_sample(sigma[level], u) * some
                    for level, some in ((i, noise), (i + 1, other)))
        own = base.schedule("dpm", 20)
        halves = partial(Job(base, None, own, null, Config()).predict, cond=cond, guidance=3.0)

        def reference(x, t, halves=halves):
            with vp.net.disable_adapter():
                return halves(x, t)

        g = r2d3.reward_gradient(halves, lambda x0: (x0 * u).flatten(1).sum(1), own, x_s, i + 1, guidance=3.0)
        match, _ = r2d3.nabla_loss(halves, reference, own, x_t, i, torch.zeros_like(g), g, beta=0.3, matching=matching,
                                   time_weight="none", guidance=3.0)
        scale = r2d3.per_sample(total[i + 1], u)
        match = match / scale.flatten() ** {"score": 2, "kl": 0, "eps": 0}[matching]
        gradients = [torch.autograd.grad(one, lora, retain_graph=True) for one in match]
        found.append((g / scale, match, [torch.cat([part.flatten() for part in parts]) for parts in gradients]))
    assert all(close(ours, theirs, 1e-4) for ours, theirs in zip(found[1][0], found[0][0]))
    assert all(close(ours, theirs, 2e-3) for ours, theirs in zip(found[1][1], found[0][1])) and (found[0][1] > 0).all()
    for ours, theirs in zip(found[1][2], found[0][2]):
        assert close(ours, theirs, 2e-3) and not close(1.05 * ours, theirs, 1e-2)


# ---- DiffSplat on SD3.5 ------------------------------------------------------------------------------------


def network(name):
    """A recorded network and what went in and came out; its position table is not the one its config makes."""
    d, config = data(name)
    net = published.read_network(config | {"_class_name": "SD3TransformerMV2DModel"}, weights(d), name)
    return net, d


def vae():
    d, config = data("sd3_vae")
    config |= {"_class_name": "AutoencoderKL", "in_channels": 12, "out_channels": 12}
    with torch.random.fork_rng():
        encoder = {name: value for name, value in published.build(config).state_dict().items() if "encoder." in name}
    decoder = {name.removeprefix("vae."): value for name, value in weights(d).items()}
    return published.read_network(config, encoder | decoder, "sd3_vae"), d


def splat(net, autoencoder, views=4):
    about = {"image_size": 2 * net.config.sample_size, "prediction_type": "flow_prediction", "guidance": 5.0,
             "betas": {"flow_shift": 3.0}, "eval_size": 16, "lora_targets": published.PUBLISHED[NAME]["lora_targets"],
             "latent_mean": torch.tensor(0.0609), "latent_std": torch.tensor(1 / 1.5305), "scale_range": (0.0005, 0.02),
             "depth_scale": 1.0, "half_image_shift": True}
    kind = type("Splat", (sd35.DiffSplatSD3,), {"views": views})
    return kind(net, autoencoder, None, about, "cpu")


@pytest.mark.parametrize("name", ["sd3_mv", "sd3_mv_plain"])
def test_the_network_is_the_recorded_one(name):
    """3.5's kind (two attentions, norms of queries and keys) and 3.0's: measured 1.3e-6, gradients 1.5e-6."""
    net, d = network(name)
    base = splat(net, vae()[0])
    x, rays = (part.unflatten(0, (4, 4)).contiguous() for part in d["x"].split([16, 6], 1))
    base.plucker = rays                                         # the recorded rows have their own
    inputs = [x.requires_grad_(), d["text"].requires_grad_(), d["pooled"].requires_grad_()]
    out = base.predict(x, d["timestep"], Cond(inputs[1], None, inputs[2]))
    want = d["out"].unflatten(0, (4, 4))
    assert out.dtype == torch.float32 and close(out, want, 5e-6)
    for wrong in (1.05 * out, out.roll(1, 0), out.roll(1, 1)):
        assert not close(wrong, want, 1e-2)
    if name == "sd3_mv":
        gradients = torch.autograd.grad((out * d["w"].unflatten(0, (4, 4))).sum(), inputs)
        wanted = d["grad_x"][:, :16].unflatten(0, (4, 4)), d["grad_text"], d["grad_pooled"]
        assert all(close(got, recorded, 5e-6) for got, recorded in zip(gradients, wanted))
    order = [2, 0, 3, 1]                                        # only the rays tell views apart
    base.plucker = rays[:, order]
    moved = base.predict(x[:, order], d["timestep"], Cond(d["text"], None, d["pooled"]))
    assert close(moved, out[:, order], 5e-6)
    base = splat(network(name)[0], vae()[0], views=1)           # one view is the stock network
    base.plucker = rays.flatten(0, 1)[:, None]
    alone = base.predict(x.flatten(0, 1)[:, None], d["timestep"].repeat_interleave(4),
                         Cond(d["text"].repeat_interleave(4, 0), None, d["pooled"].repeat_interleave(4, 0)))
    assert close(alone[:, 0], d["out_num_views_1"], 5e-6)


def test_other_pictures_and_memory_options():
    """Latents that are not square, against each view's own positions; activations that are computed twice; bf16."""
    net, d = network("sd3_mv")
    base = splat(net, vae()[0])
    stock = copy.deepcopy(network("sd3_mv")[0].pos_embed)
    tall = torch.randn(1, 22, 4 * 6, 10, generator=seeded(0))
    got = base.net.pos_embed(tall)
    want = torch.cat([stock(view) for view in tall.split(6, 2)], 1)
    assert close(got, want, 1e-6) and not close(stock(tall[:, :, :12]), want[:, :got.shape[1] // 2], 0.1)
    cond = Cond(d["text"][:1], None, d["pooled"][:1])
    x = torch.randn(1, *base.latent_shape, generator=seeded(0)).requires_grad_()
    gradients = []
    for checkpoint in (False, True):
        if checkpoint:
            base.net.enable_gradient_checkpointing()
        assert any(getattr(module, "gradient_checkpointing", False) for module in base.net.modules()) == checkpoint
        out = base.predict(x, torch.tensor([743.2]), cond)
        gradients.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert close(gradients[0], gradients[1], 1e-5) and gradients[0].abs().max() > 0
    base.net = base.net.to(torch.bfloat16)
    half = base.predict(x, torch.tensor([743.2]), cond)
    assert half.dtype == torch.float32 and close(half, out, 0.05) and not torch.equal(half, out)


def test_decoding_is_the_recorded_one():
    """z / 1.5305 + 0.0609, the decoder without the convolution that others have before it, clamped: measured 2.4e-6."""
    autoencoder, d = vae()
    assert autoencoder.post_quant_conv is None and autoencoder.quant_conv is None
    base = splat(network("sd3_mv")[0], autoencoder)
    z = d["z_diff"][None].requires_grad_()
    grids = []
    real = r2d3.splat_grid_to_gaussians
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(r2d3, "splat_grid_to_gaussians", lambda grid, *more: grids.append(grid) or real(grid, *more))
        base.decode(z)
    assert close(grids[0][0], d["grid"], 1e-5) and grids[0].abs().max() == 1
    gradient, = torch.autograd.grad((grids[0][0] * d["w"]).sum(), z)
    assert close(gradient[0], d["grad_z_diff"], 1e-5)
    shifted = base.vae.decode(d["z_diff"] / 1.5305 - 0.0609)[0].clamp(-1, 1)
    assert not close(shifted, d["grid"], 1e-2)


def test_a_trajectory_is_the_recorded_one(monkeypatch):
    """8 guided Euler steps of the published pipeline through predict, rollout and the schedule: measured 4e-6."""
    net, d = network("sd3_trajectory")
    base = splat(net, vae()[0])
    base.plucker = d["plucker_small"]
    noises = iter([d["latents"][0][None], *torch.randn(8, 1, 4, 16, 8, 8)])     # the latter count for nothing
    monkeypatch.setattr(r2d3, "noise_like", lambda x, generators: next(noises))
    cond = Cond(d["prompt_embeds"], None, d["pooled"])
    null = Cond(d["negative_prompt_embeds"], None, d["negative_pooled"])
    schedule = base.schedule("euler", 8)
    base.encode = lambda prompts: cond
    got = Job(base, None, schedule, null, Config(guidance=5.0)).rollout(["the recorded one"], [None])
    for step in range(8):
        assert close(got.x[0, step + 1], d["latents"][step + 1], 1e-5), step
        uncond, text = d["model_outputs"][step].split(4)
        assert close(got.eps_text[0, step], text, 1e-5) and close(got.eps[0, step], uncond + 5 * (text - uncond), 1e-5)
    assert close(schedule.sigma.float(), d["sigmas"], 1e-7)
    assert not close(got.x[0, -1].roll(1, 0), d["latents"][-1], 1e-2)


# ---- its text ----------------------------------------------------------------------------------------------


CLIPS = {"l": "", "g": "_2", "t5": "_3"}


def write_text(folder, tokenizers=True):
    """The recorded encoders in the published layout, with a stand-in for each tokenizer (a few words, ids below 64)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
    )
    d, config = data("sd3_text")
    words = {word: n + 3 for n, word in enumerate("a red blue lamp with two arms cube".split())}
    for key, suffix in CLIPS.items():
        own = config["t5" if key == "t5" else f"clip_{key}"]
        model = T5EncoderModel(T5Config(**own)) if key == "t5" else CLIPTextModelWithProjection(CLIPTextConfig(**own))
        recorded = weights(d, "t5." if key == "t5" else f"clip_{key}.")
        loaded = model.load_state_dict(recorded, strict=False)
        assert not [name for name in loaded.missing_keys if "embed_tokens" not in name] and not loaded.unexpected_keys
        model.save_pretrained(folder / f"text_encoder{suffix}")
        end, pad = (1, 0) if key == "t5" else (63, 63 if key == "l" else 0)
        ids = {"<end>": end, "<unk>": 2, **words}
        ids |= {"<pad>": pad} if pad != end else {}
        tokenizer = Tokenizer(models.WordLevel(ids, "<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", end)])
        special = {"pad_token": "<end>" if pad == end else "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        fast.save_pretrained(folder / f"tokenizer{suffix}")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def test_text_is_the_recorded_one(texts, monkeypatch):
    """Three encoders and how they are put together, given the recorded token numbers: measured 5e-5 (T5), 5e-7."""
    d, config = data("sd3_text")
    prompts = config["prompts"] if "" in config["prompts"] else [*config["prompts"], ""]
    encoder = sd35.SD3TextEncoder(NAME, texts, "cpu")
    for part, key in zip(encoder.parts, CLIPS):
        ids = dict(zip(prompts, d[f"ids_{key}"]))
        assert part.length == len(ids[""])
        tokens = lambda asked, ids=ids: (torch.stack([ids[prompt] for prompt in asked]), None)      # noqa: E731
        monkeypatch.setattr(part, "tokenizer", lambda tokens=tokens: tokens)
    embeds, mask, pooled = encoder(prompts)
    assert mask is None and close(embeds, d["prompt_embeds"], 1e-4) and close(pooled, d["pooled"], 1e-5)
    assert close(embeds[:, :77], d["prompt_embeds"][:, :77], 1e-5) and (embeds[:, :77, 40:] == 0).all()
    assert not close(embeds.roll(1, 0), d["prompt_embeds"], 1e-2)


def test_prompts_are_encoded_once_by_each_encoder(texts, monkeypatch):
    """One encoder in memory at a time; afterwards from disk. What the tokenizers add counts as text."""
    import transformers
    loaded = []
    for cls in (transformers.CLIPTextModelWithProjection, transformers.T5EncoderModel):
        def from_pretrained(*args, real=cls.from_pretrained, **more):
            gc.collect()
            assert not any(model() for model in loaded)         # the one before is gone
            found = real(*args, **more)
            loaded.append(weakref.ref(found[0]))
            return found
        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)
    encoder = sd35.SD3TextEncoder(NAME, texts, "cpu")
    prompts = ["a red lamp", "a Blue cube ", "", "a red lamp"]
    embeds, mask, pooled = encoder(prompts)
    assert len(loaded) == 3 and embeds.shape == (4, 333, 48) and pooled.shape == (4, 40) and mask is None
    assert torch.equal(embeds[0], embeds[3]) and not close(embeds[1], embeds[0], 1e-2)
    assert not close(pooled[1], pooled[0], 1e-2)
    monkeypatch.undo()
    t5 = transformers.T5EncoderModel.from_pretrained(texts / "text_encoder_3").eval()
    ids = torch.tensor([[3, 4, 6, 1] + [0] * 252])
    with torch.no_grad():
        assert close(embeds[:1, 77:], t5(ids)[0], 1e-5)         # 256 tokens, none masked
        assert not close(embeds[:1, 77:], t5(ids, attention_mask=(ids > 0).long())[0], 1e-2)
    clip = transformers.CLIPTextModelWithProjection.from_pretrained(texts / "text_encoder_2").eval()
    ids = torch.tensor([[3, 4, 6, 63] + [0] * 73])              # CLIP-G is padded with 0, CLIP-L with its end token
    with torch.no_grad():
        out = clip(ids, output_hidden_states=True)
    assert close(embeds[:1, :77, 16:40], out.hidden_states[-2], 1e-5) and close(pooled[:1, 16:], out.text_embeds, 1e-5)
    again, _, _ = sd35.SD3TextEncoder(NAME, texts, "cpu")(prompts)
    assert torch.equal(again, embeds)


def test_a_gated_repository_says_what_to_do(monkeypatch, tmp_path):
    """Its text encoders are stabilityai's, which ask for an agreement: one sentence, whoever notices it."""
    import transformers

    def refuse(*args, **more):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(UserError, match="stabilityai/stable-diffusion-3.5-medium.*agree.*hf auth login") as error:
        sd35.SD3TextEncoder(NAME, None, "cpu")(["a red lamp"])
    assert "\n" not in str(error.value)


# ---- its files ---------------------------------------------------------------------------------------------


def test_the_published_network_fits():
    """Key by key and shape by shape, strictly; 2.24 B parameters, made without memory."""
    about = published.PUBLISHED[NAME]
    with torch.device("meta"):
        wanted = {name: torch.empty(shape) for name, shape in REAL["shapes"].items()}
        net = published.build(about["net_config"])
        autoencoder = published.build(about["vae_config"] | {"_class_name": "AutoencoderKL"})
    assert {name: list(value.shape) for name, value in net.state_dict().items()} == REAL["shapes"]
    assert sum(weight.numel() for weight in net.parameters()) == REAL["parameters"] == 2_243_208_384
    theirs = {"_class_name": "SD3TransformerMV2DModel", "in_channels": 16}
    read = published.read_network(about["net_config"] | theirs, wanted, "here")
    assert read.config.in_channels == 22
    for change in ({"pos_embed.pos_embed": None}, {"transformer_blocks.0.attn2.to_q.weight": None},
                   {"proj_out.bias": torch.empty(63, device="meta")}):
        name, = change
        damaged = {key: change.get(key, value) for key, value in wanted.items() if change.get(key, value) is not None}
        with pytest.raises(UserError, match=f"do not fit SD3Transformer.*{name}"):
            published.read_network(about["net_config"], damaged, "here")
    shapes = {name: list(value.shape) for name, value in autoencoder.state_dict().items()}
    assert len(shapes) == REAL["vae_tensors"] and REAL["vae_shapes"].items() <= shapes.items()
    assert sum(weight.numel() for weight in autoencoder.parameters()) == REAL["vae_parameters"] == 83_840_428
    assert autoencoder.config.shift_factor == 0.0609 and autoencoder.config.scaling_factor == 1.5305


# ---- training ----------------------------------------------------------------------------------------------


def test_match_weights_of_a_flow():
    """Every matching has the same zero, v* = v_ref - (beta w / k_v) g; "eps" and "v" compare what they say."""
    schedule, table = recorded("euler20")
    i = torch.arange(19)                                        # the last step has no score and is not trained
    for time_weight, power in (("squared", 2), ("none", 0)):
        target = 3.0 * schedule.alpha[i + 1] ** power / table["k_v"][:19]
        k, std, one = table["k_v"][:19], table["std"][:19], torch.ones(19).double()
        for matching, want in (("v", one), ("eps", 1 - table["sigma_t"][:19]), ("score", k), ("kl", k * std)):
            c, weight = r2d3.match_weights(schedule, i, beta=3.0, matching=matching, time_weight=time_weight)
            assert c.isfinite().all() and weight.isfinite().all()
            assert close(c, want, 1e-12) and (weight - want * target).abs().max() < 1e-12 * want.max()
    everywhere = r2d3.match_weights(schedule, torch.arange(20), beta=3.0, matching="v", time_weight="squared")[1]
    assert everywhere.isfinite().all() and everywhere[-1] == 0
    vp = NoiseSchedule.from_diffusers("dpm", 20)                # and a VP base seen as a flow is weighed as it was
    total = vp.alpha + vp.sigma
    same = NoiseSchedule(vp.timesteps, vp.alpha / total, vp.sigma / total, prediction="v")
    i = torch.arange(20)
    assert close(vp.k(i) * total[1:], same.k(i) / same.alpha[i], 1e-10)     # scores are those of x / total
    for matching in ("eps", "v"):
        c, mine = (r2d3.match_weights(one, i, beta=1.0, matching=matching, time_weight="none")[0] for one in (vp, same))
        assert close(c * (1 if matching == "eps" else vp.alpha[i]), mine / same.alpha[i] ** (matching == "eps"), 1e-12)


def test_which_steps_are_trained():
    """Never the one without noise; the baselines that need no density may."""
    for method in ("nabla", "ddpo"):
        config = r2d3.resolve(Config(base=NAME, method=method, recipe="paper", device="cpu", fraction=0.9))
        picked = [step for n in range(40) for step in r2d3.pick_steps(config, seeded(n))]
        assert set(picked) == set(range(27)) and len(picked) == 25 * 40
    for method, want in (("draft", {27}), ("refl", set(range(21, 28)))):
        config = r2d3.resolve(Config(base=NAME, method=method, device="cpu"))
        assert {step for n in range(99) for step in r2d3.pick_steps(config, seeded(n))} == want


def test_settings_by_default():
    config = r2d3.resolve(Config(base=NAME, device="cpu"))
    assert (config.matching, config.sampler, config.steps, config.recipe) == ("v", "dpm", 28, "paper")
    assert config.estimator == "step" and config.branch == "guided" and config.reg_weight == 1.0
    config = r2d3.resolve(Config(base=NAME, matching="score", sampler="euler", device="cpu"))
    assert config.matching == "score" and config.sampler == "euler"


@pytest.fixture
def small(monkeypatch):
    """The published base at the recorded sizes."""
    _, net = data("sd3_mv")
    _, autoencoder = data("sd3_vae")
    autoencoder |= {"in_channels": 12, "out_channels": 12, "sample_size": 16}
    monkeypatch.setitem(published.PUBLISHED, NAME, published.PUBLISHED[NAME] | {
        "net_config": net | {"_class_name": "SD3Transformer2DModel"}, "vae_config": autoencoder, "text_dim": 40,
        "pooled_dim": 24})


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["r2d3.py", *map(str, arguments)])
        return r2d3.main()


def write_base(folder):
    """The published layout: the recorded network, VAE and text encoders, whose widths fit."""
    net, _ = network("sd3_mv")
    torch.manual_seed(0)
    config = dict(net.config) | {"joint_attention_dim": 48, "pooled_projection_dim": 40}
    net = published.build(config | {"_class_name": "SD3Transformer2DModel"})
    part = folder / "gsdiff_gobj83k_sd35m__render/checkpoints/013020/transformer_ema"
    net.save_pretrained(part)
    config = json.loads((part / "config.json").read_text(encoding="utf-8"))
    (part / "config.json").write_text(json.dumps(config | {"_class_name": "SD3TransformerMV2DModel", "in_channels": 16,
                                                           "view_concat_condition": False}), encoding="utf-8")
    autoencoder, _ = vae()
    file = folder / "gsvae_gobj265k_sd3/checkpoints/039030/model.safetensors"
    file.parent.mkdir(parents=True)
    save_file({f"vae.{name}": value.contiguous() for name, value in autoencoder.state_dict().items()}, file)
    (folder / "vae").mkdir()
    about = {name: value for name, value in autoencoder.config.items() if not name.startswith("_")}
    (folder / "vae/config.json").write_text(json.dumps(about | {"sample_size": 16}), encoding="utf-8")
    return write_text(folder)


@pytest.fixture
def small_clip(monkeypatch):
    """What evaluations measure with, tiny and untrained."""
    import open_clip

    def clip(*unused, dim=768, **more):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            vision = {"image_size": 28, "layers": 1, "width": 32, "head_width": 16, "patch_size": 14}
            text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
            return open_clip.model.CLIP(dim, vision, text).eval()

    shrink_pictures(monkeypatch)
    monkeypatch.setattr(scorers, "load_clip", clip)
    monkeypatch.setattr(open_clip, "create_model", clip)


def test_the_whole_job(small_clip, tmp_path, capsys):
    """From a folder in the published layout: training, resume, evaluation, samples by the published sampler."""
    folder, out = write_base(tmp_path / "weights"), tmp_path / "run"
    (tmp_path / "train.txt").write_text("a red lamp\na blue cube\na lamp with two arms")
    (tmp_path / "test.txt").write_text("a red cube")
    common = ["--base", NAME, "--weights", folder, "--reward", "colorfulness", "--out", out,
              "--prompts", tmp_path / "train.txt", "--test-prompts", tmp_path / "test.txt",
              "--batch-size", 2, "--steps", 4, "--view-size", 16, "--views", 2,
              "--samples-per-prompt", 1, "--fraction", 0.6, "--device", "cpu"]
    assert run(*common, "--epochs", 1) == 0, capsys.readouterr().err
    assert run(*common, "--epochs", 2, "--resume") == 0, capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())["config"]
    assert (config["guidance"], config["matching"], config["sampler"], config["lora_rank"]) == (5.0, "v", "dpm", 16)
    state = torch.load(out / "checkpoint/state.pt", weights_only=True)
    trained = {name.split(".lora_B")[0] for name, value in state["lora"].items()
               if "lora_B" in name and value.abs().max() > 0}
    layers = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out proj_out".split()
    assert {layer for layer in layers if any(name.endswith(f".{layer}") for name in trained)} == set(layers)
    assert all(name.endswith(tuple(f".{layer}" for layer in layers)) for name in trained)
    assert all(torch.isfinite(value).all() for value in state["lora"].values())
    assert run("evaluate", "--run", out, "--samples-per-prompt", 1) == 0, capsys.readouterr().err
    for sampler in ("dpm", "euler"):
        assert run("sample", "--run", out, "--prompts", "a red lamp", "--sampler", sampler, "--samples-per-prompt", 1,
                   "--out", tmp_path / sampler) == 0
    one, other = (tmp_path / sampler / "a-red-lamp-seed0-0.ply" for sampler in ("dpm", "euler"))
    assert one.read_bytes() != other.read_bytes()
    for wrong in (["--sampler", "euler"], ["--last-step", "always"], ["--method", "ddpo", "--last-step", "stratified"]):
        assert run(*common, *wrong, "--out", tmp_path / "no") == 2
        assert "a step that draws no noise cannot be trained" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_damaged_folders(tmp_path, capsys):
    """What is wrong with a folder is one sentence; a network that starts from a picture is not taken for this one."""
    folder = write_base(tmp_path / "weights")
    file = next(folder.glob("gsdiff*/checkpoints/*/transformer_ema/*.safetensors"))
    whole = load_file(file)

    def error(tensors):
        save_file({name: value.contiguous() for name, value in tensors.items()}, file)
        with pytest.raises(UserError) as found:
            r2d3.load_base(r2d3.resolve(Config(base=NAME, weights=str(folder), device="cpu")), "cpu")
        assert "\n" not in str(found.value)
        return str(found.value)

    key = "transformer_blocks.0.attn.add_q_proj.weight"
    for name, change in (("pos_embed.pos_embed", None), (key, None), (key, whole[key][:-1])):
        kept = {other: value for other, value in whole.items() if other != name}
        kept |= {} if change is None else {name: change}
        assert "do not fit SD3Transformer" in error(kept) and name in error(kept)
    mask = torch.zeros_like(whole["pos_embed.proj.weight"][:, :1])
    image = {"pos_embed.proj.weight": torch.cat([whole["pos_embed.proj.weight"], mask], 1)}
    assert "takes 23 channels; diffsplat-sd35 takes 16 of the latent and 6 of Pluecker rays" in error(whole | image)
    save_file(whole, file)
    config = r2d3.resolve(Config(base=NAME, weights=str(folder), device="cpu"))
    assert r2d3.load_base(config, "cpu").guidance == 5.0
    place = folder / "gsdiff_gobj83k_sd35m__render"
    place.rename(folder / "gsdiff_gobj83k_sd35m_image__render")
    assert run("--base", NAME, "--weights", folder, "--out", tmp_path / "out", "--device", "cpu") == 2
    assert "there is no gsdiff_gobj83k_sd35m__render/checkpoints" in capsys.readouterr().err


def test_only_what_is_needed_is_downloaded(monkeypatch, tmp_path, capsys):
    """One network and one VAE of a repository that has many; without a network, one sentence with the size."""
    from fnmatch import fnmatch

    import huggingface_hub
    asked = []

    def offline(repo, allow_patterns):
        asked.append((repo, allow_patterns))
        raise huggingface_hub.errors.LocalEntryNotFoundError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert run("--base", NAME, "--out", tmp_path / "out", "--device", "cpu") == 2
    assert "diffsplat-sd35" in (error := capsys.readouterr().err) and "22 GB" in error
    (repo, patterns), = asked
    names = ["gsvae_gobj265k_sd", "gsvae_gobj265k_sdxl_fp16", "gsvae_gobj265k_sd3", "gsdiff_gobj83k_sd15__render",
             "gsdiff_gobj83k_sd35m__render", "gsdiff_gobj83k_sd35m_image__render", "gsrecon_gobj265k_cnp_even4"]
    files = [f"{name}/checkpoints/013020/{part}" for name in names
             for part in ("model.safetensors", "transformer_ema/config.json")]
    taken = {file.split("/")[0] for file in files if any(fnmatch(file, pattern) for pattern in patterns)}
    assert repo == "chenguolin/DiffSplat" and taken == {"gsvae_gobj265k_sd3", "gsdiff_gobj83k_sd35m__render"}


def test_cost(small, monkeypatch, capsys):
    """With random weights: at the recorded size for real, at the published one counted without memory, and says so."""
    arguments = ["cost", "--base", NAME, "--weights", "random", "--reward", "dnc", "--steps", "4", "--view-size", "16",
                 "--fraction", "0.6", "--device", "cpu"]
    assert run(*arguments) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    tiny = json.loads(printed[printed.index("{"):])
    assert tiny["device"] == "CPU" and tiny["seconds"]["all"] > 0 and tiny["judged"] == 1
    monkeypatch.undo()
    assert run(*arguments, "--lora-rank", 8) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    real = json.loads(printed[printed.index("{"):])
    assert "counted only" in real["device"] and "seconds" not in real
    modules, attention = REAL["lora_rank_8"]["attention_only"]
    output_layer = 8 * (1536 + 64)
    assert real["parameters"] == {"net": 2_243_208_384, "vae": 83_840_428, "LoRA, trained": attention + output_layer}
    assert modules == 243


def test_random_weights_are_the_same_everywhere(small):
    first, second = (r2d3.load_base(r2d3.resolve(Config(base=NAME, weights="random", device="cpu")), "cpu")
                     for _ in range(2))
    assert all(torch.equal(value, second.net.state_dict()[name]) for name, value in first.net.state_dict().items())
    one, two = (base.encode(["a lamp", "a chair"]) for base in (first, second))
    assert one.mask is None and one.embeds.shape == (2, 333, 40) and one.pooled.shape == (2, 24)
    assert torch.equal(one.embeds, two.embeds) and torch.equal(one.pooled, two.pooled) and not torch.equal(*one.pooled)
    picked = one[torch.tensor([1, 0])]
    assert torch.equal(picked.pooled, one.pooled.flip(0)) and picked.mask is None
    both = first.predict(torch.zeros(2, *first.latent_shape), torch.tensor([500.0, 500.0]), one)
    assert both.shape == (2, 4, 16, 8, 8) and not close(both[1], both[0], 1e-3)
