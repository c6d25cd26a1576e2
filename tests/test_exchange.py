"""ΔW as a LoRA in PEFT's form, out and in, and added to the weights: held against PEFT and transformers themselves."""

import json
import shutil

import pytest
import torch
from family_models import MODELS, pairs
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_weights import add_tokenizer
from tiny import prompt, tiny
from transformers import AutoModelForCausalLM

import fastweights as fw

FILE = "adapter_model.safetensors"
TEXT, QUESTION = prompt(2, 9, vocabulary=131), prompt(1, 7, seed=2, vocabulary=131)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder of transformers for each family, made once."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("checkpoint")
            pairs(family)[1].save_pretrained(made[family])
            add_tokenizer(made[family])
        return made[family]

    return folder


def opened(folder, rule=None, layers=(1, 2), dtype=None, **options):
    model, _ = fw.load(folder, dtype)
    return model, fw.attach(model, layers, rule or fw.Hebbian(rate=0.05, decay=0.02), **options)


def of_peft(folder, adapter, dtype=torch.float32):
    """Logits of the question as transformers and PEFT compute them."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return PeftModel.from_pretrained(base, adapter)(QUESTION).logits


def frozen(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(QUESTION).logits


def check_close(found, wanted, without):
    """Equal to 1e-4 of the largest logit, where the fast weights move the logits by a hundred times that."""
    size = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) < 1e-4 * size
    assert float((without - wanted).abs().max()) > 1e-2 * size


# ---- out


@pytest.mark.parametrize("family", MODELS)
def test_peft_gives_the_logits_of_the_plastic_model(family, checkpoints, tmp_path):
    folder = checkpoints(family)
    model, fast = opened(folder)
    episode = fw.Episode(model, 2)
    episode.feed(TEXT)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert set(fast.export_peft(tmp_path / "out", row=1).values()) == {(0.0, 0.0)}
    wanted = episode.fork(rows=[1]).probe(QUESTION).logits
    check_close(of_peft(folder, tmp_path / "out"), wanted, frozen(folder))
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (family == "gpt2")
    ranks = {len(tensor) for key, tensor in load_file(tmp_path / "out" / FILE).items() if "lora_A" in key}
    assert ranks == {config["r"]} == {9}


def test_a_moment_is_exported_as_it_was_and_peft_agrees(checkpoints, tmp_path):
    folder = checkpoints("llama")
    model, fast = opened(folder)
    episode = fw.Episode(model)
    episode.feed(TEXT[:1])
    for n, moment in enumerate((4, fw.Moment(without=[2, 9]), fw.Moment(layers=[2]))):
        fast.export_peft(tmp_path / str(n), episode, moment=moment)
        wanted = episode.probe(QUESTION, at=moment).logits[0]
        check_close(of_peft(folder, tmp_path / str(n)), wanted, frozen(folder))


def test_every_linear_has_its_own_rank_and_none_is_zeros(checkpoints, tmp_path):
    folder = checkpoints("llama")
    model, _ = fw.load(folder)
    fw.attach(model, 0, fw.Hebbian(rate=0.05), ["gate_proj"], rank=2, overflow="evict")
    fast = fw.attach(model, [1, 2], fw.Hebbian(rate=0.05), ["down_proj", "up_proj"], rank=3, overflow="compress")
    episode = fw.Episode(model)
    fast.export_peft(tmp_path / "none")
    torch.testing.assert_close(of_peft(folder, tmp_path / "none"), frozen(folder), rtol=0, atol=0)
    episode.feed(TEXT[:1])
    fast.export_peft(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (9, {r"model\.layers\.0\.mlp\.gate_proj": 2})
    check_close(of_peft(folder, tmp_path / "out"), episode.probe(QUESTION).logits, frozen(folder))


def test_a_fast_bias_is_a_lora_bias(checkpoints, tmp_path):
    folder = checkpoints("llama")
    model, fast = opened(folder, fw.Hebbian(rate=0.05, bias=True, decay=0.02))
    episode = fw.Episode(model)
    episode.feed(TEXT[:1])
    fast.export_peft(tmp_path / "out")
    wanted = episode.probe(QUESTION).logits
    with pytest.warns(UserWarning, match="has no bias"):
        check_close(of_peft(folder, tmp_path / "out"), wanted, frozen(folder))
    fast.import_peft(tmp_path / "out")
    torch.testing.assert_close(fw.Episode(model).probe(QUESTION).logits, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.gate_proj has a fast bias, and a Llama has no bias"):
        fast.merge(episode)


def test_a_smaller_rank_keeps_its_certificate_and_a_long_life_no_more_than_a_matrix(tmp_path):
    model = tiny(torch.float32)
    fast = fw.attach(model, 1, fw.Hebbian(rate=0.05), overflow="grow")
    episode = fw.Episode(model)
    episode.feed(prompt(1, 60))
    for rank, kept in ((5, 5), (None, 24)):
        errors = fast.export_peft(tmp_path / "out", rank=rank)
        tensors = load_file(tmp_path / "out" / FILE)
        for (layer, linear), (error_2, error_F) in errors.items():
            name = f"base_model.model.model.layers.{layer}.mlp.{linear}"
            A, B = (tensors[f"{name}.lora_{half}.weight"].double() for half in "AB")
            log = episode.logs[layer, linear]
            lost = B @ A - log.delta_weight(0, torch.float64)
            assert len(A) == kept
            assert 0 < float(torch.linalg.matrix_norm(lost, 2)) <= error_2 <= error_F
            assert float(lost.norm()) <= error_F < (0.9 if rank else 1e-5) * log.delta_norm(0)


def test_an_export_is_whole_or_not_at_all(monkeypatch, tmp_path):
    model = tiny(torch.float32)
    fast = fw.attach(model, 1, fw.Hebbian(rate=0.05))
    episode = fw.Episode(model)
    episode.feed(prompt(1, 3))
    fast.export_peft(tmp_path / "out")
    first = (tmp_path / "out" / FILE).read_bytes()
    episode.feed(prompt(1, 3))
    with monkeypatch.context() as broken:
        broken.setattr("fastweights.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            fast.export_peft(tmp_path / "out")
    assert (tmp_path / "out" / FILE).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    fast.export_peft(tmp_path / "out")
    assert (tmp_path / "out" / FILE).read_bytes() != first
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"out holds thesis.tex, expected a new folder, or an adapter to replace"):
        fast.export_peft(tmp_path / "out")


def test_what_cannot_be_exported_is_refused_and_writes_nothing(tmp_path):
    model = tiny(torch.float32)
    fast = fw.attach(model, 1, fw.Hebbian(rate=0.05))
    episode = fw.Episode(model)
    episode.feed(prompt(1, 3))
    for options, said in (
        ({"row": 1}, r"export_peft\(row=1\): there are rows 0 to 0"),
        ({"moment": 4}, r"export_peft\(moment=...\) names event 4, but this episode has events 0 to 3"),
        ({"moment": "every"}, r"export_peft\(moment=...\) is 'every', expected an event number"),
        ({"rank": 0}, r"export_peft\(rank=0\): expected a whole number, 1 or more"),
        ({"episode": fw.Episode(tiny())}, "that episode is of another model"),
    ):
        with pytest.raises(ValueError, match=said):
            fast.export_peft(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# ---- added to the weights


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_merged_model_that_is_saved_gives_the_logits_in_transformers(family, checkpoints, tmp_path):
    model, fast = opened(checkpoints(family))
    episode = fw.Episode(model)
    episode.feed(TEXT[:1])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fw.save(model, tmp_path, state=fast.merge())
    wanted = episode.probe(QUESTION).logits
    check_close(frozen(tmp_path), wanted, frozen(checkpoints(family)))
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


def test_merging_rounds_once(checkpoints):
    model, fast = opened(checkpoints("llama"), dtype="bfloat16")
    episode = fw.Episode(model)
    episode.feed(TEXT[:1])
    merged, delta = fast.merge(moment=5), episode.logs[1, "up_proj"]
    w_R = fw.Moment(5).slot_weights(delta, (1, "up_proj"), 0).double()
    exact = (delta.U_BRO[0, :9].double().T * w_R) @ delta.K_BRI[0, :9].double()
    weight = model.state_dict()["model.layers.1.mlp.up_proj.weight"]
    found = merged["model.layers.1.mlp.up_proj.weight"]
    assert found.dtype == torch.bfloat16
    apart = (found.double() - (weight.double() + exact)).abs()
    assert bool((apart <= 2**-8 * (weight.double() + exact).abs() + 1e-6).all())
    assert merged["lm_head.weight"].data_ptr() == model.lm_head.weight.data_ptr()


# ---- in


def lora(folder, adapter, targets, **options):
    """An adapter that PEFT saved, with halves that are not zero; and PEFT's own logits with it."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, **options}, target_modules=targets)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    model.save_pretrained(adapter)
    with torch.no_grad():
        return model(QUESTION).logits


