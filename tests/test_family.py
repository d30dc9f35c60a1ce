"""A family: its sizes are views of one set of weights, and learn as they would alone."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForMaskedLM

from limbeck.architecture.axes import Axis, Group, Member
from limbeck.architecture.cut import build_student, cut, full_shape, student_config
from limbeck.architecture.inputs import example_inputs
from limbeck.architecture.probe import find_axes
from limbeck.elastic import ElasticStep, Sampling
from limbeck.errors import AxisError
from limbeck.family import Family
from limbeck.objective import Objective
from limbeck.progress import Silent
from limbeck.recipe import TrainingSpec
from limbeck.shared_adamw import Piece, SharedAdamW, clip, gather
from limbeck.step import Step, Training
from limbeck.temperature import Fixed
from limbeck.train import train
from limbeck.types import Batch, Shape, Signal
from tiny_models import bert_axes, bert_config, build, logits, random_model
from tiny_world import Killed, KillsAt

LARGE = Shape({"hidden": 24, "heads": 3, "ffn": 40}, (0, 2))
SMALL = Shape({"hidden": 16, "heads": 2, "ffn": 20}, (2,))
WIDE = Shape({"hidden": 16, "heads": 2, "ffn": 48}, (1,))  # neither in LARGE nor around it
SHAPES = {"large": LARGE, "wide": WIDE, "small": SMALL}


@pytest.fixture
def teacher():
    return random_model(bert_config())


def family(teacher, shapes=SHAPES):
    return Family(bert_config(), build, bert_axes(), shapes, teacher.state_dict())


def batch(start, end):
    ids = torch.randint(0, 99, (8, 6), generator=torch.Generator().manual_seed(0))[start:end]
    return Batch(
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        labels=torch.arange(8)[start:end] % 5,
        mask=torch.ones(end - start, dtype=torch.bool),
        example_ids=torch.arange(start, end),
    )


class Eight:
    num_views, num_together = 1, 32

    def __len__(self):
        return 8

    def batch(self, positions):
        return batch(min(positions), max(positions) + 1)


class Known:
    """A teacher that says something else about each example."""

    def signal(self, batch, needs):
        table = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
        return Signal(logits=table[batch.example_ids])


class Lesson(Training):
    """The same eight examples in every step, cut where the test says."""

    cuts = ()

    def batches(self, step):
        ends = [0, *self.cuts, 8]
        return [batch(a, b) for a, b in itertools.pairwise(ends)]


@pytest.fixture(autouse=True)
def cut_as_told(monkeypatch):
    plain = Step.batches

    def batches(self, step):
        told = isinstance(self.training, Lesson)
        return self.training.batches(step) if told else plain(self, step)

    monkeypatch.setattr(Step, "batches", batches)


def lesson(*cuts):
    made = Lesson(
        rows=Eight(), teacher=Known(), seed=0, title="",
        objective=Objective(temperature=Fixed(2.0), soft_weight=0.25, hard_weight=0.75),
        spec=TrainingSpec(epochs=1, batch_size=8, learning_rate=1e-2),
    )  # fmt: skip
    object.__setattr__(made, "cuts", cuts)
    return made


def gradient(family, names, *cuts):
    """(pieces, each size's loss) of a step in which these sizes are active."""
    step = ElasticStep(family, lesson(*cuts), Sampling(policy="all"))
    step.steps = {name: step.steps[name] for name in names}
    found = step(0, look=False)
    return found.pieces, {n: sum(f.terms.values()) for n, f in found.sizes.items()}


def scattered(family, pieces):
    """The whole gradient, dense."""
    found = {name: torch.zeros_like(w) for name, w in family.weights.items()}
    for piece in pieces:
        region = found[piece.name][piece.region]
        if piece.rows is None:
            region += piece.values
        else:
            region[piece.rows] += piece.values
    return found


def test_sizes_are_views_and_nothing_is_held_twice(teacher):
    fam = family(teacher)
    held = {w.untyped_storage().data_ptr() for w in fam.weights.values()}
    for size in fam.sizes.values():
        for parameter in size.model.parameters():
            assert parameter.untyped_storage().data_ptr() in held
    floats = sum(w.untyped_storage().nbytes() for w in fam.weights.values()) // 4
    # what the largest size along each axis needs: 3 layers of width 24, ffn 48
    hull = Shape({"hidden": 24, "heads": 3, "ffn": 48}, (0, 1, 2))
    around = build(student_config(bert_config(), bert_axes(), hull))
    assert floats == sum(p.numel() for p in around.parameters())


def test_the_teacher_is_neither_changed_nor_shared(teacher):
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    fam = family(teacher, {"full": full_shape(bert_axes())})
    for weight in fam.weights.values():
        weight.add_(1)
    assert all(torch.equal(before[n], t) for n, t in teacher.state_dict().items())


def test_each_size_is_the_cut_student_and_is_extracted_as_it_is(teacher):
    fam = family(teacher)
    for name, shape in SHAPES.items():
        student = build_student(bert_config(), build, bert_axes(), shape, teacher.state_dict())
        torch.testing.assert_close(logits(fam.sizes[name].model), logits(student),
                                   rtol=1e-5, atol=1e-6)  # fmt: skip
    for weight in fam.weights.values():
        weight.mul_(1.1)
    for name, size in fam.sizes.items():
        alone = fam.extract(name)
        assert torch.equal(logits(alone), logits(size.model))
        held = {w.untyped_storage().data_ptr() for w in fam.weights.values()}
        assert not held & {p.untyped_storage().data_ptr() for p in alone.parameters()}


def test_the_teachers_shape_is_the_teacher_bitwise(teacher):
    fam = family(teacher, {"full": full_shape(bert_axes()), "small": SMALL})
    assert torch.equal(logits(fam.sizes["full"].model), logits(teacher))


def test_what_one_size_learns_the_others_have(teacher):
    fam = family(teacher)
    before = {name: logits(size.model) for name, size in fam.sizes.items()}
    with torch.no_grad():
        fam.sizes["small"].model.bert.encoder.layer[0].output.dense.weight.mul_(2)
    after = {name: logits(size.model) for name, size in fam.sizes.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"large", "small"}, "wide has another layer"


def test_the_gradient_is_the_sum_of_the_sizes_own_scattered_into_place(teacher):
    """Against autograd through the teacher's whole weights."""
    fam, work = family(teacher), lesson()
    pieces, losses = gradient(fam, SHAPES)
    found = scattered(fam, pieces)
    whole = {n: t.detach().requires_grad_() for n, t in teacher.state_dict().items()}
    (data,) = work.batches(0)
    for name, shape in SHAPES.items():
        model = build(student_config(bert_config(), bert_axes(), shape)).eval()
        out = functional_call(model, cut(whole, bert_axes(), shape), (), dict(data.inputs)).logits
        terms = work.objective.terms(Signal(logits=out), Known().signal(data, frozenset()), data)
        loss = sum(term.total for term in terms.values()) / 8
        torch.testing.assert_close(losses[name], loss.detach())
        (loss / len(SHAPES)).backward()
    for name, ours in found.items():
        expected = whole[name].grad
        region = tuple(slice(0, n) for n in ours.shape)
        torch.testing.assert_close(ours, expected[region], rtol=1e-4, atol=1e-6)
        assert expected.norm() == pytest.approx(float(ours.norm()), rel=1e-4, abs=1e-6)
    total = torch.cat([t.grad.flatten() for t in whole.values() if t.grad is not None]).norm()
    torch.testing.assert_close(clip(pieces, 1e9), total, rtol=1e-4, atol=1e-6)
    clip(pieces, 0.01)
    torch.testing.assert_close(clip(pieces, 1e9), torch.tensor(0.01), rtol=1e-3, atol=0)


def test_the_gradient_does_not_depend_on_the_micro_batches(teacher):
    fam = family(teacher)
    once, losses = gradient(fam, SHAPES)
    thrice, same = gradient(fam, SHAPES, 3, 5)
    whole = scattered(fam, once)
    for name, found in scattered(fam, thrice).items():
        torch.testing.assert_close(found, whole[name], rtol=1e-4, atol=1e-6)
    for name in SHAPES:
        torch.testing.assert_close(losses[name], same[name])


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("region", [(slice(0, 6), slice(0, 5)), (slice(0, 4), slice(0, 3))])
def test_adamw_is_torchs_on_what_has_a_gradient(region, decay):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 5, generator=random)
    theirs = weight[region].clone().requires_grad_()
    before = weight.clone()
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.98), weight_decay=decay)
    ours = SharedAdamW({"w": weight}, {"w": 2e-2}, decay)
    for number in (1, 2, 3):
        theirs.grad = torch.randn(theirs.shape, generator=random)
        reference.step()
        ours.step([Piece("w", region, theirs.grad.clone())], number=number, factor=0.5)
    torch.testing.assert_close(weight[region], theirs.detach())
    assert (weight != before).sum() == theirs.numel(), "the rest rests"


