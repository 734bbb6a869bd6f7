from __future__ import annotations

import os
import shutil

import pytest

from tests.cuda.emulator import COMPILER, Builder, KernelError, run


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """Compiles kernels for the CPU; skips where there is no compiler. The workers of pytest-xdist share its folder."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"kernels are run on the CPU by a C++ compiler, and there is no {COMPILER}")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "kernels"
    folder.mkdir(exist_ok=True)
    return Builder(folder)


@pytest.fixture(scope="session")
def sanitizer(builder: Builder) -> None:
    """Skips where the address and undefined-behaviour sanitizers are missing."""
    unit = builder.folder / f"sanitizer_{os.getpid()}.cpp"
    unit.write_text("int main() { return 0; }")
    try:
        run([COMPILER, "-fsanitize=address,undefined", unit, "-o", unit.with_suffix("")])
        run([unit.with_suffix("")])
    except KernelError as error:
        pytest.skip(f"{COMPILER} cannot build with sanitizers here: {str(error)[-300:]}")
