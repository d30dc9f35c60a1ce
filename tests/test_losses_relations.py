"""Hidden states, embeddings and relations: loops as reference, padding as poison."""

import math

import pytest
import torch
from torch.nn import functional as F

from limbeck.losses.batchwise import dist
from limbeck.losses.embedding import cosine, mse, similarity_kl
from limbeck.losses.hidden import relation_kl
from limbeck.losses.relational import cka, rkd_angle, rkd_distance
from losses_oracle import assert_close, kl, log_probs, ours, randn

N = 7
MASK = torch.tensor([1, 1, 0, 1, 1, 0, 1], dtype=torch.bool)


def over_rows(function, **kwargs):
    return lambda student, teacher, mask: function(student, teacher, mask=mask, **kwargs)


# what compares rows of a batch: name -> (student, teacher, mask) -> (N,)
BATCHWISE = {
    "dist": over_rows(dist, temperature=2.0),
    "similarity_kl": over_rows(similarity_kl),
    "rkd_distance": over_rows(rkd_distance),
    "rkd_angle": over_rows(rkd_angle),
    "cka": lambda s, t, mask: (1 - cka(s, t, mask=mask)).expand(len(s)),
    "cka debiased": lambda s, t, mask: (1 - cka(s, t, mask=mask, debiased=True)).expand(len(s)),
}
each_batchwise = pytest.mark.parametrize("name", BATCHWISE)


@each_batchwise
def test_uncounted_rows_may_hold_nan_and_get_exactly_zero_gradient(name):
    student, teacher = randn(N, 5), randn(N, 5, seed=1)
    alone = ours(lambda s, t: BATCHWISE[name](s, t, None), student[MASK], teacher[MASK])
    student[~MASK], teacher[~MASK] = torch.nan, torch.inf
    values, gradient = ours(lambda s, t: BATCHWISE[name](s, t, MASK)[MASK], student, teacher)
    torch.testing.assert_close(values, alone[0])
    torch.testing.assert_close(gradient[MASK], alone[1])
    assert (gradient[~MASK] == 0).all()
    if "cka" not in name:
        assert (BATCHWISE[name](student, teacher, MASK)[~MASK] == 0).all()


@each_batchwise
def test_equals_give_zero_and_a_teacher_gets_no_gradient(name):
    student, teacher = randn(N, 5).requires_grad_(), randn(N, 5).requires_grad_()
    values = BATCHWISE[name](student, teacher, None)
    values.sum().backward()
    assert values.mean().abs() < 1e-6
    assert teacher.grad is None
    assert student.grad.abs().max() < 1e-5


@each_batchwise
def test_gradcheck_of_rows(name):
    student = randn(5, 4, dtype=torch.float64).requires_grad_()
    teacher = randn(5, 4, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: BATCHWISE[name](s, teacher, None), (student,))


@each_batchwise
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("equal", [False, True])
def test_few_or_equal_rows_stay_finite(name, rows, equal):
    if name == "cka debiased" and rows < 4:
        with pytest.raises(ValueError, match="at least 4"):
            BATCHWISE[name](randn(rows, 5), randn(rows, 5), None)
        return
    student, teacher = randn(rows, 5), randn(rows, 5, seed=1)
    if equal:
        student, teacher = (torch.full_like(student, 3.0) for _ in range(2))
    values, gradient = ours(lambda s, t: BATCHWISE[name](s, t, None), student, teacher)
    assert values.isfinite().all()
    assert gradient.isfinite().all()


@each_batchwise
def test_a_bf16_student_is_computed_in_fp32_also_under_autocast(name):
    student, teacher = randn(N, 6).bfloat16(), randn(N, 6, seed=1).bfloat16()
    expected, expected_gradient = ours(
        lambda s, t: BATCHWISE[name](s, t, MASK), student.double(), teacher.double()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, gradient = ours(lambda s, t: BATCHWISE[name](s, t, MASK), student, teacher)
    assert_close(values, expected)
    assert_close(gradient, expected_gradient, 2e-2)


@pytest.mark.parametrize("function", [mse, cosine])
def test_mse_and_cosine_equal_torch(function):
    student, teacher = randn(2, 3, 5), randn(2, 3, 5, seed=1)
    leaf = student.double().requires_grad_()
    if function is mse:
        expected = F.mse_loss(leaf, teacher.double(), reduction="none").mean(-1)
    else:
        expected = 1 - F.cosine_similarity(leaf, teacher.double(), dim=-1)
    values, gradient = ours(function, student, teacher)
    assert_close(values, expected.detach())
    assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])
    assert function(teacher, teacher).abs().max() < 1e-6
    assert values.min() >= 0
    values, gradient = ours(function, torch.zeros(2, 5), torch.zeros(2, 5))
    assert gradient.isfinite().all()
    with pytest.raises(ValueError, match="project the student"):
        function(student, teacher[..., :4])


