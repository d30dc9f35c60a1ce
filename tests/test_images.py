"""Images: where they come from, what is refused and how, and views that follow from their keys."""

import base64
import gzip
import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from limbeck.errors import DataError, RecipeError, SourceError
from limbeck.models import make_config
from limbeck.partings import partings
from limbeck.recipe import Recipe
from limbeck.recipe_file import validate
from limbeck.recipe_task import AugmentSpec, ImageTask
from limbeck.run import read_json, write_json
from limbeck.tasks.image_classification import ImageClassification, Rows, open_task, prepare
from limbeck.tasks.image_files import read_idx, read_images
from limbeck.tasks.images import (
    augmented,
    drawn,
    inputs_of,
    pixels_of,
    png,
    reduced,
    tensor_of,
    transform,
)
from limbeck.tasks.task import AllViews
from tiny_images import RESNET, pattern, write_images


def recipe(task: dict | None = None, **data) -> Recipe:
    return validate(
        {
            "name": "tiny",
            "task": {"kind": "image-classification", "size": 16, "channels": "grey"} | (task or {}),
            "data": {"train": "unused", "test_fraction": 0.25} | data,
            "teacher": {"config": RESNET, "tune": {"epochs": 1, "learning_rate": 1e-3}},
            "distill": {"training": {"epochs": 1, "learning_rate": 1e-3}},
            "students": [{"name": "one", "budget": {"params": 1}}],
        }
    )


def prepared(folder: Path, source: Path, asked: Recipe, config: dict = RESNET):
    (folder / "config").mkdir(exist_ok=True)
    write_json(folder / "config/config.json", config)
    (folder / "data").mkdir(exist_ok=True)
    prepare(asked, source, None, folder / "config", folder / "data")
    return open_task(asked, folder / "data"), read_json(folder / "data/data.json")


@pytest.fixture
def pictures(tmp_path) -> Path:
    return write_images(tmp_path / "pictures", each=20)


def encoded(array: np.ndarray, format: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format)
    return file.getvalue()


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


# Sources


def test_a_folder_of_folders_its_pixels_and_its_classes(pictures, tmp_path):
    task, about = prepared(tmp_path, pictures, recipe())
    assert about["labels"] == ["kind 0", "kind 1", "kind 2"]
    files = sorted(pictures.rglob("*.png"))
    seen = set()
    for split in ("train", "validation", "test"):
        rows = task.rows(split)
        assert about["rows"][split] == len(rows)
        for place, label, pixels in zip(rows.places, rows.labels, rows.pixels, strict=True):
            assert about["labels"][label] == files[place].parent.name
            assert np.array_equal(pixels[..., 0], np.asarray(Image.open(files[place])))
        seen |= {*rows.places.tolist()}
    assert seen == {*range(60)}, "each image in one split"


def test_parquet_gives_the_same_rows_as_files_in_both_of_its_forms(pictures, tmp_path):
    files = sorted(pictures.rglob("*.png"))
    content, labels = [f.read_bytes() for f in files], [f.parent.name for f in files]
    of_files = prepared(tmp_path, pictures, recipe())[0].rows("train")
    for name, column in (
        ("plain", content), ("hub", [{"bytes": c, "path": "x.png"} for c in content])
    ):  # fmt: skip
        pq.write_table(pa.table({"image": column, "kind": labels}), tmp_path / f"{name}.parquet")
        asked = recipe(label="kind")
        rows = prepared(tmp_path, tmp_path / f"{name}.parquet", asked)[0].rows("train")
        assert np.array_equal(rows.pixels, of_files.pixels)
        assert np.array_equal(rows.labels, of_files.labels)


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_by_their_folder_or_by_name(tmp_path, packed):
    images = np.stack([pattern(i % 3, i) for i in range(30)])
    labels = np.arange(30, dtype=np.uint8) % 3
    for start, part in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(array[part])
            name = f"{start}-{kind}-ubyte" + (".gz" if packed else "")
            (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    spec = recipe(label_names=["across", "down", "middle"]).data
    train, test = (read_images(tmp_path, spec, part=part) for part in ("train", "test"))
    assert np.array_equal(train.contents, images[:20]) and train.labels[:2] == ["across", "down"]
    assert np.array_equal(test.contents, images[20:]) and len(test.labels) == 10
    by_name = tmp_path / ("t10k-images-idx3-ubyte" + (".gz" if packed else ""))
    assert np.array_equal(read_images(by_name, spec, part="train").contents, images[20:])
    with pytest.raises(DataError, match=r"label 2 has no name; allowed: 0 to 1"):
        read_images(tmp_path, recipe(label_names=["a", "b"]).data, part="train")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c[:-5], "says that it has 480 values, and has 475"),
        (lambda c: c + b"x", "says that it has 480 values, and has more"),
        (lambda c: b"PK" + c[2:], "begins with 50 4b"),
        (lambda c: b"", "begins with nothing"),
    ],
)
def test_an_idx_file_that_is_not_whole_is_refused(tmp_path, change, said):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(change(idx(np.zeros((30, 4, 4), np.uint8))))
    with pytest.raises(DataError, match=f"train-images-idx3-ubyte {said}"):
        read_idx(path, 3, "recipe.data.train")
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(bytes(range(256)) * 9)[:-9])
    with pytest.raises(DataError, match=r"cut\.gz"):
        read_idx(cut, 3, "recipe.data.train")


