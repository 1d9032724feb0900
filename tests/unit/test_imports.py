"""What importing costs: in a fresh interpreter each, since this process has everything loaded."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "scipy", "matplotlib", "polars", "plotly", "tokenizers", "rich", "tyro")


def loaded(statement: str) -> set[str]:
    """Those of the heavy packages that a statement imports."""
    code = f"import sys\n{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_disco_is_light() -> None:
    assert loaded("import disco") == set()
    assert loaded("import disco; disco.Scion, disco.norm, disco.param_groups, disco.init_") == {"torch"}


WITHOUT_TORCH = (
    "fit", "guide", "report", "runs.table", "sweep.engines.local", "sweep.study", "train.config", "train.data",
)  # fmt: skip


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_statistics_records_and_pages_work_without_torch(module: str) -> None:
    assert "torch" not in loaded(f"import disco.{module}")


def test_command_line_starts_light() -> None:
    assert loaded("import disco.cli") <= {"tyro", "rich"}


def test_every_public_name_exists() -> None:
    import disco

    for name in disco.__all__:
        assert getattr(disco, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Adam'"):
        _ = disco.Adam
