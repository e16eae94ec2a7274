# Set-up, run and test: `make help` lists the targets. Needs Linux on x86-64 and Python 3.11.
#
#   PYTHON   the Python 3.11 to build the environment with (default: the first found on PATH)
#   ARGS     flags of pipelines/run.py, or of pytest: make run ARGS="--game breakout"

PYTHON ?=
ARGS ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help setup run test test-fast lint format prism browser images-check clean

# Without compiled byte-code TensorFlow takes twice as long to import, in every process of a run.
unexport PYTHONDONTWRITEBYTECODE PYTHONPATH PYTHONHOME PIP_NO_COMPILE

VENV := .venv
PRISM_VERSION := v2.73.0
BIN := $(VENV)/bin
# A stamp is touched when its installation is complete: an interrupted one is done again.
RUN_STAMP := $(VENV)/installed-for-run
TEST_STAMP := $(VENV)/installed-for-test
ROOT_FILE := $(VENV)/root

# A virtual environment knows its own path and its Python's: made anew when either has moved.
ifneq ($(wildcard $(RUN_STAMP)),)
ifneq ($(file < $(ROOT_FILE)) $(shell test -x $(BIN)/python && echo runs),$(CURDIR) runs)
MOVED := yes
.PHONY: $(RUN_STAMP)
endif
endif

# Prints the Python to use; nothing when there is none.
define FIND_PYTHON
for candidate in python3.11 python3 python; do
  if "$$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2> /dev/null; then
    echo "$$candidate"
    break
  fi
done
endef

# Prints what stands in the way and the remedy; nothing when all is well.
define FIND_PROBLEM
problem() { echo "$$*"; exit 0; }
system="$$(uname -s) $$(uname -m)"
[ "$$system" = "Linux x86_64" ] || problem "this machine is $$system: dm-reverb has wheels for Linux x86_64 only; use such a machine, a container or a virtual machine."
python="$(CHOSEN_PYTHON)"
[ -n "$$python" ] || problem "no Python 3.11 on PATH (dm-reverb 0.14 has no wheels for 3.12 and later): install it (Debian, Ubuntu: apt-get install python3.11 python3.11-venv; or: pyenv install 3.11), or name it: make PYTHON=/path/to/python3.11"
version="$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null)" || problem "PYTHON=$$python does not run: name a Python 3.11, such as make PYTHON=/usr/bin/python3.11"
[ "$$version" = 3.11 ] || problem "PYTHON=$$python is Python $$version, 3.11 is needed (dm-reverb 0.14 and TensorFlow 2.15 have wheels for no later one): make PYTHON=/path/to/python3.11"
"$$python" -c 'import ensurepip, venv' 2> /dev/null || problem "$$python has no venv module: install it (Debian, Ubuntu: apt-get install python3.11-venv)."
endef

CHOSEN_PYTHON = $(or $(PYTHON),$(shell $(FIND_PYTHON)))
PROBLEM = $(shell $(FIND_PROBLEM))