def unit_rows(x):
    return [[v / math.sqrt(math.fsum(u * u for u in row)) for v in row] for row in x.tolist()]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def pearson(a, b):
    a, b = ([x - math.fsum(v) / len(v) for x in v] for v in (a, b))
    return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))


@pytest.mark.parametrize(("inter", "intra"), [(1, 0), (0, 1), (2, 0.5)])
def test_the_mean_of_dist_is_the_papers_loss(inter, intra):
    student, teacher = randn(N, 5, scale=2), randn(N, 5, seed=1, scale=2)
    q, p = ([[math.exp(x) for x in log_probs(row, 3.0)] for row in z.tolist()]
            for z in (student, teacher))  # fmt: skip
    rows = math.fsum(1 - pearson(a, b) for a, b in zip(q, p, strict=True)) / N
    columns = zip(zip(*q, strict=True), zip(*p, strict=True), strict=True)
    classes = math.fsum(1 - pearson(a, b) for a, b in columns) / 5
    values = dist(student, teacher, inter_weight=inter, intra_weight=intra, temperature=3.0)
    assert values.mean().item() == pytest.approx(inter * rows + intra * classes, rel=1e-5)
    with pytest.raises(ValueError, match=r"must be \(B, C\)"):
        dist(student[None], teacher[None])
    with pytest.raises(ValueError, match="must match"):
        dist(student, teacher[:, :4])


@pytest.mark.parametrize("shape", [(5, 1), (1, 5), (3, 4)])
def test_dist_has_nothing_to_teach_where_the_teacher_is_constant(shape):
    values, gradient = ours(dist, randn(*shape), torch.full(shape, 2.0))
    if shape != (1, 5):
        assert values.abs().max() == 0
        assert gradient.abs().max() == 0
    assert gradient.isfinite().all()


def test_similarity_kl_equals_the_loops_with_other_widths():
    student, teacher = randn(N, 5), randn(N, 8, seed=1)
    rows = [unit_rows(student), unit_rows(teacher)]
    expected = []
    for i in range(N):
        log_q, log_p = (
            log_probs([dot(x[i], x[j]) / 0.1 for j in range(N) if j != i]) for x in rows
        )
        expected.append(kl(log_p, log_q))
    values = similarity_kl(student, teacher)
    assert_close(values, torch.tensor(expected, dtype=torch.float64), 2e-5)
    assert values.min() > -1e-6


