"""A GGUF file says what its folder says: tokens, weights, template; what is damaged is refused."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

import llama_cpp_runner
import tiny_language
from limbeck.causal import (
    build_causal,
    causal_folder,
    load_causal,
    save_causal,
    unpack_gguf,
)
from limbeck.errors import SourceError
from limbeck.export.gguf import splitting_name, write_gguf
from limbeck.fast_tokenizer import rebuilt
from limbeck.generating import Sampling, generate
from limbeck.gguf_source import SPLITS, read_header
from limbeck.models import load_tokenizer
from limbeck.trimming import choose_tokens, count_tokens, trim_model, trim_tokenizer
from tiny_language import log_probs

gguf = pytest.importorskip("gguf")
TEXT = "the sea in 1952, déjà vu: 日本 12345\n 6\n\tandante  <|im_end|>"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_language.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory) -> Path:
    """The tiny Llama in fp32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(llama, path, "f32", name="tiny", where="x")
    return path


def test_there_and_back_is_the_same_model(llama, file, tmp_path):
    header = unpack_gguf(file, tmp_path / "back", where="x")
    assert (header.architecture, header.kinds) == ("llama", {"F32": 20})
    before, after = (load_causal(folder, where="x") for folder in (llama, tmp_path / "back"))
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())
    assert after.config.tie_word_embeddings and after.config.rms_norm_eps == pytest.approx(1e-5)
    state = after.state_dict()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    ids = load_tokenizer(llama, where="x")(TEXT)["input_ids"]
    assert torch.equal(before(torch.tensor([ids])).logits, after(torch.tensor([ids])).logits)


def test_the_tokenizer_and_its_template_come_back_and_stay_at_a_second_reload(
    llama, file, tmp_path
):
    """transformers' own GPT2Tokenizer would join digits from the first or second reload on."""
    first, second = tmp_path / "first", tmp_path / "second"
    unpack_gguf(file, first, where="x")
    load_tokenizer(first, where="x").save_pretrained(second)
    before = load_tokenizer(llama, where="x")
    messages = [{"role": "user", "content": "see 12?"}, {"role": "assistant", "content": "aye"}]
    for folder in (first, second):
        after = load_tokenizer(folder, where="x")
        assert after.get_vocab() == before.get_vocab()
        assert after(TEXT)["input_ids"] == before(TEXT)["input_ids"]
        assert after.decode(after(TEXT)["input_ids"]) == TEXT
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
            assert getattr(after, name) == getattr(before, name)
        assert after.apply_chat_template(messages, tokenize=False) == before.apply_chat_template(
            messages, tokenize=False
        )
        assert after.model_max_length == 128


@pytest.mark.parametrize(("kind", "error"), [("f16", 0.01), ("q8_0", 0.2), ("q4_0", 2.0)])
def test_stored_in_fewer_bits_it_says_nearly_the_same(llama, tmp_path, kind, error):
    write_gguf(llama, tmp_path / "m.gguf", kind, name="tiny", where="x")
    header = unpack_gguf(tmp_path / "m.gguf", tmp_path / "back", where="x")
    matrices = {"f16": {"F16": 15}, "q8_0": {"Q8_0": 15}, "q4_0": {"Q8_0": 1, "Q4_0": 14}}[kind]
    assert header.kinds == {**matrices, "F32": 5}
    ids = load_tokenizer(llama, where="x")(TEXT)["input_ids"]
    before, after = (
        log_probs(load_causal(folder, where="x"), ids) for folder in (llama, tmp_path / "back")
    )
    assert error / 100 < (before - after).abs().mean() < error


def test_rows_that_do_not_divide_into_blocks_are_written_in_fp16(tmp_path):
    folder = tiny_language.save(tmp_path / "m", intermediate_size=80)
    write_gguf(folder, tmp_path / "m.gguf", "q8_0", name="tiny", where="x")
    assert read_header(tmp_path / "m.gguf", where="x").kinds == {"F32": 5, "F16": 2, "Q8_0": 13}


def test_an_untied_head_and_biases_of_qwen2_come_along(tmp_path):
    model = tiny_language.model(made=Qwen2ForCausalLM, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "m")
    tiny_language.tokenizer().save_pretrained(tmp_path / "m")
    write_gguf(tmp_path / "m", tmp_path / "m.gguf", "f32", name="tiny", where="x")
    assert unpack_gguf(tmp_path / "m.gguf", tmp_path / "b", where="x").architecture == "qwen2"
    ids = tiny_language.tokenizer()(TEXT)["input_ids"]
    after = log_probs(load_causal(tmp_path / "b", where="x"), ids)
    assert torch.equal(log_probs(model, ids), after)


