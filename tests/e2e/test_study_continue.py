"""A study with longer horizons continues its constant-rate runs, and ends with the record of a long run."""

from pathlib import Path

from sweeps import records, run, write_study

from disco.runs.schema import METRICS

AXES = "[axes]\nlr = ['2^-4', '2^-2']\n"


def test_longer_horizons_continue(tmp_path: Path) -> None:
    short = write_study(tmp_path / "short.toml", AXES, horizon=2**12)
    long = write_study(tmp_path / "long.toml", AXES, "[decay]\nfraction = 0.25\nat = ['2^13']\n", horizon=2**13)
    out, afresh = tmp_path / "out", tmp_path / "afresh"
    assert run(short, out, workers=1)["finished"] == 2
    before = {folder: (folder / METRICS).read_bytes() for folder in out.iterdir() if (folder / METRICS).exists()}
    assert {record[2]["tokens"] for record in records(out).values()} == {2**12}

    assert run(long, out, workers=1)["finished"] == 4
    for folder, content in before.items():
        # Wall times included: these lines were written once, by the short study.
        assert (folder / METRICS).read_bytes().startswith(content)
    assert run(long, afresh, workers=1)["finished"] == 4
    assert records(out) == records(afresh)
    assert {record[2]["step"] for record in records(out).values()} == {32, 40}
