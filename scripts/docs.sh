#!/usr/bin/env bash
# Builds the site of docs/ into ./.site and stops at the first warning: a page that is missing, a link that leads nowhere.
# Makes its own environment, of the extra `docs` alone (no torch). Arguments go to mkdocs: `scripts/docs.sh serve`.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x .venv-docs/bin/mkdocs ] || [ pyproject.toml -nt .venv-docs/bin/mkdocs ]; then
  "${PYTHON:-python3}" -m venv --clear .venv-docs
  .venv-docs/bin/python -c 'import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["docs"], sep="\n")' > .venv-docs/requirements.txt
  .venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --requirement .venv-docs/requirements.txt
  touch .venv-docs/bin/mkdocs
fi
export NO_MKDOCS_2_WARNING=1 # a notice of the theme, at every start
if [ $# = 0 ]; then
  set -- build --strict --quiet
fi
command=$1
shift
.venv-docs/bin/mkdocs "$command" --config-file .mkdocs.yml "$@"
