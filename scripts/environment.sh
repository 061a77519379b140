# Sourced by the other scripts: makes `.venv` beside the checkout with pinned dependencies, or brings it up to date.
# Usage: . scripts/environment.sh [EXTRAS], for example `. scripts/environment.sh dev`

extras="${1:-}"
stamp=".venv/installed-${extras:-core}"
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -m venv .venv
fi
if [ ! -f "$stamp" ] || [ constraints.txt -nt "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable ".${extras:+[$extras]}"
  touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
