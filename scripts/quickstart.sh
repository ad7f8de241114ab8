#!/usr/bin/env bash
# Trains SAEs from one pass of a language model, then evaluates and compares them. The latents of
# RouteSAE are read, labelled, steered and put on a page.
#   quickstart.sh            the built-in demo model: about two minutes after the installation
#   quickstart.sh smollm2    SmolLM2-135M and real text, without a model hub: about 15 minutes
# A result that is newer than its inputs is not made again.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
case "${1:-demo}" in
  demo)
    tag=quickstart
    lm=(--model_path assets/demo_lm)
    train=(--model RouteSAE TopK RandomK --max_tokens 500000)
    evaluate=(--metric all --max_tokens 50000)
    apply=(--max_tokens 200000 --context_length 24)
    # Three quarters of its largest strength: above it the text falls apart, because the latent is
    # held on every token.
    steer=("" 0.75)
    prompts=("Returns the number of" "If the file does not exist")
    ;;
  smollm2)
    tag=smollm2
    export DATA_DIR="${DATA_DIR:-data}"
    bash scripts/download_model.sh smollm2
    bash scripts/download_data.sh
    lm=(--model_path "$DATA_DIR/model" --data_path "$DATA_DIR")
    train=(--model RouteSAE TopK Crosscoder --sites 7 10 13 16 19 22 --layer 7 14 22 --k 32
      --target_l0 32 --latent_size 4096 --batch_size 16 --max_length 256 --max_tokens 300000)
    # Without Recovered, which needs two more runs of the language model a site.
    evaluate=(--metric NormMSE KLDiv DeltaCE Routing --max_tokens 20000)
    apply=(--max_tokens 200000 --context_length 24)
    steer=("first person" 1)
    prompts=("The people of this country" "In the morning the old man")
    ;;
  *)
    echo "quickstart.sh: unknown model $1; known are demo and smollm2" >&2
    exit 2
    ;;
esac
python train.py "${lm[@]}" "${train[@]}" --tag "$tag"
saes=("$OUTPUT_DIR"/SAE_models/*_"$tag".pt)
sae=("$OUTPUT_DIR"/SAE_models/RouteSAE_*_"$tag".pt)
name="$(basename "${sae[0]}" .pt)"
contexts="$OUTPUT_DIR/contexts/${name}_contexts.json"
labels="$OUTPUT_DIR/interpret/interp_$name.json"
newer=0
for file in "${saes[@]}"; do
  [ "$OUTPUT_DIR/eval/$(basename "$file" .pt).json" -nt "$file" ] || newer=1
done
if [ $newer = 1 ]; then
  python evaluate.py --SAE_path "${saes[@]}" "${evaluate[@]}"
else
  echo "already evaluated: $OUTPUT_DIR/eval/*_$tag.json"
fi
if [ "$contexts" -nt "${sae[0]}" ] || [ "$contexts.gz" -nt "${sae[0]}" ]; then
  echo "already applied: $contexts"
else
  python apply.py --SAE_path "${sae[0]}" "${apply[@]}"
fi
[ -f "$contexts" ] || contexts="$contexts.gz"
python interpret.py "$contexts" --engine heuristic --score detection fuzzing --sample_latents 0
# The latent to steer with. With a word class, it is the one whose contexts are most of that class;
# else, among those whose label passes both tests, the one that promotes the most whole words.
pick='
import gzip, json, re, sys

from src import names
from src.rule_labels import MEMBERS

opened = gzip.open if sys.argv[1].endswith(".gz") else open
contexts = json.load(opened(sys.argv[1], "rt"))["latent_context_map"]
labels = json.load(open(sys.argv[2]))
word_class, share_of_maximum = sys.argv[3], float(sys.argv[4])


def accuracy(latent):
    tests = [labels[latent].get(test) or {} for test in ("detection", "fuzzing")]
    return min(test.get("balanced_accuracy") or 0 for test in tests)


def whole_words(latent):
    promoted = [word for word, _ in contexts[latent]["promoted"]]
    return sum(bool(re.fullmatch(r" [A-Za-z]{3,}", word)) for word in promoted)


def share_in_class(latent):
    entry = contexts[latent]
    pairs = list(zip(entry["token_class"], entry["activations"]))
    return sum(a for word, a in pairs if word in MEMBERS[word_class]) / sum(a for _, a in pairs)


labelled = [latent for latent in contexts if latent in labels]
good = [i for i in labelled if (labels[i]["score"] or 0) >= 3 and accuracy(i) >= 0.8]
if word_class:
    often = [i for i in labelled if len(contexts[i]["activations"]) >= 8]
    best = max(often or labelled, key=share_in_class)
else:
    best = max(
        good or labelled,
        key=lambda i: (whole_words(i), accuracy(i), contexts[i]["max_activation"]),
    )
strength = round(share_of_maximum * contexts[best]["max_activation"], 2)
promoted = ", ".join(word for word, _ in contexts[best]["promoted"][:5])
print(f"{best}={strength}", names.shortened(labels[best]["description"]) + "; promotes", promoted)
'
picked="$(python -c "$pick" "$contexts" "$labels" "${steer[@]}")"
held="${picked%% *}"
echo "steering with latent $picked"
python steer.py --SAE_path "${sae[0]}" --set "$held" --prompt "${prompts[@]}"
python -m src.plots "$OUTPUT_DIR/eval" "$OUTPUT_DIR/comparison.png" --only "$tag"
python -m src.page "$contexts" "$OUTPUT_DIR/report.html" \
  --picture "$OUTPUT_DIR/comparison.png" --only "$tag"
echo "Open the page above in a browser. To go on, run"
echo "  bash scripts/explore.sh --SAE_path ${sae[0]}   (a text of your own)"
echo "  bash scripts/evaluate_compare.sh${1:+ $1}   (all models and controls)"
echo "  python train.py --help"
