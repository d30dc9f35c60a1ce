"""A tiny random Llama with a tokenizer as SmolLM2's: bytes, digits apart, a chat template."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
