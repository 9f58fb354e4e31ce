"""The mathematics, E1 to E8 of r2d3.py: in float64, on small bases whose every derivative is known.

The tolerances are those of float64 rounding, a few times what was measured, except against diffusers'
schedulers and the recorded predictions (float32), and where samples are drawn: standard errors there.
Every test that compares refuses a factor of 1.05 and a flipped sign or a shift with the same helper.
"""
import contextlib
import dataclasses
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import common
import r2d3
from r2d3 import Cond, Gaussians, NoiseSchedule, Render, Transitions, seeded
from support import metrics, published

ROOT = Path(__file__).resolve().parents[1]

SAMPLERS = [(sampler, steps) for sampler in ("dpm", "ddim") for steps in (1, 2, 5, 20, 50)]
EXACT = 1e-12  # float64; measured: at most 2e-14
CONFIG = r2d3.resolve(r2d3.Config(recipe="paper", guidance=2.5, beta=3.0, reg_weight=0.5, views=4, view_size=20,
                                  device="cpu", backend="torch"))


def changed(**settings):
    return dataclasses.replace(CONFIG, **settings)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def close(got, want, tolerance=EXACT):
    """The shapes are the same, and no element differs by more than a share of the largest one."""
    return got.shape == want.shape and ((got - want).abs().max() <= tolerance * want.abs().max()).item()


# ---- E1 to E3: the noise schedule --------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, steps", SAMPLERS)
def test_x0_from_exact_noise(sampler, steps):
    schedule = NoiseSchedule.from_diffusers(sampler, steps)
    x0, eps = randn(steps + 1, 2, 3), randn(steps + 1, 2, 3, seed=1)
    levels = torch.arange(steps + 1)
    alpha, sigma = schedule.alpha[:, None, None], schedule.sigma[:, None, None]
    x = alpha * x0 + sigma * eps
    assert close(schedule.x0(x, eps, levels), x0)  # a level for each sample
    for i in range(steps + 1):  # and one for all
        assert close(schedule.x0(x[i:i + 1], eps[i:i + 1], i), x0[i:i + 1])
        assert close(schedule.x0(x[i], eps[i], i), x0[i])
        if i:
            assert not close(schedule.x0(x[i], eps[i], i - 1), x0[i], 1e-3)


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_grids(sampler):
    """For any number of steps: that many, less and less noise down to the smallest level, and no std is 0."""
    from diffusers import DDIMScheduler
    product = DDIMScheduler().alphas_cumprod.double()
    for steps in [*range(1, 130), 201, 333, 499, 500]:
        schedule = NoiseSchedule.from_diffusers(sampler, steps)
        assert len(schedule) == len(schedule.timesteps) == steps
        assert close(schedule.alpha ** 2 + schedule.sigma ** 2, torch.ones(steps + 1).double())
        assert (schedule.sigma.diff() < 0).all() and (schedule.timesteps.diff() < 0).all()
        told = schedule.t(torch.arange(steps + 1))  # what the network is told belongs to the level
        assert told[-1] == 0 and close(schedule.alpha, product[told].sqrt(), 2e-7)
        c_x, c_0, std = schedule.step(torch.arange(steps))
        for positive in (std, c_x, c_0, schedule.k(torch.arange(steps))):
            assert (positive > 0).all() and positive.isfinite().all()


@pytest.mark.parametrize("sampler, steps", SAMPLERS)
def test_a_step_keeps_the_marginals(sampler, steps):
    """x_t = alpha x0 + sigma eps at one level becomes the same at the next: E2 and E3 by their moments."""
    schedule = NoiseSchedule.from_diffusers(sampler, steps)
    i = torch.arange(steps)
    c_x, c_0, std = schedule.step(i)
    alpha, sigma = schedule.alpha, schedule.sigma
    assert close(c_x * alpha[:-1] + c_0, alpha[1:])
    assert close((c_x * sigma[:-1]) ** 2 + std ** 2, sigma[1:] ** 2)
    h = (alpha[1:] / sigma[1:]).log() - (alpha[:-1] / sigma[:-1]).log()  # and as the README writes them
    assert close(c_x, sigma[1:] / sigma[:-1] * (-h).exp()) and close(c_0, alpha[1:] * (1 - (-2 * h).exp()))
    assert close(std, sigma[1:] * (1 - (-2 * h).exp()).sqrt())
    for n in range(steps):  # one step number instead of many
        assert all(torch.equal(one, many[n]) for one, many in zip(schedule.step(n), (c_x, c_0, std)))
        assert torch.equal(schedule.k(n), schedule.k(i)[n])


@pytest.mark.parametrize("sampler, steps", SAMPLERS)
def test_a_step_is_diffusers_own(sampler, steps):
    """With the same noise: the whole step, and what x, eps and the noise contribute to it, one by one."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
    if sampler == "dpm":
        theirs, options = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1,
                                                      final_sigmas_type="sigma_min"), {}
    else:
        theirs = DDIMScheduler(set_alpha_to_one=False, timestep_spacing="trailing", clip_sample=False)
        options = {"eta": 1.0}
    theirs.set_timesteps(steps)
    schedule = NoiseSchedule.from_diffusers(sampler, steps)
    assert torch.equal(theirs.timesteps, schedule.timesteps)
    for i in {0, 1, steps // 2, steps - 2, steps - 1} & set(range(steps)):
        c_x, c_0, std = schedule.step(i)
        for parts in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
            x, eps, noise = (part * randn(2, 3, 4, seed=3 * i + n) for n, part in enumerate(parts))
            theirs.set_timesteps(steps)  # it counts its steps: start again
            want = theirs.step(eps, theirs.timesteps[i], x, variance_noise=noise, **options)[0].double()
            got = c_x * x + c_0 * schedule.x0(x, eps, i) + std * noise
            assert close(got, want, 1e-5), (i, parts)
            for wrong in (1.05 * got, -got, got.roll(1, -1)):
                assert not close(wrong, want, 1e-2)


@pytest.mark.parametrize("i", [0, 1, 9, 10, 18, 19])
def test_a_step_is_the_recorded_one(i):
    """Nabla-R2D3's own step, with the noise that it drew; and its score of a given x_s."""
    d = load_file(ROOT / "tests/data/scheduler.safetensors")
    schedule = NoiseSchedule.from_diffusers("dpm", 20)
    assert torch.equal(schedule.timesteps, d["dpm.timesteps"])
    assert close(schedule.alpha.float(), d["dpm.alpha_of_sigma"], 5e-7)
    assert close(schedule.sigma.float(), d["dpm.sigma_t_of_sigma"], 5e-7)
    names = ("latents", "eps", "noise", "x0", "mean", "prev_sampled", "prev_given", "score_given")
    tensors = [d[f"dpm.step{i:02d}.{name}"].double() for name in names]
    latents, eps, noise, x0, mean, sampled, given, score = tensors
    c_x, c_0, std = schedule.step(i)
    assert close(std.float(), d["dpm.std_dev_per_step"][i], 1e-6)
    assert close(schedule.x0(latents, eps, i), x0, 1e-6)
    ours = c_x * latents + c_0 * schedule.x0(latents, eps, i)
    assert close(ours, mean, 1e-6) and close(ours + std * noise, sampled, 1e-6)
    assert close(-(given - mean) / std ** 2, score, 2e-6)
    for shifted in (1.05 * mean, -mean, mean.roll(1, -1), mean.roll(1, 0)):
        assert not close(ours, shifted, 1e-2)


