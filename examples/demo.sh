#!/usr/bin/env bash
# The whole way on the embedded corpus: prepare, look, check, train. Usage: examples/demo.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-demo}
export HF_HUB_OFFLINE=1
export OMP_NUM_THREADS=1  # so small a model gains nothing from threads, and loses much where cores are shared
rm -rf "$out/set" "$out/model"

say() { printf '\n$ %s\n' "$*"; "$@"; }

say sftdata prepare examples/prepare.yaml -o "$out/set"
say sftdata inspect "$out/set" --example 3
say sftdata verify "$out/set"
say sfttrain run "$out/set" --init-from-config examples/tiny-model/config.json -o "$out/model" \
    --max-steps 100 --set learning_rate=0.005 --set per_device_train_batch_size=4
say cat "$out/model/train_log.jsonl"
say sfttrain chat "$out/model" --system "You are a patient gardener. Answer in one or two plain sentences." \
    --prompt "When should I water tomatoes?"
