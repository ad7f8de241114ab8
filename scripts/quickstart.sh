#!/usr/bin/env bash
# Fresh clone -> RouteSAE, TopK and RandomK trained from one pass of the demo LM, evaluated and compared; RouteSAE's latents read, labelled,
# steered and put on a page. What is there already and newer than what it was made from is not made again.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
python train.py --model RouteSAE TopK RandomK --model_path assets/demo_lm --max_tokens 500000 --tag quickstart
name=RouteSAE_demo_quickstart
results=("$OUTPUT_DIR"/eval/{RouteSAE,TopK,RandomK}_demo_quickstart.json)
saes=("$OUTPUT_DIR"/SAE_models/{RouteSAE,TopK,RandomK}_demo_quickstart.pt)
contexts="$OUTPUT_DIR/contexts/${name}_contexts.json" labels="$OUTPUT_DIR/interpret/interp_$name.json"
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
# of the latents whose label stands both tests, the one that promotes the most whole words, held at three quarters of its largest strength:
# above its maximum, on every token, the text falls apart
pick='import json,re,sys; c=json.load(open(sys.argv[1]))["latent_context_map"]; r=json.load(open(sys.argv[2]))
passed=lambda i: min((r[i].get(t) or {}).get("balanced_accuracy") or 0 for t in ("detection", "fuzzing"))
words=lambda i: sum(bool(re.fullmatch(r" [A-Za-z]{3,}", word)) for word, _ in c[i]["promoted"])
good=[i for i in c if i in r and (r[i]["score"] or 0) >= 3 and passed(i) >= 0.8] or list(set(c) & set(r))
best=max(good, key=lambda i: (words(i), passed(i), c[i]["max_activation"]))
strength=round(0.75 * c[best]["max_activation"], 2)
print(f"{best}={strength}", r[best]["description"] + "; promotes", ", ".join(word for word, _ in c[best]["promoted"][:5]))'
picked="$(python -c "$pick" "$contexts" "$labels")"
held="${picked%% *}"
echo "steering with latent $picked"
python steer.py --SAE_path "${saes[0]}" --set "$held" --prompt "Returns the number of" "If the file does not exist"
python -m src.plots "$OUTPUT_DIR/eval" "$OUTPUT_DIR/comparison.png" --only quickstart
python -m src.page "$contexts" "$OUTPUT_DIR/report.html" --picture "$OUTPUT_DIR/comparison.png" --only quickstart
echo "open the page above in a browser; next: bash scripts/evaluate_compare.sh   (all models and controls), or python train.py --help"
