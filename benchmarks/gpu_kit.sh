#!/usr/bin/env bash
# Collects what benchmarks/gpu.sh needs, for a machine with a GPU and without a network:
#   gpu_kit.sh DIR [PYTHON_VERSION]
# DIR/wheels gets gguf, accelerate and the other libraries with what they need beyond torch and
# transformers; DIR/parts gets SmolLM2 and the text, in parts of at most 48 MB. On the machine:
#   pip install --no-index --no-deps --target SITE DIR/wheels/*.whl; export PYTHONPATH=SITE
#   cat DIR/parts/* | tar -x         (writes the folder data)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
kit="${1:?give a folder}" python="${2:-3.12}"
mkdir -p "$kit/wheels" "$kit/parts"
bash scripts/download_model.sh smollm2
bash scripts/download_data.sh
tar -c data/model data/*.jsonl | split -b 48M - "$kit/parts/data.tar."
# The versions that pip would install together, without what such a machine has already.
names='
import json, sys
present = "torch transformers numpy triton tokenizers safetensors huggingface datasets pandas pyarrow"
for package in json.load(sys.stdin)["install"]:
    name, version = package["metadata"]["name"], package["metadata"]["version"]
    if not any(word in name.lower() for word in [*present.split(), "nvidia", "cuda"]):
        print(f"{name}=={version}")
'
packages=(-r requirements-gguf.txt -r benchmarks/requirements-saelens.txt)
packages+=(-r benchmarks/requirements-sparsify.txt)
pip install --quiet --dry-run --ignore-installed --report - "${packages[@]}" |
  python -c "$names" > "$kit/wheels.txt"
platforms=()
for glibc in 39 35 34 31 28 27 24 17; do
  platforms+=(--platform "manylinux_2_${glibc}_x86_64")
done
# Pure Python packages without a wheel are built here.
while read -r package; do
  pip download --quiet --no-deps --only-binary=:all: --python-version "$python" \
    --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 \
    -d "$kit/wheels" "$package" 2>/dev/null ||
    pip wheel --quiet --no-deps -w "$kit/wheels" "$package"
done <"$kit/wheels.txt"
du -sh "$kit/wheels" "$kit/parts"
