"""Sites: the named tensors of a forward pass, where they lie, and the other names they go by.

Shape suffixes: B batch, T tokens, D model width, H heads, K key/value heads, E head width, S keys, F neurons of an MLP,
V vocabulary.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..config import LlamaConfig


@dataclass(frozen=True)
class Site:
    """One named tensor.

    axes: what follows [B, T], by letter; "scores" and "pattern" are [B, H, T, S].
    module: the module at which it lies, seen from its block, or from the model where no block has it.
    side: whether it is that module's "input" or "output"; "inside" for what attention computes between its linears,
        "plastic" for what a plastic linear reads and writes.
    """

    name: str
    axes: str
    module: str
    side: str = "output"
    layered: bool = True

    @property
    def heads(self) -> str | None:
        """The letter of its head axis, if it has one."""
        return next((letter for letter in "HK" if letter in self.axes), None)

    @property
    def square(self) -> bool:
        """Whether heads come before tokens: [B, H, T, S]."""
        return self.axes == "HS"

    def sizes(self, config: LlamaConfig) -> list[int | None]:
        """The lengths of its axes in this model; None where that depends on the pass."""
        sizes: dict[str, int | None] = {
            "D": config.hidden_size,
            "H": config.num_attention_heads,
            "K": config.num_key_value_heads,
            "E": config.head_dim,
            "F": config.intermediate_size,
            "V": config.vocab_size,
            "S": None,
        }
        return [sizes[letter] for letter in self.axes]


def _table() -> dict[str, Site]:
    sites = [
        Site("embedding", "D", "", "inside", layered=False),
        Site("resid_pre", "D", "", "input"),
        Site("attn_norm", "D", "before_attention"),
        Site("q", "HE", "self_attn.q_proj"),
        Site("k", "KE", "self_attn.k_proj"),
        Site("v", "KE", "self_attn.v_proj"),
        Site("q_rot", "HE", "self_attn", "inside"),
        Site("k_rot", "KE", "self_attn", "inside"),
        Site("scores", "HS", "self_attn", "inside"),
        Site("pattern", "HS", "self_attn", "inside"),
        Site("z", "HE", "self_attn.o_proj", "input"),
        Site("result", "HD", "self_attn.o_proj"),
        Site("attn_out", "D", "self_attn"),
        Site("resid_mid", "D", "", "inside"),
        Site("mlp_norm", "D", "before_mlp"),
        Site("gate", "F", "mlp.gate_proj"),
        Site("up", "F", "mlp.up_proj"),
        Site("act", "F", "mlp.down_proj", "input"),
        Site("mlp_out", "D", "mlp"),
        Site("resid_post", "D", ""),
        Site("final_norm", "D", "model.norm", layered=False),
        Site("logits", "V", "lm_head", layered=False),
    ]
    inner = {"gate": ("D", "F"), "up": ("D", "F"), "down": ("F", "D")}  # what a linear reads, what it gives
    for linear, (read, given) in inner.items():
        for part, axis in (("read", given), ("key", read), ("value", given)):
            sites.append(Site(f"{linear}.{part}", axis, f"mlp.{linear}_proj", "plastic"))
    return {site.name: site for site in sites}


TABLE = _table()
SITES = tuple(TABLE)

# TransformerLens' names within blocks.N, and the modules of a block; what is there but is another tensor says which
LENS = {
    **{f"hook_{name}": name for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")},
    **{f"attn.hook_{name}": name for name in ("q", "k", "v", "z", "result", "pattern")},
    **{"attn.hook_rot_q": "q_rot", "attn.hook_rot_k": "k_rot", "attn.hook_attn_scores": "scores"},
    **{"mlp.hook_pre": "gate", "mlp.hook_pre_linear": "up", "mlp.hook_post": "act"},
}
OTHER = {"ln1": "attn_norm", "ln2": "mlp_norm", "ln_final": "final_norm"}
MODULES = {
    **{"": "resid_post", "input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"},
    **{"self_attn": "attn_out", "self_attn.o_proj": "attn_out", "mlp": "mlp_out", "mlp.down_proj": "mlp_out"},
    **{f"self_attn.{name}_proj": name for name in "qkv"},
    **{f"mlp.{name}_proj": name for name in ("gate", "up")},
}
WHOLE = {
    **{"hook_embed": "embedding", "model.embed_tokens": "embedding", "model.norm": "final_norm"},
    **{"lm_head": "logits", "unembed": "logits"},
}


def names_of(sites: Any) -> list[Any]:
    """One name or several, as a list."""
    return list(sites) if isinstance(sites, Iterable) and not isinstance(sites, str) else [sites]


def site_of(name: Any) -> tuple[Site, int | None]:
    """The site that a name means, and the layer where the name holds one.

    Raises:
        ValueError: it means none; the message says what it may have meant.
    """
    if not isinstance(name, str):
        raise ValueError(f"site {name!r} is a {type(name).__name__}: expected a name, such as 'resid_post'")
    if name in TABLE:
        return TABLE[name], None
    if name in WHOLE:
        return TABLE[WHOLE[name]], None
    layer = None
    if found := re.fullmatch(r"(blocks|model\.layers)\.(\d+)(?:\.(.+))?", name):
        layer, inner = int(found[2]), found[3] or ""
        if (own := (LENS if found[1] == "blocks" else MODULES).get(inner)) is not None:
            return TABLE[own], layer
    norm = re.fullmatch(r"(?:blocks\.\d+\.)?(ln1|ln2|ln_final)\.hook_(normalized|scale)", name)
    if norm is not None:
        raise ValueError(
            f"site {name!r} is taken before the norm's weight: expected {OTHER[norm[1]]!r}, which is taken after it"
        )
    near = difflib.get_close_matches(name, SITES, 1, 0.8)
    near = near or difflib.get_close_matches(name.rsplit(".", 1)[-1].removeprefix("hook_"), SITES, 1, 0.6)
    near = near or difflib.get_close_matches(name, SITES, 1, 0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"site {name!r} does not exist: {hint}sites are {', '.join(SITES)}")
