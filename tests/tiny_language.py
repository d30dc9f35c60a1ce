"""A tiny random Llama with a tokenizer as SmolLM2's: bytes, digits apart, a chat template."""

import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from limbeck.tasks.causal_rows import Rows

CORPUS = [
    "the old man and the sea 1952", "a mansion and theology, andante cantabile",
    "so-called see saws are seen at sea", "\tdéjà vu: naïve café owners owe 12345 euros",
    "theology is the theory of the gods; anthology is another thing", "12 34 56 seas and oceans",
    "a\n 1\n 2 and\n 3",
    "the package provides libraries and headers for the development of programs",
]  # fmt: skip
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def digits_apart() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


@cache
def tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = digits_apart()
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIALS],
        ),
    )  # fmt: skip
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIALS[1], eos_token=SPECIALS[2],
        unk_token=SPECIALS[0], pad_token=SPECIALS[2], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    found.chat_template = TEMPLATE
    return found


def config(**changes) -> LlamaConfig:
    settings = {
        "vocab_size": len(tokenizer()), "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
        "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return LlamaConfig(**{**settings, **changes})


def model(seed: int = 0, made: type = LlamaForCausalLM, **changes) -> LlamaForCausalLM:
    """In eval mode, with weights so large that every unit shows in the outputs."""
    torch.manual_seed(seed)
    settings = config(**changes)
    if made is not LlamaForCausalLM:
        settings = made.config_class(**{**settings.to_dict(), "model_type": None})
    found = made(settings).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
            else:
                parameter += 0.3 * torch.randn_like(parameter)
    return found


def save(folder: Path, **changes) -> Path:
    model(**changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def log_probs(of, ids: list[int]) -> torch.Tensor:
    """(T - 1,) of each token after the first."""
    tokens = torch.tensor([ids])
    scores = of(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(1, tokens[0, 1:, None])[:, 0]


def rows(num: int = 12) -> Rows:
    """Random ids."""
    draw = np.random.default_rng(0)
    tokens = tuple(draw.integers(3, 400, 10).astype(np.int32) for _ in range(num))
    return Rows(
        ids=np.arange(num), tokens=tokens, counted=tuple(np.ones(10, bool) for _ in tokens),
        starts=(np.array([0]),) * num, documents=tuple(np.array([i]) for i in range(num)),
        pad_id=0, layout="pad",
    )  # fmt: skip


def texts(num: int = 60) -> list[str]:
    """Sentences whose next word the last one tells."""
    draw = random.Random(0)
    words = ["the", "old", "man", "and", "sea", "cafe", "owners", "owe", "theology", "gods"]
    after = {word: words[(3 * i + 1) % len(words)] for i, word in enumerate(words)}
    found = []
    for i in range(num):
        said = [draw.choice(words)]
        while len(said) < 8:
            said.append(after[said[-1]])
        found.append(" ".join(said) + f" {i % 10}")
    return found


def make_language_world(folder: Path, **changes) -> Path:
    """`teacher/`, `rows.jsonl` and `recipe.yaml` in the folder."""
    save(folder / "teacher")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts())
    (folder / "rows.jsonl").write_text(rows)
    training = {"epochs": 6, "batch_size": 8, "learning_rate": 3e-3}
    recipe = {
        "name": "tiny",
        "task": {"kind": "language-modeling", "max_tokens": 32},
        "data": {"train": "rows.jsonl", "test_fraction": 0.2},
        "teacher": {"model": "teacher", "tune": {**training, "epochs": 20}},
        "distill": {"training": training},
        "students": [{"name": "one", "budget": {"params": 60000}}],
        "evidence": {"baselines": "none"},
        "export": {"formats": ["hf", "gguf-q8_0"]},
        "measure": {"latency_runs": 10},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
    return folder