def test_rows_of_padding_are_no_tokens(tmp_path):
    folder = tiny_language.save(tmp_path / "m", vocab_size=416)
    write_gguf(folder, tmp_path / "m.gguf", "f32", name="tiny", where="x")
    found = read_header(tmp_path / "m.gguf", where="x").metadata
    assert len(found["tokenizer.ggml.tokens"]) == 416
    assert found["tokenizer.ggml.token_type"][-17:] == [1] + [5] * 16
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]


# In 8 and 4 bits llama.cpp rounds what goes into a product to 8 bits as well.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "error"), [("f32", 1e-4), ("f16", 0.02), ("q8_0", 0.2), ("q4_0", 0.3)]
)
def test_llama_cpp_reads_the_same_tokens_and_says_the_same(llama, tmp_path, kind, error):
    write_gguf(llama, tmp_path / "m.gguf", kind, name="tiny", where="x")
    unpack_gguf(tmp_path / "m.gguf", tmp_path / "back", where="x")
    tokenizer, model = load_tokenizer(llama, where="x"), load_causal(tmp_path / "back", where="x")
    ids = tokenizer(TEXT)["input_ids"]
    with llama_cpp_runner.opened(tmp_path / "m.gguf") as other:
        assert llama_cpp_runner.tokens(other, TEXT) == ids
        theirs = llama_cpp_runner.log_probs(other, ids)
        assert np.abs(theirs - log_probs(model, ids).numpy()).mean() < error
        asked = tokenizer("the old man")["input_ids"]
        greedy = Sampling(max_new_tokens=8, sampling_temperature=0)
        (said,) = generate(model, [asked], greedy, ends=()).tokens
        if kind in ("f32", "f16"):
            assert llama_cpp_runner.greedy(other, asked, 8) == said.tolist()
        assert other.metadata["tokenizer.chat_template"] == tokenizer.chat_template


@pytest.mark.slow
def test_llama_cpp_reads_a_trimmed_vocabulary_as_it_is(llama, tmp_path):
    tokenizer, model = load_tokenizer(llama, where="x"), load_causal(llama, where="x")
    ids = tokenizer("the old man and the sea")["input_ids"]
    trim = choose_tokens(tokenizer, count_tokens([ids], len(tokenizer)), where="x")
    small, few = trim_model(model, trim, build_causal), trim_tokenizer(tokenizer, trim, where="x")
    save_causal(small, few, tmp_path / "m")
    write_gguf(tmp_path / "m", tmp_path / "m.gguf", "f32", name="tiny", where="x")
    ids = few(TEXT)["input_ids"]
    with llama_cpp_runner.opened(tmp_path / "m.gguf") as other:
        assert llama_cpp_runner.tokens(other, TEXT) == ids
        theirs = llama_cpp_runner.log_probs(other, ids)
    assert np.abs(theirs - log_probs(small, ids).numpy()).max() < 1e-3


@pytest.mark.parametrize("share", [0, 3, 20, 100, 5000, -40000, -1])
def test_a_file_cut_short_is_refused(file, tmp_path, share):
    data = file.read_bytes()
    (tmp_path / "short.gguf").write_bytes(data[:share])
    with pytest.raises(SourceError, match=r"short\.gguf (is cut short|is no GGUF|cannot be read)"):
        unpack_gguf(tmp_path / "short.gguf", tmp_path / "back", where="x")
    assert not (tmp_path / "back").exists()


def header_of(*values: tuple[str, int, bytes]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", 3, 0, len(values))]
    for name, kind, packed in values:
        parts += [struct.pack("<Q", len(name)), name.encode(), struct.pack("<I", kind), packed]
    return b"".join(parts)


ENDLESS = struct.pack("<IQ", 8, 2**60)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGML" + bytes(100), "is no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "is of GGUF version 1"),
        (header_of(("a", 9, ENDLESS)), "is cut short"),
        (header_of(("a", 9, struct.pack("<IQ", 4, 2**60))), "is cut short"),
        (header_of(("a", 8, struct.pack("<Q", 2**63))), "is cut short"),
        (header_of(("a", 77, b"")), "a value of type 77"),
        (header_of(("a", 8, struct.pack("<Q", 1) + b"\xff")), "no UTF-8"),
        (header_of(("general.alignment", 4, struct.pack("<I", 0))), "general.alignment 0"),
    ],
)
def test_what_an_enemy_wrote_is_refused_at_once(tmp_path, data, words):
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(SourceError, match=words):
        read_header(tmp_path / "bad.gguf", where="x")


def rewritten(file: Path, to: Path, **changes: str) -> Path:
    """The same file with other values of the same length."""
    data = file.read_bytes()
    for old, new in changes.items():
        assert data.count(old.encode()) >= 1 and len(old) == len(new)
        data = data.replace(old.encode(), new.encode())
    to.write_bytes(data)
    return to


