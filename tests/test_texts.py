"""Texts that teacher and students write: whose prompts, which files, and what they are worth."""

import json
from importlib import util

import numpy as np
import pytest
import torch

import limbeck
import tiny_language
from limbeck import texts
from limbeck.answers import load_file
from limbeck.errors import MissingExtraError, RecipeError
from limbeck.measure_language import chrf, rouge_l
from limbeck.models import load_tokenizer
from limbeck.progress import Silent
from limbeck.recipe_file import fingerprint, load_recipe
from limbeck.report import markdown, page
from limbeck.run import Made
from limbeck.tasks.conversations import Encoder
from limbeck.tasks.language_recipe import open_task
from limbeck.tasks.prompts import prompt_of
from limbeck.tasks.task import prepare
from limbeck.trials import Trials, require_extras
from tiny_world import quickly

GENERATE = {"rows": 9, "max_new_tokens": 12, "prompt_tokens": 6}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Texts written by a GGUF file, and by the student of hard labels alone."""
    folder = tiny_language.make_language_world(
        tmp_path_factory.mktemp("texts"), evidence={"baselines": "all", "random_init": False},
        measure={"latency_runs": 10, "generate": GENERATE},
    )  # fmt: skip
    with quickly():
        return folder, limbeck.distill(folder / "recipe.yaml", folder / "out")


@torch.no_grad()
def slowly(model, ids: list[int], most: int, end: int) -> list[int]:
    """The likeliest token each time, all read anew for each."""
    said: list[int] = []
    while len(said) < most:
        said.append(int(model(torch.tensor([[*ids, *said]])).logits[0, -1].argmax()))
        if said[-1] == end:
            return said[:-1]
    return said


def test_each_primary_file_writes_what_a_slow_loop_does(done):
    folder, report = done
    run = folder / "out"
    prompts = json.loads((run / "prompts/prompts.json").read_text())["prompts"]
    (student,) = report.students
    places = {
        "teacher": ("teacher", run / report.teacher.main.path, "hf"),
        "one": ("students/one", run / student.main.path, "gguf-q8_0"),
        "one/hard_labels": (
            "students/one/hard_labels", run / "students/one/hard_labels/gguf/model-q8_0.gguf",
            "gguf-q8_0",
        ),
    }  # fmt: skip
    assert report.texts.scores.keys() == places.keys()
    for name, (top, path, format) in places.items():
        model = load_file(path, format)
        tokenizer = load_tokenizer(run / "teacher/hf", where="x")
        found = json.loads((run / top / "texts/texts.json").read_text())
        for prompt, entry in zip(prompts, found["written"], strict=True):
            ids = slowly(model, prompt["tokens"], GENERATE["max_new_tokens"], 2)
            assert entry["text"] == tokenizer.decode(ids), name
            assert entry["ended"] == (len(ids) < GENERATE["max_new_tokens"])
        said = [entry["text"] for entry in found["written"]]
        references = [prompt["reference"] for prompt in prompts]
        scores = report.texts.scores[name]
        same = [a.strip() == b.strip() for a, b in zip(said, references, strict=True)]
        assert scores.exact_match.value == np.mean(same)
        assert scores.rouge_l.value == pytest.approx(rouge_l(said, references).mean())
        assert scores.chrf.value == chrf(said, references, seed=0).value
        for score in (scores.exact_match, scores.rouge_l, scores.chrf):
            assert 0 <= score.low <= score.value <= score.high <= 1 and score.n == 9


def test_the_teacher_has_learnt_to_write(done):
    _, report = done
    scores = report.texts.scores
    assert scores["teacher"].rouge_l.value > 0.8 < scores["teacher"].chrf.value
    assert scores["one"].rouge_l.value > 0.5


def test_prompts_are_of_test_documents_and_stand_before_their_references(done):
    folder, _ = done
    run = folder / "out"
    rows = [json.loads(line)["text"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    prompts = json.loads((run / "prompts/prompts.json").read_text())["prompts"]
    split = open_task(load_recipe(run)[0], run / "data").rows("test")
    assert {p["document"] for p in prompts} <= {*np.concatenate(split.documents).tolist()}
    tokenizer = load_tokenizer(run / "teacher/hf", where="x")
    for prompt in prompts:
        assert rows[prompt["document"]].startswith(prompt["prompt"] + prompt["reference"])
        assert tokenizer.decode(prompt["tokens"]) == prompt["prompt"]
        assert 1 < len(prompt["tokens"]) <= GENERATE["prompt_tokens"]


def test_the_second_run_does_nothing_and_other_prompts_measure_no_file_anew(done):
    folder, _ = done
    with quickly():
        again = limbeck.distill(folder / "recipe.yaml", folder / "out")
        assert all(stage.reused for stage in again.stages)
        fewer = limbeck.distill(
            folder / "recipe.yaml", folder / "out", overrides=["measure.generate.rows=4"]
        )
    made = {stage.name for stage in fewer.stages if not stage.reused}
    assert made == {
        "prompts", "teacher/texts", "students/one/texts", "students/one/hard_labels/texts"
    }  # fmt: skip
    assert fewer.texts.scores["one"].chrf.n == 4


def test_texts_depend_on_how_long_they_may_be_even_where_the_prompts_are_the_same(tmp_path):
    class Recorder:
        def stage(self, name, inputs, make):
            self.inputs = fingerprint(inputs)
            return Made(tmp_path, "same")

    def of(most: int) -> str:
        recipe, _ = load_recipe("smol", [f"measure.generate.max_new_tokens={most}"])
        trials = Trials(Recorder(), recipe, Silent())
        made = trials.prompts = Made(tmp_path, "same prompts")
        trials.of("one", "students/one", made, made, "hf")
        return trials.run.inputs

    assert of(8) == of(8) != of(9)


def test_scores_and_texts_are_on_the_page(done):
    _, report = done
    example = report.texts.examples[0]
    for text in (markdown(report), page(report)):
        assert "ROUGE-L" in text and "chrF" in text and "exact match" in text
        assert "one, hard labels" in text
    for said in (example.prompt, example.written["one"].text, example.written["teacher"].text):
        assert said.split()[0] in page(report)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """Data in the three kinds, prepared with a teacher whose context is 60 tokens."""
    folder = tiny_language.make_language_world(
        tmp_path_factory.mktemp("kinds"), measure={"generate": {"rows": 50, "max_new_tokens": 8}}
    )
    tiny_language.save(folder / "teacher", max_position_embeddings=60)
    rows = []
    for i, text in enumerate(tiny_language.texts(30)):
        ask = text[:20] * (3 if i % 3 == 0 else 1)
        turns = [("user", ask), ("assistant", "no"), ("user", "and"), ("assistant", text[20:])]
        said = [{"role": role, "content": content} for role, content in turns]
        rows.append({"ask": ask, "say": text[20:], "said": said, "text": text})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, rows


def chosen(folder, *overrides):
    """(recipe, prompts.json, data) of a recipe with these overrides."""
    recipe, _ = load_recipe(folder / "recipe.yaml", ["task.max_tokens=60", *overrides])
    data, out = folder / "data", folder / "prompts"
    for place in (data, out):
        place.mkdir(exist_ok=True)
    prepare(recipe, folder / "rows.jsonl", None, folder / "teacher", data)
    texts.choose(out, recipe, folder / "rows.jsonl", data, data, folder / "teacher", None)
    return recipe, json.loads((out / "prompts.json").read_text()), out


COMPLETIONS = ("data.prompt=ask", "data.completion=say", "task.layout=pad")


@pytest.mark.parametrize("learn", ["answer", "all"])
def test_of_completions_the_answer_is_the_reference_and_long_prompts_are_counted(
    conversations, learn
):
    folder, rows = conversations
    _, found, _ = chosen(folder, *COMPLETIONS, f"task.learn={learn}")
    tokenizer = tiny_language.tokenizer()
    for prompt in found["prompts"]:
        row = rows[prompt["document"]]
        assert (prompt["prompt"], prompt["reference"]) == (row["ask"], row["say"])
        assert tokenizer.decode(prompt["tokens"]) == row["ask"]
        assert len(prompt["tokens"]) + 8 <= 60
    assert any("references have more than 8 tokens" in note for note in found["notes"])
    more = 61 - max(len(prompt["tokens"]) for prompt in found["prompts"])
    _, fewer, _ = chosen(folder, *COMPLETIONS, f"measure.generate.max_new_tokens={more}")
    left_out = len(found["prompts"]) - len(fewer["prompts"])
    assert left_out > 0 and fewer["notes"][0] == (
        f"{left_out} of {len(found['prompts'])} prompts are left out: they leave no room for "
        f"{more} tokens in a context of 60."
    )
    with pytest.raises(RecipeError, match="59, behind prompts of"):
        chosen(folder, *COMPLETIONS, "measure.generate.max_new_tokens=59")


def test_of_conversations_the_last_answer_is_the_reference(conversations):
    folder, rows = conversations
    recipe, found, out = chosen(
        folder, "data.messages=said", "task.layout=pad", "measure.generate.max_new_tokens=2"
    )  # fmt: skip
    encoder = Encoder(tiny_language.tokenizer(), "messages", where="x")
    for prompt in found["prompts"]:
        said = rows[prompt["document"]]["said"]
        assert prompt["reference"] == said[-1]["content"]
        assert prompt["tokens"] == encoder.prompt(said[:-1])
        assert prompt["prompt"] == f"user: {said[0]['content']}\nassistant: no\nuser: and"
    texts.write(out, recipe, folder / "teacher", "hf", out, "teacher", Silent(), of_teacher=True)
    written = json.loads((out / "texts.json").read_text())
    assert len(written["written"]) == len(found["prompts"]) == written["scores"]["chrf"]["n"]


@pytest.mark.parametrize("text", ["déjà vu: naïve café owners", "日本語のテキスト", "ab", "a", "é"])
@pytest.mark.parametrize("first", range(1, 12))
def test_text_is_never_cut_inside_of_a_character(text, first):
    encoder = Encoder(tiny_language.tokenizer(), "text", where="x")
    found = prompt_of(text, 0, encoder, encoder, first_tokens=first, max_new_tokens=99, at="x")
    num_tokens = len(tiny_language.tokenizer()(text)["input_ids"])
    if found is None:
        assert num_tokens < 2 or first < 3
        return
    assert found.prompt + found.reference == text and found.prompt and found.reference
    assert tiny_language.tokenizer().decode(found.tokens) == found.prompt
    assert 1 <= len(found.tokens) <= min(first, num_tokens // 2)


def test_students_with_other_tokens_read_the_same_prompt():
    teacher = Encoder(tiny_language.tokenizer(), "text", where="x")
    student = Encoder(tiny_language.tokenizer(300), "text", where="x")
    text = tiny_language.texts()[0]
    found = prompt_of(text, 0, teacher, student, first_tokens=5, max_new_tokens=4, at="x")
    assert found.tokens != found.own
    for encoder, ids in ((teacher, found.tokens), (student, found.own)):
        assert encoder.tokenizer.decode(ids) == found.prompt


def test_a_missing_extra_is_said_before_anything_is_read(tmp_path, monkeypatch):
    recipe, _ = load_recipe("smol", ["measure.generate={}"])
    require_extras(recipe)
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "sacrebleu" else name)
    with pytest.raises(MissingExtraError, match=r"recipe\.measure\.generate.*limbeck\[lm\]"):
        limbeck.distill(
            tiny_language.make_language_world(tmp_path, measure={"generate": {}}) / "recipe.yaml",
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()


def test_settings_without_effect_are_refused(tmp_path):
    folder = tiny_language.make_language_world(tmp_path)
    with pytest.raises(RecipeError, match="prompt_tokens` is for plain text"):
        load_recipe(
            folder / "recipe.yaml",
            ["data.messages=said", "measure.generate={prompt_tokens: 9}"],
        )
    with pytest.raises(RecipeError, match=r"models that write, not for text-classification"):
        load_recipe("quickstart", ["measure.generate={rows: 9}"])
    plain, _ = load_recipe(folder / "recipe.yaml")
    asked, _ = load_recipe(folder / "recipe.yaml", ["measure.generate={}"])
    assert plain.measure.of_files == asked.measure.of_files
