"""Random examples for a model that is only known by its config and the names its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from limbeck.errors import AxisError

_SEED = 0
_TOKENS = 7
_EXAMPLES, _SHOWN = 2, 16  # of real ones
_SIDES = (32, 64, 96)  # of an image whose size no config names: some nets halve it five times
_SAMPLES = (1600, 6400, 400)  # of a waveform


def example_inputs(
    model: nn.Module, config: PretrainedConfig, seed: int = _SEED
) -> dict[str, Tensor]:
    """Two random examples of what the model reads. Raises AxisError where none of them runs.

    What it reads is its `main_input_name`, and whatever else its forward cannot do without:
    tokens for a decoder, an image beside a text. Of sizes that no config names some are tried. A
    model of another kind of input has an example of it: `dummy_inputs`, as transformers calls it.
    """
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    own: dict[str, Tensor] = getattr(model, "dummy_inputs", {})
    if main not in _MAKERS and main in own:
        return own
    names = [main, *(n for n in ("input_ids", "pixel_values") if n in takes and n != main)]
    problem: Exception | None = None
    for wanted in dict.fromkeys(((main,), tuple(names))):
        problem = None  # the first that the fullest inputs meet is the one to tell
        if any(name not in _MAKERS for name in wanted):
            continue
        for inputs in _inputs(wanted, config, takes, seed):
            try:
                with torch.no_grad():
                    training = model.training
                    model.eval()(**_as_wide(inputs, model))
                return inputs
            except Exception as error:  # each model refuses in its own way
                problem = problem or error
            finally:
                model.train(training)
    raise AxisError(
        "model", f"reads {main!r}, and {'no such input is known' if problem is None else problem}",
        allowed=", ".join(_MAKERS),
    )  # fmt: skip


def shortened(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first two examples, of tokens the first 16: what a proof shows does not hang on how many
    there are, and its dozens of forwards are then mostly the reading of the weights."""
    return {
        name: tensor[:_EXAMPLES] if tensor.is_floating_point() else tensor[:_EXAMPLES, :_SHOWN]
        for name, tensor in inputs.items()
    }


def _as_wide(inputs: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def _inputs(
    wanted: tuple[str, ...], config: PretrainedConfig, takes: Mapping[str, Any], seed: int
) -> Iterator[dict[str, Tensor]]:
    for attempt in range(max(len(_SIDES), len(_SAMPLES))):
        random = torch.Generator().manual_seed(seed)
        try:
            inputs = {name: _MAKERS[name](config, random, attempt) for name in wanted}
        except LookupError:
            return
        if "decoder_input_ids" in takes:
            inputs["decoder_input_ids"] = _tokens(config, random, 0)
        yield inputs


def named(config: PretrainedConfig, name: str) -> list[Any]:
    """The values of a field wherever it stands in the config, the outermost first."""
    parts = [config, *(v for v in vars(config).values() if isinstance(v, PretrainedConfig))]
    return [found for part in parts if (found := getattr(part, name, None)) is not None]


def special_ids(config: PretrainedConfig) -> set[int]:
    """Token ids with a meaning of their own: padding, begin, end, separator."""
    found: set[int] = set()
    for part in (config, *vars(config).values()):
        if isinstance(part, PretrainedConfig):
            for name, value in part.to_dict().items():
                ids = value if isinstance(value, list) else [value]
                if name.endswith(("_token_id", "_token_ids")):
                    found |= {v for v in ids if type(v) is int and v >= 0}
    return found


def _tokens(config: PretrainedConfig, random: torch.Generator, _attempt: int) -> Tensor:
    vocab = named(config, "vocab_size")[0]
    low = 1 + max((v for v in special_ids(config) if v < 16), default=0)
    return torch.randint(min(low, vocab - 1), vocab, (2, _TOKENS), generator=random)


def _pixels(config: PretrainedConfig, random: torch.Generator, attempt: int) -> Tensor:
    of_timm = (named(config, "model_args") or [{}])[0]
    sides = [*named(config, "image_size"), of_timm.get("img_size"), _SIDES[attempt]]
    side = next(side for side in sides if side is not None)
    height, width = (side, side) if isinstance(side, int) else side
    channels = [*named(config, "num_channels"), *named(config, "in_channels")]
    channels = (channels or [of_timm.get("in_chans", 3)])[0]
    return torch.randn(2, channels, height, width, generator=random)


def _waveform(_config: PretrainedConfig, random: torch.Generator, attempt: int) -> Tensor:
    return torch.randn(2, _SAMPLES[attempt], generator=random)


def _spectrum(config: PretrainedConfig, random: torch.Generator, attempt: int) -> Tensor:
    """As long as the encoder's table of positions: half as many frames as it is given (Whisper)."""
    bins = named(config, "num_mel_bins")[0]
    frames = (named(config, "max_source_positions") or [_SIDES[attempt]])[0]
    return torch.randn(2, int(bins), 2 * frames, generator=random)


_MAKERS: dict[str, Callable[[PretrainedConfig, torch.Generator, int], Tensor]] = {
    "input_ids": _tokens, "pixel_values": _pixels, "input_values": _waveform,
    "input_features": _spectrum,
}  # fmt: skip
