"""The checks of `make cuda-check` without a GPU: whether the CUDA part of the installed extension loads and
implements every op, and what its kernels need of a multiprocessor. It fails if a kernel spills registers, or if a row
kernel takes more instructions a logit than it may.

`cuda_check.py nvcc <arguments>` stands in for nvcc during the build (PYTORCH_NVCC): what ptxas says of an object is
kept beside it, so that it is at hand after a build in which nothing had to be compiled.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import sass  # beside this file

ROOT = Path(__file__).resolve().parents[2]
ARCH = "sm_90"
ROW_KERNELS = ("logprob_kernels.cu", "frozen_kernels.cu", "kl_kernels.cu")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
FUNCTION = re.compile(r"Function properties for (\w+)")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def record(path):
    return Path(f"{path}.ptxas")


def compile_and_record(arguments):
    command = [Path(os.environ["CUDA_HOME"], "bin", "nvcc"), *arguments, "-Xptxas", "-v"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    messages = done.stdout.splitlines(keepends=True)
    of_ptxas = [line for line in messages if line.startswith("ptxas info") or SPILLS.search(line)]
    sys.stdout.writelines(line for line in messages if line not in of_ptxas)
    if done.returncode == 0 and "-o" in arguments:
        record(arguments[arguments.index("-o") + 1]).write_text("".join(of_ptxas))
    return done.returncode


def resources(text):
    """{(architecture, function): its figures}, in the order of what ptxas says. A function that is called instead of
    inlined is an entry of its own, without registers: those are counted with the kernel."""
    results, arch, kernel, function = {}, None, None, None
    for line in text.splitlines():
        if match := ENTRY.search(line):
            (kernel, arch), function = match.groups(), None
        elif match := FUNCTION.search(line):
            function = match[1]
        elif match := SPILLS.search(line):
            stack, stores, loads = map(int, match.groups())
            results.setdefault((arch, function), {}).update(stack=stack, spills=stores + loads)
        elif match := USED.search(line):
            shared = SHARED.search(line)
            figures = {"registers": int(match[1]), "shared": int(shared[1]) if shared else 0}
            results.setdefault((arch, kernel), {}).update(figures)
    return results


def plain(names):
    """C++ names of the mangled ones, if the tool that knows is there; without the arguments, which are long."""
    names = list(names)
    if names and shutil.which("c++filt"):
        done = subprocess.run(["c++filt", "-p"], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True)
        output = done.stdout.replace("(anonymous namespace)::", "").splitlines()
        return dict(zip(names, output, strict=True))
    return {name: name for name in names}


def instructions_a_logit(tool, path):
    """{mangled name: instructions} of the row kernels in an object file."""
    if tool is None:
        return {}
    loops = sass.longest_loops(sass.disassemble(tool, path, ARCH))
    return {name: length / sass.logits_of_a_thread() for name, length in loops.items()}


def too_long(counts):
    """`counts`: {plain name: instructions a logit}. What is wrong with them, in sentences."""
    for name, ceiling in sass.CEILINGS.items():
        count = next((count for kernel, count in counts.items() if kernel.endswith(f"::{name}")), None)
        if count is None:
            yield f"{name} was not found in the machine code."
        elif count > ceiling:
            yield f"{name} takes {count:.1f} instructions a logit, and may take {ceiling}."


def report(build):
    """Prints the table; returns what is wrong, in sentences."""
    wrong, remarks, counts = [], [], {}
    tool = sass.cuobjdump(os.environ.get("CUDA_HOME", ""))
    print(
        f"{ARCH}: registers a thread; bytes of static shared memory, of stack, of spills (stores and loads); "
        "instructions a logit in the loop over a row (a pair of logits, in kl)"
    )
    for source in sorted((ROOT / "csrc").rglob("*.cu")):
        name = source.relative_to(ROOT)
        kept = record((build / name).with_suffix(".o"))
        if not kept.exists():
            wrong.append(f"{kept} is missing, with what ptxas said of {name}: run make clean and this again.")
            continue
        kernels = resources(kept.read_text())
        names = plain(dict.fromkeys(function for _, function in kernels))
        lengths = instructions_a_logit(tool, kept.with_suffix("")) if name.name in ROW_KERNELS else {}
        counts |= {names[function]: length for function, length in lengths.items()}
        print(f"{name}")
        for (arch, function), figures in kernels.items():
            row = " ".join(f"{figures.get(key, '-'):>7}" for key in ("registers", "shared", "stack", "spills"))
            row += f" {lengths[function]:7.1f}" if function in lengths else f" {'-':>7}"
            if arch == ARCH:
                print(f"{row}  {names[function]}")
            if figures.get("spills"):
                remark = f"{names[function]} ({name}) spills {figures['spills']} bytes on {arch}."
                (wrong if arch == ARCH else remarks).append(remark)
        if not any(arch == ARCH for arch, _ in kernels) and any(map(ENTRY.search, kept.read_text().splitlines())):
            wrong.append(f"{name} was not compiled for {ARCH}; TORCH_CUDA_ARCH_LIST leaves it out.")
    print(*(f"Not counted: {remark}" for remark in remarks), sep="\n", end="\n" if remarks else "")
    if tool is None:
        return [*wrong, "cuobjdump is neither in the CUDA toolkit nor in triton's package: nothing was counted."]
    return [*wrong, *too_long(counts)]


def missing_ops(torch):
    ops = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("rlhf_kernels::"))
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    on_cpu = [name for name in ops if has(name, "CPU")]
    without = [name for name in on_cpu if not has(name, "CUDA")]
    print(f"{len(on_cpu) - len(without)} of {len(on_cpu)} ops have a CUDA kernel")
    return [f"{name} has a CPU kernel and none for CUDA." for name in without] if ops else ["There are no ops."]


def check():
    import torch

    import rlhf_kernels as rk

    info = rk.build_info()
    print(rk.__file__, info)
    if not info["cuda"]:
        return [f"The extension that was installed has no CUDA part: {info['native_reason'] or info['cuda_reason']}."]
    tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
    return missing_ops(torch) + report(ROOT / "build" / tag)


if __name__ == "__main__":
    if sys.argv[1:2] == ["nvcc"]:
        sys.exit(compile_and_record(sys.argv[2:]))
    sys.exit("\n".join(check()) or None)