@pytest.mark.parametrize(
    ("family", "targets", "options"),
    [
        ("llama", ["gate_proj", "down_proj"], {"layers_to_transform": [1, 2]}),
        ("llama", r".*\.[12]\.mlp\.up_proj", {"use_rslora": True}),
        ("llama", ["up_proj"], {"rank_pattern": {"1.mlp.up_proj": 2}, "alpha_pattern": {"0.mlp.up_proj": 20}}),
        ("gpt2", ["c_fc"], {"fan_in_fan_out": True}),
        ("gemma3", ["gate_proj", "up_proj"], {}),
    ],
)
def test_an_adapter_of_peft_is_what_episodes_begin_with(family, targets, options, checkpoints, tmp_path):
    folder = checkpoints(family)
    wanted = lora(folder, tmp_path, targets, **options)
    model, fast = opened(folder, layers=[0, 1, 2])
    old = fw.Episode(model)
    fast.import_peft(tmp_path)
    episode = fw.Episode(model, 2)
    check_close(episode.probe(QUESTION).logits[:1], wanted, frozen(folder))
    steps = fw.Episode(model)
    one_by_one = torch.cat([steps.feed(ids, update="none") for ids in QUESTION.split(1, 1)], 1)
    assert steps.path == "cpu"
    check_close(one_by_one, wanted, frozen(folder))
    untouched = old.probe(QUESTION).logits.expand(2, -1, -1)
    torch.testing.assert_close(episode.probe(QUESTION, at=0).logits[0], untouched, rtol=1e-5, atol=1e-5)
    assert {count for counts in episode.event_counts.values() for count in counts} == {4}
    assert old.events == 0


