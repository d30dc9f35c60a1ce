"""What a codec gives back against the teacher it was made from."""

import json

import pytest
import torch

from limbeck.errors import DataError, RecipeError
from limbeck.signals import blocks, sampled
from limbeck.signals.codecs import (
    CODECS,
    Dense,
    Sampled,
    TopK,
    bytes_per_position,
    codec_from_settings,
    settings_of,
)
from limbeck.signals.draws import uniforms

LARGE = 151_936
EACH = [
    Dense("fp16"), Dense("bf16"), Dense("fp32"),
    TopK(8), TopK(20, "bf16"), TopK(130, "int8", (1.0, 2.5)),
    Sampled(12), Sampled(30, "systematic"), Sampled(5, "independent"), Sampled(12, temperature=2.0),
    Sampled(7, "distinct", 0.7), Sampled(7, "systematic", 1.3), Sampled(7, "independent", 0.7),
]  # fmt: skip


def teacher(num_rows, vocab_size, seed=0, scale=3.0):
    """From flat to peaked."""
    noise = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size, generator=noise)
    return logits * scale * torch.linspace(0.3, 1.5, num_rows).unsqueeze(1)


def keys_of(num_rows):
    return torch.stack([torch.arange(num_rows) // 3, torch.arange(num_rows) % 3], 1)


def encoded(codec, logits, seed=0):
    return codec.encode(logits, keys_of(len(logits)), seed)


def targets_of(codec, logits, seed=0, temperature=1.0):
    return codec.decode(encoded(codec, logits, seed), logits.shape[1], temperature)


def spread(targets, vocab_size):
    """(P, V) float64: each id with its weight."""
    dense = torch.zeros(len(targets.ids), vocab_size, dtype=torch.float64)
    return dense.scatter_add_(1, targets.ids, targets.probs.double())


def probabilities(logits, temperature=1.0):
    return (logits.double() / temperature).softmax(-1)


# --- any codec ---------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 6, 300, LARGE])
@pytest.mark.parametrize("codec", EACH, ids=str)
def test_fields_have_the_stated_types_and_bytes_even_without_rows(codec, vocab_size):
    for num_rows in (0, 2):
        fields = encoded(codec, teacher(num_rows, vocab_size))
        found = {name: (field.dtype, field.shape[1]) for name, field in fields.items()}
        assert found == codec.fields(vocab_size)
        num_bytes = sum(field.numel() * field.itemsize for field in fields.values())
        assert num_bytes == num_rows * bytes_per_position(codec, vocab_size)
        temperature = (codec.temperatures or (1.0,))[0]
        targets = codec.decode(fields, vocab_size, temperature)
        if codec.name != "dense":
            slots = min(codec.k if codec.name == "topk" else codec.n, vocab_size)
            assert targets.ids.shape == targets.probs.shape == (num_rows, slots)
            assert targets.probs.dtype == targets.tail.dtype == torch.float32


def test_twelve_samples_of_a_large_vocabulary_take_at_most_40_bytes():
    assert bytes_per_position(Sampled(12), LARGE) == 36


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codec", EACH, ids=str)
def test_bytes_depend_neither_on_the_batch_nor_on_its_order(codec, dtype):
    logits = teacher(9, 20_011).to(dtype)  # no multiple of a block or a vector register
    logits[3] = logits[4]  # the same logits under another key
    keys = keys_of(9)
    whole = codec.encode(logits, keys, seed=5)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = codec.encode(logits[order], keys[order], seed=5)
    alone = [codec.encode(logits[i : i + 1], keys[i : i + 1], seed=5) for i in range(9)]
    for name, field in whole.items():
        assert torch.equal(field.view(torch.uint8)[order], shuffled[name].view(torch.uint8))
        singles = torch.cat([part[name] for part in alone])
        assert torch.equal(field.view(torch.uint8), singles.view(torch.uint8))
    if codec.name == "sampled":
        assert not torch.equal(whole["ids"][3], whole["ids"][4]), "the key changes the draw"
        assert not torch.equal(whole["ids"], codec.encode(logits, keys, seed=6)["ids"])


@pytest.mark.parametrize("codec", EACH, ids=str)
def test_chunks_do_not_show(codec, monkeypatch):
    logits = teacher(10, 1000)
    whole = encoded(codec, logits)
    monkeypatch.setitem(blocks._CHUNK, "cpu", 3000)
    for name, field in encoded(codec, logits).items():
        assert torch.equal(field, whole[name])


@pytest.mark.parametrize(("value", "found"), [(torch.nan, "NaN"), (torch.inf, r"\+inf")])
@pytest.mark.parametrize("codec", EACH, ids=str)
def test_nan_and_infinity_are_refused_naming_the_example(codec, value, found):
    logits = teacher(7, 200)
    logits[5, 17] = value
    with pytest.raises(DataError, match=f"{found} at position 2 of example 1"):
        encoded(codec, logits)
    logits[5] = -torch.inf
    with pytest.raises(DataError, match="nothing but -inf at position 2 of example 1"):
        encoded(codec, logits)


@pytest.mark.parametrize("codec", EACH, ids=str)
def test_masked_entries_have_probability_zero_and_extreme_logits_pass(codec):
    logits = teacher(6, 400)
    logits[0, 3:] = -torch.inf  # three entries are left
    logits[1, 1:] = -torch.inf
    logits[2] = 0.0
    logits[3] *= 1e30 if codec != Dense("fp16") else 1e2
    logits[4] -= 3e4
    logits[5] *= 1e-30
    temperature = (codec.temperatures or (1.0,))[0]
    targets = targets_of(codec, logits, temperature=temperature)
    if codec.name == "dense":
        assert (targets.logits.isneginf() == logits.isneginf()).all()
        return
    assert targets.probs.isfinite().all() and (targets.probs >= 0).all()
    dense = spread(targets, 400)
    assert (dense[logits.isneginf()] == 0).all()
    assert dense[1, 0] == 1 and dense[3].max() == 1
    if codec.name == "topk":
        torch.testing.assert_close(targets.probs.sum(-1) + targets.tail, torch.ones(6))


@pytest.mark.parametrize("codec", EACH, ids=str)
def test_settings_survive_json(codec):
    settings = json.loads(json.dumps(settings_of(codec)))
    assert codec_from_settings(settings) == codec
    assert codec_from_settings({"codec": codec.name}) == CODECS[codec.name]()


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"codec": "top-k"}, "signals.codec: 'top-k'"),
        ({"codec": "topk", "kk": 3}, "signals.topk.kk: no such setting"),
        ({"codec": "topk", "k": 0}, "signals.topk.k: 0"),
        ({"codec": "topk", "values": "fp32"}, "signals.topk.values"),
        ({"codec": "topk", "temperatures": []}, "signals.topk.temperatures"),
        ({"codec": "topk", "temperatures": [1, 1]}, "signals.topk.temperatures"),
        ({"codec": "dense", "dtype": "fp8"}, "signals.dense.dtype"),
        ({"codec": "sampled", "n": 0}, "signals.sampled.n"),
        ({"codec": "sampled", "draws": "gumbel"}, "signals.sampled.draws"),
        ({"codec": "sampled", "importance_temperature": 3}, "sampled.importance_temperature"),
        ({"codec": "sampled", "temperature": 0}, "signals.sampled.temperature"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, where):
    with pytest.raises(RecipeError, match=where):
        codec_from_settings(settings)


