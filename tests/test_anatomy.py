"""`limbeck axes`: what of a model can be made smaller, asked once."""

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from families import GROUPED
from limbeck import _api, anatomy
from limbeck.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    LlamaForCausalLM(LlamaConfig(**GROUPED, head_dim=8)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_decoder_is_shown_and_remembered(folder, capsys, monkeypatch):
    assert main(["axes", str(folder)]) == 0
    table = capsys.readouterr().out
    assert table.split()[:4] == ["axis", "fields", "size", "steps"]
    found = {axis.name: axis for axis in _api.axes(folder)}
    proved = {name for name, axis in found.items() if axis.proved}
    assert proved == {"hidden", "heads", "queries", "ffn", "layers", "vocab"}
    assert found["heads"].fields == {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert not found["head_dim"].proved and "head_dim" in table

    def again(*_, **__):
        raise AssertionError("it was asked before")

    monkeypatch.setattr(anatomy, "load_model", again)
    assert {axis.name: axis for axis in _api.axes(folder)} == found
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(AssertionError, match="asked before"):
        _api.axes(folder)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"architectures": ["Unheard"]}, "names Unheard"),
        ({"architectures": None}, "names no class"),
        ({"model_type": "unheard"}, "does not load"),
        ({"num_hidden_layers": 4}, "lacks"),
    ],
)
def test_what_does_not_load_is_said(folder, change, found, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    capsys.readouterr()
    assert main(["axes", str(folder)]) == 2
    said = capsys.readouterr().err
    assert found in said and "; allowed: " in said


def test_a_folder_without_a_model_is_said(tmp_path, capsys):
    assert main(["axes", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err
