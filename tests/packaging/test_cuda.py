"""Finding a CUDA toolkit and reading what ptxas says, on trees and texts made for it: no CUDA and no GPU is needed."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import setup_cuda

ROOT = Path(__file__).resolve().parents[2]


def load_cuda_check():
    sys.path.insert(0, str(ROOT / "tests" / "packaging"))  # as a script it finds what lies beside it
    spec = importlib.util.spec_from_file_location("cuda_check", ROOT / "tests" / "packaging" / "cuda_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "tests" / "packaging"))
    return module


NVCC = """#!/bin/sh
case "$1" in
  --dryrun) printf '#$ _SPACE_= \\n#$ _HERE_={home}/bin\\n#$ TOP={home}/bin/..\\n' >&2 ;;
  --version) echo 'Cuda compilation tools, release {version}, V{version}.88' ;;
  --list-gpu-arch) printf 'compute_80\\ncompute_90\\n{newest}\\n' ;;
esac
"""


def make_toolkit(home, *, version="13.0", newest="compute_100"):
    make_files(home, "bin/nvcc", "include/cuda_runtime.h", f"lib64/libcudart.so.{version.partition('.')[0]}")
    (home / "bin" / "nvcc").write_text(NVCC.format(home=home, version=version, newest=newest))
    (home / "bin" / "nvcc").chmod(0o755)
    return home


def make_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


CUBLAS = ("cublas_v2.h", "cublasLt.h")
SOLVERS = ("cusparse.h", "cusolverDn.h")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A machine with nothing of CUDA on it, whose Python packages lie in the directory that is returned."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "path").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    monkeypatch.setattr(setup_cuda.shutil, "which", lambda name: next(map(str, tmp_path.glob(f"path/{name}")), None))
    monkeypatch.setattr(setup_cuda, "USUAL", tmp_path / "usual")
    monkeypatch.setattr(setup_cuda, "SYSTEM", {"include": [], "lib": []})
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    return tmp_path / "site"


def torch_of(cuda):
    return SimpleNamespace(__version__="2.11.0", version=SimpleNamespace(cuda=cuda))


def test_no_toolkit_is_said_in_a_sentence(site):
    assert setup_cuda.toolkit() is None and setup_cuda.environment() == {}
    assert "nvcc was found neither on PATH" in setup_cuda.why_not("auto", torch_of("13.0"))
    assert "CUDA_HOME" in setup_cuda.why_no_toolkit()


@pytest.mark.parametrize("kind", ["script", "link"])
def test_what_is_on_the_path_leads_to_the_toolkit(site, tmp_path, kind):
    home, nvcc = make_toolkit(tmp_path / "real"), tmp_path / "path" / "nvcc"
    if kind == "script":
        nvcc.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
        nvcc.chmod(0o755)
    else:
        nvcc.symlink_to(home / "bin" / "nvcc")
    assert setup_cuda.toolkit() == home


def test_toolkit_in_the_usual_place(site, tmp_path):
    assert setup_cuda.toolkit() is None
    make_toolkit(tmp_path / "usual")
    assert setup_cuda.toolkit() == tmp_path / "usual"


def test_cuda_home_is_final(site, tmp_path, monkeypatch):
    make_toolkit(tmp_path / "usual")
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "other")))
    assert setup_cuda.toolkit() == tmp_path / "other"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert setup_cuda.toolkit() is None
    assert f"there is no {tmp_path}/nowhere/bin/nvcc" in setup_cuda.why_no_toolkit()


def test_asked_as_a_script_it_ends_in_one_line(tmp_path):
    command = [sys.executable, ROOT / "setup_cuda.py"]
    done = subprocess.run(command, env={"CUDA_HOME": str(tmp_path)}, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"CUDA_HOME is {tmp_path}, and there is no {tmp_path}/bin/nvcc."]


@pytest.mark.parametrize("newest, arches", [("compute_100", "8.0;9.0;10.0+PTX"), ("compute_90a", "8.0;9.0+PTX")])
def test_architectures_are_those_that_nvcc_knows(site, tmp_path, monkeypatch, newest, arches):
    home = make_toolkit(tmp_path / "usual", newest=newest)
    assert setup_cuda.environment() == {"CUDA_HOME": str(home), "TORCH_CUDA_ARCH_LIST": arches}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert setup_cuda.environment()["TORCH_CUDA_ARCH_LIST"] == "9.0a"


@pytest.mark.parametrize(
    "version, headers, libraries",
    [
        ("12.8", {"cublas": CUBLAS, "cusparse": SOLVERS[:1], "cusolver": SOLVERS[1:]}, {"cublas": "12"}),
        ("13.0", {"cu13": CUBLAS + SOLVERS}, {"cu13": "13"}),
    ],
    ids=["a folder each", "one folder"],
)
def test_python_packages_complete_a_toolkit(site, tmp_path, version, headers, libraries):
    home = make_toolkit(tmp_path / "usual", version=version)
    for room, names in headers.items():
        make_files(site / "nvidia" / room / "include", *names, "cuda_runtime.h")
    make_files(site / "nvidia" / "cu14" / "include", *CUBLAS)  # a version that is not torch's
    make_files(site / "nvidia" / "cu14" / "lib", "libcublasLt.so.14")
    torch = torch_of(version)
    assert setup_cuda.why_not("auto", torch).startswith("libcublasLt.so.")
    for room, major in libraries.items():
        make_files(site / "nvidia" / room / "lib", f"libcublasLt.so.{major}")
    assert setup_cuda.why_not("auto", torch) is None

    extension = SimpleNamespace(include_dirs=["csrc"], libraries=["c10", "cudart", "c10_cuda"], extra_link_args=["-s"])
    assert setup_cuda.complete(extension, version) is extension
    rooms = [str(site / "nvidia" / room / "include") for room in sorted(headers)]
    assert extension.include_dirs == ["csrc", str(home / "include"), *rooms]
    assert extension.libraries == ["c10", "c10_cuda"]
    (room, major), *_ = libraries.items()
    cudart, cublaslt = extension.extra_link_args[1:]
    assert cudart == str(home / "lib64" / f"libcudart.so.{major}")
    assert cublaslt == str(site / "nvidia" / room / "lib" / f"libcublasLt.so.{major}")


@pytest.mark.parametrize(
    "wanted, version, cuda, words",
    [
        ("0", "13.0", "13.0", "RLHF_KERNELS_CUDA=0"),
        ("auto", "13.0", None, "torch 2.11.0, with which it was compiled, has no CUDA"),
        ("auto", "12.8", "13.0", "is of CUDA 12.8 and torch of CUDA 13.0"),
        ("auto", "12.4", "12.6", "12.6 is the oldest"),
        ("1", "13.0", "13.0", "cublas_v2.h, cublasLt.h, cusparse.h, cusolverDn.h, libcublasLt.so.13: neither in"),
    ],
)
def test_reasons_to_go_without(site, tmp_path, wanted, version, cuda, words):
    make_toolkit(tmp_path / "usual", version=version)
    assert words in setup_cuda.why_not(wanted, torch_of(cuda))


def test_no_two_sources_make_one_object():
    sources = [path for kind in ("cpp", "cu") for path in (ROOT / "csrc").rglob(f"*.{kind}")]
    assert len({path.with_suffix(".o") for path in sources}) == len(sources)


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2rk4sumsILi4EEEvPKf' for 'sm_80'
ptxas info    : Function properties for _ZN2rk4sumsILi4EEEvPKf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size, 1040 bytes smem, 376 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN2rk4sumsILi4EEEvPKf' for 'sm_90'
ptxas info    : Function properties for _ZN2rk4sumsILi4EEEvPKf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 540 bytes cmem[0]
ptxas info    : Function properties for called
    16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
"""


