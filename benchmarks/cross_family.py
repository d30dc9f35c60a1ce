"""Students of another family than their teacher, against the same from hard labels only.

    python benchmarks/cross_family.py --out runs/cross [--only mobilenet conv] [--seeds 3]
        [--quick] [--kept FILE] [--json FILE]

mobilenet: a MobileNetV2 of a third of the width, taught by a ResNet. conv: a small convolutional
net (a ResNet of basic blocks), taught by a ViT. Fashion-MNIST, so many training images as the
recipe below says, all 10,000 test images. Variants have the same random start, rows in the same
order, steps and learning rate:

    hard labels     cross-entropy alone
    logits          forward KL at T = 2 (0.75) and hard labels (0.25)
    and features    that, and the mean of the last hidden states through a projector (cosine)

A seed is a random start and an order of the rows. Nothing was tuned for any of the variants.
Accuracy of fp32 students; intervals are 95 %, Student's t over the differences with the same seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import limbeck
from limbeck.recipe import Recipe
from limbeck.recipe_file import load_recipe, validate
from students import T_OF, Kept, table, trained

_FASHION = {
    "uri": "apt://dataset-fashion-mnist/usr/share/datasets/fashion-mnist",
    "sha256": "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
}
_RESNET = {"model_type": "resnet", "layer_type": "basic", "num_channels": 1}
_PAIRS: dict[str, dict[str, Any]] = {
    "mobilenet": {
        "size": 40,
        "teacher": {**_RESNET, "embedding_size": 32, "hidden_sizes": [32, 64, 128],
                    "depths": [1, 1, 1]},
        "tune": {"epochs": 10, "batch_size": 128, "micro_batch": 64, "learning_rate": 4e-3,
                 "weight_decay": 0.05},
        "base": {"model_type": "mobilenet_v2", "num_channels": 1, "depth_multiplier": 0.35,
                 "image_size": 40},
        "training": {"epochs": 6, "batch_size": 64, "micro_batch": 64, "learning_rate": 4e-3,
                     "weight_decay": 0.05},
    },
    "conv": {
        "size": 28,
        "teacher": {"model_type": "vit", "num_channels": 1, "image_size": 28, "patch_size": 4,
                    "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
                    "intermediate_size": 192},
        "tune": {"epochs": 12, "batch_size": 128, "learning_rate": 2e-3, "weight_decay": 0.05},
        "base": {**_RESNET, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
        "training": {"epochs": 8, "batch_size": 64, "micro_batch": 64, "learning_rate": 8e-3,
                     "weight_decay": 0.05},
    },
}  # fmt: skip
_VARIANTS = ("hard labels", "logits", "and features")
_ROWS = 8000  # training images, teacher's and students'


def recipe_of(pair: str, quick: bool) -> Recipe:
    about = _PAIRS[pair]
    tune, training = (
        {**about[part], "epochs": 0.5} if quick else about[part] for part in ("tune", "training")
    )
    return validate({
        "name": f"cross-{pair}",
        "task": {"kind": "image-classification", "size": about["size"], "channels": "grey",
                 "mean": [0.286], "std": [0.353],
                 "augment": {"flip": True, "shift": 2, "views": 4}},
        "data": {"train": _FASHION, "test": _FASHION, "validation_fraction": 0.1,
                 "max_train_rows": 1000 if quick else _ROWS},
        "teacher": {"config": about["teacher"], "tune": tune},
        "base": {"config": about["base"]},
        "distill": {"temperature": 2, "soft_weight": 0.75, "hard_weight": 0.25,
                    "embedding": {"loss": "cosine", "weight": 0.5}, "training": training},
        "students": [{"name": "student", "budget": {"params": 10**9}}],
        "evidence": {"baselines": "none"},
        "export": {"formats": ["hf"], "primary": "hf"},
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--only", nargs="+", choices=_PAIRS, default=[*_PAIRS])
    parser.add_argument("--seeds", type=int, default=3, choices=sorted(T_OF))
    parser.add_argument("--quick", action="store_true", help="1,000 images, half a pass, two seeds")
    parser.add_argument("--kept", type=Path, metavar="FILE", help="what is in it is not made again")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    kept = Kept(options.kept)
    found: dict[str, dict[str, list[float]]] = {}
    for pair in options.only:
        run = options.out / (f"quick-{pair}" if options.quick else pair)
        report = limbeck.distill(recipe_of(pair, options.quick), run)
        teacher, (student,) = report.teacher.main.quality, report.students
        assert teacher is not None
        print(f"{pair}: teacher {100 * teacher.value:.2f} % ({report.teacher.params:,} parameters),"
              f" student {student.params:,} parameters", flush=True)  # fmt: skip
        recipe, _ = load_recipe(run)
        plain = recipe.model_copy(
            update={"distill": recipe.distill.model_copy(update={"embedding": None})}
        )
        for variant in _VARIANTS:
            for seed in range(2 if options.quick else options.seeds):
                training = f"{run.name}, {variant}, seed {seed}"
                if training not in kept.found:
                    more = variant == "and features"
                    right, seconds = trained(
                        run, recipe if more else plain, "student", seed,
                        hard=variant == "hard labels", start="random",
                        features=run / "features" if more else None,
                    )  # fmt: skip
                    kept.add(training, right)
                    print(f"{training}: {100 * right:.2f} %, {seconds:.0f} CPU s", flush=True)
                found.setdefault(pair, {}).setdefault(variant, []).append(kept.found[training])
    out = table(found)
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
