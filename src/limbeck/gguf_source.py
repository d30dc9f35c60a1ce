"""A GGUF file as transformers' model and tokenizer, with its chat template.

The file is checked before a library sees it: its own numbers say where each tensor ends, and a
file that is cut short or names what does not exist is refused with a sentence. transformers then
reads it (its `gguf_file=`), dequantised by the `gguf` package; nothing in it is ever run.

Two things that transformers 5.23 gets silently wrong are put right or refused here: the rules by
which text is split before the merges (it knows some of llama.cpp's names, and takes GPT-2's for
all others), and tensors that it does not know (Llama 3.1's table of frequencies), which it drops.
"""

from __future__ import annotations

import io
import logging
import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from limbeck.errors import MissingExtraError, SourceError
from limbeck.fast_tokenizer import rebuilt

_ALLOWED = "a whole GGUF file (version 2 or 3) of a language model that transformers reads"
_AGAIN = "fetch the file again"
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?",
            10: "<Q", 11: "<q", 12: "<d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_BYTE_LEVEL = "gpt2"  # llama.cpp's name of the kind

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS: Mapping[str, str | None] = {
    "gpt-2": None, "gpt2": None, "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3, "dbrx": _LLAMA3, "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
}  # fmt: skip
"""llama.cpp's name of the rules -> what splits text; None: ByteLevel's own pattern."""
DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Rules that part each digit from the next, then do as GPT-2's (src/llama-vocab.cpp)."""
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")
"""With these a word that is a token is one, whether or not merges lead to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GGUFHeader:
    """What a file says of itself."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]  # name -> shape, as torch has it
    kinds: Mapping[str, int]  # how tensors are stored ("Q4_1") -> how many

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def licence(self) -> str | None:
        found = self.metadata.get("general.license")
        return str(found) if found else None


