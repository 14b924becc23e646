#!/usr/bin/env bash
# benchmarks/on_gpu.sh [output-folder]: builds, tests and measures here, on a machine with a GPU, torch and nvcc.
#
# In well under ten minutes and without a network: compiles in place for this GPU alone, runs the kernels' tests on it,
# lets compute-sanitizer look at a small run where it is installed, and times every op against bare GEMMs, eager torch
# and whatever of TRL, Liger and CCE can be imported. Everything ends in gpu-<device>.json in the folder (by default
# benchmarks/results), the logs beside it. Where a test fails nothing is measured, unless FORCE=1, and the file is
# gpu-<device>-red.json.
#
#   PYTHON     the Python that has torch (default: python)
#   TOTAL_S    seconds for everything (default: 540); what does not fit is listed in the file as not measured
#   FORCE=1    measures in spite of failing tests
set -euo pipefail

python=${PYTHON:-python}
total_s=${TOTAL_S:-540}
tests_s=200
sanitizer_s=60

stop() {
  echo "on_gpu.sh: $*" >&2
  exit 2
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

echo "== testing, for $tests_s s at most"
command=("$python" -m pytest tests/kernels -q --maxfail=10)
if has xdist; then
  command+=(-n 4 --dist loadgroup)
fi
if ! has hypothesis; then
  command+=(--ignore=tests/kernels/test_fuzz.py)
fi
tests=green
before=$SECONDS
RLHF_KERNELS_TEST_DEVICE=cuda RLHF_KERNELS_REQUIRE_NATIVE=1 OMP_NUM_THREADS=1 \
  timeout -k 10 "$tests_s" "${command[@]}" >"$folder/gpu-tests.log" 2>&1 || tests=red
facts+=(--fact "tests=$tests" --fact "tests_s=$((SECONDS - before))" --fact "tests_said=$(tail -n 1 "$folder/gpu-tests.log")")
echo "$tests: $(tail -n 1 "$folder/gpu-tests.log")"
file=$folder/gpu-$name.json
if [[ $tests == red ]]; then
  file=$folder/gpu-$name-red.json
  if [[ ${FORCE:-} != 1 ]]; then
    "$python" -m benchmarks.on_gpu --head-only --out "$file" "${facts[@]}"
    stop "tests fail, so nothing is measured (FORCE=1 would): $folder/gpu-tests.log"
  fi
fi

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

left_s=$((total_s - SECONDS - 20)) # the last job may take longer than is left
seconds=$((left_s > 400 ? 400 : left_s < 60 ? 60 : left_s))
echo "== measuring, for $seconds s at most"
"$python" -m benchmarks.on_gpu --out "$file" --seconds "$seconds" "${facts[@]}"
