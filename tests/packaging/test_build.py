"""A user's ways with the sources - build, install, miss a compiler, change torch - and the messages that follow."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("packaging")  # one worker, so that what the fixtures build is built once
ROOT = Path(__file__).resolve().parents[2]
NO_TORCH = "import sys; sys.modules['torch'] = None"  # importing it then fails as if it were not installed
IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "_build_report.json")


def run(arguments, cwd, *, ok=True, **environment):
    """Standard output and error together; fails the test when the exit status is not the one that was promised."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("RLHF_KERNELS_")}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=clean | {k: str(v) for k, v in environment.items()},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def hook(name, source, out, *, before="", **options):
    """Calls the build backend as pip and build do, in `source`; the product comes to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    script = f"{before}\nfrom setuptools import build_meta\nbuild_meta.{name}({str(out)!r})"
    return run(["-c", script], source, **options)


def scratch(tmp_path, *, objects=False):
    """Options that keep a build of the repository's own tree out of that tree. Its object files serve again, unless
    `objects` says to make them anew: a compiler that fails must not spoil them."""
    options = {"build": "build_lib", "egg_info": "egg_base", "bdist_wheel": "bdist_dir"}
    options |= {"build_ext": "build_temp"} if objects else {}
    config = tmp_path / "scratch.cfg"
    for command, option in options.items():
        (tmp_path / option).mkdir()
        with config.open("a") as lines:
            lines.write(f"[{command}]\n{option}={tmp_path / option}\n")
    return {"DIST_EXTRA_CONFIG": config}


def ask(site, code, cwd, **options):
    """Runs `code` where only `site` can provide the packages: outside the repository, ahead of an editable install."""
    return run(["-c", textwrap.dedent(code)], cwd, PYTHONPATH=site, **options)


REFERENCE_WORKS = """
import torch, rlhf_kernels as rk
out = rk.linear_logprobs(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]))
assert torch.allclose(out.logprobs, torch.tensor(4.0).log().neg()), out
"""
NATIVE_WORKS = REFERENCE_WORKS.replace("1]))", "1]), backend='native')")


def use(site, cwd, code=REFERENCE_WORKS):
    """Runs `code` there -> (what it printed, rk.build_info()). One process: most of its time is importing torch."""
    output = ask(site, code + "\nimport json; print(json.dumps(rk.build_info()))", cwd)
    printed, _, report = output.rstrip().rpartition("\n")
    return printed, json.loads(report)


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """A directory into which pip has installed the package, compiled, from the source tree."""
    tmp = tmp_path_factory.mktemp("installed")
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    run(["-m", "pip", "install", *flags, "--target", tmp / "site", ROOT], tmp, RLHF_KERNELS_NATIVE=1, **scratch(tmp))
    return tmp / "site"


@pytest.fixture(scope="session")
def unpacked_sdist(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("sdist")
    hook("build_sdist", ROOT, tmp, before=NO_TORCH, **scratch(tmp))  # needs no torch
    shutil.unpack_archive(next(tmp.glob("*.tar.gz")), tmp)
    return next(path for path in tmp.glob("rlhf_kernels-*") if path.is_dir())


def files(root, *patterns):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for pattern in patterns
        for path in root.glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


def packages():
    """Every file that belongs into a wheel, by its path there."""
    return files(ROOT, "rlhf_kernels/**/*.py", "rlhf_kernels/py.typed") | files(
        ROOT / "python",
        *(f"rlhf_trainer/**/*{suffix}" for suffix in (".py", ".yaml", ".jinja", ".html", ".txt", ".typed")),
    )


def test_installed_package_runs_outside_the_repository(installed, tmp_path):
    assert packages().items() <= files(installed, "**/*").items()
    code = NATIVE_WORKS + "import rlhf_trainer as t; print(rk.__file__, t.__file__)"
    printed, info = use(installed, tmp_path, code)
    assert info["native"] and info["native_reason"] is None
    assert info["torch_compiled"] == info["torch_running"]
    assert all(Path(path).is_relative_to(installed) for path in printed.split())
    run([installed / "bin" / "rlhf", "--help"], tmp_path, PYTHONPATH=installed)


def test_import_is_light(installed, tmp_path):
    code = """
        import sys, torch
        before = set(sys.modules)
        import rlhf_kernels
        print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
    """
    loaded = ask(installed, code, tmp_path)
    assert not [name for name in ("triton", "transformers", "numpy", "rlhf_trainer") if f"'{name}'" in loaded], loaded


def test_sdist_holds_all_that_a_wheel_needs(unpacked_sdist, tmp_path):
    needed = files(ROOT, "csrc/**/*", "setup*.py", "pyproject.toml", "LICENSE", "README.md")
    assert needed.items() <= files(unpacked_sdist, "**/*").items()
    hook("build_wheel", unpacked_sdist, tmp_path, RLHF_KERNELS_NATIVE=0)  # compiling is tested above, from equal files
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        content = {name: wheel.read(name) for name in wheel.namelist()}
    assert packages().items() <= content.items()
    assert not [name for name in content if name.startswith(("csrc", "tests", "benchmarks")) or name.endswith(".so")]


@pytest.mark.slow
def test_sdist_compiles(unpacked_sdist, tmp_path):
    hook("build_wheel", unpacked_sdist, tmp_path, RLHF_KERNELS_NATIVE=1)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    _, info = use(tmp_path / "site", tmp_path)
    assert info["native"]


def test_without_compiler_reference_works_and_says_why(tmp_path):
    hook("build_wheel", ROOT, tmp_path, CXX="false", **scratch(tmp_path, objects=True))
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    _, info = use(tmp_path / "site", tmp_path)
    assert not info["native"] and "compiling it failed" in info["native_reason"] and "false" in info["native_reason"]
    error = ask(tmp_path / "site", NATIVE_WORKS, tmp_path, ok=False)
    assert "compiling it failed" in error and "reference" in error


def test_insisting_on_a_compiler_that_is_not_there_fails(tmp_path):
    options = scratch(tmp_path, objects=True)
    output = hook("build_wheel", ROOT, tmp_path, ok=False, CXX="false", RLHF_KERNELS_NATIVE=1, **options)
    assert "csrc/ did not compile" in output.splitlines()[-1]


def test_editable_without_compiled_part(tmp_path):
    """The report of an editable install lies in the source tree, and a `_C` it does not speak of is gone."""
    for name in ("rlhf_kernels", "python", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=IGNORED)
    for name in ("setup.py", "setup_cuda.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    stale = tmp_path / "tree" / "rlhf_kernels" / "_C.of-an-earlier-build.so"
    stale.touch()
    hook("build_editable", tmp_path / "tree", tmp_path / "out", RLHF_KERNELS_NATIVE=0)
    assert not stale.exists()
    _, info = use(tmp_path / "tree", tmp_path)
    assert "RLHF_KERNELS_NATIVE=0" in info["native_reason"]


def test_cuda_on_request_fails_loudly_where_it_cannot_be(tmp_path):
    before = "import torch; torch.version.cuda = None"
    output = hook("build_wheel", ROOT, tmp_path, before=before, ok=False, RLHF_KERNELS_CUDA=1, **scratch(tmp_path))
    assert output.splitlines()[-1].startswith("RLHF_KERNELS_CUDA=1, but torch") and "has no CUDA" in output


@pytest.mark.parametrize("name, value", [("NATIVE", "yes"), ("CUDA", "2")])
def test_unknown_request_is_refused(tmp_path, name, value):
    output = hook("build_wheel", ROOT, tmp_path, ok=False, **{f"RLHF_KERNELS_{name}": value}, **scratch(tmp_path))
    assert f"RLHF_KERNELS_{name}={value}" in output.splitlines()[-1]


@pytest.mark.parametrize("product", ["prepare_metadata_for_build_wheel", "build_wheel", "build_editable"])
def test_isolated_build_ends_in_the_command_that_works(tmp_path, product):
    """`pip install .` builds where torch is absent; it asks for the metadata before it downloads what they name."""
    output = hook(product, ROOT, tmp_path, before=NO_TORCH, ok=False, **scratch(tmp_path))
    assert output.strip().splitlines() == [output.strip()]
    assert output.strip().endswith("&& pip install --no-build-isolation .")


def doctored(installed, tmp_path, **changes):
    site = tmp_path / "site"
    shutil.copytree(installed / "rlhf_kernels", site / "rlhf_kernels")
    report = site / "rlhf_kernels" / "_build_report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | changes))
    return site


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"torch": "2.12.1+cpu"}, "compiled against torch 2.12.1+cpu, and torch"),
        ({"torch": "2.13.0.dev20260101"}, "compiled against torch 2.13.0.dev20260101"),  # a nightly fits only itself
        ({"cuda": True, "torch_cuda": "11.8"}, "compiled for CUDA 11.8"),
        ({"python": "cpython-39"}, "compiled for cpython-39"),
    ],
)
def test_another_torch_is_named_in_words(installed, tmp_path, changes, words):
    site = doctored(installed, tmp_path, **changes)
    warning, info = use(site, tmp_path)
    assert words in warning and "pip install --no-build-isolation" in warning and "undefined symbol" not in warning
    assert warning.count("RuntimeWarning") == 1, warning
    assert not info["native"] and words in info["native_reason"]


def test_patch_release_of_torch_fits(installed, tmp_path):
    import torch

    major, minor, *_ = torch.__version__.split(".")
    _, info = use(doctored(installed, tmp_path, torch=f"{major}.{minor}.99+cu999"), tmp_path)
    assert info["native"]


def test_library_that_does_not_load_is_named(installed, tmp_path):
    site = doctored(installed, tmp_path)
    next((site / "rlhf_kernels").glob("_C.*")).write_bytes(b"not a library")
    output = ask(site, REFERENCE_WORKS, tmp_path)
    assert "the loader refused it" in output and "rebuild it" in output


def test_bare_sources_work_and_say_so(tmp_path):
    shutil.copytree(ROOT / "rlhf_kernels", tmp_path / "site" / "rlhf_kernels", ignore=IGNORED)
    _, info = use(tmp_path / "site", tmp_path)
    assert "nothing was compiled here yet" in info["native_reason"]