def test_wrong_shapes_are_the_programmers_mistake():
    for logits, keys in [
        (torch.zeros(3), keys_of(3)), (torch.zeros(3, 0), keys_of(3)),
        (torch.zeros(3, 5, dtype=torch.int64), keys_of(3)),
        (torch.zeros(3, 5), keys_of(4)), (torch.zeros(3, 5), keys_of(3).int()),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            Sampled().encode(logits, keys)


# --- temperatures ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("values", ["fp16", "bf16", "int8"])
def test_topk_serves_every_temperature_it_was_captured_for(values, temperature):
    logits = teacher(20, 700)
    targets = targets_of(TopK(16, values, (2.5, 1.0)), logits, temperature=temperature)
    alone = targets_of(TopK(16, values, (temperature,)), logits, temperature=temperature)
    torch.testing.assert_close(targets.probs, alone.probs)
    torch.testing.assert_close(targets.tail, alone.tail)
    assert targets.temperature == temperature


@pytest.mark.parametrize("codec", [TopK(8), Sampled(8), TopK(8, temperatures=(2.0, 3.0))], ids=str)
def test_a_temperature_that_was_not_captured_is_refused(codec):
    fields = encoded(codec, teacher(3, 50))
    with pytest.raises(DataError, match=r"distill.temperature: 1\.5 cannot .* captured for \d"):
        codec.decode(fields, 50, 1.5)


# --- dense -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "error"), [("fp16", -11), ("bf16", -8), ("fp32", -24)])
def test_dense_logits_are_as_good_as_their_type(dtype, error):
    logits = teacher(20, 300) - 4
    found = targets_of(Dense(dtype), logits).logits
    assert ((found - logits).abs() <= logits.abs() * 2.0**error + 2.0**-25).all()


def test_what_fp16_cannot_hold_is_refused_not_made_infinite():
    logits = teacher(3, 50)
    logits[1, 2] = 7e4
    with pytest.raises(DataError, match=r"a logit of 70000; .*up to 65504 .* bf16 or fp32"):
        encoded(Dense("fp16"), logits)
    assert targets_of(Dense("bf16"), logits).logits.isfinite().all()


# --- top-k -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("values", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("k", [1, 8, 128])
def test_topk_probabilities_are_those_of_the_whole_softmax(k, values, temperature):
    logits = teacher(60, 3000) if k != 8 else teacher(6, 2**17 + 5)
    targets = targets_of(TopK(k, values, (temperature,)), logits, temperature=temperature)
    p = probabilities(logits, temperature)
    expected, ids = p.topk(k)
    assert torch.equal(targets.ids, ids)
    distance = logits.amax(-1, keepdim=True) - logits.gather(1, ids)
    mean = (expected * distance).sum(-1, keepdim=True) / expected.sum(-1, keepdim=True)
    bound = {
        "fp16": (distance + mean) / temperature * 2**-11,
        "bf16": (distance + mean) / temperature * 2**-8,
        "int8": (distance.amax(-1, keepdim=True) / 254 / temperature).expand(-1, k),
    }[values]
    assert ((targets.probs.log() - expected.log()).abs() <= bound * 1.01 + 2e-6).all()
    tail = p.scatter(1, ids, 0).sum(-1)
    torch.testing.assert_close(targets.tail.double(), tail, rtol=2e-6, atol=0)
    torch.testing.assert_close(targets.probs.sum(-1) + targets.tail, torch.ones(len(p)))


def test_a_tail_of_a_millionth_keeps_its_digits():
    logits = torch.full((1, 5000), -25.0)
    logits[0, 7] = 0
    tail = targets_of(TopK(1), logits).tail.double()
    torch.testing.assert_close(tail, 1 - probabilities(logits)[:, 7], rtol=1e-5, atol=0)


def test_topk_of_the_whole_vocabulary_has_no_tail():
    logits = teacher(9, 40)
    targets = targets_of(TopK(64), logits)
    assert (targets.tail == 0).all()
    torch.testing.assert_close(spread(targets, 40), probabilities(logits), rtol=2e-2, atol=1e-9)


def test_equal_logits_are_kept_in_the_order_of_their_ids():
    noise = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 3, (30, 5000), generator=noise).float()
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, :40]
    assert torch.equal(targets_of(TopK(40), logits).ids, expected)


