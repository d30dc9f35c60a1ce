"""Hidden states, embeddings and text in the same store as logits, from one pass of the teacher."""

import shutil
from dataclasses import replace

import pytest
import torch

from limbeck.errors import DataError, RecipeError
from limbeck.progress import Silent
from limbeck.signals import capture as capturing
from limbeck.signals.capture import capture
from limbeck.signals.codecs import TopK, codec_from_settings, settings_of
from limbeck.signals.store import open_store
from limbeck.signals.vectors import Embedding, Hidden, Text, scattered, signs
from limbeck.signals.verify import verify
from limbeck.teachers.live import LiveTeacher
from limbeck.types import Batch, Need, Signal
from tiny_models import bert_config, random_model

N, LENGTH, WIDTH = 40, 7, 24
LAYERS = ("1", "3")


class Rows:
    """Texts of 1 to 7 tokens; a logit for each text."""

    ids = (torch.randperm(N, generator=torch.Generator().manual_seed(1)) * 5 + 2).long()

    def __len__(self):
        return N

    def batch(self, positions):
        ids = self.ids[torch.tensor([*positions])]
        mask = torch.arange(LENGTH) < (1 + ids % LENGTH)[:, None]
        tokens = (ids[:, None] * torch.arange(1, LENGTH + 1)) % 90 + 5
        return Batch(inputs={"input_ids": tokens, "attention_mask": mask.long()}, labels=ids % 5,
                     mask=torch.ones(len(ids), dtype=torch.bool), example_ids=ids)  # fmt: skip


def words(example: int) -> str:
    return "" if example % 3 == 0 else f"example {example} says é, 汉字 and 🙂" * (example % 4)


class Mouth:
    fingerprint, provides = "m", frozenset(Need)

    def __init__(self):
        self.asked = []

    def signal(self, batch, needs):
        self.asked += batch.example_ids.tolist()
        at = batch.example_ids[:, None, None] + torch.arange(LENGTH)[:, None]
        hidden = {str(i): torch.sin(at * torch.arange(1.0, WIDTH + 1) + i) for i in range(4)}
        padding = batch.inputs["attention_mask"] == 0
        hidden = {k: v.masked_fill(padding[..., None], torch.nan) for k, v in hidden.items()}
        return Signal(
            logits=torch.cos(batch.example_ids[:, None] * torch.arange(1.0, 10.0)), hidden=hidden,
            embedding=torch.cos(batch.example_ids[:, None] / torch.arange(1.0, WIDTH + 1)),
            texts=tuple(map(words, batch.example_ids.tolist())),
        )  # fmt: skip


CODECS = {
    "logits": TopK(4), "states": Hidden(LAYERS, dtype="fp32"), "means": Hidden(LAYERS, pool="mean"),
    "few": Hidden(("3",), "fp32", project=8), "embedding": Embedding("bf16"), "text": Text(),
}  # fmt: skip


@pytest.fixture
def stores(tmp_path, monkeypatch):
    monkeypatch.setattr(capturing, "_SHARD", 12)
    monkeypatch.setattr(capturing, "_BATCH", 5)

    def run(teacher=None, codecs=CODECS):
        folders = {tmp_path / name: codec for name, codec in codecs.items()}
        capture(teacher or Mouth(), Rows(), folders, made_from={"t": 1}, progress=Silent(), seed=4)
        return {name: open_store(tmp_path / name) for name in codecs}

    return run


def test_one_pass_gives_all_of_them_and_each_comes_back_by_id(stores):
    teacher = Mouth()
    found = stores(teacher)
    assert sorted(teacher.asked) == sorted(Rows.ids.tolist()), "each example once, for six stores"
    at = torch.randperm(N)[:17]
    batch = Rows().batch(at.tolist())
    said, mask = Mouth().signal(batch, frozenset()), batch.inputs["attention_mask"].bool()
    states, counts = found["states"].vectors(batch.example_ids)
    assert counts.tolist() == mask.sum(1).tolist()
    for layer in LAYERS:
        assert torch.equal(states[layer], said.hidden[layer][mask])
        back = scattered(states[layer], mask)
        assert torch.equal(back[mask], said.hidden[layer][mask]) and (back[~mask] == 0).all()
    means, counts = found["means"].vectors(batch.example_ids)
    assert counts.tolist() == [1] * 17
    expected = torch.stack([s[m].mean(0) for s, m in zip(said.hidden["3"], mask, strict=True)])
    torch.testing.assert_close(means["3"], expected, atol=1e-3, rtol=1e-3)
    embedding, _ = found["embedding"].vectors(batch.example_ids)
    torch.testing.assert_close(embedding["embedding"], said.embedding, atol=4e-3, rtol=8e-3)
    assert found["text"].texts(batch.example_ids) == [*said.texts]
    assert found["logits"].targets(batch.example_ids, 1.0).ids.shape == (17, 4)


