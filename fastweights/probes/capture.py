"""capture: what the residual stream holds at named sites while the model runs. Knows nothing of plasticity."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..model import Llama

SITES = ("resid_pre", "resid_mid", "resid_post")


def check_sites(sites: Sequence[str]) -> list[str]:
    """The sites as a list, or a refusal that says what there is."""
    sites = [sites] if isinstance(sites, str) else list(sites)
    for site in sites:
        if site not in SITES:
            raise ValueError(f"site {site!r} does not exist: choose from {', '.join(SITES)}")
    return sites


@contextlib.contextmanager
def capture(
    model: Llama, sites: Sequence[str], columns: Tensor | None = None, narrowed: bool = False
) -> Iterator[dict[str, list[Tensor]]]:
    """Collects copies at the named sites of every block that runs inside; its hooks go whatever happens.

    Args:
        sites: "resid_pre" before a block, "resid_mid" between attention and MLP, "resid_post" after the
            block; "embedding" is collected along with "resid_post".
        columns: [T′] int64, the tokens to keep; None = all.
        narrowed: the last block goes on with these columns alone, see `Llama.blocks`.

    Yields:
        name → one [B, T′, D] per block that ran, in that order.

    Raises:
        ValueError: a site that does not exist, before any hook is set.
    """
    seen: dict[str, list[Tensor]] = {site: [] for site in check_sites(sites)}
    if "resid_post" in seen:
        seen["embedding"] = []

    def keep(site: str, x_BTD: Tensor, whole: bool) -> None:
        seen[site].append(x_BTD.detach()[:, columns] if whole and columns is not None else x_BTD.detach().clone())

    def before(site: str, whole: bool):
        return lambda _module, args: keep(site, args[0], whole)

    def after(site: str, whole: bool):
        return lambda _module, _args, output: keep(site, output, whole)

    with contextlib.ExitStack() as stack:

        def hook(module: nn.Module, site: str, *, output: bool, whole: bool = True) -> None:
            register = module.register_forward_hook if output else module.register_forward_pre_hook
            stack.callback(register((after if output else before)(site, whole)).remove)

        for block in model.model.layers:
            whole = not (narrowed and block is model.model.layers[-1])
            if "resid_pre" in seen:
                hook(block, "resid_pre", output=False)
            if "resid_mid" in seen:
                hook(block.get_submodule("post_attention_layernorm"), "resid_mid", output=False, whole=whole)
            if "resid_post" in seen:
                hook(block, "resid_post", output=True, whole=whole)
        if "resid_post" in seen:
            hook(model.model.embed_tokens, "embedding", output=True)
        yield seen