# --- sampled -----------------------------------------------------------------------------------


def bias_score(targets, p, student, draws):
    """Standard errors between the mean estimated gradient (student's logits) and the dense one.

    All coordinates at once: with e the error of one draw, the mean of e . e' over pairs of
    different draws of a position has the bias' squared length as its expectation and, without
    bias, the variance 2 tr(Cov(e)^2) / (D (D - 1)), whose trace is the mean of (e . e')^2.
    Targets: `draws` rows for each row of p.
    """
    w = spread(targets, p.shape[1]).view(len(p), draws, -1)
    error = student.unsqueeze(1) * (w.sum(-1, keepdim=True) - 1) - (w - p.unsqueeze(1))
    products = error @ error.mT  # (P, D, D)
    products.diagonal(dim1=1, dim2=2).zero_()
    return float(products.sum() / (2 * products.square().sum()).sqrt())


POSITIONS, DRAWS, VOCAB = 80, 100, 200


@pytest.fixture(scope="module")
def many():
    logits = teacher(POSITIONS, VOCAB, seed=3, scale=1.5)
    p = probabilities(logits)
    return logits.repeat_interleave(DRAWS, 0), p, probabilities(teacher(POSITIONS, VOCAB, seed=4))


KINDS = ("distinct", "systematic", "independent")


