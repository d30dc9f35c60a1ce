"""From YAML to a `Recipe` and back, with errors that say where, what, what is allowed, what to do.

A recipe file is data: tags that construct objects, anchors (the stuff of YAML bombs), repeated
keys and oversized files are refused. Built-in recipes lie in `limbeck/recipes/`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from limbeck.errors import RecipeError
from limbeck.recipe import Recipe, Source
from limbeck.recipe_task import KINDS, OWN, TASKS, kinds

BUILT_IN = Path(__file__).parent / "recipes"
_MAX_BYTES = 1_000_000  # a recipe is some hundred lines
_MAX_DEPTH = 20
_SETTINGS = "settings, one `name: value` a line"
_START = "`limbeck recipes show quickstart` prints a recipe to start from"
_HUB_ID = r"\w[\w.-]*/\w[\w.-]*(@\S+)?"  # what is no path may be one; `sources` says exactly

_TAGS = (*KINDS, OWN)  # which of the tasks pydantic took: no step of a setting's path
RECIPE = "recipe.yaml"  # in a run's folder


def built_in_recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(BUILT_IN.glob("*.yaml"))}


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Path]:
    """A recipe by built-in name or file, with `a.b=c` overrides; and the folder it lies in."""
    path = _find(recipe)
    data = _parse(_read(path), where=str(recipe))
    for override in overrides:
        _override(data, override)
    return validate(data), path.resolve().parent


def validate(data: Any) -> Recipe:
    """Raises RecipeError for the first thing wrong, in the words of the recipe."""
    if not isinstance(data, Mapping):
        raise RecipeError("recipe", f"{_show(data)}", allowed=_SETTINGS, fix=_START)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _explain(error) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe, every default written out, as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def rebase(recipe: Recipe, base: Path) -> Recipe:
    """The same recipe with local paths made absolute, so that it means the same from anywhere."""

    def absolute(source: Source | None, *, hub_id: bool = False) -> Source | None:
        if source is None or "://" in source.uri:
            return source
        try:
            path = base / Path(source.uri).expanduser()
        except RuntimeError:  # ~ of an unknown user: `fetch` says so
            return source
        if hub_id and re.fullmatch(_HUB_ID, source.uri) and not path.exists():
            return source
        return source.model_copy(update={"uri": str(path.resolve())})

    data = recipe.data.model_copy(
        update={"train": absolute(recipe.data.train), "test": absolute(recipe.data.test)}
    )
    estimator = recipe.teacher.estimator
    if estimator is not None:
        estimator = estimator.model_copy(update={"model": absolute(estimator.model)})
    teacher = recipe.teacher.model_copy(
        update={"model": absolute(recipe.teacher.model, hub_id=True), "estimator": estimator}
    )
    other = recipe.base and recipe.base.model_copy(
        update={"model": absolute(recipe.base.model, hub_id=True)}
    )
    measure, asked = recipe.measure, recipe.measure.benchmarks
    if asked is not None:
        asked = asked.model_copy(update={"folder": absolute(asked.folder)})
        measure = measure.model_copy(update={"benchmarks": asked})
    return recipe.model_copy(
        update={"data": data, "teacher": teacher, "base": other, "measure": measure}
    )


def fingerprint(*values: Any) -> str:
    """sha256 over canonical JSON; pydantic models and paths included."""

    def plain(value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value.model_dump(mode="json")
        raise TypeError(f"cannot fingerprint {type(value).__name__}")

    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Any, new: Any, where: str = "") -> Iterable[tuple[str, Any, Any]]:
    """Every setting in which two dumped recipes differ: (path, old, new)."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            path = f"{where}.{key}" if where else str(key)
            yield from differences(old.get(key), new.get(key), path)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from differences(left, right, f"{where}[{i}]")
    elif old != new:
        yield where, old, new


def _find(recipe: str | Path) -> Path:
    built_in = built_in_recipes()
    if str(recipe) in built_in:
        return built_in[str(recipe)]
    path = Path(recipe).expanduser()
    if path.is_dir():
        path = path / RECIPE
    if path.is_file():
        return path
    close = difflib.get_close_matches(str(recipe), built_in, 1)
    fix = f"did you mean {close[0]!r}?" if close else "`limbeck recipes` lists the built-in ones"
    raise RecipeError(
        str(recipe), "no such file, run folder or built-in recipe",
        allowed=f"a file, a run folder, or {', '.join(built_in)}", fix=fix,
    )  # fmt: skip


def _read(path: Path) -> str:
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise RecipeError(
            str(path),
            f"{size:,} bytes are too many for a recipe",
            allowed=f"at most {_MAX_BYTES:,}",
            fix=_START,
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(
            str(path), f"not UTF-8 text at byte {error.start}", allowed="UTF-8",
            fix="save it as UTF-8",
        ) from None  # fmt: skip


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses anchors and repeated keys as well as tags."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases are not allowed in a recipe", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r}: a setting's name must be text", key.start_mark
                )
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} is set twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        depth, deepest = 0, 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.events.CollectionStartEvent)
            depth -= isinstance(event, yaml.events.CollectionEndEvent)
            deepest = max(deepest, depth)
            if deepest > _MAX_DEPTH:
                raise RecipeError(
                    where, "nested too deeply", allowed=f"at most {_MAX_DEPTH} levels", fix=_START
                )
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}" if mark else "somewhere"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(
            f"{where}, {line}", problem, allowed="plain YAML: text, numbers, lists, settings",
            fix=_START,
        ) from None  # fmt: skip
    if not isinstance(data, dict):
        raise RecipeError(where, f"{_show(data)}", allowed=_SETTINGS, fix=_START)
    return data


