"""Sparse autoencoders: every format against a loop in float64, edits that keep the error term, and what is refused."""

import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastweights as fw

D, N, K = 7, 13, 3
METADATA = {
    "sae_lens_version": "6.21.0",
    "hook_name": "blocks.5.hook_resid_post",
    "model_name": "meta-llama/Llama-3.2-1B",
    "model_from_pretrained_kwargs": {"center_writing_weights": False},
}
NEW = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": N,
    "dtype": "float32",
    "device": "cuda",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": METADATA,
}
OLD = {
    "model_name": "gpt2-small",
    "hook_point": "blocks.2.hook_resid_pre",
    "hook_point_layer": 2,
    "hook_point_head_index": None,
    "d_in": D,
    "d_sae": N,
    "expansion_factor": 4,
    "l1_coefficient": 8e-05,
    "mse_loss_normalization": None,
    "noise_scale": 0.0,
    "use_ghost_grads": False,
    "n_batches_in_buffer": 128,
    "dtype": "torch.float32",
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "normalize_activations": False,
    "model_from_pretrained_kwargs": {"center_writing_weights": False},
}


def weights(architecture="standard", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {"W_enc": draw(D, N), "W_dec": draw(N, D), "b_dec": draw(D)}
    if architecture == "gated":
        return tensors | {"b_gate": draw(N), "b_mag": draw(N), "r_mag": 0.3 * draw(N)}
    tensors["b_enc"] = draw(N)
    return tensors | ({"threshold": draw(N).abs()} if architecture == "jumprelu" else {})


def saelens(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def sparsify(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    config = {"d_in": D, "k": K, "num_latents": N, "expansion_factor": 32, "normalize_decoder": True} | config
    (folder / "cfg.json").write_text(json.dumps(config))
    renamed = {"encoder.weight": tensors["W_enc"].T.contiguous(), "encoder.bias": tensors["b_enc"]}
    save_file(renamed | {name: tensors[name] for name in ("W_dec", "b_dec")}, folder / "sae.safetensors")
    return folder


def gemma(folder, tensors, **more):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()}, **more)
    return folder


def activations(*shape, seed=1, dtype=torch.float32):
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.5).to(dtype)


def by_hand(x, t, architecture, k=None, input_bias=True, normalize="none", center=False, scale=1.0, rescale=False):
    """Features and reconstruction of one token [D], in Python's floats, feature by feature."""
    t = {name: tensor.double().tolist() for name, tensor in t.items()}
    x, mean, back = [float(value) for value in x], 0.0, 1.0
    if center or normalize == "layer_norm":
        mean = sum(x) / D
        x = [value - mean for value in x]
    if normalize == "layer_norm":
        back = math.sqrt(sum(value**2 for value in x) / (D - 1))
        x = [value / (back + 1e-5) for value in x]
    if normalize == "constant_norm_rescale":
        back = math.sqrt(sum(value**2 for value in x)) / math.sqrt(D)
        x = [value / back for value in x]
    x = [value * scale for value in x]
    y = [value - b * input_bias for value, b in zip(x, t["b_dec"], strict=True)]
    norms = [math.sqrt(sum(value**2 for value in row)) for row in t["W_dec"]]
    f = []
    for n in range(N):
        product = sum(y[d] * t["W_enc"][d][n] for d in range(D))
        if architecture == "gated":
            magnitude = product * math.exp(t["r_mag"][n]) + t["b_mag"][n]
            f.append(max(magnitude, 0.0) if product + t["b_gate"][n] > 0 else 0.0)
        else:
            a = product + t["b_enc"][n]
            f.append((a if a > t["threshold"][n] else 0.0) if architecture == "jumprelu" else a)
    if rescale:
        f = [a * norm for a, norm in zip(f, norms, strict=True)]
    if architecture == "topk":
        kept = sorted(range(N), key=lambda n: -f[n])[:k]
        f = [a if n in kept else 0.0 for n, a in enumerate(f)]
    f = [max(a, 0.0) for a in f]
    g = [a / norm for a, norm in zip(f, norms, strict=True)] if rescale else f
    out = [sum(g[n] * t["W_dec"][n][d] for n in range(N)) + t["b_dec"][d] for d in range(D)]
    return f, [value / scale * back + mean for value in out]


