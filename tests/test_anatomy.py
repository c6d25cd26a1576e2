"""Anatomy: every number against the model that is really there, and no weight is touched for it."""

import shutil

import pytest
import torch
from test_gguf import GPT2, hf_model, write
from tiny import tiny

import fastweights as fw

SHAPES = [
    {},
    {"tie_word_embeddings": True, "num_key_value_heads": 1},
    {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    {"head_dim": 10, "num_hidden_layers": 1},
]


def counted(model, *words):
    """Numbers in the parameters whose names hold one of these words, tied ones once."""
    return sum(p.numel() for name, p in model.named_parameters() if any(word in name for word in words))


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_numbers_are_the_real_models(changes, dtype, tmp_path):
    model = tiny(dtype, **changes)
    fw.save(model, tmp_path)
    found = fw.anatomy(model)
    assert fw.anatomy(tmp_path) == fw.anatomy(str(tmp_path)) == found
    assert found.parameters == {
        "embedding": counted(model, "embed_tokens"),
        "attention": counted(model, "self_attn"),
        "mlp": counted(model, "mlp."),
        "norm": counted(model, "norm"),
        "unembedding": counted(model, "lm_head"),
        "total": sum(p.numel() for p in model.parameters()),
    }
    assert sum(found.parameters.values()) == 2 * found.parameters["total"]
    assert found.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    cache = model.new_cache(1, 10)
    buffers = [*cache.keys, *cache.values]
    assert found.kv_bytes_per_token == sum(buffer[:, :, 0].nbytes for buffer in buffers)
    config = model.config
    assert (found.layers, found.heads, found.kv_heads) == (
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    assert found.queries_per_kv * found.kv_heads == found.heads
    assert (found.head_dim, found.dtype) == (config.head_dim, str(dtype)[6:])
    assert found.tied == bool(changes.get("tie_word_embeddings"))
    assert (found.parameters["unembedding"] == 0) == found.tied


def test_a_folder_without_its_weights_is_enough_and_a_plastic_model_counts_its_frozen_weights(tmp_path):
    model = tiny()
    fw.save(model, tmp_path / "whole")
    (tmp_path / "config").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "config")
    found = fw.anatomy(tmp_path / "config")
    fw.attach(model, [1], fw.Hebbian())
    assert fw.anatomy(model) == found


def test_a_gguf_files_head_is_enough(tmp_path):
    path = write(tmp_path / "model.gguf", hf_model(), quantization="Q8_0", **GPT2)
    model, _ = fw.load(path)
    assert fw.anatomy(path) == fw.anatomy(model)
    assert fw.anatomy(path).dtype == "float32"  # what a .gguf file is dequantised to


def test_of_a_hub_name_the_configuration_alone_is_fetched(tmp_path, monkeypatch):
    fw.save(tiny(), tmp_path)
    asked = {}

    def snapshot_download(repo, **arguments):
        asked.update(arguments, repo=repo)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert fw.anatomy("org/name") == fw.anatomy(tmp_path)
    assert (asked["repo"], asked["allow_patterns"]) == ("org/name", ["config.json", "generation_config.json"])


def test_the_default_models_anatomy(smollm2):
    found = fw.anatomy()
    assert found == fw.anatomy(smollm2[0])
    assert (found.layers, found.heads, found.kv_heads, found.queries_per_kv, found.head_dim) == (30, 9, 3, 3, 64)
    assert found.parameters["total"] == 134_515_008
    assert found.kv_bytes_per_token == 2 * 30 * 3 * 64 * 4


def test_it_prints_a_table():
    lines = str(fw.anatomy(tiny(tie_word_embeddings=True))).splitlines()
    assert [line.split()[0] for line in lines] == [
        *("layers", "width", "heads", "KV", "embedding", "attention", "mlp", "norm", "unembedding", "total", "bytes"),
    ]
    assert lines[2] == "heads        4 of width 6, key/value heads 2, 2 query heads to a key/value head"
    assert lines[8] == "unembedding                0    0.0%  (tied: the embedding)"


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="of type int: expected a model, a folder"):
        fw.anatomy(3)
    with pytest.raises(FileNotFoundError, match=r"expected a Llama's config\.json there"):
        fw.anatomy(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist as a folder"):
        fw.anatomy("/no/such/folder")
