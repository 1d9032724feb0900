"""Whether a plan says what speaks against it."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from synthetic import columns, write_runs

from disco.errors import UserError
from disco.fit import StudyFit, fit_table
from disco.guide import Answer, Curvatures, plan, sweep_settings
from disco.guide._estimates import stages
from disco.guide._overlay import disagreements
from disco.guide._settings import differences, unrecorded
from disco.guide._target import Size, choose
from disco.runs.reader import read_runs

RATES = np.arange(-9.0, 2.0)
SWEEP = {
    "optimizer.name": "scion", "optimizer.momentum": 0.0, "optimizer.weight_decay": 0.0, "schedule.decay": 0.0,
    "model.context": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def fit() -> StudyFit:
    return fit_table(columns(RATES))


def test_near_the_sweep_there_is_nothing_against_it(fit: StudyFit) -> None:
    found = plan(fit, 2**22)
    assert (found.trust, found.warnings) == ("ok", ())


def test_trust_falls_with_the_reach(fit: StudyFit) -> None:
    assert [plan(fit, 2 ** (21 + octaves)).trust for octaves in (1, 2, 3, 4)] == [
        "ok", "caution", "caution", "do not trust"
    ]  # fmt: skip
    assert plan(fit, 2**25).warnings[0] == (
        "extrapolated 4.0 doublings of tokens from a study that spans 3.0: a law that bends would not show"
    )


def test_one_batch_of_a_model_beside_others_with_several() -> None:
    """The family's rule knows the best batch, the model's own runs do not."""
    one = columns(RATES, model=(64, 2), batches=(2048,))
    several = columns(RATES)
    fit = fit_table({name: np.concatenate([one[name], several[name]]) for name in one})
    found = plan(fit, 2**22, model="d64-L2")
    assert (found.batch.source, found.trust) == ("rule", "caution")
    assert found.warnings[0].startswith("one batch was swept with this model")
    alone = plan(fit_table(one), 2**22)
    assert alone.trust == "do not trust"
    assert "one batch was swept, so nothing is known about the best one" in alone.warnings


def test_cells_without_an_optimum_are_a_reason() -> None:
    """Grids that end before the optimum at most batches."""
    found = plan(fit_table(columns(np.arange(-9.0, -4.0))), 2**22)
    assert found.trust == "do not trust"
    assert any("cells of the largest horizon have no optimum (edge-high" in note for note in found.warnings)


def test_settings_that_differ_are_told(fit: StudyFit) -> None:
    same = plan(fit, 2**22, run=dict(SWEEP), sweep={"scion": SWEEP})
    assert (same.unlike, same.trust) == ((), "ok")
    run = {"optimizer.momentum": 0.9, "schedule.decay": 0.2, "model.context": 4096, "optimizer.weight_decay": 0.1}
    found = plan(fit, 2**22, run=run, sweep={"scion": SWEEP})
    assert {each.setting for each in found.unlike} == set(run)
    assert found.trust == "caution"
    assert any(note.startswith("momentum is 0.9, in the sweep 0: ") for note in found.warnings)
    assert any(note.startswith("weight decay is 0.1, in the sweep 0: ") for note in found.warnings)
    other = plan(fit, 2**22, run={"optimizer.name": "adamw"}, sweep={"scion": SWEEP})
    assert other.trust == "do not trust"
    assert other.warnings[0].startswith("optimizer is adamw, in the sweep scion")


def test_what_neither_side_tells_is_not_compared() -> None:
    assert differences({}, {"optimizer.momentum": 0.9}) == ()
    assert differences(SWEEP, {}) == ()
    assert differences(SWEEP, {"data.tokenizer": "bytes"}) == ()
    assert unrecorded(SWEEP, {"data.tokenizer": "bytes", "optimizer.momentum": 0.9}) == ("data.tokenizer",)
    (each,) = differences(SWEEP, {"model.context": 4096})
    assert (each.sweep, each.run) == ("128", "4096")
    with pytest.raises(UserError, match=r"optimizer\.momentum of the run must be a number, got 'some'"):
        differences(SWEEP, {"optimizer.momentum": "some"})


def test_what_a_table_does_not_tell_is_said_not_to_be_recorded(fit: StudyFit) -> None:
    """Tables from elsewhere often tell no momentum; that is not a momentum of 0."""
    table = {"optimizer.name": "scion"}
    run = {"optimizer.name": "scion", "optimizer.momentum": 0.9}
    found = plan(fit, 2**22, run=run, sweep={"scion": table})
    assert (found.unlike, found.unrecorded) == ((), ("optimizer.momentum",))
    assert found.trust == "caution"
    assert found.warnings == ("the sweep's momentum is not recorded, so not compared with the run's",)
    several = plan(fit, 2**22, run=run | {"optimizer.weight_decay": 0.1}, sweep={"scion": table})
    assert several.warnings[0].startswith("the sweep's momentum and weight decay are not recorded")


def test_a_rule_that_is_no_plane_is_a_reason_only_where_that_moves_the_plan() -> None:
    """Hardly any noise: even a product term that moves nothing is significant."""
    reasons, plans = {}, {}
    for product in (0.003, 0.2):
        table = columns(RATES, noise=1e-4)
        bent = product * (np.log2(table["batch"]) - 11) * (np.log2(table["tokens"]) - 19.5)
        bent_fit = fit_table(table | {"lr": table["lr"] * 2**bent})
        rule = bent_fit.rule("scion", "d32-L2", "lr(batch, tokens)")
        assert rule.interaction is not None
        assert rule.interaction.p_value < 0.01
        assert rule.interaction.value == pytest.approx(product, abs=0.002)
        plans[product] = plan(bent_fit, 2**23)
        assert plans[product].stage == "two-stage"
        reasons[product] = [note for note in plans[product].warnings if "exponent of the batch changes" in note]
    (said,) = reasons[0.2]
    octaves, nats = (float(number) for number in re.findall(r"about ([\d.]+) octaves .*, ([\d.]+) nats", said)[0])
    assert octaves == pytest.approx(0.2 * (math.log2(plans[0.2].batch.value) - 11) * (23 - 19.5), abs=0.1)
    assert nats == pytest.approx(0.06 * octaves**2, rel=0.4)
    assert reasons[0.003] == []


def test_stages_that_differ_by_what_costs_nothing_are_no_news(fit: StudyFit) -> None:
    every = stages(choose(fit, 2**22, None, None, Size(), lambda _: 0))

    def said(apart: float) -> list[str]:
        rates = {"two-stage": 0.1, "joint": 0.1 * 2**apart}
        found = (Answer(n, lr, (lr * 0.999, lr * 1.001), 2048, None, None, None, "", "") for n, lr in rates.items())
        return list(disagreements(tuple(found), every, Curvatures(0.06)))

    assert said(0.1) == []
    assert said(0.8) == ["two-stage and joint differ by 0.8 octaves in the learning rate"]


def test_the_family_most_like_the_run_is_taken() -> None:
    table = columns(RATES)
    other = table | {"family": np.full(len(table["lr"]), "scion, momentum 0.9"), "loss": table["loss"] + 0.1}
    fit = fit_table({name: np.concatenate([table[name], other[name]]) for name in table})
    known = {"scion": SWEEP, "scion, momentum 0.9": SWEEP | {"optimizer.momentum": 0.9}}
    assert plan(fit, 2**22, run={"optimizer.momentum": 0.9}, sweep=known).family == "scion, momentum 0.9"
    assert plan(fit, 2**22, run={"optimizer.momentum": 0.0}, sweep=known).family == "scion"


def test_adams_rates_are_not_carried_over_width() -> None:
    table = columns(RATES)
    found = plan(fit_table(table | {"family": np.full(len(table["lr"]), "adamw")}), 2**22, width=256)
    assert found.trust == "do not trust"
    assert "Adam's falls with the size" in found.warnings[0]


def test_settings_of_records(tmp_path: Path) -> None:
    write_runs(tmp_path, rates=(-4, -3), batches=(1024, 2048), last=2**18)
    write_runs(tmp_path, rates=(-4,), batches=(1024,), last=2**18, momentum=0.9)
    found = sweep_settings(read_runs(tmp_path).runs)
    assert set(found) == {"scion", "scion, momentum 0.9"}
    plain = found["scion"]
    assert (plain["optimizer.name"], plain["optimizer.momentum"], plain["schedule.decay"]) == ("scion", 0.0, 0.0)
    assert (plain["schedule.shape"], plain["model.context"], plain["data.vocab"]) == ("constant", 128, 256)
    assert found["scion, momentum 0.9"]["optimizer.momentum"] == 0.9
    assert all(math.isfinite(value) for value in plain.values() if isinstance(value, float))