def test_a_packed_idx_file_gives_no_more_than_it_says(tmp_path):
    bomb = tmp_path / "bomb.gz"
    bomb.write_bytes(gzip.compress(idx(np.zeros((1, 2, 2), np.uint8)) + bytes(50_000_000)))
    with pytest.raises(DataError, match="says that it has 4 values, and has more"):
        read_idx(bomb, 3, "recipe.data.train")


def test_labels_and_images_of_unequal_number(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((3, 4, 4), np.uint8)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(2, np.uint8)))
    with pytest.raises(DataError, match="3 images and 2 labels"):
        read_images(tmp_path, recipe().data, part="train")


# What is refused


def test_an_empty_class_folder_is_named(pictures):
    (pictures / "kind 9").mkdir()
    (pictures / "kind 9" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"recipe\.data\.train: .*kind 9 holds no image.*\.jpg"):
        read_images(pictures, recipe().data, part="train")


def test_what_programs_leave_behind_is_no_class_and_other_files_are_told_of(pictures, tmp_path):
    for name in (".ipynb_checkpoints/x.png", "__MACOSX/._x.png", "kind 0/.DS_Store"):
        (pictures / name).parent.mkdir(exist_ok=True)
        (pictures / name).write_bytes(b"no image")
    (pictures / "kind 0/IMG_1.HEIC").write_bytes(b"no image that Pillow reads")
    _, about = prepared(tmp_path, pictures, recipe())
    assert about["labels"] == ["kind 0", "kind 1", "kind 2"] and sum(about["rows"].values()) == 60
    (said,) = about["warnings"]
    assert said.startswith("Passed over") and said.endswith(": kind 0/IMG_1.HEIC.")


def test_a_folder_that_is_split_already_is_no_folder_of_classes(tmp_path):
    for part in ("train", "test", "val"):
        write_images(tmp_path / "all" / part, each=2)
    with pytest.raises(DataError, match=r"has test and train and val in it.*as data\.train"):
        read_images(tmp_path / "all", recipe().data, part="train")
    assert len(read_images(tmp_path / "all/val", recipe().data, part="test").labels) == 6


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "vit", "hidden_size": 8, "num_attention_heads": 2}, "grey images of 16"),
        ({**RESNET, "num_channels": 3}, "grey images of 16 pixels.*num_channels"),
    ],
)
def test_a_base_that_does_not_take_the_images_is_refused(config, said):
    made = make_config(config, where="recipe.base.config")
    task = ImageClassification(("a", "b"), recipe().task, 0)
    with pytest.raises(RecipeError, match=rf"recipe\.base\.config: it does not take {said}"):
        task.adapt(made, where="recipe.base.config")


