"""Set before torch is imported: threads that wait sleep, else a busy machine makes the tests several times slower."""
import functools
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import support  # noqa: E402, F401      it hides the Hugging Face package `kernels`, before a test imports transformers


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes longest; leave them out with -m \"not slow\"")


@pytest.fixture(autouse=True, scope="session")
def short_turntables():
    """Four frames instead of 36, which are most of a small run's time; test_train.py makes one in full."""
    from support import report
    report.turntable = functools.partial(report.turntable, frames=4)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def tiny_inception(monkeypatch):
    """FID's Inception has to be fetched; pictures of 2 x 2 pixels stand for its features."""
    import torch.nn.functional as F

    from support import metrics
    monkeypatch.setattr(metrics, "inception", lambda device: lambda pictures: F.adaptive_avg_pool2d(pictures, 2).flatten(1))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """diffusers' pipeline with the published one's classes and settings, tiny and random."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        MarigoldNormalsPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    return MarigoldNormalsPipeline(
        UNet2DConditionModel(sample_size=8, in_channels=8, out_channels=4, block_out_channels=(8, 16),
                             down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1,
                             cross_attention_dim=16, norm_num_groups=4, attention_head_dim=4),
        AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                      up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4),
        DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                      prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True),
        CLIPTextModel(CLIPTextConfig(vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=2, max_position_embeddings=8, bos_token_id=0,
                                     eos_token_id=1, pad_token_id=1)),
        CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8),
        prediction_type="normals", default_denoising_steps=4, default_processing_resolution=32)
