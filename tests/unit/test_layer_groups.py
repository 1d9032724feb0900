"""disco.fit.layer_groups on bowls with a known truth."""

import json

import numpy as np
import pytest

from disco.errors import UserError
from disco.fit._layer_groups import LayerGroups, layer_groups, without_ratios

RATES = np.arange(-8.0, -2.0)
TRUTH = {"input": -4.0, "hidden": -7.0, "output": -4.0}
"""log2 of the groups' best rates at a batch of 2^11."""
CURVATURE = np.array([[0.01, 0.004, 0.004], [0.004, 0.03, 0.01], [0.004, 0.01, 0.08]])
"""Nats per octave squared of the groups' rates: input, hidden, output."""


def loss(
    rates: np.ndarray, batch: np.ndarray, follow: tuple[float, ...] = (0.5, 0.5, 0.5), skew: float = 0.0
) -> np.ndarray:
    """Rates n x 3 and batches n, log2. ``follow``: octaves that each group's best rate moves per octave of batch."""
    off = rates - np.array(list(TRUTH.values())) - np.outer(batch - 11, follow)
    off = off * np.sqrt(np.exp(skew * off))  # steeper above the best rate
    return 3.0 + np.einsum("ni,ij,nj->n", off, CURVATURE, off) + 0.015 * (batch - 11) ** 2


def table(
    ratios: list[tuple[float, float, float]],
    batches: tuple[float, ...] = (10, 11, 12),
    noise: float = 0.002,
    seed: int = 0,
    **truth,
) -> dict[str, np.ndarray]:
    """A sweep: learning rates at every batch and every (input, hidden, output) log2 ratio."""
    rng = np.random.default_rng(seed)
    rows = [(lr + 0.5 * (b - 11), b, *ratio) for ratio in ratios for b in batches for lr in RATES]
    x = np.array(rows)
    y = loss(x[:, :1] + x[:, 2:], x[:, 1], **truth)
    names = {g: [f"ratio {g} 2^{r:g}" for r in x[:, 2 + k]] for k, g in enumerate(TRUTH)}
    family = [", ".join(("scion", *(p for p in parts if not p.endswith("2^0")), "momentum 0.9")) for parts in
              zip(*names.values(), strict=True)]  # fmt: skip
    return {
        "model": np.full(len(y), "d32-L2"), "family": np.array(family), "batch": 2 ** x[:, 1], "lr": 2 ** x[:, 0],
        "tokens": np.full(len(y), 2**20), "loss": y + rng.normal(0, noise, len(y)),
        **{f"ratio_{g}": 2 ** x[:, 2 + k] for k, g in enumerate(TRUTH)},
    }  # fmt: skip


STAR = [(0, h, 0) for h in range(-5, 2)] + [(i, -3, 0) for i in (-2, -1, 1, 2)] + [(0, -3, o) for o in (-2, -1, 1, 2)]
"""One ratio at a time around 1 : 1/8 : 1."""
FULL = [(i, h, 0) for i in (-2, -1, 0, 1, 2) for h in (-5, -4, -3, -2, -1)]


def test_a_star_of_ratios_finds_the_truth() -> None:
    result = layer_groups(table(STAR, noise=1e-4))
    assert result.studies == (("scion, momentum 0.9", "d32-L2"),)
    (found,) = result.of(*result.studies[0])
    assert found.flags == found.assumed == ()
    assert found.group("hidden").ratio == pytest.approx(-3, abs=0.02)
    assert found.group("input").ratio == pytest.approx(0, abs=0.03)
    assert found.group("output").reference
    assert found.group("output").ratio == 0
    assert found.lr == pytest.approx(-4, abs=0.02)
    assert found.batch == pytest.approx(11, abs=0.02)
    assert found.loss == pytest.approx(3.0, abs=1e-3)
    for index, name in enumerate(("input", "hidden", "output")):
        group = found.group(name)
        assert group.curvature == pytest.approx(CURVATURE[index, index], rel=0.05)
        assert group.curvature_interval[0] < CURVATURE[index, index] < group.curvature_interval[1]
    assert found.ranking == ("output", "hidden", "input")
    hidden = found.group("hidden")  # with the base rate tuned anew: the Schur complement over a common shift
    common, cross = CURVATURE.sum(), CURVATURE[1].sum()
    assert hidden.retuned == pytest.approx(CURVATURE[1, 1] - cross**2 / common, rel=0.05)
    assert found.gain == pytest.approx(9 * (CURVATURE[1, 1] - cross**2 / common), rel=0.05)  # 1:1:1 is 3 octaves off