def test_a_damaged_image_is_named_and_left_out_only_on_demand(pictures, tmp_path):
    damaged = pictures / "kind 1" / "007.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(DataError, match=r"kind 1/007\.png: does not decode.*unreadable: skip"):
        prepared(tmp_path, pictures, recipe())
    task, about = prepared(tmp_path, pictures, recipe({"unreadable": "skip"}))
    assert sum(about["rows"].values()) == 59
    assert [w for w in about["warnings"] if w.startswith("1 damaged images were left out: kind 1/")]
    splits = [task.rows(split) for split in ("train", "validation", "test")]
    assert 27 not in {place for rows in splits for place in rows.places.tolist()}


def test_of_ten_thousand_images_the_damaged_one_is_named_and_the_others_are_kept(tmp_path):
    kinds = [encoded(pattern(label, 0)) for label in range(3)]
    content = [kinds[i % 3] for i in range(10_000)]
    ways = {7_000: kinds[1][:-30], 7_003: b"GIF89a", 7_006: kinds[1].replace(b"IDAT", b"IDOT")}
    for row, damaged in ways.items():
        content[row] = damaged
    labels = [str(i % 3) for i in range(10_000)]
    path = tmp_path / "many.parquet"
    pq.write_table(pa.table({"image": content, "label": labels}), path)
    with pytest.raises(DataError, match=r"recipe\.data\.train, row 7,?00[147]: does not decode"):
        prepared(tmp_path, path, recipe())
    task, about = prepared(tmp_path, path, recipe({"unreadable": "skip"}))
    assert sum(about["rows"].values()) == 9_997
    (warning,) = (w for w in about["warnings"] if "damaged" in w)
    assert warning.startswith("3 damaged images were left out: ")
    assert {*re.findall(r"row (\d+) \(", warning)} == {"7001", "7004", "7007"}
    kept = np.concatenate([task.rows(s).places for s in ("train", "validation", "test")])
    assert {*range(10_000)} - {*kept.tolist()} == {*ways}


def test_more_damaged_images_than_can_be_named_are_counted(pictures, tmp_path):
    for i in range(8):
        (pictures / "kind 1" / f"{i:03}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    _, about = prepared(tmp_path, pictures, recipe({"unreadable": "skip"}))
    (warning,) = (w for w in about["warnings"] if "damaged" in w)
    assert warning.startswith("8 damaged images") and warning.count(".png") == 5
    assert warning.endswith("; and 3 more.")
    for file in (pictures / "kind 1").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match="none of the images of kind 1 decodes"):
        prepared(tmp_path, pictures, recipe({"unreadable": "skip"}))


@pytest.mark.parametrize(
    ("array", "channels", "said"),
    [
        (np.zeros((16, 16), np.uint8), "rgb", "grey; allowed: colour"),
        (np.zeros((16, 16, 3), np.uint8), "grey", "colour; allowed: grey"),
        (np.zeros((16, 16, 4), np.uint8), "rgb", "colour and transparency; allowed: colour"),
    ],
)
def test_other_channels_are_named_and_converted_only_on_demand(array, channels, said):
    task = recipe({"channels": channels}).task
    with pytest.raises(DataError, match=f"^one.png: an image.*{said}.*task.convert: true"):
        pixels_of(encoded(array), task, "one.png")
    task = recipe({"channels": channels, "convert": True}).task
    pixels, converted = pixels_of(encoded(array), task, "one.png")
    assert converted and pixels.shape == (16, 16, 1 if channels == "grey" else 3)


def test_grey_among_colour_is_counted_in_the_report(tmp_path):
    folder = tmp_path / "mixed"
    for label in range(2):
        (folder / f"{label}").mkdir(parents=True)
        for i in range(12):
            image = np.repeat(pattern(label, i)[..., None], 3, 2)
            image = image[..., 0] if i == 3 else image
            (folder / f"{label}" / f"{i:02}.png").write_bytes(encoded(image))
    asked = {"channels": "rgb"}
    colour = {**RESNET, "num_channels": 3}
    with pytest.raises(DataError, match=r"0/03\.png: an image of grey|1/03\.png"):
        prepared(tmp_path, folder, recipe(asked), colour)
    _, about = prepared(tmp_path, folder, recipe({**asked, "convert": True}), colour)
    assert "2 images had other channels and were converted." in about["warnings"]


