"""Powers of a softmax's scores."""

from __future__ import annotations

import numpy as np

from memlong_vllm.kernels.exponentials_cpu import HIDDEN, LEAST_EXPONENT, PART, powers
from memlong_vllm.kernels.numba_threads import njit


@njit()
def raised(scores, peak, scale):
    return powers(scores, 0, peak, scale)


def test_powers_are_those_of_numpy_and_none_becomes_denormal_by_a_value() -> None:
    rng = np.random.default_rng(0)
    scores = rng.uniform(-400, 3, PART).astype(np.float32)
    scores[:2] = 3, HIDDEN
    wanted = np.exp(0.5 * (scores.astype(np.float64) - 3))
    found = scores.copy()
    total = raised(found, np.float32(3), np.float32(0.5))
    np.testing.assert_allclose(total, wanted.sum(), rtol=1e-6)
    least = 2.0**LEAST_EXPONENT
    assert found[0] == 1
    assert found[1] == found.min() == least
    is_kept = wanted >= least
    assert 0 < is_kept.sum() < PART
    np.testing.assert_allclose(found[is_kept], wanted[is_kept], rtol=3e-5)
    assert (found[~is_kept] == np.float32(least)).all()
    assert least * 1e-6 > np.finfo(np.float32).tiny
