# Two commands for a newcomer: make demo, make test. Both make the environment first.

PYTHON ?= python3
PORT ?= 8000
BUNDLE ?= build/demo-bundle
BIN := .venv/bin

.PHONY: demo test test-operations fuzz audit serve operations lint clean

demo: .venv/installed build/demo-bundle/manifest.json
	$(BIN)/python -m loadtest.demo --bundle build/demo-bundle --output demo.png

test: .venv/installed
	$(BIN)/python -m pytest

# Needs root, and programs; on Debian: apt-get install prometheus nginx-light kubernetes-client buildah debootstrap
test-operations: .venv/operations
	$(BIN)/python -m pytest tests/operations -m operate

FUZZ_SECONDS ?= 60
fuzz: .venv/installed
	$(BIN)/python -m tests.server.body.fuzz_bodies $(FUZZ_SECONDS)

# Needs a network that reaches the public lists of vulnerabilities.
audit: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.7'
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

# What is generated in docker/, and committed.
operations: .venv/installed
	$(BIN)/python -m docker.grafana.dashboard
	$(BIN)/python -m docker.kubernetes.prometheus_rule

serve: .venv/installed $(if $(filter build/demo-bundle,$(BUNDLE)),build/demo-bundle/manifest.json)
	$(BIN)/python -m server --bundle $(BUNDLE) --port $(PORT)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build demo.png .venv

# The torch pin comes first and by itself, so that nothing else can pick another build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON.")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv/operations: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[operate]'
	touch $@

build/demo-bundle/manifest.json: .venv/installed $(wildcard engines/bundled/decoder.safetensors)
	$(BIN)/python build_engines.py --decoder dct-demo --target cpu --overwrite --output build/demo-bundle