def test_an_adapter_decays_is_never_undone_and_stands_again_after_reset(checkpoints, tmp_path):
    lora(checkpoints("llama"), tmp_path, ["up_proj"], layers_to_transform=[1])
    model, fast = opened(checkpoints("llama"), archive=True)
    fast.import_peft(tmp_path)
    episode = fw.Episode(model, 2)
    first = fast.delta_weight(1, "up_proj", row=1)
    tensors = load_file(tmp_path / FILE)
    A, B = (tensors[f"base_model.model.model.layers.1.mlp.up_proj.lora_{half}.weight"] for half in "AB")
    torch.testing.assert_close(first, 1.5 * B @ A, rtol=1e-5, atol=1e-6)
    assert not fast.delta_weight(1, "gate_proj").any()
    episode.feed(TEXT[:, :3])
    assert episode.events == 7
    alone = episode.logs[1, "up_proj"]
    written = (alone.U_BRO[1, 4:7].T * 0.98 ** torch.tensor([2, 1, 0])) @ alone.K_BRI[1, 4:7]
    torch.testing.assert_close(fast.delta_weight(1, "up_proj", row=1) - written, 0.98**3 * first, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"undo\(4\).* 7 events in row 0, of which it began with 4 \(import_peft\)"):
        episode.undo(4)
    episode.undo(3)
    assert torch.equal(fast.delta_weight(1, "up_proj", row=1), first)
    episode.feed(TEXT)
    fork = episode.fork(rows=[1, 0, 1])
    fork.reset()
    assert fork.events == 4
    assert torch.equal(fast.delta_weight(1, "up_proj", row=2, episode=fork), first)
    fork.feed(TEXT[:, :3].repeat_interleave(2, 0)[1:])
    fork.undo(3)
    assert fork.events == 4


