# make train: a small model on the synthetic language. make test: the test suite.
# make measures: sizes of the code, circles, who knows what.
# All make a virtual environment in .venv first, if there is none.
PYTHON ?= python3

.PHONY: train test lint measures
train: .venv/installed
	.venv/bin/python train.py

# As many processes as cores, of one thread each; threads that wait give their core away: the kernels' tests
# have two, and beside another process those that spin made the suite take up to twice as long.
test: .venv/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile

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
