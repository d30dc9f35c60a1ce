"""What runs on a CPU runs on a GPU, to the same weights: `pytest -m gpu` on a machine with CUDA."""

import pytest
import torch
import yaml

import limbeck
import test_family
import test_on_policy
import test_quantization
import tiny_language
from limbeck import device
from limbeck.losses.divergence import forward_kl
from limbeck.losses.fused import Head, Term, against_logits, fused_loss
from limbeck.objective import Objective
from limbeck.precision import milliseconds
from limbeck.progress import Silent
from limbeck.recipe import TrainingSpec
from limbeck.signals.capture import capture
from limbeck.signals.codecs import Dense, Sampled, TopK
from limbeck.signals.store import open_store
from limbeck.step import Training
from limbeck.teachers.live import LiveTeacher
from limbeck.teachers.stored import NoTeacher, StoredTeacher
from limbeck.train import train
from tiny_images import make_image_world
from tiny_world import Killed, KillsAt, quickly

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
]
CODECS = {"dense": Dense("fp32"), "sampled": Sampled(12), "topk": TopK(8)}


@pytest.fixture
def on_cpu(monkeypatch):
    """What is done inside runs as if there were no GPU."""

    def as_if(function):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            assert device.compute_device().type == "cpu"
            return function()

    return as_if


def student():
    return tiny_language.model(3, hidden_size=32, num_key_value_heads=4)


def stored(folder, codec):
    capture(
        LiveTeacher(tiny_language.model(1), "x"), tiny_language.rows(24), {folder: CODECS[codec]},
        made_from={}, progress=Silent(),
    )  # fmt: skip
    return StoredTeacher(store=open_store(folder), fingerprint="", temperature=1.0)


def taught(teacher, **changes):
    spec = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, **changes}
    return Training(
        rows=tiny_language.rows(24), teacher=teacher, spec=TrainingSpec(**spec), seed=0, title="x",
        objective=Objective(soft_weight=0.5 if teacher.provides else 0.0, hard_weight=0.5),
    )  # fmt: skip


def trained(model, training, folder):
    folder.mkdir(parents=True, exist_ok=True)
    train(model, training, folder, Silent())
    return {name: value.clone() for name, value in model.state_dict().items()}


def alike(ours, theirs, tolerance=2e-4):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.device.type == "cpu", "a trained model is where it was"
        assert torch.allclose(value, theirs[name], atol=tolerance, rtol=1e-3), name


@pytest.mark.parametrize("codec", CODECS)
def test_signals_that_were_stored_are_the_cpus(codec, tmp_path, on_cpu):
    here, there = tmp_path / "gpu", tmp_path / "cpu"
    mine = stored(here, codec)
    theirs = on_cpu(lambda: stored(there, codec))
    ids = torch.arange(24)
    ours, other = (s.store.targets(ids, 1.0) for s in (mine, theirs))
    if codec == "dense":
        assert torch.allclose(ours.logits, other.logits, atol=1e-4)
    else:  # a draw near an edge may fall on its other side
        assert (ours.ids == other.ids).float().mean() > 0.98


@pytest.mark.parametrize("backend", ["dense", "fused"])
@pytest.mark.parametrize("codec", [*CODECS, "live", "none"])
def test_a_training_ends_with_the_cpus_weights(codec, backend, tmp_path, on_cpu):
    if codec == "live":
        made = lambda: LiveTeacher(tiny_language.model(1), "x")  # noqa: E731
    elif codec == "none":
        made = NoTeacher
    else:
        on_cpu(lambda: stored(tmp_path / "store", codec))
        made = lambda: StoredTeacher(  # noqa: E731
            store=open_store(tmp_path / "store"), fingerprint="", temperature=1.0
        )
    run = lambda at: trained(student(), taught(made(), backend=backend), at)  # noqa: E731
    alike(run(tmp_path / "gpu"), on_cpu(lambda: run(tmp_path / "cpu")))


