"""ReFL, DRaFT and DDPO on a linear base and a quadratic reward, whose gradients are known; and DDPO's
log-probabilities as recorded from the published code. In float64; the tolerances are its rounding.
"""
import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file
from test_method import (  # noqa: F401
    CONFIG,
    ROOT,
    Base,
    changed,
    close,
    flat,
    make_batch,
    make_job,
    quadratic,
    randn,
)

import common
import r2d3
from r2d3 import NoiseSchedule, Transitions, seeded

VIEWS = torch.arange(1, 5, dtype=torch.float64)[:, None]


def slope(D, x0):
    """d reward / d x0 of `flat` and `quadratic`, by hand: view v shows (v + 1) D x0."""
    return D.T @ (-2 * VIEWS * (VIEWS * (D @ x0) - 0.5)).mean(0)


def gradients(base, loss):
    names = ("A", "E", "b")
    return dict(zip(names, torch.autograd.grad(loss, [getattr(base.net, name) for name in names])))


def refuses_wrong(got, want):
    return close(got, want, 1e-11) and not any(close(wrong, want, 1e-3) for wrong in (1.05 * got, -got, got.roll(1, -1)))


def test_refl_in_closed_form(flat):  # noqa: F811
    """x0 = (x_t - sigma (J x_t + b + ...)) / alpha, so d loss / d b = sigma / alpha dr/dx0, by A times x_t."""
    base, schedule = Base(), NoiseSchedule.from_diffusers("dpm", 20)
    batch, null = make_batch(base, schedule)
    job = make_job(base, quadratic, schedule, null, CONFIG)
    values, judged = r2d3.refl_step(job, batch)
    loss = values["loss"]
    assert loss.shape == (4,) and judged == 4
    for m, i in enumerate(batch.i.tolist()):
        alpha, sigma, x = schedule.alpha[i], schedule.sigma[i], batch.x_t[m].flatten()
        letters = CONFIG.guidance * (m + 1)                     # guidance by s is s times as many letters
        J = (base.net.A + letters * base.net.E).detach()
        x0 = (x - sigma * (J @ x + base.net.b.detach() + letters * base.net.v)) / alpha
        r = -(VIEWS * (flat @ x0) - 0.5).square().sum(1).mean()
        assert close(loss[m], -r, 1e-11)
        by_b = sigma / alpha * slope(flat, x0)
        got = gradients(base, r2d3.refl_step(job, batch.at(torch.arange(4) == m))[0]["loss"].sum())
        assert refuses_wrong(got["b"], by_b)
        assert refuses_wrong(got["A"], by_b[:, None] * x) and refuses_wrong(got["E"], letters * by_b[:, None] * x)


@pytest.mark.parametrize("draft_steps", [1, 2, 3])
def test_draft_in_closed_form(flat, draft_steps):  # noqa: F811
    """A sampler step is x -> P x - q b' + std noise with P = (c_x + c_0 / alpha) I - q J and q = c_0 sigma / alpha."""
    base, schedule = Base(), NoiseSchedule.from_diffusers("dpm", 20)
    batch, null = make_batch(base, schedule)
    first = 20 - draft_steps
    batch = batch._replace(i=torch.full((4,), first))
    config = changed(method="draft", draft_steps=draft_steps)
    values, judged = r2d3.draft_step(make_job(base, quadratic, schedule, null, config),
                                     batch._replace(generators=[seeded(5, m) for m in range(4)]))
    loss, got = values["loss"], gradients(base, values["loss"].sum())
    assert judged == 4
    generators, x, want_b, want_loss = [seeded(5, m) for m in range(4)], batch.x_t, torch.zeros(6).double(), []
    draw = lambda: torch.stack([torch.randn(2, 3, generator=generator) for generator in generators]).double()
    x, by_b = [row.flatten() for row in x], [torch.zeros(6, 6).double()] * 4
    for i in range(first, 20):
        c_x, c_0, std = schedule.step(i)
        noise, q = draw(), c_0 * schedule.sigma[i] / schedule.alpha[i]
        for m in range(4):
            letters = CONFIG.guidance * (m + 1)
            J = (base.net.A + letters * base.net.E).detach()
            P = (c_x + c_0 / schedule.alpha[i]) * torch.eye(6).double() - q * J
            x[m] = P @ x[m] - q * (base.net.b.detach() + letters * base.net.v) + std * noise[m].flatten()
            by_b[m] = P @ by_b[m] - q * torch.eye(6).double()            # d x / d b
    for m in range(4):
        want_b -= by_b[m].T @ slope(flat, x[m])
        want_loss.append((VIEWS * (flat @ x[m]) - 0.5).square().sum(1).mean())
    assert close(loss, torch.stack(want_loss), 1e-10) and refuses_wrong(got["b"], want_b)
    if draft_steps > 1:                                         # the earlier steps count: without them it is another gradient
        last_only = -sum((by_b[m] * 0 - q * torch.eye(6).double()).T @ slope(flat, x[m]) for m in range(4))
        assert not close(got["b"], last_only, 1e-3)


