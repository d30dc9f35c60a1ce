"""Vocabulary trimming: the tokens that a domain uses, and no rows for the others.

A byte-level BPE tokenizer keeps the domain's tokens, all single bytes, all added tokens, and every
token that its merges pass through on the way to one of those. Then

- every string still becomes tokens and comes back: the bytes are there;
- a text whose tokens are all kept has the same tokens. (BPE applies the best-ranked merge that
  there is, again and again. On such a text each merge that it applied lies inside a kept token, so
  parts and result are kept and so is the merge; what is gone was never the best. So each step is
  the same one.)

The model keeps the rows of those tokens in embeddings and head, so on such a text the logits of the
kept ids are what they were. Its probabilities are divided by the mass that the kept ids had: the
log-probability of each token rises by -ln(that mass), and perplexity falls or stays.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from limbeck.architecture.axes import Axis, find_axis, permuted
from limbeck.architecture.cut import build_student, full_shape
from limbeck.architecture.fields import Build
from limbeck.errors import SourceError
from limbeck.fast_tokenizer import rebuilt
from limbeck.types import Shape

_ID_FIELDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id",
    "mask_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Trim:
    """Which tokens stay, and why. A token's new id is its place in `kept`."""

    kept: tuple[int, ...]  # old ids, ascending
    vocab_size: int  # of the tokenizer before
    used: int  # of the kept ones, those that the domain's rows have often enough
    passed_through: int  # those that only merges need


def count_tokens(rows: Iterable[Sequence[int] | np.ndarray], vocab_size: int) -> np.ndarray:
    """(V,) int64: how often each id occurs in rows of token ids."""
    counts = np.zeros(vocab_size, np.int64)
    for row in rows:
        counts += np.bincount(np.asarray(row), minlength=vocab_size)
    return counts


def choose_tokens(
    tokenizer: PreTrainedTokenizerBase, counts: np.ndarray, *, where: str, at_least: int = 1
) -> Trim:
    """The tokens that occur `at_least` so often, and what must stay with them.

    Raises SourceError for a tokenizer that is no BPE over bytes (or with bytes to fall back on).
    """
    bpe = _BPE(tokenizer, where)
    used = {int(i) for i in np.flatnonzero(counts >= at_least)}
    kept = used | bpe.bytes | bpe.added
    for i in sorted(kept - bpe.added):
        kept |= bpe.passed_through(i)
    return Trim(
        kept=tuple(sorted(kept)), vocab_size=len(tokenizer), used=len(used),
        passed_through=len(kept - used - bpe.bytes - bpe.added),
    )  # fmt: skip


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, trim: Trim, *, where: str
) -> PreTrainedTokenizerBase:
    """The same tokenizer with the kept tokens alone, under their new ids."""
    bpe = _BPE(tokenizer, where)
    new = {old: at for at, old in enumerate(trim.kept)}
    state = copy.deepcopy(bpe.state)
    model = state["model"]
    model["vocab"] = {token: new[i] for token, i in model["vocab"].items() if i in new}
    model["merges"] = [
        list(pair) for pair in bpe.merges if {*pair, "".join(pair)} <= model["vocab"].keys()
    ]
    for token in state["added_tokens"]:
        token["id"] = new[token["id"]]
    _renumber(state.get("post_processor"), new)
    backend = Tokenizer.from_str(json.dumps(state))
    found = backend.get_vocab(with_added_tokens=True)
    # the library numbers added tokens that the model does not know by itself, behind all others
    if any(found[token] != new[i] for token, i in tokenizer.get_vocab().items() if i in new):
        raise _refused("has added tokens between its others", where)
    return rebuilt(tokenizer, backend)


def trim_model(
    model: PreTrainedModel, trim: Trim, build: Build, axes: Sequence[Axis] = ()
) -> PreTrainedModel:
    """A model of its own with the kept rows, ids of its config renamed; in eval mode.

    Along the `vocab` axis where one of the proved `axes` is that; otherwise the rows of
    transformers' input and output embeddings. Raises AxisError or ValueError where its weights do
    not fit.
    """
    axis = find_axis(axes, "vocab")
    order = torch.tensor(trim.kept)
    config = copy.deepcopy(model.config)
    _rename(config, trim)  # first: the padding's row must be there when the embedding is made
    if axis is not None and axis.proved and len(trim.kept) % axis.granularity == 0:
        rest = torch.ones(axis.size, dtype=torch.bool)
        rest[order] = False
        order = torch.cat([order, rest.nonzero()[:, 0]])
        state = permuted(model.state_dict(), axis.groups, {g.name: order for g in axis.groups})
        shape = full_shape(axes)
        sizes = {**shape.sizes, axis.name: len(trim.kept)}
        student: Any = build_student(
            config, build, axes, Shape(sizes, shape.layers, shape.stacks), state
        )
    else:
        student = _with_rows(model, config, order, build)
    if getattr(model, "generation_config", None) is not None and hasattr(
        student, "generation_config"
    ):
        student.generation_config = copy.deepcopy(model.generation_config)
        _rename(student.generation_config, trim)
    return student.eval()


