# edgepress: `make help` lists the targets. `make demo` and `make test` need only Python 3.11, make and a network for pip.

PYTHON   ?= python3.11
# Passed to every pip install. On Linux plain pip brings torch with several GB of CUDA libraries; the README says how
# to point it at the CPU build instead.
PIP_ARGS ?=
MODEL    ?= reference
NAME     := $(notdir $(patsubst %/,%,$(MODEL)))
OUT      ?=
RECIPE   ?=
TARGET   ?= cpu
ARGS     ?=

VENV  := .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.ready
PRESS := $(BIN)/edgepress

.DEFAULT_GOAL := help
.PHONY: help demo test test-families test-consumers artifact prune quantize export bench report example run show lint types wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  variables: MODEL=folder, hub id or 'reference'; OUT=folder; RECIPE=file; TARGET=cpu; ARGS='further flags';"
	@echo "             PIP_ARGS='pip flags' (see README, installing); PYTHON=python3.11"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is not there or older than 3.11; set PYTHON=/path/to/python3.11"; exit 2; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[cpu,build,report,tasks,dev]'
	@touch $@

demo: $(READY) ## press the embedded model, print the table and where the artifact is (offline after set-up)
	HF_HUB_OFFLINE=1 $(PRESS) build reference out/demo --target cpu

test: $(READY) ## the fast tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

test-families: $(READY) ## the slow matrix of architectures and formats
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m families $(ARGS)

test-consumers: $(READY) .venv-light/.ready .venv-optimum/.ready ## one folder, several consumers: light base, GenAI, optimum
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 0 -m consumers tests/consumers $(ARGS)

.venv-light/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-light
	.venv-light/bin/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[cpu]'
	@touch $@

.venv-optimum/.ready: constraints-optimum.txt
	$(PYTHON) -m venv --clear .venv-optimum
	.venv-optimum/bin/python -m pip install -q $(PIP_ARGS) -c constraints-optimum.txt torch==2.13.0
	.venv-optimum/bin/python -m pip install -q $(PIP_ARGS) -c constraints-optimum.txt optimum-onnx optimum onnxruntime
	@touch $@

artifact: $(READY) ## all stages: MODEL=... [OUT=...] [RECIPE=...] [TARGET=cpu] [ARGS='--remove-layers 4']
	$(PRESS) build "$(MODEL)" "$(or $(OUT),out/$(NAME))" $(if $(RECIPE),--recipe "$(RECIPE)") --target $(TARGET) $(ARGS)

prune: $(READY) ## MODEL=... OUT=folder ARGS='--remove-layers N'
	$(PRESS) prune "$(MODEL)" "$(or $(OUT),out/$(NAME)-$@)" $(ARGS)

quantize: $(READY) ## MODEL=... OUT=folder ARGS='--method gptq --bits 4'
	$(PRESS) quantize "$(MODEL)" "$(or $(OUT),out/$(NAME)-$@)" $(ARGS)

export: $(READY) ## MODEL=... OUT=folder
	$(PRESS) export "$(MODEL)" "$(or $(OUT),out/$(NAME)-$@)" --target $(TARGET) $(ARGS)

bench: $(READY) ## MODEL=artifact folder ARGS='--reference SRC'
	$(PRESS) bench "$(MODEL)" --target $(TARGET) $(ARGS)

report: $(READY) ## one page of benchmarks: OUT=folder of a build, or MODEL='DIR DIR ...'; ARGS='--out report.html'
	$(PRESS) report $(if $(OUT),"$(OUT)",$(if $(filter reference,$(MODEL)),out/demo,$(MODEL))) $(ARGS)

example: $(READY) ## docs/example: twelve artifacts of the embedded model measured in turn (let nothing else run)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/example_report.py $(ARGS)

run: $(READY) ## generate: MODEL=artifact folder PROMPT='...'
	$(PRESS) run "$(MODEL)" "$(PROMPT)" $(ARGS)

show: $(READY) ## how an artifact came to be: MODEL=artifact folder
	$(PRESS) show "$(MODEL)"

lint: $(READY) ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY) ## mypy, through a view of the folders under their import name
	mkdir -p build/view/edgepress
	for folder in pipeline exporters models; do ln -sfn "$(CURDIR)/$$folder" build/view/edgepress/$$folder; done
	$(BIN)/mypy -p edgepress.pipeline -p edgepress.exporters -p edgepress.models

wheel: $(READY) ## dist/*.whl, from a clean build folder
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

clean: ## remove what was built; the environment and out/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
