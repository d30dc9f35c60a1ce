"""Low-rank adapters: few weights learn, beside matrices that rest, and are merged at the end.

LoRA (Hu et al. 2021, arXiv:2106.09685) by `peft`. A merged model is a plain one again: what cuts,
exports and measures it need not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from limbeck.errors import MissingExtraError, RecipeError
from limbeck.models import depths
from limbeck.recipe_teaching import LoraSpec


@contextmanager
def adapted(model: nn.Module, spec: LoraSpec | None, *, seed: int) -> Iterator[str | None]:
    """Within, adapters of all matrices in the model's layers learn, and nothing else but what
    stands behind the last layer of a classifier. After it they are merged.

    Yields a sentence that says how much learns; None, with all weights, without a `spec`.

    Raises MissingExtraError without the extra 'lora', RecipeError for a model without layers of
    matrices.
    """
    if spec is None:
        yield None
        return
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise MissingExtraError.of("lora", "lora") from error
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in names if any(part.isdigit() for part in name.split("."))]
    if not targets:
        raise RecipeError(
            "lora", f"a {type(model).__name__} has no layers of linear maps",
            allowed="a transformer", fix="leave lora out: all weights learn",
        )  # fmt: skip
    whole = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuner = LoraModel(model, config, "default")
    for name in _head(model, [*whole]):
        model.get_parameter(name).requires_grad_(True)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    yield f"{count:,} of {total:,} weights learn, in adapters of rank {spec.rank}"
    tuner.merge_and_unload(progressbar=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(whole[name])


def _head(model: nn.Module, names: list[str]) -> list[str]:
    """What is new in a classifier, and in a language model nothing."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        return []
    found = depths(names)
    return [name for name, depth in found.items() if depth == max(found.values())]
