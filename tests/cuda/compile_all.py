"""Compile every kernel in every combination for sm_80, sm_90 and the newest that NVRTC knows: a quarter of an hour.

Run ``python -m tests.cuda.compile_all`` from the root of a checkout; arguments are architectures to take instead, 90
for sm_90. Prints registers, and fails where a kernel needs a stack or spills.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product

from heliostat.cuda import _launch, group_whitening, two_bit
from tests.cuda import nvrtc


def combinations() -> Iterator[tuple[str, str, _launch.Defines]]:
    """A title, the kernels' file and the macros."""
    for dtype, size, method, one_launch in product(
        _launch.DTYPES, (16, 32, 48, 64, 96), group_whitening.METHODS, (True, False)
    ):
        title = f"{dtype} groups of up to {size} {method} {'one launch' if one_launch else 'slabs'}"
        yield title, "group_whitening", group_whitening.defines(dtype, size, method, one_launch=one_launch)
    for dtype in _launch.DTYPES:
        plans = {two_bit.plan(dtype, batch) for batch in range(1, 17)}
        for rows, tensor_cores in [(0, False), *sorted(plans)]:
            title = f"{dtype} {rows} rows of x {'by tensor cores' if tensor_cores else ''}"
            yield title, "two_bit", two_bit.defines(dtype, rows, tensor_cores)


def main(architectures: Sequence[str]) -> None:
    if nvrtc.library() is None:
        raise SystemExit("NVRTC is not installed: it comes with torch's packages for CUDA")
    wrong = []
    for architecture in map(int, architectures or (80, 90, nvrtc.architectures()[-1])):
        for title, stem, defines in combinations():
            name = f"sm_{architecture} {stem} {title}"
            binary = nvrtc.compile_for(architecture, _launch.source(stem), _launch.options(defines))
            print(name, binary.registers, flush=True)
            if binary.stack_and_spills:
                wrong.append(f"{name}: {binary.stack_and_spills} bytes of stack and spills")
    raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])
