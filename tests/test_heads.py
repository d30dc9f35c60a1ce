"""A model's last matrix is left to the loss: the same step as with logits, and no logits."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
)

import tiny_language
from limbeck import step
from limbeck.errors import RecipeError
from limbeck.heads import Tap, tap_head
from limbeck.objective import Objective
from limbeck.observe import Observer
from limbeck.progress import Silent
from limbeck.recipe_teaching import TrainingSpec
from limbeck.signals.capture import keys_of
from limbeck.signals.codecs import Sampled, TopK
from limbeck.teachers.live import LiveTeacher
from limbeck.temperature import Fixed, PerExample
from limbeck.train import train
from limbeck.types import Batch, Need, Signal
from tiny_models import bert_config, random_model

VOCAB = 61
WIDTHS = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**WIDTHS),
    "llama, tied": LlamaConfig(**WIDTHS, tie_word_embeddings=True),
    "gemma2, softcap": Gemma2Config(**WIDTHS, head_dim=8, final_logit_softcapping=3.0),
    "granite, divided": GraniteConfig(**WIDTHS, logits_scaling=4.0),
    "cohere, multiplied": CohereConfig(**WIDTHS, logit_scale=0.25),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=16, n_layer=2, n_head=2),
}


def causal(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


class Rows:
    num_views, num_together = 1, 32

    def __len__(self):
        return 24

    def batch(self, positions):
        ids = torch.tensor(list(positions))
        tokens = (ids[:, None] * 7 + torch.arange(9) * 11) % (VOCAB - 3) + 3
        mask = torch.arange(9) < (4 + ids[:, None] % 5)
        return Batch(
            inputs={"input_ids": tokens, "attention_mask": mask.long()},
            labels=tokens.roll(-1, 1), mask=mask, example_ids=ids,
        )  # fmt: skip


class Teacher:
    fingerprint, provides = "t", frozenset({Need.LOGITS})

    def __init__(self, codec=None):
        self.codec = codec

    def signal(self, batch, needs):
        at = batch.example_ids[:, None, None] + torch.arange(9)[:, None] * 3
        logits = 4 * torch.cos(at * torch.arange(1.0, VOCAB + 1))
        if self.codec is None:
            return Signal(logits=logits)
        flat = logits[batch.mask]
        fields = self.codec.encode(flat, keys_of(batch))
        return Signal(targets=self.codec.decode(fields, VOCAB, 2.0))


def stepped(model, backend, objective, codec=None, **changes):
    settings = {"epochs": 1, "batch_size": 24, "learning_rate": 1e-3, **changes}
    training = step.Training(
        rows=Rows(), teacher=Teacher(codec), objective=objective, seed=0, title="t",
        spec=TrainingSpec(backend=backend, **settings),
    )  # fmt: skip
    step_of = step.Step(model, training, [*model.parameters()])
    said = step.start_head(step_of)
    found = step_of(0, look=False), step_of(0, look=True)
    step_of.observe.close()
    return *found, said


def apart(a, b):
    """Norm of the difference over the norm of the reference, all parameters together."""
    a, b = (torch.cat([g.flatten() for g in side.gradient if g is not None]) for side in (a, b))
    return float((a - b).norm() / b.norm())


BOTH = {"temperature": Fixed(2.0), "soft_weight": 0.7, "hard_weight": 0.4}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_fused_step_is_the_dense_one(name):
    model = causal(CONFIGS[name])
    dense, _, none = stepped(model, "dense", Objective(**BOTH))
    fused, seen, said = stepped(model, "fused", Objective(**BOTH))
    assert none is None
    assert said is not None and "61 classes" in said
    assert apart(fused, dense) < 1e-5
    assert apart(seen, dense) < 1e-5, "looked at term by term"
    for term in ("soft", "hard"):
        torch.testing.assert_close(fused.terms[term], dense.terms[term], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen.terms[term], dense.terms[term], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", [None, TopK(k=8, temperatures=(2.0,)), Sampled(temperature=2.0)])
@pytest.mark.parametrize("micro_batch", [None, 5])
def test_from_every_kind_of_signal_and_in_micro_batches(codec, micro_batch):
    model = causal(CONFIGS["llama"])
    dense, *_ = stepped(model, "dense", Objective(**BOTH), codec)
    fused, *_ = stepped(model, "fused", Objective(**BOTH), codec, micro_batch=micro_batch)
    assert apart(fused, dense) < 1e-5


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "tvd", "dkd", "ranking"])
def test_every_divergence_and_a_temperature_for_each_position(divergence):
    settings = {
        "divergence": divergence, "soft_weight": 1.0, "hard_weight": 0.0,
        "temperature": PerExample(0.5), "standardized": divergence == "jsd",
    }  # fmt: skip
    model = causal(CONFIGS["gpt2"])
    dense, *_ = stepped(model, "dense", Objective(**settings))
    fused, *_ = stepped(model, "fused", Objective(**settings))
    assert apart(fused, dense) < 2e-5


def test_under_autocast_it_stays_within_bf16s_rounding():
    model = causal(CONFIGS["llama"])
    dense, *_ = stepped(model, "dense", Objective(**BOTH))
    fused, *_ = stepped(model, "fused", Objective(**BOTH), precision="bf16")
    both, *_ = stepped(model, "dense", Objective(**BOTH), precision="bf16")
    assert 1e-5 < apart(fused, dense) < 2e-2
    assert apart(fused, dense) < 1.5 * apart(both, dense)


def test_the_balances_that_weigh_terms_get_each_terms_own_gradient():
    from limbeck.balance import Uncertainty

    found = []
    for backend in ("dense", "fused"):
        model = causal(CONFIGS["llama"])
        training = step.Training(
            rows=Rows(), teacher=Teacher(), objective=Objective(**BOTH), seed=0, title="t",
            spec=TrainingSpec(epochs=1, batch_size=24, learning_rate=1e-3, backend=backend),
        )  # fmt: skip
        step_of = step.Step(model, training, [*model.parameters()])
        step.start_head(step_of)
        step_of.balance = Uncertainty(["soft", "hard"])
        step_of.balance.log_variance["soft"].data.fill_(1.0)
        found.append(step_of(0, look=False))
        step_of.observe.close()
    assert apart(*found[::-1]) < 1e-5


def test_it_is_chosen_by_size(monkeypatch, tmp_path):
    said = []

    class Says(Silent):
        def say(self, text):
            said.append(text)

    def run():
        model = causal(CONFIGS["llama"])
        spec = TrainingSpec(epochs=1, batch_size=8, learning_rate=1e-3)
        training = step.Training(rows=Rows(), teacher=Teacher(), objective=Objective(**BOTH),
                                 seed=0, title="t", spec=spec)  # fmt: skip
        train(model, training, tmp_path, Says())
        return model

    small = run()
    assert not said, "61 classes: all logits at once are no burden"
    monkeypatch.setattr(step, "CHUNK_BYTES", {"cpu": 1000})
    large = run()
    assert len(said) == 1 and "fused" in said[0]
    assert "forward" not in vars(large.lm_head), "the model is as it was"
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_no_logits_are_ever_made(monkeypatch):
    model = causal(CONFIGS["llama"])
    seen = []
    monkeypatch.setattr(step.Objective, "terms", lambda self, output, *a, **k: seen.append(output))
    training = step.Training(
        rows=Rows(), teacher=Teacher(), objective=Objective(**BOTH), seed=0, title="t",
        spec=TrainingSpec(epochs=1, batch_size=8, learning_rate=1e-3, backend="fused"),
    )  # fmt: skip
    step_of = step.Step(model, training, [*model.parameters()])
    step.start_head(step_of)
    with pytest.raises(AttributeError):
        step_of(0, look=False)
    assert seen[0].logits is None and seen[0].head_input.shape[-1] == 16


def test_a_classifier_is_tapped_too_and_what_stands_behind_a_head_is_not():
    model = random_model(bert_config())
    tokens = torch.arange(4, 10)[None]
    batch = Batch(inputs={"input_ids": tokens}, labels=torch.zeros(1), mask=torch.ones(1).bool(),
                  example_ids=torch.zeros(1))  # fmt: skip
    tap = tap_head(model, batch)
    assert isinstance(tap, Tap) and tap.layer is model.classifier
    tap.remove()
    plain = model.forward

    def doubled(**inputs):
        return SimpleNamespace(logits=2 * plain(**inputs).logits)

    model.forward = doubled
    assert tap_head(model, batch) == "something stands between its last linear layer and its logits"
    assert "forward" not in vars(model.classifier)


def test_what_cannot_be_is_refused():
    objective = Objective(soft_weight=1.0, hard_weight=0.0, divergence="dist")
    with pytest.raises(RecipeError, match="compares a batch's examples"):
        stepped(causal(CONFIGS["llama"]), "fused", objective)


def test_another_size_of_the_same_vocabulary_distils_by_its_shared_part():
    model = causal(CONFIGS["llama"])

    class Padded(Teacher):
        def signal(self, batch, needs):
            logits = super().signal(batch, needs).logits
            return Signal(logits=torch.cat([logits, logits[..., :7]], -1))

    found = []
    for backend in ("dense", "fused"):
        objective = Objective(**BOTH, shared_ids=VOCAB)
        training = step.Training(
            rows=Rows(), teacher=Padded(), objective=objective, seed=0, title="t",
            spec=TrainingSpec(epochs=1, batch_size=24, learning_rate=1e-3, backend=backend),
        )  # fmt: skip
        step_of = step.Step(model, training, [*model.parameters()])
        step.start_head(step_of)
        found.append(step_of(0, look=False))
        step_of.observe.close()
    plain, *_ = stepped(model, "dense", Objective(**BOTH))
    assert apart(found[0], plain) < 1e-6 and apart(found[1], plain) < 1e-5


@pytest.mark.slow
def test_a_compiled_model_makes_the_same_step():
    """A look walks a graph more than once, which torch.compile's freed buffers do not allow."""
    model, found = causal(CONFIGS["llama"]), []
    for one in (model, torch.compile(model, backend="aot_eager")):
        training = step.Training(
            rows=Rows(), teacher=Teacher(), objective=Objective(**BOTH), seed=0, title="t",
            spec=TrainingSpec(epochs=1, batch_size=24, learning_rate=1e-3, backend="dense"),
        )  # fmt: skip
        found.append(step.Step(one, training, [*model.parameters()])(0, look=False))
    assert apart(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("padding", [0, 16])
def test_a_live_teacher_leaves_its_head_to_the_loss(padding):
    """Value and gradient are those of whole logits; those that do not count are not made."""
    size = len(tiny_language.tokenizer())
    teacher = LiveTeacher(tiny_language.model(seed=1), "x")
    student = tiny_language.model(vocab_size=size + padding)
    ids = torch.randint(3, size, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[:, :4] = False
    batch = Batch(inputs={"input_ids": ids}, labels=ids.roll(-1, 1), mask=mask,
                  example_ids=torch.arange(2))  # fmt: skip
    objective = Objective(
        temperature=Fixed(2.0), soft_weight=0.7, hard_weight=0.3,
        shared_ids=size if padding else None,
    )  # fmt: skip

    def learnt(observe):
        target = teacher.signal(batch, objective.needs)
        terms = objective.terms(observe(batch, objective.needs), target, batch, apart=False)
        total = sum(term.total for term in terms.values())
        weights = [*student.parameters()]
        return total.detach(), torch.autograd.grad(total, weights)

    observe = Observer(student)
    plain = learnt(observe)
    teacher.leave_head(batch)
    asked = teacher.signal(batch, objective.needs)
    assert asked.logits is None and asked.head_input.shape == (2, 9, 64)
    halfway = learnt(observe)  # of a student that is dense
    observe.tap = tap_head(student, batch)
    for total, gradients in (halfway, learnt(observe)):
        torch.testing.assert_close(total, plain[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients, plain[1], rtol=1e-4, atol=1e-5)
