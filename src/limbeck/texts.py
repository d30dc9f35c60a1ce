"""Teacher and students write to prompts of the test rows; what they write is held against what
stands there.

Stages of the pipeline like those in `stages`; imported only when one really runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from limbeck._startup import prepare_torch
from limbeck.answers import load_file
from limbeck.device import compute_device, on_device, rows_at_once
from limbeck.errors import RecipeError
from limbeck.generating import Completions, Sampling, end_ids, generate
from limbeck.measure_language import chrf, exact_match, mean, rouge_l
from limbeck.models import load_tokenizer
from limbeck.onnx_decoder import OnnxCausal
from limbeck.progress import Progress
from limbeck.recipe import Recipe
from limbeck.recipe_measure import PROMPT_TOKENS, GenerateSpec
from limbeck.run import read_json, write_json
from limbeck.stages import base_config
from limbeck.tasks.conversations import Encoder
from limbeck.tasks.language_recipe import columns_of, open_task
from limbeck.tasks.prompts import Prompt, prompt_of
from limbeck.tasks.records import read_records

_TOGETHER = 16  # prompts that share a forward, as in `on_policy`
_PROMPTS = "prompts.json"

prepare_torch()


def choose(
    folder: Path, recipe: Recipe, source: Path, data: Path, own: Path, teacher: Path,
    base: Path | None,
) -> None:  # fmt: skip
    """Some test documents as prompts and references. `source` is the file that holds them, `own`
    the data in the students' tokens.

    Raises RecipeError where no prompt leaves room for an answer.
    """
    spec = _spec(recipe)
    where = "recipe.data.train" if recipe.data.test is None else "recipe.data.test"
    columns = columns_of(recipe)
    records = read_records(source, columns, where=where)
    encoders = [Encoder(load_tokenizer(teacher, where=where), columns.kind, where=where)]
    if recipe.of_another_tokenizer:
        assert base is not None  # the recipe checked it
        encoders.append(Encoder(load_tokenizer(base, where=where), columns.kind, where=where))
    drawn = _drawn(recipe, data, spec.rows)
    found = [
        prompt_of(
            records.values[i], i, encoders[0], encoders[-1],
            first_tokens=spec.prompt_tokens or PROMPT_TOKENS, max_new_tokens=spec.max_new_tokens,
            at=f"{where}, row {i + 1}",
        )
        for i in drawn
    ]  # fmt: skip
    context = _context(recipe, data, own, teacher, base)
    whole = [prompt for prompt in found if prompt is not None]
    fits = [p for p in whole if _fits(p, spec.max_new_tokens, context)]
    if not fits:
        raise RecipeError(
            "recipe.measure.generate.max_new_tokens",
            f"{spec.max_new_tokens}, behind prompts of {_lengths(whole)} tokens",
            allowed=f"what leaves room for a prompt in a context of {context}" if whole
            else "documents that have something behind their prompt",
            fix="set fewer, or shorten the prompts",
        )  # fmt: skip
    notes = _notes(len(drawn), whole, fits, spec.max_new_tokens, context, encoders[0])
    ends = [read_json(at / "data.json")["end_id"] for at in (data, own)]
    write_json(
        folder / _PROMPTS,
        {"notes": notes, "ends": ends, "prompts": [asdict(prompt) for prompt in fits]},
    )


def _spec(recipe: Recipe) -> GenerateSpec:
    assert recipe.measure.generate is not None
    return recipe.measure.generate


def _drawn(recipe: Recipe, data: Path, rows: int) -> list[int]:
    """Numbers of test documents in their file, ascending."""
    known = np.unique(np.concatenate(open_task(recipe, data).rows("test").documents))
    order = np.random.default_rng(recipe.seed).permutation(len(known))
    return np.sort(known[order[:rows]]).tolist()


def _context(recipe: Recipe, data: Path, own: Path, teacher: Path, base: Path | None) -> int | None:
    """The shorter one of the teacher's and the students'."""
    configs = [open_task(recipe, data).read_config(teacher, where="recipe.teacher.model")]
    if recipe.base is not None:
        configs.append(base_config(recipe, open_task(recipe, own), teacher, base))
    known = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min((context for context in known if context is not None), default=None)


def _fits(prompt: Prompt, more: int, context: int | None) -> bool:
    longest = max(len(prompt.tokens), len(prompt.own))
    return context is None or longest + more <= context


def _lengths(prompts: list[Prompt]) -> str:
    lengths = [len(prompt.tokens) for prompt in prompts]
    return f"{min(lengths)} to {max(lengths)}" if lengths else "no"


def _notes(
    drawn: int, whole: list[Prompt], fits: list[Prompt], more: int, context: int | None,
    encoder: Encoder,
) -> list[str]:  # fmt: skip
    notes = []
    if bare := drawn - len(whole):
        notes.append(f"{bare} of {drawn} test documents are left out: nothing stands before or "
                     "behind the border of prompt and answer.")  # fmt: skip
    if long := len(whole) - len(fits):
        notes.append(f"{long} of {drawn} prompts are left out: they leave no room for {more} "
                     f"tokens in a context of {context}.")  # fmt: skip
    # with the end token: of plain text a reference is never longer
    lengths = [len(encoder.tokenizer(p.reference, add_special_tokens=False)["input_ids"]) + 1
               for p in fits if encoder.kind != "text"]  # fmt: skip
    if cut := sum(length > more for length in lengths):
        notes.append(f"{cut} of {len(fits)} references have more than {more} tokens, so that no "
                     "text can be the same.")  # fmt: skip
    return notes


def write(
    folder: Path, recipe: Recipe, path: Path, format: str, prompts: Path, name: str,
    progress: Progress, *, of_teacher: bool,
) -> None:  # fmt: skip
    """Of an exported file, what it writes, the likeliest token each time, and what that is worth.

    A GGUF file is read back, its weights as they are stored; an ONNX file writes in ONNX Runtime,
    with its cache.
    """
    known = read_json(prompts / _PROMPTS)
    found = [Prompt(**entry) for entry in known["prompts"]]
    hf = path if format == "hf" else path.parent.parent / "hf"
    model: Any = (
        OnnxCausal(path, hf) if format.startswith("onnx")
        else load_file(path, format).to(compute_device())
    )  # fmt: skip
    tokenizer: Any = load_tokenizer(hf, where=str(hf))
    tokens = [p.tokens if of_teacher else p.own for p in found]
    ends = {known["ends"][0 if of_teacher else 1], *end_ids(model)}
    sampling = Sampling(max_new_tokens=_spec(recipe).max_new_tokens, sampling_temperature=0)
    said: dict[int, tuple[str, bool]] = {}
    with progress.bar(f"{name} writes", len(tokens), "texts") as bar:
        for at, done in _written(model, tokens, sampling, tuple(ends)):
            for i, ids, ended in zip(at, done.tokens, done.ended, strict=True):
                text = tokenizer.decode(
                    ids[: len(ids) - bool(ended)].tolist(), skip_special_tokens=True,
                    clean_up_tokenization_spaces=False,
                )  # fmt: skip
                said[i] = text, bool(ended)
            bar.advance(len(at))
    texts = [said[i][0] for i in range(len(found))]
    references = [p.reference for p in found]
    overlap = rouge_l(texts, references)
    scores = {
        "exact_match": asdict(mean(exact_match(texts, references), seed=0)),
        "rouge_l": asdict(mean(overlap, seed=0)),
        "chrf": asdict(chrf(texts, references, seed=0)),
        "ended": sum(ended for _, ended in said.values()) / len(said),
    }
    written = [
        {"text": text, "ended": said[i][1], "rouge_l": float(overlap[i])}
        for i, text in enumerate(texts)
    ]
    write_json(folder / "texts.json", {"scores": scores, "written": written})


def _written(
    model: Any, prompts: list[tuple[int, ...]], sampling: Sampling, ends: tuple[int, ...]
) -> Iterator[tuple[list[int], Completions]]:
    """Some prompts' places and completions at a time, on each core those of like length."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    most = rows_at_once(_TOGETHER)
    groups = [order[at : at + most] for at in range(0, len(order), most)]

    def one(group: list[int]) -> Completions:
        return generate(
            model, [prompts[i] for i in group], sampling, ends=ends, batch_size=most
        )

    yield from zip(groups, on_device(one, groups), strict=True)
