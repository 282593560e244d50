"""Rational approximations of powers of x, for band.py: functions of numbers, not of matrices.

Of 1 / sqrt(x) the best: on [low, high] the function sum_j weight_j / (x + shift_j) with the shifts
and weights of Zolotarev has a relative error of 4 exp(-pi^2 J / log(4 sqrt(high / low))), all
shifts and weights positive (Hale, Higham, Trefethen 2008, method 3). With x^2 for x it is the sign
function. Of other powers, shifts at equal ratios and weights by least squares of the error.
"""

import math

import torch

_RATIO = 1.0
_BEYOND = 3.5
_POINTS = 40


def inverse_root_poles(
    low: float, high: float, error: float = 1e-9
) -> tuple[list[float], list[float]]:
    """Shifts and weights of an approximation of 1 / sqrt(x) on [low, high].

    Args:
        low: Smallest x, above 0.
        high: Largest x, at least `low`.
        error: Largest relative error wanted.

    Returns:
        Shifts, ascending, and weights.
    """
    small = math.sqrt(low / high)
    count = math.ceil(math.log(4 / error) * math.log(4 / small) / math.pi**2)
    means, differences = _descent(small)
    quarter = math.pi / (2 * means[-1])
    shifts, weights = [], []
    for number in range(count):
        place = (number + 0.5) * quarter / count
        # sn^2 / cn^2 loses its digits near the end of the period, where its mirror image has them.
        if 2 * place <= quarter:
            ratio = math.tan(_amplitude(place, means, differences)) ** 2
        else:
            mirrored = math.tan(_amplitude(quarter - place, means, differences))
            ratio = (1 / (small * mirrored)) ** 2
        shifts.append(low * ratio)
        dn_over_cn2 = math.sqrt((1 + small**2 * ratio) * (1 + ratio))
        weights.append(2 * quarter * math.sqrt(low) / (math.pi * count) * dn_over_cn2)
    return shifts, weights


def inverse_power_poles(power: float, low: float, high: float) -> tuple[list[float], list[float]]:
    """Shifts and weights of an approximation of x^(-power) on [low, high], 0 < power <= 1.

    The relative error is below 3e-7, found by trial for high / low up to 1e12; the weighted terms
    add up to less than ten times their sum, so that nothing is lost to cancellation.

    Returns:
        Shifts, ascending, and weights.
    """
    first, last = math.log(low), math.log(high)
    count = math.ceil((last - first + 2 * _BEYOND) / _RATIO)
    shifts = torch.linspace(first - _BEYOND, last + _BEYOND, count, dtype=torch.float64).exp()
    points = torch.linspace(first, last, _POINTS * count, dtype=torch.float64).exp().unsqueeze(1)
    scale = shifts ** (1 - power)
    terms = points**power / (points + shifts) * scale
    ones = torch.ones(len(points), 1, dtype=torch.float64)
    weights = torch.linalg.lstsq(terms, ones, rcond=1e-15, driver="gelsd").solution.squeeze(1)
    return shifts.tolist(), (weights * scale).tolist()


def _descent(complementary: float) -> tuple[list[float], list[float]]:
    """Arithmetic-geometric mean of 1 and the complementary modulus, with its differences."""
    means, differences = [1.0], [math.sqrt((1 - complementary) * (1 + complementary))]
    geometric = complementary
    while abs(differences[-1]) > 1e-15 * means[-1]:
        differences.append((means[-1] - geometric) / 2)
        geometric, mean = math.sqrt(means[-1] * geometric), (means[-1] + geometric) / 2
        means.append(mean)
    return means, differences


def _amplitude(place: float, means: list[float], differences: list[float]) -> float:
    """Jacobi's amplitude of a place in the first quarter period, from the descent."""
    angle: float = 2.0 ** (len(means) - 1) * means[-1] * place
    for mean, difference in zip(means[:0:-1], differences[:0:-1], strict=True):
        angle = (angle + math.asin(difference / mean * math.sin(angle))) / 2
    return angle
