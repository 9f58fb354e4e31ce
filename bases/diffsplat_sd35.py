"""DiffSplat on Stable Diffusion 3.5, a rectified flow: a base beyond the paper, as a plug-in.

    python r2d3.py --base diffsplat-sd35 --weights random --reward dnc cost

It is written as a base of your own would be: `load(config, device)` returns an r2d3.Base, and PRESETS has the settings
that it wants. Facts: github.com/chenguolin/DiffSplat and stabilityai/stable-diffusion-3.5-medium. A rectified flow is
alpha = 1 - sigma, and its network predicts v = noise - x0; E1 to E8 hold as they stand (see NoiseSchedule).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

import r2d3
from support import published
from support.presets import PAPER

# The paper trains no rectified flow. A match in v, the network's own output, needs a small lambda: the paper's belongs
# to a match of scores, which weighs noise levels by k squared. The last step draws no noise, so it is not trained.
PRESETS = PAPER | {"": PAPER[""] | {"steps": 28, "lora_rank": 16},
                   "nabla": {"matching": "v", "reg_weight": 1.0, "last_step": "never"},
                   "ddpo": {"last_step": "never"}}


class EulerFlow(r2d3.NoiseSchedule):
    """A flow's schedule whose steps draw no noise, for sampling: Euler's."""

    def step(self, i: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_x, c_0 and std = 0 of step i; the noise that x_t holds is kept."""
        c_x = self.at(self.sigma, i + 1) / self.sigma[i]
        return c_x, self.alpha[i + 1] - self.alpha[i] * c_x, torch.zeros_like(c_x)


def flow_schedule(sampler: str, steps: int, shift: float) -> r2d3.NoiseSchedule:
    """The grids of diffusers for a flow with this shift: "dpm", "ddim", or "euler" without noise.

    They end at sigma = 0, as published. "dpm" starts just below sigma = 1; the others walk the grid of diffusers' flow
    sampler. ValueError: another sampler, or no steps.
    """
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
    if sampler not in ("dpm", "ddim", "euler") or steps < 1:
        raise ValueError(f"a flow samples with dpm, ddim or euler, in one step or more; got {sampler!r} and {steps}")
    if sampler == "dpm":
        scheduler = DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver++", solver_order=1, prediction_type="flow_prediction", use_flow_sigmas=True,
            flow_shift=shift)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigma = scheduler.sigmas.double()
    schedule = EulerFlow if sampler == "euler" else r2d3.NoiseSchedule
    return schedule(1000 * sigma[:-1], 1 - sigma, sigma, prediction="v")


class DiffSplatSD3(r2d3.DiffSplat):
    """DiffSplat on SD3.5: `predict` returns v = noise - x0.

    The stock network gets the views of an object as one tall picture: its joint attention then sees all of them and the
    text, once, as DiffSplat's own does. `positions_by_view` does the rest.
    """

    def __init__(self, net: nn.Module, vae: nn.Module, text, settings: dict, device: torch.device | str):
        super().__init__(net, vae, text, settings, device)
        positions_by_view(self.net, self.views)

    def schedule(self, sampler: str, steps: int) -> r2d3.NoiseSchedule:
        """A flow's."""
        return flow_schedule(sampler, steps, self.betas["flow_shift"])

    def predict(self, x: Tensor, t: Tensor, cond: r2d3.Cond) -> Tensor:
        """v in x (B, V, C, h, w) at timesteps t (B,), which are 1000 sigma: like x."""
        dtype = next(self.net.parameters()).dtype
        rows = torch.cat([x, self.plucker.expand(len(x), -1, -1, -1, -1)], 2)
        tall = rows.transpose(1, 2).flatten(2, 3).to(dtype)     # (B, C + 6, V h, w)
        text = cond.map(lambda field: field.to(self.device, dtype))
        out = self.net(tall, text.embeds, text.pooled, t.to(self.device), return_dict=False)[0]
        return out.unflatten(2, (self.views, -1)).transpose(1, 2).float()


