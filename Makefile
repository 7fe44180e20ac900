PYTHON ?= python3
PORT   ?= 8000
MODEL  ?= demo
BIN    := .venv/bin
VBIN   := .venv-vllm/bin
DATA   ?= ../shared/data
QUESTIONS := wikidata_completions.jsonl:complete:200 wikidata_completions.jsonl:ask:30:200 \
  triviaqa_train.jsonl:answer_only:1000 triviaqa_train.jsonl:ask:300:1000 \
  nq_open_dev.jsonl:answer_only:600 movies.jsonl:ask:400
.PHONY: help sync check fix test serve bench probe ship sweep lock vllm-cpu vllm test-vllm
help:   ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1	/p' Makefile
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
test: sync ## every test; some need Debian's chromium, nginx-light and prometheus
	$(BIN)/python -m server.demo_model
	$(BIN)/pytest
serve: sync ## serve $MODEL (the demo model) on 127.0.0.1:$PORT
	$(BIN)/python -m server $(MODEL) --port $(PORT)
bench: sync ## what the meter costs
	$(BIN)/python benchmarks/overhead.py
probe: sync ## train the shipped probe again from the question files in $DATA; 30 to 60 minutes
	$(BIN)/python -m offline train "$$($(BIN)/python -m server.demo_model)" --out runs/demo \
	  --name smollm2-135m-instruct --base-model HuggingFaceTB/SmolLM2-135M-Instruct --more-samples 2 --told --best-of 6 --transfer nq_open_dev --transfer movies --data-license "wikidata_completions, triviaqa_train: Apache-2.0; nq_open_dev: CC BY-SA 3.0; movies: MIT; ordinary_prompts: this project's" $(QUESTIONS:%=--questions $(DATA)/%) --questions offline/data/ordinary_prompts.jsonl:ordinary \
	  $(addprefix --given $(DATA)/,wikidata_completions.jsonl:facts:100 halueval_general.jsonl:halueval:100 refchecker_nq.jsonl:refchecker)
ship: sync ## put the probe of `make probe` in the place of the shipped one, its figures into the README
	rm -r probes/fitted/smollm2-135m-instruct && cp -r runs/demo/probe probes/fitted/smollm2-135m-instruct && $(BIN)/python docs/readme.py
sweep: sync ## what alpha does to the demo model, beside random neurons; half an hour
	$(BIN)/python -m offline sweep "$$($(BIN)/python -m server.demo_model)" --out runs/demo \
	  --probe probes/fitted/smollm2-135m-instruct --max-tokens 32
lock: sync ## resolve requirements/lock.txt and image.txt again; versions stay where they can
	$(BIN)/uv pip compile -q -c requirements/torch.txt --override requirements/overrides.txt -o requirements/lock.txt pyproject.toml requirements/build.in
	$(BIN)/uv pip compile -q --no-all-extras --extra otel -c requirements/torch.txt -c requirements/lock.txt --override requirements/overrides.txt -o requirements/image.txt pyproject.toml requirements/build.in
vllm-cpu: .venv-vllm/cpu ## make .venv-vllm: the lock and vLLM's CPU build
vllm: .venv-vllm/gpu ## make .venv-vllm: the lock and vLLM for NVIDIA GPUs
test-vllm: vllm-cpu ## the tests of the vLLM engine, and of any engine on it, on its CPU build
	$(VBIN)/python -m server.demo_model
	$(VBIN)/pytest tests/vllm tests/engines -k vllm
.venv-vllm/cpu .venv-vllm/gpu: .venv-vllm/%: pyproject.toml requirements/lock.txt requirements/vllm-%.txt
	$(PYTHON) -m venv --clear .venv-vllm
	$(VBIN)/pip install -q --require-hashes --no-deps -r requirements/lock.txt
	$(VBIN)/pip install -q -r requirements/vllm-$*.txt
	$(if $(filter cpu,$*),$(VBIN)/pip uninstall -q -y torchvision torchaudio torchcodec)
	$(VBIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@
.venv/synced: pyproject.toml requirements/lock.txt requirements/torch.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "set PYTHON to 3.11 or newer")' && $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --require-hashes --no-deps -r requirements/lock.txt
	$(BIN)/pip install -q -r requirements/torch.txt
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@
