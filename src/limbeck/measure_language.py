"""What a language model's answers are worth: perplexity, fidelity token by token, written text.

Sums are kept per document and every interval resamples documents, never tokens: those of one
document are alike, and taking each for itself gives intervals that are far too narrow. (95 %
percentile bootstrap, as `measure`.)

Shapes: P counted positions, V vocabulary, D documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from limbeck.errors import MissingExtraError
from limbeck.losses.divergence import cross_entropy, forward_kl
from limbeck.tasks.causal_rows import Rows
from limbeck.types import Interval

_RESAMPLES = 2000
_ENDS = (2.5, 97.5)
_CHUNK = 10**6  # of drawn counts at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentScores:
    """Sums over the counted positions of each document."""

    documents: np.ndarray  # (D,) int64, their numbers in the file, ascending
    num_tokens: np.ndarray  # (D,) int64
    nll: np.ndarray  # (D,) float64, nats: minus the log-probabilities of the labels
    right: np.ndarray  # (D,) int64: the largest logit is the label's
    kl: np.ndarray | None = None  # (D,) float64, nats: KL(teacher || student)
    same: np.ndarray | None = None  # (D,) int64: teacher and student have the same largest logit

    def perplexity(self, *, seed: int, resamples: int = _RESAMPLES) -> Interval:
        """exp of the mean nll of a token: comparable between models of one tokenizer alone."""
        found = ratio(self.nll, self.num_tokens, seed=seed, resamples=resamples)
        return Interval(
            value=math.exp(found.value), low=math.exp(found.low), high=math.exp(found.high),
            n=found.n,
        )  # fmt: skip

    def bits_per_byte(
        self, num_bytes: np.ndarray, *, seed: int, resamples: int = _RESAMPLES
    ) -> Interval:
        """Comparable between tokenizers; `num_bytes` (D,) are those of the documents' UTF-8."""
        return ratio(self.nll / math.log(2), num_bytes, seed=seed, resamples=resamples)

    def accuracy(self, *, seed: int, resamples: int = _RESAMPLES) -> Interval:
        """Share of tokens that are the model's first choice."""
        return ratio(self.right, self.num_tokens, seed=seed, resamples=resamples)

    def mean_kl(self, *, seed: int, resamples: int = _RESAMPLES) -> Interval:
        """Nats a token. Raises ValueError where no teacher was asked."""
        return ratio(_asked(self.kl), self.num_tokens, seed=seed, resamples=resamples)

    def agreement(self, *, seed: int, resamples: int = _RESAMPLES) -> Interval:
        """Share of tokens whose first choice is the teacher's. Raises ValueError as `mean_kl`."""
        return ratio(_asked(self.same), self.num_tokens, seed=seed, resamples=resamples)


@torch.inference_mode()
def score_documents(
    model: nn.Module, rows: Rows, *, teacher: nn.Module | None = None,
    shared_ids: int | None = None, batch_size: int = 4,
    told: Callable[[int], object] | None = None,
) -> DocumentScores:  # fmt: skip
    """Ask the model, and the teacher too, about every row. Models as they are: in eval mode.

    `shared_ids` (see `vocabulary`) where one of them has rows of padding; they are left out.
    `told` the number of rows done since it was last told.
    """
    parts: list[tuple[Tensor, ...]] = []
    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        at = range(start, min(start + batch_size, len(rows)))
        batch = rows.batch(at).to(device)
        documents = rows.documents_at(at)[batch.mask.cpu()]  # (P,)
        labels = batch.labels[batch.mask]
        logits = model(**batch.inputs).logits[batch.mask]  # (P, V)
        theirs = teacher(**batch.inputs).logits[batch.mask] if teacher is not None else None
        parts.append((documents, *token_scores(logits, labels, theirs, shared_ids=shared_ids)))
        if told is not None:
            told(len(at))
    return summed(parts)


def summed(parts: Sequence[tuple[Tensor, ...]]) -> DocumentScores:
    """Of positions, in parts: the number of each one's document, and its `token_scores`."""
    columns = [torch.cat([c.double().cpu() for c in part]) for part in zip(*parts, strict=True)]
    arrays = [column.numpy() for column in columns]
    named, place, counts = np.unique(arrays[0], return_inverse=True, return_counts=True)
    sums = [np.bincount(place, weights=column, minlength=len(named)) for column in arrays[1:]]
    kl, same = (sums[2], sums[3].astype(np.int64)) if len(sums) > 2 else (None, None)
    return DocumentScores(
        documents=named.astype(np.int64), num_tokens=counts, nll=sums[0],
        right=sums[1].astype(np.int64), kl=kl, same=same,
    )