def check(sae, tensors, feature_scale=1.0, **how):
    """The SAE's features and reconstruction are those of the loop; gives the tokens."""
    x = activations(4, 5, D)
    features = sae.encode(x)
    rebuilt = sae.decode(features, x)
    for row in range(4):
        for column in range(5):
            f, out = by_hand(x[row, column], tensors, **how)
            torch.testing.assert_close(
                features[row, column].double(),
                feature_scale * torch.tensor(f, dtype=torch.float64),
                atol=2e-5,
                rtol=1e-5,
            )
            torch.testing.assert_close(
                rebuilt[row, column].double(), torch.tensor(out, dtype=torch.float64), atol=1e-4, rtol=1e-5
            )
    assert 0 < (features > 0).float().mean() < 1
    return x


# ---- formats


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
@pytest.mark.parametrize("input_bias", [True, False])
def test_saelens_6_is_the_loop(tmp_path, architecture, input_bias):
    tensors = weights(architecture)
    config = NEW | {"architecture": architecture, "apply_b_dec_to_input": input_bias}
    if architecture == "topk":
        config |= {"k": K, "rescale_acts_by_decoder_norm": False}
    sae = fw.load_sae(saelens(tmp_path, config, tensors))
    check(sae, tensors, architecture=architecture, input_bias=input_bias, k=K)
    assert (sae.layer, sae.site, sae.architecture) == (5, "resid_post", architecture)
    assert repr(sae).startswith(f"SAE({architecture}, 7 → 13 features, resid_post of layer 5, ")


def test_topk_scaled_by_the_decoders_norms_is_the_loop_and_a_features_unit_adds_its_row(tmp_path):
    tensors = weights("topk")
    config = NEW | {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True}
    sae = fw.load_sae(saelens(tmp_path, config, tensors))
    check(sae, tensors, architecture="topk", k=K, rescale=True)
    one = torch.eye(N)[4:5]
    torch.testing.assert_close(sae.decode(one) - sae.decode(0 * one), sae.W_dec[4:5])
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(N))


def test_saelens_before_6_is_read_with_its_own_names_and_training_keys(tmp_path):
    tensors = weights()
    sae = fw.load_sae(saelens(tmp_path / "standard", OLD, tensors | {"scaling_factor": torch.ones(N)}))
    check(sae, tensors, architecture="standard")
    assert (sae.layer, sae.site) == (2, "resid_pre")
    config = OLD | {
        "hook_name": "blocks.3.hook_attn_out",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
    }
    del config["hook_point"]
    sae = fw.load_sae(saelens(tmp_path / "topk", config, tensors))
    check(sae, tensors, architecture="topk", k=K)
    assert (sae.layer, sae.site, sae.k) == (3, "attn_out", K)


def test_a_finetuned_factor_scales_what_a_feature_adds(tmp_path):
    tensors = weights()
    factor = torch.linspace(0.5, 2, N)
    folder = saelens(tmp_path, OLD | {"finetuning_scaling_factor": True}, tensors | {"scaling_factor": factor})
    scaled = tensors | {"W_dec": tensors["W_dec"] * factor[:, None]}
    check(fw.load_sae(folder), scaled, architecture="standard")
    saelens(tmp_path, OLD, tensors | {"scaling_factor": factor})
    with pytest.raises(ValueError, match=r"holds scaling factors, and cfg\.json says finetuning_scaling_factor false"):
        fw.load_sae(folder)


@pytest.mark.parametrize(
    ("repository", "site"), [("gemma-scope-2b-pt-res", "resid_post"), ("models--google--gemma-scope-9b-pt-att", "z")]
)
def test_gemma_scope_is_the_loop_and_its_path_says_where_it_reads(tmp_path, repository, site):
    tensors = weights("jumprelu")
    folder = gemma(tmp_path / repository / "layer_20" / "width_16k" / "average_l0_71", tensors)
    sae = fw.load_sae(folder)
    check(sae, tensors, architecture="jumprelu", input_bias=False)
    assert (sae.layer, sae.site) == (20, site)


