PYTHON ?= python3
PORT   ?= 8000
MODEL  ?= demo
BIN    := .venv/bin
DATA   ?= ../shared/data
QUESTIONS := wikidata_completions.jsonl:complete:60 wikidata_completions.jsonl:ask:20:60 \
  triviaqa_train.jsonl:answer_only:700 triviaqa_train.jsonl:ask:200:700 nq_open_dev.jsonl:answer_only:600
.PHONY: help sync check fix test serve bench probe lock
help:   ## show this list
	@sed -n 's/^\([a-z]*\):.*## /make \1	/p' Makefile
sync: .venv/synced ## make .venv with everything that the lock names
check: sync ## format, lint, types, import contracts; writes nothing
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
fix: sync ## format, repair what ruff can, write the README's tree and figures
	$(BIN)/python docs/readme.py
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
test: sync ## every test; the playground's need Debian's chromium
	$(BIN)/python -m server.demo_model
	$(BIN)/pytest
serve: sync ## serve $MODEL (the demo model) on 127.0.0.1:$PORT
	$(BIN)/python -m server $(MODEL) --port $(PORT)
bench: sync ## what the meter costs
	$(BIN)/python benchmarks/overhead.py
probe: sync ## train the shipped probe again from the question files in $DATA; hours
	$(BIN)/python -m offline train "$$($(BIN)/python -m server.demo_model)" --out runs/demo \
	  --name smollm2-135m-instruct --transfer nq_open_dev $(QUESTIONS:%=--questions $(DATA)/%) \
	  --questions offline/data/ordinary_prompts.jsonl:ordinary
lock: sync ## resolve requirements/lock.txt again; versions in it stay where they can
	$(BIN)/uv pip compile -q -c requirements/torch.txt --override requirements/overrides.txt -o requirements/lock.txt pyproject.toml requirements/build.in
.venv/synced: pyproject.toml requirements/lock.txt requirements/torch.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "set PYTHON to 3.11 or newer")' && $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --require-hashes --no-deps -r requirements/lock.txt
	$(BIN)/pip install -q -r requirements/torch.txt
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@
