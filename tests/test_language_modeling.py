"""Each token that is to be learnt counts once, lines up with its logits, and leaks nowhere."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_language
from limbeck.causal import load_causal
from limbeck.errors import DataError, RecipeError, SourceError
from limbeck.measure_language import score_documents
from limbeck.objective import Objective
from limbeck.observe import tokens
from limbeck.progress import Silent
from limbeck.recipe import TrainingSpec
from limbeck.signals.capture import capture
from limbeck.signals.codecs import TopK
from limbeck.signals.dense import Dense
from limbeck.signals.store import open_store
from limbeck.step import Training
from limbeck.tasks.causal_rows import Rows, sees_other_documents
from limbeck.tasks.conversations import Encoder
from limbeck.tasks.language_modeling import CausalData, LanguageModeling, prepare, shown
from limbeck.tasks.packing import Piece, packed, windows
from limbeck.tasks.records import Columns, read_records
from limbeck.tasks.task import SPLITS, Task
from limbeck.tasks.task import Rows as RowsOfTask
from limbeck.teachers.live import LiveTeacher
from limbeck.teachers.stored import StoredTeacher
from limbeck.train import train
from limbeck.types import Need

TOKENIZER = tiny_language.tokenizer()
END = TOKENIZER.eos_token_id


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny_language.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def prepared(llama, tmp_path):
    """Rows as JSON lines, prepared; `test` rows make a test file of their own."""

    def make(rows: list[dict], kind: str, test: list[dict] | None = None, **settings):
        group = settings.pop("group", None)
        files = {}
        for name, part in (("train", rows), ("test", test)):
            if part is not None:
                files[name] = tmp_path / f"{name}.jsonl"
                files[name].write_text("".join(json.dumps(row) + "\n" for row in part))
        data = CausalData(
            columns=Columns(kind=kind, group=group), test_fraction=None if test else 0.25,
            **{"max_tokens": 32, **settings},
        )  # fmt: skip
        prepare(data, files["train"], files.get("test"), llama, tmp_path / "data")
        return LanguageModeling(data.max_tokens, tmp_path / "data")

    return make


def texts(n: int = 40) -> list[dict]:
    return [
        {"text": " ".join(f"the sea {i} {j}" for j in range(1 + i % 7)), "who": f"g{i // 3}"}
        for i in range(n)
    ]


def learnt(rows: Rows) -> dict[int, list[list[int]]]:
    """By document: what counts, each token with the one it follows."""
    found: dict[int, list[list[int]]] = {}
    for at in range(len(rows)):
        batch = rows.batch([at])
        documents = rows.documents_at([at])
        for t in batch.mask[0].nonzero()[:, 0].tolist():
            pair = [int(batch.inputs["input_ids"][0, t]), int(batch.labels[0, t])]
            found.setdefault(int(documents[0, t]), []).append(pair)
    return found


@pytest.mark.parametrize("layout", ["pack", "pad"])
@pytest.mark.parametrize("max_tokens", [8, 32, 128])
def test_each_token_of_a_text_and_its_end_are_predicted_once(prepared, layout, max_tokens):
    rows = texts()
    task = prepared(rows, "text", layout=layout, max_tokens=max_tokens)
    seen = set()
    for split in SPLITS:
        for document, pairs in learnt(task.rows(split)).items():
            ids = [*TOKENIZER(rows[document]["text"])["input_ids"], END]
            assert sorted(pairs) == sorted(map(list, itertools.pairwise(ids)))
            seen.add(document)
        assert task.rows(split).num_positions == task.about["counted"][split]
    assert seen == set(range(40))
    assert sum(task.about["documents"].values()) == 40


def test_packed_rows_are_fewer_and_no_longer_than_allowed(prepared):
    rows = {layout: prepared(texts(), "text", layout=layout).rows("train")
            for layout in ("pack", "pad")}  # fmt: skip
    assert len(rows["pack"]) < 0.8 * len(rows["pad"])
    for found in rows.values():
        assert max(map(len, found.tokens)) <= 32
        assert found.ids.tolist() == list(range(len(found)))


def test_packed_documents_say_what_they_say_alone(prepared, llama):
    model = load_causal(llama, where="x")
    rows = prepared(texts(), "text", layout="pack", max_tokens=64).rows("train")
    batch = rows.batch(range(4))
    assert max(map(len, rows.starts[:4])) > 1 and "attention_mask" not in batch.inputs
    logits = model(**batch.inputs).logits
    for row in range(4):
        ends = [*rows.starts[row].tolist(), len(rows.tokens[row])]
        for start, end in itertools.pairwise(ends):
            alone = model(input_ids=batch.inputs["input_ids"][row : row + 1, start:end]).logits[0]
            assert torch.allclose(logits[row, start:end], alone, atol=1e-4)
    assert not sees_other_documents(model, rows)
    model.config.use_cache = True
    assert sees_other_documents(model, rows), "transformers' cache undoes it: this must be told"


def test_padding_changes_nothing(prepared, llama):
    model = load_causal(llama, where="x")
    rows = prepared(texts(), "text", layout="pad").rows("train")
    batch = rows.batch([0, 5, 6])
    logits = model(**batch.inputs).logits
    assert len({len(rows.tokens[at]) for at in (0, 5, 6)}) > 1
    for row, at in enumerate([0, 5, 6]):
        length = len(rows.tokens[at])
        assert batch.inputs["attention_mask"][row].sum() == length
        assert batch.mask[row, length - 1 :].sum() == 0
        alone = model(**rows.batch([at]).inputs).logits[0]
        assert torch.allclose(logits[row, :length], alone, atol=1e-4)


def test_the_loss_is_transformers_own(prepared, llama):
    """Labels are aligned with the logits here, shifted by the model there."""
    model = load_causal(llama, where="x")
    rows = prepared(texts(), "text", layout="pad").rows("train")
    batch = rows.batch([0, 1, 2])
    logits = model(**batch.inputs).logits
    ours = torch.nn.functional.cross_entropy(logits[batch.mask], batch.labels[batch.mask])
    held = batch.inputs["attention_mask"].bool()
    labels = batch.inputs["input_ids"].masked_fill(~held, -100)
    assert ours.item() == pytest.approx(model(**batch.inputs, labels=labels).loss.item(), rel=1e-5)


def pairs(n: int = 20) -> list[dict]:
    return [{"prompt": f"see {i}:", "completion": f" the sea {i} and 12"} for i in range(n)]


@pytest.mark.parametrize("layout", ["pack", "pad"])
def test_of_a_prompt_and_its_completion_only_the_completion_counts(prepared, layout):
    rows = pairs()
    task = prepared(rows, "completion", layout=layout)
    for split in SPLITS:
        for document, found in learnt(task.rows(split)).items():
            ids = [*TOKENIZER(rows[document]["completion"])["input_ids"], END]
            assert [label for _, label in found] == ids, "and the border is no token"
    everything = prepared(rows, "completion", layout=layout, learn="all")
    more = sum(len(TOKENIZER(row["prompt"])["input_ids"]) - 1 for row in rows)
    assert sum(everything.about["counted"].values()) == sum(task.about["counted"].values()) + more


CHAT = [
    {"role": "system", "content": "be brief"}, {"role": "user", "content": "see 12?"},
    {"role": "assistant", "content": "the sea"}, {"role": "user", "content": "and 34?"},
    {"role": "assistant", "content": "an ocean"},
]  # fmt: skip


def test_of_a_conversation_only_the_assistants_words_and_their_ends_count(prepared):
    task = prepared([{"messages": CHAT}] * 20, "messages", max_tokens=128)
    rows = task.rows("train")
    assert shown(rows, 0, TOKENIZER).startswith(
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nsee 12?<|im_end|>\n"
        "<|im_start|>assistant\n[[the sea<|im_end|>]]\n<|im_start|>user"
    )
    for found in learnt(rows).values():
        said = TOKENIZER.decode([label for _, label in found])
        assert said == "the sea<|im_end|>an ocean<|im_end|>"
    whole = TOKENIZER.apply_chat_template(CHAT, tokenize=False)
    assert TOKENIZER.decode(rows.tokens[0][: len(rows.tokens[0]) // len(rows.starts[0])]) == whole


def test_what_is_asked_is_the_beginning_of_what_is_learnt():
    encoder = Encoder(TOKENIZER, "messages", where="x")
    asked, whole = encoder.prompt(CHAT[:2]), encoder(CHAT[:3], 0, "x")
    assert whole.tokens[: len(asked)].tolist() == asked
    assert not whole.counted[: len(asked)].any() and whole.counted[len(asked)]


def test_a_tokenizers_own_beginning_stands_before_each_document(prepared):
    from tokenizers import processors

    tokenizer = tiny_language.tokenizer.__wrapped__()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    for kind, value in (("text", "the sea"), ("completion", ("the", " sea"))):
        piece = Encoder(tokenizer, kind, where="x")(value, 0, "x")
        assert piece.tokens.tolist() == [1, *TOKENIZER("the sea")["input_ids"], END]
        assert not piece.counted[0]
    assert Encoder(tokenizer, "messages", where="x")(CHAT, 0, "x").tokens.tolist().count(1) == 5


def test_groups_stay_together_and_splits_follow_from_the_seed(prepared):
    def documents(**settings) -> list[set[int]]:
        task = prepared(texts(), "text", **settings)
        return [{int(d) for row in task.rows(s).documents for d in row} for s in SPLITS]

    first = documents(group="who")
    assert sorted(d for part in first for d in part) == list(range(40))
    groups = [{d // 3 for d in part} for part in first]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert documents(group="who") == first
    assert documents(group="who", seed=1) != first
    few = documents(
        group="who", max_train_documents=5, max_validation_documents=2, max_test_documents=3
    )
    assert [len(part) for part in few] == [5, 2, 3]
    assert all(part < whole for part, whole in zip(few, first, strict=True))


def test_a_test_file_of_its_own_and_what_it_repeats(prepared):
    task = prepared(texts(), "text", test=[*texts()[:6], {"text": "another"}])
    assert task.about["documents"]["test"] == 7
    assert 0 < task.about["documents_in_train_and_test"] <= 6


def test_a_sample_is_a_part_in_order(prepared):
    rows = prepared(texts(), "text", layout="pad").rows("train")
    part = rows.sample(7, seed=1)
    assert len(part) == 7 and part.ids.tolist() == sorted({*part.ids} & {*rows.ids})
    for at, row in enumerate(part.ids):
        assert part.tokens[at].tolist() == rows.tokens[row].tolist()
        assert part.documents[at].tolist() == rows.documents[row].tolist()
    assert part.ids.tolist() == rows.sample(7, seed=1).ids.tolist()
    assert part.ids.tolist() != rows.sample(7, seed=2).ids.tolist()
    assert rows.sample(None, seed=0) is rows
    served = [i for batch in rows.batches(8) for i in batch.example_ids.tolist()]
    assert served == rows.ids.tolist()


def test_a_long_completion_is_cut_and_counted(prepared):
    rows = [*pairs(19), {"prompt": "see", "completion": " sea" * 90}]
    task = prepared(rows, "completion")
    assert sum(task.about["completions_cut"].values()) == 1
    assert max(len(t) for s in SPLITS for t in task.rows(s).tokens) == 32


REPLY = {"role": "assistant", "content": "aye"}


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("completion", {"prompt": "the sea " * 90, "completion": "x"}, r"row 20: \d+ tokens stand"),
        ("completion", {"prompt": "x", "completion": " "}, r"row 20: completion is ' '"),
        ("completion", {"prompt": "x"}, r"line 20: no column 'completion'"),
        ("text", {"text": 5}, r"row 20: text is 5"),
        ("messages", {"messages": "hello"}, r"row 20: messages is 'hello'"),
        ("messages", {"messages": []}, r"row 20: messages is \[\]"),
        ("messages", {"messages": [{"role": "bot", "content": "x"}]}, "message 1: its role is"),
        ("messages", {"messages": [{"role": "user"}]}, "row 20, message 1: {'role': 'user'}"),
        ("messages", {"messages": [REPLY, {"role": "user", "content": "x"}]}, "no answer to learn"),
    ],
)
def test_rows_that_cannot_be_learnt_from_are_named(prepared, tmp_path, kind, row, words):
    good = {"text": texts, "completion": pairs}.get(kind, lambda n: [{"messages": CHAT}] * n)(19)
    settings = {"max_tokens": 128} if kind == "messages" else {}
    with pytest.raises(DataError, match=words):
        prepared([*good, row], kind, **settings)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no system please') }}", "row 1: the chat template refuses it: no"),
        ("{{ messages|length }}{{ messages[-1]['content'] }}", "writes message 3 otherwise"),
    ],
)
def test_templates_that_are_absent_refuse_or_rewrite_the_past(llama, template, words):
    tokenizer = tiny_language.tokenizer.__wrapped__()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=words):
        Encoder(tokenizer, "messages", where="teacher")(CHAT, 0, "row 1")


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = tiny_language.tokenizer.__wrapped__()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="names no end token"):
        Encoder(tokenizer, "text", where="teacher")


def test_it_is_a_task_of_the_pipeline(prepared, llama, tiny, tmp_path):
    task = prepared(texts(), "text")
    config = task.read_config(llama, where="x")
    assert task.labels == () and task.own_labels(llama, where="x") is None
    assert task.rows("train").lengths.tolist() == [len(t) for t in task.rows("train").tokens]
    assert [part.below for part in task.inputs(config)] == [config.vocab_size, None]
    assert type(task.build(config)) is type(task.load(llama, where="x"))
    model = task.load(llama, where="x")
    task.save(model, llama, tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["use_cache"] is True
    assert model.config.use_cache is False
    assert task.preprocessing(tmp_path / "saved") == task.preprocessing(llama)
    assert task.example().endswith("to be predicted")
    asked = {name for part in (Task, RowsOfTask) for name in vars(part) if name[0] != "_"}
    assert not {name for name in asked if not hasattr(task, name)} - {*dir(task.rows("train"))}
    model.projector = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"projector\.bias"):
        task.save(model, llama, tmp_path / "again")
    with pytest.raises(SourceError, match="does not continue text"):
        task.read_config(tiny / "teacher", where="x")
    with pytest.raises(RecipeError, match="max_tokens: 129; allowed: up to 128"):
        LanguageModeling(129).read_config(llama, where="x")


def test_features_of_packed_rows_are_of_the_positions_that_count(prepared):
    rows = prepared(texts(), "text", layout="pack").rows("train")
    batch = rows.batch([0, 1])
    assert torch.equal(tokens(batch), batch.mask)
    padded = prepared(texts(), "text", layout="pad").rows("train").batch([0, 1])
    assert torch.equal(tokens(padded), padded.inputs["attention_mask"].bool())


def test_what_a_teacher_said_is_read_back_position_by_position(prepared, llama, tmp_path):
    rows = prepared(texts(), "text", layout="pack").rows("train")
    teacher = LiveTeacher(load_causal(llama, where="x"), "teacher")
    capture(teacher, rows, {tmp_path / "s": Dense("fp32")}, made_from={}, progress=Silent())
    store = open_store(tmp_path / "s")
    batch = rows.batch([3, 0, 5])
    live = teacher.signal(batch, frozenset({Need.LOGITS})).logits[batch.mask]
    stored = StoredTeacher(store=store, fingerprint="teacher", temperature=1.0)
    found = stored.signal(batch, frozenset({Need.LOGITS})).targets.logits
    assert torch.allclose(found, live, atol=1e-4) and len(found) == batch.mask.sum()


@pytest.mark.parametrize("backend", ["dense", "fused"])
def test_a_student_learns_from_what_was_stored_of_packed_rows(prepared, llama, tmp_path, backend):
    rows = prepared(texts(), "text", layout="pack").rows("train")
    model = load_causal(llama, where="x")
    capture(
        LiveTeacher(model, "t"), rows, {tmp_path / "s": TopK(64)}, made_from={}, progress=Silent()
    )
    stored = StoredTeacher(store=open_store(tmp_path / "s"), fingerprint="t", temperature=1.0)
    student = load_causal(tiny_language.save(tmp_path / "student", seed=5), where="x")
    before = score_documents(student, rows, teacher=model).mean_kl(seed=0).value
    spec = TrainingSpec(epochs=8, batch_size=4, learning_rate=5e-3, backend=backend)
    objective = Objective(soft_weight=1.0, hard_weight=0.0)
    training = Training(
        rows=rows, teacher=stored, objective=objective, spec=spec, seed=0, title="student"
    )
    (tmp_path / "run").mkdir()
    train(student, training, tmp_path / "run", Silent())
    after = score_documents(student.eval(), rows, teacher=model).mean_kl(seed=0).value
    assert after < before / 2


def test_parquet_text_files_and_folders_hold_the_same(tmp_path):
    wanted = ["one sea\nand more", "another, déjà vu"]
    (tmp_path / "all.txt").write_text("\n\n  \n".join(wanted) + "\n")
    (tmp_path / "many").mkdir()
    for number, text in enumerate(wanted):
        (tmp_path / "many" / f"{number}.txt").write_text(text)
    pq.write_table(pa.table({"text": wanted, "who": [1, 2]}), tmp_path / "rows.parquet")
    columns = Columns(kind="text")
    for name in ("all.txt", "many", "rows.parquet"):
        assert read_records(tmp_path / name, columns, where="x").values == wanted
    grouped = Columns(kind="text", group="who")
    assert read_records(tmp_path / "rows.parquet", grouped, where="x").groups == ["1", "2"]
    for name, of in (("all.txt", grouped), ("many", Columns(kind="messages")), ("a.csv", columns)):
        with pytest.raises(DataError, match=r"cannot hold|of no known kind"):
            read_records(tmp_path / name, of, where="x")
    pq.write_table(pa.table({"messages": [CHAT]}), tmp_path / "chat.parquet")
    found = read_records(tmp_path / "chat.parquet", Columns(kind="messages"), where="x")
    assert found.values == [CHAT]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
@settings(deadline=None)
def test_packing_holds_every_piece_once_within_the_limit(lengths):
    rows = packed(lengths, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert max(sums) <= 20
    assert all(a + b > 20 for n, a in enumerate(sums) for b in sums[:n]), "no two fit together"


@given(st.integers(1, 60), st.integers(2, 20))
@settings(deadline=None)
def test_windows_predict_each_token_once(length, size):
    piece = Piece(3, np.arange(length, dtype=np.int32), np.arange(length) % 3 > 0)
    found = [*windows(piece, size)]
    assert all(len(part) <= size for part in found)
    targets = [t for part in found for t in part.tokens[1:].tolist()]
    assert targets == list(range(1, length))
    for part in found:
        assert (part.counted == (part.tokens % 3 > 0)).all() and part.document == 3
