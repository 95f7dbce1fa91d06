"""What a measured machine's products take beside their bound: a smooth factor, fitted to products that were timed.

A Gaussian process (kernel ridge regression) on the logarithm of time over bound, as a function of log2 of m, n, k and
of the bound over pure arithmetic (which holds waves, tiles and traffic). Far from anything measured it returns to the
median factor, so that the bound's physics decides there; trees would go on with their last leaf, and a polynomial
would run away. On the same held-out products it did better than ridge regression on second-order terms. It is forty
lines of numpy, so it adds no dependency.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from lowprec.machine.roofline import Rates, arithmetic_ms, bound_ms

LENGTHS, NOISES = (2.0, 4.0, 8.0), (0.01, 0.1, 1.0)
"""Tried: the kernel's length in octaves, and the variance of a measurement over that of the factor."""
FOLDS = 8
FEATURES = 4
"""Numbers that tell a product from others. Profiles hold them: other features are another ``FORMAT`` of profiles."""


class Sample(NamedTuple):
    """A timed product ``[m, k] @ [k, n]``; ``group`` names the layer it belongs to."""

    m: int
    n: int
    k: int
    ms: float
    group: str


@dataclass(frozen=True, slots=True)
class Correction:
    """Of one kind of product on one machine."""

    points: np.ndarray
    """Features of the measured products, ``[samples, 4]``."""
    weights: np.ndarray
    """Of each measured product, ``[samples]``."""
    mean: float
    length: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"points": self.points.tolist(), "weights": self.weights.tolist()}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Correction":
        """Raises KeyError, TypeError or ValueError where it is none."""
        points, weights = (np.array(stored[name], dtype=np.float64) for name in ("points", "weights"))
        mean, length = float(stored["mean"]), float(stored["length"])
        if points.shape != (len(weights), FEATURES) or not len(weights) or length <= 0:
            raise ValueError("a correction has other points than weights")
        if not all(np.isfinite(values).all() for values in (points, weights, mean, length)):
            raise ValueError("a correction is not finite")
        return cls(points=points, weights=weights, mean=mean, length=length)

    def factor(self, kind: str, m: int, n: int, k: int, rates: Rates) -> float:
        """What the bound is multiplied by."""
        return float(np.exp(self._log(_features(kind, np.array([[m, n, k]]), rates))[0]))

    def _log(self, points: np.ndarray) -> np.ndarray:
        return self.mean + _kernel(points, self.points, self.length) @ self.weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Relative errors of predictions of products whose whole layer was held out of the fit."""

    products: int
    layers: int
    median_error: float
    p90_error: float
    median_error_of_bound: float
    """Of the bound alone, times one factor fitted to the rest."""
    median_error_random: float
    """With products held out at random, as published figures often are: flattering, since the layer is then known."""


def fit(kind: str, samples: Sequence[Sample], rates: Rates) -> Correction:
    """The correction, its smoothness chosen by products held out by layer."""
    points, target = _data(kind, samples, rates)
    return _fit(points, target, _folds(samples))


def validate(kind: str, samples: Sequence[Sample], rates: Rates) -> Validation:
    """Fit on all layers but some, predict those, and so on around; the smoothness is chosen without them as well."""
    points, target = _data(kind, samples, rates)
    by_layer, at_random = _folds(samples), np.random.default_rng(0).permutation(len(samples)) % FOLDS
    errors = _held_out_errors(points, target, by_layer)
    plain = np.empty_like(target)
    for fold in np.unique(by_layer):
        held = by_layer == fold
        plain[held] = np.median(target[~held])
    return Validation(
        products=len(samples),
        layers=len({sample.group for sample in samples}),
        median_error=float(np.median(errors)),
        p90_error=float(np.quantile(errors, 0.9)),
        median_error_of_bound=float(np.median(np.abs(np.expm1(plain - target)))),
        median_error_random=float(np.median(_held_out_errors(points, target, at_random))),
    )


def _held_out_errors(points: np.ndarray, target: np.ndarray, folds: np.ndarray) -> np.ndarray:
    kernels, everything = _kernels(points), np.arange(len(points))
    errors = np.empty_like(target)
    for fold in np.unique(folds):
        held, rest = everything[folds == fold], everything[folds != fold]
        length, noise = _best(kernels, target, folds, rest)
        errors[held] = np.abs(np.expm1(_predicted(kernels[length], target, rest, held, noise) - target[held]))
    return errors


def _fit(points: np.ndarray, target: np.ndarray, folds: np.ndarray) -> Correction:
    kernels, everything = _kernels(points), np.arange(len(points))
    length, noise = _best(kernels, target, folds, everything)
    return Correction(points, _weights(kernels[length], target, everything, noise), float(np.median(target)), length)


def _best(
    kernels: dict[float, np.ndarray], target: np.ndarray, folds: np.ndarray, given: np.ndarray
) -> tuple[float, float]:
    """The setting with the least error on products held out by fold of those that are ``given`` (their numbers)."""

    def error(setting: tuple[float, float]) -> float:
        length, noise = setting
        errors = []
        for fold in np.unique(folds[given]):
            held, rest = given[folds[given] == fold], given[folds[given] != fold]
            if not len(rest):
                return 0.0
            errors.append(np.abs(_predicted(kernels[length], target, rest, held, noise) - target[held]))
        return float(np.median(np.concatenate(errors)))

    return min(product(LENGTHS, NOISES), key=error)


def _predicted(
    kernel: np.ndarray, target: np.ndarray, given: np.ndarray, wanted: np.ndarray, noise: float
) -> np.ndarray:
    return np.median(target[given]) + kernel[np.ix_(wanted, given)] @ _weights(kernel, target, given, noise)


def _weights(kernel: np.ndarray, target: np.ndarray, given: np.ndarray, noise: float) -> np.ndarray:
    chosen = target[given]
    return np.linalg.solve(kernel[np.ix_(given, given)] + noise * np.eye(len(given)), chosen - np.median(chosen))


def _kernels(points: np.ndarray) -> dict[float, np.ndarray]:
    """Of all measured products, by length: the five hundred fits of a validation take parts of them."""
    return {length: _kernel(points, points, length) for length in LENGTHS}


def _kernel(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
    return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * length**2))


def _data(kind: str, samples: Sequence[Sample], rates: Rates) -> tuple[np.ndarray, np.ndarray]:
    """Features, and the logarithm of time over bound."""
    shapes = np.array([sample[:3] for sample in samples])
    bounds = np.array([bound_ms(kind, *sample[:3], rates) for sample in samples])
    return _features(kind, shapes, rates), np.log(np.array([sample.ms for sample in samples]) / bounds)


def _features(kind: str, shapes: np.ndarray, rates: Rates) -> np.ndarray:
    over = [bound_ms(kind, m, n, k, rates) / arithmetic_ms(m, n, k, rates.tflops) for m, n, k in shapes.tolist()]
    return np.log2(np.column_stack([shapes, over]))


def _folds(samples: Sequence[Sample]) -> np.ndarray:
    """The fold of each sample: all of one layer in the same."""
    layers = np.random.default_rng(0).permutation(sorted({sample.group for sample in samples}))
    fold_of = {layer: index % FOLDS for index, layer in enumerate(layers)}
    return np.array([fold_of[sample.group] for sample in samples])
