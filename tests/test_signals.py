"""What is captured follows from the recipe, and a run's signals can be looked at and checked."""

import json

import pytest

from limbeck.cli import main
from limbeck.errors import RecipeError
from limbeck.recipe import SignalsSpec
from limbeck.signals.choose import codec_settings, reason, store_bytes
from limbeck.signals.codecs import codec_from_settings
from limbeck.signals.origins import origins
from limbeck.tasks.text_classification import TextClassification
from tiny_world import save_tokenizer

LARGE = {"vocab_size": 49_152, "rows": 1_000, "positions": 512_000}


def chosen(**spec):
    return codec_settings(SignalsSpec(**spec), temperature=2.0, **LARGE)


def test_without_a_wish_few_classes_are_stored_whole_and_many_are_sampled():
    few = codec_settings(SignalsSpec(), temperature=2.0, vocab_size=20, rows=10, positions=10)
    assert few == {"codec": "dense", "dtype": "fp16"}, "whatever the temperature: it serves any"
    assert chosen() == {"codec": "sampled", "n": 24, "temperature": 2.0}


def test_a_wish_is_granted_and_told_the_temperature():
    assert chosen(topk={"k": 8})["temperatures"] == [2.0]
    assert chosen(topk={"k": 8, "temperatures": [1, 2]})["temperatures"] == [1.0, 2.0]
    assert chosen(sampled={"n": 12})["temperature"] == 2.0
    assert chosen(dense={"dtype": "bf16"}) == {"codec": "dense", "dtype": "bf16"}
    for spec in ({"topk": {}}, {"sampled": {}}, {"dense": {}}):
        codec_from_settings(chosen(**spec))


@pytest.mark.parametrize(
    ("max_gb", "expected"), [(51, "dense"), (0.1, 50), (0.05, 24), (0.02, 12), (0.013, 8)]
)
def test_the_codec_of_least_error_that_fits_is_taken(max_gb, expected):
    settings = chosen(max_gb=max_gb)
    assert expected in (settings["codec"], settings.get("n"))
    assert store_bytes(settings, **LARGE) <= max_gb * 1e9
    said = reason(SignalsSpec(max_gb=max_gb), settings, **LARGE)
    assert "bytes a position" in said and "512,000" in said


def test_too_few_bytes_are_refused_and_the_fewest_named():
    with pytest.raises(RecipeError, match="at least") as caught:
        chosen(max_gb=0.001)
    assert chosen(max_gb=float(caught.value.allowed.split()[2].rstrip(",")) * 1.01)["n"] == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("signals.topk.k=8", "signals.max_gb=1"), "at most one of them"),
        (("signals.topk.k=0",), "recipe.signals.topk.k"),
        (("signals.topk.kk=8",), "kk"),
        (("signals.topk.temperatures=[1, 3]",), "lacks 2"),
        (("signals.max_gb=0.0000001",), "at least"),
    ],
)
def test_signals_that_cannot_be_are_refused(distil, quick, changes, said):
    assert said in distil(*changes)


def test_another_tokenizer_of_the_same_size_is_another(tmp_path, tiny):
    def of(folder, max_tokens):
        task = TextClassification(("a", "b"), max_tokens)
        return origins(folder, tiny / "rows.csv", task.preprocessing(folder))

    def made_from(change=None):
        folder = tmp_path / "teacher"
        folder.mkdir(exist_ok=True)
        save_tokenizer(folder)
        (folder / "config.json").write_text("{}")
        if change:
            text = (folder / "tokenizer.json").read_text()
            assert change[0] in text
            (folder / "tokenizer.json").write_text(text.replace(*change))
        return of(folder, 10)

    same = made_from()
    assert made_from() == same
    swapped = made_from(('"w10"', '"v10"'))
    assert {k for k in same if same[k] != swapped[k]} == {"tokenizer"}
    rules = made_from(('"type": "Whitespace"', '"type": "WhitespaceSplit"'))
    assert {k for k in same if same[k] != rules[k]} == {"preprocessing"}
    assert of(tmp_path / "teacher", 9) != rules


@pytest.mark.parametrize("codec", ["topk.k=2", "sampled.n=2"])
def test_a_run_from_sparse_signals_whose_signals_are_checked(tiny, tmp_path, quick, capsys, codec):
    out = tmp_path / "out"
    arguments = ["distill", str(tiny / "recipe.yaml"), "--out", str(out)]
    assert main([*arguments, "--set", f"signals.{codec}"]) == 0
    capsys.readouterr()
    assert main(["signals", "verify", str(out)]) == 0
    said = capsys.readouterr().out
    assert "1 shards are as they were written" in said and "asked again" in said
    log = (out / "students/one/hf/training.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["terms"]["soft"] > 0


def test_info_says_what_was_captured(run, capsys):
    assert main(["signals", "info", str(run)]) == 0
    said = capsys.readouterr().out
    for word in ("dense", "fp16", "bytes", "made from tokenizer", "date", "licences"):
        assert word in said


def test_prune_takes_what_is_no_part_and_nothing_else(run, capsys, quick):
    before = {p: p.read_bytes() for p in (run / "signals").iterdir()}
    (run / "signals/.shard-00007.safetensors.1.part").write_bytes(b"12345")
    assert main(["signals", "prune", str(run)]) == 0
    assert "1 files, 5 bytes" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in (run / "signals").iterdir()} == before
    assert main(["distill", str(run), "--out", str(run)]) == 0, "and the run goes on from it"


def test_damage_is_found_and_another_teacher_refused(run, capsys):
    shard = run / "signals/shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(["signals", "verify", str(run)]) == 4
    assert "shard-00000" in capsys.readouterr().err
    shard.write_bytes(whole)
    weights = run / "teacher/hf/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    assert main(["signals", "verify", str(run)]) == 2
    assert "made_from" not in capsys.readouterr().out
    assert main(["signals", "info", str(run / "data")]) == 2
    assert "manifest.json" in capsys.readouterr().err


def test_another_temperature_and_another_student_are_taught_from_the_same_capture(run, quick):
    before = {p: p.read_bytes() for p in (run / "signals").iterdir()}
    change = ["--set", "distill.temperature=3", "--set", "students.one.budget.params=9000"]
    assert main(["distill", str(run), "--out", str(run), *change]) == 0
    stages = json.loads((run / "report.json").read_text())["stages"]
    reused = {stage["name"]: stage["reused"] for stage in stages}
    assert reused["signals"] and reused["teacher/hf"] and not reused["students/one/hf"]
    assert {p: p.read_bytes() for p in (run / "signals").iterdir()} == before
