#!/usr/bin/env bash
# The checks that take minutes each (marked `slow`), left out of test.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh dev
pytest -m slow "$@"
