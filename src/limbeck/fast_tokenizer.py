"""Tokenizers as one `tokenizer.json` that is read back as it was written.

transformers 5 builds a class such as GPT2Tokenizer anew from its vocabulary and merges alone, with
the class's own rules for splitting text: SmolLM2's, which part digits, are lost at the first
reload. The generic class keeps what the file says.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from limbeck.run import json_sha256

_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))


def rebuilt(like: PreTrainedTokenizerBase, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of the generic class around `backend`, with the named special tokens, the chat
    template and the length of `like`.

    A named token that `backend` lacks is left out: it would be added behind the vocabulary, where
    the model has no row.
    """
    settings: dict[str, Any] = {
        name: token
        for name in _NAMED
        if (token := getattr(like, name, None)) and backend.token_to_id(str(token)) is not None
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False,
        model_max_length=like.model_max_length, padding_side="right", **settings,
    )  # fmt: skip
    tokenizer.chat_template = getattr(like, "chat_template", None)
    return tokenizer


def tokenizer_fingerprints(tokenizer: PreTrainedTokenizerBase) -> dict[str, str | None]:
    """Of its tokens with their ids, of the rules by which it cuts text, of its chat template."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for changing in ("truncation", "padding", "model", "added_tokens"):
        rules.pop(changing, None)
    template: Any = tokenizer.chat_template
    return {
        "tokenizer": json_sha256(tokenizer.get_vocab()),
        "rules": json_sha256(rules),
        "chat_template": json_sha256(template) if template else None,
    }