@pytest.mark.parametrize("dense_at", [None, 21])
def test_rows_of_a_table_move_as_in_dense_adamw_used_or_not(dense_at):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 4, generator=random)
    theirs = weight.clone().requires_grad_()
    untouched = weight[8].clone()
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.98), weight_decay=0.0)
    ours = SharedAdamW({"w": weight}, {"w": 1e-2}, 0.0, ["w"])
    for number in range(1, 41):
        factor = 1 - number / 50
        reference.param_groups[0]["lr"] = 1e-2 * factor
        theirs.grad = torch.zeros_like(theirs)
        rows = torch.tensor([0, 1 + number % 7] if number % 3 else [1 + number % 5])
        width = 4 if number % 2 else 2
        values = torch.randn(len(rows), width, generator=random)
        theirs.grad[rows, :width] = values
        reference.step()
        region = (slice(None), slice(0, width))
        piece = Piece("w", region, values.clone(), rows)
        if number == dense_at:
            piece = Piece("w", (slice(0, 9), slice(0, 4)), theirs.grad.clone())
        ours.step([piece], number=number, factor=factor)
    ours.settle(40)
    torch.testing.assert_close(weight, theirs.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(weight[8], untouched)


def test_what_no_active_size_reads_rests(teacher):
    fam = family(teacher)
    before = {name: w.clone() for name, w in fam.weights.items()}
    optimizer = SharedAdamW(fam.weights, dict.fromkeys(fam.weights, 1e-2), 0.0, fam.tables)
    pieces, _ = gradient(fam, ["small"])
    optimizer.step(pieces, number=1, factor=1.0)
    words = "bert.embeddings.word_embeddings.weight"
    used = lesson().batches(0)[0].inputs["input_ids"].unique()
    idle = torch.ones(99, dtype=torch.bool).index_fill(0, used, False)
    assert torch.equal(fam.weights[words][idle], before[words][idle])
    assert torch.equal(fam.weights[words][:, 16:], before[words][:, 16:])
    assert (fam.weights[words][used, :16] != before[words][used, :16]).all()
    dense = "bert.encoder.layer.2.intermediate.dense.weight"
    assert torch.equal(fam.weights[dense][20:], before[dense][20:])
    assert (fam.weights[dense][:20, :16] != before[dense][:20, :16]).all()
    other = "bert.encoder.layer.0.intermediate.dense.weight"
    assert torch.equal(fam.weights[other], before[other])


NAMES = ("a", "b", "c", "d", "e")


def draws(sampling, seed=0, steps=200):
    return [
        sampling.active(NAMES, seed=seed, step=step, done=step / steps) for step in range(steps)
    ]


def test_draws_follow_from_seed_and_step_alone():
    for sampling in (Sampling(policy="sandwich"), Sampling(shares={"a": 1, "e": 3})):
        assert draws(sampling) == draws(sampling)
        assert draws(sampling) != draws(sampling, seed=1)


def test_one_size_a_step_in_its_share_over_any_stretch():
    shares = {"a": 0.1, "b": 0.1, "c": 0.2, "d": 0.2, "e": 0.4}
    drawn = [name for (name,) in draws(Sampling(shares=shares))]
    for start in range(0, 200, 50):
        counts = Counter(drawn[start : start + 50])
        assert all(abs(counts[n] - 50 * share) <= 3 for n, share in shares.items())
    uniform = Counter(name for (name,) in draws(Sampling()))
    assert all(abs(uniform[name] - 40) <= 3 for name in NAMES)


def test_shares_may_change_on_the_way():
    sampling = Sampling(shares={"e": 1}, late_shares={"a": 1}, switch=0.75)
    assert draws(sampling) == [["e"]] * 150 + [["a"]] * 50


def test_each_size_has_its_own_learning_rate():
    sampling = Sampling(rates={"a": 1.0, "e": 3.0})
    assert [sampling.rate([name]) for name in ("a", "b", "e")] == [1.0, 1.0, 3.0]
    assert sampling.rate(["a", "e"]) == 2.0
    assert Sampling().rate(NAMES) == 1.0


def test_a_sandwich_has_both_ends_and_one_of_each_half():
    drawn = draws(Sampling(policy="sandwich"))
    assert {tuple(names) for names in drawn} == {("a", m, "d", "e") for m in "bc"}
    assert Sampling(policy="sandwich").active(("a", "b"), seed=0, step=0, done=0) == ["a", "b"]
    assert draws(Sampling(policy="all"))[0] == [*NAMES]


def test_tied_weights_are_held_once():
    make = AutoModelForMaskedLM.from_config
    axes = [replace(a, proved=a.name in ("hidden", "heads", "ffn", "layers"))
            for a in find_axes(bert_config(), make)]  # fmt: skip
    state = make(bert_config()).eval().state_dict()
    fam = Family(bert_config(), make, axes, {"small": SMALL}, state)
    model = fam.sizes["small"].model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(tuple(w.shape) == (99, 16) for w in fam.weights.values()) == 1
    out = model(**example_inputs(model, model.config)).logits
    table = model.get_input_embeddings().weight
    (gradient,) = torch.autograd.grad(out.square().sum(), [table])
    assert not gradient.is_sparse
    assert (gradient[1:] != 0).all(), "as an output every row has one, but the padding's"
    assert torch.equal(logits(fam.extract("small")), out.detach())


class Packed(nn.Module):
    """Three segments in one matrix, and a BatchNorm."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(4, 3 * config.units)
        self.norm = nn.BatchNorm1d(config.units)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.norm(q * k + v)


def packed_family():
    plain = ("weight", "bias", "running_mean", "running_var")
    members = (
        *(Member(f"qkv.{n}", 0, segments=(1, 1, 1)) for n in ("weight", "bias")),
        *(Member(f"norm.{n}", 0) for n in plain),
    )
    axis = Axis(name="units", fields={"units": 1}, size=4, proved=True,
                groups=(Group("units", 4, members),))  # fmt: skip
    torch.manual_seed(0)
    config = SimpleNamespace(units=4)
    whole = Packed(config)
    whole.norm.running_mean.normal_()
    shapes = {"whole": Shape({"units": 4}, ()), "half": Shape({"units": 2}, ())}
    return whole, Family(config, Packed, [axis], shapes, whole.state_dict())


def test_packed_weights_are_renewed_and_their_gradient_is_put_in_place():
    whole, fam = packed_family()
    half = fam.sizes["half"]
    fam.weights["qkv.weight"].mul_(2)
    half.refresh(fam.weights)
    rows = [0, 1, 4, 5, 8, 9]
    assert torch.equal(half.model.qkv.weight, 2 * whole.qkv.weight[rows])
    gradients = [torch.ones_like(p) for p in half.model.parameters()]
    found = scattered(fam, gather(fam, [(half, gradients)]))
    assert found["qkv.weight"].sum(1).tolist() == [4.0 * (i in rows) for i in range(12)]
    assert found["norm.weight"].tolist() == [1, 1, 0, 0]


def test_batchnorms_statistics_are_each_sizes_own():
    whole, fam = packed_family()
    half = fam.sizes["half"].model
    assert torch.equal(half.norm.running_mean, whole.norm.running_mean[:2])
    before = fam.sizes["whole"].model.norm.running_mean.clone()
    half.train()(torch.randn(8, 4))
    assert not torch.equal(half.norm.running_mean, before[:2])
    assert torch.equal(fam.sizes["whole"].model.norm.running_mean, before)
    assert torch.equal(fam.extract("half").norm.running_mean, half.norm.running_mean)


def test_a_shape_off_the_grid_is_refused(teacher):
    with pytest.raises(AxisError, match="multiples of 8"):
        family(teacher, {"odd": Shape({"hidden": 20, "heads": 2}, (0,))})


def test_a_killed_run_ends_with_the_same_weights_and_the_log_names_the_sizes(
    teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr("limbeck.train._SAVE_EVERY", 0.0)
    work = replace(lesson(), spec=TrainingSpec(epochs=12, batch_size=8, learning_rate=1e-2),
                   validate=lambda model: float(model.config.hidden_size))  # fmt: skip
    sampling = Sampling(shares={"large": 1, "wide": 1, "small": 2}, rates={"small": 2.0})

    def trained(folder, *kills):
        folder.mkdir(exist_ok=True)
        for kill in kills:
            with pytest.raises(Killed):
                train(family(teacher), work, folder, KillsAt(kill), sampling)
        fam = family(teacher)
        train(fam, work, folder, Silent(), sampling)
        return fam.weights

    whole, killed = trained(tmp_path / "whole"), trained(tmp_path / "killed", 3, 5)
    assert all(torch.equal(weight, killed[name]) for name, weight in whole.items())
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["training.jsonl"]
    last = json.loads((tmp_path / "whole/training.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 12
    assert last["validation"] == (24 + 16 + 16) / 3
    assert last["validations"]["large"] == 24
    active = sampling.active([*SHAPES], seed=0, step=11, done=11 / 12)
    assert last["sizes"][active[0]] == last["loss"] > 0


def test_a_plain_model_is_a_family_of_one(teacher):
    one = Family.of_one(teacher)
    assert {w.data_ptr() for w in one.weights.values()} == {
        p.data_ptr() for p in teacher.parameters()
    }
    (size,) = one.sizes.values()
    assert size.model is teacher
