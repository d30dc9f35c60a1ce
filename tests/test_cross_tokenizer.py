"""A student with another tokenizer than its teacher's: what is compared, where, and end to end."""

import json

import numpy as np
import pytest
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import limbeck
import tiny_language
from limbeck.cross_tokenizer import CrossTokenizerTeacher
from limbeck.errors import DataError, RecipeError
from limbeck.objective import Objective, total
from limbeck.recipe_file import load_recipe
from limbeck.tasks.causal_rows import Rows
from limbeck.tasks.conversations import Encoder
from limbeck.types import Signal
from tiny_world import quickly

THEIRS = tiny_language.tokenizer()
TEXTS = ["the old man", "naïve café €", "theology", "12 seas and oceans"]


def by_bytes(begin: bool = False) -> PreTrainedTokenizerFast:
    """Each byte a token, in another order than the teacher's."""
    specials = {"<end>": 0, "<begin>": 1}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    backend = Tokenizer(models.BPE(
        vocab=specials | {letter: i + 2 for i, letter in enumerate(letters)}, merges=[]
    ))  # fmt: skip
    backend.add_special_tokens([AddedToken(t, special=True) for t in specials])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if begin:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>", bos_token="<begin>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


OURS = by_bytes()


def rows_of(tokenizer, documents, kind="text", together=False) -> Rows:
    encode = Encoder(tokenizer, kind, where="x")
    pieces = [encode(document, i, "x") for i, document in enumerate(documents)]
    laid = [pieces] if together else [[piece] for piece in pieces]
    starts = [np.cumsum([0, *(len(p) for p in row[:-1])]) for row in laid]
    return Rows(
        ids=np.arange(len(laid)), tokens=tuple(np.concatenate([p.tokens for p in r]) for r in laid),
        counted=tuple(np.concatenate([p.counted for p in r]) for r in laid),
        starts=tuple(starts), documents=tuple(np.array([p.document for p in r]) for r in laid),
        pad_id=0, layout="pack",
    )  # fmt: skip


def reader(rows, ours=OURS, **changes) -> CrossTokenizerTeacher:
    return CrossTokenizerTeacher(tiny_language.model(1, **changes), "x", THEIRS, rows, ours)


def said_by_hand(ids, at):
    return tiny_language.model(1)(torch.tensor([ids])).logits[0, at]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("begin", [False, True])
def test_both_are_asked_where_they_have_read_the_same_bytes(together, begin):
    ours = by_bytes(begin)
    rows = rows_of(ours, TEXTS, together=together)
    teacher = reader(rows, ours)
    batch = rows.batch(range(len(rows)))
    places = teacher.places(batch)
    assert (places & ~batch.mask).sum() == 0
    found = teacher.signal(batch, frozenset()).targets.logits
    expected = []
    for number, text in enumerate(TEXTS):
        row, first = (0, int(rows.starts[0][number])) if together else (number, 0)
        ids = [*THEIRS(text)["input_ids"], 2]
        spelt = [len(THEIRS.convert_ids_to_tokens(i)) for i in ids[:-1]]  # a sign for each byte
        ends = np.cumsum(spelt).tolist()
        whole = {len(text[:i].encode()) for i in range(1, len(text) + 1)}
        # the student has a token a byte; inside of a character nobody can tell
        at = {first + begin + e - 1: k for k, e in enumerate(ends) if e in whole}
        assert len(at) > 0
        for place in sorted(at):
            assert places[row, place]
            expected.append(said_by_hand(ids, at[place]))
    assert places.sum() == len(expected)
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)
    assert teacher.left_out == 0 and teacher.documents == len(TEXTS)


def test_of_a_completion_alone_and_never_across_its_border():
    rows = rows_of(OURS, [("the o", "ld man"), ("12", "34")], "completion")
    teacher = reader(rows)
    batch = rows.batch([0, 1])
    places = teacher.places(batch)
    assert not places[0, :4].any() and places[0, 4], "the answer's first byte counts"
    assert places[0, 10], "and its end"
    ids = [*THEIRS("the o")["input_ids"], *THEIRS("ld man")["input_ids"], 2]
    found = teacher.signal(batch, frozenset()).targets.logits
    first = len(THEIRS("the o")["input_ids"]) - 1
    assert torch.allclose(found[0], said_by_hand(ids, first), atol=1e-4)
    last = said_by_hand([*THEIRS("12")["input_ids"], *THEIRS("34")["input_ids"], 2], -2)
    assert torch.allclose(found[-1], last, atol=1e-4)


