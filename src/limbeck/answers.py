"""What an exported language model says of every position of some rows, kept short.

Not its logits, which are large, but what its last matrix multiplies, beside that matrix: from the
two any logits are a product away. So a file is read and run once, however many it is held against.
Where the model has no such matrix (`heads.tap_head`) it is the logits after all.

Shapes: P counted positions of the rows, V vocabulary, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from limbeck.causal import load_causal
from limbeck.cores import on_each
from limbeck.device import compute_device, on_device, rows_at_once
from limbeck.gguf_source import read_gguf_model
from limbeck.heads import tap_head
from limbeck.losses.fused import Head
from limbeck.losses.sparse import rows_per_chunk
from limbeck.measure_language import DocumentScores, summed, token_scores
from limbeck.onnx_decoder import open_headless, said_of

if TYPE_CHECKING:
    from limbeck.tasks.causal_rows import Rows

_KEPT_BYTES = 1 << 30  # but two files always: the one, and what it is held against


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    documents: Tensor  # (P,) int64
    labels: Tensor  # (P,) int64
    said: Tensor  # (P, D) what the head multiplies; without one (P, V) logits
    head: Head | None

    @property
    def nbytes(self) -> int:
        return self.said.nbytes + (0 if self.head is None else self.head.weight.nbytes)

    def logits(self, rows: slice) -> Tensor:
        return self.said[rows] if self.head is None else self.head.logits(self.said[rows])

    @property
    def vocab_size(self) -> int:
        return self.said.shape[1] if self.head is None else len(self.head.weight)

    def chunks(self) -> Iterator[slice]:
        size = rows_per_chunk(self.vocab_size, self.said.device.type)
        return (slice(start, start + size) for start in range(0, len(self.said), size))


def load_file(path: Path, format: str) -> nn.Module:
    """The exported file's model, in eval mode, that keeps no keys and values."""
    if format == "hf":
        return load_causal(path, where=str(path))
    model = read_gguf_model(path, where=str(path))
    model.config.use_cache = False
    return model.eval()


class Asker:
    """Asks files; the last ones' answers are kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, ...], Answers] = OrderedDict()

    def __call__(
        self, path: Path, format: str, rows: Rows, told: Callable[[int], object]
    ) -> Answers:
        """`told` the number of rows done since it was last told, all at once if they are known."""
        weights = path / "model.safetensors" if path.is_dir() else path
        stat = weights.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns, rows.ids.tobytes(),
               tuple(t.tobytes() for t in rows.tokens))  # fmt: skip
        if key in self._kept:
            self._kept.move_to_end(key)
            told(len(rows))
            return self._kept[key]
        found = (
            onnx_answers(path, rows, told) if format.startswith("onnx")
            else answers(load_file(path, format), rows, told)
        )  # fmt: skip
        self._kept[key] = found
        while len(self._kept) > 2 and sum(a.nbytes for a in self._kept.values()) > _KEPT_BYTES:
            self._kept.popitem(last=False)
        return found


@torch.inference_mode()
def answers(model: nn.Module, rows: Rows, told: Callable[[int], object]) -> Answers:
    """Of every counted position, in the rows' order; a share of the rows on each core."""
    device = compute_device()
    model.to(device)
    tap = tap_head(model, rows.batch([0]).to(device))
    tapped = None if isinstance(tap, str) else tap

    @torch.inference_mode()
    def look(at: range) -> tuple[Tensor, Tensor, Tensor]:
        batch = rows.batch(at).to(device)
        if tapped is None:
            said = model(**batch.inputs).logits
        else:
            with tapped.open() as found:
                model(**batch.inputs)
            ((said, _),) = found
        documents = rows.documents_at(at)[batch.mask.cpu()]
        return documents, batch.labels[batch.mask], said[batch.mask]

    size = rows_at_once(rows.num_together)
    parts = []
    for start, part in zip(
        range(0, len(rows), size),
        on_device(look, (range(s, min(s + size, len(rows))) for s in range(0, len(rows), size))),
        strict=True,
    ):
        parts.append(part)
        told(min(size, len(rows) - start))
    head = None
    if tapped is not None:
        head = tapped.head()
        tapped.remove()
    documents, labels, said = (torch.cat(column) for column in zip(*parts, strict=True))
    return Answers(documents=documents, labels=labels, said=said, head=head)


def onnx_answers(path: Path, rows: Rows, told: Callable[[int], object]) -> Answers:
    """As `answers`, by ONNX Runtime: each document in a call of its own, with an empty cache."""
    decoder, head = open_headless(path)
    said = []
    for one in on_each(lambda at: said_of(decoder, rows, at), range(len(rows))):
        said.append(one)
        told(1)
    columns = []
    for at in range(len(rows)):
        batch = rows.batch([at])
        columns.append((rows.documents_at([at])[batch.mask], batch.labels[batch.mask]))
    documents, labels = (torch.cat(column) for column in zip(*columns, strict=True))
    return Answers(documents=documents, labels=labels, said=torch.cat(said), head=head)


@torch.inference_mode()
def score(mine: Answers, theirs: Answers | None = None) -> DocumentScores:
    """By document; with a teacher's answers to the same rows held against those.

    Where one of them has more rows in its table those are padding, and left out.
    """
    sizes = [one.vocab_size for one in (mine, theirs) if one is not None]
    shared = None if len({*sizes}) == 1 else min(sizes)

    @torch.inference_mode()
    def look(rows: slice) -> tuple[Tensor, ...]:
        other = None if theirs is None else theirs.logits(rows).to(mine.labels.device)
        found = token_scores(mine.logits(rows), mine.labels[rows], other, shared_ids=shared)
        return (mine.documents[rows], *found)

    return summed([*on_device(look, mine.chunks())])
