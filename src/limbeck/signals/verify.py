"""A stored capture against the teacher it says it is of: the same answers, and how much is lost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from limbeck.errors import DataError
from limbeck.run import read_index, require_sha256
from limbeck.signals.capture import Rows, keys_of
from limbeck.signals.codecs import Codec, LogitCodec, Text, VectorCodec
from limbeck.signals.errors import Gradients, bias_of, distances, topk_weights
from limbeck.signals.store import INDEX, MANIFEST, PROVENANCE, Store, open_store, read_manifest
from limbeck.types import DenseTargets, Need, SparseTargets, Teacher

_DRAWS = 50  # of a sample, to tell its bias from its noise
_CHUNK = 32  # examples


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """Means over the positions that were computed again. Gradients are a half-taught student's.

    Of hidden states, embeddings and text only the largest difference is known (text: 1 where any
    byte differs).
    """

    positions: int
    largest_difference: float  # of a stored logit (dense) or probability, against the teacher now
    total_variation: float | None  # teacher against what is decoded (top-k: tail spread evenly)
    kl: float | None  # nats, teacher || decoded; None for samples: they are no distribution
    gradient_error: float | None  # rms over positions, as a share of the dense gradient's length
    gradient_bias: float | None  # the same of the mean over draws, less what noise explains
    bias_score: float | None  # the bias in standard errors; None: there is no noise, all is bias


def check_files(folder: Path) -> int:
    """Every checksum of a finished capture; the number of its shards. Raises DamagedError."""
    manifest = read_manifest(folder)
    require_sha256(folder / INDEX, manifest["index_sha256"])
    for shard in manifest["shards"]:
        require_sha256(folder / shard["file"], shard["sha256"])
    return len(manifest["shards"])


def verify(
    folder: Path, teacher: Teacher, rows: Rows, *, num_rows: int = 64, seed: int = 0
) -> Verification:
    """Ask the teacher again about rows drawn at random, and compare.

    Raises DamagedError for a file that is not as it was written, DataError where a row is missing.
    """
    store = open_store(folder)
    if not isinstance(store.codec, LogitCodec):
        return _same_again(store, teacher, rows, num_rows, seed)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:num_rows]
    temperature = (store.codec.temperatures or (1.0,))[0]
    logits, keys, ids = [], [], []
    for start in range(0, len(drawn), _CHUNK):
        batch = rows.batch(drawn[start : start + _CHUNK].tolist())
        said = teacher.signal(batch, frozenset({Need.LOGITS})).logits_at(batch.mask)
        logits.append(said.float().cpu())
        keys.append(keys_of(batch))
        ids.append(batch.example_ids)
    now, at = torch.cat(logits), torch.cat(keys)  # (P, V), (P, 2)
    if now.shape[1] != store.vocab_size:
        raise DataError(
            str(folder), f"signals over {store.vocab_size:,} classes",
            allowed=f"{now.shape[1]:,}, as the teacher has", fix="give the teacher they are of",
        )  # fmt: skip
    then = store.targets(torch.cat(ids), temperature)
    return _compared(store, now, at, then, temperature)


def _same_again(
    store: Store, teacher: Teacher, rows: Rows, num_rows: int, seed: int
) -> Verification:
    """What the codec stores of the teacher now, against what is stored."""
    codec = store.codec
    assert isinstance(codec, VectorCodec)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:num_rows]
    largest, positions = 0.0, 0
    for part in drawn.split(_CHUNK):
        batch = rows.batch(part.tolist())
        said = teacher.signal(batch, frozenset({codec.need}))
        now, counts = codec.encode_signal(said, batch, store.manifest["seed"])
        then, stored = store.take(batch.example_ids)
        positions += int(counts.sum())
        for name, values in now.items():
            if values.shape != then[name].shape or not torch.equal(counts, stored):
                largest = float("inf")
            elif len(values):
                apart = (values.float().cpu() - then[name].float()).abs().max()
                largest = max(largest, float(apart))
    if isinstance(codec, Text):
        largest = float(largest > 0)
    return Verification(
        positions=positions, largest_difference=largest, total_variation=None, kl=None,
        gradient_error=None, gradient_bias=None, bias_score=None,
    )  # fmt: skip


def _compared(
    store: Store, logits: Tensor, keys: Tensor, stored: DenseTargets | SparseTargets, t: float
) -> Verification:
    codec, seed = store.codec, store.manifest["seed"]
    assert isinstance(codec, LogitCodec)
    p = (logits.double() / t).softmax(-1)
    gradients = Gradients(p, (logits.double() / (2 * t)).softmax(-1))
    if isinstance(stored, DenseTargets):
        finite = logits.isfinite()  # masked classes are -inf on both sides
        decoded = (stored.logits.double() / t).softmax(-1)
        error = gradients.share(decoded)
        apart = distances(p, decoded)
        return Verification(
            positions=len(p),
            largest_difference=float((stored.logits - logits)[finite].abs().max()),
            gradient_error=error, gradient_bias=error, bias_score=None, **apart,
        )  # fmt: skip
    again = _decoded(codec, logits, keys, seed, t)
    weights, now = _laid_out(stored, p), _laid_out(again, p)
    difference = float((weights - now).abs().max())
    if stored.kind == "sampled":
        draws = [_decoded(codec, logits, keys, i, t) for i in range(_DRAWS)]
        rms, bias, score = bias_of(draws, gradients)
        return Verification(
            positions=len(p), largest_difference=difference,
            total_variation=float((weights - p).abs().sum(-1).mean() / 2), kl=None,
            gradient_error=rms, gradient_bias=bias, bias_score=score,
        )  # fmt: skip
    outside = torch.ones_like(p).scatter_(1, stored.ids, 0)
    spread = outside / outside.sum(-1, keepdim=True).clamp_min(1)
    apart = distances(p, weights + spread * stored.tail.double().unsqueeze(-1))
    error = gradients.share(topk_weights(stored, p, gradients.s)["tail as a class"])
    return Verification(
        positions=len(p), largest_difference=difference, gradient_error=error,
        gradient_bias=error, bias_score=None, **apart,
    )  # fmt: skip


def _decoded(codec: Codec, logits: Tensor, keys: Tensor, seed: int, t: float) -> SparseTargets:
    targets = codec.decode(codec.encode(logits, keys, seed), logits.shape[1], t)
    assert isinstance(targets, SparseTargets)
    return targets


def _laid_out(targets: SparseTargets, p: Tensor) -> Tensor:
    return torch.zeros_like(p).scatter_add_(1, targets.ids, targets.probs.double())


def leftovers(folder: Path) -> list[Path]:
    """Files that a finished capture does not list: what killed writes left, other shards."""
    manifest = read_manifest(folder)
    own = {MANIFEST, INDEX, PROVENANCE, "stage.json"}  # the last is the run's
    own |= {shard["file"] for shard in manifest["shards"]}
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in own]


def described(folder: Path) -> dict[str, str]:
    """A manifest for people: title -> value."""
    manifest = read_manifest(folder)
    size = sum((folder / shard["file"]).stat().st_size for shard in manifest["shards"])
    codec = {k: v for k, v in manifest["codec"].items() if k != "codec"}
    origins = manifest["made_from"]
    return {
        "codec": f"{manifest['codec']['codec']}: "
        + ", ".join(f"{k} {json.dumps(v)}" for k, v in codec.items()),
        "rows": f"{manifest['rows']:,}, {manifest['positions']:,} positions, "
        + (f"{manifest['vocab_size']:,} classes" if manifest["vocab_size"] else "no classes"),
        "bytes": f"{manifest['bytes_per_position']:,} a position, {size / 1e6:,.2f} MB in "
        f"{len(manifest['shards'])} shards",
        "schema": str(manifest["schema"]),
        **{k: str(v) for k, v in (read_index(folder / PROVENANCE, set()) or {}).items()},
        **{f"made from {name}": json.dumps(value) for name, value in origins.items()},
    }
