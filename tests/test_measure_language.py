"""Scores are sums over what counts, and intervals resample documents."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

import tiny_language
from limbeck import answers
from limbeck.measure_language import (
    DocumentScores,
    chrf,
    exact_match,
    mean,
    ratio,
    rouge_l,
    score_documents,
    token_scores,
)
from limbeck.tasks.causal_rows import Rows

TOKENIZER = tiny_language.tokenizer()
TEXTS = ["the old man and the sea", "12 34", "theology is the theory of gods", "andante"]


def rows(layout: str) -> Rows:
    """Four documents, two of them in one row where they are packed."""
    tokens = [np.array(TOKENIZER(text)["input_ids"]) for text in TEXTS]
    laid = [[0, 1], [2], [3]] if layout == "pack" else [[0], [1], [2], [3]]
    return Rows(
        ids=np.arange(len(laid)),
        tokens=tuple(np.concatenate([tokens[i] for i in row]) for row in laid),
        counted=tuple(np.concatenate([np.ones(len(tokens[i]), bool) for i in row]) for row in laid),
        starts=tuple(np.cumsum([0, *(len(tokens[i]) for i in row[:-1])]) for row in laid),
        documents=tuple(np.array([10 + i for i in row]) for row in laid), pad_id=2, layout=layout,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["pack", "pad"])
def test_sums_are_those_of_each_document_alone(layout):
    student, teacher = tiny_language.model(seed=1), tiny_language.model(seed=2)
    for model in (student, teacher):
        model.config.use_cache = False
    found = score_documents(student, rows(layout), teacher=teacher, batch_size=3)
    assert found.documents.tolist() == [10, 11, 12, 13]
    for at, text in enumerate(TEXTS):
        ids = torch.tensor(TOKENIZER(text)["input_ids"])
        ours, theirs = (m(ids[None]).logits[0, :-1].log_softmax(-1) for m in (student, teacher))
        kl = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
        assert found.num_tokens[at] == len(ids) - 1
        assert found.nll[at] == pytest.approx(-tiny_language.log_probs(student, ids.tolist()).sum())
        assert found.kl[at] == pytest.approx(kl.item(), rel=1e-4)
        assert found.right[at] == (ours.argmax(-1) == ids[1:]).sum()
        assert found.same[at] == (ours.argmax(-1) == theirs.argmax(-1)).sum()
    itself = score_documents(student, rows(layout), teacher=student)
    assert np.allclose(itself.kl, 0, atol=1e-6) and (itself.same == itself.num_tokens).all()


def fields(scores: DocumentScores) -> list[list[float]]:
    return [np.asarray(column, float).tolist() for column in asdict(scores).values()]


@pytest.mark.parametrize("found", ["head", "a model without a last matrix"])
def test_answers_kept_short_say_what_logits_say(monkeypatch, found):
    """Also of a teacher with rows of padding, which nobody is asked about."""
    if found != "head":
        monkeypatch.setattr(answers, "tap_head", lambda *_: "it has none")
    student = tiny_language.model(seed=1)
    teacher = tiny_language.model(seed=2, vocab_size=len(TOKENIZER) + 5)
    for model in (student, teacher):
        model.config.use_cache = False
    told = []
    mine, theirs = (answers.answers(m, rows("pack"), told.append) for m in (student, teacher))
    assert (mine.head is None) == (found != "head")
    assert told == [3, 3]
    wanted = score_documents(student, rows("pack"), teacher=teacher, shared_ids=len(TOKENIZER))
    for mine_, wanted_ in zip(fields(answers.score(mine, theirs)), fields(wanted), strict=True):
        assert mine_ == pytest.approx(wanted_, rel=1e-5, abs=1e-6)
    alone = answers.score(mine)
    assert alone.kl is None and np.allclose(alone.nll, wanted.nll, rtol=1e-5)


def test_a_file_is_run_once_until_it_is_another(tmp_path, monkeypatch):
    folder = tiny_language.save(tmp_path / "m")
    loaded = []
    load = answers.load_file
    monkeypatch.setattr(answers, "load_file", lambda *a: loaded.append(a) or load(*a))
    ask, told = answers.Asker(), []
    first = ask(folder, "hf", rows("pad"), told.append)
    assert ask(folder, "hf", rows("pad"), told.append) is first and told == [4, 4]
    assert ask(folder, "hf", rows("pack"), told.append) is not first
    tiny_language.model(seed=5).save_pretrained(folder)
    other = ask(folder, "hf", rows("pad"), told.append)
    assert len(loaded) == 3 and not torch.equal(other.said, first.said)


def test_perplexity_and_bits_are_of_tokens_not_of_documents():
    found = DocumentScores(
        documents=np.arange(2), num_tokens=np.array([1, 9]), right=np.array([1, 4]),
        nll=np.array([2.0, 9.0]), kl=np.array([0.5, 4.5]), same=np.array([0, 9]),
    )  # fmt: skip
    assert found.perplexity(seed=0).value == pytest.approx(math.exp(1.1))
    bits = found.bits_per_byte(np.array([4, 18]), seed=0)
    assert bits.value == pytest.approx(11 / math.log(2) / 22)
    assert found.accuracy(seed=0).value == 0.5 and found.agreement(seed=0).value == 0.9
    assert found.mean_kl(seed=0).value == 0.5
    alone = DocumentScores(
        documents=found.documents, num_tokens=found.num_tokens, right=found.right, nll=found.nll
    )
    with pytest.raises(ValueError, match="no teacher"):
        alone.mean_kl(seed=0)


def test_a_padded_vocabulary_is_left_out():
    logits, labels = torch.randn(5, 8), torch.arange(5)
    padded = torch.cat([logits, torch.full((5, 3), 50.0)], 1)
    nll, right, kl, same = token_scores(padded, labels, logits, shared_ids=8)
    assert torch.equal(nll, token_scores(logits, labels)[0]) and kl.abs().max() < 1e-6
    assert same.all() and torch.equal(right, logits.argmax(-1) == labels)
    with pytest.raises(ValueError, match="logits of 11 and 8 ids"):
        token_scores(padded, labels, logits)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Documents whose tokens are all alike: taken for themselves they would seem far more."""
    random = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        counts = random.integers(1, 20, 60)
        sums = counts * random.normal(1.0, 0.3, 60)
        found = ratio(sums, counts, seed=trial, resamples=400)
        assert found.low <= found.value <= found.high and found.n == 60
        inside += found.low <= 1 <= found.high
    assert 0.88 < inside / 200 < 0.98
    again = ratio(sums, counts, seed=199, resamples=400)
    assert again == found != ratio(sums, counts, seed=0, resamples=400)


