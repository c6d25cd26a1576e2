"""Rules as the kernels of one token know them, with their events in torch."""

from fastweights import rules
from fastweights.activations import PHI
from fastweights.kernels import step


def step_rule(name, activation, mu, clip=None):
    return step.StepRule(name, activation, mu, clip, event)


def event(rule, a, frozen, norm, inputs):
    numbers = (inputs.rate, inputs.gamma, inputs.target)
    return rules.twin_event(rule.name, PHI[rule.activation], rule.clip, a, frozen, norm, *numbers)
