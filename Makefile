# As root on a fresh Debian 12 (or its kin), `make demo` and `make test` do everything by themselves.
#
#   make setup   system packages (fuse3, python3-venv) if they are missing, and a virtual environment in .venv
#   make demo    a primary and two replicas on this machine, live; then three nodes
#                that elect their primary, which is killed                         ARGS="-seconds 60 -keep"
#   make test    all tests                                                         ARGS="-k wal"
#   make test-sqlite   SQLite's own test suite on a mount with a live replica, compared with the same on a plain
#                directory; hours, not part of `make test`                        ARGS="--mode wal --jobs 4"
#   make bench   measure against native SQLite; results go to bench/results/
#   make lint    ruff and mypy
#   make clean   remove what the above made

VENV := .venv
STAMP := $(VENV)/.set-up
STAMP_DEV := $(VENV)/.set-up-dev
PYTHON_IN := $(VENV)/bin/python

.PHONY: setup demo test test-sqlite bench lint clean

setup: $(STAMP_DEV)
	@:

$(STAMP): pyproject.toml .ci/setup
	@sh .ci/setup $(VENV)
	@touch $(STAMP)

$(STAMP_DEV): pyproject.toml .ci/setup
	@sh .ci/setup $(VENV) dev
	@touch $(STAMP) $(STAMP_DEV)

demo: $(STAMP)
	@$(PYTHON_IN) -m pylitefs demo $(ARGS)
	@$(PYTHON_IN) -m pylitefs demo -cluster $(ARGS)

test: $(STAMP_DEV)
	@$(PYTHON_IN) -m pytest -n 3 --dist worksteal $(ARGS)

test-sqlite: $(STAMP_DEV)
	@sh tests/sqlite_suite/build.sh build/sqlite
	@$(PYTHON_IN) tests/sqlite_suite/run.py $(ARGS)

bench: $(STAMP_DEV)
	@$(PYTHON_IN) bench/run.py $(ARGS)

lint: $(STAMP_DEV)
	@$(PYTHON_IN) -m ruff check src tests bench
	@$(PYTHON_IN) -m mypy

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