@pytest.mark.parametrize(
    ("n", "draws", "importance_temperature"),
    [(1, "distinct", 1.0), *((12, draws, t) for draws in KINDS for t in (1.0, 0.7, 1.3))],
)
def test_the_sampled_gradient_is_the_dense_one_in_expectation(
    n, draws, importance_temperature, many
):
    logits, p, student = many
    codec = Sampled(n, draws, importance_temperature)
    assert abs(bias_score(targets_of(codec, logits, seed=n), p, student, DRAWS)) < 3


def renormalised(targets):
    return targets.probs / targets.probs.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("codec", "weights"),
    [
        (TopK(12), lambda t: t.probs),
        (TopK(12), renormalised),
        (TopK(128), renormalised),
        (Sampled(12), lambda t: (t.probs > 0) / 12.0),  # forgets that large ones were certain
        (Sampled(12, "independent"), lambda t: t.probs.clamp_max(1 / 12)),  # drops repeats
    ],
    ids=["topk", "topk renormalised", "top 128 renormalised", "without weights",
         "without repeats"],
)  # fmt: skip
def test_the_same_check_finds_a_biased_target(codec, weights, many):
    logits, p, student = many
    targets = targets_of(codec, logits)
    object.__setattr__(targets, "probs", weights(targets))
    assert bias_score(targets, p, student, DRAWS) > 4


@pytest.mark.parametrize("rounded", ["squares", "bfloat16"])
def test_random_rounding_has_the_weight_as_its_mean(rounded):
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(40, 1, generator=generator, dtype=torch.float64) ** 4
    weights[:2] = torch.tensor([[0.0], [1.0]])
    noise = (torch.arange(2**16) + 0.5) / 2**16  # every part of [0, 1) once: no chance is left
    noise = noise.double().expand(40, -1)
    if rounded == "squares":
        found = (sampled._rounded_to_squares(weights, noise, 63).double() / 63).square()
    else:
        weights = weights.float().double()
        found = sampled._rounded_to_bf16(weights.expand(-1, 2**16), noise).double()
    assert (found.amax(1) <= 1).all()
    torch.testing.assert_close(found.mean(1), weights[:, 0], rtol=2e-7, atol=2**-20)