def test_what_is_transparent_becomes_black():
    image = np.full((16, 16, 4), 200, np.uint8)
    image[8:, :, 3] = 255
    image[:8, :, 3] = 0
    pixels, _ = pixels_of(encoded(image), recipe({"channels": "rgb", "convert": True}).task, "x")
    assert (pixels[:8] == 0).all() and (pixels[8:] == 200).all()


def test_sixteen_bits_a_channel_are_refused_whatever_the_recipe_says():
    deep = encoded(np.full((16, 16), 40_000, np.uint16))
    with pytest.raises(DataError, match=r"mode I;16, not bytes; allowed: 8 bits"):
        pixels_of(deep, recipe({"convert": True}).task, "deep.png")


def test_a_bomb_is_refused_before_it_is_unpacked(pictures, tmp_path):
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">2I5B", 60_000, 60_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**7)))
    (pictures / "kind 0" / "000.png").write_bytes(bomb)
    with pytest.raises(DataError, match=r"kind 0/000\.png: does not decode.*pixels"):
        prepared(tmp_path, pictures, recipe())
    _, about = prepared(tmp_path, pictures, recipe({"unreadable": "skip"}))
    assert sum(about["rows"].values()) == 59
    assert any("1 damaged images were left out: kind 0/000.png" in w for w in about["warnings"])


def test_a_file_is_taken_for_none_but_the_common_kinds_of_image(pictures, tmp_path):
    (pictures / "kind 0" / "000.png").write_bytes(encoded(pattern(0, 0), "pcx"))
    with pytest.raises(DataError, match="cannot identify image file;"):
        prepared(tmp_path, pictures, recipe())


def test_a_model_that_does_not_take_such_images_is_refused_at_once(pictures, tmp_path):
    with pytest.raises(RecipeError, match=r"teacher\.config: it does not take grey images of 16"):
        prepared(tmp_path, pictures, recipe(), {**RESNET, "num_channels": 3})
    vit = {"model_type": "vit", "image_size": 32, "patch_size": 8, "num_channels": 1,
           "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
    with pytest.raises(RecipeError, match=r"images of 16 pixels: .*16"):
        prepared(tmp_path, pictures, recipe(), vit)
    with pytest.raises(SourceError, match="'bert', which classifies no images"):
        prepared(tmp_path, pictures, recipe(), {"model_type": "bert"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"text": "body"}}, "`data.text` has no effect for image-classification"),
        ({"evidence": {"linear": True}}, "`evidence.linear` is a model on words"),
        ({"teacher": {"config": RESNET}}, "`config` alone knows nothing; allowed: add `tune`"),
        (
            {"teacher": {"tune": {"epochs": 1, "learning_rate": 0.1}}},
            "either `model`, `config` or `estimator`",
        ),
        ({"task": {"mean": [0.1, 0.2]}}, "`mean` has 2 values; allowed: 1"),
        ({"task": {"augment": {"views": 4}}}, "`augment` draws nothing"),
        ({"task": {"augment": {"shift": 16}}}, "out of sight"),
        ({"task": {"max_tokens": 16}}, "recipe.task.max_tokens: no such setting"),
        ({"task": {"kind": "poetry"}}, r"recipe.task.kind: 'poetry' is not allowed; allowed: text"),
        (
            {"task": {"augment": {"mixup": 0.2}}, "distill": {"divergence": "dkd"}},
            "dkd` parts one label",
        ),
        (
            {
                "distill": {
                    "hard_weight": 0,
                    "training": {"epochs": 1, "learning_rate": 0.1, "label_smoothing": 0.1},
                }
            },
            "label_smoothing` has no effect",
        ),
    ],
)
def test_settings_without_an_effect_on_images_are_refused(change, said):
    data = recipe().model_dump(mode="json")
    for part, settings in change.items():
        data[part] = settings if part == "teacher" else data[part] | settings
    with pytest.raises(RecipeError, match=said):
        validate(data)


# From an image to a tensor


