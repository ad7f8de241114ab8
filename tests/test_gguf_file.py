"""A GGUF file made here is converted once and used as any model; unusable ones end in one line."""

import json
import shutil

import numpy as np
import pytest
import torch

from src import gguf_file, lm
from src.config import parse
from src.trainer import Trainer

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

HIDDEN, LAYERS, HEADS, FFN = 32, 4, 2, 64
LETTERS = [chr(code) for code in range(97, 123)]
TOKENS = ["<s>", "</s>", "\u0120", *LETTERS, "th", "the", "\u0120the"]
MERGES = ["t h", "th e", "\u0120 the"]


def write_gguf(path, architecture="llama"):
    """A random Llama of four blocks with a small byte-pair tokenizer."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    draw = np.random.default_rng(0)

    def add(name, *shape):
        tensor = draw.normal(0, 0.05, shape) if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(name, tensor.astype(np.float32))

    add("token_embd.weight", len(TOKENS), HIDDEN)
    add("output_norm.weight", HIDDEN)
    add("output.weight", len(TOKENS), HIDDEN)
    for block in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{block}.{name}.weight", HIDDEN, HIDDEN)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{block}.{name}.weight", FFN, HIDDEN)
        add(f"blk.{block}.ffn_down.weight", HIDDEN, FFN)
        add(f"blk.{block}.attn_norm.weight", HIDDEN)
        add(f"blk.{block}.ffn_norm.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    return path


def test_a_gguf_file_is_converted_once_and_has_its_weights(model_file, capsys):
    folder = gguf_file.as_folder(model_file)
    shutil.rmtree(folder)
    killed = folder.with_name(f".tmp-{folder.name}-{2**22 + 1}")  # of a process that is no more
    killed.mkdir()
    capsys.readouterr()
    tokenizer, model = lm.get_language_model(str(model_file), "cpu", "float32")
    assert len(lm.blocks(model)) == LAYERS and lm.text_config(model).hidden_size == HIDDEN
    assert tokenizer.decode(tokenizer.encode("the the", add_special_tokens=False)) == "the the"
    reader = gguf.GGUFReader(str(model_file))
    written = {tensor.name: tensor.data for tensor in reader.tensors}
    embedding = torch.from_numpy(np.array(written["token_embd.weight"])).view(len(TOKENS), HIDDEN)
    assert torch.equal(model.get_input_embeddings().weight, embedding.bfloat16().float())
    assert "converting" in capsys.readouterr().out
    assert not killed.exists()
    lm.get_language_model(str(model_file), "cpu", "float32")
    assert "converting" not in capsys.readouterr().out


def test_an_sae_is_trained_on_a_gguf_file(model_file, tmp_path):
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": "the quick brown fox jumps the lazy dog " * 5})] * 3
    text.write_text("\n".join(lines))
    arguments = ["--model_path", str(model_file), "--data_path", str(text), "--split", "all"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--model", "RouteSAE", "--k", "4"]
    arguments += ["--latent_size", "32", "--max_length", "16", "--batch_size", "4"]
    assert Trainer(parse("train", arguments)).run() < 10
    recipe = json.loads((tmp_path / "out" / "SAE_models" / "RouteSAE_text.json").read_text())
    assert recipe["model_path"] == str(model_file) and recipe["sites"] == [1, 2, 3]


def test_unusable_files_end_in_one_line(tmp_path, monkeypatch):
    no_gguf = tmp_path / "text.gguf"
    no_gguf.write_text("no model")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        lm.get_language_model(str(no_gguf), "cpu")
    unknown = tmp_path / "unknown.gguf"
    write_gguf(unknown, architecture="nothing_known")
    with pytest.raises(ValueError, match=r"cannot read .*unknown.gguf .*nothing_known"):
        lm.get_language_model(str(unknown), "cpu")
    assert not list((tmp_path / "data_dir").rglob("config.json"))
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    write_gguf(tmp_path / "good.gguf")
    with pytest.raises(ValueError, match="pip install gguf accelerate"):
        lm.get_language_model(str(tmp_path / "good.gguf"), "cpu")
