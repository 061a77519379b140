#!/usr/bin/env bash
# The same pipeline as demo.sh on Fashion-MNIST with VGG-11: the global checkpoint is trained on the first 20,000 images,
# the devices share the next 12,000. About half an hour on 2 cores; the figures in docs/results.md come from it.
# The data: `apt-get install dataset-fashion-mnist`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
rm -rf fashion-output
python scripts/pipeline.py --output fashion-output --model vgg11 --epochs 4 --local-epochs 2 --samples 256 --alpha 0.5 \
  --device jetson-orin-nano:latency=0.85ms --device raspberry-pi-4:latency=4ms --device stm32h743 \
  --public 'fashion-mnist@train[0:20000]' --private 'fashion-mnist@train[20000:32000]' --test fashion-mnist@test "$@"
