"""Sites: the named tensors of a forward pass, where they lie, and the other names they go by.

Shape suffixes: B batch, T tokens, D model width, H heads, K key/value heads, E head width, S keys, F neurons of an MLP,
V vocabulary.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..config import LlamaConfig
from ..families import FAMILIES, Family

# by site: the norm behind it, that before it and what reads that, and the linear that gives it together with others
BEHIND = {"attn_out": "after_attention", "mlp_out": "after_mlp"}
BEFORE = {"attn_norm": ("before_attention", "attention"), "mlp_norm": ("before_mlp", "the MLP")}
FUSED = {**dict.fromkeys("qkv", "qkv_proj"), "gate": "gate_up_proj", "up": "gate_up_proj"}


@dataclass(frozen=True)
class Site:
    """One named tensor.

    axes: what follows [B, T], by letter; "scores" and "pattern" are [B, H, T, S].
    module: the module at which it lies as a rule, a path of roles (`families.LLAMA`) from its block, or from the model
        where no block has it; `place` says where it lies in a family.
    side: whether it is that module's "input" or "output"; "inside" for what the module itself shows its tap
        (`Binding.tap`), "plastic" for what a plastic linear reads and writes.
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

    def place(self, family: Family) -> tuple[str, str]:
        """Module and side in a family: what is added to the stream may pass a norm before; linears may be fused."""
        behind = BEHIND.get(self.name, "")
        if behind in family.names:
            return behind, self.side
        if self.side == "output" and FUSED.get(self.name) in family.names:
            return "", "inside"
        return self.module, self.side

    def linear(self, family: Family) -> str | None:
        """The name of the MLP's linear that gives it, or reads and writes it; None: there is no such one."""
        role, fused = self.module.removeprefix("mlp."), FUSED.get(self.name.split(".")[0], "")
        return family.names.get(fused if fused in family.names else role)

    def missing(self, config: LlamaConfig) -> str | None:
        """Why a model does not have it; None: it does."""
        family = config.family
        if self.name in BEFORE and BEFORE[self.name][0] not in family.names:
            return f"{BEFORE[self.name][1]} of {family.title} reads the stream itself, without a norm before it"
        if self.name == "resid_mid" and config.use_parallel_residual:
            return f"attention and MLP of this {family.title} read the same stream, and nothing lies between them"
        if self.name.split(".")[0] == "gate" and self.linear(family) is None:
            return f"the MLP of {family.title} has no gate: expected {self.name.replace('gate', 'up')!r}"
        return None

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
        Site("logits", "V", "", "inside", layered=False),
    ]
    inner = {"gate": ("D", "F"), "up": ("D", "F"), "down": ("F", "D")}  # what a linear reads, what it gives
    for linear, (read, given) in inner.items():
        for part, axis in (("read", given), ("key", read), ("value", given)):
            sites.append(Site(f"{linear}.{part}", axis, f"mlp.{linear}_proj", "plastic"))
    return {site.name: site for site in sites}


TABLE = _table()
SITES = tuple(TABLE)

