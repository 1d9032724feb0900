"""Rolling origin: predict the largest horizon of each model from the smaller ones, and price the choice in nats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from disco.errors import UserError
from disco.fit._cells import NORMS
from disco.fit._published import PUBLISHED, PublishedRule
from disco.fit._regret import OURS, Choice, Forecast, Rolling, regret
from disco.fit._scaling import candidates
from disco.fit._study import NORM, StudyFit, fit_once

Columns = Mapping[str, np.ndarray]

CARRIED = "carried over"
"""The best run of the largest horizon that was seen, unchanged: what a rule must beat."""


def rolling_origin(
    columns: Columns,
    published: Sequence[PublishedRule] = PUBLISHED,
    dataset: str = "",
    methods: Sequence[str] = OURS,
    norm: str = NORM,
) -> Rolling:
    """Leaves out the largest horizon of every model, fits the rest, and prices the choices for what was left out.

    Args:
        columns: As for ``fit_table``. A family's models are fitted together where they differ in parameters.
        published: Rules to compare; those that state exponents only get their constants from the fitted optima.
        dataset: Name of the table if it is a public one: rules fitted to it are marked in-sample.
        methods: Which of ours to run.
        norm: Column of the norm.

    Raises:
        UserError: no model has two horizons, or as ``fit_table``.
    """
    family = np.asarray(columns.get("family", np.full(len(columns["lr"]), ""))).astype(str)
    model, tokens = np.asarray(columns["model"]).astype(str), np.asarray(columns["tokens"], dtype=float)
    largest = {key: tokens[(family == key[0]) & (model == key[1])].max() for key in {*zip(family, model, strict=True)}}
    last = np.array([t == largest[f, m] for f, m, t in _zip(family, model, tokens)])
    several = {(f, m) for f, m, out in _zip(family, model, last) if not out}
    held = last & np.array([key in several for key in zip(family, model, strict=True)])
    if not held.any():
        raise UserError("rolling_origin: no model has two horizons, so none can be left out and predicted")
    used = [name for name in columns if name != norm and not name.startswith(NORMS)]  # no choice rests on norms
    train = fit_once({name: np.asarray(columns[name])[~last] for name in used}, norm, 100, 0)
    forecasts: list[Forecast] = []
    for f, m in sorted({(f, m) for f, m, out in _zip(family, model, held) if out}):
        rows = held & (family == f) & (model == m)
        grid = {name: np.asarray(columns[name], dtype=float)[rows] for name in ("lr", "batch", "loss")}
        if "diverged" in columns:
            grid["loss"] = np.where(np.asarray(columns["diverged"])[rows].astype(bool), math.nan, grid["loss"])
        smaller = train.of(f, m)[1]
        if not np.isfinite(grid["loss"]).any() or not smaller:
            continue
        size = smaller[-1].parameters
        for method, choice, note in _choices(train, f, m, float(tokens[rows][0]), size, published, dataset, methods):
            known = all(map(math.isfinite, choice))
            price = regret(grid["lr"], grid["batch"], grid["loss"], choice) if known else None
            forecasts.append(Forecast(f, m, int(tokens[rows][0]), method, *choice, price, note))
    return Rolling(tuple(forecasts))


def _zip(*columns: np.ndarray) -> list[tuple[Any, ...]]:
    """Rows with the first two columns as a key: (family, model, value)."""
    return list(zip(*(column.tolist() for column in columns), strict=True))


def _choices(
    fit: StudyFit, family: str, model: str, tokens: float, size: float, published: Sequence[PublishedRule],
    dataset: str, methods: Sequence[str],
) -> Iterator[tuple[str, Choice, str]]:  # fmt: skip
    for method in methods:
        choice, note = choose(fit, method, family, model, tokens, size)
        yield method, choice, note
    cells, _ = fit.of(family, model)
    seen = max(cell.tokens for cell in cells)
    best = min((c for c in cells if c.tokens == seen), key=lambda c: np.nan_to_num(c.lowest.loss, nan=math.inf))
    yield CARRIED, (best.lowest.lr, math.log2(best.batch)), ""
    optima = [b for b in fit.bottoms if b.family == family and b.optimum.usable]
    for rule in published:
        note = "in-sample" if dataset and rule.fitted_on == dataset else ""
        if rule.needs_constant:
            rule = rule.calibrate(
                [2**b.optimum.lr for b in optima], [2**b.optimum.batch for b in optima],
                [b.tokens for b in optima], [b.parameters for b in optima],
            )  # fmt: skip
            note = "calibrated"
        try:
            chosen = rule.best_batch(tokens, size) if rule.batch else float(best.batch)
            choice = math.log2(rule.rate(tokens, chosen, size)), math.log2(chosen)
            note = note if rule.batch else ", ".join(filter(None, (note, "batch carried over")))
        except UserError as error:
            choice, note = (math.nan, math.nan), str(error)
        yield rule.name, choice, note


def choose(fit: StudyFit, method: str, family: str, model: str, tokens: float, parameters: float) -> tuple[Choice, str]:
    """log2 of the learning rate and batch that one of our stages recommends for ``tokens``; NaN and why where none.

    Rules over all models of the family come first, with the model size in them where its exponent is told from 0;
    then those of the model itself.

    Raises:
        UserError: an unknown method.
    """
    if method not in OURS:
        raise UserError(f"choose: no method {method!r}; there are {', '.join(OURS)}")
    nothing = (math.nan, math.nan)
    if method == "one-stage":
        found = next((item for item in fit.surfaces if item.family == family), None)
        if found is None or found.surface is None:
            return nothing, found.reason if found else "no one-stage model was fitted"
        sized = found.surface.centre[2] != 0
        best = found.surface.optimum(tokens, parameters=parameters if sized else 1.0)
        return (best.lr, best.batch), ""
    recipe = "joint" if method == "joint" else "quadratic"
    batch = _law(fit, family, model, "batch", recipe, tokens=tokens, parameters=parameters)
    if math.isnan(batch):
        return nothing, "no rule for the batch"
    names = {"tokens": tokens, "parameters": parameters}
    names |= {"batch": 2.0**batch} if recipe == "quadratic" else {}
    rate = _law(fit, family, model, "lr", recipe, **names)
    return (rate, batch), "" if math.isfinite(rate) else "no rule for the learning rate"


def _law(fit: StudyFit, family: str, model: str, target: str, recipe: str, **values: float) -> float:
    given = tuple(name for name in ("batch", "tokens") if name in values)
    for rule in candidates(fit.rules, family, model, target, given, recipe):
        if rule.law is not None:
            return rule.law.predict({key: values[key] for key in rule.law.exponents}).log2
    return math.nan
