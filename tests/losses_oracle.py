"""What the losses should be, by loops over Python floats, and their gradients by differences.

Written from the papers' formulas, with no tensor operation in common with `limbeck.losses`.
"""

import math
from functools import partial

import torch

from limbeck.losses import divergence as d

TINY = math.log(torch.finfo(torch.float32).tiny)  # part of reverse_kl's definition


def log_probs(z, temperature=1.0):
    z = [x / temperature for x in z]
    top = max(z)
    log_sum = top + math.log(math.fsum(math.exp(x - top) for x in z))
    return [x - log_sum for x in z]


def kl(log_a, log_b):
    pairs = [(a, b) for a, b in zip(log_a, log_b, strict=True) if math.exp(a) > 0]
    return math.fsum(math.exp(a) * (a - b) for a, b in pairs)


def mix(log_a, log_b, share):
    def log_sum(a, b):
        top = max(a, b)
        if top == -math.inf:
            return top
        return top + math.log(share * math.exp(a - top) + (1 - share) * math.exp(b - top))

    return [log_sum(a, b) for a, b in zip(log_a, log_b, strict=True)]


def floored(log_p):
    return [max(x, TINY) for x in log_p]


def jsd(log_q, log_p, _, beta):
    log_m = mix(log_p, log_q, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def tvd(log_q, log_p, _):
    pairs = zip(log_q, log_p, strict=True)
    return math.fsum(abs(math.exp(q) - math.exp(p)) for q, p in pairs) / 2


def akl(log_q, log_p, log_q_fixed):
    pairs = zip(log_p, log_q_fixed, strict=True)
    gaps = sorted(((math.exp(p), abs(math.exp(p) - math.exp(q))) for p, q in pairs), reverse=True)
    head = mass = 0.0
    for p, gap in gaps:
        if mass < 0.5:
            head, mass = head + gap, mass + p
    share = head / max(math.fsum(g for _, g in gaps), 1e-300)
    return share * kl(log_p, log_q) + (1 - share) * kl(log_q, floored(log_p))


def dkd_of_class_0(log_q, log_p, _):
    def split(x):
        rest = [v for v in x[1:] if v > -math.inf]
        if not rest:
            return [0.0, -math.inf], None
        top = max(rest)
        total = top + math.log(math.fsum(math.exp(v - top) for v in rest))
        return [x[0], total], [v - total for v in x[1:]]

    (binary_q, others_q), (binary_p, others_p) = split(log_q), split(log_p)
    others = kl(others_p, others_q) if others_p and others_q else 0.0
    return kl(binary_p, binary_q) + 8 * others


def dkd(student, teacher, **kwargs):
    return d.dkd(student, teacher, torch.zeros(student.shape[:-1], dtype=torch.int64), **kwargs)


# name -> (function, the same from log-probabilities: student, teacher, student not differentiated)
DIVERGENCES = {
    "forward_kl": (d.forward_kl, lambda q, p, _: kl(p, q)),
    "reverse_kl": (d.reverse_kl, lambda q, p, _: kl(q, floored(p))),
    "jsd": (d.jsd, partial(jsd, beta=0.5)),
    "jsd_0.2": (partial(d.jsd, beta=0.2), partial(jsd, beta=0.2)),
    "skew_kl": (d.skew_kl, lambda q, p, _: kl(p, mix(p, q, 0.1))),
    "skew_reverse_kl": (d.skew_reverse_kl, lambda q, p, _: kl(q, mix(q, p, 0.1))),
    "tvd": (d.tvd, tvd),
    "akl": (d.akl, akl),
    "dkd": (dkd, dkd_of_class_0),
}
# f-divergences: merging outcomes cannot make them larger
F_DIVERGENCES = [name for name in DIVERGENCES if name not in ("akl", "dkd")]


def value_and_gradient(oracle, student, teacher, temperature=1.0, step=1e-4):
    """(n, V) tensors -> fp64 (n,), (n, V), by central differences of `oracle`."""
    values, gradient = [], torch.zeros(student.shape, dtype=torch.float64)
    for row, (s, t) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        log_p, fixed = log_probs(t, temperature), log_probs(s, temperature)
        values.append(oracle(fixed, log_p, fixed))
        for v, at in enumerate(s):
            if at == -math.inf:
                continue
            ends = [
                oracle(log_probs([*s[:v], at + h, *s[v + 1 :]], temperature), log_p, fixed)
                for h in (-step, step)
            ]
            gradient[row, v] = (ends[1] - ends[0]) / (2 * step)
    return torch.tensor(values, dtype=torch.float64), gradient


def ours(function, student, teacher, **kwargs):
    """(values, gradient) of the function under test, in the input's dtype."""
    leaf = student.clone().requires_grad_()
    values = function(leaf, teacher, **kwargs)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


def assert_close(found, expected, tolerance=1e-5):
    """The contract: norm of the difference over norm of the reference."""
    assert found.isfinite().all()
    assert found.shape == expected.shape
    difference = (found.double() - expected).norm()
    # 1e-7: where the reference is 0 there is no ratio, and fp32 rounds
    assert difference <= tolerance * expected.norm() + 1e-7, (difference, expected.norm())


def randn(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(scale).to(dtype)


def two_sided(case):
    """Student and teacher logits (8, 7) that a divergence must survive."""
    student, teacher = randn(8, 7, seed=1, scale=2), randn(8, 7, seed=2, scale=2)
    if case == "extreme":
        student, teacher = student * 1e4, teacher * 1e4
    if case == "offset":
        student, teacher = student + 1e4, teacher - 1e4
    if case == "teacher rules out":
        teacher[:, 2], teacher[3, 1:] = -torch.inf, -torch.inf
    if case == "both rule out":
        teacher[:, -2:], student[:, -2:] = -torch.inf, -torch.inf
    if case == "single class":
        student, teacher = student[:, :1], teacher[:, :1]
    if case == "bf16":
        student, teacher = student.bfloat16(), teacher.bfloat16()
    return student, teacher


CASES = [
    "random", "extreme", "offset", "teacher rules out", "both rule out", "single class", "bf16"
]  # fmt: skip