def test_crop_keeps_the_middle_and_stretch_keeps_all():
    wide = np.zeros((16, 48), np.uint8)
    wide[:, 16:32] = 255
    crop, _ = pixels_of(encoded(wide), recipe().task, "x")
    assert (crop == 255).all()
    stretch, _ = pixels_of(encoded(wide), recipe({"fit": "stretch"}).task, "x")
    assert stretch[8, 8] == 255 and stretch[8, 0] == 0 and stretch[8, 15] == 0


def test_an_array_of_the_right_size_is_what_a_file_of_it_is():
    image, task = pattern(1, 1), recipe().task
    assert np.array_equal(pixels_of(image, task, "x")[0], pixels_of(encoded(image), task, "x")[0])
    larger, smaller = np.asarray(Image.fromarray(image).resize((40, 40))), recipe({"size": 20}).task
    assert np.array_equal(
        pixels_of(larger, smaller, "x")[0], pixels_of(encoded(larger), smaller, "x")[0]
    )


def test_the_tensor_is_normalised_by_channel():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3)).astype(np.uint8)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    found = tensor_of(pixels, mean, std)
    assert found.shape == (2, 3, 5, 5)
    for c in range(3):
        wanted = (pixels[..., c].astype(np.float64) / 255 - mean[c]) / std[c]
        assert np.allclose(found[:, c].numpy(), wanted, atol=1e-6)


def test_a_file_alone_gives_what_the_prepared_row_gives(pictures, tmp_path):
    asked = recipe({"mean": [0.25], "std": [0.3]})
    task, _ = prepared(tmp_path, pictures, asked)
    rows, files = task.rows("test"), sorted(pictures.rglob("*.png"))
    alone = inputs_of(files[rows.places[2]], transform(asked.task))["pixel_values"]
    assert np.array_equal(alone, rows.batch([2]).inputs["pixel_values"].numpy())


# Pictures


@pytest.mark.parametrize("shape", [(5, 5, 1), (7, 7, 3)])
def test_a_picture_is_what_a_decoder_reads_again(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    found = np.asarray(Image.open(io.BytesIO(png(pixels))))
    assert np.array_equal(found.reshape(shape), pixels)
    assert np.array_equal(reduced(pixels, 8), pixels)
    large = np.kron(pixels, np.ones((4, 4, 1), np.uint8))
    assert np.array_equal(reduced(large, shape[0]), pixels)
    assert reduced(large, shape[0] + 1).shape == (shape[0], shape[0], shape[2])


def test_the_images_that_are_shown_are_those_furthest_apart_of_the_parted():
    one = rows()
    random = np.random.default_rng(1)
    teacher, student = (random.normal(0, 3, (12, 3)).astype(np.float32) for _ in range(2))
    task = ImageClassification(("a", "b", "c"), recipe().task, 0)
    found = partings(task, one, teacher, student)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (teacher, student))
    apart = (p * np.log(p / q)).sum(1)
    wanted = [i for i in np.argsort(-apart) if p[i].argmax() != q[i].argmax()][:8]
    assert len(wanted) > 3
    for said, i in zip(found, wanted, strict=True):
        assert said["kl"] == pytest.approx(apart[i], rel=1e-4)
        assert said["label"] == "abc"[one.labels[i]]
        encoded = base64.b64decode(said["image"].removeprefix("data:image/png;base64,"))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded))), one.pixels[i, ..., 0])
        for who, probs in (("teacher", p[i]), ("student", q[i])):
            assert [a["label"] for a in said[who]] == ["abc"[k] for k in np.argsort(-probs)]
            assert said[who][0]["probability"] == pytest.approx(probs.max(), rel=1e-4)


# Views


def rows(n: int = 12, views: int = 4, seed: int = 0, **settings) -> Rows:
    images = np.stack([pattern(i % 3, i) for i in range(n)])[..., None]
    augment = AugmentSpec(**({"flip": True, "shift": 2} | settings), views=views)
    places = np.arange(n, dtype=np.int64) * 3 + 5
    return Rows(places, np.arange(n) % 3, images, [0.5], [0.5], augment, seed)