def test_a_saved_life_remembers_what_it_began_with(checkpoints, tmp_path):
    lora(checkpoints("llama"), tmp_path / "one", ["up_proj"], layers_to_transform=[1])
    model, fast = opened(checkpoints("llama"))
    fast.import_peft(tmp_path / "one")
    episode = fw.Episode(model)
    episode.feed(TEXT[:1])
    episode.save(tmp_path / "life")
    again = fw.Episode.load(model, tmp_path / "life")
    assert torch.equal(again.probe(QUESTION).logits, episode.probe(QUESTION).logits)
    with pytest.raises(ValueError, match="of which it began with 4"):
        again.undo(10)
    fw.detach(model)
    fw.attach(model, [1, 2], fw.Hebbian(rate=0.05, decay=0.02))
    with pytest.raises(
        ValueError, match=r"the saved log began with adapter [0-9a-f]{16}, but a new one begins with None"
    ):
        fw.Episode.load(model, tmp_path / "life")


def test_overflow_folds_an_adapter_and_certifies_it(tmp_path):
    model = tiny(torch.float32)
    fast = fw.attach(model, 1, fw.Hebbian(rate=0.05, decay=0.01), overflow="grow")
    episode = fw.Episode(model)
    episode.feed(prompt(1, 20))
    fast.export_peft(tmp_path / "out")
    exact = {linear: fast.delta_weight(1, linear) for linear in ("gate_proj", "down_proj")}
    fw.detach(model)
    fast = fw.attach(model, 1, fw.Hebbian(rate=0.05, decay=0.01), rank=8)
    fast.import_peft(tmp_path / "out")
    episode = fw.Episode(model)
    for linear, delta in exact.items():
        error_2, error_F = fast.error(1, linear, episode=episode)
        apart = float((fast.delta_weight(1, linear, episode=episode) - delta).norm())
        assert 1e-3 < apart <= error_F + 1e-5
        assert error_2 <= error_F < float(delta.norm())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A small adapter as we write it, of one linear of `tiny`."""
    model = tiny(torch.float32)
    fast = fw.attach(model, 1, fw.Hebbian(rate=0.05), "up_proj")
    episode = fw.Episode(model)
    episode.feed(prompt(1, 4))
    folder = tmp_path_factory.mktemp("adapter")
    fast.export_peft(folder, episode)
    return folder


KEY = "base_model.model.model.layers.1.mlp.up_proj"
Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("settings", "change", "options", "said"),
    [
        ({"peft_type": "IA3"}, {}, {}, "peft_type is 'IA3', expected 'LORA'"),
        ({"use_dora": True}, {}, {}, "use_dora is True, which fast weights cannot represent"),
        ({"modules_to_save": ["lm_head"]}, {}, {}, r"modules_to_save is \['lm_head'\], which fast weights cannot"),
        ({"trainable_token_indices": [3]}, {}, {}, r"trainable_token_indices is \[3\]"),
        ({"brand_new": 1}, {}, {}, "brand_new is 1, which fast weights cannot represent"),
        ({"bias": "all"}, {}, {}, "bias is 'all', which changes the model's own biases"),
        (
            {"init_lora_weights": "pissa"},
            {},
            {},
            "init_lora_weights is 'pissa', whose adapter belongs to changed weights",
        ),
        ({"fan_in_fan_out": True}, {}, {}, "fan_in_fan_out is True, but this model's checkpoint wants False"),
        ({"r": "4"}, {}, {}, "r holds '4', expected a whole number"),
        ({"r": 3}, {}, {}, r"up_proj.lora_A.weight has shape \[4, 24\], expected \[3, 24\]"),
        (
            {"layers_to_transform": [2], "target_modules": ["up_proj"]},
            {},
            {},
            "which adapter_config.json does not target",
        ),
        ({"lora_bias": True}, {}, {}, "lora_bias is True, unlike what adapter_model.safetensors holds"),
        (
            {"lora_bias": True},
            {f"{KEY}.lora_B.bias": torch.ones(52)},
            {},
            "has a lora_bias, but the rule of .* no fast bias",
        ),
        ({}, {f"{KEY}.lora_A.weight": torch.ones(4, 25)}, {}, r"has shape \[4, 25\], expected \[4, 24\]"),
        ({}, {f"{KEY}.lora_A.weight": None}, {}, "lora_A.weight is missing"),
        ({}, {f"{KEY}.lora_A.weight": torch.full((4, 24), torch.nan)}, {}, "holds numbers that are not finite"),
        ({}, {f"{KEY}.lora_A.weight": torch.ones(4, 24, dtype=torch.int8)}, {}, "is stored as torch.int8"),
        (
            {},
            {f"{Q}.lora_A.weight": torch.ones(4, 24)},
            {},
            "changes model.layers.1.self_attn.q_proj, but plastic here are",
        ),
        ({}, {f"{KEY}.lora_magnitude_vector": torch.ones(52)}, {}, "lora_magnitude_vector is no half of a LoRA"),
        ({}, {"base_model.model.lm_head.weight": torch.ones(2)}, {}, "lm_head.weight is no half of a LoRA"),
        (
            {},
            {},
            {"layers": 2},
            "changes model.layers.1.mlp.up_proj, but plastic here are model.layers.2.mlp.gate_proj",
        ),
        (
            {},
            {},
            {"rank": 3, "overflow": "error"},
            r"would begin with 4 events, over its rank of 3 \(overflow='error'\)",
        ),
        (
            {},
            {},
            {"rank": 3, "overflow": "evict"},
            r"would begin with 4 events, over its rank of 3 \(overflow='evict'\)",
        ),
        ({}, {}, {"budget": 0.5}, "has a budget, which is kept event by event"),
        ({}, {}, {"rule": fw.Hebbian(rate=0.1, decay=1.0)}, "a decay of 1.0 leaves nothing"),
    ],
)
def test_what_fast_weights_cannot_represent_is_refused_and_nothing_changes(
    settings, change, options, said, adapter, tmp_path
):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | settings))
    tensors = load_file(tmp_path / FILE) | change
    save_file({k: t for k, t in tensors.items() if t is not None}, tmp_path / FILE)
    model = tiny(torch.float32)
    fast = fw.attach(model, **{"layers": 1, "rule": fw.Hebbian(rate=0.1), **options})
    with pytest.raises(ValueError, match=said):
        fast.import_peft(tmp_path)
    assert fw.Episode(model).events == 0


def test_missing_damaged_and_pickled_adapters_are_refused(adapter, tmp_path):
    fast = fw.attach(tiny(torch.float32), 1, fw.Hebbian(rate=0.1))
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json does not exist, expected a folder that PEFT"):
        fast.import_peft(tmp_path)
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is not a whole safetensors file"):
        fast.import_peft(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors does not exist"):
        fast.import_peft(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle, which can run any code when it is read"):
        fast.import_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        fast.import_peft(tmp_path)
