"""Splits never overlap and follow from the seed; groups stay together; tokens are the text's."""

import itertools
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from limbeck.errors import DataError, RecipeError
from limbeck.recipe import Recipe
from limbeck.recipe_file import validate
from limbeck.run import read_json
from limbeck.tasks import text_classification
from limbeck.tasks.splits import hold_out
from limbeck.tasks.tables import Table
from limbeck.tasks.task import SPLITS, order
from limbeck.tasks.text_classification import (
    Rows,
    TextClassification,
    _encode,
    _encode_whole,
    open_task,
    prepare,
)

TRAINING = {"epochs": 1, "learning_rate": 1e-3}


def recipe(*, seed: int = 0, max_tokens: int = 10, **data) -> Recipe:
    if "test" not in data:
        data = {"test_fraction": 0.25, **data}
    return validate(
        {
            "name": "tiny",
            "seed": seed,
            "task": {"kind": "text-classification", "max_tokens": max_tokens},
            "data": {"train": "unused", **data},
            "teacher": {"model": "unused"},
            "distill": {"training": TRAINING},
            "students": [{"name": "one", "budget": {"params": 1}}],
        }
    )


@pytest.fixture
def rows_csv(tmp_path) -> Path:
    """240 rows of two labels in 60 groups of unequal size."""
    lines = [f"w{4 + i % 90} w{4 + i % 7},class {i % 2},g{int(i**0.75)}" for i in range(240)]
    (tmp_path / "rows.csv").write_text("text,label,who\n" + "\n".join(lines) + "\n")
    return tmp_path / "rows.csv"


@pytest.fixture
def prepared(tiny, rows_csv, tmp_path):
    def make(test_file: Path | None = None, **settings) -> TextClassification:
        folder = tmp_path / "data"
        prepare(recipe(**settings), rows_csv, test_file, tiny / "teacher", folder)
        return open_task(recipe(**settings), folder)

    return make


def ids(task: TextClassification) -> dict[str, list[int]]:
    return {split: task.rows(split).ids.tolist() for split in SPLITS}


def test_the_splits_are_all_rows_once(prepared):
    found = ids(prepared())
    assert sorted(itertools.chain(*found.values())) == list(range(240))
    assert len(found["test"]) == 60, "a quarter"
    assert len(found["validation"]) == 18, "a tenth of the rest"


def test_splits_follow_from_the_seed(prepared):
    first = ids(prepared())
    assert ids(prepared()) == first
    other = ids(prepared(seed=1))
    assert other["test"] != first["test"] and other["validation"] != first["validation"]


def test_groups_stay_together(prepared, rows_csv):
    group_of = [line.split(",")[2] for line in rows_csv.read_text().splitlines()[1:]]
    found = ids(prepared(group="who"))
    assert sorted(itertools.chain(*found.values())) == list(range(240))
    groups = {split: {group_of[i] for i in rows} for split, rows in found.items()}
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["validation"]
    assert not groups["validation"] & groups["test"]
    ungrouped = ids(prepared())
    assert {group_of[i] for i in ungrouped["train"]} & {group_of[i] for i in ungrouped["test"]}


def test_a_test_file_of_its_own_is_all_test_and_what_it_repeats_is_counted(
    prepared, rows_csv, tmp_path
):
    (tmp_path / "test.csv").write_text(rows_csv.read_text() + "w98 w98,class 1,g\n")
    task = prepared(test_file=tmp_path / "test.csv", test="unused")
    assert task.rows("test").ids.tolist() == list(range(241))
    about = read_json(task.folder / "data.json")
    assert about["rows"] == {"train": 216, "validation": 24, "test": 241}
    assert about["texts_in_train_and_test"] == 216, "each text is there once"


def test_limits_take_a_part_of_the_same_rows(prepared):
    everything, few = ids(prepared()), ids(prepared(max_train_rows=50, max_test_rows=20))
    assert (len(few["train"]), len(few["test"])) == (50, 20)
    assert {*few["train"]} < {*everything["train"]} and {*few["test"]} < {*everything["test"]}
    assert few["validation"] == everything["validation"]
    assert ids(prepared(max_train_rows=1000)) == everything


