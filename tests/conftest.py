from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.harness import ProcessPool

torch.set_num_threads(1)  # pytest-xdist runs one worker a core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if "NOTSET" not in item.nodeid]  # a contract's table left empty
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Spread what a contract declares into one test each: ``golden_case``, ``degenerate_case``, ``error_case``."""
    for argument in ("golden_case", "degenerate_case", "error_case"):
        if argument in metafunc.fixturenames:
            cases = getattr(metafunc.cls(), argument + "s")()
            metafunc.parametrize(argument, list(cases.values()), ids=list(cases))


@pytest.fixture(scope="session")
def two_processes() -> Iterator[ProcessPool]:
    with ProcessPool(2) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