def test_a_gemma_scope_path_without_a_repository_leaves_the_site_to_the_caller(tmp_path):
    folder = gemma(tmp_path / "layer_3" / "width_16k", weights("jumprelu"))
    assert (fw.load_sae(folder).layer, fw.load_sae(folder).site) == (3, None)
    sae = fw.load_sae(folder, layer=4, site="mlp_out")
    assert (sae.layer, sae.site) == (4, "mlp_out")
    bare = fw.load_sae(gemma(tmp_path / "bare", weights("jumprelu")))
    assert (bare.layer, bare.site) == (None, None)
    assert "a site not known" in repr(bare)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("layers.6", (6, "resid_post")),
        ("layers.29.mlp", (29, "mlp_out")),
        ("model.layers.14", (14, "resid_post")),
        ("gpt_neox.layers.9.attention", (9, "attn_out")),
        ("h.2.attn", (2, "attn_out")),
        ("embed_tokens", (None, "embedding")),
    ],
)
def test_sparsify_is_the_loop_and_its_folder_says_where_it_reads(tmp_path, name, place):
    tensors = weights()
    sae = fw.load_sae(sparsify(tmp_path / name, tensors, multi_topk=True, signed=False, transcode=False))
    check(sae, tensors, architecture="topk", k=K)
    assert (sae.layer, sae.site) == place


def test_sparsify_counts_its_features_by_the_expansion_factor(tmp_path):
    tensors = weights()
    wide = {name: torch.cat([tensors[name]] * 14, -1)[..., : 2 * D] for name in ("W_enc", "b_enc")}
    wide |= {"W_dec": torch.cat([tensors["W_dec"]] * 2)[: 2 * D], "b_dec": tensors["b_dec"]}
    assert fw.load_sae(sparsify(tmp_path / "layers.1", wide, num_latents=0, expansion_factor=2)).W_dec.shape == (14, D)
    with pytest.raises(ValueError, match=re.escape("W_enc is [7, 13], expected [7, 14]")):
        fw.load_sae(sparsify(tmp_path / "layers.2", tensors, num_latents=0, expansion_factor=2))


@pytest.mark.parametrize(
    ("hook", "place"),
    [
        ("blocks.1.hook_resid_mid", (1, "resid_mid")),
        ("blocks.1.hook_mlp_out", (1, "mlp_out")),
        ("blocks.1.attn.hook_z", (1, "z")),
        ("blocks.1.attn.hook_rot_q", (1, "q_rot")),
        ("blocks.1.mlp.hook_post", (1, "act")),
        ("hook_embed", (None, "embedding")),
        ("model.layers.7", (7, "resid_post")),
        ("model.layers.7.mlp.up_proj", (7, "up")),
        ("layers.7.mlp", (7, "mlp_out")),
        ("model.language_model.layers.7", (7, "resid_post")),
        ("model.layers.7.pre_feedforward_layernorm", (7, "mlp_norm")),
        ("transformer.h.7.mlp.c_fc", (7, "up")),
        ("h.7.attn", (7, "attn_out")),
        ("gpt_neox.layers.7", (7, "resid_post")),
        ("gpt_neox.layers.7.post_attention_layernorm", (7, "mlp_norm")),
        ("layers.7.mlp.dense_4h_to_h", (7, "mlp_out")),
    ],
)
def test_a_hooks_name_is_a_layer_and_a_site(tmp_path, hook, place):
    sae = fw.load_sae(saelens(tmp_path, NEW | {"metadata": METADATA | {"hook_name": hook}}, weights()))
    assert (sae.layer, sae.site) == place


NO_SITE = ["blocks.5.ln2.hook_normalized", "blocks.5.mlp.hook_pre", "model.layers.5.post_attention_layernorm"]


@pytest.mark.parametrize("hook", NO_SITE)
def test_a_hook_that_is_no_site_or_another_in_each_family_must_be_named_by_the_caller(tmp_path, hook):
    folder = saelens(tmp_path, NEW | {"metadata": METADATA | {"hook_name": hook}}, weights())
    with pytest.raises(ValueError, match=rf"{re.escape(hook)}, which is no site here"):
        fw.load_sae(folder)
    assert fw.load_sae(folder, layer=5, site="mlp_norm").site == "mlp_norm"