def token_scores(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None = None, *,
    shared_ids: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(nll, right) and with a teacher (nll, right, kl, same); (P,) each, from logits (P, V)."""
    logits = logits[:, :shared_ids].float()
    first = logits.argmax(-1)
    own = (cross_entropy(logits, labels), first == labels)
    if teacher_logits is None:
        return own
    theirs = teacher_logits[:, :shared_ids].float()
    if theirs.shape != logits.shape:
        raise ValueError(
            f"logits of {logits.shape[-1]} and {theirs.shape[-1]} ids: say which are shared"
        )
    return (*own, forward_kl(logits, theirs), first == theirs.argmax(-1))


def document_bytes(rows: Rows, tokenizer: Any) -> dict[int, tuple[int, int]]:
    """By each document's number: UTF-8 bytes of what counts of it, special tokens left out; and the
    same without its first token, from which all begins and which nothing predicts."""
    found: dict[int, tuple[int, int]] = {}
    for at in range(len(rows)):
        numbers = rows.documents_at([at])[0].numpy()
        counted = rows.counted[at]
        predicted = counted.copy()
        predicted[rows.starts[at]] = False
        for number in np.unique(numbers[counted]).tolist():
            sizes = []
            for which in (counted, predicted):
                ids = rows.tokens[at][which & (numbers == number)].tolist()
                text = tokenizer.decode(
                    ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
                sizes.append(len(text.encode()))
            whole, part = found.get(number, (0, 0))
            found[number] = whole + sizes[0], part + sizes[1]
    return found


def ratio(
    sums: np.ndarray, counts: np.ndarray, *, seed: int, resamples: int = _RESAMPLES
) -> Interval:
    """sum(sums) / sum(counts), with documents resampled; both (D,), at least one document."""
    if len(sums) != len(counts) or len(sums) == 0 or not np.sum(counts) > 0:
        raise ValueError(f"{len(sums)} sums and {len(counts)} counts: as many, at least one")
    n, random = len(sums), np.random.default_rng(seed)
    draws = []
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        times = random.multinomial(n, np.full(n, 1 / n), size=min(step, resamples - start))
        below = times @ counts
        draws.append((times @ sums)[below > 0] / below[below > 0])
    low, high = np.percentile(np.concatenate(draws), _ENDS)
    return Interval(
        value=float(np.sum(sums) / np.sum(counts)), low=float(low), high=float(high), n=n
    )


def exact_match(written: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """(N,) bool: the same but for space around it."""
    _as_many(written, references)
    return np.array([a.strip() == b.strip() for a, b in zip(written, references, strict=True)])


def rouge_l(written: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """(N,) F1 of the longest common subsequence of words (Lin 2004; Google's rouge-score, no
    stemming). Words of other scripts than Latin are not seen. Needs the extra 'lm'."""
    _as_many(written, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise MissingExtraError.of("ROUGE-L", "lm") from None
    scorer = RougeScorer(["rougeL"])
    return np.array(
        [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(written, references, strict=True)]
    )


def chrf(
    written: Sequence[str], references: Sequence[str], *, seed: int, resamples: int = _RESAMPLES
) -> Interval:
    """chrF2 of the whole set, 0 to 1, texts resampled (Popovic 2015; sacrebleu). Needs 'lm'."""
    _as_many(written, references)
    try:
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise MissingExtraError.of("chrF", "lm") from None
    metric: Any = CHRF()
    # of each text its counts, as sacrebleu adds them up itself
    stats = np.array(metric._extract_corpus_statistics([*written], [[*references]]))  # (N, 3 n)
    n, random = len(stats), np.random.default_rng(seed)
    times = random.multinomial(n, np.full(n, 1 / n), size=resamples)  # (R, N)
    draws = [metric._compute_f_score(total.tolist()) for total in times @ stats]
    low, high = np.percentile(draws, _ENDS) / 100
    value = metric.corpus_score([*written], [[*references]]).score / 100
    return Interval(value=float(value), low=float(low), high=float(high), n=n)


def mean(values: np.ndarray, *, seed: int, resamples: int = _RESAMPLES) -> Interval:
    """Of one value per text: ROUGE-L's, or of exact matches the share."""
    return ratio(np.asarray(values, float), np.ones(len(values)), seed=seed, resamples=resamples)


def _asked(column: np.ndarray | None) -> np.ndarray:
    if column is None:
        raise ValueError("no teacher was asked")
    return column


def _as_many(written: Sequence[str], references: Sequence[str]) -> None:
    if len(written) != len(references) or not written:
        raise ValueError(f"{len(written)} texts, {len(references)} references: as many, at least 1")
