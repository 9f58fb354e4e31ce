"""First contact with weights: a base that is broken on purpose is told so, and a working one is not."""

import pytest
import torch
import torch.nn.functional as F

from support import checks
from support.checks import Splats
from support.metrics import Measurement

P, S, V, D, N = 4, 2, 4, 16, 500


def working() -> tuple[Measurement, Measurement, Splats]:
    """Measurements with and without guidance, and splats, as those of a base that works."""
    random = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(P, S, V, D, generator=random), dim=-1)
    alignment = 0.25 + 0.02 * torch.rand(P, S, generator=random)
    guided = Measurement(reward=torch.zeros(P, S), alignment=alignment, retrieved=torch.ones(P, S),
                         coverage=torch.full((P, S), 0.2), dnc=torch.ones(P, S), features=features,
                         fid_features=features, latents=torch.zeros(P, 3))
    unguided = guided._replace(alignment=alignment - 0.03 * torch.rand(P, S, generator=random))
    splats = Splats(scales=0.002 + 0.01 * torch.rand(P, N, 3, generator=random),
                    opacities=torch.rand(P, N, generator=random))
    return guided, unguided, splats


def test_a_working_base_has_no_fault(capsys):
    found = checks.faults(*working())
    checks.tell("the base", found)
    assert found == []
    assert "behaves as a working base does" in capsys.readouterr().err


def test_one_wrong_object_of_eight_is_no_fault():
    guided, unguided, splats = working()
    guided.retrieved[1, 1] = 0
    assert checks.faults(guided, unguided, splats) == []


@pytest.mark.parametrize("field, value, sentence", [
    ("coverage", torch.full((P, S), 0.004), "depths have another scale"),
    ("coverage", torch.full((P, S), 0.8), "as noise does"),
    ("features", torch.ones(P, S, V, D) / D ** 0.5, "different seeds look the same"),
    ("retrieved", torch.tensor([[1.0, 1.0], [0, 0], [0, 0], [0, 0]]), "text encoder"),
])
def test_a_broken_measurement_has_one_sentence_with_its_cause(field, value, sentence):
    guided, unguided, splats = working()
    fault, = checks.faults(guided._replace(**{field: value}), unguided, splats)
    assert sentence in fault
    assert "probably" in fault


@pytest.mark.parametrize("change", [0.0, 0.05])
def test_guidance_that_does_nothing_or_harm_is_told(change):
    guided, _, splats = working()
    fault, = checks.faults(guided, guided._replace(alignment=guided.alignment + change), splats)
    assert "empty prompt" in fault


@pytest.mark.parametrize("field, spoil, sentence", [
    ("opacities", lambda value: value * torch.nan, "not finite"),
    ("opacities", lambda value: 3 * value - 1, "laid out otherwise"),
    ("opacities", lambda value: 0.01 * value, "hardly any splat"),
    ("scales", lambda value: -value, "not positive"),
    ("scales", lambda value: 100 * value, "another range"),
    ("scales", lambda value: value / 1000, "another range"),
])
def test_broken_splats_are_told_alone(field, spoil, sentence):
    guided, unguided, splats = working()
    guided = guided._replace(coverage=torch.zeros(P, S))
    fault, = checks.faults(guided, unguided, splats._replace(**{field: spoil(getattr(splats, field))}))
    assert sentence in fault
    assert "probably" in fault


def test_faults_are_told_a_line_each(capsys):
    checks.tell("the base", ["one is wrong", "two is wrong"])
    assert capsys.readouterr().err.splitlines() == [
        "r2d3: the base: one is wrong", "r2d3: the base: two is wrong"]
