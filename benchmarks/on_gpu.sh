#!/usr/bin/env bash
# benchmarks/on_gpu.sh [output-folder]: builds, tests and measures here, on a machine with a GPU, torch and nvcc.
#
# In well under ten minutes and without a network: compiles in place for this GPU alone, runs the kernels' tests on it,
# first of the reference and the native backend, then of Triton, lets compute-sanitizer look at a small run where it is
# installed, and times every op, native and in Triton, against bare GEMMs, eager torch and whatever of TRL, Liger and
# CCE can be imported. Everything ends in gpu-<device>.json in the folder (by default benchmarks/results), the logs
# beside it. Where a native test fails nothing is measured, unless FORCE=1, and the file is gpu-<device>-red.json. Where
# one of Triton fails Triton is not measured, unless FORCE=1, native is, and the script fails at its end.
#
#   PYTHON     the Python that has torch (default: python)
#   TOTAL_S    seconds for everything (default: 540); what does not fit is listed in the file as not measured. Triton
#              compiles while it is tested and measured, and keeps what it compiled: a second run gets further
#   FORCE=1    measures in spite of failing tests
set -euo pipefail

python=${PYTHON:-python}
total_s=${TOTAL_S:-540}

stop() {
  echo "on_gpu.sh: $*" >&2
  exit 2
}

# within LEAST MOST RESERVED: the seconds left without those RESERVED for what follows, between LEAST and MOST.
within() {
  local left=$((total_s - SECONDS - $3))
  echo $((left < $1 ? $1 : left > $2 ? $2 : left))
}

has() {
  "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"
}

folder=${1:-"$(dirname "${BASH_SOURCE[0]}")/results"}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."

has torch || stop "$python has no torch: PYTHON names one that has it."
has pytest || stop "the tests need pytest, and $python has none: $python -m pip install pytest"
gpu=$("$python" -c '
import re, sys, torch
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU.")
name = re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
print("%d.%d" % torch.cuda.get_device_capability(), name)
') || stop "nothing can be measured here."
read -r capability name <<<"$gpu"

echo "== compiling for $name ($capability)"
RLHF_KERNELS_NATIVE=1 RLHF_KERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST="$capability" \
  "$python" setup.py build_ext --inplace >"$folder/gpu-build.log" 2>&1 || {
  tail -n 30 "$folder/gpu-build.log" >&2
  stop "it did not compile; $folder/gpu-build.log has the whole."
}
facts=(--fact "build_s=$SECONDS")

workers=$(nproc)
workers=$((workers > 8 ? 8 : workers))
command=("$python" -m pytest tests/kernels -q --maxfail=10)
if has xdist; then
  command+=(-n "$workers" --dist loadgroup)
fi
if ! has hypothesis; then
  command+=(--ignore=tests/kernels/test_fuzz.py)
fi

# run_tests NAME SECONDS OPTION...: sets $found to green, red, or unfinished: no test failed in that time. Asked to
# stop, pytest still tells what it knows, so that a failure in an unfinished run is seen.
run_tests() {
  local name=$1 limit_s=$2 log=$folder/gpu-$1.log before=$SECONDS status=0 said
  shift 2
  echo "== $name, for $limit_s s at most"
  RLHF_KERNELS_TEST_DEVICE=cuda RLHF_KERNELS_REQUIRE_NATIVE=1 OMP_NUM_THREADS=1 \
    timeout -s INT -k 15 "$limit_s" "${command[@]}" "$@" >"$log" 2>&1 || status=$?
  said=$(grep -E '(passed|failed|error|deselected|no tests ran).* in [0-9.]+s' "$log" | tail -n 1 || true)
  said=${said:-$(tail -n 1 "$log")}
  found=red
  if [[ $status == 0 ]]; then
    found=green
  elif [[ $status == 124 ]] && grep -q passed <<<"$said" && ! grep -Eq 'failed|error' <<<"$said"; then
    found=unfinished
  fi
  facts+=(--fact "$name=$found" --fact "${name}_s=$((SECONDS - before))" --fact "${name}_said=$said")
  echo "$found: $said"
}

file=$folder/gpu-$name.json
run_tests tests "$(within 60 200 280)" -k "not triton"
if [[ $found != green ]]; then
  file=$folder/gpu-$name-red.json
  if [[ ${FORCE:-} != 1 ]]; then
    "$python" -m benchmarks.on_gpu --head-only --out "$file" "${facts[@]}"
    stop "tests fail, so nothing is measured (FORCE=1 would): $folder/gpu-tests.log"
  fi
fi
# The tuner is judged by test_triton_device.py; elsewhere its four choices would cost four compilations each.
run_tests triton_tests "$(within 60 180 220)" -k triton -p tests.support.untuned
backends=native,triton
triton=$found
if [[ $triton == red && ${FORCE:-} != 1 ]]; then
  backends=native
fi

sanitizer_s=$(($(within 40 120 140) / 2))
# Only this project's kernels, rk::, are looked at; memory comes straight from CUDA, so that each tensor has its bounds.
sanitizer=$(command -v compute-sanitizer || true)
if [[ -z $sanitizer ]]; then
  home=$("$python" setup_cuda.py)
  for path in "$home/bin/compute-sanitizer" "$home/compute-sanitizer/compute-sanitizer"; do
    if [[ -x $path ]]; then
      sanitizer=$path
    fi
  done
fi
for tool in memcheck racecheck; do
  found="compute-sanitizer is not installed"
  if [[ -n $sanitizer ]]; then
    echo "== $tool, for $sanitizer_s s at most"
    options=(--tool "$tool" --kernel-name kns=_ZN2rk --error-exitcode 9)
    if [[ $tool == memcheck ]]; then
      options+=(--report-api-errors no) # torch asks CUDA questions that may fail
    fi
    status=0
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 10 "$sanitizer_s" "$sanitizer" "${options[@]}" \
      "$python" -m benchmarks.on_gpu --small >"$folder/gpu-$tool.log" 2>&1 || status=$?
    case $status in
      0) found=clean ;;
      9) found="errors: gpu-$tool.log" ;;
      124 | 137) found="not finished in $sanitizer_s s" ;;
      *) found="did not run, exit status $status: gpu-$tool.log" ;;
    esac
    echo "$found"
  fi
  facts+=(--fact "$tool=$found")
done

seconds=$(within 60 $((total_s > 600 ? total_s : 400)) 20) # the last job may take longer than is left
echo "== measuring $backends, for $seconds s at most"
"$python" -m benchmarks.on_gpu --out "$file" --seconds "$seconds" --backends "$backends" "${facts[@]}"
if [[ $triton == red ]]; then
  stop "tests of Triton fail: $folder/gpu-triton_tests.log"
fi
