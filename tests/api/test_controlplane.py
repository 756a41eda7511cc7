"""The API server is the real one: it keeps policies, defaults them, and refuses what is none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.controlplane import ControlPlane
from tests.api.processes import ProgramError


def policy(name: str, cidr: str) -> dict[str, Any]:
    spec = {"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": cidr}}]}]}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name}, "spec": spec}


def test_a_policy_is_read_back_with_its_defaults(control_plane: ControlPlane) -> None:
    written = policy("office", "192.0.2.0/24")
    control_plane.kubectl("apply", "-f", "-", stdin=json.dumps(written))
    read = control_plane.get("networkpolicy", "office")
    assert read["spec"] == written["spec"] | {"policyTypes": ["Ingress"]}


def test_a_policy_with_a_bad_block_is_refused_by_its_field(control_plane: ControlPlane) -> None:
    with pytest.raises(ProgramError, match=r"spec\.ingress\[0\]\.from\[0\]\.ipBlock\.cidr: Invalid value"):
        control_plane.kubectl("apply", "-f", "-", stdin=json.dumps(policy("bad", "192.0.2.0/33")))


def test_a_user_may_do_only_what_rbac_grants(control_plane: ControlPlane) -> None:
    nobody = control_plane.kubeconfig_of("nobody", user="nobody")
    with pytest.raises(ProgramError, match='User "nobody" cannot list resource "networkpolicies"'):
        control_plane.kubectl("--kubeconfig", nobody, "get", "networkpolicies")


def test_a_pod_is_made_without_controllers(control_plane: ControlPlane) -> None:
    control_plane.kubectl("run", "alone", "--image=none")
    assert control_plane.get("pod", "alone")["status"]["phase"] == "Pending"
