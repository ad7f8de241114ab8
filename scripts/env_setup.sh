# Your shell may source this file. It sets variables that are unset, overwrites none, and leaves
# no shell option on.
_root="$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)"
export PROJECT_ROOT="${PROJECT_ROOT:-$_root}"
export DATA_DIR="${DATA_DIR:-$_root/data}"
export OUTPUT_DIR="${OUTPUT_DIR:-$_root/outputs}"
export HF_HOME="${HF_HOME:-${HOME:-$_root}/.cache/huggingface}"
if [ -z "${MODEL_PATH:-}" ] && [ -f "$DATA_DIR/model/config.json" ]; then
  export MODEL_PATH="$DATA_DIR/model"
fi
if [ -z "${DATA_PATH:-}" ] && [ -f "$DATA_DIR/train.jsonl" ]; then
  export DATA_PATH="$DATA_DIR"
fi
if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$_root/.venv/bin/activate" ]; then
  . "$_root/.venv/bin/activate"
fi
unset _root
