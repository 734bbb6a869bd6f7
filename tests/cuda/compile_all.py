"""Compile every kernel in every combination for sm_80, sm_90 and the newest that NVRTC knows: a quarter of an hour.

Run ``python -m tests.cuda.compile_all`` from the root of a checkout; arguments are architectures to take instead, 90
for sm_90. Prints registers, and fails where a kernel needs a stack or spills.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product

from heliostat.cuda import _launch
from heliostat.cuda import group_whitening as kernels
from tests.cuda import nvrtc


def main(architectures: Sequence[str]) -> None:
    if nvrtc.library() is None:
        raise SystemExit("NVRTC is not installed: it comes with torch's packages for CUDA")
    wrong = []
    for architecture in map(int, architectures or (80, 90, nvrtc.architectures()[-1])):
        for dtype, size, method, one_launch in product(
            _launch.DTYPES, (16, 32, 48, 64, 96), kernels.METHODS, (True, False)
        ):
            name = (
                f"sm_{architecture} {dtype} groups of up to {size} {method} {'one launch' if one_launch else 'slabs'}"
            )
            options = _launch.options(kernels.defines(dtype, size, method, one_launch=one_launch))
            binary = nvrtc.compile_for(architecture, _launch.source("group_whitening"), options)
            print(name, binary.registers, flush=True)
            if binary.stack_and_spills:
                wrong.append(f"{name}: {binary.stack_and_spills} bytes of stack and spills")
    raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])
