#!/usr/bin/env bash
# All everyday checks: format, lint, types, tests. Makes its own environment; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh dev
ruff format --check cahfp_cli tests scripts
ruff check cahfp_cli tests scripts
mypy
pytest -n 2 -m "not slow" "$@"
