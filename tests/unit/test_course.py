"""What is read of a run's record, and what a fit keeps of it."""

import json
from pathlib import Path

import numpy as np
import planned
import records

from disco.guide._course import course
from disco.guide._kept import packed, unpacked
from disco.runs.reader import read_run
from disco.runs.schema import MOMENTUM, norm_key


def size_of(layer: str) -> str:
    return norm_key(MOMENTUM[0], layer, MOMENTUM[1])


def test_the_momentum_of_a_group_is_that_of_its_largest_matrix(tmp_path: Path) -> None:
    lines = [
        {"step": 0, norm_key("rms_to_inf", "output"): 1.0},
        {"step": 1, size_of("layers.0.wq"): 3.0, size_of("layers.0.wo"): 4.0, size_of("output"): 0.5},
        {"step": 2, size_of("layers.0.wq"): 6.0, size_of("layers.0.wo"): 5.0, size_of("output"): 0.25},
    ]
    found = course(read_run(records.write(tmp_path, records.config(), lines)))
    assert found.momenta.keys() == {"hidden", "output"}
    np.testing.assert_equal(found.momenta["hidden"], [np.nan, 4.0, 6.0])
    np.testing.assert_equal(found.momenta["output"], [np.nan, 0.5, 0.25])
    assert found.vocab == 256
    assert found.until(256).momenta["output"][-1] == 0.5


def test_records_without_sizes_of_momenta_have_none(tmp_path: Path) -> None:
    lines = [{"step": step, norm_key("rms_to_inf", "output"): 1.0 + step} for step in range(3)]
    assert course(read_run(records.write(tmp_path, records.config(), lines))).momenta == {}


def test_a_course_survives_a_fits_file() -> None:
    run = planned.run(share=0.25, vocab=256.0, momentum=0.9, ratios={"hidden": 0.125})
    again = unpacked(json.loads(json.dumps(packed(run), allow_nan=False)))
    kept = np.isin(run.tokens, again.tokens)
    assert 5 < kept.sum() <= len(run.tokens)
    for name in ("norms", "momenta"):
        for group, values in getattr(run, name).items():
            np.testing.assert_allclose(getattr(again, name)[group], values[kept], rtol=1e-4)
    assert (again.vocab, again.momentum, again.ratios) == (256.0, 0.9, {"hidden": 0.125})


def test_a_fit_from_before_there_were_momenta_is_read() -> None:
    old = json.loads(json.dumps(packed(planned.run(share=0.3)), allow_nan=False))
    del old["momenta"], old["vocab"]
    again = unpacked(old)
    assert again.momenta == {}
    assert np.isnan(again.vocab)
