"""A small Llama of random weights and a byte-pair vocabulary of 4,096, for `decoder.yaml`.

    python benchmarks/decoder.py runs/llama
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from limbeck.recipe import Source
from limbeck.sources import fetch

_VOCAB = 4096
_END = "<|end|>"


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=_VOCAB, special_tokens=[_END], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=_END, eos_token=_END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    source = Source(uri="debian://descriptions/en")
    path = fetch(source, where="data", kind="data").path
    lines = path.read_text(encoding="utf-8").splitlines()
    made = tokenizer([json.loads(line)["text"] for line in lines[::4]])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=_VOCAB, hidden_size=192, intermediate_size=576, num_hidden_layers=6,
            num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=True,
            max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    made.save_pretrained(options.folder)
    model.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