@pytest.mark.parametrize("i", [3, 12, 19])
def test_ddpo_in_closed_form(flat, i):  # noqa: F811
    """Where the policy is still the old one, the gradient is -A d log p / d b, and d mean / d b = -c_0 sigma / alpha."""
    base, schedule = Base(), NoiseSchedule.from_diffusers("dpm", 20)
    batch, null = make_batch(base, schedule)
    advantage = torch.tensor([1.5, -0.5, 2.0, -1.0]).double()
    batch = batch._replace(i=torch.full((4,), i), advantage=advantage)
    with torch.no_grad():
        old = common.predict_guided(base, batch.x_t, schedule.t(batch.i), batch.cond, null, CONFIG.guidance)
    values, judged = r2d3.ddpo_step(make_job(base, None, schedule, null, CONFIG), batch._replace(eps_old=old))
    loss = values["loss"]
    assert judged == 0 and close(loss, -advantage)                              # the ratio is 1
    c_x, c_0, std = schedule.step(i)
    mean = c_x * batch.x_t + c_0 * (batch.x_t - schedule.sigma[i] * old) / schedule.alpha[i]
    want = (advantage[:, None] * (batch.x_s - mean).flatten(1)).sum(0) / 6 / std ** 2 * c_0 * schedule.sigma[i] / schedule.alpha[i]
    assert refuses_wrong(gradients(base, loss.sum())["b"], want)


@pytest.mark.parametrize("side, sign, moves", [(1, 1, False), (1, -1, True), (-1, 1, True), (-1, -1, False)])
def test_ddpo_is_clipped(monkeypatch, side, sign, moves):
    """A ratio that has left [1 - c, 1 + c] in the direction that the advantage wants gives no gradient any more."""
    base, schedule = Base(), NoiseSchedule.from_diffusers("dpm", 20)
    batch, null = make_batch(base, schedule)
    batch = batch._replace(i=torch.full((4,), 12), advantage=torch.full((4,), float(sign)).double())
    with torch.no_grad():
        eps = common.predict_guided(base, batch.x_t, schedule.t(batch.i), batch.cond, null, CONFIG.guidance)
        c_x, c_0, std = schedule.step(12)
        ideal = (batch.x_t - schedule.alpha[12] / c_0 * (batch.x_s - c_x * batch.x_t)) / schedule.sigma[12]
        assert close(schedule.transition(batch.x_t, ideal, batch.i)[0], batch.x_s)
        old = eps + side * 0.1 * (eps - ideal)                  # less likely than eps (side 1), or more
    monkeypatch.setitem(r2d3.DDPO_CLIP, "shapes", 1e-3)
    job = make_job(base, None, schedule, null, changed(base="shapes"))
    loss = r2d3.ddpo_step(job, batch._replace(eps_old=old))[0]["loss"]
    ratio = (r2d3.log_prob(schedule, batch, eps) - r2d3.log_prob(schedule, batch, old)).exp()
    assert ((ratio - 1) * side > 1e-3).all()
    assert (gradients(base, loss.sum())["b"].abs().max() > 1e-6) == moves
    assert close(loss, -sign * (ratio if moves else torch.full((4,), 1 + side * 1e-3, dtype=torch.float64)))