def test_each_id_is_drawn_as_often_as_it_should_be():
    p = torch.tensor([0.6, 0.2, 0.1, 0.05, 0.03, 0.02])
    logits = p.log().repeat(40_000, 1)
    # pi for n = 3: 1 for the first; tau = 0.4 / 2 makes the second certain as well
    weights = spread(targets_of(Sampled(3), logits), 6)
    included = (weights > 0).double().mean(0)
    expected = torch.tensor([1, 1, 0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    assert (included[:2] == 1).all()
    error = (expected * (1 - expected) / 40_000).sqrt()
    assert ((included - expected).abs() <= 3.5 * error).all()
    torch.testing.assert_close(weights.mean(0), p.double(), rtol=0.03, atol=0)


def test_distinct_draws_have_the_least_variance():
    logits = teacher(40, 5000, scale=5.0)
    p = probabilities(logits)

    def variances(codec):
        several = [spread(targets_of(codec, logits, seed), 5000) for seed in range(40)]
        squares = torch.stack([(w - p).square().sum(-1) for w in several])  # (40, P)
        return squares.mean(0).view(5, 8).mean(1)  # from flat to peaked

    distinct = variances(Sampled(12))
    for draws, at_least in (("systematic", 1.1), ("independent", 2.0)):
        assert (variances(Sampled(12, draws)) > distinct).all()
        other = Sampled(13, draws)
        assert bytes_per_position(other, LARGE) >= bytes_per_position(Sampled(12), LARGE)
        assert variances(other).sum() > at_least * distinct.sum()


def test_distinct_ids_differ_and_the_large_ones_are_kept_as_they_are():
    logits = teacher(200, 5000)
    p = probabilities(logits)
    targets = targets_of(Sampled(20), logits)
    ordered = targets.ids.sort(-1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all()
    certain = p > 1 / 20
    found = spread(targets, 5000)[certain]
    assert ((found - p[certain]).abs() <= 2 * p[certain].sqrt() / 127 + 1 / 127**2).all()


def test_counts_are_exact():
    for draws in ("systematic", "independent"):
        targets = targets_of(Sampled(100, draws), teacher(50, 3000))
        torch.testing.assert_close(targets.probs.sum(-1), torch.ones(50))
        count = targets.probs * 100
        torch.testing.assert_close(count, count.round(), rtol=0, atol=1e-4)


def test_systematic_counts_are_within_one_of_their_expectation():
    logits = teacher(5, 2**17 + 3, scale=4.0)
    found = spread(targets_of(Sampled(50, "systematic"), logits), 2**17 + 3) * 50
    assert ((found - probabilities(logits) * 50).abs() < 1 + 1e-4).all()


# --- draws -------------------------------------------------------------------------------------


def splitmix(keys, seed, draw):
    """In Python's own integers, from the published algorithm."""
    word = (1 << 64) - 1

    def mixed(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & word
        z = (z ^ z >> 27) * 0x94D049BB133111EB & word
        return z ^ z >> 31

    gamma = 0x9E3779B97F4A7C15
    state = seed & word
    for key in keys:
        state = mixed(state + gamma & word) ^ key & word
    state = mixed(state + gamma & word)
    return (mixed(state + (draw + 1) * gamma & word) >> 11) / 2**53


def test_uniforms_are_splitmix_of_their_key():
    keys = torch.tensor([[0, 0], [1, 0], [0, 1], [2**63 - 1, 5], [-(2**63), -1]])
    for seed in (0, 7, -1, 2**64 - 1):
        found = uniforms(keys, seed, range(3, 6))
        expected = [[splitmix(k, seed, d) for d in range(3, 6)] for k in keys.tolist()]
        assert found.tolist() == expected


def test_uniforms_of_neighbouring_keys_are_uniform_and_independent():
    keys = torch.cartesian_prod(torch.arange(100), torch.arange(100))
    u = uniforms(keys, 0, range(4))  # (10000, 4)
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    assert ((counts - expected).square().sum() / expected) < 64 + 3 * 128**0.5
    views = [u.flatten(), u.roll(1, 0).flatten(), u.roll(100, 0).flatten(), u.roll(1, 1).flatten()]
    others = torch.corrcoef(torch.stack(views))[0, 1:].abs()
    assert (others < 3.5 / u.numel() ** 0.5).all()
