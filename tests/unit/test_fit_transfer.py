"""disco.fit norm transfer: what would tell, norms side by side, margins."""

import math

import numpy as np
import pytest
from scipy import stats

from disco.errors import UserError
from disco.fit import Transfer, norm_transfer
from disco.fit._transfer import Needed, margin_for, octaves_between, transfers

TOKENS = 2.0 ** np.arange(20, 26)
WIGGLE = np.array([0.2, -0.3, 0.1, -0.1, 0.3, -0.2])


def test_cannot_tell_says_what_would() -> None:
    found = norm_transfer(TOKENS, 2 ** (6 + WIGGLE), margin=0.05, runs=7)
    assert found.verdict == "cannot tell"
    assert found.needed is not None
    assert found.needed.verdict == "transfers"
    assert found.needed.optima is not None
    assert found.needed.octaves is not None
    assert found.needed.optima > 6
    assert found.needed.octaves > 5
    assert found.needed.runs == 7 * (found.needed.optima - 6)
    wider = norm_transfer(TOKENS, 2 ** (6 + WIGGLE), margin=0.1)
    assert wider.needed is None or (wider.needed.optima or 0) < found.needed.optima


def test_what_would_tell_does() -> None:
    """As many optima of the same scatter give the promised verdict in 80% of the draws (400; 3 standard deviations)."""
    octaves = np.arange(5.0)
    design = np.stack([np.ones(5), octaves], axis=1)
    noise = np.array([1.0, -2.0, 0.5, 1.5, -1.0])
    noise -= design @ np.linalg.lstsq(design, noise)[0]
    noise *= 0.2 * math.sqrt(3 / np.sum(noise**2))
    needed = norm_transfer(2**octaves, 2 ** (6 + noise), 0.1, shared=range(5)).needed
    assert needed is not None
    assert needed.optima is not None
    rng = np.random.default_rng(6)
    scales = np.tile(octaves, math.ceil(needed.optima / 5))[: needed.optima]
    told = [
        norm_transfer(2**scales, 2 ** (6 + draw), 0.1, shared=range(needed.optima)).verdict == "transfers"
        for draw in rng.normal(0, 0.2, (400, needed.optima))
    ]
    assert np.mean(told) == pytest.approx(0.8, abs=3 * math.sqrt(0.16 / 400) + 0.04)  # and the uneven last round


def test_a_slope_outside_the_margin_needs_to_be_shown_to_drift() -> None:
    found = norm_transfer(TOKENS, 2 ** (6 + 0.12 * np.arange(6) + 1.5 * WIGGLE), margin=0.05)
    assert found.verdict == "cannot tell"
    assert found.needed is not None
    assert found.needed.verdict == "drifts"
    level = WIGGLE - np.polyval(np.polyfit(range(6), WIGGLE, 1), range(6))
    near = norm_transfer(TOKENS, 2 ** (6 + 0.05 * np.arange(6) + level), 0.05)
    assert near.needed is not None
    assert (near.needed.optima, near.needed.octaves) == (None, None)  # the slope is the margin: nothing tells


def test_a_larger_error_from_resampling_counts() -> None:
    plain = norm_transfer(TOKENS, 2 ** (6 + 0.1 * WIGGLE), margin=0.05)
    assert plain.verdict == "transfers"
    assert plain.strain < 1
    assert norm_transfer(TOKENS, 2 ** (6 + 0.1 * WIGGLE), margin=0.05, error=0.04).verdict == "cannot tell"
    assert norm_transfer(TOKENS, 2 ** (6 + 0.1 * WIGGLE), margin=0.05, error=1e-6) == plain


