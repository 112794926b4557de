PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := $(wildcard kernels/mmattn_kernels/cpu/*.cpp kernels/mmattn_kernels/cpu/*.h)

.DEFAULT_GOAL := help
.PHONY: help install demo test lint fix bench tables clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## set up .venv: pinned packages, and this checkout with its CPU extension built

$(VENV)/.packages: constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), f"Python {sys.version.split()[0]}: 3.10 to 3.13 is needed; set PYTHON="'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt setuptools wheel pybind11 torch triton pytest safetensors ruff mypy \
	  clang-format matplotlib tqdm
	touch $@

$(VENV)/.installed: $(VENV)/.packages setup.py pyproject.toml $(SOURCES)
	$(RUN) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

demo: install ## the attention op against its peers on this machine, in a few minutes; ends with a picture
	$(RUN) -m mmattn.info
	$(RUN) bench/attn.py --quick

test: install ## all tests
	$(RUN) -m pytest

lint: install ## style and types: ruff, mypy, clang-format, and README's tables against bench/results
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES)
	$(RUN) bench/tables.py --check

fix: install ## what lint can repair by itself
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

bench: install ## the full benchmark of this machine into bench/results and README (five minutes, nothing else running)
	$(RUN) bench/attn.py --modes forward both --json bench/results/attn-cpu.json
	$(RUN) bench/plot.py bench/results/attn-cpu.json docs/attn-cpu.png --modes forward
	$(RUN) bench/tables.py

tables: install ## README's tables from bench/results
	$(RUN) bench/tables.py

clean: ## what was built here
	rm -rf $(VENV) build out *.egg-info kernels/mmattn_kernels/_cpu*.so
