#!/usr/bin/env bash
# Trains RouteSAE, TopK and RandomK from one pass of the demo LM, then evaluates and compares them.
# The latents of RouteSAE are read, labelled, steered and put on a page.
# A result that is newer than its inputs is not made again.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
python train.py --model RouteSAE TopK RandomK --model_path assets/demo_lm \
  --max_tokens 500000 --tag quickstart
name=RouteSAE_demo_quickstart
results=("$OUTPUT_DIR"/eval/{RouteSAE,TopK,RandomK}_demo_quickstart.json)
saes=("$OUTPUT_DIR"/SAE_models/{RouteSAE,TopK,RandomK}_demo_quickstart.pt)
contexts="$OUTPUT_DIR/contexts/${name}_contexts.json"
labels="$OUTPUT_DIR/interpret/interp_$name.json"
newer=0
for i in 0 1 2; do [ "${results[$i]}" -nt "${saes[$i]}" ] || newer=1; done
if [ $newer = 1 ]; then
  python evaluate.py --SAE_path "${saes[@]}" --metric all --max_tokens 50000
else
  echo "already evaluated: ${results[*]}"
fi
if [ "$contexts" -nt "${saes[0]}" ]; then
  echo "already applied: $contexts"
else
  python apply.py --SAE_path "${saes[0]}" --max_tokens 200000 --context_length 24
fi
python interpret.py "$contexts" --engine heuristic --score detection fuzzing --sample_latents 0
# Among the latents whose label passes both tests, pick the one that promotes the most whole words.
# It is held at three quarters of its largest strength. Above its maximum the text falls apart,
# because the latent is held on every token.
pick='
import json, re, sys

contexts = json.load(open(sys.argv[1]))["latent_context_map"]
labels = json.load(open(sys.argv[2]))


def accuracy(latent):
    tests = [labels[latent].get(test) or {} for test in ("detection", "fuzzing")]
    return min(test.get("balanced_accuracy") or 0 for test in tests)


def whole_words(latent):
    promoted = [word for word, _ in contexts[latent]["promoted"]]
    return sum(bool(re.fullmatch(r" [A-Za-z]{3,}", word)) for word in promoted)


labelled = [latent for latent in contexts if latent in labels]
good = [i for i in labelled if (labels[i]["score"] or 0) >= 3 and accuracy(i) >= 0.8]
best = max(
    good or labelled,
    key=lambda i: (whole_words(i), accuracy(i), contexts[i]["max_activation"]),
)
strength = round(0.75 * contexts[best]["max_activation"], 2)
promoted = ", ".join(word for word, _ in contexts[best]["promoted"][:5])
print(f"{best}={strength}", labels[best]["description"] + "; promotes", promoted)
'
picked="$(python -c "$pick" "$contexts" "$labels")"
held="${picked%% *}"
echo "steering with latent $picked"
python steer.py --SAE_path "${saes[0]}" --set "$held" \
  --prompt "Returns the number of" "If the file does not exist"
python -m src.plots "$OUTPUT_DIR/eval" "$OUTPUT_DIR/comparison.png" --only quickstart
python -m src.page "$contexts" "$OUTPUT_DIR/report.html" \
  --picture "$OUTPUT_DIR/comparison.png" --only quickstart
echo "Open the page above in a browser. To go on, run"
echo "  bash scripts/evaluate_compare.sh   (all models and controls)"
echo "  python train.py --help"
