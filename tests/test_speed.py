"""support/speed.py: the ways to make an epoch cheaper change no result beyond rounding."""
import pytest
import torch

import r2d3
from support import speed


def loaded():
    base = r2d3.load_base(r2d3.Config(), "cpu")
    base.net = r2d3.add_lora(base.net, base.lora_targets, 2, 0)
    with torch.no_grad():
        for name, weight in base.net.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    return base


def results(base):
    """Predictions with the LoRA and without, its gradients, and decoded objects."""
    x = torch.randn(2, *base.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, t = base.encode(["a red cube", "a blue cone"]), torch.tensor([500, 20])
    eps = base.predict(x, t, cond)
    weights = [w for w in base.net.parameters() if w.requires_grad]
    gradients = torch.autograd.grad(eps.square().sum(), weights)
    with torch.no_grad(), base.net.disable_adapter():
        reference = base.predict(x, t, cond)
    with torch.no_grad():
        return [eps.detach(), reference, *gradients, *base.decode(x)]


@pytest.mark.parametrize("before", [False, True], ids=["LoRA first", "compiled first"])
def test_results_stay_as_they_are(before):
    torch._dynamo.reset()
    want = results(loaded())
    assert (want[0] - want[1]).abs().max() > 1e-3
    base = loaded()
    if before:
        plain = r2d3.load_base(r2d3.Config(), "cpu")
        speed.speed_up(plain, ["compiled", "channels_last"], backend="eager")
        plain.net = r2d3.add_lora(plain.net, plain.lora_targets, 2, 0)
        plain.net.load_state_dict(base.net.state_dict())
        base = plain
    else:
        speed.speed_up(base, ["compiled", "channels_last"], backend="eager")
    calls = torch._dynamo.utils.counters["stats"]["calls_captured"]
    for got, wanted in zip(results(base), want, strict=True):
        assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > calls
    convolutions = [m.weight for m in base.vae.modules() if isinstance(m, torch.nn.Conv2d) and m.weight.shape[1] > 1
                    and m.weight.shape[2] > 1]
    assert convolutions and all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)


def test_each_block_is_compiled_and_other_words_are_refused():
    base = r2d3.load_base(r2d3.Config(), "cpu")
    assert speed.compile_blocks(base.net, "eager") == base.net.config.num_layers > 1
    with pytest.raises(ValueError, match="wanted compiled or channels_last, got 'faster'"):
        speed.speed_up(base, ["faster"])
