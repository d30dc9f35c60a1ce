"""Our losses against torch's own, always, and against torchdistill's where it is installed.

    pip install --no-deps torchdistill && pytest tests/test_losses_peers.py

`--no-deps`, because torchdistill otherwise brings a CUDA torch and torchvision; what its losses
import is here already. Values and gradients, in fp64 and in fp32; a peer's conventions (mean,
temperature squared, which side is first) stand at each pair.
"""

import importlib
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limbeck.losses import divergence as d
from limbeck.losses.batchwise import dist
from limbeck.losses.embedding import cosine, mse
from limbeck.losses.maps import attention_transfer, channel_kl
from limbeck.losses.relational import rkd_distance
from losses_oracle import assert_close, randn

B, V = 6, 9
T = 3.0
LABELS = torch.arange(B) % V


def kl_div(log_q, log_p):
    """torch's first argument is the second of KL(p || q)."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def tempered(z):
    return (z / T).log_softmax(-1)


def mixture(log_p, log_q, share):
    return (share * log_p.exp() + (1 - share) * log_q.exp()).log()


def torch_jsd(s, t, beta):
    log_q, log_p = tempered(s), tempered(t)
    log_m = mixture(log_p, log_q, beta)
    return beta * kl_div(log_m, log_p) + (1 - beta) * kl_div(log_m, log_q)


def torch_cosine(s, t):
    return F.cosine_embedding_loss(s, t, s.new_ones(len(s)), reduction="none")


def torch_channel_kl(s, t):
    return kl_div(tempered(s.flatten(2)), tempered(t.flatten(2)))


TORCH = {
    "forward_kl": (
        lambda s, t: d.forward_kl(s, t, temperature=T),
        lambda s, t: kl_div(tempered(s), tempered(t)),
    ),
    "reverse_kl": (
        lambda s, t: d.reverse_kl(s, t, temperature=T),
        lambda s, t: kl_div(tempered(t), tempered(s)),
    ),
    "jsd": (
        lambda s, t: d.jsd(s, t, beta=0.3, temperature=T),
        lambda s, t: torch_jsd(s, t, 0.3),
    ),
    "skew_kl": (
        lambda s, t: d.skew_kl(s, t, alpha=0.2, temperature=T),
        lambda s, t: kl_div(mixture(tempered(t), tempered(s), 0.2), tempered(t)),
    ),
    "tvd": (
        lambda s, t: d.tvd(s, t, temperature=T),
        lambda s, t: F.l1_loss(tempered(s).exp(), tempered(t).exp(), reduction="none").sum(-1) / 2,
    ),
    "cross_entropy": (
        lambda s, t: d.cross_entropy(s, LABELS),
        lambda s, t: F.cross_entropy(s, LABELS, reduction="none"),
    ),
    "standardize": (
        lambda s, t: d.forward_kl(d.standardize(s), d.standardize(t)),
        lambda s, t: kl_div(*(F.layer_norm(z, (V,), eps=1e-12).log_softmax(-1) for z in (s, t))),
    ),
    "mse": (mse, lambda s, t: F.mse_loss(s, t, reduction="none").mean(-1)),
    "cosine": (cosine, torch_cosine),
}
MAPS = {
    "attention_transfer": (
        attention_transfer,
        lambda s, t: F.pairwise_distance(
            *(F.normalize(x.square().sum(1).flatten(1)) for x in (s, t)), eps=0
        ),
    ),
    "channel_kl": (lambda s, t: channel_kl(s, t, temperature=T), torch_channel_kl),
}


def assert_equal(ours, theirs, student, teacher):
    """Value and gradient; theirs in fp64, ours in fp64 and in fp32."""
    leaf = student.double().requires_grad_()
    expected = theirs(leaf, teacher.double())
    (expected_gradient,) = torch.autograd.grad(expected.sum(), leaf)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-5)):
        leaf = student.to(dtype).requires_grad_()
        found = ours(leaf, teacher.to(dtype))
        (gradient,) = torch.autograd.grad(found.sum(), leaf)
        assert expected.abs().max() > 1e-2  # there is something to compare
        assert_close(found.detach(), expected.detach(), tolerance)
        assert_close(gradient, expected_gradient, tolerance)


@pytest.mark.parametrize("name", TORCH)
def test_equals_torch(name):
    assert_equal(*TORCH[name], randn(B, V, scale=2), randn(B, V, seed=1, scale=2))


@pytest.mark.parametrize("name", MAPS)
def test_maps_equal_torch(name):
    assert_equal(*MAPS[name], randn(B, 4, 3, 5, scale=2), randn(B, 4, 3, 5, seed=1, scale=2))


@pytest.fixture(scope="module")
def peer():
    """torchdistill's losses; what it warns of at import is no concern of ours."""
    pytest.importorskip("torchdistill")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("torchdistill.losses.mid_level")