# Of pip's output the log keeps all, the terminal the count, the large downloads and the errors.
define SHOW_PROGRESS
/^Collecting / && ++packages % 20 == 0 { print "  " packages " packages"; }
/^ +Downloading .* MB\)/ { size = $$(NF - 1); sub(/\(/, "", size); if (size + 0 >= 50) print "  " $$2 " (" size " MB)"; }
/^Installing collected packages/ { print "  unpacking and compiling (a minute or two)"; }
/^ *(ERROR|error):/ { print; }
{ fflush(); }
endef
export SHOW_PROGRESS

# $(call INSTALL,requirements file): at the versions of constraints.txt; the two variables make them
# hold too for setuptools where a package is built from source (older and newer pip, respectively).
define INSTALL
echo "Installing $(1) into $(VENV) ..."
PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
$(BIN)/python -m pip install --compile --no-input --disable-pip-version-check --progress-bar off \
  -c constraints.txt -r $(1) 2>&1 | tee $(VENV)/pip.log | awk "$$SHOW_PROGRESS" \
  || { echo "$(1): pip failed, see $(CURDIR)/$(VENV)/pip.log; with that mended, the same command starts afresh." >&2; exit 2; }
endef

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	echo 'PYTHON=/path/to/python3.11 chooses the interpreter of the environment.'

setup: $(RUN_STAMP)  ## make .venv with everything a run needs
	@echo '$(VENV) is ready.'

run: $(RUN_STAMP)  ## train; flags: make run ARGS="--game breakout" (ARGS=--help lists them)
	@exec $(BIN)/python pipelines/run.py --runner=DirectRunner $(ARGS)

test: $(TEST_STAMP) browser  ## lint, format, types and the whole suite; flags of pytest: ARGS="-k replay"
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(ARGS),$(BIN)/mypy)
	$(if $(ARGS),exec $(BIN)/python -m pytest $(ARGS))
	# Some tests need Prism, whose build takes minutes: beside the others, as the types.
	if command -v go > /dev/null; then (nice -n 19 make prism > $(VENV)/prism.log 2>&1 || true) & fi
	$(BIN)/mypy > $(VENV)/mypy.log 2>&1 & types=$$!
	$(BIN)/python -m pytest -n 3 --dist loadscope || failed=$$?
	wait $$types || { cat $(VENV)/mypy.log; failed=1; }
	tail -n 1 $(VENV)/mypy.log
	exit $${failed:-0}

test-fast: $(TEST_STAMP)  ## lint, types and the quick tests: before each commit
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	exec $(BIN)/python -m pytest -n 3 --dist loadscope -m 'not end_to_end and not slow' $(ARGS)

lint: $(TEST_STAMP)  ## lint, format and types only
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	exec $(BIN)/mypy

format: $(TEST_STAMP)  ## bring the code into form
	@$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

prism: $(BIN)/prism  ## build Beam's job server Prism with Go, for --runner=PrismRunner

# Of the next version: the module proxy has none of Beam's own, and this one serves it, too.
$(BIN)/prism:
	@exec 9> $@.lock && flock 9  # the tests may come while it is being built
	[ ! -x $@ ] || exit 0
	[ -x $(BIN)/python ] || { echo "$(VENV) is not there: make setup first." >&2; exit 2; }
	command -v go > /dev/null || { echo "Prism is built with Go, which is not on PATH: install it (Debian, Ubuntu: apt-get install golang)." >&2; exit 2; }
	echo "Building Prism into $@ (some minutes) ..."
	GOBIN="$$(cd $(BIN) && pwd)" go install github.com/apache/beam/sdks/v2/go/cmd/prism@$(PRISM_VERSION)

browser:  ## install Debian's Chromium, which shows the report in tests; needs root
	@if command -v chromium > /dev/null; then exit 0; fi
	if [ "$$(id -u 2> /dev/null)" != 0 ] || ! command -v apt-get > /dev/null; then
	  echo "Tests of the report's page need Chromium: install it (Debian: apt-get install chromium), or make browser as root. They skip without it, and fail if CI=true." >&2
	  exit 0
	fi
	echo "Installing Chromium (a minute) ..."
	{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends chromium; } > $(VENV)/apt.log 2>&1 \
	  || echo "Chromium is not installed: apt-get failed, see $(CURDIR)/$(VENV)/apt.log." >&2

images-check:  ## build and try the container images without an engine; needs root, debootstrap, 25 GB
	@exec "$(CHOSEN_PYTHON)" -m tests.images.check $(ARGS)

clean:  ## remove .venv and caches; runs/ stays
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN_STAMP): requirements.txt constraints.txt
	@$(if $(PROBLEM),$(error $(PROBLEM)))
	if [ ! -e $@ ] || [ -n "$(MOVED)" ]; then rm -rf $(VENV); "$(CHOSEN_PYTHON)" -m venv $(VENV); fi
	rm -f $@
	$(call INSTALL,requirements.txt)
	# The packages of this checkout, for every interpreter of the environment in any directory.
	echo "$(CURDIR)" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/gorila.pth"
	printf %s "$(CURDIR)" > $(ROOT_FILE)
	touch $@

$(TEST_STAMP): requirements-test.txt $(RUN_STAMP)
	@rm -f $@
	$(call INSTALL,requirements-test.txt)
	touch $@
