"""Several terms, one gradient: what each balance promises."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from limbeck import step
from limbeck.balance import Balance, Uncertainty, calibrated
from limbeck.objective import Objective
from limbeck.progress import Silent
from limbeck.recipe_teaching import TrainingSpec
from limbeck.temperature import Fixed
from limbeck.train import LOG, train
from limbeck.types import Batch, Signal

CLASSES = 5


class Rows:
    num_views, num_together = 1, 32

    def __len__(self):
        return 64

    def batch(self, positions):
        ids = torch.tensor(list(positions))
        x = torch.sin(ids[:, None] * torch.arange(1.0, 9.0))
        return Batch(inputs={"x": x}, labels=ids % CLASSES,
                     mask=torch.ones(len(ids), dtype=torch.bool), example_ids=ids)  # fmt: skip


class Teacher:
    fingerprint, provides = "t", frozenset()

    def signal(self, batch, needs):
        return Signal(logits=3 * torch.cos(batch.example_ids[:, None] * torch.arange(1.0, 6.0)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.out = nn.Linear(8, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        return SimpleNamespace(logits=self.out(self.inner(x).tanh()))


def training(balance="fixed", **changes):
    settings = {"temperature": Fixed(2.0), "soft_weight": 1.0, "hard_weight": 0.5, **changes}
    return step.Training(
        rows=Rows(), teacher=Teacher(), objective=Objective(**settings), seed=0, title="t",
        spec=TrainingSpec(epochs=10, batch_size=16, learning_rate=1e-2), balance=balance,
    )  # fmt: skip


def found(balance="fixed", folder=None, **changes):
    model = Model()
    step_of = step.Step(model, training(balance, **changes), [*model.parameters()])
    step_of.balance = step.start_balance(step_of, folder)
    return step_of, step_of(0, look=True)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def test_a_look_changes_nothing_and_sees_each_term():
    step_of, seen = found()
    assert torch.equal(flat(step_of(0, look=False).gradient), flat(seen.gradient))
    soft, _ = found(hard_weight=0.0)[1], None
    hard = found(soft_weight=0.0, hard_weight=0.5)[1]
    torch.testing.assert_close(flat(soft.gradient) + flat(hard.gradient), flat(seen.gradient))
    assert seen.norms["soft"] == pytest.approx(float(flat(soft.gradient).norm()), rel=1e-5)
    cosine = torch.cosine_similarity(flat(soft.gradient), flat(hard.gradient), dim=0)
    assert seen.cosines["soft", "hard"] == pytest.approx(float(cosine), abs=1e-5)


def test_calibrated_brings_the_norms_to_the_ratio_of_the_weights_and_stays_there(tmp_path):
    step_of, _ = found("calibrated", tmp_path, soft_weight=3.0, hard_weight=1.0)
    kept = json.loads((tmp_path / "balance.json").read_text())["norms"]
    factors = step_of.balance.factors
    ratio = kept["soft"] * factors["soft"] / (kept["hard"] * factors["hard"])
    assert ratio == pytest.approx(3.0)
    again, _ = found("calibrated", tmp_path, soft_weight=3.0, hard_weight=1.0)
    assert again.balance.factors == factors
    plain = found(soft_weight=3.0, hard_weight=1.0)[1]
    mean = flat(found("calibrated", tmp_path, soft_weight=3.0, hard_weight=1.0)[1].gradient)
    assert not torch.allclose(mean, flat(plain.gradient))


def test_a_term_without_gradient_leaves_the_others_alone():
    assert calibrated({"soft": 0.0, "hard": 2.0}, {"soft": 1.0, "hard": 1.0}).factors == {}


def test_uncertainty_starts_at_the_sum_and_learns_its_weights(tmp_path):
    terms = {"soft": torch.tensor(2.0), "hard": torch.tensor(0.1)}
    balance = Uncertainty(["soft", "hard"])
    assert balance.total(terms, 1.0) == Balance().total(terms, 1.0)
    halves = {name: term / 2 for name, term in terms.items()}
    balance.log_variance["soft"].data.fill_(0.3)
    torch.testing.assert_close(2 * balance.total(halves, 0.5), balance.total(terms, 1.0))
    model = Model()
    train(model, training("uncertainty"), tmp_path, Silent())
    last = json.loads((tmp_path / LOG).read_text().splitlines()[-1])
    assert last["weights"]["hard"] != 1.0 and last["weights"]["soft"] != 1.0
    assert not any("variance" in name for name in model.state_dict()), "never saved in the student"


def test_upgrad_worsens_no_term():
    pytest.importorskip("torchjd")
    conflict = {"soft_weight": 1.0, "hard_weight": 5.0}
    _, seen = found("upgrad", **conflict)
    terms = [found(hard_weight=0.0, soft_weight=1.0)[1], found(soft_weight=0.0, hard_weight=5.0)[1]]
    for term in terms:
        assert float(flat(term.gradient) @ flat(seen.gradient)) >= -1e-5


def test_upgrad_of_two_opposed_gradients_harms_neither():
    pytest.importorskip("torchjd")
    from limbeck.balance import UPGrad

    a, b = [torch.tensor([1.0, 0.0])], [torch.tensor([-3.0, 1.0])]
    (both,) = UPGrad().combined([a, b])
    assert float(both @ a[0]) >= -1e-5 and float(both @ b[0]) >= -1e-5
    same = UPGrad().combined([a, a])[0]
    torch.testing.assert_close(same, 2 * a[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("balance", ["fixed", "calibrated", "uncertainty", "upgrad"])
def test_a_training_teaches_and_logs_the_terms(tmp_path, balance):
    if balance == "upgrad":
        pytest.importorskip("torchjd")
    train(Model(), replace(training(balance), looks=20), tmp_path, Silent())
    points = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert points[-1]["terms"]["soft"] < 0.95 * points[0]["terms"]["soft"]
    looks = [p for p in points if "cosines" in p]
    assert len(looks) >= 15
    assert all(-1.001 <= p["cosines"]["soft, hard"] <= 1.001 for p in looks)
    assert all(p["gradients"]["soft"] > 0 for p in looks)


@pytest.mark.parametrize(("steps", "looks"), [(8, 4), (60, 4), (150, 6)])
def test_gradients_are_looked_at_rarely_in_a_short_training(tmp_path, steps, looks):
    lesson = training("fixed")
    epochs = steps * lesson.spec.batch_size / len(lesson.rows)
    lesson = replace(lesson, spec=lesson.spec.model_copy(update={"epochs": epochs}))
    assert lesson.steps == steps
    train(Model(), lesson, tmp_path, Silent())
    points = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert sum("cosines" in p for p in points) == looks


@pytest.mark.parametrize("balance", ["calibrated", "uncertainty"])
def test_a_training_that_was_cut_ends_with_the_same_weights(tmp_path, monkeypatch, balance):
    from limbeck import train as training_loop

    whole = Model()
    (tmp_path / "whole").mkdir()
    train(whole, training(balance), tmp_path / "whole", Silent())
    monkeypatch.setattr(training_loop, "_SAVE_EVERY", 0.0)
    save = training_loop._Checkpoint.save

    def cut(self, done):
        save(self, done)
        if done == 17:
            raise KeyboardInterrupt

    folder = tmp_path / "cut"
    folder.mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_loop._Checkpoint, "save", cut)
        train(Model(), training(balance), folder, Silent())
    again = Model()
    train(again, training(balance), folder, Silent())
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
