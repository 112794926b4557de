PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := $(wildcard kernels/mmattn_kernels/cpu/*.cpp kernels/mmattn_kernels/cpu/*.h)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-newest sanitize lint fix bench tables wheel clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.dev $(VENV)/.built ## set up .venv: pinned packages, and this checkout with its CPU extension built

$(VENV)/.packages: constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 15), f"Python {sys.version.split()[0]}: 3.10 to 3.14 is needed; set PYTHON="'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "torch and what samples clips, into $(VENV): a download of up to several GB, minutes"
	$(RUN) -m pip install -c constraints.txt setuptools wheel pybind11 torch diffusers safetensors accelerate av matplotlib tqdm
	touch $@

$(VENV)/.dev: $(VENV)/.packages
	@echo "what tests and lint need: a minute or two"
	$(RUN) -m pip install -q -c constraints.txt triton pytest pytest-xdist peft ruff mypy clang-format flask waitress krippendorff \
	  selenium webdataset tensorboard
	touch $@

$(VENV)/.built: $(VENV)/.packages setup.py pyproject.toml $(SOURCES)
	@echo "the CPU extension: two to three minutes of the compiler"
	$(RUN) -m pip install -q --no-build-isolation --no-deps -e .
	@$(RUN) -m mmattn.info | grep "^cpu extension"
	touch $@

demo: $(VENV)/.built ## four clips of the small model that comes with the package, how synchronous such are, and the attention op against its peers
	@echo "1/4 what is built, and what runs here: some seconds"
	@$(RUN) -m mmattn.info
	@echo "2/4 four clips of the small model: some ten seconds"
	@$(RUN) -m mmdiffusion sample --num 4 --batch-size 4 --seed 7 --out out/clips --force
	@echo "films and contact sheets: out/clips/clip-000?.mp4 and .png"
	@echo "3/4 how many bounces of 16 such clips are heard, beside real clips and mismatched ones: some ten seconds"
	@$(RUN) -m mmdiffusion synchrony --clips 16 --ways joint
	@echo "4/4 the attention op against the ways of plain torch, at the published sizes: a minute or two"
	@$(RUN) bench/attn.py --quick --no-gate --modes forward

# One process a core, each of one thread; pytest alone runs them too, one after another.
PARALLEL := -n logical --maxprocesses 8 --dist loadgroup

test: install ## all tests
	$(RUN) -m pytest $(PARALLEL)

NEWEST := .venv-newest/bin/python
test-newest: ## all tests on the newest torch, triton and diffusers, in an environment of its own
	test -x $(NEWEST) || $(PYTHON) -m venv .venv-newest
	$(NEWEST) -m pip install -q -U setuptools wheel pybind11 torch triton pytest pytest-xdist diffusers safetensors \
	  accelerate av peft matplotlib tqdm flask waitress krippendorff selenium webdataset tensorboard
	$(NEWEST) -m pip install -q --no-build-isolation --no-deps -e .
	$(NEWEST) -m pytest $(PARALLEL)

# Multiplications and additions are contracted as in the extension that is shipped, on whose rounding tests rely.
SANITIZED := build/sanitized
sanitize: install ## the extension's tests and random calls under AddressSanitizer and UndefinedBehaviorSanitizer (ten minutes)
	MMATTN_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -fexpensive-optimizations -g1" \
	  $(RUN) setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	PYTHONPATH=$(SANITIZED)/lib ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  sh -c '$(RUN) -c "import torch, mmattn_kernels._cpu as m; assert \"$(SANITIZED)\" in m.__file__, m.__file__" && \
	  $(RUN) -m pytest tests/test_attention.py tests/test_self_attention.py tests/test_segmented_attention.py tests/test_norm.py tests/test_conv.py tests/test_checks.py tests/test_replay.py tests/test_replay_gradients.py && \
	  $(RUN) tests/fuzz_ops.py --seconds 60'

lint: install ## style and types: ruff, mypy, clang-format, and tables and API page against their sources
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m mypy examples
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES)
	$(RUN) bench/tables.py --check
	$(RUN) docs/make_api.py --check

fix: install ## what lint can repair by itself
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

bench: install ## the full benchmarks of this machine into bench/results and the documents (an hour, nothing else running)
	$(RUN) bench/attn.py --modes forward both --json bench/results/attn-cpu.json
	$(RUN) bench/attn.py --shapes scaling --modes forward --dtype float32 --budget 0.5 --json bench/results/scaling-cpu.json
	$(RUN) bench/segments.py --modes forward both --json bench/results/segments-cpu.json
	$(RUN) bench/norm.py --json bench/results/norm-cpu.json
	$(RUN) bench/conv.py --json bench/results/conv-cpu.json
	$(RUN) bench/unet.py --breakdown --json bench/results/unet-cpu.json
	$(RUN) bench/unet.py --shapes small --batch 1 --json bench/results/unet-small-cpu.json
	$(RUN) bench/superres.py --breakdown --json bench/results/superres-cpu.json
	$(RUN) bench/plot.py bench/results/attn-cpu.json docs/attn-cpu.png --modes forward
	$(RUN) bench/plot.py bench/results/scaling-cpu.json docs/scaling-cpu.png
	$(RUN) bench/plot.py bench/results/conv-cpu.json docs/conv-cpu.png --modes forward --shape block
	$(RUN) bench/plot.py bench/results/unet-cpu.json docs/unet-cpu.png
	$(RUN) bench/tables.py

tables: install ## the documents' tables from bench/results, and the API page from docstrings
	$(RUN) bench/tables.py
	$(RUN) docs/make_api.py

wheel: ## a wheel of PYTHON into dist/, with the kernels built for every CPU of this kind: make wheel PYTHON=python3.12
	$(PYTHON) -m pip wheel -q --no-deps -w dist .

clean: ## what was built here
	rm -rf $(VENV) .venv-newest build dist out *.egg-info kernels/mmattn_kernels/_cpu*
