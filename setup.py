"""Compiles csrc/ into the one extension rlhf_kernels._C; metadata lives in pyproject.toml.

RLHF_KERNELS_NATIVE = auto | 0 | 1    0: compile nothing; auto: install without it if compiling fails; 1: then fail
RLHF_KERNELS_CUDA   = auto | 0 | 1    auto: if torch has CUDA and nvcc is there; 1: fail if it cannot be
CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS are torch's own. build_info() reads what came of it, _build_report.json.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.append(os.path.dirname(os.path.abspath(__file__)))  # build backends do not look there
import setup_cuda

try:
    import torch

    os.environ.update(setup_cuda.environment() if torch.version.cuda else {})  # which cpp_extension reads at once
    from torch.utils import cpp_extension
except ModuleNotFoundError:
    torch = None

ROOT = Path(__file__).resolve().parent
NATIVE, CUDA = (os.environ.get(f"RLHF_KERNELS_{name}", "auto") for name in ("NATIVE", "CUDA"))
PYTHON = sys.implementation.cache_tag
REPORT = {"native": False, "native_reason": None, "cuda": False, "cuda_reason": None, "python": PYTHON}
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", "")  # a venv's own ninja


def check_request():
    if not {NATIVE, CUDA} <= {"auto", "0", "1"} or (NATIVE, CUDA) == ("0", "1"):
        raise SystemExit(f"RLHF_KERNELS_NATIVE={NATIVE} RLHF_KERNELS_CUDA={CUDA}: each is auto, 0 or 1, and not 0 1.")
    # torch is never a build requirement: an isolated build would fetch one of its own, and the extension would fit that
    # one only. An sdist needs no torch; everything else stops here, before pip has downloaded anything.
    needed = NATIVE != "0" and not {"sdist", "egg_info"} & set(sys.argv)
    if needed and (torch is None or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)):
        how = 'pip install "torch>=2.11" "setuptools>=77" ninja pybind11 && pip install --no-build-isolation .'
        raise SystemExit(f"rlhf_kernels compiles against the torch it runs with, >= 2.11; run: {how}")


def csrc(*suffixes):
    return sorted(str(p.relative_to(ROOT)) for suffix in suffixes for p in (ROOT / "csrc").rglob(f"*.{suffix}"))


def extension():
    compiler = subprocess.getoutput(f"{cpp_extension.get_cxx_compiler()} --version").partition("\n")[0]
    REPORT.update(torch=torch.__version__, torch_cuda=torch.version.cuda, compiler=compiler)
    REPORT["cuda_reason"] = setup_cuda.why_not(CUDA, torch)
    if CUDA == "1" and REPORT["cuda_reason"]:
        raise SystemExit(f"RLHF_KERNELS_CUDA=1, but {REPORT['cuda_reason']}.")
    jobs = min(os.cpu_count() or 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 31)  # 2 GiB each
    os.environ.setdefault("MAX_JOBS", str(max(1, jobs)))
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    # No -march: wheels travel. Files that need AVX2 or AVX-512 ask for it by pragma and are chosen at run time.
    cxx = ["-std=c++20", "-O3", "-g0", *openmp, "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
    flags = {"cxx": [*cxx, "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]}
    options = {"extra_compile_args": flags, "extra_link_args": openmp, "depends": csrc("h", "cuh")}
    options["include_dirs"] = [str(ROOT / "csrc")]
    if REPORT["cuda_reason"]:
        sources = [path for path in csrc("cpp") if not path.endswith("_cuda.cpp") and "common/cuda/" not in path]
        return cpp_extension.CppExtension("rlhf_kernels._C", sources, **options)
    flags["nvcc"] = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo"]
    options["define_macros"] = [("RLHF_KERNELS_CUDA", "1")]
    REPORT["cuda_arches"] = os.environ["TORCH_CUDA_ARCH_LIST"]
    module = cpp_extension.CUDAExtension("rlhf_kernels._C", csrc("cpp", "cu"), **options)
    return setup_cuda.complete(module, torch.version.cuda)


class BuildExt(cpp_extension.BuildExtension if torch else build_ext):
    def initialize_options(self):
        super().initialize_options()
        if torch:  # kept between builds, wheel or editable: ninja compiles what changed
            self.build_temp = str(ROOT / "build" / f"{PYTHON}-torch{torch.__version__}")

    def run(self):
        start = time.time()
        super().run()
        REPORT.update(built=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), seconds=round(time.time() - start, 1))
        package = Path(ROOT if self.inplace else self.build_lib, "rlhf_kernels")
        for stale in [] if REPORT["native"] else package.glob("_C.*"):
            stale.unlink()
        (package / "_build_report.json").write_text(json.dumps(REPORT, indent=1) + "\n")

    def build_extensions(self):
        if NATIVE == "0":
            REPORT["native_reason"] = REPORT["cuda_reason"] = "RLHF_KERNELS_NATIVE=0 was set when it was installed"
            self.extensions = []
            return
        (log := Path(self.build_temp, "output.txt")).parent.mkdir(parents=True, exist_ok=True)
        tee = subprocess.Popen(["tee", log], stdin=subprocess.PIPE)
        screen = [(os.dup(stream), stream) for stream in (1, 2)]
        for _, stream in screen:  # compilers' output goes to the screen, and is kept
            os.dup2(tee.stdin.fileno(), stream)
        try:
            super().build_extensions()
            REPORT.update(native=True, cuda=not REPORT["cuda_reason"])
        except Exception as error:  # whatever a compiler, a linker or ninja can do wrong
            if NATIVE == "1":
                raise SystemExit(f"csrc/ did not compile, and RLHF_KERNELS_NATIVE=1 insists: {error}") from error
            REPORT["native_reason"] = f"compiling it failed when it was installed ({error})"
            self.extensions = []
        finally:
            for copy, stream in screen:
                os.dup2(copy, stream)
            tee.communicate()
            if not REPORT["native"]:
                REPORT["compiler_output"] = log.read_text(errors="replace").splitlines()[-20:]


check_request()
module = extension() if torch and NATIVE != "0" else Extension("rlhf_kernels._C", csrc("cpp"))
setup(ext_modules=[module], cmdclass={"build_ext": BuildExt})
