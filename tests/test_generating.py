"""Greedy writing is transformers'; drawn writing has the model's frequencies, by the seed."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import GPT2Config, GPT2LMHeadModel

import tiny_language
from limbeck.errors import DataError
from limbeck.generating import Sampling, _choose, end_ids, generate, stream

TOKENIZER = tiny_language.tokenizer()
PROMPTS = TOKENIZER(["the old man", "12", "and the sea; theology of a mansion"])["input_ids"]


@pytest.fixture(scope="module")
def model():
    return tiny_language.model()


def test_greedy_is_transformers_own_whatever_the_batch(model):
    sampling = Sampling(max_new_tokens=20, sampling_temperature=0)
    for size in (1, 3):
        found = generate(model, PROMPTS, sampling, ends=(), batch_size=size)
        for prompt, said, log_probs in zip(PROMPTS, found.tokens, found.log_probs, strict=True):
            theirs = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
                max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=2,
            )[0].tolist()  # fmt: skip
            assert [*prompt, *said.tolist()] == theirs
            expected = tiny_language.log_probs(model, theirs)[len(prompt) - 1 :]
            assert torch.allclose(torch.tensor(log_probs), expected, atol=1e-4)
        assert not found.ended.any()


def test_positions_count_from_the_prompts_own_beginning():
    """GPT-2 has a table of them: here padding on the left would show."""
    torch.manual_seed(0)
    small = GPT2Config(
        vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=2, n_positions=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = GPT2LMHeadModel(small).eval()
    model.transformer.wpe.weight.data.normal_()
    sampling = Sampling(max_new_tokens=8, sampling_temperature=0)
    one, all_of_them = (
        generate(model, PROMPTS, sampling, ends=(), batch_size=size) for size in (1, 3)
    )
    for alone, together in zip(one.log_probs, all_of_them.log_probs, strict=True):
        assert np.allclose(alone, together, atol=1e-4)


def test_it_stops_behind_an_end_and_goes_on_with_the_others(model):
    sampling = Sampling(max_new_tokens=20, sampling_temperature=0)
    free = generate(model, PROMPTS, sampling, ends=())
    end = int(free.tokens[0][5])
    found = generate(model, PROMPTS, sampling, ends=[end])
    for without, said, ended in zip(free.tokens, found.tokens, found.ended, strict=True):
        place = np.flatnonzero(without == end)
        length = place[0] + 1 if len(place) else 20
        assert said.tolist() == without[:length].tolist() and ended == bool(len(place))
    assert found.ended[0] and len({len(said) for said in found.tokens}) > 1
    with patch.object(model, "forward", wraps=model.forward) as calls:
        generate(model, PROMPTS[:1], sampling, ends=[end])
    assert calls.call_count == 6, "nothing is written behind the end"


def test_draws_follow_seed_and_number_and_not_the_batch(model):
    def said(seed: int = 0, **settings) -> list[list[int]]:
        sampling = Sampling(max_new_tokens=12, seed=seed)
        return [t.tolist() for t in generate(model, PROMPTS, sampling, ends=(), **settings).tokens]

    first = said()
    assert said() == first == said(batch_size=1)
    assert all(a != b for a, b in zip(said(seed=1), first, strict=True))
    twice = generate(model, [PROMPTS[0]] * 2, Sampling(max_new_tokens=12), ends=()).tokens
    assert twice[0].tolist() == first[0] != twice[1].tolist()
    turned = generate(
        model, PROMPTS[::-1], Sampling(max_new_tokens=12), ends=(), numbers=[2, 1, 0]
    )
    assert [t.tolist() for t in turned.tokens[::-1]] == first


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature, top_p):
    probs = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15], dtype=torch.float64)
    wanted = (probs.log() / temperature).softmax(-1)
    if top_p < 1:
        wanted = wanted * torch.tensor([0, 1, 0, 1, 0])  # 0.4 and 0.3 reach 0.7
        wanted = wanted / wanted.sum()
    sampling = Sampling(max_new_tokens=1, sampling_temperature=temperature, top_p=top_p)
    draw = np.random.default_rng(0)
    found = _choose(probs.log().expand(5000, 5), sampling, [draw] * 5000)
    counts = torch.bincount(found, minlength=5)
    assert (counts[wanted == 0] == 0).all()
    some = wanted > 0
    assert stats.chisquare(counts[some], wanted[some] / wanted.sum() * 5000).pvalue > 1e-3


def test_as_a_batch_the_completion_alone_counts(model):
    found = generate(model, PROMPTS, Sampling(max_new_tokens=4), ends=())
    batch = found.batch([2, 0], pad_id=7, numbers=[10, 11, 12])
    assert batch.example_ids.tolist() == [12, 10]
    for row, i in enumerate([2, 0]):
        said = batch.labels[row][batch.mask[row]]
        assert said.tolist() == found.tokens[i].tolist()
        ids = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()]
        assert ids.tolist() == [*PROMPTS[i], *found.tokens[i]]
        scores = model(**batch.inputs).logits[row].log_softmax(-1)[batch.mask[row]]
        own = scores.gather(1, said[:, None])[:, 0]
        assert torch.allclose(own, torch.tensor(found.log_probs[i]), atol=1e-4)


def test_a_stream_is_the_text_in_pieces_that_are_whole_signs(model):
    sampling = Sampling(max_new_tokens=60, seed=3)
    (said,) = generate(model, PROMPTS[:1], sampling, ends=end_ids(model)).tokens
    pieces = [*stream(model, TOKENIZER, PROMPTS[0], sampling, ends=end_ids(model))]
    whole = TOKENIZER.decode([t for t in said if t not in end_ids(model)], skip_special_tokens=True)
    assert "".join(pieces) == whole and len(pieces) > 5 and all(pieces)
    euro = TOKENIZER("€uro")["input_ids"]  # three bytes, three tokens

    class Says(torch.nn.Module):
        config = model.config

        def __init__(self):
            super().__init__()
            self.at, self.none = 0, torch.nn.Parameter(torch.zeros(1))

        def forward(self, **_):
            logits = torch.full((1, 1, 400), -9.0)
            logits[0, 0, [*euro, 2][self.at]] = 9.0
            self.at += 1
            return type("Said", (), {"logits": logits, "past_key_values": None})

    greedy = Sampling(max_new_tokens=9, sampling_temperature=0)
    assert next(iter(stream(Says(), TOKENIZER, [5], greedy, ends=[2]))) == "€"


def test_what_does_not_fit_is_refused(model):
    for prompt, new in (([], 4), ([5] * 120, 9)):
        with pytest.raises(DataError, match=f"prompt 0: {len(prompt)} tokens"):
            generate(model, [prompt], Sampling(max_new_tokens=new), ends=())
    assert len(generate(model, [[5] * 120], Sampling(max_new_tokens=8), ends=()).tokens[0]) == 8
    for wrong in ({"max_new_tokens": 0}, {"top_p": 0}, {"sampling_temperature": -1}):
        with pytest.raises(ValueError, match="no such sampling"):
            Sampling(**{"max_new_tokens": 1, **wrong})
