"""`precision: auto`: what the machine is fast in, found once and then kept."""

from unittest.mock import patch

import pytest
import yaml

import limbeck
from limbeck import precision
from limbeck.recipe_file import load_recipe
from limbeck.stages import settled_recipe
from tiny_images import make_image_world
from tiny_world import Said, make_world, quickly

FAST, SLOW = {"fp32": 10.0, "bf16": 2.0}, {"fp32": 10.0, "bf16": 50.0}


def distilled(folder, found, *, asked="auto", **changes):
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["distill"]["training"]["precision"] = asked
    recipe = {**recipe, **changes}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    said = Said()
    with quickly(), patch.object(precision, "milliseconds", lambda: found):
        report = limbeck.distill(folder / "recipe.yaml", folder / "out", progress=said)
    return report, "\n".join(said.lines)


@pytest.mark.parametrize(("found", "chosen"), [(FAST, "bf16"), (SLOW, "fp32")])
def test_auto_takes_what_is_faster_and_stays_with_it(tmp_path, found, chosen):
    report, said = distilled(make_world(tmp_path), found)
    assert report.recipe["distill"]["training"]["precision"] == chosen
    assert report.recipe["teacher"]["tune"]["precision"] == "fp32", "as asked"
    assert f"precision: {chosen}, as bf16 takes" in said
    assert load_recipe(tmp_path / "out")[0].distill.training.precision == "auto"
    settled = settled_recipe(tmp_path / "out")
    assert settled.distill.training.precision == chosen, "what signals are checked in, say"
    again, said = distilled(tmp_path, SLOW if found is FAST else FAST)
    assert again.recipe["distill"]["training"]["precision"] == chosen, "another machine goes on"
    assert {"architecture: unchanged", "students/one/hf: unchanged"} <= {*said.splitlines()}


def test_bf16_that_is_slow_is_done_and_said(tmp_path):
    report, said = distilled(make_world(tmp_path), SLOW, asked="bf16")
    assert report.recipe["distill"]["training"]["precision"] == "bf16"
    assert "precision: bf16 was asked for, but bf16 takes 5 times as long as fp32" in said


def test_images_are_in_fp32(tmp_path):
    report, _ = distilled(make_image_world(tmp_path), FAST)
    assert report.recipe["distill"]["training"]["precision"] == "fp32"


def test_both_formats_are_really_timed():
    found = precision.milliseconds()
    assert found["fp32"] > 0 < found["bf16"]
    assert precision.faster(found) in found
