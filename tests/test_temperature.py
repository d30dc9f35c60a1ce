"""How soft the targets are, at each step and for each example."""

import json

import pytest
import torch

from limbeck.errors import RecipeError
from limbeck.recipe_teaching import TemperatureSpec
from limbeck.temperature import (
    Fixed,
    PerExample,
    Schedule,
    temperature_of,
    temperature_of_entropy,
)


def spec(value):
    return TemperatureSpec.model_validate(value)


def test_each_form_of_the_setting_is_its_temperature():
    assert temperature_of(spec(3)) == Fixed(3)
    assert temperature_of(spec({"start": 4, "end": 1})) == Schedule(4, 1)
    assert temperature_of(spec({"entropy": 0.5})) == PerExample(0.5)
    assert temperature_of(spec("auto"), 4.0) == Fixed(4.0)
    assert spec("auto").candidates == (1.0, 2.0, 4.0, 8.0)
    with pytest.raises(RecipeError):
        temperature_of(spec("auto"))


@pytest.mark.parametrize(
    "value", [{}, {"start": 4}, {"fixed": 1, "entropy": 0.5}, 0, -1, "hot", {"candidates": [1]}]
)
def test_what_is_no_temperature_is_refused(value):
    with pytest.raises(ValueError):
        spec(value)


def test_a_schedule_goes_evenly_from_start_to_end():
    schedule = Schedule(4.0, 1.0)
    assert [schedule.at(done, None) for done in (0.0, 0.5, 1.0)] == [4.0, 2.5, 1.0]
    assert schedule.fixed is None and Fixed(2.0).fixed == 2.0


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_at_its_own_temperature_each_example_has_the_entropy_that_was_asked_for(share):
    scale = torch.logspace(-1, 1, 50).unsqueeze(1)
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * scale
    t = temperature_of_entropy(logits, share)
    probs = (logits / t.unsqueeze(1)).softmax(-1)
    entropy = torch.special.entr(probs).sum(-1) / torch.tensor(20.0).log()
    inside = (t > 0.011) & (t < 99)  # elsewhere the nearer end is given
    assert inside.sum() > 40
    off = (entropy - share)[inside].abs()
    assert off.max() < 1e-3
    assert (t[1:] > t[:-1]).float().mean() > 0.5, "what the teacher is sure of is softened more"


def test_extremes_give_an_end_of_the_range_and_no_nan():
    logits = torch.tensor([[0.0, 0.0, 0.0], [1e4, 0.0, -1e4], [0.0, -torch.inf, -torch.inf]])
    t = temperature_of_entropy(logits, 0.5)
    assert t.isfinite().all()
    assert t[0] < 0.011 and t[1] > 99 and t[2] > 99


def test_auto_tries_each_candidate_and_takes_the_least_loss(tiny, tmp_path, quick):
    from limbeck.cli import main

    out = tmp_path / "out"
    arguments = ["distill", str(tiny / "recipe.yaml"), "--out", str(out)]
    wish = "distill.temperature={candidates: [1, 3]}"
    assert main([*arguments, "--set", wish]) == 0
    found = json.loads((out / "students/one/temperature/temperature.json").read_text())
    assert [point["temperature"] for point in found["curve"]] == [1.0, 3.0]
    best = min(found["curve"], key=lambda point: point["loss"])
    assert found["chosen"] == best["temperature"]
    assert not list((out / "students/one/temperature").glob("trial*"))
    report = json.loads((out / "report.json").read_text())
    assert f"Temperature {best['temperature']:g} had" in report["students"][0]["reason"]