def read_gguf(
    file: Path, *, where: str, dtype: Literal["fp32", "bf16"] = "fp32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, GGUFHeader]:
    """The file's model, dequantised, its tokenizer, and what it says of itself.

    Raises SourceError for a file that is damaged, cut short or of an architecture or tokenizer that
    is not supported; MissingExtraError without the extra 'lm'.
    """
    header = read_header(file, where=where)
    _check_positions(header, file, where)
    tokenizer = _tokenizer(file, header, where)
    model = _model(file, header, where, torch.float32 if dtype == "fp32" else torch.bfloat16)
    if len(tokenizer) > model.config.vocab_size:
        raise SourceError(
            where, f"{file.name} has {len(tokenizer)} tokens and {model.config.vocab_size} "
            "embeddings", allowed=_ALLOWED, fix=_AGAIN,
        )  # fmt: skip
    return model, tokenizer, header


def read_gguf_model(file: Path, *, where: str) -> PreTrainedModel:
    """The file's model alone, dequantised into fp32. Raises what `read_gguf` does."""
    header = read_header(file, where=where)
    _check_positions(header, file, where)
    model: PreTrainedModel = _model(file, header, where, torch.float32)
    return model


def read_header(file: Path, *, where: str) -> GGUFHeader:
    """Everything but the weights. Raises SourceError where the file is no whole GGUF file."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise MissingExtraError.of(where, "lm") from None
    try:
        with (
            file.open("rb") as opened,
            mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            reader = _Reader(data)
            metadata, tensors, places = reader.header()
            data_start = reader.at
    except _BadHeaderError as error:
        raise SourceError(
            where, f"{file.name} {error}", allowed=_ALLOWED, fix=_AGAIN
        ) from None
    except (OSError, ValueError) as error:  # mmap's word for an empty file
        raise SourceError(
            where, f"{file.name} cannot be read: {error}", allowed=_ALLOWED, fix=_AGAIN
        ) from error
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise SourceError(
            where, f"{file.name} says general.alignment {alignment!r}", allowed="a number",
            fix=_AGAIN,
        )  # fmt: skip
    data_start += -data_start % alignment
    kinds: Counter[str] = Counter()
    end = data_start
    for name, (kind, offset) in places.items():
        if kind not in {*map(int, GGMLQuantizationType)}:
            raise SourceError(
                where, f"{file.name} stores {name} as ggml type {kind}, which nobody knows",
                allowed=_ALLOWED, fix="fetch another quantisation, or a newer `gguf` package",
            )  # fmt: skip
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        end = max(end, data_start + offset + math.prod(tensors[name]) // block * size)
        kinds[GGMLQuantizationType(kind).name] += 1
    if end > file.stat().st_size:
        raise SourceError(
            where, f"{file.name} is cut short: {file.stat().st_size:,} of {end:,} bytes",
            allowed=_ALLOWED, fix=_AGAIN,
        )  # fmt: skip
    return GGUFHeader(metadata=metadata, tensors=tensors, kinds=dict(kinds))


class _BadHeaderError(Exception):
    """The rest of a sentence that begins with the file's name."""


class _Reader:
    """Little-endian values one after the other; never beyond the end, never more than there is."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def header(
        self,
    ) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], dict[str, tuple[int, int]]]:
        """(metadata, name -> shape, name -> (type, offset)); `at` stands behind it after."""
        if self.data[:4] != b"GGUF":
            raise _BadHeaderError("is no GGUF file: it does not begin with GGUF")
        self.at = 4
        version, num_tensors, num_values = self.value("<I"), self.value("<Q"), self.value("<Q")
        if version not in (2, 3):
            raise _BadHeaderError(f"is of GGUF version {version}")
        metadata = {}
        for _ in range(num_values):
            key = self.string()
            metadata[key] = self.typed(self.value("<I"))
        shapes: dict[str, tuple[int, ...]] = {}
        places: dict[str, tuple[int, int]] = {}
        for _ in range(num_tensors):
            name, num_dims = self.string(), self.value("<I")
            if num_dims > 4 or name in shapes:
                raise _BadHeaderError(f"is damaged: the tensor {name!r} makes no sense")
            shapes[name] = tuple(reversed([self.value("<Q") for _ in range(num_dims)]))
            places[name] = (self.value("<I"), self.value("<Q"))
        return metadata, shapes, places

    def value(self, form: str) -> Any:
        (found,) = struct.unpack(form, self.bytes(struct.calcsize(form)))
        return found

    def bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise _BadHeaderError(f"is cut short: it ends within its header, at {len(self.data)}")
        self.at += count
        return self.data[self.at - count : self.at]

    def string(self) -> str:
        try:
            return self.bytes(self.value("<Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise _BadHeaderError("is damaged: a name in it is no UTF-8") from None

    def typed(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.value(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > 2:
            raise _BadHeaderError(f"is damaged: a value of type {kind}")
        of, count = self.value("<I"), self.value("<Q")
        if of in _SCALARS:
            form = _SCALARS[of]
            packed = self.bytes(count * struct.calcsize(form))
            return list(struct.unpack(f"<{count}{form[1]}", packed))
        return [self.typed(of, depth + 1) for _ in range(count)]  # each takes bytes: it ends


def _check_positions(header: GGUFHeader, file: Path, where: str) -> None:
    """transformers would read the model without its scaling, and go on with wrong positions."""
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if "rope_freqs.weight" in header.tensors or scaling != "none":
        raise SourceError(
            where, f"{file.name} scales its positions, which transformers does not read from GGUF",
            allowed="a model without rope scaling", fix="take the model's safetensors instead",
        )  # fmt: skip


def _model(file: Path, header: GGUFHeader, where: str, dtype: torch.dtype) -> Any:
    made: Any = AutoModelForCausalLM
    try:
        with _quiet():
            model, report = made.from_pretrained(
                file.parent, gguf_file=file.name, dtype=dtype, output_loading_info=True,
                trust_remote_code=False, local_files_only=True,
            )  # fmt: skip
    except ImportError as error:
        raise MissingExtraError.of(where, "lm") from error
    except Exception as error:  # each architecture has its own
        raise _unsupported(file, header, where, error) from error
    lost = sorted(report["missing_keys"])
    held = sum(math.prod(shape) for shape in header.tensors.values())
    used = sum(parameter.numel() for parameter in model.parameters())
    if lost or held != used:
        raise _unsupported(
            file, header, where, f"{lost[0]} is not in it" if lost
            else f"it holds {held:,} weights, of which transformers has read {used:,}",
        )  # fmt: skip
    del model.config.quantization_config  # of how it was read: from now on it is plain
    model.hf_quantizer = None
    if hasattr(model.config, "_model_name_or_path"):
        del model.config._model_name_or_path
    return model.eval()


def _tokenizer(file: Path, header: GGUFHeader, where: str) -> PreTrainedTokenizerBase:
    try:
        with _quiet():
            found = AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, trust_remote_code=False, local_files_only=True
            )
    except ImportError as error:
        raise MissingExtraError.of(where, "lm") from error
    except Exception as error:  # each kind has its own
        raise _unsupported(file, header, where, error) from error
    backend = Tokenizer.from_str(found.backend_tokenizer.to_str())  # a copy
    if header.metadata.get("tokenizer.ggml.model") == _BYTE_LEVEL:
        backend.pre_tokenizer = _splitting(header, file, where)
        pre = header.metadata.get("tokenizer.ggml.pre")
        backend.model.ignore_merges = pre in WHOLE_WORDS
    tokenizer = rebuilt(found, backend)
    tokenizer.model_max_length = int(
        header.metadata.get(f"{header.architecture}.context_length", tokenizer.model_max_length)
    )
    named = header.metadata.get("tokenizer.ggml.tokens", [])
    wrong = [i for i, token in enumerate(named) if backend.token_to_id(token) not in (i, None)]
    if wrong or len(tokenizer) != len(named):
        found_as = f"{named[wrong[0]]!r} is not {wrong[0]}" if wrong else f"{len(tokenizer)} tokens"
        raise _unsupported(file, header, where, f"its tokenizer was read wrongly: {found_as}")
    return tokenizer


def _splitting(header: GGUFHeader, file: Path, where: str) -> pre_tokenizers.PreTokenizer:
    name = header.metadata.get("tokenizer.ggml.pre", "")
    if name in DIGITS:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    if name not in SPLITS:
        raise SourceError(
            where, f"{file.name} splits text by rules called {name!r}, which are not known here",
            allowed=", ".join([*SPLITS, *DIGITS]), fix="take the model's safetensors instead",
        )  # fmt: skip
    pattern = SPLITS[name]
    if pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _unsupported(
    file: Path, header: GGUFHeader, where: str, error: BaseException | str
) -> SourceError:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
    return SourceError(
        where, f"{file.name} ({header.architecture or 'no architecture named'}): {reason}",
        allowed=_ALLOWED, fix="take the model's safetensors instead",
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of what is meant here, that all is dequantised, and shows bars."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
