"""Which runs train together: alike, at the same point, no more than fit or gain, and enough cohorts for all workers."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from records import config

from disco.sweep import cohorts
from disco.sweep.cohorts import Cohort, bytes_needed, group, largest, work
from disco.sweep.forecast import OVERHEAD, START_SECONDS, forecast, last_end
from disco.sweep.places import Places
from disco.sweep.record import COHORTS, read_cohorts, write_cohorts
from disco.train.config import ParallelConfig, TrainConfig

PLENTY = 2**36


def scan(count: int, **changes: object) -> list[TrainConfig]:
    return [config(optimizer={"lr": 2.0**-i}, **changes) for i in range(count)]


def sizes(found: list[Cohort]) -> list[int]:
    return [len(cohort.runs) for cohort in found]


def at_start(_: TrainConfig) -> int:
    return 0


def test_runs_of_one_kind_are_shared_by_the_workers() -> None:
    assert sizes(group(scan(12), at_start, (), workers=1, memory=PLENTY)) == [6, 6]
    assert sizes(group(scan(12), at_start, (), workers=2, memory=PLENTY)) == [3, 3, 3, 3]
    assert sizes(group(scan(3), at_start, (), workers=4, memory=PLENTY)) == [1, 1, 1]
    together = group(scan(12), at_start, (), workers=2, memory=PLENTY)
    assert sorted(run.id for cohort in together for run in cohort.runs) == sorted(run.id for run in scan(12))


def test_only_runs_that_are_alike_and_at_the_same_point_train_together() -> None:
    runs = [run for seed, batch in itertools.product((0, 1), (256, 512)) for run in scan(4, seed=seed, batch=batch)]
    begun = {run.id for run in scan(4, seed=1, batch=512)}
    found = group(runs, lambda run: 1024 * (run.id in begun), (), workers=1, memory=PLENTY)
    for cohort in found:
        assert len({run.batch for run in cohort.runs}) == 1
        assert len({run.id in begun for run in cohort.runs}) == 1
    assert any(len({run.seed for run in cohort.runs}) == 2 for cohort in found)


def test_the_longest_work_comes_first() -> None:
    runs = [*scan(2, horizon=2**13), *scan(2, horizon=2**15, seed=1), *scan(2, horizon=2**14, seed=2)]
    found = group(runs, at_start, (), workers=2, memory=PLENTY)
    amounts = [sum(map(work, cohort.runs)) for cohort in found]
    assert amounts == sorted(amounts, reverse=True)


def test_cohorts_fit_into_memory_and_gain_from_their_size() -> None:
    run = config()
    assert largest(run, PLENTY) == cohorts.MEMBERS
    assert largest(replace(run, batch=2**12, horizon=2**13), PLENTY) == cohorts.TOKENS // 2**12
    assert largest(replace(run, batch=2**16, horizon=2**16), PLENTY) == 1
    assert largest(run, int(cohorts.PROCESS_BYTES + 5.5 * bytes_needed(run))) == 5
    assert largest(run, 0) == 1, "a run alone is tried whatever it needs"


def test_interrupted_cohorts_stay_together() -> None:
    runs = scan(8)
    begun = [Cohort((runs[0], runs[5]), compiled=True), Cohort((runs[1],))]
    found = group(runs, at_start, begun, workers=1, memory=PLENTY)
    assert all(cohort in found for cohort in begun)
    assert sorted(sizes(found)) == [1, 1, 2, 2, 2]


def test_cohorts_are_written_and_read_for_the_horizon_that_they_were_on_the_way_to(tmp_path: Path) -> None:
    runs = scan(4)
    written = [Cohort((runs[2], runs[0]), compiled=True), Cohort((runs[1], runs[3]))]
    assert read_cohorts(tmp_path, runs) == []
    write_cohorts(tmp_path, written)
    assert read_cohorts(tmp_path, runs) == written
    assert read_cohorts(tmp_path, runs[:2]) == [Cohort((runs[0],), compiled=True), Cohort((runs[1],))]
    assert read_cohorts(tmp_path, [replace(run, horizon=2**15) for run in runs]) == []
    (tmp_path / COHORTS).write_text("{")
    assert read_cohorts(tmp_path, runs) == []


def test_long_cohorts_are_compiled_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    long = scan(4, horizon=2**30)
    monkeypatch.setattr(cohorts.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert all(cohort.compiled for cohort in group(long, at_start, (), workers=1, memory=PLENTY))
    assert not any(cohort.compiled for cohort in group(scan(4), at_start, (), workers=1, memory=PLENTY))
    monkeypatch.setattr(cohorts.shutil, "which", lambda name: None)
    assert not any(cohort.compiled for cohort in group(long, at_start, (), workers=1, memory=PLENTY))


def test_a_run_on_several_processes_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohorts.shutil, "which", lambda name: "/usr/bin/g++")
    runs = scan(4, horizon=2**13)
    many = [replace(run, parallel=ParallelConfig(shard=2)) for run in runs]
    tensor = [replace(run, parallel=ParallelConfig(tensor=2)) for run in runs]
    begun = [Cohort(tuple(many[:3]), compiled=True)]  # together, as a local engine left them
    found = group(many, at_start, begun, workers=1, memory=PLENTY)
    assert [(len(cohort.runs), cohort.compiled) for cohort in found] == [(1, True)] * 3 + [(1, False)]
    assert {cohort.runs[0].id for cohort in found} == {run.id for run in runs}
    assert group(runs, at_start, [Cohort(tuple(runs[:3]))], workers=1, memory=PLENTY)[0].runs == tuple(runs[:3])
    begun = [Cohort(tuple(tensor[:2]), compiled=True)]
    monkeypatch.setattr(cohorts, "COMPILED_WORK", 1.0)
    found = group(tensor, at_start, begun, workers=1, memory=PLENTY)
    assert [(len(cohort.runs), cohort.compiled) for cohort in found] == [(1, False)] * 4, "compile excludes tensor"


def test_a_forecast_adds_up(tmp_path: Path) -> None:
    runs = scan(8, horizon=2**14)
    asked = []

    def speeds(found: object, cache: Path, workers: int, gpus: tuple[str, ...]) -> list[float]:
        asked.append((found, workers, gpus))
        return [2.0**12]

    expected = forecast(runs, tmp_path, tmp_path, Places(2, PLENTY, ("0", "1")), speeds)
    assert (expected.runs, expected.cohorts, expected.tokens) == (8, 4, 2**17)
    assert expected.seconds == pytest.approx(START_SECONDS + OVERHEAD * 2 * 2**15 / 2**12)
    assert expected.memory == pytest.approx(2 * (cohorts.PROCESS_BYTES + 2 * bytes_needed(runs[0])))
    assert (expected.workers, expected.gpus) == (2, 2)
    ((kinds, *where),) = asked
    assert (len(kinds), where) == (1, [2, ("0", "1")]), "one kind of cohort is measured once"
    assert forecast([], tmp_path, tmp_path, Places(2, PLENTY), lambda *_: []).seconds == START_SECONDS


def test_work_goes_to_the_first_idle_worker() -> None:
    assert last_end([5, 4, 3, 3], 2) == 8
    assert last_end([5, 4, 3, 3], 1) == 15
    assert last_end([], 3) == 0
