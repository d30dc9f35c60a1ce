"""A trimmed vocabulary writes every string, and what it knows as before; logits are the same."""

import json
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import tiny_language
from limbeck.architecture.axes import find_axis
from limbeck.architecture.inputs import example_inputs
from limbeck.architecture.probe import find_axes
from limbeck.architecture.proof import prove_axes
from limbeck.causal import load_causal, save_causal
from limbeck.errors import SourceError
from limbeck.models import load_tokenizer
from limbeck.trimming import choose_tokens, count_tokens, trim_model, trim_tokenizer

DOMAIN = "the old man and the sea; theology 12"


def build(config):
    return AutoModelForCausalLM.from_config(config)


@cache
def kinds() -> dict[str, PreTrainedTokenizerFast]:
    """As SmolLM2, as Llama 3 (whole words first, special tokens last, one of them at the
    beginning), as Llama 2 (characters, with bytes to fall back on)."""
    smol = tiny_language.tokenizer()
    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        tiny_language.CORPUS,
        trainers.BpeTrainer(vocab_size=390, initial_alphabet=alphabet, show_progress=False),
    )
    backend.add_special_tokens(["<|begin|>", "<|end|>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
    )
    whole = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.train_from_iterator(
        tiny_language.CORPUS,
        trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>"], show_progress=False),
    )
    state = json.loads(backend.to_str())
    size = len(state["model"]["vocab"])
    state["model"]["vocab"] |= {token: size + i for i, token in enumerate(fallback)}
    pieces = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    return {"smol": smol, "whole": whole, "pieces": pieces}


def trimmed(tokenizer, *texts: str):
    counts = count_tokens(tokenizer([*texts])["input_ids"], len(tokenizer))
    trim = choose_tokens(tokenizer, counts, where="x")
    return trim, trim_tokenizer(tokenizer, trim, where="x")


@cache
def domains(kind: str):
    return [trimmed(kinds()[kind], *texts) for texts in ([DOMAIN], ["1"], tiny_language.CORPUS)]


words = st.sampled_from([w for line in [*tiny_language.CORPUS, DOMAIN] for w in line.split()])
unicode = st.text(st.characters(exclude_categories=["Cs"]))
mixed = st.lists(words | unicode, max_size=8).map(" ".join)


@pytest.mark.parametrize("kind", ["smol", "whole", "pieces"])
@given(text=mixed)
@settings(deadline=None)
def test_every_string_comes_back(kind, text):
    whole = kinds()[kind]
    for _, small in domains(kind):
        ids = small(text, add_special_tokens=False)["input_ids"]
        said = small.decode(ids)
        assert said == whole.decode(whole(text, add_special_tokens=False)["input_ids"])
        assert kind == "pieces" or said == text  # a metaspace in the text comes back as a space


@pytest.mark.parametrize("kind", ["smol", "whole", "pieces"])
@given(text=mixed)
@settings(deadline=None)
def test_a_text_whose_tokens_are_kept_has_the_same_tokens(kind, text):
    for trim, small in domains(kind):
        old = kinds()[kind](text)["input_ids"]
        if {*old} <= {*trim.kept}:
            assert kind != "whole" or old[0] == 390
            assert [trim.kept[i] for i in small(text)["input_ids"]] == old


@pytest.mark.parametrize("kind", ["smol", "whole", "pieces"])
def test_the_domain_itself_has_the_same_tokens_in_a_smaller_vocabulary(kind):
    for (trim, small), text in zip(domains(kind)[:2], [DOMAIN, "1"], strict=True):
        old = kinds()[kind](text)["input_ids"]
        assert {*old} <= {*trim.kept}
        assert [trim.kept[i] for i in small(text)["input_ids"]] == old
        assert len(small) == len(trim.kept) < trim.vocab_size == len(kinds()[kind])
    few, more = (trim for trim, _ in domains(kind)[:2])
    assert len(more.kept) < len(few.kept) and few.passed_through > 0
    for token, old in kinds()[kind].get_vocab().items():
        new = small.get_vocab().get(token)
        assert (new is None) == (old not in more.kept)


def test_rare_tokens_go_first_and_bytes_and_specials_never():
    tokenizer = tiny_language.tokenizer()
    counts = count_tokens(tokenizer([DOMAIN] * 2 + ["mansion"])["input_ids"], len(tokenizer))
    often = choose_tokens(tokenizer, counts, where="x", at_least=2)
    seldom = choose_tokens(tokenizer, counts, where="x")
    none = choose_tokens(tokenizer, counts * 0, where="x")
    assert {*none.kept} < {*often.kept} < {*seldom.kept}
    assert len(none.kept) == 256 + 3 and none.used == none.passed_through == 0


def test_special_tokens_template_and_names_stay():
    tokenizer = tiny_language.tokenizer()
    _, small = trimmed(tokenizer, DOMAIN)
    chat = [{"role": "user", "content": "the sea"}]
    said = small.apply_chat_template(chat, tokenize=False)
    assert said == tokenizer.apply_chat_template(chat, tokenize=False)
    assert small.decode(small(said)["input_ids"], skip_special_tokens=True) == "user\nthe sea\n"
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(small, name) == getattr(tokenizer, name)
    assert small.all_special_tokens == tokenizer.all_special_tokens


def test_other_kinds_are_refused():
    pieces = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], 0, False))
    )
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    for tokenizer, words in ((pieces, "is a Unigram model"), (bare, "has no bytes")):
        with pytest.raises(SourceError, match=words):
            choose_tokens(tokenizer, count_tokens([], 2), where="x")