def test_in_micro_batches_and_in_bf16_it_is_near(tmp_path):
    whole = trained(student(), taught(NoTeacher()), tmp_path / "whole")
    parts = trained(student(), taught(NoTeacher(), micro_batch=3), tmp_path / "parts")
    alike(parts, whole)
    lower = trained(student(), taught(NoTeacher(), precision="bf16"), tmp_path / "bf16")
    moved = {n: v - student().state_dict()[n] for n, v in whole.items()}
    off = sum(float((lower[n] - whole[n]).norm()) for n in whole)
    assert 0 < off < 0.5 * sum(float(m.norm()) for m in moved.values())
    assert torch.get_float32_matmul_precision() == "highest", "as it was found"


def test_a_family_stays_one_set_of_weights():
    family = test_family.family(test_family.random_model(test_family.bert_config()))
    before = {name: weight.clone() for name, weight in family.weights.items()}
    for where in (device.compute_device(), torch.device("cpu")):
        family.to(where)
        for size in family.sizes.values():
            for name, parameter in size.model.named_parameters():
                place = size.places[name]
                shared = family.weights[place.shared]
                assert parameter.device == shared.device == where
                if place.is_view:
                    same = parameter.untyped_storage().data_ptr()
                    assert same == shared.untyped_storage().data_ptr(), "a view of it"
    alike(family.weights, before, tolerance=0)


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("limbeck.train._SAVE_EVERY", 0.0)
    whole = trained(student(), taught(NoTeacher()), tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    with pytest.raises(Killed):
        train(student(), taught(NoTeacher()), tmp_path / "killed", KillsAt(3))
    resumed = trained(student(), taught(NoTeacher()), tmp_path / "killed")
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_own_texts_and_rounded_weights(tmp_path, on_cpu):
    def own(folder):
        folder.mkdir()
        model = test_on_policy.student()
        train(model, test_on_policy.lesson(sampling_temperature=0.0), folder, Silent())
        return model.state_dict()

    alike(own(tmp_path / "a"), on_cpu(lambda: own(tmp_path / "b")), tolerance=1e-3)

    def rounded(folder):
        return trained(tiny_language.model(), test_quantization.lesson(), folder)

    alike(rounded(tmp_path / "c"), on_cpu(lambda: rounded(tmp_path / "d")), tolerance=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_fused_gradient_is_that_of_fp64(precision):
    """In bf16 products are TF32's, which rounds less than bf16 would."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64, device="cuda"), torch.randn(5000, 64, device="cuda") / 8
    teacher = 3 * torch.randn(300, 5000, device="cuda")
    found = {}
    for kind in (torch.float32, torch.float64):
        h, w = (t.to(kind).clone().requires_grad_() for t in (hidden, weight))
        with device.products_in(precision if kind == torch.float32 else "fp32"):
            loss = against_logits(forward_kl, teacher.to(kind))
            term = Term(loss=loss, weight=torch.full((300,), 1 / 300, device="cuda"))
            fused_loss(h, Head(weight=w), [term]).total.backward()
        found[kind] = torch.cat([h.grad.flatten(), w.grad.flatten()]).double()
    exact = found[torch.float64]
    off = float((found[torch.float32] - exact).norm() / exact.norm())
    assert off < (1e-5 if precision == "fp32" else 2e-3), off


def test_bf16_is_found_to_be_faster():
    took = milliseconds()
    assert took["bf16"] > 0 and took["fp32"] > 0


def test_a_language_model_goes_all_the_way(tmp_path):
    folder = tiny_language.make_language_world(tmp_path, evidence={"baselines": "all"})
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["distill"]["training"]["precision"] = "auto"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with quickly():
        report = limbeck.distill(folder / "recipe.yaml", folder / "out")
    (student,) = report.students
    assert report.teacher.main.quality.value > 0.8
    assert student.main.quality.value > 0.6 and student.fidelity.agreement > 0.6


@pytest.mark.parametrize("run", ["dedicated", "elastic"])
def test_images_go_all_the_way(run, tmp_path):
    folder = make_image_world(tmp_path, evidence={"baselines": "none"})
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["distill"]["run"] = run
    recipe["students"] = [
        {"name": "large", "budget": {"params": 7000}}, {"name": "small", "budget": {"params": 2000}}
    ]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with quickly():
        report = limbeck.distill(folder / "recipe.yaml", folder / "out")
    assert {s.name: s.main.quality.value for s in report.students}["large"] > 0.8
