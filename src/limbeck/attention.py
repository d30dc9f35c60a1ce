"""Attention that is learnt under autocast on a CPU over short rows: one product for all heads.

torch's own for CPUs takes heads one by one, each with a fixed cost where it multiplies in bf16:
over 20 tokens it takes four times as long, over 128 twice, from 512 on no longer
(`benchmarks/attention.py`). This one holds as little between forward and backward: scores are made
twice (FlashAttention, Dao et al. 2022, arXiv:2205.14135, sec. 3.1, without its tiles). They stay
fp32; `device.products_in` says how they are multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from limbeck.losses.numerics import without_autocast

_SHORT = 256  # tokens


def register_attention() -> None:
    """What transformers' models call `sdpa` is `attention` from now on."""
    AttentionInterface.register("sdpa", attention)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    **settings: Any,
) -> Any:  # fmt: skip
    """(B, H, T, D) each. As transformers has it, but for short rows that are learnt under autocast
    on a CPU."""
    # a model that is being exported is never asked for its sizes, which have no numbers there
    learns = torch.is_autocast_enabled("cpu") and torch.is_grad_enabled() and query.requires_grad
    on_cpu = query.device.type == "cpu"
    if not (learns and on_cpu and max(query.shape[2], key.shape[2]) <= _SHORT):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    with _AllHeadsAtOnce():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


class _AllHeadsAtOnce(TorchFunctionMode):
    """Within, in this thread, torch's attention is `scaled_dot_product_attention` of this module:
    transformers sees to groups, masks and causality in its own way."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is functional.scaled_dot_product_attention:
            function = scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's, (B, H, T, D), (B, N, S, D), (B, N, S, E) -> (B, H, T, E) in fp32, with H a multiple
    of N. What learns its mask or drops out is left to torch."""
    learnt_mask = attn_mask is not None and attn_mask.requires_grad
    if dropout_p or learnt_mask or query.dim() != 4:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if is_causal:
        t, s = query.shape[2], key.shape[2]
        attn_mask = torch.ones(t, s, dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    found: Tensor = _Attention.apply(query, key, value, attn_mask, scale)
    return found


class _Attention(torch.autograd.Function):
    """Heads that share a key lie below each other: N groups, R = T * H / N rows in each."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        batch, heads, length, _ = query.shape
        groups = key.shape[1]
        if mask is not None:  # (B or 1, N or 1, H / N or 1, T, S)
            if mask.dtype == torch.bool:  # to add is many times as fast as to fill
                lowest = torch.finfo(torch.float32).min
                mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, lowest)
            mask = mask[(None,) * (4 - mask.dim())]
            mask = mask.unflatten(1, (groups, -1) if mask.shape[1] > 1 else (1, 1))
        with without_autocast(query):
            q = (query.float() * scale).reshape(batch * groups, -1, query.shape[-1])
            k, v = (side.float().flatten(0, 1) for side in (key, value))
            out = torch.bmm(_probabilities(q, k, mask, batch, length), v)
        ctx.save_for_backward(q, k, v, mask, out)
        ctx.of = batch, length, scale, [part.dtype for part in (query, key, value)]
        return out.view(batch, heads, length, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out = ctx.saved_tensors
        batch, length, scale, dtypes = ctx.of
        with without_autocast(grad):
            g = grad.float().reshape(out.shape)
            probs = _probabilities(q, k, mask, batch, length)
            grad_v = torch.bmm(probs.mT, g)
            along = (g * out).sum(-1, keepdim=True)
            pulled = torch.bmm(g, v.mT).sub_(along).mul_(probs)
            grad_q = torch.bmm(pulled, k).mul_(scale)
            grad_k = torch.bmm(pulled.mT, q)
        heads = grad.shape[1]
        found = [grad_q.view(batch, heads, length, -1), *(
            one.unflatten(0, (batch, -1)) for one in (grad_k, grad_v)
        )]  # fmt: skip
        return *(one.to(dtype) for one, dtype in zip(found, dtypes, strict=True)), None, None


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, batch: int, length: int
) -> Tensor:
    """(B N, R, D), (B N, S, D) -> (B N, R, S)."""
    scores = torch.bmm(q, k.mT)
    if mask is not None:
        scores.view(batch, len(q) // batch, -1, length, k.shape[1]).add_(mask)
    return scores.softmax(-1)
