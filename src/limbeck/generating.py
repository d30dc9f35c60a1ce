"""Continuations sampled from a model: for distillation on the student's own text (GKD, Agarwal et
al. 2024, 2306.13649), and for a person who tries it out.

Each prompt draws from a generator of its own, seeded by the seed and the prompt's number: what is
written does not depend on which prompts share a batch (but for rounding, which once in many tokens
turns a draw).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from limbeck.errors import DataError
from limbeck.types import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    max_new_tokens: int
    sampling_temperature: float = 1.0
    """0: always the first choice."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities (at that temperature) reach this sum."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.sampling_temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"no such sampling: {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Completions:
    """What was written, one entry for each prompt."""

    prompts: tuple[np.ndarray, ...]
    tokens: tuple[np.ndarray, ...]  # with the end token where it was reached
    log_probs: tuple[np.ndarray, ...]  # of each token, at temperature 1 and without top_p
    ended: np.ndarray  # (N,) bool: an end token was reached

    def batch(self, positions: Sequence[int], *, pad_id: int, numbers: Sequence[int]) -> Batch:
        """As `completion_batch`; `numbers` are the prompts' ids."""
        return completion_batch(
            [self.prompts[i] for i in positions], [self.tokens[i] for i in positions],
            pad_id=pad_id, numbers=[numbers[i] for i in positions],
        )  # fmt: skip


def completion_batch(
    prompts: Sequence[np.ndarray], tokens: Sequence[np.ndarray], *, pad_id: int,
    numbers: Sequence[int],
) -> Batch:  # fmt: skip
    """Prompt and completion, padded on the right; the completion alone counts. (B, T).

    As `tasks.causal_rows.Rows.batch`; `numbers` are the rows' ids.
    """
    whole = [np.concatenate(pair) for pair in zip(prompts, tokens, strict=True)]
    shape = (len(whole), max(map(len, whole)))
    ids = torch.full(shape, pad_id, dtype=torch.long)
    labels = torch.full(shape, pad_id, dtype=torch.long)
    held = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, said) in enumerate(zip(prompts, whole, strict=True)):
        length = len(said)
        ids[row, :length] = torch.from_numpy(said.astype(np.int64))
        labels[row, : length - 1] = ids[row, 1:length]
        held[row, :length] = 1
        mask[row, len(prompt) - 1 : length - 1] = True
    return Batch(
        inputs={"input_ids": ids, "attention_mask": held}, labels=labels, mask=mask,
        example_ids=torch.tensor(numbers),
    )  # fmt: skip


def end_ids(model: Any) -> tuple[int, ...]:
    """The tokens at which the model stops, by its generation config or its config."""
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()


