"""`limbeck axes`: what of a model can be made smaller, proved on its own weights; asked once."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path

from limbeck.architecture.axes import Axis, axes_from_json, axes_to_json
from limbeck.architecture.inputs import example_inputs
from limbeck.architecture.probe import find_axes
from limbeck.architecture.proof import prove_axes
from limbeck.cache import cache_folder, inventory
from limbeck.errors import AxisError, SourceError
from limbeck.models import auto_class, load_model
from limbeck.progress import Progress
from limbeck.recipe import Source
from limbeck.run import write_text
from limbeck.sources import fetch

_SEED = 0


def axes_of(model: str, progress: Progress) -> tuple[Axis, ...]:
    """Each axis of the model, proved or with the reason why not.

    Raises SourceError where it does not load, AxisError where it cannot be fed or has none.
    """
    folder = fetch(Source(uri=model), where=model, kind="model").path
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise SourceError(
            model, f"there is no config.json in {folder}", fix="name a model's folder",
            allowed="a folder with a config.json and *.safetensors of one model",
        )  # fmt: skip
    kept = cache_folder() / "axes" / f"{_fingerprint(folder)}.json"
    if kept.is_file():
        try:
            return axes_from_json(kept.read_text(encoding="utf-8"))
        except (AxisError, UnicodeDecodeError):
            progress.say(f"{kept} is damaged; looking again")
    loaded = load_model(folder, where=model)
    progress.say(f"finding the axes of a {type(loaded).__name__}")
    build = auto_class(loaded.config, where=model).from_config
    found = find_axes(loaded.config, build)
    if not found:
        raise AxisError(
            model, f"the config of a {loaded.config.model_type} names no width, depth or table",
            allowed="a model with some: timm builds its own from a name",
            fix="cut students from another one: `base` in a recipe",
        )  # fmt: skip
    progress.say(f"proving {len(found)} axes on its weights")
    inputs = example_inputs(loaded, loaded.config)
    axes = prove_axes(loaded, loaded.config, build, found, inputs, seed=_SEED)
    write_text(kept, axes_to_json(axes))
    return axes


def _fingerprint(folder: Path) -> str:
    """Of config and weights, and of the programs that read them."""
    files = {
        name: record for name, record in inventory(folder).items()
        if name == "config.json" or name.endswith(".safetensors")
    }  # fmt: skip
    programs = {name: metadata.version(name) for name in ("limbeck", "transformers")}
    return hashlib.sha256(json.dumps([files, programs]).encode()).hexdigest()
