"""Two processes under torchrun's variables make the step that one makes; losses live under FSDP."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from limbeck.objective import Objective
from limbeck.progress import Silent
from limbeck.ranks import Ranks, joined
from limbeck.recipe_teaching import TrainingSpec
from limbeck.step import Training
from limbeck.train import LOG, train
from test_features import lesson, small
from test_heads import BOTH, CONFIGS, Rows, Teacher, causal
from two_ranks import in_two


def trained(out: Path, kind: str) -> None:
    """Trains in this process's rank and saves what it has then."""
    with joined() as ranks:
        if kind == "features":
            model, training = small(), lesson(epochs=2)
        else:
            model = causal(CONFIGS["llama, tied"])
            training = Training(
                rows=Rows(), teacher=Teacher(), objective=Objective(**BOTH), seed=0, title="t",
                spec=TrainingSpec(epochs=2, batch_size=7, learning_rate=1e-3, backend=kind),
            )  # fmt: skip
        (out / "log").mkdir(parents=True, exist_ok=True)
        train(model, training, out / "log", Silent())
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        save_file(weights, out / f"{ranks.rank}.safetensors")


def sharded(out: Path) -> None:
    """The gradient of a fused loss inside a model that FSDP2 shards, gathered."""
    from torch.distributed.fsdp import fully_shard

    from limbeck.losses.divergence import forward_kl
    from limbeck.losses.fused import Head, Term, against_logits, fused_loss

    class Lesson(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = causal(CONFIGS["llama"])

        def forward(self, inputs, logits):
            hidden = self.model.model(**inputs).last_hidden_state.flatten(0, 1)
            loss = against_logits(forward_kl, logits.flatten(0, 1), temperature=2.0)
            weight = torch.full((len(hidden),), 4 / len(hidden))
            head = Head(weight=self.model.lm_head.weight)
            return fused_loss(hidden, head, [Term(loss=loss, weight=weight)]).total

    with joined() as ranks:
        lesson_ = Lesson()
        if ranks.world > 1:
            from torch.distributed.device_mesh import init_device_mesh

            mesh = init_device_mesh("cpu", (ranks.world,))
            for layer in lesson_.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(lesson_, mesh=mesh)
        mine = ranks.share(8)
        batch = Rows().batch(mine)
        logits = Teacher().signal(batch, frozenset()).logits
        lesson_(batch.inputs, logits).backward()
        full = {
            n: p.grad.full_tensor() if ranks.world > 1 else p.grad
            for n, p in lesson_.named_parameters()
        }
        save_file({n: g.contiguous() for n, g in full.items()}, out / f"{ranks.rank}.safetensors")


@pytest.mark.parametrize("kind", ["features", "dense", "fused"])
def test_two_ranks_train_to_the_weights_of_one(tmp_path, kind):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    trained(tmp_path / "one", kind)
    in_two(f"import test_ranks as t; t.trained(Path(sys.argv[2]), {kind!r})", tmp_path / "two")
    one = load_file(tmp_path / "one/0.safetensors")
    first, second = (load_file(tmp_path / f"two/{rank}.safetensors") for rank in (0, 1))
    for name, weights in one.items():
        assert torch.equal(first[name], second[name]), "the ranks stay together"
        torch.testing.assert_close(first[name], weights, rtol=1e-4, atol=1e-5)
    lines = [(tmp_path / n / "log" / LOG).read_text().count("\n") for n in ("one", "two")]
    assert lines[0] == lines[1] > 0, "one rank writes the log"


def test_a_fused_loss_inside_a_sharded_model_has_the_gradient_of_the_whole_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    sharded(tmp_path / "one")
    in_two("import test_ranks as t; t.sharded(Path(sys.argv[2]))", tmp_path / "two")
    one = load_file(tmp_path / "one/0.safetensors")
    two = load_file(tmp_path / "two/0.safetensors")
    assert one.keys() == two.keys()
    for name, gradient in one.items():  # FSDP takes the mean of the ranks' means
        torch.testing.assert_close(two[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_ranks_share():
    parts = [[*Ranks(rank, 3).share(8)] for rank in range(3)]
    assert [at for part in parts for at in part] == [*range(8)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert Ranks().share(5) == range(5)