def test_what_ptxas_says_is_read():
    kernel = "_ZN2rk4sumsILi4EEEvPKf"
    assert load_cuda_check().resources(PTXAS) == {
        ("sm_80", kernel): {"stack": 8, "spills": 16, "registers": 255, "shared": 1040},
        ("sm_90", kernel): {"stack": 0, "spills": 0, "registers": 40, "shared": 0},
        ("sm_90", "called"): {"stack": 16, "spills": 16},
    }


SASS = """\
\t\tFunction : _Z4foldPf
        /*0000*/                   MOV R1, c[0x0][0x28] ;          /* 0x00000a0000017a02 */
                                                                   /* 0x000fe40000000f00 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   FMNMX R4, R4, R5, !PT ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/                   MUFU.EX2 R4, R4 ;
        /*0050*/              @P1  BRA 0x80 ;
        /*0060*/                   FADD R4, R4, R5 ;
        /*0070*/                   FADD R4, R4, R6 ;
        /*0080*/               @P2 BRA 0x40 ;
        /*0090*/               @P2 BRA 0x10 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0;
\t\tFunction : _Z6finishPf
        /*0000*/                   EXIT ;
"""


def test_loops_of_machine_code_are_measured():
    """The longest that has no other inside, from its first instruction to the jump back."""
    assert load_cuda_check().sass.longest_loops(SASS) == {"_Z4foldPf": 5}
    assert load_cuda_check().sass.logits_of_a_thread() == 16


def test_a_row_kernel_that_takes_too_long_is_named():
    check = load_cuda_check()
    counts = {f"rk::cuda::{name}": float(ceiling) for name, ceiling in check.sass.CEILINGS.items()}
    assert list(check.too_long(counts)) == []
    counts["rk::cuda::fold<(rk::Transform)0, 0>"] = 24.1
    del counts["rk::cuda::fold<(rk::Transform)0, (rk::Transform)0>"]
    assert list(check.too_long(counts)) == [
        "fold<(rk::Transform)0, 0> takes 24.1 instructions a logit, and may take 7.",
        "fold<(rk::Transform)0, (rk::Transform)0> was not found in the machine code.",
    ]


def test_names_lose_their_arguments():
    check = load_cuda_check()
    assert check.plain([]) == {}
    if check.shutil.which("c++filt"):
        names = {"_ZN2rk4sumsILi4EEEvPKf": "rk::sums<4>", "_ZN2rk4prodILNS_6FormatE1ELb1EEEvPf": None}
        names["_ZN2rk4prodILNS_6FormatE1ELb1EEEvPf"] = "rk::prod<(rk::Format)1, true>"
        assert check.plain(names) == names
