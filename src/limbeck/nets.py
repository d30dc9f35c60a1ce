"""Small networks of our own, for rows of a table: plain transformers models, built from a config.

transformers has no architecture for them. These classes are known to its Auto classes once limbeck
is imported; the exported ONNX files need neither. Field names are transformers', so that the axes
of a config mean the same here as everywhere (`architecture.probe`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from limbeck.types import Input


class Scaled(nn.Module):
    """(x - mean) / scale, by what training rows are like: an exported file takes raw numbers."""

    mean: Tensor
    scale: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, size) of the same shape."""
        return (x - self.mean) / self.scale

    @torch.no_grad()
    def fit(self, mean: Sequence[float], scale: Sequence[float]) -> None:
        if len(mean) == len(self.mean):  # a probe of the config changes how many there are
            self.mean.copy_(torch.as_tensor(mean))
            self.scale.copy_(torch.as_tensor(scale))


class TabularConfig(PretrainedConfig):
    """A residual network on the columns of a table."""

    model_type = "limbeck-tabular"

    def __init__(
        self, num_numbers: int = 1, cardinalities: Sequence[int] = (), hidden_size: int = 128,
        intermediate_size: int = 256, num_hidden_layers: int = 2, **rest: Any,
    ) -> None:  # fmt: skip
        """`cardinalities`: how many values each column of categories has, the unknown included."""
        super().__init__(**rest)
        self.num_numbers, self.cardinalities = num_numbers, list(cardinalities)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers = num_hidden_layers


class _Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + found


class _TableBody(nn.Module):
    def __init__(self, config: TabularConfig) -> None:
        super().__init__()
        self.numbers = self.scaled = None
        if config.num_numbers:
            self.scaled = Scaled(config.num_numbers)
            self.numbers = nn.Linear(config.num_numbers, config.hidden_size)
        self.tables = nn.ModuleList(
            nn.Embedding(count, config.hidden_size, padding_idx=0) for count in config.cardinalities
        )
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, numbers: Tensor | None, categories: Tensor | None) -> Tensor:
        parts = []
        if self.numbers is not None:
            parts.append(self.numbers(self.scaled(numbers)))  # type: ignore[misc]
        for at, table in enumerate(self.tables):
            parts.append(table(categories[:, at]))  # type: ignore[index]
        x = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]  # (B, D)
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.norm(x)
        return found


def columns_of(numbers: Tensor, categories: Tensor) -> dict[str, Tensor]:
    """What a model takes of these: (B, F) and (B, K), neither where it has no columns."""
    both = {"numbers": numbers, "categories": categories}
    return {name: columns for name, columns in both.items() if columns.shape[1]}


class TabularClassifier(PreTrainedModel):
    """Its inputs are raw: `numbers` (B, F) as the table has them, `categories` (B, K) by index,
    0 for a value that training rows lack."""

    config_class = TabularConfig
    base_model_prefix = "body"
    main_input_name = "numbers"
    takes = ("numbers", "categories")

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.body = _TableBody(config)
        self.head = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        self.post_init()

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Random rows, for who wants to see the model run."""
        config, random = self.config, torch.Generator().manual_seed(0)
        return columns_of(
            torch.randn(4, config.num_numbers, generator=random),
            torch.stack(
                [torch.randint(0, n, (4,), generator=random) for n in config.cardinalities], 1
            ) if config.cardinalities else torch.zeros(4, 0, dtype=torch.int64),
        )  # fmt: skip

    def forward(
        self, numbers: Tensor | None = None, categories: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.head(self.body(numbers, categories)))

    @staticmethod
    def fields(given: Mapping[str, Input]) -> dict[str, Any]:
        """What of a config follows from its inputs."""
        below = given["categories"].below if "categories" in given else ()
        assert isinstance(below, tuple)
        return {
            "num_numbers": given["numbers"].dims[0] if "numbers" in given else 0,
            "cardinalities": [*below],
        }

    def scaled_input(self, name: str) -> Scaled:  # noqa: ARG002 the only one of floats
        assert self.body.scaled is not None
        return self.body.scaled

    def _init_weights(self, module: nn.Module) -> None:
        """As wide as the input (He et al. 2015); an unknown category says nothing."""
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
            with torch.no_grad():
                module.weight[0].zero_()


CLASSES: dict[str, type[Any]] = {TabularConfig.model_type: TabularClassifier}
for _config in (TabularConfig,):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)


def input_fields(config: PretrainedConfig, inputs: Sequence[Input]) -> dict[str, Any]:
    """What of a config the data decide. Raises LookupError for arrays that its model does not
    take."""
    given = {one.name: one for one in inputs}
    takes = CLASSES[config.model_type].takes
    if not given.keys() <= {*takes}:
        raise LookupError(f"takes {' and '.join(takes)}, not {' and '.join(given)}")
    fields: dict[str, Any] = CLASSES[config.model_type].fields(given)
    return fields


def serving(inputs: Sequence[Input]) -> tuple[str, ...]:
    """Which of these networks take such arrays."""
    names = {one.name for one in inputs}
    return tuple(kind for kind, made in CLASSES.items() if names <= {*made.takes})
