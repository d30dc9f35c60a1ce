"""`limbeck doctor`: what this installation can do."""

from __future__ import annotations

from importlib import metadata, util
from typing import Any

from limbeck.cache import cache_entries, cache_folder
from limbeck.findings import environment

_EXTRAS = {
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "compare": ("sklearn",),
    "meter": ("codecarbon",),
    "images": ("PIL",),
    "timm": ("timm", "torchvision"),
    "tabular": ("sklearn", "skops", "pandas", "rdata"),
    "balance": ("torchjd", "qpsolvers", "quadprog"),
    "lm": ("gguf", "accelerate", "jinja2", "sacrebleu", "rouge_score"),
    "lora": ("peft",),
    "benchmark": ("lm_eval", "accelerate"),
    "verify": ("llama_cpp",),
    "fetch": ("datasets", "huggingface_hub"),
}


def examine() -> dict[str, Any]:
    import torch

    found = environment()
    devices = [f"cpu: {found.cpu}, {found.cores} cores"]
    devices += [
        f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())
    ]
    extras = {
        name: "yes" if all(util.find_spec(m) for m in modules)
        else f"no: pip install 'limbeck[{name}]'"
        for name, modules in _EXTRAS.items()
    }  # fmt: skip
    entries = cache_entries()
    return {
        "limbeck": metadata.version("limbeck"),
        "devices": devices,
        "extras": extras,
        "versions": found.versions,
        "cache": str(cache_folder()),
        "cached": [f"{entry.uri} ({entry.size_bytes / 1e6:.1f} MB)" for entry in entries],
    }