def test_a_view_follows_from_seed_example_and_number_alone():
    one = rows()
    every = AllViews(one).batch(range(48)).inputs["pixel_values"]
    for position in (0, 13, 30, 47):
        assert torch.equal(one.batch([position]).inputs["pixel_values"][0], every[position])
    fewer = one.sample(5, seed=1)
    view2 = fewer.batch([2 * 5 + 3])
    at = one.places.tolist().index(fewer.places[3])
    assert torch.equal(view2.inputs["pixel_values"][0], every[2 * 12 + at])
    other = AllViews(rows(seed=1)).batch(range(48)).inputs["pixel_values"]
    assert torch.equal(other[:12], every[:12]) and not torch.equal(other[12:], every[12:])


def test_every_view_has_a_key_of_its_own_and_the_first_is_the_image():
    one = rows()
    ids = AllViews(one).batch(range(48)).example_ids
    assert len({*ids.tolist()}) == 48
    assert ids[:12].tolist() == one.ids.tolist()
    plain = tensor_of(one.pixels, [0.5], [0.5])
    assert torch.equal(one.batch(range(12)).inputs["pixel_values"], plain)


def test_all_draws_come_and_do_what_they_say():
    spec = AugmentSpec(flip=True, shift=1)
    draws = {drawn(spec, 0, example, 1) for example in range(400)}
    assert len(draws) == 2 * 3 * 3
    image = np.arange(1, 17, dtype=np.uint8).reshape(1, 4, 4, 1)
    for flip, down, right in draws:
        found = augmented(image, [(flip, down, right)])[0, ..., 0]
        wanted = np.zeros((4, 4), np.uint8)
        for y in range(4):
            for x in range(4):
                if 0 <= y - down < 4 and 0 <= x - right < 4:
                    source = x - right
                    wanted[y, x] = image[0, y - down, 3 - source if flip else source, 0]
        assert np.array_equal(found, wanted)


def test_mixed_views_follow_from_their_keys_and_say_what_they_are_mixed_of():
    one = rows(flip=False, shift=0, mixup=0.8)
    every = AllViews(one).batch(range(48))
    first = tensor_of(one.pixels, [0.5], [0.5])
    assert (every.mixed.share[:12] == 0).all(), "the first view is the image as it is"
    assert 0 < every.mixed.share[12:].max() <= 0.5 and len({*every.mixed.share.tolist()}) == 37
    for position in range(48):
        share, image = float(every.mixed.share[position]), first[position % 12]
        found = every.inputs["pixel_values"][position]
        of = [i for i in range(12) if torch.allclose(found, image.lerp(first[i], share))]
        assert share == 0 or [one.labels[i] for i in of] == [every.mixed.labels[position]]
    few = one.sample(5, seed=1)  # partners are drawn from all of them
    at = one.places.tolist().index(few.places[3])
    for view in range(4):
        part = few.batch([view * 5 + 3]).inputs["pixel_values"][0]
        assert torch.equal(part, every.inputs["pixel_values"][view * 12 + at])
    shifted = rows(mixup=0.8)
    plain = AllViews(rows()).batch(range(48)).inputs["pixel_values"]
    mixed = AllViews(shifted).batch(range(48))
    for position in range(12, 48):  # both are shown in the same view
        others = plain[position - position % 12 :][:12]
        found, share = mixed.inputs["pixel_values"][position], mixed.mixed.share[position]
        assert any(torch.allclose(found, plain[position].lerp(o, share)) for o in others)


def test_the_preprocessing_says_whatever_changes_an_input(tmp_path):
    def of(seed: int = 0, **task) -> object:
        from limbeck.tasks.image_classification import ImageClassification

        spec = ImageTask(kind="image-classification", size=16, channels="grey", **task)
        return ImageClassification(("a", "b"), spec, seed).preprocessing(tmp_path)

    views = {"augment": {"flip": True, "shift": 1, "views": 3}}
    found = [
        of(), of(mean=[0.1]), of(std=[0.1]), of(fit="stretch"), of(**views), of(1, **views),
        of(augment={"flip": True, "shift": 1, "views": 4}),
        of(augment={"flip": True, "shift": 1, "views": 3, "mixup": 0.2}),
    ]  # fmt: skip
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
    assert of() == of(1), "without views nothing is drawn"
