# `make` prints the targets. `make demo` and `make test` do their own set-up.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# Of 18,000 files few are used: those are compiled when they are first imported. What is compiled
# has to be kept then, or every process compiles it again, which doubles the time of the tests.
INSTALL := $(PIP) install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE
TORCH := torch==2.13.0
# The pip that comes with Python 3.11 takes 25 seconds to read the index for .[dev], this one 9.
PIP_ITSELF := pip==26.3
TORCH_INDEX ?=
COMPILED := datasets, hypothesis, matplotlib.pyplot, nvflare.apis.fl_context, peft, pytest, sacrebleu
QUICK ?= --quick

# Small models on few cores: spinning OpenMP threads cost more than they give.
export OMP_WAIT_POLICY ?= PASSIVE
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
PINS_HEADER := \# Every package of .[dev], as tested. Renewed by `make pins`.
LOCK_HEADER := \# What .[clusters,deploy,dicom,privacy] brings along, with hashes. Renewed by `make pins`.
# Tools that look at the environment from outside, in one of their own.
TOOLS := $(VENV)/tools
# The trackers bring 40 packages, some of which refuse our pins.
TRACKERS := $(VENV)/trackers
CYCLONEDX := cyclonedx-bom==7.5.0
UV := uv==0.13.9
PIP_AUDIT := pip-audit==2.10.1
# It installs the tools, if it reaches a database of vulnerabilities.
AUDIT = $(BIN)/python scripts/vulnerabilities.py --tool $(TOOLS)/bin/pip-audit \
  --install '$(MAKE_COMMAND) --no-print-directory $(TOOLS)/.stamp'
.PHONY: help demo test check bench families trackers docs pins sbom audit clean
.DELETE_ON_ERROR:

help: ## print this list
	@echo "fedvlm: federated, personalized fine-tuning of vision-language models"
	@echo
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1|/' \
	  | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'
	@echo
	@echo "  PYTHON=python3.12        the Python that creates $(VENV) (3.11 or newer)"
	@echo "  TORCH_INDEX=https://download.pytorch.org/whl/cpu"
	@echo "                           take PyTorch without CUDA (Linux; smaller)"

demo: $(VENV)/.stamp-run ## set up, then compare algorithms on eight small sites (3 minutes)
	$(BIN)/fedvlm demo

test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.stamp-compiled ## set up, then run the tests
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal

check: $(VENV)/.stamp-dev ## lint, formatting, types, layers; known vulnerabilities, if the network allows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(AUDIT) --optional

bench: $(VENV)/.stamp-run ## run every benchmark briefly (QUICK= for the full length)
	@found=0; for file in benchmarks/*.py; do \
	  [ -e "$$file" ] || continue; \
	  case "$$file" in */_*) continue;; esac; \
	  found=1; echo "== $$file"; $(BIN)/python "$$file" $(QUICK) || exit 1; \
	done; \
	[ $$found = 1 ] || echo "benchmarks/ holds no benchmark yet: nothing to run"

families: export HF_HUB_OFFLINE = 1
families: $(VENV)/.stamp-dev ## renew docs/families.md by testing every model family
	$(BIN)/python -m pytest tests/test_families.py --families-table docs/families.md

trackers: export HF_HUB_OFFLINE = 1
trackers: $(TRACKERS)/.stamp ## test report_to with the newest trackers, in an environment of their own
	$(TRACKERS)/bin/python -m pytest -rs tests/test_trackers.py

docs: $(VENV)/.stamp-docs ## set up, then build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open site/index.html, or for the search: $(BIN)/python -m http.server -d site"

pins: ## renew constraints.txt from a fresh environment
	rm -rf $(VENV)
	echo '$(TORCH)' > constraints.txt
	$(MAKE) $(VENV)/.stamp-dev
	{ echo '$(PINS_HEADER)'; $(PIP) freeze --exclude-editable \
	  | sed 's/^\(torch==[^+]*\)+.*/\1/'; } > constraints.new
	mv constraints.new constraints.txt
	$(MAKE) requirements.lock
	$(BIN)/python scripts/licences.py

# For every platform, with the hashes that the package index has.
requirements.lock: constraints.txt $(TOOLS)/.stamp
	{ echo '$(LOCK_HEADER)'; $(TOOLS)/bin/uv pip compile --quiet pyproject.toml -c constraints.txt \
	  --extra clusters --extra deploy --extra dicom --extra privacy --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-annotate --no-header; } > requirements.new
	mv requirements.new requirements.lock

sbom: $(VENV)/.stamp-dev $(TOOLS)/.stamp ## write sbom.json: all packages of $(VENV), as CycloneDX
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library \
	  --output-reproducible -o sbom.json $(BIN)/python

audit: $(VENV)/.stamp-dev ## look for known vulnerabilities of requirements.lock (needs the network)
	$(AUDIT)

clean: ## remove the environment, caches and build output (keeps runs/ and demo/)
	rm -rf $(VENV) build dist site sbom.json src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis \
	  .import_linter_cache
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +

# Set-up. The stamps make a second run free; editing pyproject.toml or constraints.txt renews them.

$(VENV)/.stamp-venv:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "'$(PYTHON)' was not found: install Python 3.11 or newer," \
	    "or name one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fedvlm needs Python 3.11 or newer, '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1):" \
	    "name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' has no venv module: install it" \
	    "(Debian, Ubuntu: apt install python3-venv), or make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV): a few minutes, once"
	"$(PYTHON)" -m venv $(VENV)
	$(INSTALL) '$(PIP_ITSELF)'
	@touch $@

# The pinned PyTorch comes first: a range would let pip choose another, larger build.
$(VENV)/.stamp-torch: constraints.txt | $(VENV)/.stamp-venv
	$(INSTALL) '$(TORCH)' -c constraints.txt \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.stamp-run: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	$(INSTALL) -e . -c constraints.txt
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	$(INSTALL) -e '.[dev]' -c constraints.txt
	@touch $(VENV)/.stamp-run $@

$(VENV)/.stamp-docs: pyproject.toml constraints.txt $(VENV)/.stamp-torch
	$(INSTALL) -e '.[docs]' -c constraints.txt
	@touch $(VENV)/.stamp-run $@

$(TOOLS)/.stamp: | $(VENV)/.stamp-venv
	"$(PYTHON)" -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet '$(CYCLONEDX)' '$(UV)' '$(PIP_AUDIT)'
	@touch $@

$(TRACKERS)/.stamp: pyproject.toml | $(VENV)/.stamp-venv
	"$(PYTHON)" -m venv $(TRACKERS)
	$(TRACKERS)/bin/python -m pip install --quiet '$(TORCH)' \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(TRACKERS)/bin/python -m pip install --quiet -e '.[privacy,trackers]' pytest hypothesis
	@touch $@

# What tests import is compiled here once, and not by all workers of the tests at the same time.
$(VENV)/.stamp-compiled: $(VENV)/.stamp-dev
	$(BIN)/python -c 'import $(COMPILED)'
	@touch $@
