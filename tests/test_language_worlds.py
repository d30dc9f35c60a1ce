"""Language models whose recipes are not the usual one, from beginning to end."""

import json
from importlib import util

import pytest
import torch
import yaml

import limbeck
import tiny_language
from limbeck.causal import load_causal
from limbeck.errors import DataError, RecipeError, SourceError
from tiny_world import quickly


def world(folder, *, rows=None, **changes):
    tiny_language.make_language_world(folder)
    if rows is not None:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    for name, value in changes.items():
        recipe[name] = {**recipe.get(name, {}), **value} if isinstance(value, dict) else value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def distilled(folder):
    with quickly():
        return limbeck.distill(folder / "recipe.yaml", folder / "out")


@pytest.mark.parametrize("padding", [(0, 24), (24, 8)])
def test_a_padded_vocabulary_distils_with_no_setting(tmp_path, padding):
    """As Qwen's: 151,936 and 152,064 rows for one tokenizer."""
    theirs, ours = (len(tiny_language.tokenizer()) + more for more in padding)
    base = tiny_language.save(tmp_path / "base", vocab_size=ours, seed=3, hidden_size=32)
    folder = world(
        tmp_path, base={"model": str(base)},
        students=[{"name": "one", "budget": {"params": 60000}}],
        export={"formats": ["hf", "gguf-f16"], "primary": "gguf-f16"},
        evidence={"baselines": "all", "random_init": False},
    )  # fmt: skip
    tiny_language.save(folder / "teacher", vocab_size=theirs)
    report = distilled(folder)
    (student,) = report.students
    model = load_causal(folder / "out/students/one/hf", where="x")
    assert model.config.vocab_size == ours
    assert load_causal(folder / "out/teacher/hf", where="x").config.vocab_size == theirs
    kls = [student.fidelity.mean_kl, student.baselines.untaught.mean_kl]
    assert 0 < kls[0] < kls[1] / 2, "it came near its teacher"
    if ours > theirs:
        shares = model(torch.tensor([[1, 5, 9]])).logits.softmax(-1)
        assert shares[..., theirs:].sum(-1).max() < 0.02, "its own padding was pushed down"


CHAT = [
    {"role": "system", "content": "You say what follows."},
    {"role": "user", "content": "the old"},
    {"role": "assistant", "content": "man and"},
    {"role": "user", "content": "the"},
    {"role": "assistant", "content": "sea"},
]


def test_conversations_from_beginning_to_end(tmp_path):
    rows = [
        {"chat": [{"role": "user", "content": text[:12]},
                  {"role": "assistant", "content": text[12:]}]}
        for text in tiny_language.texts()
    ]  # fmt: skip
    folder = world(
        tmp_path, rows=[*rows, {"chat": CHAT}], data={"messages": "chat"},
        task={"kind": "language-modeling", "max_tokens": 128, "layout": "pad"},
        export={"formats": ["hf", "gguf-f16", "gguf-q8_0"], "primary": "gguf-f16"},
    )  # fmt: skip
    report = distilled(folder)
    (student,) = report.students
    assert student.main.quality.value > 0.5
    written = student.artifact("gguf-f16")
    assert written.parity.max_abs_diff < 0.05 and written.parity.agreement > 0.99
    assert written.size_bytes < student.artifact("hf").size_bytes
    hf = folder / "out/students/one/hf"
    assert tiny_language.TEMPLATE in (hf / "chat_template.jinja").read_text()
    card = (hf / "README.md").read_text()
    assert "model-f16.gguf" in card and "llama_cpp" in card


def test_what_a_user_gets_wrong_is_said_before_anything_is_trained(tmp_path):
    folder = world(tmp_path, rows=[{"chat": CHAT}] * 20, data={"messages": "chat"})
    recipe = folder / "recipe.yaml"

    def refused(kind, words, **settings):
        with quickly(), pytest.raises(kind, match=words):
            limbeck.distill(recipe, folder / "out", **settings)

    refused(DataError, r"\d+ tokens stand before the first that is to be learnt")
    refused(RecipeError, "129.*up to 128, the teacher's context",
            overrides=["task.max_tokens=129"])  # fmt: skip
    wrong = [{**CHAT[1], "role": "human"}, *CHAT[2:]]
    (folder / "rows.jsonl").write_text(json.dumps({"chat": wrong}) + "\n")
    refused(DataError, "row 1, message 1: its role is 'human'.*assistant")
    (folder / "rows.jsonl").write_text((json.dumps({"chat": CHAT}) + "\n") * 20)
    (folder / "teacher/chat_template.jinja").unlink()
    refused(DataError, "has no chat template")


@pytest.mark.parametrize("share", [0.02, 0.7, 0.999])
def test_a_teacher_in_a_file_cut_short_is_refused(tmp_path, share):
    from limbeck.export.gguf import write_gguf

    folder = world(tmp_path, teacher={"model": "teacher.gguf"})
    whole = folder / "teacher.gguf"
    write_gguf(folder / "teacher", whole, "f16", name="tiny", where="x")
    whole.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    with quickly(), pytest.raises(SourceError, match=r"teacher\.model.*teacher\.gguf is cut short"):
        limbeck.distill(folder / "recipe.yaml", folder / "out")
    assert not (folder / "out/model/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(util.find_spec("llama_cpp") is None, reason="extra verify")
def test_a_latency_budget_is_met_in_llama_cpp(tmp_path):
    """What is timed with random weights beforehand is what the file then needs."""
    folder = world(
        tmp_path, students=[{"name": "one", "budget": {"latency_ms": 200, "params": 60000}}],
        export={"formats": ["hf", "gguf-q8_0"]},
    )  # fmt: skip
    report = limbeck.distill(folder / "recipe.yaml", folder / "out")
    (student,) = report.students
    assert student.main.runtime.startswith("llama.cpp")
    assert student.main.latency_ms.median == student.budget.measured["latency_ms"] < 200
    assert student.budget.predicted["latency_ms"] < 200 and student.budget.met
    assert report.teacher.artifact("gguf-q8_0").runtime.startswith("llama.cpp")
