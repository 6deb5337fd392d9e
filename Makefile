# make demo   see it work          make test   run everything that proves it
# Both need python3 and make only; what else they use is installed, or named where that is not allowed.

PYTHON ?= python3
VENV   ?= .venv
PYTEST_ARGS ?= -n auto --dist worksteal

BIN    := $(VENV)/bin
USER_STAMP := $(VENV)/.installed
DEV_STAMP  := $(VENV)/.installed-dev
FUZZ_STAMP := $(VENV)/.installed-fuzz
PEERS_STAMP := $(VENV)/.installed-peers
COMPILED   := nbdbm/_speed.abi3.so

.PHONY: help demo test soak unit interop peers bench growth bench-doc man deb picture fuzz lint format types clean

help:
	@sed -n 's/^## *//p' $(MAKEFILE_LIST)

## make demo      the life of a disk: create, write, checkpoint, write, back up what changed
demo: $(USER_STAMP)
	$(BIN)/python scripts/demo.py

## make test      the whole suite, with the interoperability peers
test: peers $(COMPILED) $(PEERS_STAMP)
	NBDBM_REQUIRE_PEERS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

## make unit      the suite without the peers
unit: $(DEV_STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS) --ignore tests/interop

## make interop   only the tests against the peers, with those that take long (systemd)
interop: peers $(COMPILED) $(PEERS_STAMP)
	NBDBM_REQUIRE_PEERS=1 NBDBM_LONG=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/interop

## make soak      every kind of client, reloads, restarts and kills for SOAK_SECONDS (600)
SOAK_SECONDS ?= 600
soak: peers $(COMPILED) $(PEERS_STAMP)
	NBDBM_REQUIRE_PEERS=1 NBDBM_SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest -n 0 -s tests/soak

## make peers     install qemu-utils, libnbd and the other peers (Debian), unpack newer ones and guests
peers:
	@scripts/install_peers.sh
	@scripts/unpack_peers.sh bookworm
	@scripts/unpack_peers.sh trixie
	@scripts/unpack_peers.sh machine
	@scripts/unpack_virtnbdbackup.sh

## make bench     beside qemu-nbd: times, memory; BENCH_ARGS="--quick randread" for less, --help for more
bench: peers $(COMPILED)
	$(BIN)/python scripts/bench.py $(BENCH_ARGS)

## make growth    how costs grow: disk size, bitmaps, extents, connections (into docs/performance)
growth: $(DEV_STAMP) peers
	$(BIN)/python -m scripts.benchmark.growth --json docs/performance/growth.json

## make bench-doc the figures in docs/performance.md, from the results in docs/performance
bench-doc: $(DEV_STAMP)
	$(BIN)/python -m scripts.benchmark.document

## make man        the manual pages, into build/man
man: $(USER_STAMP)
	$(BIN)/python -m scripts.manpages build/man

## make deb       a Debian package with all that it needs, into dist; MAINTAINER="Jane Doe <jane@example.org>"
deb: $(USER_STAMP)
	$(BIN)/python -m scripts.deb $(if $(MAINTAINER),--maintainer '$(MAINTAINER)') dist

## make picture   the picture in docs/architecture.md, from the imports of the package
picture: $(BIN)/python
	$(BIN)/python -m scripts.layer_picture --write

## make fuzz      hostile bytes at everything that reads them, FUZZ_SECONDS (60) per target; FUZZ_ARGS
fuzz: $(FUZZ_STAMP)
	$(BIN)/python scripts/fuzz.py $(FUZZ_ARGS)

## make lint      style, import layers, twin tests, the README's tree, the picture of the layers
lint: $(DEV_STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python scripts/check_layers.py
	$(BIN)/python scripts/check_mirror.py
	$(BIN)/python scripts/check_tree.py
	$(BIN)/python -m scripts.layer_picture

## make format    let ruff format and fix
format: $(DEV_STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

## make types     mypy --strict
types: $(DEV_STAMP)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist $(COMPILED) .demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@scripts/venv.sh $(PYTHON) $(VENV)

# Each stamp is newer than the files that say what is installed.
$(USER_STAMP): pyproject.toml setup.py nbdbm/_speed.c | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(DEV_STAMP): pyproject.toml setup.py nbdbm/_speed.c | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(USER_STAMP)

# After the Debian peers, which include a compiler.
$(PEERS_STAMP): $(DEV_STAMP) scripts/newer_python.sh | peers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[peers]'
	scripts/newer_python.sh $(BIN)/python
	@touch $@

$(FUZZ_STAMP): $(DEV_STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,fuzz]'
	@touch $@

# An installation without a compiler has left this out: once more, now that the peers include one.
$(COMPILED): $(DEV_STAMP) | peers
	@[ -e $@ -a $@ -nt nbdbm/_speed.c ] || \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@test -e $@ && touch $@