def test_ddpo_follows_the_gradient_of_the_expected_reward(flat):  # noqa: F811
    """The likelihood-ratio gradient of many one-step samples is DRaFT's pathwise gradient, within its standard error."""
    base, schedule = Base(), NoiseSchedule.from_diffusers("dpm", 20)
    n, i, config = 200_000, 10, changed(guidance=1.0)
    x_t = randn(1, 2, 3, seed=1).expand(n, -1, -1)
    cond, null = base.encode(["ab"] * n), base.encode([""])
    steps = torch.full((n,), i)
    with torch.no_grad():
        old = base.predict(x_t, steps, cond)
    mean, std = schedule.transition(x_t, old, i)
    x_s = mean + std * randn(n, 2, 3, seed=2)
    rewards = -(x_s - 0.3).square().sum((1, 2))
    batch = Transitions(steps, x_t, x_s, old, cond, None, None, None, rewards - rewards.mean())
    loss = r2d3.ddpo_step(make_job(base, None, schedule, null, config), batch)[0]["loss"].mean()
    got = -6 * gradients(base, loss)["b"]                       # log_prob is a mean over 6 elements
    slope_b = -schedule.step(i)[1] * schedule.sigma[i] / schedule.alpha[i]     # d mean / d b
    want = (-2 * (x_s - 0.3)).mean(0).flatten() * slope_b
    noise = ((rewards - rewards.mean())[:, None, None] * (x_s - mean) / std ** 2).std(0).flatten() * abs(slope_b) / n ** 0.5
    assert ((got - want).abs() < 4 * noise).all() and (want.abs() > 20 * noise).all()


def test_log_prob_is_the_recorded_one():
    """Every step of a trajectory that the published pipeline sampled in float32: measured 1e-6, 9e-5 at the last (std 0.01)."""
    d = load_file(ROOT / "tests/data/trajectory.safetensors")
    schedule, latents = NoiseSchedule.from_diffusers("dpm", 20), d["latents"][0].unflatten(1, (4, 4)).double()
    eps = d["unet_outputs"][0].unflatten(1, (4, 8))[:, :, :4].double()     # of 8 channels, 4 are a variance
    i = torch.arange(20)
    got = r2d3.log_prob(schedule, Transitions(i, latents[:-1], latents[1:], *[None] * 6), eps)
    want = d["log_probs"].double().mean(0)                      # recorded per view
    assert close(got[:-1], want[:-1], 2e-5) and close(got, want, 2e-4)
    assert not close(got.roll(1), want, 1e-3) and not close(-got, want, 1e-3)


def test_advantages():
    history = {}
    got = r2d3.advantages([1.0, 2.0, 3.0], ["a", "b", "a"], history)       # few of each: by the epoch's
    assert close(got, (torch.tensor([1.0, 2.0, 3.0]) - 2) / math.sqrt(2 / 3), 1e-5)
    assert history == {"a": [1.0, 3.0], "b": [2.0]}
    r2d3.advantages([5.0] * 6, ["a"] * 6, history)
    got = r2d3.advantages([4.0, 4.0], ["a", "b"], history)      # "a" has 9 by now, "b" two
    peers = torch.tensor([1.0, 3.0, *[5.0] * 6, 4.0])
    assert got[0].item() == pytest.approx(((4 - peers.mean()) / peers.std(correction=0)).item(), rel=1e-4)
    assert got[1] == 0                                          # the epoch's rewards are all the same: no division by 0
    r2d3.advantages([float(n) for n in range(40)], ["c"] * 40, history)
    assert history["c"] == [float(n) for n in range(8, 40)]


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_steps_of_each_method(steps):
    def pick(seed, **settings):
        config = dataclasses.replace(CONFIG, steps=steps, **settings)
        return r2d3.pick_steps(config, seeded(seed))

    late = {pick(seed, method="refl")[0] for seed in range(200)}
    assert late == set(range(steps - -(-steps // 4), steps)) and len(pick(0, method="refl")) == 1
    assert pick(0, method="draft") == [steps - 1]
    assert pick(0, method="draft", draft_steps=steps) == [0]
    assert pick(3, method="ddpo") == pick(3, method="nabla")
    if steps == 20:
        picks = [pick(seed, method="nabla", last_step="never") for seed in range(50)]
        assert all(len(set(picked)) == 8 and max(picked) < 19 for picked in picks)
        assert all(1 <= sum(step < 5 for step in picked) <= 3 for picked in picks)     # from each quarter in turn