def test_no_feature_is_negative_under_a_negative_threshold_or_a_k_that_asks_for_all(tmp_path):
    tensors = weights("jumprelu")
    tensors["threshold"] = -tensors["threshold"]
    sae = fw.load_sae(gemma(tmp_path / "jumprelu", tensors))
    check(sae, tensors, architecture="jumprelu", input_bias=False)
    tensors = weights()
    sae = fw.load_sae(sparsify(tmp_path / "layers.0", tensors, k=N))
    check(sae, tensors, architecture="topk", k=N)


def test_gradients_reach_the_activations(tmp_path):
    for architecture in ("standard", "gated", "jumprelu", "topk"):
        config = NEW | {"architecture": architecture, "k": K, "normalize_activations": "layer_norm"}
        sae = fw.load_sae(saelens(tmp_path, config, weights(architecture)), dtype="float64")
        x = activations(1, D, dtype=torch.float64).requires_grad_()
        sae.decode(sae.encode(x), x)[0, 2].backward()
        step = 1e-6 * torch.eye(D, dtype=torch.float64)
        ends = [sae.decode(sae.encode(x + sign * step), x + sign * step)[:, 2] for sign in (1, -1)]
        torch.testing.assert_close(x.grad[0], (ends[0] - ends[1]).detach() / 2e-6, atol=1e-7, rtol=1e-6)


# ---- normalisations


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("center", [False, True])
def test_what_is_removed_of_each_token_is_given_back(tmp_path, normalize, center):
    tensors = weights()
    folder = saelens(tmp_path, NEW | {"normalize_activations": normalize}, tensors)
    sae = fw.load_sae(folder, center=center)
    x = check(sae, tensors, architecture="standard", normalize=normalize, center=center)
    with pytest.raises(ValueError, match=rf"removes the {normalize} of each token: decode\(features, x\) needs x"):
        sae.decode(sae.encode(x))


def test_the_average_norm_comes_from_the_checkpoints_scaler_or_the_caller_and_is_never_guessed(tmp_path):
    tensors = weights("jumprelu")
    config = NEW | {"architecture": "jumprelu", "normalize_activations": "expected_average_only_in"}
    folder = saelens(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=r"expected_average_only_in, whose factor is not in the folder"):
        fw.load_sae(folder)
    check(fw.load_sae(folder, scale=0.25), tensors, architecture="jumprelu", scale=0.25)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 1.5, "has_whitening": False}))
    check(fw.load_sae(folder), tensors, architecture="jumprelu", scale=1.5)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"expected a number above 0"):
            fw.load_sae(folder, scale=wrong)
    saelens(tmp_path, NEW, weights())
    with pytest.raises(ValueError, match=r"scale is 2\.0, and .* names no normalisation that has one"):
        fw.load_sae(folder, scale=2.0)
    saelens(tmp_path / "old", OLD | {"normalize_activations": True}, weights())
    with pytest.raises(ValueError, match=r"expected_average_only_in"):
        fw.load_sae(tmp_path / "old")


def test_centered_activations_are_honoured_where_transformer_lens_centers_them(tmp_path, recwarn):
    tensors = weights()
    yes, no = ({"model_from_pretrained_kwargs": {"center_writing_weights": said}} for said in (True, False))
    sae = fw.load_sae(saelens(tmp_path / "yes", OLD | yes, tensors))
    check(sae, tensors, architecture="standard", center=True)
    assert "centered" in repr(sae)
    with pytest.raises(ValueError, match=r"removes the mean: decode\(features, x\) needs x"):
        sae.decode(torch.zeros(1, N))
    check(fw.load_sae(saelens(tmp_path / "no", OLD | no, tensors)), tensors, architecture="standard")
    llama = OLD | yes | {"model_name": "meta-llama/Llama-3.2-1B"}  # no LayerNorm: TransformerLens skips it
    assert not fw.load_sae(saelens(tmp_path / "llama", llama, tensors)).center
    z = OLD | yes | {"hook_point": "blocks.2.attn.hook_z"}  # not written into the stream
    assert not fw.load_sae(saelens(tmp_path / "z", z, tensors)).center
    with pytest.raises(ValueError, match=r"center_writing_weights is true, and whether .* of custom is not known here"):
        fw.load_sae(saelens(tmp_path / "custom", OLD | yes | {"model_name": "custom"}, tensors))
    assert not recwarn.list


