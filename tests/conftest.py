"""Shared by all tests: one thread, where the published tables are, and the full form of checks on request."""

import json
from pathlib import Path
from typing import Any

import pytest

SHARING = ("distributed", "cluster")
"""Folders whose tests run in one process, where many run tests (pytest-xdist)."""
SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the full form of the acceptance checks too")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for (
        item
    ) in items:  # tests of a file share fixtures, those of some folders a pool or daemons: they stay in one process
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder in SHARING else str(item.path)))
    if not config.getoption("--full"):
        for item in items:
            if "full" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="full form: scripts/test --all"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of the published tables; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"published tables are not here ({SHARED.parent.name}/{SHARED.name} beside the project)")
    return SHARED


@pytest.fixture(scope="session")
def vectors(shared: Path) -> dict[str, dict[str, Any]]:
    """Numeric vectors by id."""
    document = json.loads((shared / "vectors-dev.json").read_text())
    return {vector["id"]: vector for vector in document["vectors"]}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