# TransformerLens' names within blocks.N, of an MLP with a gate; what is there but is another tensor says which
LENS = {
    **{f"hook_{name}": name for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")},
    **{f"attn.hook_{name}": name for name in ("q", "k", "v", "z", "result", "pattern")},
    **{"attn.hook_rot_q": "q_rot", "attn.hook_rot_k": "k_rot", "attn.hook_attn_scores": "scores"},
    **{"mlp.hook_pre": "gate", "mlp.hook_pre_linear": "up", "mlp.hook_post": "act"},
}
OTHER = {"ln1": "attn_norm", "ln2": "mlp_norm", "ln_final": "final_norm"}


@dataclass(frozen=True)
class Names:
    """What a family's modules, and TransformerLens, call its sites.

    whole: sites outside of blocks. blocks: of each name of a block (without its number), the sites by what follows it.
    apart: names that are near a site and another tensor, as `whole` and `blocks` have them, and what is said of them.
    """

    whole: Mapping[str, str]
    blocks: Mapping[str, Mapping[str, str]]
    apart: Mapping[str, str]

    def find(self, name: str) -> tuple[str, int | None] | None:
        """The site and the layer that a name means."""
        if name in self.whole:
            return self.whole[name], None
        layer, inner, sites = self._inside(name)
        return None if inner not in sites else (sites[inner], layer)

    def hint(self, name: str) -> str | None:
        """What there is to say of a name that means no site."""
        return self.apart.get(name) or self.apart.get(self._inside(name)[1])

    def _inside(self, name: str) -> tuple[int | None, str, Mapping[str, str]]:
        """Of a name inside a block: the layer, what follows it, and the sites there."""
        for block, sites in self.blocks.items():
            if found := re.fullmatch(rf"{re.escape(block)}\.(\d+)(?:\.(.+))?", name):
                return int(found[1]), found[2] or "", sites
        return None, "", {}


def _names(family: Family) -> Names:
    """The names in one family: a site goes by the module whose output it is."""
    names = family.names
    whole = {"lm_head": "logits", "unembed": "logits", names["lm_head"]: "logits"}
    blocks, lens, apart = {"": "resid_post"}, dict(LENS), {}

    def path(roles: str) -> str:
        return ".".join(names[role] for role in roles.split("."))

    whole[path("model.norm")] = "final_norm"
    for name in ("hook_embed", path("model.embed_tokens")):
        if "embed_positions" in names:
            apart[name] = "is taken before positions are added: expected 'embedding', which is taken after that"
        else:
            whole[name] = "embedding"
    for site in TABLE.values():
        module, side = site.place(family)
        if side == "output" and module and site.layered and names.keys() >= {*module.split(".")}:
            blocks[path(module)] = site.name
    for name, module, last in (("attn_out", "self_attn", "o_proj"), ("mlp_out", "mlp", "down_proj")):
        blocks[path(f"{module}.{last}")] = name  # o_proj is where "result" lies, which is another tensor
        if TABLE[name].place(family)[0] != module:
            del blocks[path(f"{module}.{last}")]
            said = f"is taken before the norm behind it: expected {name!r}, which is taken after it"
            apart |= {path(module): said, path(f"{module}.{last}"): said}
    for module, sites in (("self_attn.qkv_proj", "'q', 'k' or 'v'"), ("mlp.gate_up_proj", "'gate' or 'up'")):
        if module.split(".")[1] in names:
            apart[path(module)] = f"holds several sites side by side: expected {sites}"
    if TABLE["gate"].linear(family) is None:
        lens["mlp.hook_pre"] = lens.pop("mlp.hook_pre_linear")
        apart["mlp.hook_pre_linear"] = "belongs to an MLP with a gate: expected 'up'"
    return Names(whole, {"blocks": lens, path("model.layers"): blocks}, apart)


NAMES: dict[str, Names] = {}  # by architecture, made when first asked: a family may come later


def names_in(family: Family) -> Names:
    """The names of a family's modules."""
    if family.architecture not in NAMES:
        NAMES[family.architecture] = _names(family)
    return NAMES[family.architecture]


def names_of(sites: Any) -> list[Any]:
    """One name or several, as a list."""
    return list(sites) if isinstance(sites, Iterable) and not isinstance(sites, str) else [sites]


def site_of(name: Any, family: Family | None = None) -> tuple[Site, int | None]:
    """The site that a name means, and the layer where the name holds one.

    family: that of the model; None: what the name means in the first family that has it, of which only the axes are
        the same in every family.

    Raises:
        ValueError: it means none; the message says what it may have meant.
    """
    if not isinstance(name, str):
        raise ValueError(f"site {name!r} is a {type(name).__name__}: expected a name, such as 'resid_post'")
    if name in TABLE:
        return TABLE[name], None
    for each in FAMILIES.values() if family is None else (family,):
        if (found := names_in(each).find(name)) is not None:
            return TABLE[found[0]], found[1]
    raise ValueError(f"site {name!r} {_why(name, family)}")


def _why(name: str, family: Family | None) -> str:
    """Why a name means no site, and what is likely to be meant."""
    norm = re.fullmatch(r"(?:blocks\.\d+\.)?(ln1|ln2|ln_final)\.hook_(normalized|scale)", name)
    if norm is not None:
        return f"is taken before the norm's weight: expected {OTHER[norm[1]]!r}, which is taken after it"
    for each in FAMILIES.values() if family is None else (family,):
        if (hint := names_in(each).hint(name)) is not None:
            return hint
    for each in FAMILIES.values():
        if family is not None and (found := names_in(each).find(name)) is not None:
            site = f"{found[0]!r}" if found[1] is None else f"{found[0]!r} of layer {found[1]}"
            return f"is a name in {each.title}, and this model is of the family {family.title}: expected {site}"
    near = difflib.get_close_matches(name, SITES, 1, 0.8)
    near = near or difflib.get_close_matches(name.rsplit(".", 1)[-1].removeprefix("hook_"), SITES, 1, 0.6)
    near = near or difflib.get_close_matches(name, SITES, 1, 0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"does not exist: {hint}sites are {', '.join(SITES)}"