def test_a_folder_that_does_not_say_whether_it_was_centered_warns(tmp_path):
    config = {key: value for key, value in OLD.items() if key != "model_from_pretrained_kwargs"}
    folder = saelens(tmp_path, config, weights())
    with pytest.warns(UserWarning, match=r"does not say whether .* gpt2-small-res-jb") as caught:
        assert not fw.load_sae(folder).center
    assert caught[0].filename == __file__
    assert fw.load_sae(folder, center=True).center


# ---- edits, error


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feature_set_to_what_it_is_gives_exactly_x(tmp_path, normalize, dtype):
    sae = fw.load_sae(saelens(tmp_path, NEW | {"normalize_activations": normalize}, weights()), center=True)
    x = activations(2, 3, D, dtype=dtype)
    assert torch.equal(sae.set(range(N), lambda f: f)(x, None), x)
    assert sae.set(0, 1.0)(x, None).dtype == dtype


@pytest.mark.parametrize("normalize", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("center", [False, True])
def test_an_edit_of_features_keeps_the_error_term(tmp_path, normalize, center):
    tensors = weights()
    folder = saelens(tmp_path, NEW | {"normalize_activations": normalize}, tensors)
    sae = fw.load_sae(folder, dtype="float64", center=center)
    x = activations(3, D, dtype=torch.float64)
    edited = sae.set([2, 5], torch.tensor([4.0, 0.0]))(x, None)
    doubled = sae.set(3, lambda f: 2 * f)(x, None)
    for token in range(3):
        f, out = by_hand(x[token], tensors, "standard", normalize=normalize, center=center)
        features = torch.tensor([f], dtype=torch.float64)
        features[0, 2], features[0, 5] = 4.0, 0.0
        missed = x[token] - torch.tensor(out, dtype=torch.float64)
        wanted = sae.decode(features, x[token : token + 1])[0] + missed
        torch.testing.assert_close(edited[token], wanted, atol=1e-12, rtol=1e-12)
        features = torch.tensor([f], dtype=torch.float64)
        features[0, 3] *= 2
        wanted = sae.decode(features, x[token : token + 1])[0] + missed
        torch.testing.assert_close(doubled[token], wanted, atol=1e-12, rtol=1e-12)


def test_heads_are_read_one_behind_the_other(tmp_path):
    tensors = {"W_enc": torch.randn(6, N), "W_dec": torch.randn(N, 6), "b_dec": torch.randn(6), "b_enc": torch.randn(N)}
    config = NEW | {"d_in": 6, "metadata": METADATA | {"hook_name": "blocks.0.attn.hook_z"}}
    sae = fw.load_sae(saelens(tmp_path, config, tensors))
    x = torch.randn(2, 4, 3, 2)
    features = sae.encode(x)
    assert torch.equal(features, sae.encode(x.flatten(-2)))
    assert torch.equal(sae.decode(features, x), sae.decode(features).reshape(2, 4, 3, 2))
    assert sae.set(1, 0.5)(x, None).shape == x.shape
    assert sae.error(x) == sae.error(x.flatten(-2))
    with pytest.raises(ValueError, match=re.escape("x is [2, 4, 3], expected [..., 6], or [..., H, E] with H · E = 6")):
        sae.encode(torch.randn(2, 4, 3))
    other = fw.load_sae(tmp_path, site="resid_post")
    with pytest.raises(ValueError, match=re.escape("x is [2, 4, 3, 2], expected [..., 6]")):
        other.encode(x)


def test_the_error_is_the_share_of_variance_and_the_count_of_active_features(tmp_path, monkeypatch):
    tensors = weights("jumprelu")
    sae = fw.load_sae(saelens(tmp_path, NEW | {"architecture": "jumprelu"}, tensors))
    x = activations(4, 5, D)
    tokens = x.reshape(-1, D).double()
    missed, active = 0.0, 0
    for token in tokens:
        f, out = by_hand(token, tensors, "jumprelu")
        missed += sum((float(a) - b) ** 2 for a, b in zip(token, out, strict=True))
        active += sum(value > 0 for value in f)
    error = sae.error(x)
    spread = float(sum((token - tokens.mean(0)).square().sum() for token in tokens))
    assert error.variance_unexplained == pytest.approx(missed / spread, rel=1e-5)
    assert error.l0 == pytest.approx(active / 20)
    monkeypatch.setattr("fastweights.sae.TOKENS_AT_ONCE", 3 * N)  # pieces of 3 tokens
    assert sae.error(x).variance_unexplained == pytest.approx(error.variance_unexplained, rel=1e-6)
    for same in (x[0, 0], x[:1, :1].expand(2, 3, D), x[:0]):
        with pytest.raises(ValueError, match=r"tokens that do not differ"):
            sae.error(same)


def test_an_exact_autoencoder_has_no_error(tmp_path):
    eye = torch.eye(D)
    pairs = {"W_enc": torch.cat([eye, -eye], 1), "W_dec": torch.cat([eye, -eye]), "b_dec": torch.zeros(D)}
    sae = fw.load_sae(saelens(tmp_path, NEW | {"d_sae": 2 * D}, pairs | {"b_enc": torch.zeros(2 * D)}))
    assert sae.error(activations(9, D)) == (0.0, D)


def test_features_are_float32_whatever_the_weights_and_activations_are_kept_in(tmp_path):
    tensors = weights()
    folder = saelens(tmp_path, NEW, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    sae, small = fw.load_sae(folder), fw.load_sae(folder, dtype=torch.bfloat16)
    assert (sae.W_enc.dtype, small.W_enc.dtype) == (torch.float32, torch.bfloat16)
    x = activations(5, D, dtype=torch.bfloat16)
    assert sae.encode(x).dtype == torch.float32
    assert torch.equal(sae.encode(x), small.encode(x.float()))
    assert sae.encode(x.double()).dtype == torch.float64
    assert fw.load_sae(saelens(tmp_path, NEW, {k: t.double() for k, t in tensors.items()})).W_dec.dtype == torch.float64


# ---- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "transcoder"}, 'architecture is "transcoder", expected one of standard, gated, jumprelu'),
        ({"architecture": "matryoshka_batchtopk"}, 'architecture is "matryoshka_batchtopk", expected one of'),
        ({"architecture": "temporal"}, 'architecture is "temporal", expected one of'),
        ({"architecture": None}, "architecture is null, expected one of"),
        ({"normalize_activations": "covariance_whitening"}, 'normalize_activations is "covariance_whitening"'),
        ({"activation_fn": "tanh-relu"}, "activation_fn may change what the SAE computes"),
        ({"a_new_idea": 1}, "a_new_idea may change what the SAE computes, and is not known here"),
        (
            {"metadata": METADATA | {"hook_name_out": "blocks.5.hook_mlp_out"}},
            "predicts blocks.5.hook_mlp_out, expected",
        ),
        ({"metadata": METADATA | {"hook_head_index": 0}}, "hook_head_index is 0: an SAE of one head alone"),
        ({"d_in": D + 1}, "W_enc is [7, 13], expected [8, 13]"),
        ({"d_sae": "many"}, 'd_sae is "many", expected a whole number'),
        ({"architecture": "topk"}, "k is null, expected a number from 1 to 13"),
        ({"architecture": "topk", "k": N + 1}, "k is 14, expected a number from 1 to 13"),
        ({"architecture": "jumprelu"}, "has no threshold, which a jumprelu SAE needs"),
        ({"architecture": "gated"}, "has no b_gate, which a gated SAE needs"),
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fw.load_sae(saelens(tmp_path, NEW | change, weights()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, 'activation is "tanh-relu" in a standard SAE, expected relu or topk'),
        ({"activation_fn_str": "topk"}, "k is null, expected a number"),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K, "postact_fn": "identity"}},
            'activation_fn_kwargs holds postact_fn = "identity"',
        ),
        ({"is_transcoder": True}, "is_transcoder is true: a transcoder predicts another site"),
        ({"normalize_activations": 3}, "normalize_activations is 3, expected one of none"),
    ],
)
def test_settings_before_6_that_are_not_computed_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fw.load_sae(saelens(tmp_path, OLD | change, weights()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transcode": True}, "transcode is true: a transcoder predicts another site than it reads"),
        ({"skip_connection": True}, "skip_connection is true: an SAE with a linear skip connection"),
        ({"signed": True}, "signed is true: features of both signs"),
        ({"activation": "groupmax"}, 'activation is "groupmax", expected topk'),
        ({"new": 1}, "new may change what the SAE computes"),
        ({"num_latents": N + 1}, "W_enc is [7, 13], expected [7, 14]"),
    ],
)
def test_settings_of_sparsify_that_are_not_computed_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fw.load_sae(sparsify(tmp_path / "layers.0", weights(), **change))


