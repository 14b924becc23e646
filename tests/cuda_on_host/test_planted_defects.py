"""Mistakes that CUDA kernels are prone to, planted one at a time into a copy of csrc/: test_every_kernel.py turns red.

`make cuda-on-host` runs this; a defect costs a compilation once, then the seconds of its tests.
"""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.cuda_on_host.build import ROOT, asan_environment, build, build_changed

pytestmark = pytest.mark.cuda_on_host

ROW_BLOCK = "common/cuda/row_block.h"
DLOGITS = "common/cuda/dlogits.h"


class Defect(NamedTuple):
    file: str
    old: str
    new: str
    tests: str  # of test_every_kernel.py, as -k has it
    asan: bool = False  # only AddressSanitizer can see it: values are right as long as what lies beyond may be read
    only: str = ""  # of the sources that read the file, the one that is compiled with the defect


DEFECTS = {
    "load past a row's end": Defect(
        ROW_BLOCK,
        "from + (whole || column < tile.columns ? column : 0)",
        "from + column",
        "logprob_shapes",
        asan=True,
        only="logprob_kernels.cu",
    ),
    "a logit too many": Defect(
        ROW_BLOCK,
        "column + j < tile.columns ? map(",
        "column + j <= tile.columns ? map(",
        "logprob_shapes",
        only="logprob_kernels.cu",
    ),
    "no barrier before warps merge": Defect(
        ROW_BLOCK,
        "of_warp[kWarps] = before;\n  __syncthreads();",
        "of_warp[kWarps] = before;",
        "kl_shapes",
        only="kl_kernels.cu",
    ),
    "a warp too few": Defect(
        ROW_BLOCK,
        "lane <= kWarps ? of_warp[lane]",
        "lane <= kWarps && lane != kWarps - 1 ? of_warp[lane]",
        "logprob_shapes",
        only="logprob_kernels.cu",
    ),
    "the tiles before forgotten": Defect(
        ROW_BLOCK,
        "lane <= kWarps ? of_warp[lane]",
        "lane < kWarps ? of_warp[lane]",
        "several",
        only="logprob_kernels.cu",
    ),
    "no barrier between rounds": Defect(
        "common/cuda/compact.cu",
        "__syncthreads();  // of_warp may still be read from the round before",
        "",
        "rows_that",
    ),
    "own warp counted twice": Defect(
        "common/cuda/compact.cu", "if (i < warp) before", "if (i <= warp) before", "rows_that"
    ),
    "store past a row's end": Defect(
        DLOGITS,
        "if (whole() || column < tile.columns) {",
        "if (whole() || column < tile.columns + kVector) {",
        "logprob_shapes",
        asan=True,
        only="logprob_kernels.cu",
    ),
    "columns exchanged in a vector store": Defect(
        DLOGITS,
        "from_float<Out>(d[j]);\n  *rein",
        "from_float<Out>(d[j ^ 1]);\n  *rein",
        "logprob_shapes",
        only="logprob_kernels.cu",
    ),
    "the target's gradient by a thread that does not own its column": Defect(
        ROW_BLOCK,
        "% kThreads == threadIdx.x;",
        "% kThreads == (threadIdx.x ^ 1);",
        "logprob_shapes",
        only="logprob_kernels.cu",
    ),
    "the other model's logits of the row before": Defect(
        "kl/kl_kernels.cu",
        "    from = other.logits + blockIdx.x * other.stride;",
        "    from = other.logits;",
        "kl_shapes",
    ),
    "the last row left out of a sum": Defect(
        "common/cuda/copies.cu", "for (int64_t row = y; row < rows;", "for (int64_t row = y; row < rows - 1;", "shapes"
    ),
    "the stride of a size of one": Defect(
        "common/cuda/device_head.h",
        "part({hidden.const_data_ptr(), depth()}, first)",
        "part({hidden.const_data_ptr(), hidden.stride(0)}, first)",
        "strides",
        only="linear_logprobs_cuda.cpp",
    ),
    "the other model's logits where the policy's are kept": Defect(
        "kl/linear_kl_cuda.cpp",
        "places(logits ? logits + all_logits(inputs) / 2 : nullptr)",
        "places(logits)",
        "kept_logits_of_a_kl",
    ),
    "a thread too many": Defect("kl/penalty_kernels.cu", "if (i >= count)", "if (i > count)", "elementwise", asan=True),
    "a pair's index for a response's": Defect(
        "preference/preference_kernels.cu", "args.rejected[pair] == response", "args.rejected[pair] == pair", "dpo"
    ),
}


def run(module, tests, asan):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "RK_CUDA"))}
    environment |= {"OMP_NUM_THREADS": "1", "RK_CUDA_ON_HOST_MODULE": str(module)} | (
        asan_environment() if asan else {}
    )
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.cuda_on_host.plugin", "-p", "no:cacheprovider"]
    command += ["--capture=sys"]  # what the sanitizer writes comes through
    return subprocess.run(
        [*command, "-m", "cuda_on_host", "tests/cuda_on_host/test_every_kernel.py", "-k", tests],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_turns_red(name):
    defect = DEFECTS[name]
    build(defect.asan)
    folder = name.replace(" ", "_").replace("'", "")
    module = build_changed(folder, {defect.file: {defect.old: defect.new}}, defect.asan, defect.only)
    done = run(module, defect.tests, defect.asan)
    if defect.asan:
        assert "ERROR: AddressSanitizer: heap-buffer-overflow" in done.stdout, done.stdout
    else:  # a wild store may also end the process
        crashed = done.returncode < 0 and "test_every_kernel.py" in done.stdout
        assert crashed or (done.returncode == 1 and " failed" in done.stdout), done.stdout


@pytest.mark.parametrize("asan", [False, True])
def test_stays_green_without_a_defect(asan):
    """The same way, with a change that is none."""
    build(asan)
    module = build_changed(
        f"nothing_{asan}", {"common/cuda/compact.cu": {"kRowsPerThread = 16;": "kRowsPerThread = 8;"}}, asan
    )
    done = run(module, "shapes or rows_that or elementwise or dpo", asan)
    assert done.returncode == 0, done.stdout


def test_a_defect_that_fits_no_longer_is_an_error():
    with pytest.raises(ValueError, match="holds it 0 times: not there"):
        build_changed("unplanted", {ROW_BLOCK: {"not there": ""}})