def called(loss, s, t):
    """A mid-level loss on two tensors: they read from nested tables of modules' outputs."""
    io = ({"m": {"output": s}}, {"m": {"output": t}})
    return loss(*io, targets=LABELS)


PATHS = {"student_module_path": "m", "student_module_io": "output",
         "teacher_module_path": "m", "teacher_module_io": "output"}  # fmt: skip
PAIR = {"io": "output", "path": "m"}
# name -> (class, its settings, ours as its scalar)
TORCHDISTILL = {
    # alpha: hard labels; beta: soft ones, times T^2
    "KDLoss": (
        {**PATHS, "temperature": T, "alpha": 0.3},
        lambda s, t: 0.3 * d.cross_entropy(s, LABELS).mean()
        + 0.7 * T**2 * d.forward_kl(s, t, temperature=T).mean(),
    ),
    # "DIST" multiplies both relations by T^2
    "DISTLoss": (
        {**PATHS, "beta": 2.0, "gamma": 0.5, "tau": T},
        lambda s, t: T**2
        * dist(s, t, inter_weight=2.0, intra_weight=0.5, temperature=T).mean(),
    ),
    # a deviation over V - 1 where ours is over V
    "LogitStdKDLoss": (
        {**PATHS, "temperature": T, "alpha": 1e-9, "beta": 1.0, "eps": 0.0},
        lambda s, t: T**2
        * d.forward_kl(
            *(d.standardize(z) * ((V - 1) / V) ** 0.5 for z in (s, t)), temperature=T
        ).mean(),
    ),
    # the mean over all B^2 pairs, the B of an example with itself among them
    "RKDLoss": (
        {"student_output_path": "m", "teacher_output_path": "m", "dist_factor": 2.0,
         "angle_factor": 0, "reduction": "mean"},
        lambda s, t: 2 * rkd_distance(s, t).mean() * (B - 1) / B,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCHDISTILL)
def test_equals_torchdistill(peer, name):
    settings, ours = TORCHDISTILL[name]
    loss: nn.Module = getattr(peer, name)(**settings)
    assert_equal(
        ours, lambda s, t: called(loss, s, t), randn(B, V, scale=2), randn(B, V, seed=1, scale=2)
    )


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_attention_transfer_equals_torchdistills(peer, mode):
    """"code" is the mean over examples and locations of the squared difference."""
    pairs = {"one": {"student": PAIR, "teacher": PAIR}}
    loss = peer.ATLoss(at_pairs=pairs, mode=mode)
    student, teacher = randn(B, 4, 3, 5, scale=2), randn(B, 7, 3, 5, seed=1, scale=2)

    def ours(s, t):
        values = attention_transfer(s, t)
        return values.mean() if mode == "paper" else values.square().mean() / 15

    def theirs(s, t):
        return called(loss, s, t)

    # the mean of the squares is small: scaled, so that there is something to compare
    assert_equal(lambda s, t: 10 * ours(s, t), lambda s, t: 10 * theirs(s, t), student, teacher)
