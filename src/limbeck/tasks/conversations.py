"""Documents as token ids, each with whether it is to be predicted.

Segments are tokenised one by one, as when the model is used: a prompt is cut into tokens before
anything is known of its answer, so no token may stand across the border.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from limbeck.errors import DataError, MissingExtraError
from limbeck.tasks.packing import Piece
from limbeck.tasks.records import Kind

Segments = list[tuple[str, bool]]
"""Text and whether its tokens are to be predicted."""


class Encoder:
    """From a record (see `records`) to tokens.

    Text and completions end with the tokenizer's end token, which is to be predicted too; the
    tokenizer's own beginning stands before a document. A conversation is what the chat template
    makes of it and nothing else; behind the end of an answer nothing is to be predicted.
    Raises DataError where the tokenizer lacks the end token or, for messages, the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kind: Kind, *, where: str) -> None:
        self.tokenizer, self.kind, self.where = tokenizer, kind, where
        end: Any = tokenizer.eos_token_id
        if end is None:
            raise DataError(
                where, "its tokenizer names no end token", allowed="eos_token in its config",
                fix="add it: without one the model never learns to stop",
            )  # fmt: skip
        if kind == "messages" and not tokenizer.chat_template:
            raise DataError(
                where, "its tokenizer has no chat template", allowed="a chat_template",
                fix="choose a model that was made for chat, or give prompt and completion",
            )  # fmt: skip
        self.end = int(end)
        begin: Any = tokenizer.bos_token_id
        own: Any = tokenizer("")["input_ids"]
        self.begin = [int(begin)] if begin is not None and begin in own else []

    def __call__(self, value: Any, document: int, at: str) -> Piece:
        tokens: list[int] = [] if self.kind == "messages" else [*self.begin]
        counted = [False] * len(tokens)
        for text, wanted in self._segments(value, at):
            ids = self._ids(text)
            through = len(ids)
            if self.kind == "messages" and self.end in ids:
                through -= ids[::-1].index(self.end)  # behind the end of a turn: a line feed, say
            tokens += ids
            counted += [wanted and i < through for i in range(len(ids))]
        if self.kind != "messages":
            tokens.append(self.end)
            counted.append(True)
        return Piece(document, np.asarray(tokens, np.int32), np.asarray(counted, bool))

    def prompt(self, value: Any, at: str = "prompt") -> list[int]:
        """Tokens of what the model is asked: a text, or messages of which none is an answer yet."""
        if self.kind == "messages":
            return self._ids(self._render(value, at, ask=True))
        return [*self.begin, *self._ids(value)]

    def _ids(self, text: str) -> list[int]:
        found: Any = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _segments(self, value: Any, at: str) -> Iterator[tuple[str, bool]]:
        if self.kind == "text":
            yield value, True
        elif self.kind == "completion":
            yield value[0], False
            yield value[1], True
        else:
            yield from self._turns(value, at)

    def _turns(self, messages: Sequence[dict[str, str]], at: str) -> Iterator[tuple[str, bool]]:
        """Answers are found by rendering the conversation up to them, and then with them: the
        template need not mark them. What follows must not change what is before."""
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._render(messages[:number], at, ask=True)
            answered = self._render(messages[: number + 1], at)
            grows = asked.startswith(done) and answered.startswith(asked)
            if not grows or len(answered) == len(asked):
                raise DataError(
                    at, f"the chat template writes message {number + 1} otherwise once it is known "
                    "or once more follows", allowed="a template that only ever adds to its text",
                    fix="keep one answer, the last; or use another template",
                )  # fmt: skip
            yield asked[len(done) :], False
            yield answered[len(asked) :], True
            done = answered

    def _render(
        self, messages: Sequence[dict[str, str]], at: str, *, ask: bool = False
    ) -> str:
        if ask and not messages:
            return ""
        try:
            found: Any = self.tokenizer.apply_chat_template(
                [*messages], tokenize=False, add_generation_prompt=ask
            )
        except ImportError:
            raise MissingExtraError.of("chat templates", "lm") from None
        except Exception as error:  # whatever a template's own raise_exception says
            raise DataError(
                at, f"the chat template refuses it: {str(error).splitlines()[0][:200]}",
                allowed="messages in the order that the template wants", fix="mend the row",
            ) from error  # fmt: skip
        return found
