"""Documents as prompts and what stands behind them: what a model's own text is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.tasks.conversations import Encoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Of one document. The students' tokens are the teacher's, unless they have others."""

    document: int
    """Its number in the file it came from."""
    prompt: str
    """As a person reads it."""
    reference: str
    tokens: tuple[int, ...]
    """That the teacher is given."""
    own: tuple[int, ...]
    """That students are given."""


def prompt_of(
    value: Any, document: int, teacher: Encoder, student: Encoder, *, first_tokens: int,
    max_new_tokens: int, at: str,
) -> Prompt | None:  # fmt: skip
    """The answer is the reference; of plain text what follows its `first_tokens`, or its first
    half if that is shorter, at most `max_new_tokens` of the teacher's.

    None for a document of which nothing stands before or behind the border. Raises DataError as
    `Encoder.prompt` does.
    """
    if teacher.kind == "messages":
        asked, reference = value[:-1], value[-1]["content"]
        shown = "\n".join(f"{message['role']}: {message['content']}" for message in asked)
    elif teacher.kind == "completion":
        asked, reference = value
        shown = asked
    else:
        cut = _cut(value, teacher.tokenizer, first_tokens, max_new_tokens)
        if cut is None:
            return None
        ids, shown, reference = cut
        tokens = (*teacher.begin, *ids)
        own = tokens if student is teacher else (*student.prompt(shown),)
        return Prompt(document=document, prompt=shown, reference=reference, tokens=tokens, own=own)
    if not asked or not reference.strip():
        return None
    tokens = (*teacher.prompt(asked, at),)
    own = tokens if student is teacher else (*student.prompt(asked, at),)
    return Prompt(document=document, prompt=shown, reference=reference, tokens=tokens, own=own)


def _cut(text: str, tokenizer: Any, first: int, most: int) -> tuple[Sequence[int], str, str] | None:
    """The first tokens, their text, and the text of those behind; never inside of a character."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = found["input_ids"], found["offset_mapping"]
    length = min(first, len(ids) // 2)
    while length and spans[length][0] < spans[length - 1][1]:  # bytes of the same character
        length -= 1
    if not length:
        return None
    border, end = spans[length - 1][1], spans[min(length + most, len(ids)) - 1][1]
    return ids[:length], text[:border], text[border:end]