def test_tensors_that_are_missing_unknown_or_not_numbers_are_refused_by_name(tmp_path):
    tensors = weights()
    nan = tensors["b_enc"].clone()
    nan[2] = math.nan
    for changed, message in [
        (tensors | {"W_skip": torch.ones(D, D)}, "holds W_skip, which a standard SAE does not read"),
        (tensors | {"b_enc": nan}, "b_enc holds numbers that are not finite"),
        (tensors | {"b_enc": torch.ones(N, dtype=torch.int64)}, "b_enc is torch.int64, expected floats"),
        (tensors | {"b_dec": torch.ones(N)}, "b_dec is [13], expected [7]"),
        (tensors | {"W_dec": torch.ones(N)}, "W_dec is [13], expected [N, D]"),
        ({name: t for name, t in tensors.items() if name != "b_dec"}, "has no b_dec, which a standard SAE needs"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            fw.load_sae(saelens(tmp_path, NEW, changed))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    folder = saelens(tmp_path / "one", NEW, weights())
    with pytest.raises(FileNotFoundError, match=rf"holds no SAE, .* it holds folders that do, as {folder}"):
        fw.load_sae(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder"):
        fw.load_sae(tmp_path / "nowhere")
    (folder / "cfg.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"cfg\.json is not valid JSON"):
        fw.load_sae(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cfg\.json is missing, expected the settings of sae_weights"):
        fw.load_sae(folder)
    saelens(folder, NEW, weights())
    (folder / "sae_weights.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match=r"is not a whole safetensors file"):
        fw.load_sae(folder)
    gemma(tmp_path / "pickled", weights("jumprelu"), more=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"params\.npz is not a whole \.npz file of numbers"):
        fw.load_sae(tmp_path / "pickled")
    (tmp_path / "pickled" / "params.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"params\.npz is not a whole \.npz file of numbers"):
        fw.load_sae(tmp_path / "pickled")
    for path, message in [
        ("gemma-scope-2b-pt-transcoders/layer_1", "transcoders predict another site"),
        ("gemma-scope-2b-pt-res/embedding/width_4k", "of the embedding read it on another scale"),
    ]:
        with pytest.raises(ValueError, match=message):
            fw.load_sae(gemma(tmp_path / path, weights("jumprelu")))


def test_wrong_activations_and_features_are_refused(tmp_path):
    sae = fw.load_sae(saelens(tmp_path, NEW, weights()))
    for call, message in [
        (lambda: sae.encode(torch.ones(2, D + 1)), "x is [2, 8], expected [..., 7]"),
        (lambda: sae.encode(torch.ones(2, D, dtype=torch.int64)), "x holds torch.int64"),
        (lambda: sae.encode(torch.ones(2, D, device="meta")), "x is on meta and the SAE on cpu"),
        (lambda: sae.decode(torch.ones(2, D)), "features are [2, 7], expected [..., 13]"),
        (lambda: sae.set(N, 0.0), "feature 13 is out of range, expected 0 to 12"),
        (lambda: sae.set(-1, 0.0), "feature -1 is out of range"),
        (lambda: sae.set([1, 1], 0.0), "features are [1, 1], expected each once"),
        (lambda: sae.set([], 0.0), "features are [], expected each once, and at least one"),
        (lambda: sae.set(1, math.inf), "value is inf, expected numbers that are finite"),
        (lambda: sae.set([1, 2], torch.ones(3))(torch.ones(2, D)), "values became [3], expected [2, 2]"),
        (lambda: fw.load_sae(tmp_path, dtype="int8"), "dtype is 'int8', expected one of"),
        (lambda: fw.load_sae(tmp_path, device="nowhere"), "device 'nowhere' is not one that torch knows"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
