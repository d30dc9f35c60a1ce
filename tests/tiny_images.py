"""A whole run's inputs in a folder: tiny images of three classes, and a teacher's config."""

from pathlib import Path

import numpy as np
from PIL import Image

from tiny_world import write_recipe

RESNET = {
    "model_type": "resnet", "layer_type": "basic", "num_channels": 1, "embedding_size": 8,
    "hidden_sizes": [8, 12], "depths": [2, 2],
}  # fmt: skip


def pattern(label: int, seed: int, size: int = 16) -> np.ndarray:
    """(size, size) uint8: noise, with a bright stripe across, down, or a bright middle."""
    random = np.random.default_rng((label, seed))
    image = random.integers(0, 90, (size, size))
    at = int(random.integers(5, size - 7))
    if label == 0:
        image[at : at + 3] += 150
    elif label == 1:
        image[:, at : at + 3] += 150
    else:
        image[5:11, 5:11] += 150
    return image.astype(np.uint8)


def write_images(folder: Path, each: int = 60, labels: int = 3, size: int = 16) -> Path:
    """One subfolder per class, PNG."""
    for label in range(labels):
        (folder / f"kind {label}").mkdir(parents=True)
        for i in range(each):
            Image.fromarray(pattern(label, i, size)).save(folder / f"kind {label}" / f"{i:03}.png")
    return folder


def make_image_world(folder: Path, **changes) -> Path:
    """`pictures/` and `recipe.yaml` in the folder."""
    write_images(folder / "pictures")
    training = {"epochs": 4, "batch_size": 32, "learning_rate": 1e-2}
    recipe = {
        "name": "tiny",
        "task": {
            "kind": "image-classification", "size": 16, "channels": "grey",
            "augment": {"flip": True, "shift": 2, "views": 3},
        },
        "data": {"train": "pictures", "test_fraction": 0.25},
        "teacher": {"config": RESNET, "tune": {**training, "epochs": 12}},
        "distill": {"training": training},
        "students": [{"name": "one", "budget": {"params": 3000}}],
    }  # fmt: skip
    return write_recipe(folder, {**recipe, **changes})
