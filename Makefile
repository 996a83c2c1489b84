# Names for the common invocations; `nfm --help` has all of them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PRESET ?= digits
DATA ?=
OUT ?=
DRAWS ?=
LAYOUT ?= webdataset
COUPLING ?= nfm
ROUNDS ?= 60
N ?= 300
SEED ?= 0
ARGS ?=
# torch comes first and by exact version, from pip's find-links folder where one is configured (a CPU build may lie there),
# from the package index otherwise. Bytecode is compiled once here, so that each of many processes starts seconds sooner.
TORCH ?= torch==2.13.0

# A folder of images has a run of its own beside the embedded demo.
DEMO_OUT := $(or $(OUT),$(if $(DATA),runs/data,runs/demo))
need = $(or $($(1)),$(error $(1)=… is missing: see make help))

export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help install demo test test-all fuzz bench-stream bench-encode docs-pictures soak lint format prepare train-teacher encode-couplings train-student clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

install: $(READY)  ## create .venv with everything in it

$(READY): pyproject.toml constraints.txt
	@echo "installing into $(VENV), which takes about a minute"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	links=$$($(BIN)/python -m pip config get global.find-links 2>/dev/null || true); \
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python $${links:+--find-links "$$links"} "$(TORCH)"
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	touch $@

# The demo's networks are so small that a second thread gains them little, and on a busy machine costs them a lot.
demo: export OMP_NUM_THREADS ?= 1
demo: $(READY)  ## the whole path on embedded data: runs/demo/report.html (DATA=folder, PRESET=name, FRESH=1 to start over)
	$(if $(filter 1,$(FRESH)),rm -rf "$(DEMO_OUT)")
	$(BIN)/nfm demo --preset "$(PRESET)" --out "$(DEMO_OUT)" $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(READY)  ## the quick tests of every subject (2 to 4 minutes on 2 cores)
	@$(BIN)/pytest -m "not long" $(ARGS); status=$$?; \
	echo "make test-all runs the long tests too: sweeps over faults and hostile stores, an installed wheel, whole demos."; exit $$status

test-all: $(READY)  ## all tests (10 minutes)
	$(BIN)/pytest $(ARGS)

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## apply ruff's fixes and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-stream: $(READY)  ## time our stores beside other formats, RAM and S3; writes docs/benchmarks/streaming.md (an hour, 30 GB)
	$(BIN)/python -m tests.benchmarks.stream $(ARGS)

bench-encode: $(READY)  ## time the encode job beside its bare teacher, resuming and faults; writes docs/benchmarks/encode.md (half an hour)
	$(BIN)/python -m tests.benchmarks.encode $(ARGS)

docs-pictures: demo  ## the README's picture and numbers, from the demo's report
	$(BIN)/python -m tests.tools.docs_pictures "$(DEMO_OUT)"

fuzz: $(READY)  ## change stores, checkpoints and caches at random, and judge what every command does: N=10000 [SEED=first]
	$(BIN)/python -m tests.tools.fuzz --cases $(N) --seed $(SEED) $(ARGS)

soak: $(READY)  ## kill, fill and damage while couplings are encoded, and compare the bytes: ROUNDS=600
	$(BIN)/python -m tests.tools.faults --rounds $(ROUNDS) $(ARGS)

prepare: $(READY)  ## images → sample stores: DATA=folder OUT=url
	$(BIN)/nfm prepare --preset "$(PRESET)" $(if $(DATA),--data "$(DATA)") --out "$(call need,OUT)" $(ARGS)

train-teacher: $(READY)  ## sample store → teacher: SOURCE=url OUT=folder
	$(BIN)/nfm train-teacher --preset "$(PRESET)" --samples "$(call need,SOURCE)" --out "$(call need,OUT)" $(ARGS)

encode-couplings: $(READY)  ## teacher × noise draws → coupling store: SOURCE=url TEACHER=model OUT=url [LAYOUT= DRAWS= RAY_ADDRESS=]
	$(BIN)/nfm encode --preset "$(PRESET)" --samples "$(call need,SOURCE)" --teacher "$(call need,TEACHER)" --out "$(call need,OUT)" --layout $(LAYOUT) $(if $(DRAWS),--draws $(DRAWS)) $(ARGS)

train-student: $(READY)  ## coupling store → student: COUPLINGS="url …" OUT=folder [COUPLING=nfm|independent]
	$(BIN)/nfm train-student --preset "$(PRESET)" $(foreach url,$(call need,COUPLINGS),--couplings "$(url)") --out "$(call need,OUT)" --coupling $(COUPLING) $(ARGS)

clean:  ## remove environments and caches, keep runs
	rm -rf $(VENV) .venv-peers .venv-swift .mypy_cache .ruff_cache .pytest_cache *.egg-info
