"""Where the CUDA toolkit is, and what serves in place of its missing parts; setup.py asks, torch is not needed.

nvcc and little more will do: torch's CUDA wheels bring along, as Python packages, the libraries that they use and the
headers that torch's own headers include. No GPU is needed.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

OLDEST = (12, 6)
HEADERS = ["cuda_runtime.h", "cublas_v2.h", "cublasLt.h", "cusparse.h", "cusolverDn.h"]
LIBRARIES = ["cudart", "cublasLt"]
TARGETS = {"x86_64": ["x86_64-linux"], "aarch64": ["sbsa-linux", "aarch64-linux"]}.get(platform.machine(), [])
USUAL = Path("/usr/local/cuda")
SYSTEM = {"include": ["/usr/include"], "lib": ["/usr/lib64", f"/usr/lib/{platform.machine()}-linux-gnu"]}


def output_of(*command):
    command = [*map(str, command)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout


def toolkits_of(nvcc):
    """The toolkits of what is on PATH, a script or a link perhaps: the real nvcc, run to compile nothing, names
    them."""
    folders = dict(re.findall(r"^#\$ (TOP|_HERE_)=(.+)$", output_of(nvcc, "--dryrun", "unread.cu"), re.MULTILINE))
    homes = [folders.get("TOP"), "_HERE_" in folders and f"{folders['_HERE_']}/..", Path(nvcc).resolve().parents[1]]
    return [Path(home).resolve() for home in homes if home]


def toolkit():
    """The folder with bin/nvcc, or None. What CUDA_HOME or CUDA_PATH say is final."""
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        homes = [Path(named)]
    else:
        nvcc = shutil.which("nvcc")
        homes = [*(toolkits_of(nvcc) if nvcc else []), USUAL]
    return next((home for home in homes if (home / "bin" / "nvcc").is_file()), None)


def why_no_toolkit():
    if toolkit():
        return None
    if named := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return f"CUDA_HOME is {named}, and there is no {named}/bin/nvcc"
    return f"nvcc was found neither on PATH nor in {USUAL}: install the CUDA toolkit, or set CUDA_HOME to where it is"


def nvcc_version(home):
    return tuple(map(int, re.search(r"release (\d+)\.(\d+)", output_of(home / "bin" / "nvcc", "--version")).groups()))


def environment():
    """The variables that torch's part of the build reads: CUDA_HOME as it is imported, TORCH_CUDA_ARCH_LIST so as to
    ask no GPU."""
    if (home := toolkit()) is None:
        return {}
    known = output_of(home / "bin" / "nvcc", "--list-gpu-arch").split()
    newest = ["10.0"] if "compute_100" in known else []  # nvcc has it since 12.8
    arches = os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(["8.0", "9.0", *newest]) + "+PTX"
    return {"CUDA_HOME": str(home), "TORCH_CUDA_ARCH_LIST": arches}


def folders(kind, cuda):
    """Where headers ("include") or libraries ("lib") may lie, the toolkit's own first; `cuda` is torch's version."""
    home, major = toolkit(), cuda.partition(".")[0]
    own = [home / room for room in ([kind] if kind == "include" else ["lib64", "lib"])]
    own += [home / "targets" / target / kind for target in TARGETS]
    packages = [package for path in sys.path for package in sorted(Path(path, "nvidia").glob("*"))]
    # One folder for all of CUDA 13; up to CUDA 12 each library has its own.
    fitting = [p for p in packages if (p.name == f"cu{major}" if int(major) > 12 else not re.match(r"cu\d", p.name))]
    rooms = [*own, *map(Path, SYSTEM[kind]), *(package / kind for package in fitting)]
    return [room for room in dict.fromkeys(rooms) if room.is_dir()]


def find(name, kind, cuda):
    return next((room / name for room in folders(kind, cuda) if (room / name).exists()), None)


def soname(library, cuda):
    return f"lib{library}.so.{cuda.partition('.')[0]}"


def why_not(wanted, torch):
    """Why CUDA kernels cannot or shall not be compiled for this torch; None if they will be."""
    if wanted == "0":
        return "RLHF_KERNELS_CUDA=0 was set when it was installed"
    if (cuda := torch.version.cuda) is None:
        return f"torch {torch.__version__}, with which it was compiled, has no CUDA"
    if reason := why_no_toolkit():
        return reason
    home = toolkit()
    version = nvcc_version(home)
    version_of_nvcc = f"{home}/bin/nvcc is of CUDA {version[0]}.{version[1]}"
    if version[0] != int(cuda.partition(".")[0]):
        return f"{version_of_nvcc} and torch of CUDA {cuda} (CUDA_HOME names another toolkit)"
    if version < OLDEST:
        return f"{version_of_nvcc}, and {OLDEST[0]}.{OLDEST[1]} is the oldest that will do"
    missing = [name for name in HEADERS if not find(name, "include", cuda)]
    missing += [name for library in LIBRARIES if not find(name := soname(library, cuda), "lib", cuda)]
    return f"{', '.join(missing)}: neither in {home} nor in Python's nvidia packages" if missing else None


def complete(extension, cuda):
    """Adds to torch's CUDAExtension what it expects of a full toolkit. Libraries are named by their path: packages have
    no libcudart.so, only libcudart.so.13. They are loaded already when the extension is: torch needs the same."""
    extension.include_dirs += [str(room) for room in folders("include", cuda) if str(room) not in SYSTEM["include"]]
    extension.libraries = [library for library in extension.libraries if library not in LIBRARIES]
    extension.extra_link_args += [str(find(soname(library, cuda), "lib", cuda)) for library in LIBRARIES]
    return extension


if __name__ == "__main__":
    sys.exit(f"{reason}." if (reason := why_no_toolkit()) else print(toolkit()))
