"""A conversation with a student, in the words of its tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck.causal import load_causal
from limbeck.errors import DataError
from limbeck.generating import Sampling, end_ids, stream
from limbeck.models import load_tokenizer
from limbeck.tasks.conversations import Encoder
from limbeck.trying import hf_folder


@dataclass
class Chat:
    """What was said so far. `Chat.of` opens one."""

    model: Any
    tokenizer: Any
    encoder: Encoder
    sampling: Sampling
    """`max_new_tokens` is what an answer may have, and what a question must leave room for."""
    messages: list[dict[str, str]] = field(default_factory=list)
    note: str | None = None
    """A sentence about the last answer: where it was cut, what was forgotten for it."""

    @classmethod
    def of(cls, student: Path, sampling: Sampling, system: str | None = None) -> Chat:
        """With a student's folder, file or `hf` folder. `system`: what it is told beforehand.

        Raises SourceError for a model that writes no text, DataError for a tokenizer without a chat
        template, or with one that takes no system message.
        """
        hf = hf_folder(student)
        where = str(hf)
        model, tokenizer = load_causal(hf, where=where), load_tokenizer(hf, where=where)
        if not tokenizer.chat_template:
            raise DataError(
                where, "its tokenizer has no chat template", allowed="a chat_template",
                fix='let it go on from a text: `limbeck try STUDENT "beginning"`',
            )  # fmt: skip
        encoder = Encoder(tokenizer, "messages", where=where)
        chat = cls(model, tokenizer, encoder, sampling)
        if system is not None:
            chat.messages.append({"role": "system", "content": system})
            encoder.prompt([*chat.messages, {"role": "user", "content": "?"}], at="--system")
        return chat

    def say(self, text: str) -> Generator[str, None, None]:
        """The answer, in pieces as it is written. Behind the last see `note`.

        The oldest questions and answers are forgotten where the context has no room for them.
        Raises DataError for a question that is too long by itself; it is not part of what was said.
        """
        self.note = None
        asked, prompt, forgotten = self._fitted({"role": "user", "content": text})
        answer: list[str] = []
        pieces = stream(
            self.model, self.tokenizer, prompt, self.sampling,
            ends={*end_ids(self.model), self.encoder.end},
        )  # fmt: skip
        ended = False
        while True:
            try:
                piece = next(pieces)
            except StopIteration as stop:
                ended = stop.value
                break
            answer.append(piece)
            yield piece
        self.messages = [*asked, {"role": "assistant", "content": "".join(answer)}]
        notes = []
        if forgotten:
            notes.append(f"the first {forgotten} messages are forgotten: the context is full")
        if not ended:
            notes.append(f"cut at {self.sampling.max_new_tokens} tokens")
        self.note = "; ".join(notes) or None

    def _fitted(self, message: dict[str, str]) -> tuple[list[dict[str, str]], list[int], int]:
        """The conversation with this message, its tokens, and how many messages it had to lose."""
        context = getattr(self.model.config, "max_position_embeddings", None)
        first = [m for m in self.messages[:1] if m["role"] == "system"]
        said = self.messages[len(first) :]
        for lost in range(0, len(said) + 1, 2):
            asked = [*first, *said[lost:], message]
            prompt = self.encoder.prompt(asked, at="your message")
            if context is None or len(prompt) + self.sampling.max_new_tokens <= context:
                return asked, prompt, lost
        raise DataError(
            "your message", f"{len(prompt)} tokens, to which {self.sampling.max_new_tokens} may "
            "come", allowed=f"{context} in all, the model's context",
            fix="shorten it, or ask for a shorter answer with --max-new-tokens",
        )  # fmt: skip
