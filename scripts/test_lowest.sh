#!/usr/bin/env bash
# The tests that touch our dependencies, with the lowest versions that we declare, in an environment of its own;
# arguments go to pytest in place of the list below. Transformers, an extra, asks for newer ones and is left out.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -x .venv-lowest/bin/pytest ] || [ constraints-lowest.txt -nt .venv-lowest/bin/pytest ]; then
  "${PYTHON:-python3.11}" -m venv --clear .venv-lowest
  .venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints-lowest.txt --editable . pytest hypothesis
fi
if [ $# = 0 ]; then
  set -- tests/test_help.py tests/checkpoint tests/data tests/models tests/device/test_profile.py \
    tests/export/test_onnx_file.py tests/reconstruction/test_merge.py tests/pruning/test_submodel_files.py \
    tests/end_to_end/test_token_data.py
fi
.venv-lowest/bin/pytest -m "not slow" -k "not transformers and not config" "$@"
