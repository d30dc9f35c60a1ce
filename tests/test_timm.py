"""timm's models as teachers. What needs timm is skipped where it or its torchvision is missing."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import yaml

import limbeck
from limbeck import models
from limbeck.anatomy import axes_of
from limbeck.errors import AxisError, MissingExtraError, RecipeError, SourceError
from limbeck.progress import Silent
from limbeck.recipe_task import ImageTask
from limbeck.tasks.image_classification import ImageClassification, prepare
from limbeck.tasks.image_models import other_transform
from test_images import recipe
from tiny_images import make_image_world, write_images
from tiny_world import quickly

SIZE = 32
OF_TIMM = {
    "architecture": "test_resnet", "num_classes": 3,
    "pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
}  # fmt: skip
OF_TRANSFORMERS = {"model_type": "timm_wrapper", "architecture": "test_resnet", "num_classes": 3}
CONV = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 12],
        "depths": [1, 1]}  # fmt: skip


@pytest.fixture(scope="module")
def timm():
    try:
        return importlib.import_module("timm")
    except Exception as error:  # a torchvision of another build of torch: RuntimeError
        pytest.skip(f"timm does not import: {error}")


def task(*labels: str, **changes) -> ImageClassification:
    spec = ImageTask.model_validate({"kind": "image-classification", "size": SIZE, **changes})
    return ImageClassification(labels, spec, 0)


def folder_of(path: Path, about: dict) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(about))
    return path


def saved_by_timm(timm, folder: Path, name: str = "test_resnet", **arguments):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=4, **arguments).eval()
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_args=arguments or None)
    return model


def images(count: int = 2, size: int = SIZE):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# Without timm


@pytest.mark.parametrize("about", [OF_TIMM, OF_TRANSFORMERS])
def test_a_model_of_timm_without_timm_names_the_extra(tmp_path, about):
    folder = folder_of(tmp_path, about)
    with patch.object(models, "util", SimpleNamespace(find_spec=lambda name: None)):
        with pytest.raises(MissingExtraError, match=r"teacher\.model.*timm.*limbeck\[timm\]"):
            task("a", "b", "c").read_config(folder, where="recipe.teacher.model")
        with pytest.raises(MissingExtraError, match=r"base\.config.*limbeck\[timm\]"):
            models.make_config(OF_TRANSFORMERS, where="recipe.base.config")
        with pytest.raises(MissingExtraError, match=r"limbeck\[timm\]"):
            axes_of(str(folder), Silent())


def test_a_torchvision_of_another_torch_is_named(tmp_path):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    found = SimpleNamespace(find_spec=lambda name: name)
    with (
        patch.object(models, "util", found),
        patch.object(models, "importlib", SimpleNamespace(import_module=broken)),
        pytest.raises(SourceError, match=r"torchvision::nms.*built for torch \d.*where torch came"),
    ):
        task("a").read_config(folder_of(tmp_path, OF_TIMM), where="recipe.teacher.model")


def test_what_a_folder_says_of_its_preprocessing_is_held_against_the_tasks(tmp_path):
    spec = task("a").spec
    (said,) = other_transform(folder_of(tmp_path / "timm", OF_TIMM), spec)
    assert "mean 0.485, 0.456, 0.406 (task.mean: 0.5, 0.5, 0.5) and std 0.229" in said
    assert not other_transform(folder_of(tmp_path / "other", OF_TRANSFORMERS), spec)
    for about, warned in (
        ({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.5, 0.5, 0.5]}, True),
        ({"image_mean": [0.498, 0.498, 0.498]}, False),
        ({"image_mean": [0.1], "image_std": "none"}, False),
        ({"image_mean": [0.485, 0.456, 0.406], "do_normalize": False}, False),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
        assert bool(other_transform(tmp_path, spec)) == warned


# With timm


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("test_vit", {"img_size": SIZE}), ("test_resnet", {}), ("test_efficientnet", {})],
)
def test_a_folder_that_timm_saved_gives_the_same_logits_and_features(
    tmp_path, timm, name, arguments
):
    original = saved_by_timm(timm, tmp_path / "timm", name, **arguments)
    four = task("a", "b", "c", "d")
    loaded = four.load(tmp_path / "timm", where="recipe.teacher.model").eval()
    with torch.no_grad():
        said = loaded(pixel_values=images(), output_hidden_states=True)
        assert torch.equal(said.logits, original(images()))
        states = original.forward_intermediates(images(), intermediates_only=True)
    assert len(said.hidden_states) == len(states)
    assert all(torch.equal(a, b) for a, b in zip(said.hidden_states, states, strict=True))
    four.save(loaded, tmp_path / "timm", tmp_path / "saved")
    again = four.load(tmp_path / "saved", where="x").eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=images()).logits, said.logits)
    assert four.own_labels(tmp_path / "saved", where="x") == ("a", "b", "c", "d")


def test_other_labels_get_a_head_of_their_own_and_are_saved_with_it(tmp_path, timm):
    original = saved_by_timm(timm, tmp_path / "timm")
    about = json.loads((tmp_path / "timm/config.json").read_text())
    names = {"label_names": ["p", "q", "r", "s"]}
    (tmp_path / "timm/config.json").write_text(json.dumps(about | names))
    two = task("yes", "no")
    assert two.own_labels(tmp_path / "timm", where="x") == ("p", "q", "r", "s")
    loaded = two.load(tmp_path / "timm", where="recipe.teacher.model").eval()
    with torch.no_grad():
        assert loaded(pixel_values=images()).logits.shape == (2, 2)
        body = loaded.timm_model.forward_features(images())
        assert torch.equal(body, original.forward_features(images()))
    two.save(loaded, tmp_path / "timm", tmp_path / "saved")
    assert two.own_labels(tmp_path / "saved", where="x") == ("yes", "no")
    config = two.read_config(tmp_path / "saved", where="x")
    assert config.num_labels == 2 and config.id2label == {0: "yes", 1: "no"}


def test_weights_of_another_model_are_refused(tmp_path, timm):
    saved_by_timm(timm, tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | {"architecture": "test_vit"}))
    with pytest.raises(SourceError, match=r"lacks \d+ weights"):
        task("a", "b").load(tmp_path, where="recipe.teacher.model")
    (tmp_path / "config.json").write_text(json.dumps(about | {"architecture": "no_such_net"}))
    with pytest.raises(SourceError, match="no_such_net"):
        task("a", "b").load(tmp_path, where="recipe.teacher.model")


def test_images_of_another_size_or_other_channels_are_refused_by_name(tmp_path, timm):
    saved_by_timm(timm, tmp_path / "model", "test_vit")  # of 160 pixels
    pictures = write_images(tmp_path / "pictures", each=10)
    for changes, said in (({"size": SIZE}, "32 pixels"), ({"size": 160}, "grey images")):
        asked = recipe({"channels": "grey", **changes})
        asked = asked.model_copy(update={"teacher": asked.teacher.model_copy(
            update={"config": None, "model": SimpleNamespace(uri="model")})})  # fmt: skip
        with pytest.raises(RecipeError, match=rf"teacher\.model: it does not take .*{said}"):
            prepare(asked, pictures, None, tmp_path / "model", tmp_path)


def test_its_axes_are_not_found(tmp_path, timm):
    saved_by_timm(timm, tmp_path)
    with pytest.raises(AxisError, match="base"):
        axes_of(str(tmp_path), Silent())


def test_a_model_of_timm_teaches_a_net_of_another_family(tmp_path, timm):
    training = {"epochs": 2, "batch_size": 32, "learning_rate": 1e-2}
    folder = make_image_world(
        tmp_path,
        task={"kind": "image-classification", "size": SIZE, "convert": True},
        data={"train": "pictures", "test_fraction": 0.25, "max_train_rows": 90},
        teacher={"model": "model", "tune": {**training, "learning_rate": 3e-3}},
        base={"config": CONV}, evidence={"baselines": "none"},
        distill={"training": training, "embedding": {"loss": "cosine"},
                 "hidden": {"loss": "cosine", "layers": "last"}},
        export={"formats": ["hf"], "primary": "hf"},
    )  # fmt: skip
    saved_by_timm(timm, folder / "model")
    with quickly():
        report = limbeck.distill(folder / "recipe.yaml", folder / "out")
    (student,) = report.students
    assert report.teacher.main.quality.value > 0.5 and student.main.quality.value > 0.4
    points = report.training["one"]
    assert points[-1].terms["embedding"] < points[0].terms["embedding"]
    asked = yaml.safe_load((folder / "recipe.yaml").read_text())
    del asked["base"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(asked))
    with quickly(), pytest.raises(RecipeError, match=r"recipe\.base"):
        limbeck.distill(folder / "recipe.yaml", folder / "none")