def test_the_loss_is_the_mean_over_what_is_compared_and_moves_nothing_else():
    rows = rows_of(OURS, TEXTS)
    teacher = reader(rows)
    objective = Objective(soft_weight=0.5, hard_weight=0.0, divergence="uld",
                          places=teacher.places)  # fmt: skip
    batch = rows.batch(range(4))
    logits = torch.randn(*batch.mask.shape, 258, requires_grad=True)
    target = teacher.signal(batch, objective.needs)
    terms = objective.terms(Signal(logits=logits), target, batch)
    (loss,) = total(terms, objective.counts([batch])).values()
    places = teacher.places(batch)
    wanted = 0.0
    q = logits[places].softmax(-1).sort(-1, descending=True).values
    p = target.targets.logits.softmax(-1).sort(-1, descending=True).values
    wanted = (p[:, :258] - q).abs().sum() + p[:, 258:].sum()
    assert loss.item() == pytest.approx(0.5 * wanted.item() / int(places.sum()), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[~places] == 0).all() and gradient[places].abs().sum(-1).min() > 0
    parts = [rows.batch([i]) for i in range(4)]
    counts = objective.counts(parts)
    assert counts["soft"] == places.sum()
    pieces = [
        total(objective.terms(
            Signal(logits=logits[i : i + 1, : part.mask.shape[1]]),
            teacher.signal(part, objective.needs), part,
        ), counts)["soft"]
        for i, part in enumerate(parts)
    ]  # fmt: skip
    assert sum(pieces).item() == pytest.approx(loss.item(), rel=1e-5)


def test_texts_that_cannot_be_read_back_are_left_out():
    rows = rows_of(OURS, TEXTS)
    broken = (rows.tokens[0][:0], *rows.tokens[1:])
    cut = np.concatenate([rows.tokens[1][:3], rows.tokens[1][-1:]])  # inside of ï
    rows = Rows(
        ids=rows.ids, tokens=(rows.tokens[0], cut, *broken[2:]),
        counted=(rows.counted[0], np.ones(4, bool), *rows.counted[2:]), starts=rows.starts,
        documents=rows.documents, pad_id=0, layout="pack",
    )  # fmt: skip
    teacher = reader(rows)
    assert teacher.left_out == 1 and not teacher.places(rows.batch([1])).any()
    assert teacher.signal(rows.batch([1]), frozenset()).targets.logits.shape == (0, 400)
    batch = rows.batch([0, 2, 3])
    short = reader(rows, max_position_embeddings=3).places(batch).sum()
    assert 0 < short < teacher.places(batch).sum(), "behind its context the teacher is not asked"
    with pytest.raises(DataError, match="none of 1 texts"):
        reader(rows_of(OURS, [""]))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tiny_language.make_language_world(tmp_path_factory.mktemp("uld"))
    torch.manual_seed(0)
    config = tiny_language.config(vocab_size=258, bos_token_id=1, eos_token_id=0, pad_token_id=0)
    LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "hidden_size": 32})).save_pretrained(
        folder / "other"
    )
    OURS.save_pretrained(folder / "other")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["base"] = {"model": "other"}
    recipe["task"]["max_tokens"] = 96
    recipe["export"] = {"formats": ["hf"], "primary": "hf"}
    recipe["distill"] |= {"hard_weight": 1, "soft_weight": 0.5, "temperature": 1}
    recipe["students"][0]["budget"]["params"] = 40000
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_another_tokenizer_is_refused_and_accepted_with_uld(world):
    refused = pytest.raises(RecipeError, match=r"another way than the teacher's.*divergence: uld")
    with quickly(), refused:
        limbeck.distill(world / "recipe.yaml", world / "out")
    with quickly():
        report = limbeck.distill(
            world / "recipe.yaml", world / "out",
            overrides=["distill.divergence=uld", "measure.generate={rows: 4, max_new_tokens: 9}"],
        )  # fmt: skip
    (student,) = report.students
    assert student.fidelity is None and student.retention is None
    points = report.training["one"]
    assert points[-1].terms["soft"] < points[0].terms["soft"]
    assert points[-1].terms["hard"] < points[0].terms["hard"]
    (note,) = [w for w in report.warnings if "has another tokenizer" in w]
    bits = json.loads((world / "out/students/one/compare/comparison.json").read_text())
    bits = bits["bits_per_byte"]
    assert bits["n"] == 12 and 0 < bits["teacher"] < bits["student"] < 8
    assert f"{bits['student']:.3f} bits for a byte of 12" in note
    prompts = json.loads((world / "out/prompts/prompts.json").read_text())
    assert {*report.texts.scores} == {"teacher", "one"} and prompts["ends"] == [2, 0]
    for prompt in prompts["prompts"]:
        assert OURS.decode(prompt["own"]) == prompt["prompt"] and prompt["own"] != prompt["tokens"]
    hf = world / "out/students/one/hf"
    words = limbeck.write_with(hf, "the old")
    assert isinstance("".join(words), str)
    with quickly():
        again = limbeck.distill(world / "out", world / "out")
    assert all(stage.reused for stage in again.stages)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("base=null", "a `base.model`, or something else"),
        ("distill.on_policy={share: 0.5}", "`distill.on_policy` has no effect"),
        ("distill.standardize=true", "`distill.standardize` has no effect"),
        ("signals={dense: {}}", "`signals` has no effect"),
        ("data={train: rows.jsonl, test_fraction: 0.2, messages: m}", "other words in each"),
    ],
)
def test_what_uld_cannot_do_is_refused(world, change, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(world / "recipe.yaml", ["distill.divergence=uld", change])
