"""On a CPU, the operators that exist for CUDA alone: by their definitions in torch, so that torch can check them."""

from fastweights import rules
from fastweights.kernels import scan, step

PHI = {"silu": rules.SILU, "identity": rules.IDENTITY}


def step_rule(name, activation, mu, clip=None):
    """A rule as a step knows it."""

    return step.StepRule(name, activation, mu, clip, event)


def event(rule, a, frozen, norm, inputs):
    return rules.twin_event(
        rule.name, PHI[rule.activation], rule.clip, a, frozen, norm, inputs.rate, inputs.gamma, inputs.target
    )


@scan._op.register_kernel("cpu")
def _(a, u, G, write, frozen, target, norm, rate, gamma, t0, rule, activation, clip):
    for s in range(G.shape[1]):
        t = t0 + s
        a[:, :, t] += (u[:, :, t0:t] @ G[:, :s, s, None])[:, :, 0]
        at = (a[:, :, t], frozen[:, :, t], norm[:, t], rate, gamma, target[:, :, t])
        new = rules.twin_event(rule, PHI[activation], clip, *at)
        u[:, :, t] = new.masked_fill(write[:, t, None] == 0, 0)