def test_rows_are_the_texts_tokens_labels_and_covered_text(prepared, rows_csv):
    lines = [line.split(",") for line in rows_csv.read_text().splitlines()[1:]]
    task = prepared(max_tokens=4)
    assert task.labels == ("class 0", "class 1")
    for split in SPLITS:
        rows = task.rows(split)
        for at, row in enumerate(rows.ids):
            text, label, _ = lines[row]
            words = [int(word[1:]) for word in text.split()]
            assert rows.tokens[at].tolist() == [2, *words, 3]  # [CLS] ... [SEP]
            assert rows.texts[at] == text
            assert task.labels[rows.labels[at]] == label


def test_a_long_text_is_cut_and_says_what_it_covers(tiny, tmp_path):
    lines = [f"w4 w5 w6 w7 w8 w{9 + i},class {i % 2}" for i in range(40)]
    (tmp_path / "long.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    prepare(recipe(max_tokens=5), tmp_path / "long.csv", None, tiny / "teacher", tmp_path / "d")
    rows = open_task(recipe(), tmp_path / "d").rows("train")
    assert {tuple(tokens) for tokens in rows.tokens} == {(2, 4, 5, 6, 3)}
    assert {*rows.texts} == {"w4 w5 w6"}


def test_a_batch_is_padded_masked_and_keyed(prepared):
    rows = prepared().rows("train")
    short = Rows(rows.ids, rows.labels, (rows.tokens[0][:2], *rows.tokens[1:]), rows.texts, 7)
    batch = short.batch([0, 3])
    assert batch.inputs["input_ids"].tolist() == [[*short.tokens[0], 7, 7], [*short.tokens[3]]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.example_ids.tolist() == [rows.ids[0], rows.ids[3]]
    assert batch.labels.tolist() == [rows.labels[0], rows.labels[3]]
    assert batch.mask.all()
    served = [i for batch in rows.batches(50) for i in batch.example_ids.tolist()]
    assert served == rows.ids.tolist()


def test_a_sample_is_a_part_in_file_order_and_the_same_for_the_same_seed(prepared):
    rows = prepared().rows("train")
    part = rows.sample(30, seed=3)
    assert len(part) == 30 and part.ids.tolist() == sorted({*part.ids} & {*rows.ids})
    assert part.ids.tolist() == rows.sample(30, seed=3).ids.tolist()
    assert part.ids.tolist() != rows.sample(30, seed=4).ids.tolist()
    place = {int(row): at for at, row in enumerate(rows.ids)}
    for at, row in enumerate(part.ids):
        assert part.texts[at] == rows.texts[place[row]]
        assert part.labels[at] == rows.labels[place[row]]
        assert part.tokens[at].tolist() == rows.tokens[place[row]].tolist()
    assert rows.sample(None, seed=0) is rows and rows.sample(10**6, seed=0) is rows


def test_a_models_own_order_of_the_labels_is_kept(tiny, tmp_path):
    """Else the answers of a teacher that is not tuned would be read as other labels."""
    prepare(recipe(), tiny / "rows.csv", None, tiny / "knows", tmp_path / "d")
    task = open_task(recipe(), tmp_path / "d")
    assert task.labels == ("class 2", "class 0", "class 1")
    rows = task.rows("test")
    for tokens, label in zip(rows.tokens, rows.labels, strict=True):
        assert task.labels[label] == f"class {(tokens[1] - 4) // 30}"


@pytest.mark.parametrize(
    ("lines", "settings", "words"),
    [
        (["w4,a,g"] * 30, {}, "the only label is 'a'"),
        (["w4,a,g", "w5,b,g"] * 30, {"group": "who"}, "60 rows in 1 groups leave nothing"),
        (["w4,a,g"], {}, "1 rows in 1 groups leave nothing"),
        (["w4,a,g"] * 30 + ["w5,b,g"] * 30, {"max_train_rows": 1}, "the only label"),
        ([f"w4,{i},g" for i in range(30)], {}, r"labels that the training rows lack: \d+"),
    ],
)
def test_data_that_cannot_be_learnt_from_is_refused(tiny, tmp_path, lines, settings, words):
    (tmp_path / "few.csv").write_text("text,label,who\n" + "\n".join(lines) + "\n")
    with pytest.raises(DataError, match=words):
        prepare(recipe(**settings), tmp_path / "few.csv", None, tiny / "teacher", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_more_tokens_than_the_model_has_positions_are_refused(prepared):
    assert len(prepared(max_tokens=40).rows("train"))
    with pytest.raises(RecipeError, match="max_tokens: 41; allowed: up to 40"):
        prepared(max_tokens=41)


keys = st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=60)


@given(keys, st.floats(0.05, 0.85), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_a_split_is_a_partition_by_groups_of_about_the_wanted_size(groups, fraction, seed):
    table = Table([""] * len(groups), [""] * len(groups), groups)
    try:
        held, kept = hold_out(table.groups, np.arange(len(groups)), fraction, seed, "test")
    except DataError:
        # only where whole groups cannot be both: one group, or all are needed to reach the share
        sizes = Counter(groups)
        assert len(groups) - max(sizes.values()) < np.ceil(fraction * len(groups))
        return
    assert sorted([*held, *kept]) == list(range(len(groups)))
    assert not {groups[i] for i in held} & {groups[i] for i in kept}
    wanted = np.ceil(fraction * len(groups))
    assert wanted <= len(held) < wanted + max(Counter(groups).values())


@given(st.integers(1, 300), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_an_epochs_order_is_a_permutation_of_its_own(n, seed, epoch):
    found = order(n, seed=seed, epoch=epoch)
    assert sorted(found) == list(range(n))
    assert (order(n, seed=seed, epoch=epoch) == found).all()
    if n >= 100:
        assert (order(n, seed=seed, epoch=epoch + 1) != found).any()
        assert (order(n, seed=seed + 1, epoch=epoch) != found).any()


def tokenizers_of_each_kind() -> dict[str, PreTrainedTokenizerFast]:
    """Words in pieces, bytes, and one that joins words as it likes."""
    corpus = ["the old man and the sea", "a mansion and theology, andante", "so-called see saws"]
    kinds = {
        "wordpiece": (models.WordPiece(unk_token="?"), pre_tokenizers.BertPreTokenizer()),
        "bytes": (models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "unsplit": (models.BPE(), None),
    }
    trainer = {
        "wordpiece": trainers.WordPieceTrainer(vocab_size=60, special_tokens=["?"]),
        "bytes": trainers.BpeTrainer(vocab_size=300),
        "unsplit": trainers.BpeTrainer(vocab_size=60),
    }
    found = {}
    for kind, (model, split) in kinds.items():
        backend = Tokenizer(model)
        if split is not None:
            backend.pre_tokenizer = split
        backend.train_from_iterator(corpus, trainer[kind])
        found[kind] = PreTrainedTokenizerFast(tokenizer_object=backend)
    return found


KINDS = tokenizers_of_each_kind()


@pytest.mark.parametrize("kind", KINDS)
@given(
    texts=st.lists(st.text("theandso -,\n\t\u3000é", max_size=90), min_size=1, max_size=4),
    characters=st.integers(1, 6),
)
def test_the_beginning_of_a_text_is_tokenised_as_in_the_whole(kind, texts, characters):
    with patch.object(text_classification, "_CHARACTERS_PER_TOKEN", characters):
        assert _encode(KINDS[kind], texts, 5) == _encode_whole(KINDS[kind], texts, 5)


def test_only_the_beginning_of_a_long_text_is_tokenised():
    with patch.object(text_classification, "_encode_whole", wraps=_encode_whole) as whole:
        _encode(KINDS["wordpiece"], ["the sea " * 1000, "a" * 1000], 5)
    assert [len(text) for text in whole.call_args_list[0].args[1]] == [75, 1000]
    assert whole.call_args_list[1].args[1] == []
