"""Shares of a batch, worked on side by side: nothing is lost, and the sum is the same."""

import itertools
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_language
from limbeck import cores, step, train
from limbeck.objective import Objective
from limbeck.recipe import TrainingSpec
from limbeck.teachers.stored import NoTeacher
from limbeck.temperature import Fixed
from limbeck.types import Signal
from tiny_models import bert_config, random_model


@given(st.integers(1, 300))
def test_shares_are_the_batch_in_order_and_of_like_size(n):
    found = cores.shares(n)
    assert [i for share in found for i in share] == list(range(n))
    sizes = [len(share) for share in found]
    assert max(sizes) - min(sizes) <= 1
    assert len(found) <= max(1, cores.cores())


def test_results_come_in_order_and_an_error_is_raised_here():
    assert list(cores.on_each(lambda i: i * i, range(50))) == [i * i for i in range(50)]

    def fail(i: int) -> int:
        if i == 3:
            raise ValueError("three")
        return i

    with pytest.raises(ValueError, match="three"):
        list(cores.on_each(fail, range(50)))


@pytest.mark.skipif(cores.cores() < 2, reason="one core")
def test_work_is_done_side_by_side():
    both = threading.Barrier(2, timeout=30)
    assert sorted(cores.on_each(lambda _: both.wait(), range(2))) == [0, 1]


def test_a_row_of_many_tokens_is_enough_for_a_core(monkeypatch):
    monkeypatch.setattr(cores, "cores", lambda: 2)
    model = tiny_language.model()
    training = step.Training(
        rows=tiny_language.rows(), teacher=NoTeacher(), objective=Objective(), seed=0, title="x",
        spec=TrainingSpec(epochs=1, batch_size=4, learning_rate=1e-3),
    )  # fmt: skip
    parts = step.Step(model, training, [*model.parameters()]).batches(0)
    assert [len(part.example_ids) for part in parts] == [2, 2]


class Rows:
    """Twelve examples of unlike length; `batch` pads, as the task's does."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.tokens = [torch.randint(4, 90, (3 + i % 5,), generator=draw) for i in range(12)]

    num_views, num_together = 1, 32

    def __len__(self) -> int:
        return 12

    def batch(self, positions):
        from limbeck.types import Batch

        longest = max(len(self.tokens[i]) for i in positions)
        ids = torch.zeros((len(positions), longest), dtype=torch.long)
        for row, i in enumerate(positions):
            ids[row, : len(self.tokens[i])] = self.tokens[i]
        return Batch(
            inputs={"input_ids": ids, "attention_mask": (ids > 0).long()},
            labels=torch.tensor([i % 3 for i in positions]),
            mask=torch.ones(len(positions), dtype=torch.bool),
            example_ids=torch.tensor(list(positions)),
        )


class Teacher:
    """A fixed opinion on each example."""

    fingerprint, provides = "fixed", frozenset()

    def signal(self, batch, needs):
        return Signal(logits=torch.sin(batch.example_ids[:, None] * torch.arange(1.0, 6.0)))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_step_does_not_depend_on_the_number_of_shares(tmp_path, monkeypatch, count):
    from limbeck.progress import Silent

    def cut(n: int, *_, **__) -> list[range]:
        ends = [n * i // count for i in range(count + 1)]
        return [range(a, b) for a, b in itertools.pairwise(ends)]

    def trained(shares) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(step, "shares", shares)
        model = random_model(bert_config())
        training = step.Training(
            rows=Rows(), teacher=Teacher(), seed=0, title="t",
            objective=Objective(temperature=Fixed(2), soft_weight=1, hard_weight=0.5),
            spec=TrainingSpec(epochs=1, batch_size=12, learning_rate=0.5, warmup_fraction=0),
        )  # fmt: skip
        seen: dict[str, torch.Tensor] = {}
        original = train.clip

        def record(pieces, most):
            seen.update({piece.name: piece.values.clone() for piece in pieces})
            return original(pieces, most)

        monkeypatch.setattr(train, "clip", record)
        train.train(model, training, tmp_path, Silent())
        monkeypatch.setattr(train, "clip", original)
        return seen

    whole, parts = trained(lambda n, *_, **__: [range(n)]), trained(cut)
    assert whole.keys() == parts.keys()
    far = max((whole[k] - parts[k]).abs().max() for k in whole)
    assert far < 1e-6 * max(g.abs().max() for g in whole.values()) + 1e-7
    assert max(g.abs().max() for g in whole.values()) > 1e-3


def test_each_cores_thread_computes_alone_even_if_torch_was_told_otherwise_before():
    code = (
        "import torch; torch.set_num_threads(2); torch.ones(9) @ torch.ones(9)\n"
        "from limbeck.cores import on_each\n"
        "print({*on_each(lambda _: torch.get_num_threads(), range(8))})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{1}\n"


def test_a_forked_process_has_threads_of_its_own():
    code = (
        "import os, signal, time\n"
        "from limbeck.cores import on_each\n"
        "[*on_each(lambda _: time.sleep(0.05), range(8))]\n"  # every thread has begun, and waits
        "if not os.fork():\n"
        "    signal.alarm(5)\n"  # what waits for a thread that is not there waits for ever
        "    assert [*on_each(abs, [-3])] == [3]\n"
        "    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "7\n"


def test_a_gradient_is_kept_as_it_is_unless_another_parameter_has_it_too():
    parameters = [torch.zeros(3), torch.zeros(3), torch.zeros(2, 3)]
    shared, wide = torch.ones(3), torch.ones(3).expand(2, 3)
    found = step._Sum(parameters)
    found.add([shared, shared, wide], adopt=True)
    assert found.found[0] is shared
    found.add([torch.full((3,), 2.0), None, torch.ones(2, 3)], adopt=True)
    assert [g.sum().item() for g in found.found] == [9, 3, 12]
    kept = torch.ones(3)
    other = step._Sum(parameters)
    other.add([kept, None, None])
    other.add([kept, None, None])
    assert kept.sum() == 3
