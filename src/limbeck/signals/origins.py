"""What signals were made from, each thing by a fingerprint of its own, for a store's manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from limbeck.models import load_tokenizer
from limbeck.run import file_sha256


def origins(teacher: Path, rows: Path, *, max_tokens: int) -> dict[str, Any]:
    """Of a teacher's Hugging Face folder and the file of tokenised rows that it is asked about.

    The tokenizer counts by token identity: another with as many tokens, or one with the same
    tokens at other ids, is another. So does how it cuts text into words.
    """
    tokenizer = load_tokenizer(teacher, where=str(teacher))
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for changing in ("truncation", "padding", "model", "added_tokens"):
        rules.pop(changing, None)
    weights = {path.name: file_sha256(path) for path in sorted(teacher.glob("*.safetensors"))}
    return {
        "teacher": {"config": file_sha256(teacher / "config.json"), "weights": weights},
        "tokenizer": _sha256(tokenizer.get_vocab()),
        "chat_template": _sha256(tokenizer.chat_template) if tokenizer.chat_template else None,
        "preprocessing": {"max_tokens": max_tokens, "rules": _sha256(rules)},
        "data": {"rows": file_sha256(rows)},
    }


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
