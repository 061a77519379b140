#!/usr/bin/env bash
# The same pipeline as demo.sh on Fashion-MNIST with VGG-11: the global checkpoint is trained on the first 12,000 images,
# the devices share the next 8,000. Some ten minutes; the figures in docs/results/demo.md come from it.
# The data: `apt-get install dataset-fashion-mnist`.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
rm -rf fashion-output
python scripts/pipeline.py --output fashion-output --threads 1 \
  --model vgg11 --model-arg width=0.5 --epochs 4 --local-epochs 2 --samples 256 --alpha 0.5 \
  --device jetson-orin-nano:storage=6MB --device raspberry-pi-4:latency=2ms --device stm32h743 \
  --public 'fashion-mnist@train[0:12000]' --private 'fashion-mnist@train[12000:20000]' --test fashion-mnist@test "$@"
