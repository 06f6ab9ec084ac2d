# make train: a small model on the synthetic language. make test: the test suite.
# make measures: sizes of the code, circles, who knows what.
# All make a virtual environment in .venv first, if there is none.
PYTHON ?= python3

.PHONY: train test lint measures
train: .venv/installed
	.venv/bin/python train.py

test: .venv/installed  # as many processes as cores, of one thread each
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

measures: .venv/installed
	.venv/bin/python scripts/measures.py

.venv/installed: requirements.lock pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.lock
	.venv/bin/pip install --quiet --no-deps --editable .
	touch $@
