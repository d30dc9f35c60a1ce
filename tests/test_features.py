"""Hidden states and embeddings as terms: layer maps, projectors, what counts and what does not."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, MobileNetV2Config

from limbeck.features import Feature
from limbeck.layermap import by_cka, last, layer_pairs, similarities, uniform
from limbeck.losses.hidden import relation_kl
from limbeck.losses.relational import cka, rkd_angle, rkd_distance
from limbeck.objective import Objective
from limbeck.observe import Observer, by_place, tokens
from limbeck.progress import Silent
from limbeck.recipe_teaching import TrainingSpec
from limbeck.step import Step, Training, start_features
from limbeck.train import train
from limbeck.types import Batch, Need, Signal
from tiny_models import bert_config, random_model

ALL = frozenset({Need.LOGITS, Need.HIDDEN, Need.EMBEDDING})


class Rows:
    num_views, num_together = 1, 32

    def __len__(self):
        return 48

    def batch(self, positions):
        ids = torch.tensor(list(positions))
        tokens = (ids[:, None] * 7 + torch.arange(6) * 11) % 97 + 1
        mask = torch.arange(6) < (3 + ids[:, None] % 4)
        return Batch(
            inputs={"input_ids": tokens, "attention_mask": mask.long()}, labels=ids % 5,
            mask=torch.ones(len(ids), dtype=torch.bool), example_ids=ids,
        )  # fmt: skip


def states(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signals(wide=12, seed=0):
    batch = Rows().batch(range(5))
    ours = Signal(
        hidden={"1": states(5, 6, 8, seed=seed), "2": states(5, 6, 8, seed=seed + 1)},
        embedding=states(5, 8, seed=seed + 2),
    )
    theirs = Signal(
        hidden={"1": states(5, 6, wide, seed=seed + 3), "3": states(5, 6, wide, seed=seed + 4)},
        embedding=states(5, wide, seed=seed + 5),
    )
    return ours, theirs, batch


PAIRS = (("1", "1"), ("2", "3"))
HIDDEN = {"mse": {}, "cosine": {}, "relation": {"relation_heads": 4}, "cka": {}}
EMBEDDING = ("mse", "cosine", "similarity_kl", "rkd_distance", "rkd_angle", "cka")


def by_hand(loss, ours, theirs, mask):
    """Mean over the tokens, from torch's own functions or the losses' on the plain rows."""
    if loss == "relation":
        value = relation_kl((ours, ours), (theirs, theirs), mask=mask, relation_heads=4)
        return value[mask].mean()
    a, b = ours[mask], theirs[mask]
    if loss == "mse":
        return F.mse_loss(a, b)
    if loss == "cosine":
        return 1 - F.cosine_similarity(a, b).mean()
    return 1 - cka(a, b)


def test_states_of_an_image_are_the_means_of_its_quarters_whatever_the_architecture():
    maps = states(3, 5, 4, 6, seed=0)
    found = by_place(maps)
    assert found.shape == (3, 4, 5)
    wanted = [maps[:, :, y : y + 2, x : x + 3].mean((2, 3)) for y in (0, 2) for x in (0, 3)]
    assert torch.allclose(found, torch.stack(wanted, 1), atol=1e-6)
    square = states(3, 5, 4, 4, seed=1)
    patches = square.flatten(2).transpose(1, 2)  # (B, 16, D), in reading order
    for others in (0, 1, 2):  # class and distillation tokens stand before the patches
        sequence = torch.cat([torch.full((3, others, 5), 99.0), patches], 1)
        assert torch.allclose(by_place(sequence), by_place(square), atol=1e-6)
    one = by_place(square[:, :, :1, :1])
    assert torch.equal(one, by_place(square[:, :, 0, 0])) and one.shape == (3, 4, 5)
    images = Batch(
        inputs={"pixel_values": states(3, 1, 8, 8, seed=2)}, labels=torch.arange(3),
        mask=torch.ones(3).bool(), example_ids=torch.arange(3),
    )  # fmt: skip
    assert tokens(images).shape == (3, 4) and tokens(images).all()


@pytest.mark.parametrize("loss", HIDDEN)
def test_a_hidden_term_is_the_mean_over_tokens_and_pairs_times_its_weight(loss):
    ours, theirs, batch = signals(wide=8)
    mask = batch.inputs["attention_mask"].bool()
    term = Feature(loss=loss, weight=3.0, pairs=PAIRS, settings=HIDDEN[loss])(ours, theirs, batch)
    each = [by_hand(loss, ours.hidden[a], theirs.hidden[b], mask) for a, b in PAIRS]
    assert term.count == mask.sum()
    torch.testing.assert_close(term.total / term.count, 3 * sum(each) / 2)


@pytest.mark.parametrize("loss", EMBEDDING)
def test_an_embedding_term_is_the_mean_over_examples(loss):
    ours, theirs, batch = signals(wide=8)
    a, b = ours.embedding, theirs.embedding
    term = Feature(loss=loss, weight=2.0)(ours, theirs, batch)
    if loss == "similarity_kl":
        drop = ~torch.eye(5, dtype=torch.bool)
        side = [F.cosine_similarity(x[:, None], x[None], dim=-1)[drop].view(5, 4) / 0.1
                for x in (a, b)]  # fmt: skip
        expected = F.kl_div(*(s.log_softmax(-1) for s in side), log_target=True,
                            reduction="batchmean")  # fmt: skip
    else:
        expected = {
            "mse": lambda: F.mse_loss(a, b),
            "cosine": lambda: 1 - F.cosine_similarity(a, b).mean(),
            "rkd_distance": lambda: rkd_distance(a, b).mean(),
            "rkd_angle": lambda: rkd_angle(a, b).mean(),
            "cka": lambda: 1 - cka(a, b),
        }[loss]()
    assert term.count == 5
    torch.testing.assert_close(term.total / 5, 2 * expected)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_a_projector_starts_from_least_squares_where_widths_differ_and_only_there(loss):
    ours, _, batch = signals()
    mask = batch.inputs["attention_mask"].bool()
    matrix = states(8, 12, seed=9)
    theirs = Signal(hidden={"1": ours.hidden["1"] @ matrix, "3": ours.hidden["2"]})
    feature = Feature(loss=loss, weight=1.0, pairs=PAIRS)
    feature.start(ours, theirs, batch)
    assert [*feature.projectors] == ["0"], "equal widths are compared as they are"
    # 21 tokens fix 8 x 12 numbers up to the ridge
    torch.testing.assert_close(feature.projectors["0"].weight.T, matrix, rtol=0.02, atol=0.02)
    assert feature(ours, theirs, batch).total / mask.sum() < 1e-3
    bare = Feature(loss="cka", weight=1.0, pairs=PAIRS)
    bare.start(ours, theirs, batch)
    assert not [*bare.parameters()]


@pytest.mark.parametrize("loss", HIDDEN)
def test_padding_has_no_gradient_and_neither_has_the_teacher(loss):
    ours, theirs, batch = signals(wide=8)
    mask = batch.inputs["attention_mask"].bool()
    a, b = (side.hidden["1"].masked_fill(~mask[..., None], torch.nan) for side in (ours, theirs))
    a, b = a.requires_grad_(), b.requires_grad_()
    feature = Feature(loss=loss, weight=1.0, pairs=(("1", "1"),), settings=HIDDEN[loss])
    feature(Signal(hidden={"1": a}), Signal(hidden={"1": b}), batch).total.backward()
    assert (a.grad[~mask] == 0).all()
    assert a.grad[mask].abs().max() > 1e-4
    assert b.grad is None


def test_maps():
    assert last(3, 6) == [("3", "6")]
    assert uniform(3, 6) == [("1", "2"), ("2", "4"), ("3", "6")]
    assert uniform(2, 5) == [("1", "3"), ("2", "5")]
    assert uniform(4, 2) == [("2", "1"), ("4", "2")]
    alike = torch.tensor([[0.1, 0.9, 0.2, 0.1], [0.2, 0.95, 0.3, 0.7]])
    assert by_cka(alike) == [("1", "2"), ("2", "4")], "in order, though 2 is more like 2"
    assert by_cka(alike.T) == [("2", "1"), ("4", "2")]


def test_the_map_by_cka_is_the_best_of_all_in_order():
    import itertools

    alike = torch.rand(3, 6, generator=torch.Generator().manual_seed(4))
    best = max(
        itertools.combinations(range(6), 3),
        key=lambda columns: sum(float(alike[i, j]) for i, j in enumerate(columns)),
    )
    assert by_cka(alike) == [(str(i + 1), str(j + 1)) for i, j in enumerate(best)]


def test_a_student_of_the_first_layers_finds_them():
    model = random_model(bert_config())
    batch = Rows().batch(range(32))
    mask = batch.inputs["attention_mask"].bool()
    with torch.no_grad():
        hidden = [h[mask] for h in [*Observer(model)(batch, ALL).hidden.values()][1:]]
    assert layer_pairs("auto", hidden[:2], hidden) == [("1", "1"), ("2", "2")]
    torch.testing.assert_close(similarities(hidden, hidden).diag(), torch.ones(3))


def test_an_observer_hears_modules_by_path_in_several_threads_and_lets_go():
    model = random_model(bert_config())
    path = "bert.encoder.layer.1.attention.self.value"
    observe = Observer(model, (path, "2"))
    batches = [Rows().batch(range(i, i + 4)) for i in range(6)]
    alone = []
    for batch in batches:
        found = observe(batch, ALL)
        assert [*found.hidden] == [path, "2"]
        below = model(**batch.inputs, output_hidden_states=True).hidden_states[1]
        expected = model.get_submodule(path)(below)
        torch.testing.assert_close(found.hidden[path], expected)
        alone.append(found.hidden[path].detach())
    heard = {}

    def listen(i):
        with torch.no_grad():
            heard[i] = observe(batches[i], ALL).hidden[path]

    threads = [threading.Thread(target=listen, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, states_ in enumerate(alone):
        torch.testing.assert_close(heard[i], states_)
    observe.close()
    assert not model.get_submodule(path)._forward_hooks


class Live:
    fingerprint = "t"
    provides = ALL

    def __init__(self, layers):
        self.observe = Observer(random_model(bert_config(), seed=5), layers)

    @torch.no_grad()
    def signal(self, batch, needs):
        return self.observe(batch, needs)


def lesson(**changes):
    features = (
        Feature(loss="mse", weight=1.0, pairs=(("1", "1"), ("2", "3"))),
        Feature(loss="cosine", weight=0.5),
    )
    settings = {"epochs": 4, "batch_size": 16, "learning_rate": 3e-3, **changes}
    objective = Objective(soft_weight=1.0, hard_weight=0.5, features=features)
    return Training(
        rows=Rows(), teacher=Live(("1", "3")), objective=objective, seed=0, title="t",
        spec=TrainingSpec(**settings),
    )  # fmt: skip


def small():
    config = bert_config()
    config.hidden_size, config.num_hidden_layers = 16, 2
    return random_model(config)


def test_a_training_lowers_its_loss_and_saves_no_projector(tmp_path):
    model = small()
    names = {*model.state_dict()}
    training = replace(lesson(epochs=30), looks=20)
    train(model, training, tmp_path, Silent())
    assert {*model.state_dict()} == names
    moved = [p for feature in training.objective.features for p in feature.parameters()]
    assert len(moved) == 3
    points = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert {*points[0]["terms"]} == {"soft", "hard", "hidden", "embedding"}
    assert points[-1]["loss"] < 0.8 * points[0]["loss"]
    # the projectors start well, so there is little left to gain
    assert points[-1]["terms"]["hidden"] < 0.95 * points[0]["terms"]["hidden"]
    assert len(points[0]["cosines"]) == 6


class Pictures(Rows):
    """Rows, and a teacher that knows an embedding of each."""

    fingerprint, provides = "t", frozenset({Need.EMBEDDING})

    def batch(self, positions):
        ids = torch.tensor(list(positions))
        at = torch.arange(3 * 40 * 40).view(3, 40, 40) / 500
        pixels = torch.cos(at * (1 + ids[:, None, None, None] % 7))
        return Batch(
            inputs={"pixel_values": pixels}, labels=ids % 5,
            mask=torch.ones(len(ids), dtype=torch.bool), example_ids=ids,
        )  # fmt: skip

    def signal(self, batch, needs):
        return Signal(embedding=torch.cos(batch.example_ids[:, None] * torch.arange(1.0, 7)))


def test_a_projector_starts_from_states_as_they_are_learnt_of_a_model_without_statistics(tmp_path):
    """A random MobileNetV2 in eval mode says 1e-20: the projector was 1e24, its gradient 0."""
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(
        MobileNetV2Config(depth_multiplier=0.35, image_size=40, num_labels=5)
    )
    training = Training(
        rows=Pictures(), teacher=Pictures(), seed=0, title="t", looks=2,
        objective=Objective(hard_weight=1.0, features=(Feature(loss="cosine", weight=0.5),)),
        spec=TrainingSpec(epochs=0.5, batch_size=12, learning_rate=1e-3),
    )  # fmt: skip
    train(model, training, tmp_path, Silent())
    (projector,) = [p for f in training.objective.features for p in f.parameters()]
    assert float(projector.detach().abs().max()) < 1e3
    first = json.loads((tmp_path / "training.jsonl").read_text().splitlines()[0])
    assert first["gradients"]["embedding"] > 1e-3 * first["gradients"]["hard"]
    assert first["terms"]["embedding"] < 0.5


def gradient(**changes):
    model = small()
    step_of = Step(model, lesson(**changes), [*model.parameters()])
    start_features(step_of)
    found = step_of(0, look=False)
    return [torch.zeros(()) if g is None else g for g in found.gradient], found.terms


@pytest.mark.parametrize("micro_batch", [1, 3, 16])
def test_micro_batches_change_neither_gradient_nor_terms(micro_batch):
    whole, terms = gradient()
    parts, same = gradient(micro_batch=micro_batch)
    assert len(whole) == len([*small().parameters()]) + 3
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(same, terms)


def test_a_killed_training_ends_with_the_same_weights_and_projectors(tmp_path, monkeypatch):
    from limbeck import train as loop

    monkeypatch.setattr(loop, "_SAVE_EVERY", 0.0)
    whole = small()
    kept = lesson()
    (tmp_path / "a").mkdir()
    train(whole, kept, tmp_path / "a", Silent())

    class Killed(Exception):
        pass

    def kill(self, *args):
        if args[0] == 6:
            raise Killed
        return original(self, *args)

    original = loop._Checkpoint.save
    monkeypatch.setattr(loop._Checkpoint, "save", kill)
    (tmp_path / "b").mkdir()
    with pytest.raises(Killed):
        train(small(), lesson(), tmp_path / "b", Silent())
    monkeypatch.setattr(loop._Checkpoint, "save", original)
    again, other = small(), lesson()
    train(again, other, tmp_path / "b", Silent())
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    for ours, theirs in zip(kept.objective.features, other.objective.features, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


def test_upgrad_trains_the_projectors_too():
    pytest.importorskip("torchjd")
    from limbeck.balance import UPGrad

    model = small()
    step_of = Step(model, lesson(), [*model.parameters()])
    start_features(step_of)
    step_of.balance = UPGrad()
    found = step_of(0, look=False)
    plain, _ = gradient()
    torch.testing.assert_close(found.gradient[-3:], plain[-3:])


FEATURES = ("distill.hidden={loss: cosine, weight: 0.5}", "distill.embedding={loss: rkd_distance}")


def test_a_run_learns_from_stored_states_by_its_own_map(tiny, tmp_path, quick):
    from limbeck import load_report
    from limbeck.cli import main
    from limbeck.signals.store import open_store

    settings = [word for change in FEATURES for word in ("--set", change)]
    out = tmp_path / "out"
    command = ["distill", str(tiny / "recipe.yaml"), "--out", str(out), *settings]
    assert main(command) == 0
    maps = json.loads((out / "features/maps.json").read_text())
    pairs = maps["one"]["pairs"]
    layers = {theirs for _, theirs in pairs}
    assert {*open_store(out / "features/hidden").codec.layers} == layers
    assert len(open_store(out / "features/embedding")) == len(open_store(out / "signals"))
    report = load_report(out)
    assert f"{pairs[0][0]} from {pairs[0][1]}" in report.students[0].reason
    points = report.training["one"]
    assert {*points[-1].terms} == {"soft", "hard", "hidden", "embedding"}
    assert not [n for n in (out / "students/one/hf").rglob("*") if "projector" in n.name]
    before = (out / "features/maps.json").stat().st_mtime_ns
    assert main(command) == 0, "and again: nothing is made"
    assert (out / "features/maps.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("distill.hidden={layers: [[9, 1]]}", "no layer 9 in the student"),
        ("distill.hidden={layers: [[1, bert.nowhere]]}", "no layer bert.nowhere in the teacher"),
        ("distill.hidden={layers: []}", "one pair or more"),
        ("distill.hidden={relation_heads: 4}", "no effect with cosine"),
        ("distill.embedding={temperature: 0.5}", "no effect with cosine"),
        ("distill.hidden={loss: mahalanobis}", "mahalanobis"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(distil, quick, change, said):
    assert said in distil(change)