def _override(data: dict[str, Any], override: str) -> None:
    """`--set students.small.budget.params=3000000`; a list's entry by number or by its name."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(
            f"--set {override}", "no '='", allowed="--set a.b=value", fix="add =VALUE"
        )
    keys = path.split(".")
    here: Any = data
    for i, key in enumerate(keys[:-1]):
        if isinstance(here, list):
            here = here[_index(here, key, path)]
            continue
        if isinstance(here.get(key), str) and "://" in here[key]:
            here[key] = {"uri": here[key]}  # a source written short
        following = here.setdefault(key, {})
        if following is None:
            following = here[key] = {}
        if not isinstance(following, dict | list):
            raise RecipeError(
                f"--set {path}", f"{'.'.join(keys[: i + 1])} is {_show(following)}, not settings",
                allowed=".".join(keys[: i + 1]), fix="set that, or give it settings in the recipe",
            )  # fmt: skip
        here = following
    value = next(iter(_parse(f"value: {text}", f"--set {path}").values()))
    if isinstance(here, list):
        here[_index(here, keys[-1], path)] = value
    else:
        here[keys[-1]] = value


def _index(entries: list[Any], key: str, path: str) -> int:
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in entries]
    if key in names:
        return names.index(key)
    if key.isdigit() and int(key) < len(entries):
        return int(key)
    known = ", ".join(str(name) for name in names if name)
    raise RecipeError(
        f"--set {path}", f"no entry {key!r}", allowed=f"its number or one of: {known}",
        fix="add it to the recipe first",
    )  # fmt: skip


def _explain(error: ValidationError) -> RecipeError:
    first = error.errors(include_url=False)[0]
    steps: list[str | int] = list(first["loc"])
    where, found = _path(steps), _show(first["input"])
    typed = ".".join(str(step) for step in steps if step not in _TAGS)
    change = f"change it in the recipe, or with --set {typed}=VALUE"
    match first["type"]:
        case "union_tag_invalid" | "union_tag_not_found":
            tag = first["ctx"].get("tag")
            return RecipeError(
                f"{where}.kind", "missing" if tag is None else f"{_show(tag)} is not allowed",
                allowed=", ".join(kinds()), fix="name one of them",
            )  # fmt: skip
        case "extra_forbidden":
            known = _settings_at(steps[:-1])
            close = difflib.get_close_matches(str(steps[-1]), known, 1)
            fix = f"did you mean {close[0]!r}?" if close else "remove it"
            return RecipeError(where, "no such setting", allowed=", ".join(known), fix=fix)
        case "missing":
            means = _meaning(steps)
            return RecipeError(where, "missing", allowed=means, fix="add it")
        case "value_error":
            found, _, allowed = str(first["ctx"]["error"]).partition(": ")
            return RecipeError(where, found, allowed=allowed, fix="change the recipe, or use --set")
        case "model_type" | "model_attributes_type":
            known = _settings_at(steps)
            allowed = f"settings: {', '.join(known)}"
            return RecipeError(where, f"{found} is not allowed", allowed=allowed, fix=change)
        case "tuple_type":
            return RecipeError(where, f"{found} is not allowed", allowed="a list", fix=change)
        case "string_pattern_mismatch":
            allowed = f"text like {first['ctx']['pattern']}"
            return RecipeError(where, f"{found} is not allowed", allowed=allowed, fix=change)
        case _:
            allowed = first["msg"][0].lower() + first["msg"][1:]
            return RecipeError(where, f"{found} is not allowed", allowed=allowed, fix=change)


def _meaning(steps: Sequence[str | int]) -> str:
    """The first sentence of the setting's own documentation."""
    text = _model_at(steps[:-1]).model_fields[str(steps[-1])].description or ""
    return " ".join(text.split(". ")[0].split()).rstrip(".")


def _settings_at(steps: Sequence[str | int]) -> list[str]:
    return list(_model_at(steps).model_fields)


def _model_at(steps: Sequence[str | int]) -> type[BaseModel]:
    model: Any = Recipe
    for step in steps:
        if isinstance(step, int):
            continue
        if step in KINDS:  # pydantic says which of the tasks it took
            model = TASKS[KINDS.index(step)]
            continue
        annotation = model.model_fields[step].annotation
        candidates = [annotation, *get_args(annotation)]
        candidates += [inner for outer in candidates for inner in get_args(outer)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return model


def _path(steps: Sequence[str | int]) -> str:
    text = "recipe"
    for step in steps:
        if step in _TAGS:
            continue
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