# ---- E4 to E6: the loss ------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    """eps = (A + c E) x + b + c v for c letters in the prompt; A, E, b less their start are its "LoRA"."""

    def __init__(self):
        super().__init__()
        self.start = 0.3 * randn(6, 6, seed=101), 0.1 * randn(6, 6, seed=102), randn(6, seed=103)
        self.v, self.adapted = 0.2 * randn(6, seed=104), True
        self.A, self.E, self.b = (torch.nn.Parameter(start + 0.01 * randn(*start.shape, seed=105 + n))
                                  for n, start in enumerate(self.start))

    @contextlib.contextmanager
    def disable_adapter(self):
        self.adapted = False
        yield
        self.adapted = True

    def forward(self, x, letters):
        A, E, b = (self.A, self.E, self.b) if self.adapted else self.start
        return x @ A.T + b + letters * (x @ E.T + self.v)


class Base(r2d3.Base):
    """What the method needs of a base; nothing in it is symmetric, so that a transposed Jacobian is seen."""

    latent_shape, guidance = (2, 3), 2.5

    def __init__(self):
        self.net, self.asked = Net(), []

    def encode(self, prompts):
        letters = torch.tensor([[[float(len(prompt))]] for prompt in prompts], dtype=torch.float64)
        return Cond(letters, torch.ones(len(prompts), 1, dtype=torch.bool))

    def predict(self, x, t, cond):
        assert t.shape == (len(x),) and cond.mask.shape == (len(x), 1)
        self.asked.append(t)
        return self.net(x.flatten(1).double(), cond.embeds[:, 0]).unflatten(1, self.latent_shape)

    def decode(self, x0):  # "Gaussians" that hold the latent
        return Gaussians(x0, *[None] * 4)


PROMPTS = ["a", "ab", "abc", "abcd"]