@cache
def vocab_axes(tied: bool):
    """Of the tiny Llama: the vocabulary alone, proved."""
    model = tiny_language.model(tie_word_embeddings=tied)
    found = [a for a in find_axes(model.config, build) if a.name == "vocab"]
    inputs = example_inputs(model, model.config)
    return prove_axes(model, model.config, build, tuple(found), inputs, seed=0)


@pytest.mark.parametrize("by_axis", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_kept_ids_are_the_same_and_perplexity_falls_by_the_mass_that_is_gone(
    tied, by_axis
):
    tokenizer = tiny_language.tokenizer()
    model = tiny_language.model(tie_word_embeddings=tied, vocab_size=416)  # 16 rows of padding
    axes = ()
    if by_axis:
        model, axes = tiny_language.model(tie_word_embeddings=tied), vocab_axes(tied)
        assert find_axis(axes, "vocab").proved
    trim, small = trimmed(tokenizer, DOMAIN)
    student = trim_model(model, trim, build, axes)
    old, new = tokenizer(DOMAIN)["input_ids"], small(DOMAIN)["input_ids"]
    before = model(torch.tensor([old])).logits[0]
    after = student(torch.tensor([new])).logits[0]
    kept = torch.tensor(trim.kept)
    assert after.shape == (len(new), len(small))
    assert torch.allclose(before[:, kept], after, atol=1e-5)
    mass = before.softmax(-1)[:-1, kept].sum(-1).log()
    fell = tiny_language.log_probs(student, new) - tiny_language.log_probs(model, old)
    assert torch.allclose(fell, -mass, atol=1e-4) and (fell > 0).all()
    rows = {name: tensor.shape[0] for name, tensor in student.state_dict().items()}
    assert rows["model.embed_tokens.weight"] == rows["lm_head.weight"] == len(small)
    tied_now = student.lm_head.weight is student.model.embed_tokens.weight
    assert tied_now == tied


def test_ids_of_the_config_are_renamed_and_the_folder_loads(tmp_path):
    tokenizer = tiny_language.tokenizer()
    last = len(tokenizer) - 1  # beyond the new vocabulary
    model = tiny_language.model(bos_token_id=1, eos_token_id=[2, last], pad_token_id=last)
    model.generation_config.eos_token_id = [2, last]
    counts = count_tokens([[last, last]], len(tokenizer))
    trim = choose_tokens(tokenizer, counts, where="x")
    student = trim_model(model, trim, build)
    small = trim_tokenizer(tokenizer, trim, where="x")
    save_causal(student, small, tmp_path / "s")
    back, again = load_causal(tmp_path / "s", where="x"), load_tokenizer(tmp_path / "s", where="x")
    place = trim.kept.index(last)
    assert place < last and back.config.vocab_size == len(again) == len(trim.kept)
    assert (back.config.bos_token_id, back.config.pad_token_id) == (1, place)
    assert back.config.eos_token_id == back.generation_config.eos_token_id == [2, place]
    assert again.get_vocab() == small.get_vocab() and again(DOMAIN) == small(DOMAIN)
    assert model.config.pad_token_id == last, "the model itself is as it was"