def test_shared_runs_widen_the_interval() -> None:
    """Against the textbook where nothing is shared, and a simulation where all is."""
    norms = 2 ** (6 + WIGGLE)
    line = stats.linregress(np.log2(TOKENS), 6 + WIGGLE)
    alone = norm_transfer(TOKENS, norms, 0.05, shared=range(6))
    assert (alone.error, alone.freedom) == pytest.approx((line.stderr, 4))
    assert math.isnan(alone.correlation)
    assert norm_transfer(TOKENS, norms, 0.05, correlation=0).error == pytest.approx(line.stderr)
    shared = norm_transfer(TOKENS, norms, 0.05)
    assert shared.slope == alone.slope
    assert shared.correlation == 0.5
    assert shared.freedom < 4

    rng = np.random.default_rng(0)
    x = np.arange(6) - 2.5
    errors = rng.normal(size=(20000, 6)) @ np.linalg.cholesky(0.5 ** np.abs(np.subtract.outer(x, x))).T
    slopes = errors @ x / (x @ x)
    left = errors - errors.mean(axis=1, keepdims=True) - np.outer(slopes, x)
    textbook = math.sqrt(np.mean(np.sum(left**2, axis=1)) / 4 / (x @ x))
    assert shared.error / alone.error == pytest.approx(np.std(slopes) / textbook, rel=0.02)


def test_labels_say_which_optima_share_runs() -> None:
    twice, norms = np.tile(TOKENS, 2), 2 ** (6 + np.r_[WIGGLE, WIGGLE[::-1]])
    plain = norm_transfer(twice, norms, 0.05)
    assert plain == norm_transfer(twice, norms, 0.05, shared=["a"] * 6 + ["b"] * 6)  # the first of every scale together
    pairs = norm_transfer(twice, norms, 0.05, shared=[0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])
    alone = norm_transfer(twice, norms, 0.05, shared=range(12))
    assert plain.error > pairs.error
    assert plain.error > alone.error
    assert plain.freedom < pairs.freedom < alone.freedom == 10


def test_an_error_with_degrees_stands_alone() -> None:
    found = norm_transfer(TOKENS, 2 ** (6 + WIGGLE), 0.05, error=0.01, degrees=20)
    half = stats.t.ppf(0.95, 20) * 0.01
    assert found.interval == pytest.approx((found.slope - half, found.slope + half))
    assert (found.error, found.freedom) == (0.01, 20)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"correlation": 1.0}, "correlation must be at least 0 and below 1, got 1.0"),
        ({"shared": [1, 2]}, r"a label for each of 6 optima, got shape \(2,\)"),
        ({"error": 0.1, "degrees": 0}, "degrees of freedom must be positive, got 0"),
    ],
)
def test_what_is_refused(wrong: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        norm_transfer(TOKENS, 2 ** (6 + WIGGLE), 0.05, **wrong)  # type: ignore[arg-type]


def test_norms_side_by_side_by_what_their_drift_costs() -> None:
    octaves = np.arange(6)
    norms = {
        "drifting": 6 + 0.3 * octaves + 0.05 * WIGGLE,
        "steady": 4 + 0.05 * WIGGLE,
        "steady but sharp": 5 + 0.05 * WIGGLE,
        "unknown cost": 3 + 0.05 * WIGGLE,
        "missing": np.full(6, math.nan),
    }
    found = transfers(TOKENS, norms, {"drifting": 0.05, "steady": 0.05, "steady but sharp": 0.5, "missing": 1}, 0.01)
    assert list(found) == ["steady", "steady but sharp", "drifting"]
    assert [item.verdict for item in found.values()] == ["transfers", "transfers", "drifts"]
    assert found["steady"].margin == pytest.approx(math.sqrt(0.01 / 0.05) / 6)
    planned = transfers(TOKENS, norms, {"drifting": 0.05}, 0.01, planned=[2.0**35])
    assert planned["drifting"].margin == pytest.approx(math.sqrt(0.01 / 0.05) / 15)


def test_margins() -> None:
    assert octaves_between(TOKENS) == 6  # one doubling beyond the fitted range
    assert octaves_between(TOKENS, [2.0**30]) == 10
    assert octaves_between(TOKENS, [2.0**22]) == 5
    with pytest.raises(UserError, match="all three must be positive, got curvature 0"):
        margin_for(0.0, 0.01, 5)


def test_dictionary_and_back() -> None:
    found = norm_transfer(TOKENS, 2 ** (6 + WIGGLE), margin=0.05)
    assert Transfer.from_dict(found.to_dict()) == found
    assert isinstance(found.needed, Needed)
