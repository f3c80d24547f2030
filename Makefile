# make demo     trains a small model from nothing and shows what it learned (set-up included)
# make chat     talks to it
# make serve    serves it at http://127.0.0.1:8998: a chat page at /, training curves at /runs (also before there is a
#               model), OpenAI's API for programs at /v1
# make test     the quick tests        make soak   the long ones       make bench   the benchmarks       make lint
#
# make test WORKERS=4   in four processes instead of two; each needs about 2 GB of memory
#
# A machine without a GPU does not need the CUDA build of torch:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_FLAGS ?=
WORKERS ?= 2
ifeq ($(OS),Windows_NT)
RUN = .venv/Scripts/python
else
RUN = .venv/bin/python
endif

.PHONY: demo chat serve test soak bench lint
demo: .venv/ready
	$(RUN) scripts/demo.py

chat: .venv/ready
	$(RUN) eval_model.py --model_mode 1

serve: .venv/ready
	$(RUN) -m pip install -q fastapi uvicorn
	$(RUN) scripts/serve_openai_api.py

# the tests' models are so small that more threads only wait for each other
test: export OMP_NUM_THREADS = 1
test: .venv/ready-dev
	$(RUN) -m pytest -m "not soak" -n $(WORKERS) --dist worksteal

soak: .venv/ready-dev
	$(RUN) -m pytest -m soak

bench: .venv/ready-dev
	for script in benchmarks/[a-z]*.py; do case $$script in */common.py) ;; *) echo "== $$script"; $(RUN) $$script || exit 1;; esac; done

lint: .venv/ready-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m basedpyright --pythonpath $(RUN)

.venv/ready: requirements.txt
	@echo "setting up .venv: downloads torch and others, which takes some minutes"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q $(PIP_FLAGS) -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(RUN) -m pip install -q $(PIP_FLAGS) -r requirements-dev.txt
	touch $@
