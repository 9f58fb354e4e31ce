"""E1 to E7 of the README, transitions, views, metrics: against closed forms, autograd and diffusers' own steps."""
import contextlib
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import r2d3  # noqa: E402

SAMPLERS = [(sampler, steps) for sampler in ("dpm", "ddim") for steps in (1, 2, 5, 20, 50)]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class LinearNet(torch.nn.Module):
    """eps = a x + b + c prompt; the "LoRA" is what a, b differ from their start by."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.tensor(0.3)), torch.nn.Parameter(torch.tensor(0.1))
        self.start, self.adapted = (0.3, 0.1), True

    @contextlib.contextmanager
    def disable_adapter(self):
        self.adapted = False
        yield
        self.adapted = True

    def forward(self, x, shift):
        a, b = (self.a, self.b) if self.adapted else self.start
        return a * x + b + shift


class LinearBase:
    """A base whose predictions, pictures and reward gradients are known in closed form."""

    device, latent_shape, guidance = torch.device("cpu"), (2, 3), 2.0

    def __init__(self):
        self.net = LinearNet()

    def encode(self, prompts):
        return r2d3.Cond(torch.tensor([[[float(len(prompt))]] for prompt in prompts]), None)

    def predict(self, x, t, cond):
        return self.net(x, 0.05 * cond.embeds.view(-1, 1, 1))

    def decode(self, x0):  # N = 2 Gaussians whose "means" are the latent itself
        return r2d3.Gaussians(x0, *[None] * 4)


@pytest.fixture
def linear(monkeypatch):
    """LinearBase, and a renderer that puts the means into the picture, the same in every view, without noise."""
    def render(gaussians, c2w, fxfycxcy, size, backend=None):
        image = gaussians.means[:, None, :, :, None].expand(-1, c2w.shape[1], -1, -1, 1)  # (B, V, 2, 3, 1)
        return r2d3.Render(image, *[None] * 4)

    monkeypatch.setattr(r2d3, "render", render)
    monkeypatch.setattr(r2d3, "IMAGE_NOISE", 0.0)
    return LinearBase()


def quadratic(render, prompts):
    return -(render.image - 0.5).square().sum((2, 3, 4))


def make_batch(base, schedule, M=4, seed=0, prompts=("a", "ab", "abc", "abcd")):
    i = torch.tensor([0, len(schedule) // 2, len(schedule) - 2, len(schedule) - 1])[:M]
    x_t, x_s, old = (randn(M, *base.latent_shape, seed=seed + n, dtype=torch.float32) for n in range(3))
    prompts = list(prompts[:M])
    return r2d3.Transitions(i, x_t, x_s, old, base.encode(prompts), prompts)


CONFIG = r2d3.resolve(r2d3.Config(guidance=2.0, beta=3.0, lam=0.5, branch="guided", matching="score", views=2))


@pytest.mark.parametrize("sampler, steps", SAMPLERS)
def test_x0_from_exact_noise_is_x0(sampler, steps):
    schedule = r2d3.NoiseSchedule.from_diffusers(sampler, steps)
    assert len(schedule) == steps and (schedule.sigma > 0).all()
    x0, eps = randn(3, 2, 5), randn(3, 2, 5, seed=1)
    for i in range(steps + 1):
        x = schedule.alpha[i] * x0 + schedule.sigma[i] * eps
        assert torch.allclose(schedule.x0(x, eps, i), x0, atol=1e-9)  # E1
    i = torch.tensor([0, steps // 2, steps])  # and with a different place for each sample
    x = schedule.alpha[i].view(3, 1, 1) * x0 + schedule.sigma[i].view(3, 1, 1) * eps
    assert torch.allclose(schedule.x0(x, eps, i), x0, atol=1e-9)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_transition_is_diffusers_dpm_step(steps, monkeypatch):
    """E2 and E3 with the noise that diffusers draws itself."""
    from diffusers import DPMSolverMultistepScheduler
    theirs = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1, final_sigmas_type="sigma_min")
    theirs.set_timesteps(steps)
    schedule = r2d3.NoiseSchedule.from_diffusers("dpm", steps)
    for i, t in enumerate(theirs.timesteps):
        x, eps = randn(1, 2, 5, seed=i), randn(1, 2, 5, seed=i + 100)
        want = theirs.step(eps, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float32)
        c_x, c_0, std = schedule.step(i)
        got = c_x * x + c_0 * schedule.x0(x, eps, i) + std * noise
        assert torch.allclose(got, want.double(), rtol=1e-4, atol=1e-4), (i, (got - want).abs().max())


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_transition_is_diffusers_ddim_step_with_eta_1(steps):
    from diffusers import DDIMScheduler
    theirs = DDIMScheduler(set_alpha_to_one=False, timestep_spacing="trailing", clip_sample=False)
    theirs.set_timesteps(steps)
    schedule = r2d3.NoiseSchedule.from_diffusers("ddim", steps)
    for i, t in enumerate(theirs.timesteps[:-1]):  # their last step ends beyond the smallest level
        x, eps, noise = (randn(1, 2, 5, seed=3 * i + n) for n in range(3))
        want = theirs.step(eps, t, x, eta=1.0, variance_noise=noise).prev_sample
        c_x, c_0, std = schedule.step(i)
        got = c_x * x + c_0 * schedule.x0(x, eps, i) + std * noise
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4), i


def test_score_and_k():
    """The score is autograd of the Gaussian's log-density, and k is its slope in eps (E6)."""
    schedule = r2d3.NoiseSchedule.from_diffusers("dpm", 20)
    for i in (0, 7, 19):
        x_t, x_s = randn(6), randn(6, seed=1).requires_grad_()
        c_x, c_0, std = schedule.step(i)

        def mean(eps):
            return c_x * x_t + c_0 * schedule.x0(x_t[None], eps[None], i)[0]

        eps, other = randn(6, seed=2), randn(6, seed=3)
        density = torch.distributions.Normal(mean(eps), std)
        score, = torch.autograd.grad(density.log_prob(x_s).sum(), x_s)
        assert torch.allclose(score, -(x_s - mean(eps)) / std ** 2)
        difference = (mean(other) - mean(eps)) / std ** 2  # of the two scores at one x_s
        assert torch.allclose(difference, -schedule.k(i) * (other - eps), rtol=1e-6)


