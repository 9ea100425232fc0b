"""Linear maps in closed form, against least squares by another way."""

from __future__ import annotations

import pytest
import torch

from memlong_vllm.ridge import RidgeAccumulator, RidgeError

KV = 12


def fit_linear_maps(stored: torch.Tensor, targets: torch.Tensor, ridge: float) -> torch.Tensor:
    sums = RidgeAccumulator(stored.shape[-1], targets.shape[-1])
    sums.add(stored, targets)
    return sums.fit(ridge)


def tokens(count: int, noise: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stored keys and values with a constant part, targets, and the map between them."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(KV, 2 * KV, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    stored = torch.randn(count, 2 * KV, generator=generator, dtype=torch.float64) + 3
    targets = stored @ truth.T + noise * torch.randn(count, KV, generator=generator, dtype=torch.float64)
    return stored, targets, truth


def test_a_linear_map_is_found_again() -> None:
    stored, targets, truth = tokens(200)
    maps = fit_linear_maps(stored.float(), targets.float(), ridge=0.0)
    assert maps.shape == (KV, 2 * KV)
    assert maps.dtype == torch.float64
    assert torch.allclose(maps, truth, atol=1e-4)


def test_ridge_equals_least_squares_on_augmented_rows() -> None:
    stored, targets, _ = tokens(40, noise=1.0)
    weight = 0.3 * stored.square().sum(dim=0).mean()
    rows = torch.cat([stored, weight.sqrt() * torch.eye(2 * KV, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(rows, torch.cat([targets, torch.zeros(2 * KV, KV, dtype=torch.float64)])).solution.T
    assert torch.allclose(fit_linear_maps(stored, targets, ridge=0.3), wanted, atol=1e-8)


def test_ridge_does_not_depend_on_scale_or_count() -> None:
    stored, targets, _ = tokens(100, noise=1.0)
    once = fit_linear_maps(stored, targets, ridge=0.1)
    assert torch.allclose(fit_linear_maps(stored.repeat(3, 1), targets.repeat(3, 1), ridge=0.1), once)
    assert torch.allclose(fit_linear_maps(stored * 7, targets, ridge=0.1) * 7, once)


def test_batches_add_up() -> None:
    stored, targets, _ = tokens(150, noise=1.0)
    sums = RidgeAccumulator(2 * KV, KV)
    for first, last in [(0, 1), (1, 70), (70, 70), (70, 150)]:
        sums.add(stored[first:last], targets[first:last])
    assert sums.num_tokens == 150
    assert torch.allclose(sums.fit(0.01), fit_linear_maps(stored, targets, 0.01), atol=1e-10)


def test_r_squared_is_that_of_the_residuals() -> None:
    sums, unseen = RidgeAccumulator(2 * KV, KV), RidgeAccumulator(2 * KV, KV)
    sums.add(*tokens(60, noise=3.0)[:2])
    stored, targets, _ = tokens(80, noise=3.0, seed=1)
    unseen.add(stored, targets)
    maps = sums.fit(0.01)
    for part in (slice(None), slice(2, 5)):
        residual = (targets - stored @ maps.T)[:, part].square().sum()
        wanted = 1 - residual / (targets - targets.mean(dim=0))[:, part].square().sum()
        assert unseen.r_squared(maps, part) == pytest.approx(float(wanted), abs=1e-9)
    assert sums.r_squared(maps) > unseen.r_squared(maps)


def test_a_constant_explains_nothing() -> None:
    """The constant part of the targets alone, which an R² about zero would praise."""
    _, targets, _ = tokens(500)
    sums = RidgeAccumulator(1, KV)
    sums.add(torch.ones(500, 1), targets)
    assert sums.r_squared(sums.fit(0.0)) == pytest.approx(0, abs=1e-9)


def test_what_cannot_be_fitted_is_refused() -> None:
    stored, targets, _ = tokens(10)
    with pytest.raises(RidgeError, match="10 tokens do not determine maps of 24 inputs"):
        fit_linear_maps(torch.cat([stored[:5]] * 2), targets, ridge=0.0)
    with pytest.raises(RidgeError, match="ridge = -1"):
        fit_linear_maps(stored, targets, ridge=-1.0)
    with pytest.raises(RidgeError, match="no tokens"):
        RidgeAccumulator(2 * KV, KV).fit(0.1)
    with pytest.raises(RidgeError, match="shapes"):
        RidgeAccumulator(2 * KV, KV).add(stored, targets[:4])
