#!/usr/bin/env bash
# Fresh clone -> RouteSAE, TopK and RandomK trained from one pass of the demo LM, evaluated, compared in a table and a picture.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
python train.py --model RouteSAE TopK RandomK --model_path assets/demo_lm --max_tokens 500000 --tag quickstart
results=("$OUTPUT_DIR"/eval/{RouteSAE,TopK,RandomK}_demo_quickstart.json)
saes=("$OUTPUT_DIR"/SAE_models/{RouteSAE,TopK,RandomK}_demo_quickstart.pt)
newer=0
for i in 0 1 2; do [ "${results[$i]}" -nt "${saes[$i]}" ] || newer=1; done
if [ $newer = 1 ]; then
  python evaluate.py --SAE_path "${saes[@]}" --metric all --max_tokens 50000
else
  echo "already evaluated: ${results[*]}"
fi
python -m src.plots "$OUTPUT_DIR/eval" "$OUTPUT_DIR/comparison.png"
echo "next: bash scripts/evaluate_compare.sh   (all eight models), or python train.py --help"
