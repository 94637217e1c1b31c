# make demo: set up and run the main job on the sample model.   make test: set up and run the tests.
VENV ?= .venv
PY := $(VENV)/bin/python
MODEL := samples/sample

.PHONY: demo test unit check bench clean

$(VENV)/.stamp: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.stamp
	rm -rf out/sample-int4
	$(VENV)/bin/fewbit quantize $(MODEL) --to compressed-tensors:int4-g128 --method hqq -o out/sample-int4
	$(VENV)/bin/fewbit eval out/sample-int4 --base $(MODEL) --text samples/text/wikitext2-test.txt --tokens 12288
	$(PY) samples/generate.py out/sample-int4

test: $(VENV)/.stamp
	$(PY) -m pytest -n 2 --dist loadfile tests

unit: $(VENV)/.stamp
	$(PY) -m pytest tests/unit tests/contract

check: $(VENV)/.stamp
	$(VENV)/bin/ruff check src tests bench dev
	$(VENV)/bin/ruff format --check src tests bench dev
	$(VENV)/bin/mypy

bench: $(VENV)/.stamp
	mkdir -p out/scale
	$(PY) bench/scale.py --sizes 1 --folder out/scale --set search=absmax > bench/results/scale.json
	$(PY) bench/rewrites.py > bench/results/rewrites.json
	$(PY) bench/torch_kernels.py
	$(PY) bench/kv_cache.py

clean:
	rm -rf $(VENV) out build dist
