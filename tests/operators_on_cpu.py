"""On a CPU, the operators that exist for CUDA alone: by their definitions in torch, so that torch can check them."""

from fastweights import rules
from fastweights.kernels import step

PHI = {"silu": rules.SILU, "identity": rules.IDENTITY}


def step_rule(name, activation, mu, clip=None):
    """A rule as a step knows it."""

    return step.StepRule(name, activation, mu, clip, event)


def event(rule, a, frozen, norm, inputs):
    return rules.twin_event(
        rule.name, PHI[rule.activation], rule.clip, a, frozen, norm, inputs.rate, inputs.gamma, inputs.target
    )
