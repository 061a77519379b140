#!/usr/bin/env bash
# The main job, end to end, on data that ships with scikit-learn: a ResNet-20 on `digits` is trained, scored, pruned for
# three unlike devices, trained on each device's own non-IID share and merged again. Prints one table (scripts/pipeline.py
# says how to read it) and leaves the files in ./demo-output. Needs Python 3.11 or later and nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
rm -rf demo-output
python scripts/pipeline.py --threads 1 --output demo-output "$@"
