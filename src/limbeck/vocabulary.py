"""Vocabularies are compared token by token: what an id means, not how many ids there are.

Model makers pad the table of embeddings (Qwen2.5-0.5B has 151,936 rows, the 7B 152,064, for one
tokenizer of 151,665 tokens), so sizes say nothing either way.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from limbeck.errors import DataError
from limbeck.types import DenseTargets, SparseTargets


def shared_ids(
    student: Mapping[str, int], teacher: Mapping[str, int], *, student_size: int, teacher_size: int
) -> int:
    """How many ids, from 0 on, both models have and mean the same token by.

    Tokenizers as `get_vocab()` gives them: token -> id; sizes are those of the logits. Ids that
    belong to no token on either side are padding. Raises DataError for two tokenizers.
    """
    ours, theirs = ({i: token for token, i in side.items()} for side in (student, teacher))
    size = min(student_size, teacher_size)
    for i in range(size):
        if ours.get(i) != theirs.get(i):
            raise DataError(
                "student", f"id {i} is {ours.get(i)!r} to its tokenizer, {theirs.get(i)!r} to the "
                "teacher's", allowed="the teacher's tokenizer, padded as you like",
                fix="take a student with the teacher's tokenizer, or a cross-tokenizer loss",
            )  # fmt: skip
    for name, side in (("student", ours), ("teacher", theirs)):
        if beyond := sorted(i for i in side if i >= size):
            raise DataError(
                name, f"{len(beyond)} of its tokens, {side[beyond[0]]!r} first, are unknown to the "
                "other model", allowed="one tokenizer for both",
                fix="take a student with the teacher's tokenizer, or a cross-tokenizer loss",
            )  # fmt: skip
    return size


def fitted(
    targets: DenseTargets | SparseTargets, shared: int, vocab_size: int
) -> DenseTargets | SparseTargets:
    """The teacher's targets over the student's `vocab_size` ids; beyond `shared` all is padding.

    The teacher's padding is dropped. The student's has probability 0, so that it learns to give it
    none: cut off instead, nothing would ever push it down.
    """
    if isinstance(targets, DenseTargets):
        logits = targets.logits[..., :shared]
        if vocab_size == logits.shape[-1]:
            return DenseTargets(logits=logits)
        missing = logits.new_full((*logits.shape[:-1], vocab_size - shared), -torch.inf)
        return DenseTargets(logits=torch.cat([logits, missing], -1))
    known = targets.ids < shared
    if bool(known.all()):
        return targets
    probs = targets.probs * known
    ids = targets.ids.masked_fill(~known, 0)  # an empty slot: probability 0, any id
    tail = targets.tail
    if targets.kind == "kept":
        probs, tail, ids = _without_doubles(probs, tail, ids, known, shared)
    return SparseTargets(
        kind=targets.kind, ids=ids, probs=probs, tail=tail, temperature=targets.temperature
    )


def _without_doubles(
    probs: Tensor, tail: Tensor, ids: Tensor, known: Tensor, shared: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty slots take ids that no other slot of their position has; what is left sums to 1.

    `sparse_divergence` sees each id as an outcome of its own, so that none may stand twice.
    """
    width = ids.shape[-1]
    # of the first 2 K ids enough are free; one more stands for all behind them
    some = min(2 * width, shared)
    taken = torch.zeros(*ids.shape[:-1], some + 1, dtype=torch.int8, device=ids.device)
    ones = known.to(torch.int8)
    taken.scatter_add_(-1, ids.masked_fill(~known, some).clamp_max(some), ones)
    free = taken[..., :-1].sort(dim=-1, stable=True).indices[..., :width]
    slot = (~known).cumsum(-1).sub(1).clamp_min(0)
    ids = torch.where(known, ids, free.gather(-1, slot))
    total = probs.sum(-1) + tail
    return probs / total.unsqueeze(-1), tail / total, ids
