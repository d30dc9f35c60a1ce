"""Networks for time series (B, C, T): one of convolutions, one of attention between patches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from limbeck.nets.parts import Scaled, start_weights
from limbeck.types import Input


class _SeriesConfig(PretrainedConfig):
    def __init__(
        self, num_channels: int = 1, length: int = 64, hidden_size: int = 64,
        intermediate_size: int = 128, num_hidden_layers: int = 3, **rest: Any,
    ) -> None:  # fmt: skip
        super().__init__(**rest)
        self.num_channels, self.length = num_channels, length
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers = num_hidden_layers


class SeriesConvConfig(_SeriesConfig):
    """Depthwise convolutions along time, and between them what every moment does for itself."""

    model_type = "limbeck-conv1d"

    def __init__(self, kernel_size: int = 7, stride: int = 2, **rest: Any) -> None:
        """`stride` of the first convolution; the others keep the length."""
        super().__init__(**rest)
        self.kernel_size, self.stride = kernel_size, stride


class SeriesTransformerConfig(_SeriesConfig):
    """Patches of the series with learnt positions, and attention between them."""

    model_type = "limbeck-series-transformer"

    def __init__(self, num_attention_heads: int = 4, patch_size: int = 8, **rest: Any) -> None:
        super().__init__(**rest)
        self.num_attention_heads, self.patch_size = num_attention_heads, patch_size


class _ConvLayer(nn.Module):
    def __init__(self, config: SeriesConvConfig) -> None:
        super().__init__()
        width, kernel = config.hidden_size, config.kernel_size
        self.along = nn.Conv1d(width, width, kernel, padding="same", groups=width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.up = nn.Conv1d(width, config.intermediate_size, 1)
        self.down = nn.Conv1d(config.intermediate_size, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(torch.relu(self.up(self.norm(self.along(x)))))
        return x + found


class _ConvBody(nn.Module):
    def __init__(self, config: SeriesConvConfig) -> None:
        super().__init__()
        self.scaled = Scaled(config.num_channels, dims=2)
        self.stem = nn.Conv1d(
            config.num_channels, config.hidden_size, config.kernel_size, stride=config.stride,
            padding=config.kernel_size // 2,
        )  # fmt: skip
        self.layers = nn.ModuleList(_ConvLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, series: Tensor) -> Tensor:
        x = self.stem(self.scaled(series))  # (B, D, T / stride)
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.norm(x.mean(2))
        return found


class _Attention(nn.Module):
    def __init__(self, config: SeriesTransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            part(x).view(b, t, self.heads, d // self.heads).transpose(1, 2)  # (B, H, T, D / H)
            for part in (self.query, self.key, self.value)
        )
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        found: Tensor = self.out(seen.transpose(1, 2).reshape(b, t, d))
        return found


class _AttentionLayer(nn.Module):
    def __init__(self, config: SeriesTransformerConfig) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(config.hidden_size), _Attention(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        found: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + found


class _AttentionBody(nn.Module):
    def __init__(self, config: SeriesTransformerConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.scaled = Scaled(config.num_channels, dims=2)
        self.stem = nn.Conv1d(config.num_channels, config.hidden_size, patch, stride=patch)
        self.positions = nn.Parameter(torch.zeros(config.length // patch, config.hidden_size))
        self.layers = nn.ModuleList(
            _AttentionLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, series: Tensor) -> Tensor:
        x = self.stem(self.scaled(series)).transpose(1, 2) + self.positions  # (B, T / patch, D)
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.norm(x).mean(1)
        return found


class _SeriesClassifier(PreTrainedModel):
    """`series` (B, C, T) as the data have it: raw."""

    base_model_prefix = "body"
    main_input_name = "series"
    takes = ("series",)
    body: Any
    head: nn.Linear

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """Random series, for who wants to see the model run."""
        random = torch.Generator().manual_seed(0)
        size = (4, self.config.num_channels, self.config.length)
        return {"series": torch.randn(size, generator=random)}

    def forward(self, series: Tensor, **_: Any) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.head(self.body(series)))

    @staticmethod
    def fields(given: Mapping[str, Input]) -> dict[str, Any]:
        """What of a config follows from its inputs."""
        channels, length = given["series"].dims
        return {"num_channels": channels, "length": length}

    def scaled_input(self, name: str) -> Scaled:  # noqa: ARG002 the only one
        found: Scaled = self.body.scaled
        return found

    def _init_weights(self, module: nn.Module) -> None:
        start_weights(module)


class SeriesConvClassifier(_SeriesClassifier):
    config_class = SeriesConvConfig

    def __init__(self, config: SeriesConvConfig) -> None:
        super().__init__(config)
        self.body = _ConvBody(config)
        self.head = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        self.post_init()


class SeriesTransformerClassifier(_SeriesClassifier):
    config_class = SeriesTransformerConfig

    def __init__(self, config: SeriesTransformerConfig) -> None:
        super().__init__(config)
        self.body = _AttentionBody(config)
        self.head = nn.Linear(config.hidden_size, int(config.num_labels or 0))
        self.post_init()
