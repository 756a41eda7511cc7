"""The explanation says what the model says, and asks the rules only where they judge."""

from __future__ import annotations

import pytest

from enforcer.control.explain import Evidence, QuestionError, explain
from enforcer.control.messages import Flow, Question
from enforcer.model.addresses import parse_address
from enforcer.model.objects import Direction, NetworkPolicy
from enforcer.policy.endpoints import Endpoint
from enforcer.policy.index import PolicyIndex
from enforcer.ruleset.evaluate import RulesetView
from enforcer.ruleset.ruleset import Ruleset
from enforcer.translate.base import BaseSettings
from enforcer.translate.translator import Translator

GATEWAY = parse_address("10.0.0.1")


def model(*, deny: Direction, pod_to_own_node: bool = False) -> tuple[PolicyIndex, RulesetView]:
    ruleset = Ruleset()
    translator = Translator(ruleset, BaseSettings(pod_to_own_node=pod_to_own_node))
    index = PolicyIndex()
    for name, address, local in (("here", "10.0.0.2", True), ("there", "10.1.0.2", False)):
        index.set_endpoint(f"x/{name}", Endpoint(f"x/{name}", "x", (parse_address(address),), local=local))
    index.set_policy("x/deny", NetworkPolicy("x", "deny", rules={deny: ()}))
    translator.apply(index.take())
    return index, RulesetView(ruleset)


def ask(source: str, destination: str, index: PolicyIndex, evidence: Evidence) -> Flow:
    question = Question(source=source, destination=destination, protocol="tcp", port=80)
    return explain(index.cluster, question, evidence)[0]


def test_a_pod_of_another_node_is_judged_by_the_model_alone() -> None:
    index, view = model(deny=Direction.INGRESS)
    egress, ingress = ask("x/here", "x/there", index, Evidence(view=view)).answers
    assert egress.agrees is True
    assert (ingress.allowed, ingress.agrees, ingress.kernel) == (False, None, None)
    assert "judged on the pod's node" in ingress.reason


def test_the_node_reaches_its_pods_and_is_reached_by_egress_policy() -> None:
    index, view = model(deny=Direction.EGRESS)
    evidence = Evidence(view=view, node=(GATEWAY,))
    assert ask("node", "x/here", index, evidence).allowed
    (answer,) = ask("x/here", "node", index, evidence).answers
    assert (answer.allowed, answer.agrees) == (False, True)


def test_a_node_that_is_open_to_its_pods_is_explained_as_such() -> None:
    index, view = model(deny=Direction.EGRESS, pod_to_own_node=True)
    (answer,) = ask("x/here", "node", index, Evidence(view=view, node=(GATEWAY,), node_open=True)).answers
    assert (answer.allowed, answer.agrees) == (True, True)


def test_a_denial_says_which_policy_isolates_and_what_to_add() -> None:
    index, view = model(deny=Direction.INGRESS)
    ingress = ask("10.9.9.9", "x/here", index, Evidence(view=view)).answers[1]
    assert "isolated by x/deny" in ingress.reason
    assert "ingress from 10.9.9.9, port 80/tcp" in ingress.advice


@pytest.mark.parametrize("end", ["x/nobody", "nonsense", "node", "fd00::1"])
def test_an_end_that_is_not_known_is_an_error_that_names_it(end: str) -> None:
    index, view = model(deny=Direction.INGRESS)
    with pytest.raises(QuestionError, match=end):
        ask(end, "x/here", index, Evidence(view=view))
