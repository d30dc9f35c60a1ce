"""Which codec a capture uses: the recipe's, or the one with the least error that fits.

No import of torch at the top: an unchanged run asks for the settings and for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from limbeck.errors import RecipeError
from limbeck.recipe_teaching import DistillSpec, SignalsSpec

# Up to here a position's logits in fp16 take 8 kB at most: no reason to leave anything out.
_DENSE_CLASSES = 4096
# What needs two distributions and nothing else runs on "each of the k, or any other" as well.
_OF_OUTCOMES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "akl")
_BYTES_PER_ROW = 16 + 40  # id and count in the shard, five numbers in the index


def sizes_of(about: Mapping[str, Any]) -> dict[str, int]:
    """Of prepared data, by their `data.json`, as `codec_settings` takes them: every view is a row,
    and a row has one position unless the task counts them itself."""
    rows = about["rows"]["train"] * about.get("views", 1)
    positions = about["counted"]["train"] if "counted" in about else rows
    classes = about.get("vocab_size") or len(about["labels"])
    return {"vocab_size": classes, "rows": rows, "positions": positions}


def codec_settings(
    spec: SignalsSpec, *, temperature: float | None, vocab_size: int, rows: int, positions: int
) -> dict[str, Any]:
    """As `logit_codec` takes them. Raises RecipeError where nothing fits `max_gb`.

    Without a codec in the recipe: all logits in fp16 for up to 4,096 classes, else a sample, whose
    gradient is unbiased (top-k's is not: it must be asked for). `temperature` is None where it is
    not one number; only a dense codec can do without.
    """
    for name in ("dense", "topk", "sampled"):
        asked = getattr(spec, name)
        if asked is not None:
            return _served(name, asked.model_dump(), temperature)
    if spec.max_gb is None:
        if vocab_size <= _DENSE_CLASSES:
            return _served("dense", {"dtype": "fp16"}, temperature)
        return _served("sampled", {"n": 24}, temperature)
    smallest = 0
    for settings in _ladder(temperature):
        smallest = store_bytes(settings, vocab_size=vocab_size, rows=rows, positions=positions)
        if smallest <= spec.max_gb * 1e9:
            return settings
    raise RecipeError(
        "recipe.signals.max_gb", f"{spec.max_gb:g}",
        allowed=f"at least {smallest / 1e9:.3g}, for 8 sampled ids at {positions:,} positions",
        fix="raise it, or take fewer rows with data.max_train_rows",
    )  # fmt: skip


def refuse_unserved(distill: DistillSpec, codec: str) -> None:
    """Raises RecipeError for a loss that needs more than the signals of this codec hold."""
    kind = distill.divergence.kind
    allowed = {"topk": _OF_OUTCOMES, "sampled": ("forward_kl",)}.get(codec, (kind,))
    if kind not in allowed:
        raise RecipeError(
            "recipe.distill.divergence", f"{kind!r} with '{codec}' signals",
            allowed=", ".join(allowed), fix="choose one of these, or signals: {dense: {}}",
        )  # fmt: skip
    if distill.standardize and codec != "dense":
        raise RecipeError(
            "recipe.distill.standardize", f"needs every logit, and signals are '{codec}'",
            allowed="false", fix="leave it out, or signals: {dense: {}}",
        )  # fmt: skip


def _ladder(temperature: float | None) -> Iterator[dict[str, Any]]:
    """From the least error to the fewest bytes (benchmarks/signals.py)."""
    yield _served("dense", {"dtype": "fp16"}, temperature)
    for n in (50, 24, 12, 8):
        yield _served("sampled", {"n": n}, temperature)


def _served(codec: str, settings: Mapping[str, Any], temperature: float | None) -> dict[str, Any]:
    """With the temperatures that the codec has to be told before the capture."""
    found = {"codec": codec, **settings}
    if codec != "dense" and temperature is None:
        raise RecipeError(
            "recipe.distill.temperature", f"is not one number, and '{codec}' signals serve one",
            allowed="a number", fix="give a number, or signals: {dense: {}}",
        )  # fmt: skip
    if codec == "topk":
        found["temperatures"] = list(found.get("temperatures") or [temperature])
    if codec == "sampled":
        found["temperature"] = temperature
    return found


def store_bytes(
    settings: Mapping[str, Any], *, vocab_size: int, rows: int, positions: int
) -> int:
    """Bytes on disk, but for headers and manifest (some hundred bytes a shard)."""
    from limbeck.signals.codecs import bytes_per_position, logit_codec

    width = bytes_per_position(logit_codec(settings), vocab_size)
    return positions * width + rows * _BYTES_PER_ROW


def reason(
    spec: SignalsSpec, settings: Mapping[str, Any], *, vocab_size: int, rows: int, positions: int
) -> str:
    """One sentence: what is stored, why, and what it takes."""
    from limbeck.signals.codecs import bytes_per_position, logit_codec

    width = bytes_per_position(logit_codec(settings), vocab_size)
    size = store_bytes(settings, vocab_size=vocab_size, rows=rows, positions=positions)
    takes = f"{width:,} bytes a position, {_megabytes(size)} for {positions:,}"
    if any(getattr(spec, name) is not None for name in ("dense", "topk", "sampled")):
        return f"{described(settings)}, as the recipe says: {takes}"
    if settings["codec"] == "dense":
        return f"{described(settings)}, as {vocab_size:,} classes are few or it fits: {takes}"
    dense = store_bytes(
        {"codec": "dense", "dtype": "fp16"}, vocab_size=vocab_size, rows=rows, positions=positions
    )
    limit = f" of {spec.max_gb:g} GB allowed" if spec.max_gb else ""
    return f"{described(settings)}: {takes}{limit}; every logit would take {_megabytes(dense)}"


def described(settings: Mapping[str, Any]) -> str:
    """A codec in a few words."""
    match settings["codec"]:
        case "dense":
            return f"every logit in {settings['dtype']}"
        case "topk":
            return f"the {settings['k']} largest logits and the rest's mass"
        case _:
            return f"{settings['n']} sampled ids, unbiased"


def _megabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