def make_batch(base, schedule, seed=0):
    T = len(schedule)
    i = torch.tensor([0, T // 2, T - 2, T - 1])
    x_t, x_s, eps_old = (randn(4, *base.latent_shape, seed=seed + n) for n in range(3))
    generators = [seeded("of", n) for n in range(4)]
    return (Transitions(i, x_t, x_s, eps_old, base.encode(PROMPTS), PROMPTS, generators, None, None),
            base.encode([""]))


def make_job(base, reward, schedule, null, config):
    return r2d3.Job(base, reward, schedule, null, config)


def make_judge(base, reward, config):
    return r2d3.Job(base, reward, None, None, config).judge


def nabla_loss(base, schedule, batch, null, g, config):
    """r2d3's, of a base: match and reg (4,)."""
    guidance = config.guidance if config.branch == "guided" else 1.0
    halves = common.halves(base, batch.cond, null, guidance)

    def reference(x, t):
        with base.net.disable_adapter():
            return halves(x, t)

    return r2d3.nabla_loss(halves, reference, schedule, batch.x_t, batch.i, batch.eps_old, g, beta=config.beta,
                           matching=config.matching, time_weight=config.time_weight, guidance=guidance,
                           backend="torch")


def reward_gradient(base, value, schedule, batch, null, guidance=2.5):
    """r2d3's, of a base: g, and the values (4,) that it is the gradient of."""
    seen = []

    def watched(x0):
        seen.append(value(x0))
        return seen[-1]

    g = r2d3.reward_gradient(common.halves(base, batch.cond, null, guidance), watched, schedule, batch.x_s, batch.i + 1,
                             guidance=guidance)
    return g, seen[-1].detach()


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_score_and_k(sampler):
    """The score is autograd of the log-density, and -k its slope in eps; x_s and x_t cancel (E6)."""
    schedule = NoiseSchedule.from_diffusers(sampler, 20)
    for i in range(20):
        x_t, x_s, eps, other = (randn(1, 6, seed=4 * i + n) for n in range(4))
        c_x, c_0, std = schedule.step(i)
        x_s.requires_grad_()

        def score(eps):
            mean = c_x * x_t + c_0 * schedule.x0(x_t, eps, i)
            density = torch.distributions.Normal(mean, std).log_prob(x_s).sum()
            gradient, = torch.autograd.grad(density, x_s)
            assert close(gradient, -(x_s.detach() - mean) / std ** 2)
            return gradient

        assert close(score(eps) - score(other), -schedule.k(i) * (eps - other))
        assert not close(score(eps) - score(other), schedule.k(i) * (eps - other), 1e-2)


@pytest.mark.parametrize("branch", ["guided", "conditional"])
@pytest.mark.parametrize("time_weight, power", [("squared", 2), ("linear", 1), ("none", 0)])
@pytest.mark.parametrize("matching", ["score", "kl", "eps", "v"])
def test_loss_is_the_difference_of_scores(matching, time_weight, power, branch):
    """E4 and E5 spelled out with log-densities, guidance and all; and their gradients in the LoRA weights."""
    base, schedule = Base(), NoiseSchedule.from_diffusers("dpm", 20)
    batch, null = make_batch(base, schedule)
    g, config = randn(4, 2, 3, seed=9), changed(matching=matching, time_weight=time_weight, branch=branch)
    scale = 2.5 if branch == "guided" else 1.0
    match, reg = nabla_loss(base, schedule, batch, null, g, config)
    scaled = (match / match.detach() + 0.5 * reg).sum()  # so that every level counts in the gradient
    gradients = torch.autograd.grad(scaled, base.net.parameters())

    naive_match, naive_reg = [], []
    for m, i in enumerate(batch.i.tolist()):
        x_t, x_s = batch.x_t[m].flatten(), batch.x_s[m].flatten()
        c_x, c_0, std = schedule.step(i)

        def predict(A, E, b):
            without, text = A @ x_t + b, (A + (m + 1) * E) @ x_t + b + (m + 1) * base.net.v
            return without + scale * (text - without)

        def score(eps):
            return -(x_s - c_x * x_t - c_0 * (x_t - schedule.sigma[i] * eps) / schedule.alpha[i]) / std ** 2

        eps, ref = predict(base.net.A, base.net.E, base.net.b), predict(*base.net.start)
        target = 3.0 * schedule.alpha[i + 1] ** power * g[m].flatten()
        residual = score(eps) - score(ref) - target
        if matching == "kl":                # the Kullback-Leibler divergence of two Gaussians of one std
            residual = residual * std
        if matching == "eps":
            residual = residual / schedule.k(i)
        if matching == "v":                 # v = alpha eps - sigma x0 = (eps - sigma x) / alpha
            residual = residual / schedule.k(i) / schedule.alpha[i]
        naive_match.append(residual.square().mean())
        naive_reg.append((eps - batch.eps_old[m].flatten()).square().mean())
    assert all(close(match[m], naive_match[m]) and close(reg[m], naive_reg[m]) for m in range(4))
    scaled = sum(one / one.detach() + 0.5 * other for one, other in zip(naive_match, naive_reg))
    naive = torch.autograd.grad(scaled, base.net.parameters())
    assert all(close(got, want) for got, want in zip(gradients, naive))
    assert not any(close(1.05 * got, want, 1e-2) for got, want in zip(gradients, naive))
    told = schedule.t(batch.i)  # the level t of x_t, in both halves and in the reference
    assert all(torch.equal(t, torch.cat([told] * (len(t) // 4))) for t in base.asked)
    flipped, _ = nabla_loss(base, schedule, batch, null, -g, config)
    stronger, _ = nabla_loss(base, schedule, batch, null, 1.05 * g, config)
    assert not any(close(wrong[m], match[m], 1e-7) for wrong in (flipped, stronger) for m in range(4))


@pytest.mark.parametrize("matching", ["score", "kl", "eps", "v"])
@pytest.mark.parametrize("sampler, steps", [("dpm", 20), ("ddim", 5), ("dpm", 2)])
def test_loss_is_zero_at_its_optimum(matching, sampler, steps):
    """eps_theta = eps_ref - (beta w / k) g, whichever residual is matched; 5% beside it, it is not."""
    base, schedule = Base(), NoiseSchedule.from_diffusers(sampler, steps)
    batch, null = make_batch(base, schedule)
    config = changed(matching=matching, branch="conditional")
    with torch.no_grad():
        ours = base.predict(batch.x_t, schedule.t(batch.i), batch.cond)
        with base.net.disable_adapter():
            reference = base.predict(batch.x_t, schedule.t(batch.i), batch.cond)
    step = config.beta * schedule.alpha[batch.i + 1] ** 2 / schedule.k(batch.i)
    g = (reference - ours) / step[:, None, None]  # so that ours is the optimum
    best = nabla_loss(base, schedule, batch, null, g, config)[0]
    none = nabla_loss(base, schedule, batch, null, 0 * g, config)[0]
    assert (none > 0).all() and (best <= 1e-18 * none).all()
    for wrong in (1.05 * g, 0.95 * g):
        assert close(nabla_loss(base, schedule, batch, null, wrong, config)[0], 0.0025 * none, 1e-11)
    assert close(nabla_loss(base, schedule, batch, null, -g, config)[0], 4 * none)


@pytest.mark.parametrize("matching", ["score", "kl", "eps", "v"])
def test_descent_goes_up_the_reward(matching):
    """From the reference, Newton's step of either loss moves eps by -(beta w / k) g: x0 goes along +g."""
    base, schedule = Base(), NoiseSchedule.from_diffusers("dpm", 20)
    batch, null = make_batch(base, schedule)
    with torch.no_grad():
        for weight, start in zip(base.net.parameters(), base.net.start):
            weight.copy_(start)
    g, config = randn(4, 2, 3, seed=9), changed(matching=matching)
    k, weight = schedule.k(batch.i), 3.0 * schedule.alpha[batch.i + 1] ** 2
    slopes = {"score": k, "kl": k * schedule.step(batch.i)[2], "eps": k / k, "v": 1 / schedule.alpha[batch.i]}
    for m in range(4):
        one = batch.at(torch.arange(4) == m)
        loss = nabla_loss(base, schedule, one, null, g[m:m + 1], config)[0].sum()
        slope, = torch.autograd.grad(loss, base.net.b)  # b is added to eps
        moved = -slope / (2 / 6 * slopes[matching][m] ** 2)
        want = -weight[m] / k[m] * g[m].flatten()
        assert close(moved, want) and not close(-moved, want, 1e-2) and not close(1.05 * moved, want, 1e-2)


def test_conditional_branch_is_guidance_one():
    base, schedule = Base(), NoiseSchedule.from_diffusers("dpm", 20)
    batch, null = make_batch(base, schedule)
    g = randn(4, 2, 3, seed=9)
    conditional = nabla_loss(base, schedule, batch, null, g, changed(branch="conditional"))
    one = nabla_loss(base, schedule, batch, null, g, changed(guidance=1.0))
    guided = nabla_loss(base, schedule, batch, null, g, CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(conditional, one))
    assert not close(guided[0], one[0], 1e-3) and not close(guided[1], one[1], 1e-3)


# ---- E7: the reward gradient -------------------------------------------------------------------------------


@pytest.fixture
def flat(monkeypatch):
    """A renderer whose depth is D x0, in view v times (v + 1): colours would be clamped to [0, 1]."""
    D = randn(8, 6, seed=107)

    def render(gaussians, c2w, fxfycxcy, size, backend=None, dilation=0.0):
        assert c2w.shape[:2] == (len(gaussians.means), 4) and size == 20
        shown = (gaussians.means.flatten(1) @ D.T)[:, None] * torch.arange(1, 5).view(1, 4, 1)  # (B, V, 8)
        shown = shown[..., None, None]
        return Render(torch.zeros_like(shown), shown[:, :, :1], shown, None, None)

    monkeypatch.setattr(r2d3, "render", render)
    return D


def quadratic(render, prompts):
    """(B, V)"""
    return -(render.depth - 0.5).square().sum((2, 3, 4))


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_reward_gradient_in_closed_form(flat, guidance):
    """g = ((I - sigma J) / alpha)^T dr/dx0 with J = d eps / d x_s, all at the level s."""
    base, schedule = Base(), NoiseSchedule.from_diffusers("dpm", 20)
    batch, null = make_batch(base, schedule)
    judge = make_judge(base, quadratic, CONFIG)
    g, score = reward_gradient(base, lambda x0: judge(x0, batch.prompts, batch.generators)[0], schedule, batch, null,
                               guidance)
    assert g.shape == batch.x_s.shape and score.shape == (4,)
    assert not g.requires_grad and not score.requires_grad and not batch.x_s.requires_grad
    assert all(weight.grad is None for weight in base.net.parameters())
    want, other_level, without_J, reward = [], [], [], []
    for m, i in enumerate(batch.i.tolist()):
        for level, out in ((i + 1, want), (i, other_level)):
            alpha, sigma, x = schedule.alpha[level], schedule.sigma[level], batch.x_s[m].flatten()
            letters, net = guidance * (m + 1), base.net  # guidance by s is s times as many
            J = (net.A + letters * net.E).detach()
            x0 = (x - sigma * (J @ x + net.b.detach() + letters * net.v)) / alpha
            picture = torch.arange(1, 5)[:, None] * (flat @ x0)  # (4, 8): view, pixel
            slope = flat.T @ (-2 * torch.arange(1, 5)[:, None] * (picture - 0.5)).mean(0)  # of the mean over views
            out.append((torch.eye(6) - sigma * J).T @ slope / alpha)
            if level == i + 1:
                without_J.append(slope / alpha)
                reward.append(-(picture - 0.5).square().sum(1).mean())
    want, other_level, without_J = (torch.stack(rows).unflatten(1, (2, 3)) for rows in (want, other_level, without_J))
    for m in range(4):  # one by one: their sizes differ by orders of magnitude
        assert close(g[m], want[m]) and close(score[m], reward[m])
        for wrong in (1.05 * g[m], -g[m], g[m].roll(1, -1), other_level[m], without_J[m]):
            assert not close(wrong, want[m], 1e-4)
    assert all(torch.equal(t, torch.cat([schedule.t(batch.i + 1)] * (len(t) // 4))) for t in base.asked)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_samples_gradient_is_pulled_back(guidance):
    """E8: g = ((I - sigma J) / alpha)^T u with J = d eps / d x_s, all at the level s; no picture is made."""
    base, schedule = Base(), NoiseSchedule.from_diffusers("dpm", 20)
    batch, null = make_batch(base, schedule)
    u = randn(4, 2, 3, seed=12)
    g, score = reward_gradient(base, lambda x0: (x0 * u).sum((1, 2)), schedule, batch, null, guidance)
    assert not g.requires_grad and not score.requires_grad
    for m, i in enumerate(batch.i.tolist()):
        alpha, sigma, x = schedule.alpha[i + 1], schedule.sigma[i + 1], batch.x_s[m].flatten()
        letters, net = guidance * (m + 1), base.net
        J = (net.A + letters * net.E).detach()
        x0 = (x - sigma * (J @ x + net.b.detach() + letters * net.v)) / alpha
        want = (((torch.eye(6) - sigma * J) / alpha).T @ u[m].flatten()).view(2, 3)
        assert close(g[m], want) and close(score[m], (x0 * u[m].flatten()).sum())
        for wrong in (1.05 * want, -want, want.roll(1, -1), u[m] / alpha, u[m]):
            assert not close(g[m], wrong, 1e-4)


def test_both_reward_gradients_agree_at_the_end(flat):
    """At the smallest noise level the estimate is the sample: E7 and E8 ask the same, E8 in micro-batches."""
    base, schedule = Base(), NoiseSchedule.from_diffusers("dpm", 20)
    batch, null = make_batch(base, schedule)
    batch = batch._replace(i=torch.full((4,), 19))
    job = make_job(base, quadratic, schedule, null, changed(micro_batch=3))
    x0 = schedule.x0(batch.x_s, common.predict_guided(base, batch.x_s, schedule.t(batch.i + 1), batch.cond, null, 2.5),
                     batch.i + 1).detach()
    score, covered, u = r2d3.judge_samples(job, x0, batch.prompts, batch.generators, gradient=True)
    g, direct = reward_gradient(base, lambda x0: job.judge(x0, batch.prompts, batch.generators)[0], schedule, batch, null)
    pulled, _ = reward_gradient(base, lambda x0: (x0 * u).sum((1, 2)), schedule, batch, null)
    assert close(pulled, g) and close(score, direct) and not close(g, u, 1e-3)
    alpha = (x0.flatten(1) @ flat.T)[:, :1] * torch.arange(1, 5)    # the renderer's, per view
    assert close(covered, alpha.mean(1))
    alone = r2d3.judge_samples(job, x0, batch.prompts, batch.generators, gradient=False)
    assert torch.equal(alone[0], score) and (alone[2] == 0).all() and not x0.requires_grad


@pytest.mark.parametrize("branch", ["guided", "conditional"])
@pytest.mark.parametrize("estimator", ["step", "sample", "identity"])
def test_a_step_of_training_is_made_of_these(flat, estimator, branch):
    """nabla_step: the gradient of the chosen estimator, at the levels that are not skipped, in the loss."""
    base, schedule = Base(), NoiseSchedule.from_diffusers("dpm", 20)
    batch, null = make_batch(base, schedule)
    u = randn(4, 2, 3, seed=12)
    for skip_below in (0.0, 0.25):
        config = changed(estimator=estimator, branch=branch, matching="eps", skip_below=skip_below)
        job = make_job(base, quadratic, schedule, null, config)
        values, judged = r2d3.nabla_step(job, batch._replace(u=None if estimator == "step" else u))
        g = {"identity": lambda: (u, torch.zeros(4)),
             "sample": lambda: reward_gradient(base, lambda x0: (x0 * u).sum((1, 2)), schedule, batch, null),
             "step": lambda: reward_gradient(base, lambda x0: job.judge(x0, batch.prompts, batch.generators)[0],
                                             schedule, batch, null)}[estimator]()[0]
        target = schedule.alpha[1:] ** 2 / schedule.k(torch.arange(20))
        asked = (target >= skip_below * target.max())[batch.i]
        assert asked.tolist() == ([True] * 4 if skip_below == 0 else [False, True, True, False])
        g = torch.where(asked[:, None, None], g, 0.0)
        match, reg = nabla_loss(base, schedule, batch, null, g, config)
        assert close(values["match"], match) and close(values["reg"], reg) and close(values["loss"], match + 0.5 * reg)
        assert close(values["reward_gradient"], g.square().mean((1, 2)).sqrt())
        assert judged == (int(asked.sum()) if estimator == "step" else 0)
        assert all(weight.requires_grad for weight in base.net.parameters())
        gradients = [torch.autograd.grad((one / one.detach()).sum(), base.net.parameters())
                     for one in (values["loss"], match + 0.5 * reg)]
        assert all(close(ours, want) for ours, want in zip(*gradients))


class SplatBase(Base):
    """Decodes to real Gaussians, five of them, through a network with a curvature."""

    latent_shape = (5, 14)

    def __init__(self):
        super().__init__()
        self.net, self.M = torch.nn.Module(), 0.2 * randn(14, 14, seed=108)

    def predict(self, x, t, cond):
        return torch.tanh(x @ self.M.T + 0.1 * cond.embeds) + t.view(-1, 1, 1) / 1000

    def decode(self, x0):
        means, scales, quats, opacities, colors = torch.tanh(x0).split([3, 3, 4, 1, 3], -1)
        return Gaussians(0.4 * means, 0.08 + 0.04 * scales, F.normalize(quats + 0.1, dim=-1),
                         0.5 + 0.4 * opacities[..., 0], 0.5 + 0.5 * colors)


def pattern(render, prompts):
    """A reward of picture and alpha that tells every pixel, channel and view from the others."""
    weights = randn(*render.image.shape[1:], seed=109)
    return (render.image * weights).mean((2, 3, 4)) + (render.alpha * weights[:, :1]).square().mean((2, 3, 4))


def test_reward_gradient_through_the_pictures():
    """The whole of E7, pictures from random cameras and their noise, against differences of the reward."""
    base, schedule = SplatBase(), NoiseSchedule.from_diffusers("ddim", 10)
    i = torch.tensor([4, 7, 9])
    x_s = randn(3, 5, 14, seed=3)
    null, cond, judge = base.encode([""]), base.encode(PROMPTS[:3]), make_judge(base, pattern, CONFIG)

    def reward(x_s):
        batch = Transitions(i, x_s, x_s, x_s, cond, PROMPTS[:3], [seeded(7, n) for n in range(3)], None, None)
        return reward_gradient(base, lambda x0: judge(x0, batch.prompts, batch.generators)[0], schedule, batch, null)

    g, score = reward(x_s)
    assert (g.flatten(1).norm(dim=1) > 1e-4).all() and not close(score, score[:1].expand(3), 1e-2)
    for seed in range(3):
        direction = 1e-6 * F.normalize(randn(3, 70, seed=20 + seed), dim=1).view(3, 5, 14)
        slope = reward(x_s + direction)[1] - reward(x_s - direction)[1]
        assert close(2 * (g * direction).sum((1, 2)), slope, 1e-6), seed
        assert not close(2.1 * (g * direction).sum((1, 2)), slope, 1e-2)


def test_a_batch_is_its_parts():
    """Reward gradient and loss of a batch are its samples' own: each has its cameras and its picture's noise."""
    schedule = NoiseSchedule.from_diffusers("dpm", 20)
    splats, linear = SplatBase(), Base()
    for base in (splats, linear):
        batch, null = make_batch(base, schedule)
        judge, g = make_judge(base, r2d3.scorers.colorfulness, CONFIG), randn(4, 2, 3, seed=9)

        def compute(first, last):
            rows = range(first, last)
            part = batch.at(torch.tensor([m in rows for m in range(4)]))
            if base is linear:
                return nabla_loss(base, schedule, part, null, g[first:last], CONFIG)
            fresh = [seeded("of", m) for m in rows]
            return reward_gradient(base, lambda x0: judge(x0, part.prompts, fresh)[0], schedule, part, null)

        whole, single, pair = compute(0, 4), [compute(m, m + 1) for m in range(4)], compute(1, 3)
        for n in range(2):
            assert all(close(whole[n][m:m + 1], single[m][n]) for m in range(4))
            assert all(close(pair[n][m:m + 1], single[1 + m][n]) for m in range(2))
            assert not any(close(whole[n][m], whole[n][m - 1], 1e-3) for m in range(4))


def test_transitions_at_a_mask():
    base, schedule = Base(), NoiseSchedule.from_diffusers("dpm", 20)
    batch, _ = make_batch(base, schedule)
    batch = batch._replace(u=randn(4, 2, 3, seed=5), advantage=randn(4))
    part = batch.at(torch.tensor([True, False, True, False]))
    assert part.prompts == ["a", "abc"] and part.generators == batch.generators[::2]
    assert torch.equal(part.cond.embeds, batch.cond.embeds[::2]) and torch.equal(part.cond.mask, batch.cond.mask[::2])
    for name in ("i", "x_t", "x_s", "eps_old", "u", "advantage"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[::2]), name
    assert batch._replace(u=None).at(torch.zeros(4, dtype=torch.bool)).u is None


def test_pictures_of_the_reward():
    """Random cameras, noise of 2e-3 on the picture and on nothing else, clamped, the mean over views."""
    base, seen = SplatBase(), {}

    def reward(render, prompts):
        seen["pictures"], seen["prompts"] = render, prompts
        return render.image.mean((2, 3, 4)) * torch.tensor([1.0, 2.0, 3.0, 4.0])

    x0, generators = randn(2, 5, 14), lambda: [seeded(5), seeded(6)]
    score, pictures = make_judge(base, reward, CONFIG)(x0, ["a", "b"], generators())
    used = generators()
    c2w, fxfycxcy = r2d3.sample_cameras(4, 20.0, 60.0, used)
    clean = r2d3.render(base.decode(x0), c2w, fxfycxcy, 20)
    noise = torch.stack([torch.randn(4, 3, 20, 20, generator=generator) for generator in used]).double()
    want = (clean.image + 2e-3 * noise).clamp(0, 1)
    got = seen["pictures"].image
    assert seen["prompts"] == ["a", "b"] and close(got, want) and got.max() == 1       # the background is white
    inside = (want > 0) & (want < 1)
    assert (got - clean.image)[inside].std().item() > 1e-3 and not close(clean.image, want, 1e-4)
    assert all(torch.equal(a, b) for a, b in zip(pictures[1:], clean[1:]))
    assert close(score, (got.mean((2, 3, 4)) * torch.arange(1, 5)).mean(1))


def test_pictures_are_taken_where_the_base_says():
    """Cameras of the reward go around the base's own elevation, at its own distance."""
    base, seen = SplatBase(), []
    base.elevation, base.radius = 0.0, 2.5
    x0 = randn(1, 5, 14)
    score, pictures = make_judge(base, pattern, changed(elevation_jitter=0.0, azimuth_jitter=0.0))(x0, ["a"], [seeded(0)])
    c2w = r2d3.orbit(0.0, torch.tensor([0.0, 90, 180, 270]), 2.5)[None]
    want = r2d3.render(base.decode(x0), c2w, r2d3.intrinsics(1, 4), 20)
    assert close(pictures.alpha, want.alpha) and not close(
        pictures.alpha, r2d3.render(base.decode(x0), *r2d3.input_cameras(1), 20).alpha, 1e-3)


# ---- rollout -----------------------------------------------------------------------------------------------


def test_guidance():
    without, text = randn(3, 4), randn(3, 4, seed=1)
    assert r2d3.guide(None, text, 1.0) is text
    assert torch.equal(r2d3.guide(without, text, 0.0), without)
    assert close(r2d3.guide(without, text, 1.0), text)
    assert close(r2d3.guide(without, text, 3.0), 3 * text - 2 * without)
    base = Base()
    cond, null, x, t = base.encode(PROMPTS), base.encode([""]), randn(4, 2, 3), torch.arange(4)
    alone = base.predict(x, t, cond), base.predict(x, t, base.encode([""] * 4))
    halves = common.predict_both(base, x, t, cond, null, 2.0)
    assert close(halves[0], alone[1]) and close(halves[1], alone[0]) and not close(halves[0], alone[0], 1e-2)
    none, text = common.predict_both(base, x, t, cond, null, 1.0)
    assert none is None and close(text, alone[0]) and len(base.asked[-1]) == 4  # one half, at half the cost


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_rollout_keeps_what_the_loss_needs(guidance):
    """The states and predictions of E1 to E3 with the noise of each object's generator, x_T first."""
    base, schedule = Base(), NoiseSchedule.from_diffusers("dpm", 7)
    generators = lambda: [seeded(3, n) for n in range(4)]
    cond, null = base.encode(PROMPTS), base.encode([""])
    path = common.rollout(base, schedule, cond, null, guidance, generators(), progress=lambda steps: list(steps))
    assert path.x.shape == (4, 8, 2, 3) and path.eps_text.shape == (4, 7, 2, 3) and not path.x.requires_grad
    assert torch.equal(path.eps, path.eps_text) == (guidance == 1)
    used = generators()
    noises = [torch.stack([torch.randn(2, 3, generator=generator) for generator in used]) for _ in range(8)]
    assert torch.equal(path.x[:, 0], noises[0])
    for i in range(7):
        x = path.x[:, i]
        without, text = common.predict_both(base, x, schedule.t(i).expand(4), cond, null, 2.5)
        assert close(path.eps_text[:, i], text.detach())
        assert close(path.eps[:, i], (without + guidance * (text - without)).detach())
        eps = (without + guidance * (text - without)).detach()
        c_x, c_0, std = schedule.step(i)
        want = c_x * x + c_0 * schedule.x0(x, eps, i) + std * noises[i + 1]
        assert close(path.x[:, i + 1].double(), want.double(), 2e-7)
    again = common.rollout(base, schedule, cond, null, guidance, generators())
    assert torch.equal(path.x, again.x)
    alone = common.rollout(base, schedule, cond[2:3], null, guidance, generators()[2:3])    # the same object by itself
    assert all(close(one.double(), many[2:3].double(), 1e-6) for one, many in zip(alone, path))


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
@pytest.mark.parametrize("steps", [20, 250])
def test_rollout_draws_from_the_data(sampler, steps):
    """Data N(2, 1/4) with its exact eps: each step of the sampler keeps a Gaussian, whose moments are known.

    With many steps they are the data's own, too; the first-order sampler is biased where there are few.
    """
    schedule = NoiseSchedule.from_diffusers(sampler, steps)
    mean, std = 2.0, 0.5

    def eps_of_x(i):  # E[eps | x] = slope (x - alpha mean)
        alpha, sigma = schedule.alpha[i], schedule.sigma[i]
        return sigma / (alpha ** 2 * std ** 2 + sigma ** 2), alpha * mean

    numbers = {t: i for i, t in enumerate(schedule.timesteps.tolist())}

    class Exact:
        device, latent_shape = torch.device("cpu"), (1000,)

        def predict(self, x, t, cond):
            slope, centre = eps_of_x(numbers[t[0].item()])
            return (slope * (x - centre)).float()

    cond = Cond(torch.zeros(8, 1, 1), None)
    x = common.rollout(Exact(), schedule, cond, cond[:1], 1.0, [seeded(n) for n in range(8)]).x  # (8, T + 1, 1000)
    mu, variance = torch.tensor(0.0).double(), torch.tensor(1.0).double()
    for i in range(steps):
        slope, centre = eps_of_x(i)
        c_x, c_0, noise = schedule.step(i)
        a = c_x + c_0 * (1 - schedule.sigma[i] * slope) / schedule.alpha[i]  # x_s = a x_t + b + noise
        mu = a * mu + c_0 * schedule.sigma[i] * slope * centre / schedule.alpha[i]
        variance = a ** 2 * variance + noise ** 2
        got = x[:, i + 1].double()  # 8000 numbers: within 4 standard errors
        assert abs(got.mean() - mu) < 4 * (variance / 8000).sqrt()
        assert abs(got.std() / variance.sqrt() - 1) < 4 / math.sqrt(2 * 8000)
    if steps == 250:
        assert mu.item() == pytest.approx(mean, rel=0.01)
        assert variance.sqrt().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("last_step", ["always", "stratified", "never"])
def test_transitions_are_picked_evenly(last_step):
    """Without repetition, from each quarter in turn, the last step as wished; for any number of steps."""
    for steps in range(1 if last_step != "never" else 2, 51):
        pool = steps if last_step == "stratified" else steps - 1
        quarters = [set(quarter.tolist()) for quarter in torch.arange(pool).tensor_split(4)]
        for fraction in (0.01, 0.25, 0.4, 0.75, 1.0):
            for seed in range(3):
                picked = r2d3.pick_transitions(steps, fraction, last_step, seeded(seed))
                most = steps - (last_step == "never")
                assert len(picked) == min(max(1, int(steps * fraction + 1e-9)), most)
                assert len(set(picked)) == len(picked) and set(picked) <= set(range(steps))
                if last_step != "stratified":
                    assert (steps - 1 in picked) == (last_step == "always")
                rest = picked[1:] if last_step == "always" else picked
                counts = [len(quarter & set(rest)) for quarter in quarters]
                room = [len(quarter) for quarter in quarters]
                assert sum(counts) == len(rest)
                if len(rest) >= 4 and pool >= 4:
                    assert min(counts) >= 1
                for count, size in zip(counts, room):  # in turn: none is two ahead, but of an empty one
                    assert count == size or count >= max(counts) - 1


@pytest.mark.parametrize("last_step", ["always", "stratified", "never"])
def test_no_level_is_preferred(last_step):
    """4000 trajectories of 20 steps, 8 picked each: every step equally often, the last as wished."""
    drawn = [r2d3.pick_transitions(20, 0.4, last_step, seeded(seed)) for seed in range(4000)]
    counts = torch.tensor(drawn).flatten().bincount(minlength=20) / 4000
    if last_step == "stratified":
        assert (counts - 0.4).abs().max() < 0.03
        return
    assert counts[19] == (last_step == "always")
    rest = (8 - counts[19].item()) / 4  # of each quarter, which are of 5, 5, 5 and 4 steps
    want = torch.tensor([rest / 5] * 15 + [rest / 4] * 4)
    assert (counts[:19] - want).abs().max() < 0.03


# ---- bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_predictions_are_noise(kind):
    """A network that knows the answer, asked by DiffSplat: eps comes back, whatever it predicts itself."""
    schedule = NoiseSchedule.from_diffusers("dpm", 20)
    x0, eps = randn(3, 4, 2, 4, 4).float(), randn(3, 4, 2, 4, 4, seed=1).float()
    i = torch.tensor([0, 7, 19])
    alpha, sigma = (table[i].view(3, 1, 1, 1, 1).float() for table in (schedule.alpha, schedule.sigma))
    asked = {}

    class Oracle(torch.nn.Linear):
        attn_processors = {}

        def set_attn_processor(self, processors):
            assert processors == {}

        def forward(self, rows, **inputs):
            asked.update(inputs, rows=rows)
            out = eps if kind == "epsilon" else alpha * eps - sigma * x0
            return (torch.cat([out, torch.full_like(out, 9.0)], 2).flatten(0, 1),)  # the variance is not used

    vae = torch.nn.Linear(1, 1)
    vae.config = SimpleNamespace(latent_channels=2, block_out_channels=[8, 8])
    base = common.diffsplat(Oracle(1, 1), vae, None, image_size=8, prediction_type=kind, guidance=1.0, betas={},
                          latent_mean=torch.zeros(2), latent_std=torch.ones(2), scale_range=(0.1, 0.2),
                          depth_scale=1.0, half_image_shift=False, eval_size=16, lora_targets=["to_q"],
                          device="cpu")
    if kind == "v_prediction":
        assert close(base.alpha_by_t[schedule.timesteps].double(), schedule.alpha[:-1], 1e-6)
    cond = Cond(randn(3, 5, 6).float(), torch.arange(15).view(3, 5) % 4 > 0)
    got = base.predict(alpha * x0 + sigma * eps, schedule.t(i), cond)
    assert close(got, eps, 1e-5)
    rows = asked["rows"].unflatten(0, (3, 4))  # object by object, view by view: latent, then rays
    assert torch.equal(rows[:, :, :2], alpha * x0 + sigma * eps)
    assert torch.equal(rows[:, :, 2:], base.plucker.expand(3, -1, -1, -1, -1))
    for name, want in (("timestep", schedule.t(i)), ("encoder_hidden_states", cond.embeds),
                       ("encoder_attention_mask", cond.mask)):
        per_view = asked[name].unflatten(0, (3, 4))
        assert all(torch.equal(per_view[:, v], want) for v in range(4)), name


def pixart(weights):
    from diffusers import PixArtTransformer2DModel
    net = PixArtTransformer2DModel(
        num_layers=2, num_attention_heads=4, attention_head_dim=16, in_channels=10, out_channels=8,
        sample_size=8, patch_size=2, cross_attention_dim=64, caption_channels=24,
        use_additional_conditions=False)
    net.load_state_dict({name[3:]: value.float() for name, value in weights.items() if name[:3] == "sd."})
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def official():
    return load_file(ROOT / "tests/data/pixart_mv.safetensors")


def run(net, d, x):
    return net(x, encoder_hidden_states=d["text_embeds"], encoder_attention_mask=d["text_mask"],
               timestep=d["timestep"], return_dict=False,
               added_cond_kwargs={"resolution": None, "aspect_ratio": None})[0]


def test_multi_view_network_is_the_published_one(official):
    """DiffSplat's transformer from stock diffusers with our attention: its outputs and its gradient."""
    d, net = official, pixart(official)
    assert close(run(net, d, d["x"]), d["out_num_views_1"], 2e-6)  # stock
    r2d3.published.join_views(net, 1)
    assert close(run(net, d, d["x"]), d["out_num_views_1"], 2e-6)  # ours with one view is stock
    r2d3.published.join_views(net, 4)
    x = d["x"].clone().requires_grad_()
    out = run(net, d, x)
    assert close(out.detach(), d["out"], 2e-6)
    gradient, = torch.autograd.grad((out * d["w"]).sum(), x)
    assert close(gradient, d["grad_x"], 5e-6)
    assert not close(out.detach(), d["out_num_views_1"], 1e-3)
    for got, want in ((out.detach(), d["out"]), (gradient, d["grad_x"])):
        for wrong in (1.05 * got, -got, got.roll(1, -1), got.roll(1, 0)):
            assert not close(wrong, want, 1e-3)


def test_views_attend_to_each_other(official):
    """Four views of an object see each other and no other object."""
    d, net = official, pixart(official)
    r2d3.published.join_views(net, 4)
    names = {name: isinstance(processor, published.MultiViewAttnProcessor)
             for name, processor in net.attn_processors.items()}
    assert sum(names.values()) == 2 and all((".attn1." in name) == joined for name, joined in names.items())
    changed_x = d["x"].clone()
    changed_x[5] += 1  # view 1 of object 1 of 4
    with torch.no_grad():
        moved = (run(net, d, changed_x) - run(net, d, d["x"])).abs().amax((1, 2, 3))
    assert (moved[4:8] > 1e-3).all() and moved[5] == moved.max()
    assert (moved[:4] < 1e-6).all() and (moved[8:] < 1e-6).all()


def test_joined_attention_is_attention_over_all_tokens():
    """The processor against softmax(q k^T / sqrt d) v written out, for one layer of diffusers."""
    from diffusers.models.attention_processor import Attention
    torch.manual_seed(0)
    attn = Attention(query_dim=12, heads=3, dim_head=5, bias=True).double()
    hidden = randn(6, 7, 12)  # two objects of three views
    got = published.MultiViewAttnProcessor(3)(attn, hidden)
    for b in range(2):
        tokens = hidden[3 * b:3 * b + 3].reshape(21, 12)
        layers = attn.to_q, attn.to_k, attn.to_v
        q, k, v = (layer(tokens).view(21, 3, 5).transpose(0, 1) for layer in layers)
        heads = (q @ k.mT / math.sqrt(5)).softmax(-1) @ v  # (3, 21, 5)
        want = attn.to_out[0](heads.transpose(0, 1).reshape(21, 15)).view(3, 7, 12)
        assert close(got[3 * b:3 * b + 3], want) and not close(1.05 * want, want, 1e-2)


# ---- metrics -----------------------------------------------------------------------------------------------


def test_diversity():
    features = F.normalize(randn(3, 4, 2, 5), dim=-1)  # 3 prompts, 4 objects, 2 views
    want = torch.zeros(3).double()
    for p in range(3):
        pairs = [1 - features[p, a, v] @ features[p, b, v] for a in range(4) for b in range(4) if a != b
                 for v in range(2)]
        want[p] = sum(pairs) / len(pairs)
    assert close(metrics.diversity(features), want)
    assert metrics.diversity(features[:, :1].expand(3, 4, 2, 5)).abs().max() < 1e-12  # all are the same object
    assert close(metrics.diversity(torch.eye(4)[None, :, None]), torch.ones(1), 1e-6)  # with nothing in common
    assert metrics.diversity(features[:, :1]).abs().max() < 1e-12  # there is only one


def with_moments(mean, covariance, seed):
    """200 vectors that have exactly this mean and covariance."""
    x = randn(200, len(mean), seed=seed)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance():
    """|mean|^2 + tr A + tr B - 2 tr sqrt(AB); the last is sqrt(tr AB + 2 sqrt det AB) for 2 x 2."""
    a_mean, b_mean = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 1.0]).double()
    A, B = torch.tensor([[2.0, 0.8], [0.8, 1.0]]).double(), torch.tensor([[0.5, -0.3], [-0.3, 3.0]]).double()
    a, b = with_moments(a_mean, A, 0), with_moments(b_mean, B, 1)
    root = ((A @ B).trace() + 2 * (A.det() * B.det()).sqrt()).sqrt()
    want = (a_mean - b_mean).square().sum() + A.trace() + B.trace() - 2 * root
    assert close(metrics.frechet_distance(a, b), want) and close(metrics.frechet_distance(b, a), want)
    assert not close(metrics.frechet_distance(a, 1.05 * b), want, 1e-2)
    diagonal = [torch.tensor(values).double() for values in ([4.0, 1.0, 0.25, 9.0], [1.0, 1.0, 4.0, 4.0])]
    zero = torch.zeros(4).double()
    a, b = (with_moments(zero, variances.diag(), 2 + n) for n, variances in enumerate(diagonal))
    want = (diagonal[0].sqrt() - diagonal[1].sqrt()).square().sum()  # 1 + 0 + 2.25 + 1
    assert close(metrics.frechet_distance(a, b), want) and want == 4.25
    assert metrics.frechet_distance(a, a).abs() < 1e-9
    assert close(metrics.frechet_distance(a, a + 1), torch.tensor(4.0).double())
    assert close(metrics.frechet_distance(a.float(), b.float()), want, 1e-5)
    few, other = randn(5, 12, seed=8), randn(6, 12, seed=9)  # fewer than dimensions: scipy's matrix square root
    from scipy.linalg import sqrtm
    root = torch.from_numpy(sqrtm((few.T.cov() @ other.T.cov()).numpy()).real).trace()
    want = (few.mean(0) - other.mean(0)).square().sum() + few.T.cov().trace() + other.T.cov().trace() - 2 * root
    assert close(metrics.frechet_distance(few, other), want, 1e-5)
    flat = torch.cat([a, a[:, :1]], 1)  # a covariance without full rank
    assert metrics.frechet_distance(flat, flat).abs() < 1e-6


def measurement(reward, features):
    other = reward.new_zeros(reward.shape)
    return metrics.Measurement(reward, other + 0.5, other, other + 0.3, other + 0.9, features, 2 * features, None)


def test_compare_says_what_changed():
    P, S, V = 12, 4, 2
    features = [F.normalize(randn(P, S, V, 3, seed=n), dim=-1).float() for n in range(3)]
    before, after = randn(P, S, seed=3).float(), randn(P, S, seed=4).float() + 1
    result = metrics.compare(measurement(before, features[0]), measurement(after, features[1]),
                          measurement(before, features[2]))
    assert (result.pop("prompts"), result.pop("samples_per_prompt")) == (P, S)
    assert set(result) == set(metrics.METRICS)
    reward, diversity, fid = (result[name] for name in ("reward", "diversity", "fid_to_base"))
    assert reward["before"] == pytest.approx(before.mean().item(), rel=1e-5)
    assert reward["after"] == pytest.approx(after.mean().item(), rel=1e-5)
    assert diversity["after"] == pytest.approx(metrics.diversity(features[1]).mean().item(), rel=1e-5)
    for name, shown in (("before", features[0]), ("after", features[1])):
        want = metrics.frechet_distance(2 * shown.flatten(0, 2), 2 * features[2].flatten(0, 2))
        assert fid[name] == pytest.approx(want.item(), rel=1e-6)
    assert fid["images"] == P * S * V
    for row in result.values():
        assert row["change"] == pytest.approx(row["after"] - row["before"], rel=1e-4, abs=1e-7)
        assert row["ci95"][0] <= row["ci95"][1] and row["after_ci95"][0] <= row["after_ci95"][1]
        assert row["after_ci95"][0] - 1e-6 <= row["after"] <= row["after_ci95"][1] + 1e-6
        assert row["ci95"][0] - 1e-6 <= row["change"] <= row["ci95"][1] + 1e-6
    unchanged = result["coverage"]
    assert unchanged["change"] == 0 and unchanged["ci95"] == [0, 0] and unchanged["standard_errors"] == 0
    # the bootstrap's spread is that of a mean over prompts
    spread = (after.mean(1) - before.mean(1)).std(correction=0) / math.sqrt(P)
    assert reward["change"] / reward["standard_errors"] == pytest.approx(spread.item(), rel=0.08)


def test_interval_covers_the_true_change():
    """100 experiments with a true change of 1/2: the 95% interval holds it nearly that often."""
    P, S, held = 30, 2, 0
    features = F.normalize(randn(P, S, 1, 2), dim=-1).float()
    for seed in range(100):
        prompt, noise = randn(P, 1, seed=1000 + seed), randn(2, P, S, seed=2000 + seed)
        change = 0.5 + 0.5 * randn(P, 1, seed=3000 + seed)
        before, after = (prompt + noise[0]).float(), (prompt + change + noise[1]).float()
        low, high = metrics.compare(measurement(before, features), measurement(after, features),
                                 measurement(before, features))["reward"]["ci95"]
        held += low < 0.5 < high
    assert 88 <= held <= 98, held  # binomial: 95 +- 2.2, a little less for the 30 prompts
