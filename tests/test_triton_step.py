"""One whole fine-tuning step with the Triton kernels (interpreted) and with PyTorch: the same LoRA gradients."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

STEP = """
import torch
from support import shapes
import r2d3
from diffusers import AutoencoderKL, PixArtTransformer2DModel

torch.manual_seed(0)
net = PixArtTransformer2DModel(sample_size=4, patch_size=2, in_channels=10, out_channels=8, num_layers=1,
                               num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
                               caption_channels=8, interpolation_scale=1, use_additional_conditions=False)
vae = AutoencoderKL(in_channels=12, out_channels=12, down_block_types=["DownEncoderBlock2D"],
                    up_block_types=["UpDecoderBlock2D"], block_out_channels=[8], layers_per_block=1,
                    latent_channels=4, norm_num_groups=4, sample_size=4, mid_block_add_attention=False)
text = shapes.WordTable(["red", "cube"], 8, 3).requires_grad_(False)
base = r2d3.DiffSplat(net, vae, text, image_size=4, prediction_type="v_prediction", guidance=2.0,
                      latent_mean=torch.zeros(1), latent_std=torch.ones(1), betas={}, scale_range=(0.02, 0.12),
                      depth_scale=0.5, half_image_shift=False, device="cpu", eval_size=4,
                      lora_targets=("to_q", "to_k", "to_v"))
base.net = r2d3.add_lora(base.net, base.lora_targets, 2, 0)
with torch.no_grad():
    for name, weight in base.net.named_parameters():
        if "lora_B" in name:
            weight.normal_(0, 0.05)
schedule = r2d3.NoiseSchedule.from_diffusers("dpm", 20)
null, cond = base.encode([""]), base.encode(["red cube"])
found = {}
for backend in ("torch", "triton"):
    config = r2d3.resolve(r2d3.Config(backend=backend, views=1, view_size=17, guidance=2.0, branch="guided",
                                      estimator="step", skip_below=0.0))
    path = r2d3.rollout(base, schedule, cond, null, 2.0, [r2d3.seeded(0)])
    old = path.eps[:, 12] + 0.01
    batch = r2d3.Transitions(torch.tensor([12]), path.x[:, 12], path.x[:, 13], old, cond, ["red cube"],
                             [r2d3.seeded(1)], None, None)
    reward = r2d3.load_reward("colorfulness=1,dnc=1", base, "cpu")
    judge = r2d3.make_judge(base, reward, views=1, view_size=17, elevation_jitter=20.0, azimuth_jitter=60.0,
                            backend=backend)
    logged, _ = r2d3.nabla_step(r2d3.Job(base, judge, schedule, null, config), batch)
    base.net.zero_grad()
    (logged["match"] + logged["reg"]).sum().backward()
    lora = torch.cat([w.grad.flatten() for n, w in base.net.named_parameters() if w.requires_grad])
    found[backend] = {**{name: logged[name] for name in ("reward", "reward_gradient", "match", "reg")},
                      "LoRA gradient": lora}
for name, want in found["torch"].items():
    error = ((found["triton"][name] - want).abs().max() / want.abs().max()).item()
    print(f"{name}: largest {want.abs().max().item():.3g}, relative error {error:.1e}")
    assert want.abs().max() > 0 and error < 1e-4, name
"""


def test_a_fine_tuning_step_is_the_same_with_triton():
    done = subprocess.run([sys.executable, "-c", STEP], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"})
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