def generate(
    model: nn.Module, prompts: Sequence[Sequence[int] | np.ndarray], sampling: Sampling, *,
    ends: Sequence[int], numbers: Sequence[int] | None = None, batch_size: int = 8,
) -> Completions:  # fmt: skip
    """A completion of each prompt, by a model in eval mode, with a cache of keys and values.

    `numbers` seed each prompt's draws; by default its place. Prompts of like length share a batch.
    Raises DataError for an empty prompt or one that leaves no room in the model's context.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    asked = [np.asarray(prompt, np.int64) for prompt in prompts]
    for i, prompt in enumerate(asked):
        _check_length(model, prompt, sampling, f"prompt {i}")
    tokens: dict[int, np.ndarray] = {}
    log_probs: dict[int, np.ndarray] = {}
    order = sorted(range(len(asked)), key=lambda i: (len(asked[i]), i))
    for start in range(0, len(order), batch_size):
        at = order[start : start + batch_size]
        steps = [*_steps(model, [asked[i] for i in at], sampling, [numbers[i] for i in at], ends)]
        for row, i in enumerate(at):
            said = np.array([step[0][row] for step in steps])
            over = np.flatnonzero(np.isin(said, ends))
            length = int(over[0]) + 1 if len(over) else len(said)
            tokens[i] = said[:length]
            log_probs[i] = np.array([step[1][row] for step in steps[:length]])
    places = range(len(asked))
    return Completions(
        prompts=tuple(asked), tokens=tuple(tokens[i] for i in places),
        log_probs=tuple(log_probs[i] for i in places),
        ended=np.array([bool(np.isin(tokens[i], ends).any()) for i in places]),
    )  # fmt: skip


def stream(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int],
    sampling: Sampling, *, ends: Collection[int],
) -> Generator[str, None, bool]:  # fmt: skip
    """The completion's text as it is written, special tokens left out; no piece is empty. Returned
    is whether it came to its end.

    Raises DataError as `generate` does.
    """
    asked = np.asarray(prompt, np.int64)
    _check_length(model, asked, sampling, "prompt")
    said: list[int] = []
    shown, ended = "", False
    for (token,), _ in _steps(model, [asked], sampling, [0], [*ends]):
        if token in ends:
            ended = True
            break
        said.append(int(token))
        text: Any = tokenizer.decode(said, skip_special_tokens=True)
        if not text.endswith("\ufffd") and len(text) > len(shown):  # bytes of a sign are missing
            yield text[len(shown) :]
            shown = text
    text = tokenizer.decode(said, skip_special_tokens=True)
    if len(text) > len(shown):
        yield text[len(shown) :]
    return ended


def _check_length(model: Any, prompt: np.ndarray, sampling: Sampling, where: str) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    if len(prompt) == 0 or (most is not None and len(prompt) + sampling.max_new_tokens > most):
        raise DataError(
            where, f"{len(prompt)} tokens, to which {sampling.max_new_tokens} may come",
            allowed=f"1 to {most} in all, the model's context" if most else "at least one",
            fix="shorten the prompt, or ask for fewer new tokens",
        )  # fmt: skip


@torch.inference_mode()
def _steps(
    model: Any, prompts: Sequence[np.ndarray], sampling: Sampling, numbers: Sequence[int],
    ends: Sequence[int],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """(tokens, their log-probabilities), (B,) each, a step at a time until all have ended.

    Prompts are padded on the left, so that all write at the same place.
    """
    device = next(model.parameters(), torch.empty(0)).device
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    held = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        held[row, longest - len(prompt) :] = 1
    places = (held.cumsum(1) - 1).clamp_min(0)
    draws = [np.random.default_rng((sampling.seed, number)) for number in numbers]
    last = (
        {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters
        else {}
    )  # fmt: skip
    ended = np.zeros(len(prompts), bool)
    cache: Any = None
    for _ in range(sampling.max_new_tokens):
        said = model(
            input_ids=ids, attention_mask=held, position_ids=places, past_key_values=cache,
            use_cache=True, **last,
        )  # fmt: skip
        cache = said.past_key_values
        log_probs = said.logits[:, -1].float().log_softmax(-1)  # (B, V)
        chosen = _choose(log_probs, sampling, draws)  # (B,)
        found = log_probs.gather(1, chosen[:, None])[:, 0]
        yield chosen.cpu().numpy(), found.cpu().numpy()
        ended |= np.isin(chosen.cpu().numpy(), ends)
        if ended.all():
            return
        ids, places = chosen[:, None], places[:, -1:] + 1
        held = torch.cat([held, held.new_ones(len(held), 1)], 1)


def _choose(
    log_probs: Tensor, sampling: Sampling, draws: Sequence[np.random.Generator]
) -> Tensor:
    """(B, V) -> (B,): the first token at which the summed probabilities pass the row's draw."""
    if sampling.sampling_temperature == 0:
        return log_probs.argmax(-1)
    probs = (log_probs.double() / sampling.sampling_temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, at = probs.sort(dim=-1, descending=True, stable=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        probs = probs.masked_fill(beyond.gather(-1, at.argsort(-1)), 0)
    sums = probs.cumsum(-1)  # (B, V)
    drawn = torch.tensor([draw.random() for draw in draws], dtype=torch.float64)
    target = drawn.to(sums.device)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, target, right=True)[:, 0].clamp_max(probs.shape[-1] - 1)
