"""Packed rows: the inverse of themselves, and what numpy's bits say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.signals.bits import bits_for, pack, packed_width, unpack


@st.composite
def rows(draw):
    bits = draw(st.integers(1, 32))
    shape = draw(st.sampled_from([(), (0,), (1,), (3,), (2, 2)]))
    shape = (*shape, draw(st.integers(0, 70)))
    seed = draw(st.integers(0, 2**32))
    values = np.random.default_rng(seed).integers(0, 2**bits, shape)
    edge = draw(st.sampled_from(["random", "zeros", "ones"]))
    return {"random": values, "zeros": values * 0, "ones": values * 0 + 2**bits - 1}[edge], bits


@settings(max_examples=150, deadline=None)
@given(rows())
def test_packing_is_numpys_little_endian_bit_stream_and_unpacks_to_itself(case):
    values, bits = case
    packed = pack(torch.from_numpy(values), bits)
    assert packed.shape == (*values.shape[:-1], packed_width(values.shape[-1], bits))
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    as_bits = (values[..., None] >> np.arange(bits) & 1).astype(np.uint8)
    stream = as_bits.reshape(*values.shape[:-1], values.shape[-1] * bits)
    expected = np.packbits(stream, axis=-1, bitorder="little")
    np.testing.assert_array_equal(packed.numpy(), expected)
    np.testing.assert_array_equal(unpack(packed, bits, values.shape[-1]).numpy(), values)


@pytest.mark.parametrize(
    ("count", "bits"), [(1, 1), (2, 1), (3, 2), (49_152, 16), (65_536, 16), (65_537, 17),
                        (151_936, 18)]
)  # fmt: skip
def test_bits_for_is_the_logarithm_rounded_up(count, bits):
    assert bits_for(count) == bits


def test_rows_may_be_strided_and_wrong_sizes_are_refused():
    values = torch.arange(40).reshape(5, 8)
    np.testing.assert_array_equal(pack(values.t(), 7), pack(values.t().contiguous(), 7))
    packed = pack(values, 7)
    assert torch.equal(unpack(packed.repeat(1, 2)[:, :7], 7, 8), values)
    with pytest.raises(ValueError, match="fill no row"):
        unpack(packed, 7, 9)
    for bits in (0, 33):
        with pytest.raises(ValueError, match="1 to 32"):
            pack(values, bits)