def huber(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def test_rkd_distance_equals_the_loops():
    student, teacher = randn(N, 5, scale=4), randn(N, 3, seed=1)
    tables = []
    for x in (student.tolist(), teacher.tolist()):
        table = [[math.dist(a, b) for b in x] for a in x]
        mean = math.fsum(map(math.fsum, table)) / (N * (N - 1))
        tables.append([[d / mean for d in row] for row in table])
    expected = [
        math.fsum(huber(a - b) for a, b in zip(*rows, strict=True)) / (N - 1)
        for rows in zip(*tables, strict=True)
    ]
    found = rkd_distance(student, teacher)
    assert_close(found, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(rkd_distance(student * 5 + 1, teacher), found)


def test_rkd_angle_equals_the_loops():
    student, teacher = randn(N, 5), randn(N, 3, seed=1)

    def angle(x, i, j, k):
        a, b = ([u - v for u, v in zip(x[end], x[j], strict=True)] for end in (i, k))
        return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))

    s, t = student.tolist(), teacher.tolist()
    expected = []
    for j in range(N):
        pairs = [(i, k) for i in range(N) for k in range(N) if len({i, j, k}) == 3]
        total = math.fsum(huber(angle(s, i, j, k) - angle(t, i, j, k)) for i, k in pairs)
        expected.append(total / len(pairs))
    found = rkd_angle(student, teacher)
    assert_close(found, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(rkd_angle(student * 5 + 1, teacher), found)


def hsic_by_grams(x, y, debiased):
    """From the definition over (n, n) grams."""
    n = len(x)
    grams = [z.double() @ z.double().T for z in (x, y)]
    if not debiased:
        centre = torch.eye(n, dtype=torch.float64) - 1 / n
        return torch.trace(centre @ grams[0] @ centre @ grams[1])
    k, m = (g - g.diag().diag() for g in grams)
    one = torch.ones(n, dtype=torch.float64)
    return (
        torch.trace(k @ m)
        + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        - 2 * (one @ k @ m @ one) / (n - 2)
    )


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_equals_its_definition_and_ignores_rotation_scale_and_shift(debiased):
    x, y = randn(12, 5), randn(12, 8, seed=1) + randn(12, 5) @ randn(5, 8, seed=2)
    hsic = {(a, b): hsic_by_grams(p, q, debiased)
            for a, p in (("x", x), ("y", y)) for b, q in (("x", x), ("y", y))}  # fmt: skip
    expected = hsic["x", "y"] / (hsic["x", "x"] * hsic["y", "y"]).sqrt()
    found = cka(x, y, debiased=debiased)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    rotation = torch.linalg.qr(randn(5, 5, seed=3)).Q
    turned = cka(x @ rotation * 1e3 - 4, y, debiased=debiased)
    assert turned.item() == pytest.approx(found.item(), abs=1e-4)
    assert cka(torch.ones(6, 3), y[:6], debiased=debiased) == 0


def test_only_the_debiased_cka_sees_that_noise_is_noise():
    pairs = [(randn(20, 200, seed=i), randn(20, 200, seed=100 + i)) for i in range(20)]
    biased = torch.stack([cka(x, y) for x, y in pairs]).mean()
    debiased = torch.stack([cka(x, y, debiased=True) for x, y in pairs]).mean()
    assert biased > 0.8
    assert debiased.abs() < 0.05


SEQUENCES = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)


def relation_by_loops(student, teacher, mask, heads, causal):
    def log_row(pair, b, i, head):
        x, y = (z[b].double() for z in pair)
        size = x.shape[-1] // heads
        at = slice(head * size, (head + 1) * size)
        keys = [j for j in range(len(x)) if mask[b, j] and (j <= i or not causal)]
        return log_probs([float(x[i, at] @ y[j, at]) / math.sqrt(size) for j in keys])

    values = torch.zeros(mask.shape, dtype=torch.float64)
    for b, i in mask.nonzero().tolist():
        values[b, i] = math.fsum(
            kl(log_row(teacher, b, i, h), log_row(student, b, i, h)) for h in range(heads)
        ) / heads  # fmt: skip
    return values


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("values_only", [False, True])
def test_relation_equals_the_loops_and_padding_gets_exactly_zero(causal, values_only):
    student = (randn(3, 4, 6), randn(3, 4, 6, seed=1))
    teacher = (randn(3, 4, 10, seed=2), randn(3, 4, 10, seed=3))
    if values_only:
        student, teacher = (student[0],) * 2, (teacher[0],) * 2
    expected = relation_by_loops(student, teacher, SEQUENCES, 2, causal)
    spoilt = [x.masked_fill(~SEQUENCES[..., None], torch.nan).requires_grad_() for x in student]
    teacher = [x.masked_fill(~SEQUENCES[..., None], torch.inf).requires_grad_() for x in teacher]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = relation_kl(
            tuple(spoilt), tuple(teacher), mask=SEQUENCES, relation_heads=2, causal=causal
        )
    assert_close(found.detach(), expected)
    assert (found[~SEQUENCES] == 0).all()
    found.sum().backward()
    for leaf in spoilt:
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[~SEQUENCES] == 0).all()
        assert leaf.grad[0, 1].abs().max() > 0
    assert all(x.grad is None for x in teacher)


def test_relation_of_equals_is_zero_needs_whole_heads_and_passes_gradcheck():
    x = randn(3, 4, 6, dtype=torch.float64)
    other = (randn(3, 4, 6, seed=1, dtype=torch.float64),) * 2
    same = relation_kl((x, x), (x, x), mask=SEQUENCES, relation_heads=3)
    assert same.abs().max() < 1e-12
    with pytest.raises(ValueError, match="multiple of relation_heads"):
        relation_kl((x, x), (x, x), mask=SEQUENCES, relation_heads=4)
    assert torch.autograd.gradcheck(
        lambda s: relation_kl((s, s), other, mask=SEQUENCES, relation_heads=2, causal=True),
        (x.requires_grad_(),),
    )