def test_an_architecture_or_splitting_that_nobody_knows_is_refused(file, tmp_path):
    strange = rewritten(file, tmp_path / "strange.gguf", llama="zebra")
    with pytest.raises(SourceError, match=r"strange\.gguf \(zebra\): .*zebra"):
        unpack_gguf(strange, tmp_path / "back", where="x")
    strange = rewritten(file, tmp_path / "strange.gguf", smollm="smolly")
    with pytest.raises(SourceError, match="splits text by rules called 'smolly'"):
        unpack_gguf(strange, tmp_path / "back", where="x")
    lacking = rewritten(file, tmp_path / "strange.gguf", **{"blk.1.ffn_up": "blk.1.ffn_xx"})
    with pytest.raises(SourceError, match=r"strange\.gguf \(llama\): "):
        unpack_gguf(lacking, tmp_path / "back", where="x")


def test_scaled_positions_are_refused_both_ways(file, tmp_path):
    scaled = rewritten(file, tmp_path / "s.gguf", **{"token_embd.weight": "rope_freqs.weight"})
    with pytest.raises(SourceError, match="scales its positions"):
        unpack_gguf(scaled, tmp_path / "back", where="x")
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    folder = tiny_language.save(tmp_path / "m", rope_parameters=scaling)
    with pytest.raises(SourceError, match="scales its positions"):
        write_gguf(folder, tmp_path / "m.gguf", "f16", name="tiny", where="x")
    assert not (tmp_path / "m.gguf").exists()


def test_a_model_or_splitting_without_a_name_in_llama_cpp_is_not_written(tiny, tmp_path):
    with pytest.raises(SourceError, match="holds a Bert"):
        write_gguf(tiny / "teacher", tmp_path / "m.gguf", "f16", name="tiny", where="x")
    with pytest.raises(SourceError, match="splits text by rules that"):
        splitting_name({"model": {}, "pre_tokenizer": {"type": "Whitespace"}}, where="x")


def llama3_like(*, whole_words: bool) -> PreTrainedTokenizerFast:
    """Llama 3's rules and 261 tokens, of which no merges lead to `sea`."""
    state = json.loads(tiny_language.tokenizer().backend_tokenizer.to_str())
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocab = {t: i for i, t in enumerate([*tiny_language.SPECIALS, *sorted(letters), "sea", "th"])}
    state["model"] |= {"vocab": vocab, "merges": [["t", "h"]], "ignore_merges": whole_words}
    backend = Tokenizer.from_str(json.dumps(state))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS["llama-bpe"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return rebuilt(tiny_language.tokenizer(), backend)


@pytest.mark.parametrize("whole_words", [True, False])
def test_whole_words_go_before_merges_where_they_did(tmp_path, whole_words):
    tokenizer = llama3_like(whole_words=whole_words)
    save_causal(tiny_language.model(vocab_size=261), tokenizer, tmp_path / "m")
    write_gguf(tmp_path / "m", tmp_path / "m.gguf", "f32", name="tiny", where="x")
    name = read_header(tmp_path / "m.gguf", where="x").metadata["tokenizer.ggml.pre"]
    assert name == {True: "llama-bpe", False: "smaug-bpe"}[whole_words]
    unpack_gguf(tmp_path / "m.gguf", tmp_path / "back", where="x")
    ids = tokenizer("sea")["input_ids"]
    assert ids == [259] if whole_words else len(ids) == 3
    for text in ("sea", TEXT):
        assert load_tokenizer(tmp_path / "back", where="x")(text) == tokenizer(text)


@pytest.mark.slow
@pytest.mark.parametrize("whole_words", [True, False])
def test_llama_cpp_puts_whole_words_where_they_were(tmp_path, whole_words):
    tokenizer = llama3_like(whole_words=whole_words)
    save_causal(tiny_language.model(vocab_size=261), tokenizer, tmp_path / "m")
    write_gguf(tmp_path / "m", tmp_path / "m.gguf", "f32", name="tiny", where="x")
    with llama_cpp_runner.opened(tmp_path / "m.gguf") as other:
        for text in ("sea", f"{TEXT} sea"):
            assert llama_cpp_runner.tokens(other, text) == tokenizer(text)["input_ids"]


def test_a_folder_with_one_gguf_file_is_unpacked_and_another_is_left_alone(llama, file, tmp_path):
    assert causal_folder(llama, tmp_path / "aside", where="x") == llama
    assert not (tmp_path / "aside").exists()
    found = causal_folder(file.parent, tmp_path / "aside", where="x")
    assert found == tmp_path / "aside" and load_causal(found, where="x").config.use_cache is False
    os.link(file, tmp_path / "a.gguf")
    os.link(file, tmp_path / "b.gguf")
    with pytest.raises(SourceError, match="holds 2 GGUF files"):
        causal_folder(tmp_path, tmp_path / "aside2", where="x")


def test_what_does_not_continue_text_is_refused(tiny):
    with pytest.raises(SourceError, match="does not continue text"):
        load_causal(tiny / "teacher", where="x")
