"""An elastic run: one training for all students, and more of them cut without any."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

import limbeck
from limbeck import scaling, teaching
from limbeck.cli import main
from limbeck.errors import RecipeError, RunFolderError
from limbeck.progress import Silent
from limbeck.recipe_file import load_recipe, validate
from limbeck.run import write_json
from limbeck.stages import places_of
from tiny_world import make_known_world, quickly

IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 40, 41, 42, 3]])
MODELS = [
    {"name": "small", "budget": {"params": 7000}, "epochs": 2, "learning_rate": 6e-3},
    {"name": "large", "budget": {"params": 14000}, "epochs": 1},
]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = make_known_world(tmp_path_factory.mktemp("world"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["students"] = MODELS
    recipe["distill"]["run"] = "elastic"
    recipe["evidence"]["dedicated"] = ["small"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def run(world) -> Path:
    out = world / "run"
    with quickly():
        limbeck.distill(world / "recipe.yaml", out)
    return out


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=IDS).logits


def student(run: Path, name: str) -> torch.Tensor:
    folder = run / "students" / name / "hf"
    return logits(AutoModelForSequenceClassification.from_pretrained(folder))


def test_one_training_makes_all_students(run):
    report = limbeck.load_report(run)
    assert {"family", "small/dedicated"} <= report.training.keys()
    assert "large" in report.training and "small" not in report.training
    family = limbeck.load_family(run)
    assert [*family.sizes] == ["large", "small"]  # the largest first, whatever the recipe's order
    for name in family.sizes:
        torch.testing.assert_close(logits(family.family.extract(name)), student(run, name))
    large, small = (family.family.sizes[name].model for name in ("large", "small"))
    wide, narrow = large.classifier.weight, small.classifier.weight
    assert narrow.shape[1] < wide.shape[1]
    assert torch.equal(wide[:, : narrow.shape[1]], narrow)  # one set of weights
    log = (run / "family/training.jsonl").read_text().splitlines()
    turns = [json.loads(line)["sizes"] for line in log]
    assert {name for turn in turns for name in turn} == {"small"}  # the large one has had its own
    named = ("large", "family", "small/dedicated")
    steps = {name: report.training[name][-1].step for name in named}
    assert steps["family"] == steps["small/dedicated"] == 2 * steps["large"]  # epochs 2 and 1
    told = [point for point in report.training["family"] if point.validation is not None]
    assert told and all(set(point.validations or {}) <= {"small"} for point in told)
    assert next(s for s in report.students if s.name == "small").baselines.dedicated is not None


def test_the_largest_is_what_it_would_be_alone_and_lends_its_weights(run, tmp_path):
    recipe, _ = load_recipe(run)
    places, shapes = places_of(run), scaling.read_shapes(run / "family")
    large = recipe.student("large")
    (tmp_path / "alone").mkdir()
    teaching.distil(tmp_path / "alone", recipe, large, shapes["large"], places, Silent())
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "alone")
    torch.testing.assert_close(student(run, "large"), logits(alone))
    family = limbeck.load_family(run).family
    taught_on = logits(family.sizes["large"].model)
    assert not torch.equal(taught_on, logits(alone))


def test_killed_between_its_two_trainings_it_ends_with_the_same_bytes(run, tmp_path, monkeypatch):
    recipe, _ = load_recipe(run)
    shapes = scaling.read_shapes(run / "family")
    teach = scaling.train
    trained = []

    def cut(family, training, folder, progress, sampling=None):
        trained.append(training.title)
        if training.title == "family" and trained.count("family") == 1:
            raise KeyboardInterrupt
        teach(family, training, folder, progress, sampling)

    monkeypatch.setattr(scaling, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        scaling.teach(tmp_path, recipe, shapes, places_of(run), Silent())
    scaling.teach(tmp_path, recipe, shapes, places_of(run), Silent())
    assert trained == ["large", "family", "family"]
    for name in ("family.safetensors", "largest/family.safetensors"):
        assert (tmp_path / name).read_bytes() == (run / "family" / name).read_bytes()


def test_a_second_run_makes_nothing_again(world, run):
    with quickly():
        report = limbeck.distill(world / "recipe.yaml", run)
    assert all(stage.reused for stage in report.stages)


def test_the_frontier_has_the_trained_sizes_and_shapes_between(run):
    frontier = limbeck.load_report(run).frontier
    trained = {p.name for p in frontier if p.trained}
    between = [p for p in frontier if not p.trained]
    assert trained == {"large", "small"} and between
    large, small = (next(p for p in frontier if p.name == n) for n in ("large", "small"))
    for point in between:
        assert point.shape.sizes["hidden"] in {s.shape.sizes["hidden"] for s in (large, small)}
        assert small.params < point.params < large.params
    assert "limbeck scale" in (run / "report.html").read_text()


def test_scale_adds_a_student_without_training(world, run, capsys):
    family = limbeck.load_family(run)
    budget = sorted(p.params for p in limbeck.load_report(run).frontier)[-2]
    arguments = ["scale", str(run), "--name", "middle", "--params", str(budget)]
    with quickly():
        assert main(arguments) == 0
    report = limbeck.load_report(run)
    middle = next(s for s in report.students if s.name == "middle")
    assert not middle.trained and middle.params <= budget and middle.budget.met
    assert middle.fidelity is not None and middle.main.quality is not None
    anew = {stage.name for stage in report.stages if not stage.reused}
    assert {name for name in anew if not name.startswith("students/middle/")} == set()
    assert not {name for name in report.training if name.startswith("middle")}
    torch.testing.assert_close(logits(family.cut(params=budget)), student(run, "middle"))
    within = [p for p in report.frontier if p.params <= budget]
    best = min(within, key=lambda p: p.loss)
    assert middle.params == best.params and len({p.loss for p in within}) > 1
    assert [p.name for p in report.frontier].count("middle") <= 1
    with quickly():
        assert main(arguments) == 2
    assert "two models are called 'middle'" in capsys.readouterr().err


def test_what_cannot_be_cut_is_refused(world, run, tmp_path):
    with pytest.raises(RecipeError, match="or more"), quickly():
        limbeck.scale(run, name="mini", budget={"params": 10})
    assert "mini" not in (run / "recipe.yaml").read_text()
    assert "mini" not in {s.name for s in limbeck.load_report(run).students}
    with pytest.raises(RecipeError, match="empty budget"), quickly():
        limbeck.scale(run, name="mini", budget={})
    with pytest.raises(RunFolderError, match="no elastic run"):
        limbeck.load_family(tmp_path)
    family = limbeck.load_family(run)
    large = family.sizes["large"]
    with pytest.raises(limbeck.LimbeckError, match="never trained"):
        family.family.cut(type(large)(large.sizes, (0, 1, 2)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"distill": {"run": "dedicated"}}, "no elastic run to cut it from"),
        ({"students": {"trained": False}}, "no student is trained"),
        ({"distill": {"hidden": {"loss": "mse"}}}, "runs of their own"),
        ({"distill": {"temperature": "auto"}}, "runs of their own"),
        ({"more": {"epochs": 2}}, "no effect on cut"),
        ({"evidence": {"dedicated": ["cut"]}}, "names 'cut'"),
    ],
)
def test_settings_that_contradict_each_other(world, change, said):
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    for student in recipe["students"]:
        student |= change.get("students", {})
    recipe["distill"] |= change.get("distill", {})
    recipe["evidence"] = change.get("evidence", {})
    cut = {"name": "cut", "budget": {"params": 9000}, "trained": False, **change.get("more", {})}
    recipe["students"].append(cut)
    with pytest.raises(RecipeError, match=said):
        validate(recipe)


def test_each_size_has_its_turns_and_its_rate(run, tmp_path, monkeypatch):
    seen = {}

    def look(family, training, folder, progress, sampling=None):
        if sampling is None:
            seen.update(alone=[*family.sizes], its_epochs=training.spec.epochs)
        else:
            seen.update(shares=sampling.shares, rates=sampling.rates, epochs=training.spec.epochs)

    monkeypatch.setattr(scaling, "train", look)
    recipe, _ = load_recipe(run)
    shapes = scaling.read_shapes(run / "family")
    scaling.teach(tmp_path, recipe, shapes, places_of(run), Silent())
    assert seen["alone"] == ["large"] and seen["its_epochs"] == 1
    assert seen["shares"] == {"large": 0, "small": 2} and seen["epochs"] == 2
    assert seen["rates"] == {"large": 1.0, "small": 2.0}  # 6e-3 of 3e-3, as its recipe says
    free = [s.model_copy(update={"learning_rate": None}) for s in recipe.students]
    again, other = tmp_path / "free", recipe.model_copy(update={"students": tuple(free)})
    scaling.teach(again, other, shapes, places_of(run), Silent())
    assert seen["rates"]["large"] == 1.0 < seen["rates"]["small"] != 2.0


def test_the_rival_with_the_least_loss_is_taken(run, tmp_path):
    recipe, _ = load_recipe(run)
    small = recipe.student("small")
    plans = [{"shape": {"layers": [0] * n}, "reason": "By the rule."} for n in (3, 2, 1)]
    write_json(tmp_path / "rivals.json", plans)
    losses = {"small.0": 0.5, "small.1": 0.4, "small.2": 0.6, "large.0": 0.1}
    rivals = {name: {"loss": loss, "accuracy": 0.5} for name, loss in losses.items()}
    write_json(tmp_path / "trial.json", {"n": 9, "share": 0.1, "rivals": rivals})
    scaling.decide(tmp_path, small, tmp_path, tmp_path)
    chosen = json.loads((tmp_path / "plan.json").read_text())
    assert chosen["shape"] == plans[1]["shape"]
    assert "0.500 with 3 layers, 0.400 with 2 layers, 0.600 with 1 layers" in chosen["reason"]


def test_rivals_of_one_budget_are_tried_before_one_is_taken(world, tmp_path):
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    recipe["distill"]["rivals"] = 2
    recipe["evidence"]["dedicated"] = []
    (world / "rivals.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    with quickly():
        report = limbeck.distill(world / "rivals.yaml", out)
    trial = json.loads((out / "trial/trial.json").read_text())
    assert trial["rivals"].keys() == {"small.0", "small.1", "large.0", "large.1"}
    for student in report.students:
        rivals = json.loads((out / "students" / student.name / "rivals/rivals.json").read_text())
        depths = [len(plan["shape"]["layers"]) for plan in rivals]
        assert len({*depths}) == 2
        losses = [trial["rivals"][f"{student.name}.{at}"]["loss"] for at in range(2)]
        assert len(student.shape.layers) == depths[losses.index(min(losses))]
        assert "Of 2 rivals it had the least loss" in student.reason and student.budget.met
    with quickly():
        assert all(stage.reused for stage in limbeck.distill(world / "rivals.yaml", out).stages)
