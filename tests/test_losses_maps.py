"""Feature maps: loops as reference, other sizes, invariances, and a teacher left alone."""

import math

import pytest
import torch

from limbeck.losses.maps import attention_transfer, channel_kl
from losses_oracle import assert_close, kl, log_probs, ours, randn

B, C = 3, 4
LOSSES = [attention_transfer, channel_kl]
each_loss = pytest.mark.parametrize("function", LOSSES)
SIZES = [((5, 6), (5, 6)), ((5, 6), (3, 2)), ((4, 3), (8, 6)), ((6, 2), (4, 5))]


def maps(channels=C, size=(5, 6), seed=0, dtype=torch.float32):
    return randn(B, channels, *size, seed=seed, scale=2, dtype=dtype)


def pooled(table, size):
    """Rows of floats averaged as torch documents: from floor(i h / H) to ceil((i + 1) h / H)."""
    high, wide = len(table), len(table[0])

    def window(i, old, new):
        return range(i * old // new, -((-(i + 1) * old) // new))

    def cell(i, j):
        rows, columns = window(i, high, size[0]), window(j, wide, size[1])
        values = [table[r][c] for r in rows for c in columns]
        return math.fsum(values) / len(values)

    return [[cell(i, j) for j in range(size[1])] for i in range(size[0])]


def flat(table):
    return [x for row in table for x in row]


def smaller(a, b):
    return tuple(min(x, y) for x, y in zip(a.shape[2:], b.shape[2:], strict=True))


def attention_by_loops(student, teacher):
    size = smaller(student, teacher)
    values = []
    for pair in zip(student.tolist(), teacher.tolist(), strict=True):
        vectors = []
        for channels in pair:
            rows, columns = range(len(channels[0])), range(len(channels[0][0]))
            table = [[math.fsum(c[i][j] ** 2 for c in channels) for j in columns] for i in rows]
            vector = flat(pooled(table, size))
            length = math.sqrt(math.fsum(x * x for x in vector))
            vectors.append([x / length for x in vector])
        values.append(math.dist(*vectors))
    return torch.tensor(values, dtype=torch.float64)


def channel_by_loops(student, teacher, temperature=1.0):
    size = smaller(student, teacher)
    log_q, log_p = (
        [[log_probs(flat(pooled(c, size)), temperature) for c in example] for example in x.tolist()]
        for x in (student, teacher)
    )
    values = [[kl(p, q) for p, q in zip(*pair, strict=True)]
              for pair in zip(log_p, log_q, strict=True)]  # fmt: skip
    return torch.tensor(values, dtype=torch.float64)


def gradient_by_differences(oracle, student, teacher, step=1e-5):
    student, gradient = student.double(), torch.zeros_like(student, dtype=torch.float64)
    for at in range(0, student.numel(), 7):  # a seventh of the elements
        ends = []
        for h in (step, -step):
            moved = student.clone()
            moved.view(-1)[at] += h
            ends.append(oracle(moved, teacher).sum().item())
        gradient.view(-1)[at] = (ends[0] - ends[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize(("size", "teacher_size"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_transfer_equals_the_loops_with_other_channels(size, teacher_size, dtype):
    student, teacher = maps(size=size, dtype=dtype), maps(7, teacher_size, 1, dtype)
    values, gradient = ours(attention_transfer, student, teacher)
    assert_close(values, attention_by_loops(student, teacher))
    expected = gradient_by_differences(attention_by_loops, student, teacher).view(-1)[::7]
    assert_close(gradient.view(-1)[::7], expected, 2e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize(("size", "teacher_size"), SIZES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_channel_kl_equals_the_loops(size, teacher_size, temperature):
    student, teacher = maps(size=size), maps(size=teacher_size, seed=1)

    def oracle(s, t):
        return channel_by_loops(s, t, temperature)

    values, gradient = ours(channel_kl, student, teacher, temperature=temperature)
    assert_close(values, oracle(student, teacher))
    expected = gradient_by_differences(oracle, student, teacher).view(-1)[::7]
    assert_close(gradient.view(-1)[::7], expected, 1e-4)


@each_loss
def test_gradcheck(function):
    student, teacher = maps(dtype=torch.float64), maps(size=(3, 4), seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: function(s, teacher), (student.requires_grad_(),))


@each_loss
def test_equals_give_zero_and_a_teacher_gets_no_gradient(function):
    student, teacher = maps().requires_grad_(), maps().requires_grad_()
    values = function(student, teacher)
    values.sum().backward()
    assert values.abs().max() < 1e-6
    assert student.grad.abs().max() < 1e-6
    assert teacher.grad is None


@each_loss
def test_an_example_does_not_depend_on_its_batch_nor_on_where_locations_stand(function):
    student, teacher = maps(), maps(seed=1)
    values = function(student, teacher)
    torch.testing.assert_close(function(student[1:2], teacher[1:2]), values[1:2])
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    moved = (x.flatten(2)[..., order].view_as(x) for x in (student, teacher))
    torch.testing.assert_close(function(*moved), values)


def test_attention_transfer_is_bounded_and_blind_to_scale_sign_and_the_order_of_channels():
    student, teacher = maps(), maps(7, seed=1)
    values = attention_transfer(student, teacher)
    for other in (student * 1e3, student * 1e30, student * 1e-30, -student, student.flip(1)):
        torch.testing.assert_close(attention_transfer(other, teacher), values)
    apart = torch.zeros(2, B, 1, 5, 6)
    apart[0, ..., 0, 0], apart[1, ..., 4, 5] = 1, 1  # no location in common: the farthest
    torch.testing.assert_close(attention_transfer(*apart), torch.full((B,), math.sqrt(2)))


def test_channel_kl_is_blind_to_a_constant_and_sees_a_swap_of_channels():
    student, teacher = maps(), maps(seed=1)
    values = channel_kl(student, teacher)
    assert values.shape == (B, C)
    assert values.min() >= 0
    torch.testing.assert_close(
        channel_kl(student + 50, teacher - 50), values, atol=1e-5, rtol=1e-4
    )
    assert (channel_kl(student.flip(1), teacher) - values).abs().max() > 0.1


@each_loss
@pytest.mark.parametrize("size", [(1, 1), (5, 6)])
@pytest.mark.parametrize("fill", [0.0, 3.0, 3e4])
def test_maps_without_shape_stay_finite(function, size, fill):
    flat_map = torch.full((B, C, *size), fill)
    for pair in ((flat_map, flat_map), (flat_map, maps(size=size)), (maps(size=size), flat_map)):
        values, gradient = ours(function, *pair)
        assert values.isfinite().all()
        assert gradient.isfinite().all()


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="project the student to the teacher's channels"):
        channel_kl(maps(), maps(7))
    for function in LOSSES:
        with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
            function(maps().flatten(2), maps().flatten(2))
    with pytest.raises(ValueError, match="the same B"):
        attention_transfer(maps(), maps()[:1])