def test_a_projection_keeps_lengths_and_angles_roughly_and_its_bytes_exactly(stores):
    first, again = stores()["few"], stores()["few"]
    assert first.manifest["bytes_per_position"] == 8 * 4
    a, b = (s.vectors(Rows.ids)[0]["3"] for s in (first, again))
    assert torch.equal(a, b)
    wide = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))
    matrix = signs(512, 128, seed=0, number=0)
    assert set(matrix.abs().unique().tolist()) == {matrix[0, 0].abs().item()}
    assert abs(matrix.mean()) < 0.01 * matrix[0, 0].abs() * 5
    ratio = (wide @ matrix).norm(dim=1) / wide.norm(dim=1)
    assert abs(ratio.mean() - 1) < 0.02 and ratio.std() < 0.1
    assert not torch.equal(signs(512, 128, seed=1, number=0), matrix)


def test_only_what_is_missing_is_written_again(stores, tmp_path):
    stores()
    path = tmp_path / "text/shard-00001.safetensors"
    whole = path.read_bytes()
    before = (tmp_path / "text/manifest.json").read_bytes()
    teacher = Mouth()
    stores(teacher)
    assert not teacher.asked, "nothing is missing"
    shutil.rmtree(tmp_path / "text")
    stores(teacher)
    assert sorted(teacher.asked) == sorted(Rows.ids.tolist())
    assert path.read_bytes() == whole and (tmp_path / "text/manifest.json").read_bytes() == before


@pytest.mark.parametrize("name", [name for name in CODECS if name != "logits"])
def test_verify_finds_the_same_and_another_teacher(stores, tmp_path, name):
    stores()
    found = verify(tmp_path / name, Mouth(), Rows(), num_rows=20)
    assert found.positions > 0
    assert found.largest_difference == 0 and found.gradient_error is None

    class Other(Mouth):
        def signal(self, batch, needs):
            said = super().signal(batch, needs)
            return Signal(
                hidden={k: v * 1.5 for k, v in said.hidden.items()},
                embedding=said.embedding * 1.5, texts=tuple(t[::-1] for t in said.texts),
            )  # fmt: skip

    assert verify(tmp_path / name, Other(), Rows(), num_rows=20).largest_difference > 0.1


def test_what_a_teacher_does_not_give_is_named(stores):
    with pytest.raises(DataError, match=r"'7'; allowed: 0, 1, 2, 3"):
        stores(codecs={"states": Hidden(("7",))})

    class Mute(Mouth):
        provides = frozenset({Need.LOGITS})

    with pytest.raises(DataError, match="provides logits; allowed: text"):
        stores(Mute(), {"text": Text()})


def test_numbers_that_do_not_fit_are_refused(stores):
    class Loud(Mouth):
        def signal(self, batch, needs):
            return Signal(embedding=torch.full((len(batch.example_ids), 4), 1e6))

    with pytest.raises(DataError, match="bf16 or fp32"):
        stores(Loud(), {"embedding": Embedding("fp16")})


@pytest.mark.parametrize(
    "settings",
    [{"layers": []}, {"layers": ["1", "1"]}, {"layers": ["1"], "pool": "max"},
     {"layers": ["1"], "project": 0}, {"layers": ["1"], "dtype": "int8"}],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(RecipeError, match=r"signals\.hidden"):
        codec_from_settings({"codec": "hidden", **settings})


@pytest.mark.parametrize("name", CODECS)
def test_settings_survive_a_manifest(name):
    assert codec_from_settings(settings_of(CODECS[name])) == CODECS[name]


def test_a_live_teacher_gives_its_states_and_the_same_logits():
    model = random_model(bert_config())
    teacher = LiveTeacher(model, "t")
    batch = Rows().batch(range(6))
    plain = teacher.signal(batch, frozenset({Need.LOGITS}))
    rich = teacher.signal(batch, frozenset({Need.LOGITS, Need.HIDDEN, Need.EMBEDDING}))
    assert torch.equal(plain.logits, rich.logits) and not plain.hidden
    assert [*rich.hidden] == ["0", "1", "2", "3"]
    mask = batch.inputs["attention_mask"].bool()
    last = torch.stack([s[m].mean(0) for s, m in zip(rich.hidden["3"], mask, strict=True)])
    torch.testing.assert_close(rich.embedding, last, atol=1e-5, rtol=1e-5)


def test_views_are_stored_with_the_signals_and_come_back_by_id(stores, monkeypatch, tmp_path):
    with pytest.raises(DataError, match="no augmented views"):
        stores()["embedding"].views(Rows.ids[:3])
    plain = Rows.batch

    def seen(self, positions):
        batch = plain(self, positions)
        return replace(batch, views=batch.example_ids[:, None] * torch.tensor([0.1, 0.7]).double())

    monkeypatch.setattr(Rows, "batch", seen)
    folders = {tmp_path / "seen": CODECS["text"]}
    capture(Mouth(), Rows(), folders, made_from={}, progress=Silent())
    asked = Rows.ids[torch.randperm(N)[:9]]
    store = open_store(tmp_path / "seen")
    assert torch.equal(store.views(asked), asked[:, None] * torch.tensor([0.1, 0.7]).double())
    assert store.texts(asked) == [words(i) for i in asked.tolist()]
