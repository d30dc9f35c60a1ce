"""The fused head: equal to the plain path in value and gradient, and no (P, V) tensor."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.losses import fused
from limbeck.losses.divergence import cross_entropy, forward_kl
from limbeck.losses.fused import (
    Against,
    Head,
    Term,
    against_head,
    against_labels,
    against_logits,
    against_sample,
    against_sparse,
    fused_loss,
)
from losses_oracle import DIVERGENCES, assert_close, randn

P, D, V = 23, 6, 31
HEADS = {
    "plain": {},
    "bias": {"bias": randn(V, seed=9)},
    "scale": {"logit_scale": 0.25},
    "softcap": {"softcap": 2.0},
    "all": {"bias": randn(V, seed=9), "logit_scale": 3.0, "softcap": 5.0},
}
TEACHER = randn(P, V, seed=2, scale=2)
LABELS = torch.arange(P) % V
WEIGHT = torch.rand(P, generator=torch.Generator().manual_seed(3)).masked_fill(
    torch.arange(P) % 4 == 1, 0
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(fused, "rows_per_chunk", lambda *_: 5)


def student(dtype=torch.float32):
    hidden, weight = randn(P, D, seed=0, dtype=dtype), randn(V, D, seed=1, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_()


def plain_logits(hidden, weight, bias=None, logit_scale=1.0, softcap=None):
    """fp64, by torch's own linear."""
    logits = F.linear(hidden.double(), weight.double(), bias) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def kl_by_torch(logits, teacher, temperature):
    log_q, log_p = ((x.double() / temperature).log_softmax(-1) for x in (logits, teacher))
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("upstream", [1.0, -2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_terms_equal_the_fp64_reference(head, upstream, dtype):
    hidden, weight = student(dtype)
    settings = {k: v.clone() if k == "bias" else v for k, v in HEADS[head].items()}
    leaves = [hidden, weight]
    if "bias" in settings:
        leaves.append(settings["bias"].requires_grad_())
    soft = Term(
        loss=against_logits(forward_kl, TEACHER.to(dtype), temperature=2.0), weight=WEIGHT * 4
    )
    hard = Term(loss=against_labels(LABELS), weight=WEIGHT.flip(0) / 7)
    found = fused_loss(hidden, Head(weight=weight, **settings), [soft, hard])
    gradients = torch.autograd.grad(found.total * upstream, leaves)

    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    if "bias" in settings:
        settings["bias"] = leaves[2]
    logits = plain_logits(leaves[0], leaves[1], **settings)
    values = (
        kl_by_torch(logits, TEACHER.to(dtype), 2.0),
        F.cross_entropy(logits, LABELS, reduction="none"),
    )
    total = (values[0] * WEIGHT * 4).sum() + (values[1] * WEIGHT.flip(0) / 7).sum()
    assert_close(found.total.detach(), total.detach())
    counted = (WEIGHT != 0) | (WEIGHT.flip(0) != 0)
    for value, expected in zip(found.values, values, strict=True):
        assert not value.requires_grad
        assert_close(value, expected.detach() * counted)
    for gradient, expected in zip(
        gradients, torch.autograd.grad(total * upstream, leaves), strict=True
    ):
        assert_close(gradient, expected, 2e-2 if gradient.dtype == torch.bfloat16 else 1e-5)


def teachers(function, temperature):
    """The same teacher in every form that has an exact plain counterpart."""
    teacher_hidden = randn(P, 9, seed=5)
    teacher_head = Head(weight=randn(V, 9, seed=6), softcap=4.0)
    teacher = plain_logits(teacher_hidden, teacher_head.weight, softcap=4.0).float()
    probs = (teacher.double() / temperature).softmax(-1).float()
    ids = torch.arange(V).expand(P, V)
    return teacher, {
        "logits": against_logits(function, teacher, temperature=temperature),
        "head": against_head(function, teacher_hidden, teacher_head, temperature=temperature),
        "sparse": against_sparse(
            function, ids, probs, torch.zeros(P), temperature=temperature
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "dkd"])
@pytest.mark.parametrize("kind", ["logits", "head", "sparse"])
def test_every_divergence_and_teacher_equals_the_plain_path(name, kind):
    function = DIVERGENCES[name][0]
    hidden, weight = student()
    teacher, losses = teachers(function, 2.0)
    found = fused_loss(hidden, Head(weight=weight), [Term(loss=losses[kind], weight=WEIGHT)])
    gradients = torch.autograd.grad(found.total, (hidden, weight))
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    values = function(plain_logits(*leaves), teacher.double(), temperature=2.0)
    total = (values * WEIGHT).sum()
    assert_close(found.values[0], (values * (WEIGHT != 0)).detach())
    for gradient, expected in zip(gradients, torch.autograd.grad(total, leaves), strict=True):
        assert_close(gradient, expected)


def test_a_sample_equals_its_dense_cross_entropy():
    hidden, weight = student()
    ids = LABELS[:, None] * torch.tensor([1, 0]) + torch.tensor([0, 2])
    weights = torch.tensor([[0.7, 0.4]]).expand(P, -1)
    term = Term(loss=against_sample(ids, weights), weight=WEIGHT)
    gradient, _ = torch.autograd.grad(
        fused_loss(hidden, Head(weight=weight), [term]).total, (hidden, weight)
    )
    leaf = hidden.detach().double().requires_grad_()
    target = torch.zeros(P, V, dtype=torch.float64).scatter_add(-1, ids, weights.double())
    values = F.cross_entropy(plain_logits(leaf, weight.detach()), target, reduction="none")
    assert_close(gradient, torch.autograd.grad((values * WEIGHT).sum(), leaf)[0])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("head", [{}, {"logit_scale": 0.3}, {"bias": 3 * randn(V, seed=8)}])
def test_what_is_made_in_the_place_of_logits_equals_autograds(temperature, head):
    """A sample with a slot that is empty and an id drawn twice; all of a padded vocabulary; and
    labels, where T is theirs."""
    hidden, weight = student()
    ids = torch.stack([LABELS, LABELS, (LABELS + 1) % V, torch.zeros_like(LABELS)], -1)
    weights = torch.tensor([[0.5, 0.2, 0.4, 0.0]]).expand(P, -1)
    padded = TEACHER.masked_fill(torch.arange(V) == V - 1, -torch.inf)
    terms = [
        Term(loss=against_sample(ids, weights, temperature=temperature), weight=WEIGHT),
        Term(loss=against_logits(forward_kl, padded, temperature=temperature), weight=WEIGHT / 3),
    ]
    if temperature == 1:
        terms.append(Term(loss=against_labels(LABELS), weight=WEIGHT.flip(0)))

    def run(terms):
        found = fused_loss(hidden, Head(weight=weight, **head), terms)
        return found, torch.autograd.grad(found.total * 3, (hidden, weight))

    plainly = [Term(loss=Against(P, term.loss.loss), weight=term.weight) for term in terms]
    (mine, gradients), (wanted, expected) = run(terms), run(plainly)
    assert_close(mine.total, wanted.total.detach())
    for value, other in zip(mine.values, wanted.values, strict=True):
        assert_close(value, other)
    for gradient, other in zip(gradients, expected, strict=True):
        assert_close(gradient, other)


def test_in_the_place_of_logits_too_nan_spreads_and_a_class_that_is_ruled_out_does_not():
    hidden, weight = student()
    bias = torch.zeros(V)
    bias[3] = -torch.inf
    labels = torch.full((P,), 3)
    term = Term(loss=against_labels(labels), weight=torch.ones(P))
    found = fused_loss(hidden, Head(weight=weight, bias=bias), [term])
    gradients = torch.autograd.grad(found.total, (hidden, weight))
    assert (found.values[0] >= 1e29).all() and found.total.isfinite()
    assert all(g.isfinite().all() for g in gradients)
    with torch.no_grad():
        hidden[0] = torch.nan
    assert fused_loss(hidden, Head(weight=weight), [term]).total.isnan()


def test_positions_without_weight_are_free_and_may_hold_anything():
    hidden, weight = student()
    off = WEIGHT == 0
    spoilt, teacher = hidden.detach().clone(), TEACHER.clone()
    spoilt[off], teacher[off] = torch.nan, torch.inf
    spoilt.requires_grad_()
    labels = LABELS.masked_fill(off, -100)

    def run(x, teacher, labels):
        terms = [
            Term(loss=against_logits(forward_kl, teacher), weight=WEIGHT),
            Term(loss=against_labels(labels), weight=WEIGHT),
        ]
        found = fused_loss(x, Head(weight=weight), terms)
        return found, *torch.autograd.grad(found.total, (x, weight))

    clean, spoilt_run = run(hidden, TEACHER, LABELS), run(spoilt, teacher, labels)
    assert torch.equal(clean[0].total, spoilt_run[0].total)
    assert torch.equal(clean[1], spoilt_run[1])
    assert torch.equal(clean[2], spoilt_run[2])
    assert (spoilt_run[1][off] == 0).all()
    assert all((v[off] == 0).all() for v in spoilt_run[0].values)


@pytest.mark.parametrize("num", [0, 1])
def test_no_positions_and_none_that_counts(num):
    hidden = torch.zeros(num, D).requires_grad_()
    weight = randn(V, D).requires_grad_()
    term = Term(loss=against_logits(forward_kl, torch.zeros(num, V)), weight=torch.zeros(num))
    found = fused_loss(hidden, Head(weight=weight), [term])
    gradients = torch.autograd.grad(found.total, (hidden, weight))
    assert found.total == 0
    assert all((g == 0).all() for g in gradients)


def test_a_single_class_gives_zero():
    hidden, weight = randn(4, D).requires_grad_(), randn(1, D).requires_grad_()
    term = Term(loss=against_logits(forward_kl, randn(4, 1)), weight=torch.ones(4))
    found = fused_loss(hidden, Head(weight=weight), [term])
    found.total.backward()
    assert found.total == 0
    assert (hidden.grad == 0).all()


def test_gradcheck():
    hidden, weight = student(torch.float64)
    bias = randn(V, dtype=torch.float64).requires_grad_()
    terms = [
        Term(loss=against_logits(forward_kl, TEACHER.double(), temperature=2.0), weight=WEIGHT),
        Term(loss=against_labels(LABELS), weight=WEIGHT.flip(0)),
    ]

    def total(h, w, b):
        head = Head(weight=w, bias=b, logit_scale=0.5, softcap=3.0)
        return fused_loss(h, head, terms, retain=True).total

    assert torch.autograd.gradcheck(total, (hidden, weight, bias), fast_mode=True)


def test_a_tied_head_adds_both_gradients():
    table = randn(V, D).requires_grad_()
    tokens = torch.arange(P) * 3 % V
    term = Term(loss=against_logits(forward_kl, TEACHER), weight=WEIGHT)
    fused_loss(F.embedding(tokens, table), Head(weight=table), [term]).total.backward()
    leaf = table.detach().double().requires_grad_()
    values = kl_by_torch(F.embedding(tokens, leaf) @ leaf.T, TEACHER, 1.0)
    assert_close(table.grad, torch.autograd.grad((values * WEIGHT).sum(), leaf)[0])


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both", "no_grad"])
def test_only_what_is_asked_for_is_computed(frozen):
    hidden, weight = student()
    hidden.requires_grad_(frozen in ("weight", "no_grad"))
    weight.requires_grad_(frozen in ("hidden", "no_grad"))
    term = Term(loss=against_logits(forward_kl, TEACHER), weight=WEIGHT)
    expected = (kl_by_torch(plain_logits(hidden, weight), TEACHER, 1.0) * WEIGHT).sum()
    with torch.set_grad_enabled(frozen != "no_grad"):
        total = fused_loss(hidden, Head(weight=weight), [term]).total
    assert_close(total.detach(), expected.detach())
    assert total.requires_grad == (frozen in ("hidden", "weight"))
    if total.requires_grad:
        total.backward()
        other = hidden if frozen == "hidden" else weight
        assert other.grad is None


def test_autocast_changes_nothing_and_a_graph_may_be_walked_twice():
    hidden, weight = student()
    _, losses = teachers(forward_kl, 1.0)
    for loss in (losses["head"], losses["logits"]):
        terms = [Term(loss=loss, weight=WEIGHT)]
        plain = fused_loss(hidden, Head(weight=weight), terms).total
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = fused_loss(hidden, Head(weight=weight), terms, retain=True).total
            logits = Head(weight=weight).logits(hidden)
        assert logits.dtype == torch.float32
        assert torch.equal(plain, cast)
        first, second = (torch.autograd.grad(cast, weight, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(first, torch.autograd.grad(plain, weight, retain_graph=True)[0])
        with pytest.raises(RuntimeError, match="retain=True"):
            plain.backward()


def test_a_weight_of_another_shape_is_refused():
    hidden, weight = student()
    term = Term(loss=against_logits(forward_kl, TEACHER), weight=WEIGHT[:-1])
    with pytest.raises(ValueError, match="one per position"):
        fused_loss(hidden, Head(weight=weight), [term])


def test_the_head_equals_the_plain_formula():
    hidden, weight = student(torch.bfloat16)
    for settings in HEADS.values():
        bias = settings.get("bias")
        expected = plain_logits(
            hidden, weight, **{**settings, "bias": None if bias is None else bias.double()}
        )
        assert_close(Head(weight=weight, **settings).logits(hidden).detach(), expected.detach())


class Ledger(TorchDispatchMode):
    """Sizes of new tensors, and how many matmuls there were."""

    def __init__(self):
        super().__init__()
        self.largest, self.matmuls = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.matmuls += func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm")
        flat = out if isinstance(out, (tuple, list)) else [out]
        if not func.is_view:
            new = [x.numel() for x in flat if isinstance(x, torch.Tensor)]
            self.largest = max([self.largest, *new])
        return out


@pytest.mark.parametrize("kind", ["logits", "head", "sparse", "labels"])
def test_no_tensor_of_positions_by_vocabulary_and_three_matmuls_a_chunk(kind):
    num, rows, classes, width = 50, 5, 40, 6
    hidden, weight = randn(num, width).requires_grad_(), randn(classes, width).requires_grad_()
    teacher = randn(num, classes, seed=1)
    probs, ids = teacher.softmax(-1).topk(3)
    loss = {
        "logits": against_logits(forward_kl, teacher),
        "head": against_head(forward_kl, randn(num, 4), Head(weight=randn(classes, 4))),
        "sparse": against_sparse(forward_kl, ids, probs, 1 - probs.sum(-1)),
        "labels": against_labels(ids[:, 0]),
    }[kind]
    with Ledger() as ledger:
        term = Term(loss=loss, weight=torch.ones(num))
        fused_loss(hidden, Head(weight=weight), [term]).total.backward()
    allowed = max(rows * classes, width * classes, num * width)  # a chunk, two gradients
    assert ledger.largest <= allowed < num * classes
    assert ledger.matmuls == num // rows * (4 if kind == "head" else 3)


def test_the_plain_cross_entropy_is_the_fused_one():
    hidden, weight = student()
    term = Term(loss=against_labels(LABELS), weight=WEIGHT)
    found = fused_loss(hidden, Head(weight=weight), [term])
    expected = cross_entropy(plain_logits(hidden, weight), LABELS)
    assert_close(found.values[0], (expected * (WEIGHT != 0)).detach())