def positions_by_view(net: nn.Module, views: int) -> nn.Module:
    """A stock SD3 network whose rows are tall pictures, the views of an object one above the other: (B, C, V h, w).

    All but the positions treats such a picture as it should: they must be those of a view, anew in each.
    """
    stock = net.pos_embed.forward           # patches and positions of one picture: (B, C, h, w) -> (B, n, D)

    def forward(tall: Tensor) -> Tensor:
        rows = tall.unflatten(2, (views, -1)).transpose(1, 2).flatten(0, 1)     # ((b v), C, h, w)
        return stock(rows).unflatten(0, (len(tall), views)).flatten(1, 2)

    net.pos_embed.forward = forward         # a module around it would rename its weights
    return net


class SD3TextPart(published.TextEncoder):
    """One of SD3's three encoders, number 1 to 3: two CLIPs (77 tokens), then T5 (256). No token is masked in any."""

    def __init__(self, base: str, root: Path | None, device: torch.device | str, number: int):
        suffix = "" if number == 1 else f"_{number}"
        self.folders = f"text_encoder{suffix}", f"tokenizer{suffix}"
        super().__init__(base, root, device)
        self.clip, self.whole, self.length = number < 3, True, 77 if number < 3 else 256
        self.dims = {"embeds": 2} | ({"pooled": 1} if self.clip else {})
        self.source = self.folders, *self.source

    def model_class(self) -> type[nn.Module]:
        from transformers import CLIPTextModelWithProjection, T5EncoderModel
        return CLIPTextModelWithProjection if self.clip else T5EncoderModel

    def run(self, model: nn.Module, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Of CLIP the last layer but one, without the final norm, and the projected end of text; of T5 its output."""
        if not self.clip:
            return {"embeds": model(ids)[0]}
        out = model(ids, output_hidden_states=True)
        return {"embeds": out.hidden_states[-2], "pooled": out.text_embeds}


class SD3TextEncoder:
    """Prompts -> (embeds (B, 77 + 256, D), None, pooled (B, P)), by two CLIPs and T5, one after the other, each then freed.

    The first 77 tokens are both CLIPs' side by side, filled up with zeros to the D of T5, whose 256 follow.
    """

    def __init__(self, base: str, root: Path | None, device: torch.device | str):
        self.parts, self.device = [SD3TextPart(base, root, device, number) for number in (1, 2, 3)], device

    def prepare(self, prompts: list[str]) -> None:
        for part in self.parts:
            part.prepare(prompts)

    def too_long(self, prompts: list[str]) -> int:
        """How many of the prompts have more tokens than T5 reads, which are more than CLIP's."""
        return self.parts[2].too_long(prompts)

    def __call__(self, prompts: list[str]) -> tuple[Tensor, None, Tensor]:
        self.prepare(prompts)
        first, second, t5 = ([part.read(prompt) for prompt in prompts] for part in self.parts)
        rows = []
        for one, two, three in zip(first, second, t5):
            clip = torch.cat([one["embeds"], two["embeds"]], 1)
            filled = nn.functional.pad(clip, (0, three["embeds"].shape[1] - clip.shape[1]))
            rows.append(torch.cat([filled, three["embeds"]]))
        pooled = torch.stack([torch.cat([one["pooled"], two["pooled"]]) for one, two in zip(first, second)])
        return torch.stack(rows).to(self.device), None, pooled.to(self.device)


# Both configs are those of stabilityai's model, but for the channels and the size of a picture.
published.register("diffsplat-sd35", {
    "net": "gsdiff_gobj83k_sd35m__render", "part": "transformer_ema", "vae": "gsvae_gobj265k_sd3",
    "text": "stabilityai/stable-diffusion-3.5-medium", "length": 77 + 256, "text_dim": 4096, "pooled_dim": 2048,
    "download": "22 GB", "encoder": SD3TextEncoder, "betas": {"flow_shift": 3.0}, "prediction_type": "flow_prediction", "guidance": 5.0,
    "lora_targets": [*published.ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_out"],   # also the text's
    "vae_config": published.VAE | {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
                         "use_post_quant_conv": False},
    "net_config": {"_class_name": "SD3Transformer2DModel", "sample_size": 32, "patch_size": 2, "in_channels": 22,
                   "out_channels": 16, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
                   "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
                   "pos_embed_max_size": 384, "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"}})


def load(config: r2d3.Config, device: torch.device | str) -> DiffSplatSD3:
    """The base, from the published weights or those that --weights names. UserError: missing or damaged weights."""
    return DiffSplatSD3(**published.load("diffsplat-sd35", config.weights, device, config.precision), device=device)
