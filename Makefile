# Everything runs in .venv, which the first target makes (about three minutes, once).
#   make demo            a whole search on three small models, to the table at its end
#   make demo-llm        the same on a 135M-parameter language model, in vLLM
#   make test            all tests              make check   format, lint, types, the fast tests
PYTHON ?= python3
SEED ?= 0
VENV_PYTHON := .venv/bin/python

# .venv is installed uncompiled: where the environment forbids bytecode, as many containers do, each
# process would compile vLLM and what it imports anew, for more than half of its start.
export PYTHONDONTWRITEBYTECODE :=

# A file's tests share models and engines, so they stay together; files are handed out in their
# order, not by their number of tests: the longest, with engines in processes, come first so.
PYTEST_PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

.PHONY: venv demo demo-llm test check clean

venv:
	@$(PYTHON) scripts/setup_env.py

demo: venv
	@$(VENV_PYTHON) scripts/demo.py --seed $(SEED)

demo-llm:
	@$(PYTHON) scripts/setup_env.py --demo-llm
	@$(VENV_PYTHON) scripts/demo_llm.py --seed $(SEED)

test: venv
	@$(VENV_PYTHON) -m pytest $(PYTEST_PARALLEL) $(PYTEST_ARGS)

check: venv
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m mypy
	@$(VENV_PYTHON) -m pytest $(PYTEST_PARALLEL) -q -m "not slow and not vllm"

# What set-up, tests and tools made; studies and their models stay.
clean:
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
