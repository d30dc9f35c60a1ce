"""Language modelling as a recipe's task: from its settings to `language_modeling`, and the teacher
as a plain folder with the vocabulary that all that follows shares."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from limbeck.causal import build_causal, causal_folder, load_causal, save_causal
from limbeck.models import load_tokenizer, num_parameters
from limbeck.recipe import Recipe
from limbeck.recipe_task import LanguageTask
from limbeck.run import write_json
from limbeck.tasks import language_modeling
from limbeck.tasks.conversations import Encoder
from limbeck.tasks.language_modeling import CausalData, LanguageModeling
from limbeck.tasks.records import Columns, Kind, Records, read_records
from limbeck.tasks.splits import hold_out
from limbeck.tasks.task import Outline
from limbeck.trimming import choose_tokens, count_tokens, trim_model, trim_tokenizer

REMADE = "remade.json"  # in the folder of a teacher that was unpacked or trimmed
_WHERE = "recipe.teacher.model"
_SAMPLE = 500  # documents by which `plan` guesses tokens


def open_task(recipe: Recipe, folder: Path) -> LanguageModeling:
    return LanguageModeling(_spec(recipe).max_tokens, folder)


def prepare(recipe: Recipe, train: Path, test: Path | None, model: Path, folder: Path) -> None:
    """As `language_modeling.prepare`; what became of the teacher is told with the data."""
    language_modeling.prepare(_data(recipe), train, test, model, folder)
    remade = model / REMADE
    if remade.is_file():
        about = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        said = json.loads(remade.read_text(encoding="utf-8"))["said"]
        write_json(folder / "data.json", about | {"warnings": [*said, *about["warnings"]]})


def make_model(recipe: Recipe, model: Path, train: Path, folder: Path) -> None:
    """The teacher as a plain folder, if the recipe says so with the training text's tokens alone.

    Rows that are held out for a test have no say. Raises SourceError, DataError.
    """
    said = []
    if not recipe.teacher.trim_vocabulary:
        made = causal_folder(model, folder, where=_WHERE)
        assert made == folder, "nothing had to be made"
        said.append("The teacher's GGUF file was unpacked into fp32.")
    else:
        with tempfile.TemporaryDirectory(prefix="limbeck-") as aside:
            said.append(_trim(recipe, causal_folder(model, Path(aside), where=_WHERE), train,
                              folder))  # fmt: skip
    write_json(folder / REMADE, {"said": said})


def _trim(recipe: Recipe, plain: Path, train: Path, folder: Path) -> str:
    model, tokenizer = load_causal(plain, where=_WHERE), load_tokenizer(plain, where=_WHERE)
    columns = columns_of(recipe)
    records = read_records(train, columns, where="recipe.data.train")
    at = np.arange(len(records))
    if recipe.data.test is None:
        assert recipe.data.test_fraction is not None  # the recipe checked it
        _, at = hold_out(records.groups, at, recipe.data.test_fraction, recipe.seed, "test")
    counts = count_tokens(_tokens(records, at, tokenizer, columns.kind), len(tokenizer))
    trim = choose_tokens(tokenizer, counts, where=_WHERE)
    before = num_parameters(model)
    smaller = trim_model(model, trim, build_causal)
    save_causal(smaller, trim_tokenizer(tokenizer, trim, where=_WHERE), folder)
    return (
        f"The teacher's vocabulary was cut to the training text's: {len(trim.kept):,} of "
        f"{trim.vocab_size:,} tokens are left, {num_parameters(smaller):,} of {before:,} "
        "parameters. Its numbers here are of what is left."
    )


def _tokens(records: Records, at: np.ndarray, tokenizer: object, kind: Kind) -> list[np.ndarray]:
    encoder = Encoder(tokenizer, kind, where=_WHERE)  # type: ignore[arg-type]
    return [
        encoder(records.values[i], i, f"recipe.data.train, row {i + 1}").tokens
        for i in at.tolist()
    ]  # fmt: skip


def outline(recipe: Recipe, train: Path, model: Path) -> Outline:
    """From some documents: how many tokens each has."""
    task = LanguageModeling(_spec(recipe).max_tokens)
    config = task.read_config(model, where=_WHERE)
    data = _data(recipe)
    encoder = Encoder(load_tokenizer(model, where=_WHERE), data.columns.kind, where=_WHERE)
    records = read_records(train, data.columns, where="recipe.data.train")
    random = np.random.default_rng(recipe.seed)
    at = np.sort(random.permutation(len(records))[:_SAMPLE])
    pieces, _ = language_modeling.pieces_of(data, encoder, records, at, "recipe.data.train")
    rows = language_modeling.laid_out(data, pieces)
    counted = sum(int(piece.counted[1:].sum()) for piece in pieces)
    return Outline(
        task=LanguageModeling(task.max_tokens, vocab_size=config.vocab_size),
        num_rows=len(records), num_classes=config.vocab_size, rows_each=len(rows) / len(at),
        positions_each=counted / len(at),
    )  # fmt: skip


def _spec(recipe: Recipe) -> LanguageTask:
    assert isinstance(recipe.task, LanguageTask)
    return recipe.task


def columns_of(recipe: Recipe) -> Columns:
    data = recipe.data
    if data.messages is not None:
        return Columns(kind="messages", messages=data.messages, group=data.group)
    if data.prompt is not None:
        assert data.completion is not None  # the recipe checked it
        return Columns(
            kind="completion", prompt=data.prompt, completion=data.completion, group=data.group
        )
    return Columns(kind="text", text=data.text, group=data.group)


def _data(recipe: Recipe) -> CausalData:
    spec, data = _spec(recipe), recipe.data
    return CausalData(
        columns=columns_of(recipe), max_tokens=spec.max_tokens, layout=spec.layout,
        learn=spec.learn, validation_fraction=data.validation_fraction,
        test_fraction=data.test_fraction, max_train_documents=data.max_train_rows,
        max_test_documents=data.max_test_rows, seed=recipe.seed,
    )  # fmt: skip
