"""capture: what the residual stream holds at named sites while the model runs. Knows nothing of plasticity."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..model import Llama
from ..watch import ThreadHook

SITES = ("resid_pre", "resid_mid", "resid_post")


def check_sites(sites: Sequence[str]) -> list[str]:
    """The sites as a list, or a refusal that says what there is."""
    sites = [sites] if isinstance(sites, str) else list(sites)
    for site in sites:
        if site not in SITES:
            raise ValueError(f"site {site!r} does not exist: choose from {', '.join(SITES)}")
    return sites


@contextlib.contextmanager
def capture(model: Llama, sites: Sequence[str], columns: Tensor | None = None) -> Iterator[dict[str, list[Tensor]]]:
    """Collects copies at the named sites of every block that this thread runs inside; its hooks go whatever happens.

    Args:
        sites: "resid_pre" before a block, "resid_mid" between attention and MLP, "resid_post" after the
            block; "embedding" is collected along with "resid_post".
        columns: [T′] int64, the tokens to keep; None = all.

    Yields:
        name → one [B, T′, D] per block that ran, in that order.

    Raises:
        ValueError: a site that does not exist, before any hook is set.
    """
    seen: dict[str, list[Tensor]] = {site: [] for site in check_sites(sites)}
    if "resid_post" in seen:
        seen["embedding"] = []

    def keep(site: str, x_BTD: Tensor) -> None:
        seen[site].append(x_BTD.detach().clone() if columns is None else x_BTD.detach()[:, columns])

    with contextlib.ExitStack() as stack:

        def before(module: nn.Module, site: str) -> None:
            hook = ThreadHook(lambda _module, args: keep(site, args[0]))
            stack.callback(module.register_forward_pre_hook(hook).remove)

        def after(module: nn.Module, site: str) -> None:
            hook = ThreadHook(lambda _module, _args, output: keep(site, output))
            stack.callback(module.register_forward_hook(hook).remove)

        for block in model.model.layers:
            if "resid_pre" in seen:
                before(block, "resid_pre")
            if "resid_mid" in seen:
                before(block.get_submodule("post_attention_layernorm"), "resid_mid")
            if "resid_post" in seen:
                after(block, "resid_post")
        if "resid_post" in seen:
            after(model.model.embed_tokens, "embedding")
        yield seen
