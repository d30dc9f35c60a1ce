"""Short rows are learnt by an attention of our own under autocast; all else is as it was."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import limbeck.step  # noqa: F401, registers it
from limbeck import attention
from test_heads import CONFIGS, Rows, causal

T = 12


class Module(nn.Module):
    num_key_value_groups, is_causal = 2, True


def heads(tokens=T, dtype=torch.bfloat16):
    """Four of queries for two of keys and values, the latter of another width."""
    torch.manual_seed(0)
    return [
        torch.randn(3, tokens, n, width).to(dtype).transpose(1, 2).requires_grad_()
        for n, width in ((4, 8), (2, 8), (2, 5))
    ]


def asked(function, parts, mask=None, **settings):
    """Output and gradients, under autocast where the heads are bf16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=parts[0].dtype == torch.bfloat16):
        found, _ = function(Module(), *parts, mask, scaling=0.3, **settings)
    weights = torch.cos(torch.arange(found.numel(), dtype=torch.float32)).view_as(found)
    return found, torch.autograd.grad((found * weights.to(found.dtype)).sum(), parts)


def masks():
    torch.manual_seed(1)
    allowed = (torch.rand(3, 1, T, T) < 0.7) | torch.eye(T, dtype=torch.bool)
    by_head = (torch.rand(3, 4, T, T) < 0.7) | torch.eye(T, dtype=torch.bool)
    added = torch.zeros(3, 1, T, T, dtype=torch.bfloat16)
    added = added.masked_fill(~allowed, torch.finfo(torch.bfloat16).min)
    return {"causal": None, "bool": allowed, "of each head": by_head, "added": added,
            "of any row": allowed[:1], "of positions": torch.randn(3, 4, T, T)}  # fmt: skip


@pytest.mark.parametrize("kind", masks())
def test_it_is_the_exact_one(kind):
    parts, mask = heads(dtype=torch.float32), masks()[kind]
    exact = [part.detach().double().requires_grad_() for part in parts]
    wide = mask.double() if mask is not None and mask.is_floating_point() else mask
    causal = {"is_causal": mask is None, "scale": 0.3, "enable_gqa": True}
    found = attention.scaled_dot_product_attention(*parts, mask, **causal)
    wanted = functional.scaled_dot_product_attention(*exact, wide, **causal)
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    weights = torch.cos(torch.arange(found.numel())).view_as(found)
    gradients = torch.autograd.grad((found * weights).sum(), parts)
    expected = torch.autograd.grad((wanted * weights).sum(), exact)
    for mine, other in zip(gradients, expected, strict=True):
        assert torch.allclose(mine.double(), other, atol=1e-5)


@pytest.mark.parametrize("kind", masks())
def test_transformers_groups_and_masks_reach_it(kind):
    parts, mask = heads(), masks()[kind]
    found, gradients = asked(attention.attention, parts, mask)
    assert found.dtype == torch.float32
    exact = [part.detach().float().requires_grad_() for part in parts]
    wide = mask.float() if mask is not None and mask.is_floating_point() else mask
    wanted, expected = asked(sdpa_attention_forward, exact, wide)
    assert torch.allclose(found, wanted, atol=1e-5)
    for mine, other in zip(gradients, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.allclose(mine.float(), other, atol=2**-7 * float(other.abs().max()))


def test_a_row_that_sees_nothing_is_finite_and_disturbs_nobody():
    parts, mask = heads(), masks()["bool"]
    whole, _ = asked(attention.attention, parts, mask)
    none = mask.clone()
    none[0, 0, 3] = False
    found, gradients = asked(attention.attention, parts, none)
    assert found.isfinite().all() and all(g.isfinite().all() for g in gradients)
    same = torch.ones(T, dtype=torch.bool)
    same[3] = False
    assert torch.equal(found[0, same], whole[0, same]) and torch.equal(found[1:], whole[1:])


def test_its_gradient_is_that_of_its_value():
    parts = [part.detach().double().requires_grad_() for part in heads(5)]

    def value(*parts):
        out = attention.scaled_dot_product_attention(*parts, is_causal=True)
        return out.double()

    assert torch.autograd.gradcheck(value, parts, eps=1e-2, atol=1e-2, rtol=1e-2)


def test_elsewhere_it_is_transformers_own():
    long, short = heads(attention._SHORT + 1), heads()
    for parts in (long, [part.detach() for part in short]):
        with torch.autocast("cpu", torch.bfloat16):
            mine, _ = attention.attention(Module(), *parts, None, scaling=0.3)
            theirs, _ = sdpa_attention_forward(Module(), *parts, None, scaling=0.3)
        assert mine.dtype == torch.bfloat16 and torch.equal(mine, theirs)
    mine, _ = attention.attention(Module(), *short, None, scaling=0.3)
    assert mine.dtype == torch.bfloat16, "without autocast"


def test_a_mask_that_learns_is_torchs_own_and_learns():
    parts, bias = heads(), masks()["of positions"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = attention.attention(Module(), *parts, bias, scaling=0.3)
    (gradient,) = torch.autograd.grad(found.float().square().sum(), bias)
    assert float(gradient.abs().max()) > 0


def test_models_that_learn_call_it(monkeypatch):
    called, own = [], attention.scaled_dot_product_attention

    def spy(*args, **settings):
        called.append(args[0].shape)
        return own(*args, **settings)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", spy)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention.attention
    model, batch = causal(CONFIGS["llama"]), Rows().batch([0, 1])
    model(**batch.inputs)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            model(**batch.inputs)
        assert called == []
        model(**batch.inputs)
    assert len(called) == 2, "once a layer"