def test_losses_without_noise_or_with_few_ratios_do_not_fail() -> None:
    exact = layer_groups(table(STAR, noise=0)).optima[0]
    assert exact.group("hidden").ratio == pytest.approx(-3, abs=1e-3)
    one = table([(i, h, 0) for i in (-2, 0, 2) for h in (-4, -3, -2)], batches=(11,), noise=0)
    one = {name: values[one["lr"] == 2.0**-4] for name, values in one.items()}
    assert "one-rate" in layer_groups(one).optima[0].flags


def test_base_rate_and_ratio_are_not_confounded() -> None:
    """At one base rate the best ratio depends on that rate; swept together it does not."""
    whole = table(FULL, noise=1e-4)
    low = layer_groups(whole).optima[0].group("hidden")
    assert low.ratio == pytest.approx(-3, abs=0.03)
    one = {name: values[whole["lr"] == 2.0**-5] for name, values in whole.items()}
    fixed = layer_groups({**one, "batch": np.full(len(one["lr"]), 2048)}).optima[0]
    assert "one-rate" in fixed.flags
    pull = np.linalg.solve(CURVATURE[:2, :2], CURVATURE[:2, 2])  # of input and hidden, the output's rate an octave low
    assert fixed.group("hidden").ratio == pytest.approx(-7 + pull[1] + 5, abs=0.05)
    assert fixed.group("hidden").ratio > -2  # too low a rate makes a high ratio look good
    assert fixed.group("output").curvature != fixed.group("output").curvature  # NaN: it was never moved


def test_the_batch_moves_with_a_ratio_only_if_a_group_follows_it_differently() -> None:
    still = layer_groups(table(STAR)).optima[0].group("hidden")
    assert still.moves_batch == "no"
    assert still.batch_shift == pytest.approx(0, abs=0.05)
    moved = layer_groups(table(STAR, noise=5e-4, follow=(0.5, 1.5, 0.5))).optima[0].group("hidden")
    # minimise over a common shift u and the batch v at ratio r: exact from the truth
    design = np.array([[1, -0.5, 0], [1, -1.5, 1], [1, -0.5, 0]])  # off of each group by (u, v, r)
    h = 2 * design.T @ CURVATURE @ design
    h[1, 1] += 2 * 0.015
    truth = -np.linalg.solve(h[:2, :2], h[:2, 2])[1]
    assert moved.batch_shift == pytest.approx(truth, abs=0.05)
    assert moved.batch_shift_interval[0] < truth < moved.batch_shift_interval[1]
    assert moved.moves_batch == "yes"
    assert moved.over_batch == pytest.approx(1.0, abs=0.1)  # the best hidden ratio gains an octave per octave of batch
    noisy = layer_groups(table(FULL, noise=0.05, seed=3)).optima[0].group("hidden")
    assert noisy.moves_batch == "cannot tell"
    two = layer_groups(table(STAR, batches=(10, 11))).optima[0].group("hidden")
    assert two.moves_batch == "cannot tell"
    assert two.ratio == pytest.approx(-3, abs=0.1)


@pytest.mark.parametrize(("noise", "skew"), [(0.003, 0.0), (0.01, 0.15)])
def test_intervals_cover(noise: float, skew: float) -> None:
    """90% intervals of ratio and, where the loss is the bowl that is fitted, curvature over 200 replicates; the skew is
    that of published scans. More in benchmarks/layer_groups.py."""
    hits: dict[str, list[tuple[bool, bool]]] = {"hidden": [], "input": []}
    for seed in range(200):
        found = layer_groups(table(STAR, noise=noise, seed=seed, skew=skew)).optima[0]
        for name, at, bend in (("hidden", -3, 0.03), ("input", 0, 0.01)):
            group = found.group(name)
            if group.usable:
                (low, high), (least, most) = group.interval, group.curvature_interval
                hits[name].append((low <= at <= high, least <= bend <= most or skew > 0))
    for own in hits.values():
        assert len(own) >= 140
        ratio, curvature = np.mean(own, axis=0)
        assert 0.85 <= ratio <= (0.95 if not skew else 1)
        assert curvature >= 0.85


def test_edges_and_flatness_are_flagged_not_reported() -> None:
    high = (
        [(0, h, 0) for h in (-1, 0, 1, 2)] + [(i, 0, 0) for i in (-2, -1, 1, 2)] + [(0, 0, o) for o in (-2, -1, 1, 2)]
    )
    edge = layer_groups(table(high, noise=0.003)).optima[0]
    assert edge.group("hidden").flags == ("edge-low",)
    assert np.isnan(edge.group("hidden").ratio)
    assert edge.group("input").flags == ("beside-edge",)
    assert not edge.group("input").usable
    noisy = [layer_groups(table(STAR, noise=0.1, seed=seed)).optima[0] for seed in range(20)]
    told = [item for item in noisy if item.group("input").usable]
    assert len(told) <= 6  # the input's whole bowl over the grid is 0.04 nats deep
    for item in noisy:
        group = item.group("input")
        assert group.usable or item.flags or (np.isnan(group.ratio) and group.flags)
    whole = table(FULL, noise=0.003)
    below = whole["lr"] * (whole["batch"] / 2**11) ** -0.5 < 2.0**-4.5  # the best rate lies above the grid
    short = layer_groups({name: values[below] for name, values in whole.items()}).optima[0]
    assert short.flags == ("edge-high-lr",)
    assert all(np.isnan(group.ratio) for group in short.groups if not group.reference)


