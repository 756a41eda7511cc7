# Drawbridge. `make demo` and `make test` do all set-up themselves; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# Debian's own Python: the only one that sees python3-nftables, wherever a pyenv stands in PATH.
SYSTEM_PYTHON := /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
CNI := build/cni/drawbridge
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
IMAGE := localhost/drawbridge:$(VERSION)
IMAGE_ARCHIVE := build/image/drawbridge.tar

RUN_PACKAGES := python3-venv python3-nftables nftables netbase iproute2 gcc libc6-dev
TEST_PACKAGES := containernetworking-plugins containerd runc busybox-static etcd-server openssl
E2E_PACKAGES := bash-static curl iptables netcat-openbsd procps
BENCH_PACKAGES := iperf3
IMAGE_PACKAGES := buildah mmdebstrap
LINT_PACKAGES := shellcheck git

# Under sudo the home is another; what is built once is built for both.
export DRAWBRIDGE_TEST_CACHE := $(or $(DRAWBRIDGE_TEST_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/drawbridge-tests)
PYTEST = $(SUDO) env DRAWBRIDGE_TEST_CACHE=$(DRAWBRIDGE_TEST_CACHE) $(BIN)/python -m pytest

# A flood needs both processors for itself.
FLOODS := tests/kernel/test_transactions.py
# These need what tests/tools builds.
BUILT := tests/api tests/deploy

CFLAGS := -std=c17 -O2 -static -D_GNU_SOURCE -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wformat=2 -Werror \
	-D_FORTIFY_SOURCE=2 -fstack-protector-strong

.PHONY: help
help: ## This list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# No daemon of a package starts: tests run their own, with sockets and data of their own.
define install-missing
	@missing=$$(for p in $(1); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then echo "installing" $$missing; policy=/usr/sbin/policy-rc.d; \
	if [ ! -e $$policy ]; then trap "$(SUDO) rm -f $$policy" EXIT; \
	printf '#!/bin/sh\nexit 101\n' | $(SUDO) install -m 755 /dev/stdin $$policy; fi; \
	$(SUDO) apt-get update -qq; \
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing </dev/null >/dev/null; fi
endef

.PHONY: packages test-packages e2e-packages bench-packages image-packages lint-packages
packages:
	$(call install-missing,$(RUN_PACKAGES))

test-packages:
	$(call install-missing,$(TEST_PACKAGES))

e2e-packages:
	$(call install-missing,$(TEST_PACKAGES) $(E2E_PACKAGES))

bench-packages:
	$(call install-missing,$(BENCH_PACKAGES))

image-packages:
	$(call install-missing,$(IMAGE_PACKAGES))

lint-packages:
	$(call install-missing,$(LINT_PACKAGES))

$(VENV)/.installed: pyproject.toml constraints.txt | packages
	@echo "making the virtual environment $(VENV)"
	@$(SYSTEM_PYTHON) -m venv --system-site-packages $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(CNI): cni/shim/drawbridge.c | packages
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -o $@ $<

.PHONY: setup
setup: packages $(VENV)/.installed $(CNI) ## .venv/bin/drawbridge and build/cni/drawbridge, with all that they need

$(IMAGE_ARCHIVE): deploy/Containerfile deploy/build-image.sh Makefile pyproject.toml constraints.txt \
		$(shell find cni enforcer -type f -not -name '*.pyc') | image-packages
	$(SUDO) deploy/build-image.sh $(IMAGE) $@

.PHONY: image
image: $(IMAGE_ARCHIVE) ## The container image, without a registry, as build/image/drawbridge.tar

.PHONY: demo
demo: setup ## A shop in namespaces of its own: pods, policies, packets, and why one was dropped
	@$(SUDO) $(BIN)/drawbridge demo

.PHONY: test
test: setup test-packages ## Tests that need nothing built; root, in network namespaces of their own
	@$(PYTEST) --numprocesses=2 --dist=loadfile --ignore=$(FLOODS) $(foreach path,$(BUILT),--ignore=$(path))

.PHONY: test-api
test-api: setup test-packages ## Tests on the real API server, and of the chart; root, builds both once
	@$(BIN)/python -m tests.tools.build kube-apiserver kubectl helm
	@$(PYTEST) --numprocesses=2 --dist=loadfile $(BUILT)

.PHONY: test-floods
test-floods: setup test-packages ## What slips through in the instant of a change, under a flood of packets; root
	@$(PYTEST) $(FLOODS)

.PHONY: e2e
e2e: setup e2e-packages image ## Tests on real clusters of several machines on this one; root, builds Kubernetes once
	@$(BIN)/python -m tests.tools.build
	@$(PYTEST) --numprocesses=2 --dist=loadfile tests/cluster

.PHONY: conformance
conformance: setup e2e-packages image ## Kubernetes' own tests of pod networks and NetworkPolicy on such a cluster; root
	@$(BIN)/python -m tests.tools.build
	@$(BIN)/python -m tests.tools.build e2e.test ginkgo
	@$(SUDO) env DRAWBRIDGE_TEST_CACHE=$(DRAWBRIDGE_TEST_CACHE) $(BIN)/python -m tests.conformance

.PHONY: lint
lint: setup lint-packages ## ruff, mypy strict, import contracts, spelling, shellcheck; that every test can be imported
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/codespell --dictionary=- --dictionary=docs/words.txt README.md CHANGELOG.md CONTRIBUTING.md Makefile docs enforcer cni tests deploy .ci
	@shellcheck .ci/run $(shell git ls-files '*.sh')
	@said=$$($(BIN)/python -m pytest --collect-only --quiet --quiet tests tests/cluster) || { echo "$$said"; exit 1; }

.PHONY: campaign
campaign: setup ## Each kind of change 30,000 times under a flood: what slipped through, what was lost; root, for hours
	@$(SUDO) $(BIN)/python -m tests.kernel --swaps 30000

.PHONY: versions
versions: setup test-packages ## To the engine before and back while connections run; root, from the repository's history
	@$(SUDO) $(BIN)/python -m tests.e2e.versions

.PHONY: bench
bench: setup test-packages bench-packages ## Figures of docs/performance.md, as ratios in one run
	@$(SUDO) $(BIN)/python -m tests.bench

.PHONY: bench-cluster
bench-cluster: setup e2e-packages image ## Figures of docs/performance.md that need a cluster of two nodes
	@$(BIN)/python -m tests.tools.build
	@$(SUDO) env DRAWBRIDGE_TEST_CACHE=$(DRAWBRIDGE_TEST_CACHE) $(BIN)/python -m tests.bench.cluster

.PHONY: clean
clean: ## Remove what setup made
	rm -rf $(VENV) build
