"""Instructions a logit of the CUDA row kernels, counted in their machine code (SASS): no GPU is needed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FUNCTION = re.compile(r"Function : (\w+)")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
JUMP = re.compile(r"(0x[0-9a-f]+)")

# At most so many for a logit, for a pair of them in KL's kernels. While an H200's memory brings a logit (4.3 TB/s), its
# schedulers issue 27 instructions (132 x 4 x 32 a cycle at 1.7 GHz). Soft caps take a tanh; in a loop over logits that
# may have a bias lie both ways, of which one is taken.
CEILINGS = {
    "fold<(rk::Transform)0, 0>": 7,
    "fold<(rk::Transform)0, 1>": 9,
    "fold<(rk::Transform)0, 3>": 13,
    "fold<(rk::Transform)1, 0>": 10,
    "fold<(rk::Transform)2, 0>": 44,
    "differentiate_row<(rk::Transform)0, __nv_bfloat16, rk::cuda::LogprobGradient<false> >": 7,
    "differentiate_row<(rk::Transform)0, __nv_bfloat16, rk::cuda::LogprobGradient<true> >": 10,
    "weigh<(rk::Transform)0, __nv_bfloat16>": 12,
    "fold<(rk::Transform)0, (rk::Transform)0>": 52,
    "differentiate_row<(rk::Transform)0, __nv_bfloat16, rk::cuda::KlGradient<(rk::Transform)0, true> >": 15,
    "differentiate_row<(rk::Transform)0, __nv_bfloat16, rk::cuda::KlGradient<(rk::Transform)0, false> >": 36,
}


def cuobjdump(toolkit):
    """The disassembler: the toolkit's, or that of triton's package, which comes with torch."""
    packaged = [Path(path, "triton/backends/nvidia/bin/cuobjdump") for path in sys.path]
    known = [Path(toolkit, "bin", "cuobjdump"), *packaged, Path(shutil.which("cuobjdump") or "")]
    return next((path for path in known if path.is_file()), None)


def disassemble(tool, path, arch):
    command = [tool, "-sass", "-arch", arch, path]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout


def longest_loops(text):
    """{function: instructions of its longest loop that has no other inside}, of those that loop."""
    instructions, results, name = {}, {}, None
    for line in text.splitlines():
        if match := FUNCTION.search(line):
            name = match[1]
        elif match := INSTRUCTION.search(line):
            instructions.setdefault(name, []).append((int(match[1], 16), match[2], match[3]))
    for name, lines in instructions.items():
        jumps = [(JUMP.search(rest), at) for at, operation, rest in lines if operation.split(".")[0] == "BRA"]
        loops = [(int(target[1], 16), at) for target, at in jumps if target and int(target[1], 16) < at]
        innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
        lengths = [sum(first <= at <= last for at, *_ in lines) for first, last in innermost]
        if lengths:
            results[name] = max(lengths)
    return results


def logits_of_a_thread():
    """The logits that a thread works on in one turn of the loop."""
    header = (ROOT / "csrc/common/cuda/row_block.h").read_text()
    return int(re.search(r"constexpr int kChunk = (\d+);", header)[1])
