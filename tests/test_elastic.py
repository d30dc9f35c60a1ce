"""A family needs no settings: what its sizes' rates are without any."""

import pytest
from torch import nn

from limbeck.elastic import Sampling
from limbeck.family import Family
from limbeck.types import Shape
from tiny_models import bert_axes, bert_config, build, random_model

SHAPES = {
    "small": Shape({"hidden": 16, "heads": 2, "ffn": 20}, (2,)),
    "large": Shape({"hidden": 24, "heads": 3, "ffn": 40}, (0, 2)),
    "wide": Shape({"hidden": 16, "heads": 2, "ffn": 48}, (1,)),
}


@pytest.fixture
def family():
    state = random_model(bert_config()).state_dict()
    return Family(bert_config(), build, bert_axes(), SHAPES, state)


def by_hand(shape):
    """Of a BERT: four square matrices and two of the ffn a layer, the pooler, the classifier."""
    hidden, ffn = shape.sizes["hidden"], shape.sizes["ffn"]
    return len(shape.layers) * (4 * hidden**2 + 2 * hidden * ffn) + hidden**2 + 5 * hidden


def test_work_is_what_a_position_is_multiplied_with(family):
    assert {name: size.work for name, size in family.sizes.items()} == {
        name: by_hand(shape) for name, shape in SHAPES.items()
    }


def test_tied_weights_work_once_and_looked_up_ones_not_at_all():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(7, 3)
            self.other = nn.Embedding(5, 3)
            self.out = nn.Linear(3, 7)
            self.again = nn.Linear(3, 7)
            self.out.weight = self.again.weight = self.words.weight

    assert Family.of_one(Tied()).sizes["model"].work == 21


def test_less_work_gives_a_higher_rate_and_the_largest_has_one(family):
    rates = Sampling().for_family(family).rates
    work = {name: size.work for name, size in family.sizes.items()}
    assert rates["large"] == 1
    assert sorted(rates, key=rates.get) == sorted(work, key=work.get, reverse=True)
    assert (rates["small"] / rates["wide"]) ** 2.5 == pytest.approx(work["wide"] / work["small"])


def test_one_model_alone_has_the_rate_that_was_asked_for():
    assert Sampling().for_family(Family.of_one(nn.Linear(3, 2))).rate(["model"]) == 1
    assert Sampling().for_family(Family.of_one(nn.BatchNorm1d(3))).rate(["model"]) == 1


def test_what_was_given_stays(family):
    for sampling in (Sampling(rates={}), Sampling(rates={"small": 2.0}), Sampling(policy="all")):
        assert sampling.for_family(family) is sampling
        assert sampling.for_family(family).rate(["large"]) == 1


def test_what_is_never_drawn_only_lends_its_weights():
    names = ["a", "b", "c"]
    assert Sampling().drawn(names) == names
    assert Sampling(shares={"a": 0, "b": 2, "c": 1}).drawn(names) == ["b", "c"]
    late = Sampling(shares={"b": 1}, late_shares={"c": 1}, switch=0.5)
    assert late.drawn(names) == ["b", "c"]
    assert Sampling(policy="all", shares={"b": 1}).drawn(names) == names  # shares are for `one`