def test_the_drawing_in_chunks_is_the_same_bootstrap():
    sums, counts = np.arange(5.0), np.ones(5)
    one = ratio(sums, counts, seed=0, resamples=4000)
    slow = np.random.default_rng(1).choice(sums, (20_000, 5)).mean(1)
    assert [one.low, one.high] == pytest.approx(np.percentile(slow, [2.5, 97.5]).tolist(), abs=0.11)
    for wrong in ((sums[:0], counts[:0]), (sums, counts[:3]), (sums, counts * 0)):
        with pytest.raises(ValueError, match="at least one"):
            ratio(*wrong, seed=0)


WRITTEN = ["the cat sat on the mat", "a dog barks", "  same "]
WANTED = ["the cat lay on a mat", "birds sing aloud", "same"]


def test_exact_match_and_rouge_l():
    assert exact_match(WRITTEN, WANTED).tolist() == [False, False, True]
    pytest.importorskip("rouge_score")
    # the cat ... on ... mat: 4 of 6 words in order
    assert rouge_l(WRITTEN, WANTED).tolist() == pytest.approx([4 / 6, 0, 1])
    assert mean(rouge_l(WRITTEN, WANTED), seed=0).value == pytest.approx(5 / 9)
    for measure in (exact_match, rouge_l):
        with pytest.raises(ValueError, match="3 texts, 2 references"):
            measure(WRITTEN, WANTED[:2])


def test_chrf_is_sacrebleus_and_its_interval_resamples_texts():
    sacrebleu = pytest.importorskip("sacrebleu")
    written = [f"{text} {n % 5}" for n, text in enumerate(WRITTEN * 6)]
    wanted = [f"{text} {n % 7}" for n, text in enumerate(WANTED * 6)]
    found = chrf(written, wanted, seed=0, resamples=300)
    assert found.value == pytest.approx(sacrebleu.corpus_chrf(written, [wanted]).score / 100)
    random = np.random.default_rng(5)
    slow = []
    for _ in range(300):
        at = random.integers(0, 18, 18)
        part = [written[i] for i in at], [[wanted[i] for i in at]]
        slow.append(sacrebleu.corpus_chrf(*part).score / 100)
    low, high = np.percentile(slow, [2.5, 97.5])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))
    assert chrf(WANTED, WANTED, seed=0).value == 1
