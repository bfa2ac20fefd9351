"""Which largest value a calibration chooses."""

from __future__ import annotations

import torch

from mcore_spec.quantization.numbers import fake_quantize, scale_of
from mcore_spec.quantization.observers import NUM_BINS, PERCENTILE, Histogram, Largest


def drawn(count: int = 50_000) -> torch.Tensor:
    values = torch.randn(count, generator=torch.Generator().manual_seed(2))
    values[17] = -100.0
    return values


def observed(values: torch.Tensor) -> Histogram:
    largest = Largest(values.device)
    for part in values.chunk(7):
        largest(part)
    assert float(largest.amax) == float(values.abs().max())
    histogram = Histogram(largest.amax)
    for part in values.chunk(5):
        histogram(part)
    return histogram


def test_percentile_keeps_all_but_a_ten_thousandth() -> None:
    values = drawn()
    chosen = float(observed(values).choose("percentile", "e4m3"))
    kept = float((values.abs() <= chosen).float().mean())
    exact = float(values.abs().quantile(PERCENTILE))
    assert PERCENTILE <= kept < 1
    assert exact <= chosen <= exact + 2 * 100 / NUM_BINS


def test_mse_is_the_best_of_the_cuts() -> None:
    values = drawn(5000)
    chosen = observed(values).choose("mse", "int8")

    def error(amax: float) -> float:
        scale = scale_of(torch.tensor([amax]), "int8")
        return float((fake_quantize(values, scale, "int8") - values).double().square().sum())

    errors = {cut: error(100 * cut / 64) for cut in range(1, 65)}
    best = min(errors, key=lambda cut: errors[cut])
    assert abs(float(chosen) / 100 * 64 - best) <= 1
    assert errors[best] < errors[64]


def test_nan_is_not_lost() -> None:
    largest = Largest(torch.device("cpu"))
    largest(torch.tensor([1.0, float("nan")]))
    largest(torch.tensor([3.0]))
    assert largest.amax.isnan().all()