def test_loss_is_the_difference_of_scores(linear):
    """nabla_loss against E4 and E5 spelled out with two Gaussian log-densities; guidance, weights and all."""
    schedule = r2d3.NoiseSchedule.from_diffusers("dpm", 20)
    with torch.no_grad():
        linear.net.a += 0.02
        linear.net.b -= 0.01
    batch, null = make_batch(linear, schedule), linear.encode([""])
    g = randn(4, *linear.latent_shape, seed=9, dtype=torch.float32)
    match, reg = r2d3.nabla_loss(linear, schedule, batch, null, g, CONFIG)
    for m, i in enumerate(batch.i.tolist()):
        c_x, c_0, std = schedule.step(i)
        x_s = batch.x_s[m].double().requires_grad_()

        def score(a, b):
            x = batch.x_t[m].double()
            eps = [a * x + b + 0.05 * n for n in (0, m + 1)]
            eps = eps[0] + 2.0 * (eps[1] - eps[0])
            mean = c_x * x + c_0 * schedule.x0(x[None], eps[None], i)[0]
            return torch.autograd.grad(torch.distributions.Normal(mean, std).log_prob(x_s).sum(), x_s)[0], eps

        (ours, eps), (reference, _) = score(linear.net.a.item(), linear.net.b.item()), score(0.3, 0.1)
        target = 3.0 * schedule.alpha[i + 1] ** 2 * g[m]
        assert match[m].item() == pytest.approx((ours - reference - target).square().mean().item(), rel=2e-4)
        assert reg[m].item() == pytest.approx((eps - batch.eps_old[m]).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("matching", ["score", "eps"])
@pytest.mark.parametrize("time_weight, power", [("squared", 2), ("linear", 1), ("none", 0)])
def test_loss_is_zero_at_its_optimum(linear, matching, time_weight, power):
    """eps_theta = eps_ref - (beta w / k) g: choose g so that the changed network is the optimum."""
    schedule = r2d3.NoiseSchedule.from_diffusers("dpm", 20)
    config = dataclasses.replace(CONFIG, matching=matching, time_weight=time_weight)
    batch, null = make_batch(linear, schedule), linear.encode([""])
    with torch.no_grad():
        linear.net.b += 0.04  # eps_theta - eps_ref = 0.04 everywhere
    k = schedule.k(batch.i)
    g = (-0.04 * k / (config.beta * schedule.alpha[batch.i + 1] ** power)).float().view(-1, 1, 1)
    best = r2d3.nabla_loss(linear, schedule, batch, null, g.expand(4, 2, 3).contiguous(), config)[0]
    wrong = r2d3.nabla_loss(linear, schedule, batch, null, 1.05 * g.expand(4, 2, 3), config)[0]
    flipped = r2d3.nabla_loss(linear, schedule, batch, null, -g.expand(4, 2, 3), config)[0]
    assert (best < 1e-5 * flipped).all() and (wrong > 100 * best).all()


def test_conditional_branch_is_guidance_one(linear):
    schedule = r2d3.NoiseSchedule.from_diffusers("dpm", 20)
    batch, null = make_batch(linear, schedule), linear.encode([""])
    g = randn(4, *linear.latent_shape, dtype=torch.float32)
    conditional = r2d3.nabla_loss(linear, schedule, batch, null, g, dataclasses.replace(CONFIG, branch="conditional"))
    guided = r2d3.nabla_loss(linear, schedule, batch, null, g, dataclasses.replace(CONFIG, guidance=1.0))
    assert torch.equal(conditional[0], guided[0]) and torch.equal(conditional[1], guided[1])


@pytest.mark.parametrize("jacobian", [True, False])
def test_reward_gradient(linear, jacobian):
    """E7 in closed form: r = -|x0 - 1/2|^2 with x0 = (x_s - sigma eps(x_s)) / alpha at the level s."""
    schedule = r2d3.NoiseSchedule.from_diffusers("dpm", 20)
    batch, null = make_batch(linear, schedule), linear.encode([""])
    config = dataclasses.replace(CONFIG, jacobian=jacobian)
    g, score = r2d3.reward_gradient(linear, quadratic, schedule, batch, null, config, r2d3.seeded(0))
    for m, i in enumerate(batch.i.tolist()):
        alpha, sigma, x = schedule.alpha[i + 1], schedule.sigma[i + 1], batch.x_s[m].double()
        eps = 0.3 * x + 0.1 + 2.0 * 0.05 * (m + 1)  # guidance 2 on a shift of 0.05 per letter
        x0 = (x - sigma * eps) / alpha
        slope = (1 - 0.3 * sigma * jacobian) / alpha
        assert torch.allclose(g[m].double(), -2 * (x0 - 0.5) * slope, rtol=2e-4, atol=1e-5)
        assert score[m].item() == pytest.approx(-(x0 - 0.5).square().sum().item(), rel=1e-4)
    assert linear.net.a.grad is None and not g.requires_grad
    clipped, _ = r2d3.reward_gradient(linear, quadratic, schedule, batch, null,
                                      dataclasses.replace(config, clip_reward_grad=0.1), r2d3.seeded(0))
    assert torch.allclose(clipped.flatten(1).norm(dim=1), torch.full((4,), 0.1))
    assert torch.allclose(clipped / clipped.flatten(1).norm(dim=1).view(-1, 1, 1),
                          g / g.flatten(1).norm(dim=1).view(-1, 1, 1), atol=1e-6)


def test_a_batch_is_its_parts(linear):
    schedule = r2d3.NoiseSchedule.from_diffusers("dpm", 20)
    batch, null = make_batch(linear, schedule), linear.encode([""])
    g, score = r2d3.reward_gradient(linear, quadratic, schedule, batch, null, CONFIG, r2d3.seeded(0))
    match, reg = r2d3.nabla_loss(linear, schedule, batch, null, g, CONFIG)
    for m in range(4):
        one = r2d3.Transitions(*(part[m:m + 1] for part in batch[:5]), batch.prompts[m:m + 1])
        g1, score1 = r2d3.reward_gradient(linear, quadratic, schedule, one, null, CONFIG, r2d3.seeded(0))
        match1, reg1 = r2d3.nabla_loss(linear, schedule, one, null, g1, CONFIG)
        for whole, part in ((g, g1), (score, score1), (match, match1), (reg, reg1)):
            assert torch.allclose(whole[m:m + 1], part, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_rollout_draws_from_the_data(sampler):
    """Data N(2, 0.5^2), whose exact eps is known: the samples have that mean and spread."""
    schedule = r2d3.NoiseSchedule.from_diffusers(sampler, 250)  # the first order needs many
    levels = {int(t): (schedule.alpha[i], schedule.sigma[i]) for i, t in enumerate(schedule.timesteps)}

    class Exact:
        device, latent_shape = torch.device("cpu"), (1,)

        def predict(self, x, t, cond):
            alpha, sigma = levels[int(t[0])]
            return (sigma * (x - alpha * 2) / (alpha ** 2 * 0.25 + sigma ** 2)).float()

    cond = r2d3.Cond(torch.zeros(4000, 1, 1), None)
    path = r2d3.rollout(Exact(), schedule, cond, cond[:1], 1.0, r2d3.seeded(1))
    assert path.x.shape == (4000, 251, 1) and path.eps_uncond is None and path.eps_text.shape == (4000, 250, 1)
    assert path.x[:, -1].mean().item() == pytest.approx(2, abs=0.03)
    assert path.x[:, -1].std().item() == pytest.approx(0.5, rel=0.06)
    again = r2d3.rollout(Exact(), schedule, cond, cond[:1], 1.0, r2d3.seeded(1))
    assert torch.equal(again.x, path.x)


@pytest.mark.parametrize("last_step", ["always", "stratified", "never"])
def test_transitions_are_picked_evenly(last_step):
    for steps in (2, 3, 7, 20, 50):
        for fraction in (0.01, 0.4, 1.0):
            counts = torch.zeros(steps)
            for seed in range(300 if fraction == 0.4 else 5):
                picked = r2d3.pick_transitions(steps, fraction, last_step, r2d3.seeded(seed))
                most = steps - (last_step == "never")
                assert len(picked) == len(set(picked)) == min(max(1, int(steps * fraction)), most)
                assert all(0 <= i < steps for i in picked)
                assert (steps - 1 in picked) or last_step != "always"
                assert (steps - 1 not in picked) or last_step != "never"
                if steps == 20 and fraction == 0.4 and last_step == "stratified":
                    assert [sum(i // 5 == q for i in picked) for q in range(4)] == [2, 2, 2, 2]
                counts[picked] += 1
            if fraction == 0.4 and steps >= 20:
                rest = counts[:-1]
                assert rest.min() > 0.6 * rest.mean() and rest.max() < 1.5 * rest.mean()


def test_reward_cameras():
    c2w, fxfycxcy = r2d3.sample_cameras(500, 4, 20.0, 60.0, r2d3.seeded(0))
    position = c2w[..., :3, 3]
    assert torch.allclose(position.norm(dim=-1), torch.full((500, 4), r2d3.RADIUS), atol=1e-5)
    assert torch.allclose(c2w[..., :3, 2], -position / r2d3.RADIUS, atol=1e-5)  # they look at the origin
    assert (c2w[..., 1, 1] < 0).all() and fxfycxcy.shape == (500, 4, 4)  # y of the picture is down
    elevation = torch.rad2deg(torch.asin(position[..., 1] / r2d3.RADIUS))
    assert torch.allclose(elevation, elevation[:, :1].expand(500, 4), atol=1e-3)
    assert -0.01 < elevation.min() < 0.5 and 19.5 < elevation.max() < 20.01
    azimuth = torch.rad2deg(torch.atan2(position[..., 0], position[..., 2]))
    assert (((azimuth - azimuth[:, :1] + 360.5) % 90 - 0.5).abs() < 0.01).all()
    first = (azimuth[:, 0] + 180) % 360 - 180
    assert -30.01 < first.min() < -28 and 28 < first.max() < 30.01
    two = r2d3.sample_cameras(500, 2, 0.0, 0.0, r2d3.seeded(0))[0][..., :3, 3]
    sides = torch.rad2deg(torch.atan2(two[..., 0], two[..., 2])).round() % 360
    assert set(sides[:, 0].tolist()) == {0, 90, 180, 270}  # with two views every side is seen in turn


def test_colorfulness_is_hasler_and_suesstrunk():
    image = torch.rand(1, 1, 3, 9, 7, generator=r2d3.seeded(0))
    alpha = (torch.rand(1, 1, 1, 9, 7, generator=r2d3.seeded(1)) > 0.4).float()
    r, g, b = (image[0, 0, c][alpha[0, 0, 0] > 0].numpy() for c in range(3))
    rg, yb = r - g, (r + g) / 2 - b
    want = (rg.var() + yb.var()) ** 0.5 + 0.3 * (rg.mean() ** 2 + yb.mean() ** 2) ** 0.5
    render = r2d3.Render(image, alpha, None, None, None)
    assert r2d3.colorfulness(render, [""]).item() == pytest.approx(want, rel=1e-5)
    larger = r2d3.Render(*(torch.nn.functional.pad(t, (5, 5, 5, 5), value=v) for t, v in ((image, 1.0), (alpha, 0.0))),
                         None, None, None)
    assert r2d3.colorfulness(larger, [""]).item() == pytest.approx(want, rel=1e-5)
    for picture, mask in ((torch.full_like(image, 0.3), alpha), (image, torch.zeros_like(alpha))):
        picture.requires_grad_()
        gradient, = torch.autograd.grad(r2d3.colorfulness(r2d3.Render(picture, mask, None, None, None), [""]).sum(), picture)
        assert gradient.isfinite().all()


def test_views_attend_to_each_other():
    from diffusers import PixArtTransformer2DModel
    torch.manual_seed(0)
    net = PixArtTransformer2DModel(sample_size=4, patch_size=2, in_channels=4, out_channels=8, num_layers=2,
                                   num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
                                   caption_channels=8, use_additional_conditions=False).eval()
    x, text = randn(4, 4, 4, 4, dtype=torch.float32), randn(4, 3, 8, dtype=torch.float32)

    def run(x):
        with torch.no_grad():
            return net(x, encoder_hidden_states=text, timestep=torch.tensor([5] * 4), return_dict=False,
                       added_cond_kwargs={"resolution": None, "aspect_ratio": None})[0]

    alone = run(x)
    r2d3.join_views(net, 1)
    assert torch.allclose(run(x), alone, atol=1e-5)
    r2d3.join_views(net, 2)
    joined, changed = run(x), x.clone()
    changed[1] += 1
    moved = (run(changed) - joined).abs().amax((1, 2, 3))
    assert moved[0] > 1e-4 and moved[1] > 1e-4 and moved[2] == moved[3] == 0  # pairs (0, 1) and (2, 3)
    assert (joined - alone).abs().max() > 1e-3


def test_metrics():
    same = torch.nn.functional.normalize(torch.ones(2, 3, 4, 5), dim=-1)
    assert r2d3.diversity(same).abs().max() < 1e-6
    orthogonal = torch.eye(3)[None, :, None].expand(2, 3, 4, 3)
    assert torch.allclose(r2d3.diversity(orthogonal), torch.ones(2))
    a = randn(4000, 3) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, 1.0, 2.0])
    b = randn(4000, 3, seed=1) * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor([1.0, 1.0, 2.0])
    assert r2d3.frechet_distance(a, b).item() == pytest.approx(1 + 1 + 1, rel=0.08)  # mean 1, std 1 to 2 and 2 to 1
    assert abs(r2d3.frechet_distance(a, a).item()) < 1e-6

    def measured(reward, seed):
        features = torch.nn.functional.normalize(randn(30, 4, 2, 6, seed=seed, dtype=torch.float32), dim=-1)
        flat = torch.zeros(30, 4)
        return r2d3.Measurement(reward, flat, flat, flat, features, None)

    noise = 0.2 * randn(30, 4, seed=5, dtype=torch.float32)
    result = r2d3.compare(measured(noise, 1), measured(noise + 1 + 0.1 * randn(30, 1, dtype=torch.float32), 2),
                          measured(noise, 3))
    low, high = result["reward"]["ci95"]
    assert low < 1 < high and 0.03 < high - low < 0.2 and result["reward"]["standard_errors"] > 20
    assert abs(result["fid_to_base"]["change"]) < 0.2 and result["fid_to_base"]["images"] == 240


def test_ply_file(tmp_path):
    gaussians = r2d3.Gaussians(randn(1, 3, 3).float(), torch.rand(1, 3, 3) + 0.01, 3 * randn(1, 3, 4).float(),
                               torch.tensor([[0.7, 0.0, 0.2]]), torch.rand(1, 3, 3))
    assert r2d3.save_ply(tmp_path / "a.ply", gaussians) == 2  # the invisible one is left out
    header, _, body = (tmp_path / "a.ply").read_bytes().partition(b"end_header\n")
    fields = [line.split()[-1] for line in header.decode().splitlines() if line.startswith("property float")]
    assert fields == ["x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1",
                      "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"]
    import numpy
    values = torch.from_numpy(numpy.frombuffer(body, "<f4").reshape(2, 17).copy())
    kept = [0, 2]
    assert torch.allclose(values[:, :3], gaussians.means[0, kept])
    assert torch.allclose(values[:, 6:9] * 0.28209479 + 0.5, gaussians.colors[0, kept], atol=1e-6)
    assert torch.allclose(values[:, 9].sigmoid(), gaussians.opacities[0, kept], atol=1e-6)
    assert torch.allclose(values[:, 10:13].exp(), gaussians.scales[0, kept], rtol=1e-5)
    unit = torch.nn.functional.normalize(gaussians.quats[0, kept], dim=-1)
    assert torch.allclose(values[:, 13:], unit, atol=1e-6)
