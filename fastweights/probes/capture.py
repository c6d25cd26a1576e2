"""capture: what the residual stream holds at named sites while the model runs. Knows nothing of plasticity."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..model import Llama

SITES = ("resid_pre", "resid_mid", "resid_post")


@dataclass
class Trace:
    """What a probe saw. All tensors are copies.

    logits: [B, T, V].
    sites: name → [L, B, T, D], layer first: "resid_pre" before a block, "resid_mid" between attention and
        MLP, "resid_post" after the block.
    """

    logits: Tensor
    sites: dict[str, Tensor] = field(default_factory=dict)
    embedding: Tensor | None = None

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.sites:
            raise KeyError(f"site {site!r} was not captured; captured are {sorted(self.sites)}")
        return self.sites[site]

    @property
    def hidden_states(self) -> Tensor:
        """Residual stream after ℓ layers, [L+1, B, T, D]: 0 = embedding, L = before the final norm."""
        embedding = self["resid_pre"][:1] if self.embedding is None else self.embedding[None]
        return torch.cat([embedding, self["resid_post"]])


@contextlib.contextmanager
def capture(model: Llama, sites: Sequence[str]) -> Iterator[Trace]:
    """Fills the yielded trace while the block runs one forward pass; its hooks go whatever happens.

    Raises:
        ValueError: a site that does not exist, before any hook is set.
    """
    sites = [sites] if isinstance(sites, str) else list(sites)
    for site in sites:
        if site not in SITES:
            raise ValueError(f"site {site!r} does not exist: choose from {', '.join(SITES)}")
    seen: dict[str, list[Tensor]] = {site: [] for site in sites}
    trace = Trace(torch.empty(0))

    def before(site: str):
        def hook(_module: nn.Module, args: tuple) -> None:
            seen[site].append(args[0].detach().clone())

        return hook

    def after(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        seen["resid_post"].append(output.detach().clone())

    def embedded(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        trace.embedding = output.detach().clone()

    with contextlib.ExitStack() as stack:
        for block in model.model.layers:
            if "resid_pre" in seen:
                stack.callback(block.register_forward_pre_hook(before("resid_pre")).remove)
            if "resid_mid" in seen:
                norm = block.get_submodule("post_attention_layernorm")
                stack.callback(norm.register_forward_pre_hook(before("resid_mid")).remove)
            if "resid_post" in seen:
                stack.callback(block.register_forward_hook(after).remove)
        if "resid_post" in seen:
            stack.callback(model.model.embed_tokens.register_forward_hook(embedded).remove)
        yield trace
    trace.sites = {site: torch.stack(layers) for site, layers in seen.items()}
