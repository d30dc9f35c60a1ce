"""Steps on the student's own texts: which, of what, scored by whom; and a kill costs nothing."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

import limbeck
import tiny_language
from limbeck.errors import RecipeError
from limbeck.generating import Sampling, generate
from limbeck.objective import Objective
from limbeck.on_policy import OnPolicy, Writer
from limbeck.progress import Silent
from limbeck.recipe_file import load_recipe
from limbeck.recipe_teaching import OnPolicySpec, TrainingSpec
from limbeck.step import Step, Training
from limbeck.teachers.live import LiveTeacher
from limbeck.teachers.stored import NoTeacher
from limbeck.temperature import Fixed
from tiny_world import quickly, trained

END = 2
PROMPTS = [np.array(ids) for ids in ([5, 9], [7, 30, 41, 12], [300], [8, 8, 9], [17, 4, 90, 33, 6])]


def how(**settings) -> OnPolicy:
    spec = {"share": 0.5, "max_new_tokens": 6, "batches": 2, "reuse": 2, **settings}
    return OnPolicy(
        spec=OnPolicySpec(**spec), teacher=LiveTeacher(tiny_language.model(1), "x"),
        objective=Objective(soft_weight=0.7, hard_weight=0.0, temperature=Fixed(2.0)),
        prompts=PROMPTS, pad_id=0, end_id=END,
    )  # fmt: skip


def lesson(epochs: float = 6, validate=None, **settings) -> Training:
    return Training(
        rows=tiny_language.rows(), teacher=NoTeacher(), objective=Objective(hard_weight=1.0),
        spec=TrainingSpec(epochs=epochs, batch_size=4, learning_rate=1e-3), seed=3, title="own",
        on_policy=how(**settings), validate=validate,
    )  # fmt: skip


def student(seed: int = 0):
    return tiny_language.model(seed, hidden_size=32, num_key_value_heads=4)


def writer(model=None, **settings) -> Writer:
    return Writer(how(**settings), model or student(), batch_size=4, seed=3)


def test_prompts_are_what_stands_before_an_answer():
    def cut(tokens: str, counted: str, starts=(0,), plain=False):
        row = replace(
            tiny_language.rows(1), tokens=(np.array([*map(int, tokens)]),),
            counted=(np.array([c == "1" for c in counted]),), starts=(np.array(starts),),
        )  # fmt: skip
        return ["".join(map(str, p)) for p in row.prompts(3, plain=plain)]

    assert cut("123456", "000111") == ["123"]
    assert cut("123456789", "001100110") == ["12", "123456"], "of each answer of a conversation"
    assert cut("123456789", "001110011", (0, 5)) == ["12", "67"], "documents do not see each other"
    assert cut("123456789", "111111111", (0, 7)) == ["123", "8"], "the document goes on behind it"
    assert cut("12345", "01111", plain=True) == ["123"], "its beginning is no answer's prompt"
    assert cut("1", "1", plain=True) == cut("12", "00") == []


def test_such_steps_have_their_share_and_rows_wait_for_the_others():
    training = lesson(epochs=100, share=0.3, after=0.4)
    own = training.own_steps
    assert not own[:120].any() and abs(own[120:].mean() - 0.3) < 0.02 and len(own) == 300
    assert all(0 < own[at : at + 20].sum() < 10 for at in range(120, 280, 20)), "all the time"
    assert (own == lesson(epochs=100, share=0.3, after=0.4).own_steps).all()
    assert own[: own.argmax()].sum() == 0
    plain = replace(training, on_policy=None)
    taken = [training.positions(step) for step in np.flatnonzero(~own)]
    assert taken == [plain.positions(step) for step in range(len(taken))], "none is left out"
    assert lesson(share=1.0).own_steps.all() and not plain.own_steps.any()


def test_a_text_counts_behind_its_prompt_and_up_to_its_end():
    model = student()
    free = generate(model, PROMPTS, Sampling(max_new_tokens=6, seed=3), ends=())
    end = int(free.tokens[1][2])  # the second text's third token is now where it stops
    own = Writer(replace(how(), end_id=end), model, batch_size=4, seed=3)
    own.next(99)
    batch, numbers = own.batch([*range(8)]), range(8)
    prompts = [own._prompt(i) for i in numbers]
    assert sorted(map(len, prompts[:5])) == sorted(map(len, PROMPTS)), "each once, then again"
    expected = generate(
        model, prompts, Sampling(max_new_tokens=6, seed=3), ends=(end, 2), numbers=numbers
    ).tokens
    assert {len(text) for text in expected} > {6}, "some end early"
    for row, (prompt, text) in enumerate(zip(prompts, expected, strict=True)):
        assert batch.labels[row][batch.mask[row]].tolist() == text.tolist()
        at = batch.mask[row].nonzero()[:, 0].tolist()
        assert at == [*range(len(prompt) - 1, len(prompt) + len(text) - 1)]
        assert end not in text[:-1]
        held = batch.inputs["attention_mask"][row].bool()
        assert batch.inputs["input_ids"][row][held].tolist() == [*prompt, *text]
    assert own.ended == sum(text[-1] in (end, 2) for text in expected) > 0


def test_texts_are_learnt_from_so_often_and_then_written_anew():
    own, seen = writer(), []
    for left in range(10, 0, -1):  # 4 steps of 2 batches, 4 more, then two of one
        before = own.written
        places = own.next(left)
        first = own.written - len(own.held)
        seen.append([first + place for place in places])
        assert (own.written > before) == (left in (10, 6, 2))
    assert own.written == 8 + 8 + 8, "what two steps are left for is two batches"
    counts = np.bincount(np.concatenate(seen), minlength=24)
    assert counts.tolist() == [2] * 16 + [1] * 8
    assert {*seen[0], *seen[1]} == {*seen[2], *seen[3]} == {*range(8)}
    assert {*seen[0]} not in ({*seen[2]}, {*seen[3]}), "shuffled"
    last = writer(reuse=9)
    last.next(1)
    assert last.written == 4, "no more than there are steps for"


def test_a_step_is_the_mean_divergence_over_what_was_written():
    training, model = lesson(share=1.0), student()
    parameters = [*model.parameters()]
    found = Step(model, training, parameters)(0, look=True)
    own = writer(model)
    batch = own.batch(own.next(99))
    total, n = 0, 0
    for row in range(4):
        at = batch.mask[row].nonzero()[:, 0]
        held = batch.inputs["attention_mask"][row].bool()
        ids = batch.inputs["input_ids"][row][held][None]
        q = F.log_softmax(model(ids).logits[0, at] / 2, -1)
        p = F.log_softmax(training.on_policy.teacher.model(ids).logits[0, at] / 2, -1)
        total, n = total + 0.7 * 4 * F.kl_div(q, p, log_target=True, reduction="sum"), n + len(at)
    assert [*found.terms] == ["on_policy"] and not found.norms
    assert float(found.terms["on_policy"]) == pytest.approx((total / n).item(), rel=1e-5)
    for ours, theirs in zip(
        found.gradient, torch.autograd.grad(total / n, parameters), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_who_is_like_its_teacher_has_nothing_to_learn():
    training = lesson(share=1.0)
    twin = tiny_language.model(1)
    found = Step(twin, training, [*twin.parameters()])(0, look=False)
    assert abs(float(found.terms["on_policy"])) < 1e-6
    assert max(float(g.abs().max()) for g in found.gradient) < 1e-5


@pytest.mark.parametrize("kills", [(4,), (7, 3)])
def test_a_killed_training_ends_with_the_same_weights(tmp_path, kills):
    whole = trained(tmp_path / "a", student, lesson)
    killed = trained(tmp_path / "b", student, lesson, *kills)
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())
    log = (tmp_path / "b/training.jsonl").read_text()
    points = [json.loads(line) for line in log.splitlines()]
    own = lesson().own_steps
    for point in points:
        assert [*point["terms"]] == ["on_policy" if own[point["step"] - 1] else "hard"]
        assert ("loss" in point) == ("hard" in point["terms"]) and 0 <= point["writing"] <= 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Prompts with completions, and an elastic family that writes its own."""
    folder = tiny_language.make_language_world(tmp_path_factory.mktemp("own"))
    asked = [{"ask": text[:12], "say": text[12:]} for text in tiny_language.texts()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["data"] |= {"prompt": "ask", "completion": "say"}
    recipe["distill"]["on_policy"] = {"share": 0.5, "after": 0.2, "max_new_tokens": 24}
    recipe["export"] = {"formats": ["hf"], "primary": "hf"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.mark.parametrize("run", ["dedicated", "elastic"])
def test_a_run_learns_from_its_own_texts_and_says_so(world, run):
    recipe = yaml.safe_load((world / "recipe.yaml").read_text())
    recipe["distill"]["run"] = run
    if run == "elastic":
        small = {"name": "small", "budget": {"params": 40000}}
        recipe["students"] = [*recipe["students"], small]
    (world / f"{run}.yaml").write_text(yaml.safe_dump(recipe))
    said = []

    class Heard(Silent):
        def say(self, line):
            said.append(line)

    with quickly():  # the second finds the teacher and its signals made
        report = limbeck.distill(world / f"{run}.yaml", world / "out", progress=Heard())
    assert report.students[0].main.quality.value > 0.5
    name = "family" if run == "elastic" else "one"
    points = report.training[name]
    assert {key for p in points for key in p.terms} == {"soft", "hard", "on_policy"}
    assert all((p.loss is None) == ("on_policy" in p.terms) for p in points)
    told = [line for line in said if "texts of its own" in line]
    trained = ["one", "family"] if run == "elastic" else ["one"]  # the largest by itself, first
    assert len(told) == len(trained)
    for who, line in zip(trained, told, strict=True):
        assert re.fullmatch(rf"{who}: \d+ texts .*, \d+% of its .*", line)
    assert any(w.startswith(f"{name}: writing texts of its own took") for w in report.warnings)
    page = (world / "out/report.html").read_text()
    assert "own texts" in page and ">writing<" in page


def test_prompts_that_leave_no_room_are_left_out_or_refused(world):
    from limbeck.on_policy import on_policy
    from limbeck.tasks.language_recipe import open_task, prepare

    recipe, _ = load_recipe(world / "recipe.yaml")
    folder = world / "data"
    folder.mkdir()
    prepare(recipe, world / "rows.jsonl", None, world / "teacher", folder)
    task = open_task(recipe, folder)
    found = task.rows("train").prompts(16, plain=False)
    lengths = sorted(map(len, found))
    teacher = LiveTeacher(tiny_language.model(max_position_embeddings=lengths[-1] + 7), "x")
    made = on_policy(OnPolicySpec(max_new_tokens=8), task, teacher, Objective(soft_weight=1.0))
    assert len(made.prompts) == sum(n < lengths[-1] for n in lengths) < len(found)
    assert made.note.startswith(f"{lengths.count(lengths[-1])} of {len(found)} prompts leave no")
    assert made.objective.hard_weight == 0 and made.end_id == END
    with pytest.raises(RecipeError, match="max_new_tokens: 64 behind prompts of"):
        on_policy(OnPolicySpec(), task, teacher, Objective(soft_weight=1.0))
    own = OnPolicySpec(max_new_tokens=1, divergence={"kind": "jsd", "beta": 0.9})
    made = on_policy(own, task, teacher, Objective(soft_weight=1.0))
    assert made.note is None and len(made.prompts) == len(found)
    assert made.objective.divergence == "jsd" and made.objective.settings == {"beta": 0.9}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("distill.balance=calibrated", "on-policy steps have one"),
        ("distill.divergence=dkd", "a `divergence` of its own"),
        ("distill.on_policy.divergence=dkd", "these texts have none"),
        ("distill.on_policy={sampling_temperature: 0, top_p: 0.9}", "nothing is drawn"),
        ("distill.on_policy.share=0", "greater than 0"),
        ("task={kind: text-classification}", "for models that write"),
    ],
)
def test_settings_that_do_not_fit_are_refused(world, change, said):
    extra = ["data.prompt=null", "data.completion=null"] if "task" in change else []
    with pytest.raises(RecipeError, match=said):
        load_recipe(world / "recipe.yaml", [change, *extra])
