"""Random numbers that follow from a key, not from a generator's state.

u(seed, example, position, draw) is the same in any batch, order, rank or resumed run: the key is
absorbed word by word into a 64-bit hash, which then seeds a splitmix64 stream whose element
`draw` is computed directly. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014; finaliser "variant 13" of David Stafford.
"""

import torch
from torch import Tensor


def _signed(word: int) -> int:
    """A 64-bit pattern as the int64 that torch takes; its products wrap as uint64's do."""
    return (word & (1 << 64) - 1) - ((word & 1 << 63) << 1)


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def uniforms(keys: Tensor, seed: int, draws: range) -> Tensor:
    """(P, 2) int64 [example id, position] -> (P, len(draws)) float64 in [0, 1), 53 bits each."""
    state = torch.full_like(keys[:, 0], _signed(seed))
    for word in keys.unbind(1):
        state = _mixed(state + _GAMMA) ^ word
    state = _mixed(state + _GAMMA).unsqueeze(1)  # (P, 1)
    counters = torch.arange(draws.start + 1, draws.stop + 1, device=keys.device) * _GAMMA
    return _shifted(_mixed(state + counters), 11).double() * 2.0**-53


def _mixed(words: Tensor) -> Tensor:
    words = (words ^ _shifted(words, 30)) * _FIRST
    words = (words ^ _shifted(words, 27)) * _SECOND
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, by: int) -> Tensor:
    """Logical shift to the right: torch's own copies the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)
