"""Load and build models through transformers, and never run a stranger's code."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import modeling_auto

from limbeck import nets  # its classes become known to transformers
from limbeck.errors import LimbeckError, MissingExtraError, RecipeError, SourceError

_ALLOWED = "a folder with the config.json, model.safetensors and tokenizer.json of a text model"
_CLASSIFIERS = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES  # by model_type
_DECODERS = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_ENCODERS = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
TIMM = "timm_wrapper"  # the model_type of whatever timm builds


def read_any_config(folder: Path, *, where: str, allowed: str) -> PretrainedConfig:
    """Of whatever model. Raises SourceError where transformers does not know it, or where its
    weights are quantised: nothing can be cut out of those, nor taught."""
    if not (folder / "config.json").is_file():
        found = f"there is no config.json in {folder}" if folder.is_dir() else f"{folder} is a file"
        raise SourceError(where, found, allowed=allowed, fix="name a model's folder")
    if _of_timm(folder / "config.json"):
        require_timm(where)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each architecture has its own
        raise SourceError(
            where, f"{folder}/config.json does not load: {_first_line(error)}", allowed=allowed,
            fix="mend it, or fetch the model again",
        ) from error  # fmt: skip
    if config.model_type == TIMM and config.model_args:  # timm's number of labels
        config.model_args = {n: v for n, v in config.model_args.items() if n != "num_classes"}
    if packed := getattr(config, "quantization_config", None):
        method = packed.get("quant_method") if isinstance(packed, dict) else packed.quant_method
        raise SourceError(
            where, f"{folder} holds quantised weights ({method})", allowed="fp32, fp16 or bf16",
            fix="name the model that they were made from, or dequantise and save it first",
        )  # fmt: skip
    return config


def _of_timm(config: Path) -> bool:
    """Whether this is a config of a timm model, as timm or as transformers writes it."""
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # whoever reads it next says what is wrong
    if not isinstance(found, dict):
        return False
    return found.get("model_type", TIMM if "pretrained_cfg" in found else None) == TIMM


def require_timm(where: str) -> None:
    """Raises MissingExtraError without timm, SourceError where it does not import."""
    if any(util.find_spec(name) is None for name in ("timm", "torchvision")):
        raise MissingExtraError.of(f"{where}, a model of timm", "timm")
    try:
        importlib.import_module("timm.models")
    except Exception as error:  # a torchvision of another torch has a RuntimeError
        raise SourceError(
            where, f"is a model of timm, which does not import: {_first_line(error)}",
            allowed=f"timm beside a torchvision that was built for torch {torch.__version__}",
            fix="install torchvision from where torch came from",
        ) from error  # fmt: skip


def read_config(folder: Path, *, where: str) -> PretrainedConfig:
    """The folder's config.

    Raises SourceError unless it is that of a text model which transformers' Auto classes load as a
    classifier.
    """
    config = read_any_config(folder, where=where, allowed=_ALLOWED)
    kind, classes = config.model_type, config.architectures or []
    if kind not in _CLASSIFIERS:
        raise SourceError(
            where, f"{folder} holds a model of type {kind!r}, which classifies no text",
            allowed=_ALLOWED, fix="choose a text encoder, such as a BERT",
        )  # fmt: skip
    for name in classes:
        if name in {*_DECODERS.values()} - {*_ENCODERS.values()}:
            raise SourceError(
                where, f"{folder} holds a {name}, which continues text and does not classify it",
                allowed="a text encoder, or a model that was trained to classify",
                fix="choose another teacher",
            )  # fmt: skip
    if kind in _DECODERS and kind not in _ENCODERS and config.pad_token_id is None:
        raise SourceError(
            where, f"{folder}/config.json names no padding token", allowed="pad_token_id: a number",
            fix="add it; without it a batch of unequal texts has no meaning to this model",
        )  # fmt: skip
    return config


def make_config(fields: Mapping[str, Any], *, where: str) -> PretrainedConfig:
    """A config from its `model_type` and other fields.

    Raises RecipeError for an architecture or a field that transformers does not know.
    """
    rest = dict(fields)
    kind = rest.pop("model_type")
    if kind == TIMM:
        require_timm(where)
    try:
        config = AutoConfig.for_model(kind)
    except ValueError:
        near = difflib.get_close_matches(kind, [*_CLASSIFIERS, *nets.CLASSES], n=3)
        raise RecipeError(
            f"{where}.model_type", f"{kind!r}", allowed="a model_type of transformers",
            fix=f"perhaps {', '.join(near)}" if near else "look it up in its config.json",
        ) from None  # fmt: skip
    unknown = sorted(name for name in rest if not hasattr(config, name))
    if unknown:
        near = difflib.get_close_matches(unknown[0], vars(config), n=3)
        raise RecipeError(
            f"{where}.{unknown[0]}", f"{type(config).__name__} has no such field",
            allowed=", ".join(near) or "its own fields", fix="correct it, or leave it out",
        )  # fmt: skip
    return type(config)(**rest)


def load_classifier(folder: Path, labels: Sequence[str], *, where: str) -> PreTrainedModel:
    """The model with a head for these labels; a head that is not in the folder starts random.

    Raises SourceError where the folder holds no model that transformers' Auto classes load, or not
    all of its weights.
    """
    config = read_config(folder, where=where)
    label_config(config, labels)
    return load_as(
        AutoModelForSequenceClassification, folder, config, where=where, allowed=_ALLOWED
    )


def load_as(
    auto: Any, folder: Path, config: PretrainedConfig, *, where: str, allowed: str
) -> PreTrainedModel:
    """The folder's weights in the Auto class's model of this config; a head that is not there
    starts random.

    Raises SourceError where they do not load, or not all of the body's are there.
    """
    try:
        model, report = auto.from_pretrained(
            folder,
            config=config,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (
        OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError,
    ) as error:  # ImportError: a name that timm does not know
        raise SourceError(
            where, f"{folder} does not load: {_first_line(error)}", allowed=allowed,
            fix="fetch or save the model again",
        ) from error  # fmt: skip
    # transformers only warns, and goes on with random weights
    absent = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    body, heads = f"{model.base_model_prefix}.", _heads_inside(model)
    lost = sorted(
        n for n in absent
        if n.startswith(body) and "pooler" not in n and not n.startswith(heads)
    )  # fmt: skip
    if lost:
        raise SourceError(
            where, f"{folder} lacks {len(lost)} weights that its config.json asks for: {lost[0]}",
            allowed="weights and config.json of the same model",
            fix="fetch or save the model again",
        )  # fmt: skip
    loaded: PreTrainedModel = model
    return loaded


def _heads_inside(model: nn.Module) -> tuple[str, ...]:
    """How the names of weights begin that are the head's and stand inside of the body: timm's."""
    named = getattr(model, "timm_model", None)
    if named is None:
        return ()
    found = named.get_classifier()
    heads = found if isinstance(found, tuple | list) else (found,)
    return tuple(f"{name}." for name, module in model.named_modules() if module in heads)


def auto_class(config: PretrainedConfig, *, where: str) -> type[Any]:
    """The Auto class whose model config.architectures names. Raises SourceError for none."""
    classes = [*(config.architectures or ())]
    if not classes and config.model_type == TIMM:
        classes = ["TimmWrapperForImageClassification"]  # timm writes none
    for name in classes:
        for auto in vars(modeling_auto).values():
            mapping = getattr(auto, "_model_mapping", None)
            if mapping is None or not isinstance(auto, type):
                continue
            made = mapping._model_mapping.get(config.model_type, ())
            if name in ((made,) if isinstance(made, str) else made):
                return auto
    raise SourceError(
        where, f"its config.json names {', '.join(config.architectures or ()) or 'no class'}",
        allowed="architectures: a class that transformers' Auto classes build",
        fix="add the class to config.json",
    )  # fmt: skip


def load_model(folder: Path, *, where: str) -> PreTrainedModel:
    """A model of any kind as its folder holds it, in fp32 and eval mode.

    Raises SourceError where transformers' Auto classes do not load it, or not all of its weights.
    """
    allowed = "a folder with the config.json and *.safetensors of a model that transformers knows"
    try:
        config = read_any_config(folder, where=where, allowed=allowed)
        made = auto_class(config, where=where)
        model, report = made.from_pretrained(
            folder, config=config, trust_remote_code=False, use_safetensors=True,
            dtype=torch.float32, output_loading_info=True,
        )  # fmt: skip
    except LimbeckError:
        raise
    except Exception as error:  # each architecture has its own
        raise SourceError(
            where, f"{folder} does not load: {_first_line(error)}", allowed=allowed,
            fix="fetch or save the model again",
        ) from error  # fmt: skip
    if lost := sorted(report["missing_keys"]):
        raise SourceError(
            where, f"{folder} lacks {len(lost)} weights that its config.json asks for: {lost[0]}",
            allowed="weights and config.json of the same model",
            fix="fetch or save the model again",
        )  # fmt: skip
    return model.eval()


def load_tokenizer(folder: Path, *, where: str) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, a fast one.

    Raises SourceError where there is none: transformers would go on with an empty vocabulary.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, use_fast=True, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # each kind of tokenizer has its own
        raise SourceError(
            where, f"the tokenizer of {folder} does not load: {_first_line(error)}",
            allowed=_ALLOWED, fix="save the model's tokenizer into its folder",
        ) from error  # fmt: skip
    files = type(tokenizer).vocab_files_names.values()
    if not tokenizer.is_fast or not any((folder / name).is_file() for name in files):
        raise SourceError(
            where, f"{folder} holds no tokenizer of the fast kind", allowed=_ALLOWED,
            fix="save the model's tokenizer into its folder",
        )  # fmt: skip
    return tokenizer


def check_length(config: PretrainedConfig, max_tokens: int) -> None:
    """Raises RecipeError where the model's table of positions is shorter than that."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or max_tokens < positions - 8:
        return
    with torch.device("meta"):
        model = build_classifier(config)
    words = model.get_input_embeddings()  # type: ignore[operator]
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module is words:
            continue
        if module.num_embeddings - positions not in (0, 2):  # BART's has two that are never used
            continue
        if module.padding_idx is not None:  # RoBERTa's kind counts from behind it
            positions -= module.padding_idx + 1
        if max_tokens > positions:
            raise RecipeError(
                "recipe.task.max_tokens", f"{max_tokens}", fix=f"set it to {positions} or less",
                allowed=f"up to {positions}, which the teacher's table of positions has",
            )  # fmt: skip
        return


def head_labels(folder: Path, *, where: str) -> tuple[str, ...] | None:
    """The labels of the folder's own classification head, or None if it has none."""
    config = read_config(folder, where=where)
    if not any("SequenceClassification" in name for name in config.architectures or ()):
        return None
    return tuple(str(label) for _, label in sorted((config.id2label or {}).items()))


def label_config(config: PretrainedConfig, labels: Sequence[str]) -> None:
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    if config.model_type == TIMM:
        config.label_names = list(labels)  # it writes these and not id2label


def build_classifier(config: PretrainedConfig) -> nn.Module:
    """The same architecture with fresh weights."""
    return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # tied ones once


def no_dropout(model: nn.Module) -> None:
    """Few epochs have little to gain from dropout, whose random numbers are slow on a CPU."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def depths(names: Sequence[str]) -> dict[str, int]:
    """0 for what stands before the first numbered block, then one more a block, the head last."""
    found: dict[str, int] = {}
    deepest = 0
    for name in names:
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if number is not None:
            found[name] = number + 1
            deepest = max(deepest, number + 1)
        else:
            found[name] = deepest + 1 if deepest else 0
    return found


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
