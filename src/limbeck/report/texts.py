"""Of report.json: what language models write to prompts of the test rows."""

from __future__ import annotations

from pydantic import Field

from limbeck.recipe import Spec


class Score(Spec):
    """A mean over texts, 0 to 1, or a score of all of them; more is better."""

    value: float
    """1 is perfect."""
    low: float
    """Lower end of the 95 % bootstrap interval, texts resampled."""
    high: float
    """Upper end of the 95 % bootstrap interval."""
    n: int = Field(ge=1)
    """Texts."""


class TextScores(Spec):
    """What a model wrote, held against the references."""

    exact_match: Score
    """Share of texts that are the reference, but for space around them."""
    rouge_l: Score
    """F1 of the longest common subsequence of words, mean of the texts (rouge-score)."""
    chrf: Score
    """chrF2, character n-grams, of all texts together (sacrebleu)."""
    ended: float = Field(ge=0, le=1)
    """Share of texts that came to their end; the others were cut."""


class WrittenText(Spec):
    """One text of one model."""

    text: str
    """As it was written, special tokens left out."""
    ended: bool
    """Whether it came to its end; if not, it was cut."""
    rouge_l: float = Field(ge=0, le=1)
    """Its own."""


class TextExample(Spec):
    """A prompt, what stands behind it, and what the models write."""

    prompt: str
    """Of conversations the messages, not the chat template's text."""
    reference: str
    """What stands in the data."""
    written: dict[str, WrittenText]
    """By the model's name; `teacher`."""


class Texts(Spec):
    """Teacher and students wrote to the same prompts of the test rows: the likeliest token each
    time, the primary files."""

    max_new_tokens: int = Field(ge=1)
    """Of a text, if it did not come to its end before."""
    scores: dict[str, TextScores]
    """By the model's name; `teacher`, and `NAME/hard_labels` for a baseline."""
    examples: tuple[TextExample, ...] = ()
    """The first of the prompts, as they were drawn: not chosen."""
    notes: tuple[str, ...] = ()
    """What a reader must know, in plain sentences."""
