"""Compiles csrc/ with its CUDA sources for a machine without CUDA: kernels run on the host (include/cuda_on_host.h).

The product is an extension module that registers the CUDA ops for CPU tensors, so that tests/kernels tries the CUDA
sources (plugin.py). From the repository root:

    python tests/cuda_on_host/build.py                                         # compile what changed
    python -m pytest -p tests.cuda_on_host.plugin tests/kernels                # compile and test
    python tests/cuda_on_host/build.py --asan                                  # the same with AddressSanitizer
    env $(python tests/cuda_on_host/build.py --asan --environment) python -m pytest -p tests.cuda_on_host.plugin ...
"""

import contextlib
import fcntl
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "cuda_on_host"
FOLDER = ROOT / "build" / "cuda_on_host"
REPLACED = {ROOT / "csrc" / "common" / "cuda" / "gemm_cublaslt.cpp"}  # by gemm_on_host.cpp


def compiler():
    return os.environ.get("CXX", "g++")


def asan_environment():
    """What a process needs to load the module of build(asan=True), and to have the plugin choose it.

    Python itself is not instrumented, so the sanitizer's library comes first by force, and libstdc++ with it: it must
    be there when the sanitizer looks for the functions it wraps, such as __cxa_throw. Python and torch leave memory to
    the end of the process, and torch's libraries may free with one runtime what another allocated.
    """
    libraries = [
        subprocess.check_output([compiler(), f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": ":".join(str(Path(library).resolve()) for library in libraries),
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0:quarantine_size_mb=64",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "RK_CUDA_ON_HOST_ASAN": "1",
    }


def flags(asan, csrc):
    """(all C++ files, CUDA files in addition, linking)"""
    from torch.utils import cpp_extension

    includes = [HERE / "include", csrc, *cpp_extension.include_paths(), sysconfig.get_path("include")]
    # The numerical flags are setup.py's.
    common = [
        *("-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
        *("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi", "-DNDEBUG"),
        *("-DRK_CUDA_ON_HOST", "-DRLHF_KERNELS_CUDA", "-DTORCH_API_INCLUDE_EXTENSION_H", "-DTORCH_EXTENSION_NAME=_C"),
        *(f"-I{path}" if i < 2 else f"-isystem{path}" for i, path in enumerate(includes)),
    ]
    # A GPU takes no misaligned vector load, and its compiler knows no strict aliasing.
    cuda = ["-fno-strict-aliasing", "-fsanitize=alignment", "-fno-sanitize-recover=all", "-Wno-unknown-pragmas"]
    link = ["-shared", "-fopenmp", "-lubsan"]
    if asan:
        common += ["-O1", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer"]
        cuda += ["-fsanitize=undefined", "-fno-sanitize=vptr"]
        link.insert(1, "-fsanitize=address")
    else:
        common += ["-O2", "-g0"]
    for path in cpp_extension.library_paths():
        link += [f"-L{path}", f"-Wl,-rpath,{path}"]
    return common, cuda, [*link, "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]


def variant_of(asan):
    return "asan" if asan else "plain"


def module_of(asan):
    return f"{variant_of(asan)}/_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def sources():
    """Of the module, and whether CUDA is in them. The CPU's ops are not: their places are taken."""
    csrc = [path for kind in ("cpp", "cu") for path in sorted((ROOT / "csrc").rglob(f"*.{kind}"))]
    for path in csrc:
        if path not in REPLACED and not path.name.endswith("_cpu.cpp"):
            yield path, path.suffix == ".cu" or path.name.endswith("_cuda.cpp")
    yield from ((path, True) for path in sorted(HERE.glob("*_on_host.cpp")))


def ninja_file(csrc=ROOT / "csrc", changed=None):
    """`changed`: the only objects that are made, from the sources in `csrc`; the rest lies in FOLDER."""
    lines = ["ninja_required_version = 1.8", f"cxx = {shlex.quote(compiler())}"]
    for asan in (False, True):
        common, cuda, link = flags(asan, csrc)
        lines += [
            f"rule compile_{variant_of(asan)}",
            f"  command = $cxx -MMD -MF $out.d {shlex.join(common)} $more -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            f"rule link_{variant_of(asan)}",
            f"  command = $cxx $in {shlex.join(link)} -o $out",
        ]
        objects = []
        for source, has_cuda in sources():
            # What has nothing to do with CUDA is not sanitized, and last: of an inline function the first is linked.
            variant = variant_of(asan and has_cuda)
            target = f"{variant}/{source.relative_to(ROOT)}.o"
            made = changed is None or target in changed
            objects.insert(len(objects) if not has_cuda else 0, target if made else str(FOLDER / target))
            if not made or variant != variant_of(asan):
                continue
            # The loops of gemm_on_host.cpp are most of the tests' work; those outside the kernels are next to nothing.
            fast = ["-O3"] if source.parent == HERE else [] if asan else ["-O0"]
            more = ["-x", "c++", *cuda] if source.suffix == ".cu" else fast
            path = csrc / source.relative_to(ROOT / "csrc") if source.is_relative_to(ROOT / "csrc") else source
            lines += [f"build {target}: compile_{variant} {path}", f"  more = {shlex.join(more)}"]
        lines.append(f"build {module_of(asan)}: link_{variant_of(asan)} {' '.join(objects)}")
    return "\n".join([*lines, ""])


def write(path, text):
    """Unless that is what it says already: what is older than its products is not compiled again."""
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def ninja(folder, *arguments):
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    clean["PATH"] = os.path.dirname(sys.executable) + os.pathsep + clean.get("PATH", "")  # a venv's own ninja
    done = subprocess.run(
        ["ninja", "-C", str(folder), *arguments], env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"csrc/ did not compile for CUDA on the host:\n{done.stdout[-6000:]}")
    return done.stdout


@contextlib.contextmanager
def alone_in(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(asan=False):
    """The path of the module, compiled as far as something changed; another process's build is waited for."""
    with alone_in(FOLDER):
        write(FOLDER / "build.ninja", ninja_file())
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        ninja(FOLDER, "-j", jobs, module_of(asan))
    return FOLDER / module_of(asan)


def build_changed(name, edits, asan=False, only=""):
    """As build(), but from a copy of csrc/ in which `edits`, {file: {old: new}}, are made. Only what reads these files
    is compiled, and of that only sources with `only` in their names; everything else is the last build()'s."""
    folder, csrc = FOLDER / "changed" / name, ROOT / "csrc"
    texts = {path.relative_to(csrc): path.read_text() for path in csrc.rglob("*") if path.is_file()}
    for file, changes in edits.items():
        for old, new in changes.items():
            if (count := texts[Path(file)].count(old)) != 1:
                raise ValueError(f"csrc/{file} was to hold this once, and holds it {count} times: {old}")
            texts[Path(file)] = texts[Path(file)].replace(old, new)
    with alone_in(folder):
        for file, text in texts.items():
            write(folder / "csrc" / file, text)
        # "object: #deps ..." and below it, indented, what it was compiled from
        changed, edited = set(), {str(csrc / file) for file in edits}
        for line in ninja(FOLDER, "-t", "deps").splitlines():
            if line and not line[0].isspace():
                target = line.partition(":")[0]
            elif line.strip() in edited and only in target:
                changed.add(target)
        write(folder / "build.ninja", ninja_file(folder / "csrc", changed))
        ninja(folder, "-j", "1", module_of(asan))
    return folder / module_of(asan)


if __name__ == "__main__":
    if "--environment" in sys.argv:
        print(*(f"{name}={value}" for name, value in asan_environment().items()))
    else:
        print(build("--asan" in sys.argv))