@torch.no_grad()
def _with_rows(
    model: PreTrainedModel, config: PretrainedConfig, order: Tensor, build: Build
) -> Any:
    config.vocab_size = len(order)
    with torch.random.fork_rng(devices=[]):  # weights that are overwritten cost no luck
        student: Any = build(config).eval()
    state, size = model.state_dict(), model.config.vocab_size
    places = student.state_dict()
    for name, tensor in state.items():
        if tensor.shape == places[name].shape:
            places[name].copy_(tensor)
        elif tensor.shape[0] == size and tensor.shape[1:] == places[name].shape[1:]:
            places[name].copy_(tensor.index_select(0, order.to(tensor.device)))
        else:
            raise ValueError(f"{name}: {tuple(tensor.shape)} has no rows of {size} tokens")
    return student


def _rename(config: PretrainedConfig | Any, trim: Trim) -> None:
    """Ids in a config or generation config; a list of them stays a list."""
    new = {old: at for at, old in enumerate(trim.kept)}
    for name in _ID_FIELDS:
        value = getattr(config, name, None)
        if isinstance(value, int):
            setattr(config, name, new.get(value))
        elif isinstance(value, list):
            setattr(config, name, [new[i] for i in value if i in new])


def _renumber(processor: Any, new: Mapping[int, int]) -> None:
    """Ids inside a post-processor: a template's `ids`, a pair of token and id."""
    if isinstance(processor, dict):
        for key, value in processor.items():
            if key == "ids":
                processor[key] = [new[i] for i in value]
            elif key in ("sep", "cls") and isinstance(value, list):
                processor[key] = [value[0], new[value[1]]]
            else:
                _renumber(value, new)
    elif isinstance(processor, list):
        for value in processor:
            _renumber(value, new)


class _BPE:
    """What `tokenizer.json` says of merges and bytes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
        self.state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        model = self.state["model"]
        affixes = [model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")]
        if model["type"] != "BPE" or any(affixes) or model.get("dropout"):
            raise _refused(f"is a {model['type']} model whose pieces depend on each other", where)
        self.ids: dict[str, int] = model["vocab"]
        self.tokens = {i: token for token, i in self.ids.items()}
        self.merges = [
            tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]
        ]
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.added = {token["id"] for token in self.state["added_tokens"]}
        if '"ByteLevel"' in json.dumps(self.state["pre_tokenizer"]):
            wanted = [*map(chr, _byte_alphabet())]
        elif model.get("byte_fallback"):
            # and the space, which is spelt otherwise: as bytes it would come back as that sign
            wanted = ["▁", *(f"<0x{byte:02X}>" for byte in range(256))]
        else:
            raise _refused("has no bytes to write rare strings with", where)
        # a byte that never stands in UTF-8 may be missing, as before
        self.bytes = {self.ids[token] for token in wanted if token in self.ids}
        if model.get("unk_token") in self.ids:
            self.bytes.add(self.ids[model["unk_token"]])

    def passed_through(self, i: int) -> set[int]:
        """Ids of everything that merging the token's own text passes through, itself included.

        A token that its own merges do not reach appears in no text, unless whole words go first.
        """
        symbols = [*self.tokens.get(i, "")]
        found = {self.ids[s] for s in symbols if s in self.ids}
        while len(symbols) > 1:
            pairs = enumerate(itertools.pairwise(symbols))
            ranked = [(self.ranks[pair], at) for at, pair in pairs if pair in self.ranks]
            if not ranked:
                return {i}
            _, at = min(ranked)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            found.add(self.ids[symbols[at]])
        return found | {i}


def _byte_alphabet() -> list[int]:
    """The 256 characters that stand for bytes in a byte-level vocabulary (GPT-2's encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return printable + [256 + n for n in range(256 - len(printable))]


def _refused(what: str, where: str) -> SourceError:
    return SourceError(
        where, f"its tokenizer {what}: it cannot be trimmed without changing other texts",
        allowed="BPE over bytes (GPT-2, Llama 3, Qwen, SmolLM2) or with bytes to fall back on",
        fix="leave the vocabulary as it is",
    )  # fmt: skip
