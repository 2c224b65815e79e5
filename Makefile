# make distill: a fresh machine to a distilled student and its report.   make test: the whole suite.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python

.PHONY: install distill test lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

distill: install
	$(RUN) train.py +experiment=distill

test: install
	$(RUN) -m pytest -n 2 --dist loadfile

lint: install
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