def test_two_ratios_are_too_few_and_none_are_no_sweep() -> None:
    two = layer_groups(table([(0, -3, 0), (0, -2, 0)])).optima[0]
    assert two.group("hidden").flags == ("few-points",)
    assert two.group("output").together == ("input",)
    assert two.lr == pytest.approx(-4, abs=0.1)
    assert layer_groups(table([(0, -3, 0)])).optima == ()


def test_one_group_against_the_two_others() -> None:
    found = layer_groups(table([(0, h, 0) for h in range(-5, 0)], noise=1e-4)).optima[0]
    assert [group.group for group in found.groups] == ["hidden", "output"]
    assert found.group("input") is found.group("output")
    assert found.group("hidden").ratio == pytest.approx(-3, abs=0.02)
    # input and output move together: the quadratic form on (1, 0, 1)
    assert found.group("output").curvature == pytest.approx(0.01 + 0.08 + 2 * 0.004, rel=0.03)
    only_output = layer_groups(table([(0, -3, o) for o in range(-2, 3)], noise=1e-4)).optima[0]
    assert only_output.group("hidden").reference  # the pair is the reference, and its first group gives the rate
    assert only_output.group("output").ratio == pytest.approx(3, abs=0.02)


def test_what_the_design_does_not_tell_is_named() -> None:
    """Ratios one at a time with the reference never moved against the others: input x hidden is not told."""
    star = [(0, h, 0) for h in (-5, -4, -3, -2)] + [(i, -3, 0) for i in (-2, -1, 1)]
    found = layer_groups(table(star)).optima[0]
    assert found.assumed == ("hidden x input",)


def test_seeds_orders_horizons_and_divergence() -> None:
    one = table(STAR, seed=1)
    both = {name: np.concatenate([values, table(STAR, seed=2)[name]]) for name, values in one.items()}
    both["tokens"] = np.repeat([2**20, 2**21], len(one["lr"]))
    result = layer_groups(both)
    assert [item.tokens for item in result.optima] == [2**20, 2**21]
    shuffled = np.random.default_rng(0).permutation(len(both["lr"]))
    again = layer_groups({name: values[shuffled] for name, values in both.items()})
    for a, b in zip(result.optima, again.optima, strict=True):
        assert a.group("hidden").ratio == pytest.approx(b.group("hidden").ratio, abs=1e-9)
    lost = one["loss"].copy()
    lost[::17] = np.nan
    holes = layer_groups({**one, "loss": lost, "diverged": np.isnan(lost)}).optima[0]
    assert holes.group("hidden").ratio == pytest.approx(-3, abs=0.1)


def test_results_are_plain_data() -> None:
    result = layer_groups(table(STAR))
    again = LayerGroups.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert again.to_dict() == result.to_dict()
    with pytest.raises(AttributeError):
        result.tolerance = 1.0  # type: ignore[misc]


def test_names_without_ratios() -> None:
    assert without_ratios("scion, ratio hidden 2^-3, ratio output 1,536, momentum 0.9") == "scion, momentum 0.9"
    assert without_ratios("ratio input 2^2") == ""
    assert without_ratios("scion, ratio vector 2^-1") == "scion, ratio vector 2^-1"  # a group of its own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio_hidden": 0.0}, "ratio_hidden must be positive, got 0.0"),
        ({"lr": -1.0}, "column lr must be positive"),
    ],
)
def test_bad_values(change: dict[str, float], message: str) -> None:
    good = table(STAR)
    bad = {name: np.full(len(good["lr"]), value) for name, value in change.items()}
    with pytest.raises(UserError, match=message):
        layer_groups({**good, **bad})


def test_bad_arguments() -> None:
    good = table(STAR)
    with pytest.raises(UserError, match="none of the columns ratio_input"):
        layer_groups({name: values for name, values in good.items() if not name.startswith("ratio")})
    with pytest.raises(UserError, match="tolerance must be a positive number of nats, got 0"):
        layer_groups(good, tolerance=0)
    with pytest.raises(UserError, match="confidence must lie between 0 and 1, got 1"):
        layer_groups(good, confidence=1)
