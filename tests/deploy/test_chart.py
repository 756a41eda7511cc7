"""deploy/: the manifest, the kustomize base and the Helm chart say the same, of the version that this is."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from enforcer.config import Config, load
from tests.api.processes import ProgramError, run
from tests.tools.build import binary

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "chart"
SCHEMA = CHART / "values.schema.json"

Objects = dict[tuple[str, str], Any]


def kustomize(folder: Path) -> str:
    return run(binary("kubectl"), "kustomize", folder)


def template(*words: str | Path) -> str:
    return run(binary("helm"), "template", "drawbridge", CHART, "--namespace=kube-system", *words)


def objects(documents: str) -> Objects:
    """Objects by kind and name; the hash of the ConfigMap's content is another in the chart than in kustomize."""
    without_hash = re.sub(r"\bdrawbridge-config-[0-9a-z]{10}\b", "drawbridge-config-HASH", documents)
    found = [document for document in yaml.safe_load_all(without_hash) if document]
    return {(item["kind"], item["metadata"]["name"]): item for item in found}


def config(*words: str | Path) -> tuple[str, str]:
    """The name of the chart's ConfigMap, and config.yaml."""
    (found,) = (item for item in yaml.safe_load_all(template(*words)) if item["kind"] == "ConfigMap")
    return found["metadata"]["name"], found["data"]["config.yaml"]


def daemonset(*words: str | Path) -> Any:
    """The specification of the chart's pods."""
    return objects(template(*words))["DaemonSet", "drawbridge"]["spec"]["template"]["spec"]


def test_the_manifest_is_what_the_kustomize_base_renders() -> None:
    assert (DEPLOY / "drawbridge.yaml").read_text() == kustomize(DEPLOY / "base")


def test_the_chart_gives_the_objects_of_the_kustomize_base() -> None:
    assert objects(template()) == objects(kustomize(DEPLOY / "base"))


def test_no_node_and_no_pod_belongs_to_two_daemonsets_of_the_migration() -> None:
    found = [item for (kind, _), item in objects(kustomize(DEPLOY / "migration")).items() if kind == "DaemonSet"]
    specs = {item["metadata"]["name"]: item["spec"] for item in found}
    assert {name: spec["template"]["spec"]["nodeSelector"]["drawbridge"] for name, spec in specs.items()} == {
        "drawbridge-policy-only": "policy-only",
        "drawbridge": "bridge",
        "drawbridge-uninstall": "uninstall",
    }
    for name, spec in specs.items():
        own = {"app.kubernetes.io/name": name}
        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"] == own


def test_policy_only_differs_from_the_base_by_one_key() -> None:
    base, overlay = (
        yaml.safe_load((DEPLOY / folder / "config.yaml").read_text()) for folder in ("base", "migration/policy-only")
    )
    assert overlay == base | {"network": "none"}


def test_the_chart_with_a_pod_monitor_gives_those_of_the_base_with_the_component(tmp_path: Path) -> None:
    base, component = (os.path.relpath(DEPLOY / name, tmp_path.resolve()) for name in ("base", "podmonitor"))
    (tmp_path / "kustomization.yaml").write_text(f"resources: [{base}]\ncomponents: [{component}]\n")
    wanted = objects(kustomize(tmp_path))
    assert ("PodMonitor", "drawbridge") in wanted
    assert objects(template("--set=podMonitor.enabled=true")) == wanted


def test_the_pod_monitor_names_a_port_of_the_agent_and_the_agent_listens_there_on_every_address() -> None:
    """The Prometheus operator keeps only targets whose container declares the port."""
    words = ("--set=podMonitor.enabled=true", "--set=config.metricsAddress=[::1]:9000")
    monitor = objects(template(*words))["PodMonitor", "drawbridge"]
    (agent,) = daemonset(*words)["containers"]
    assert agent["ports"] == [{"name": "metrics", "containerPort": 9000}]
    assert [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]
    assert yaml.safe_load(config(*words)[1])["metricsAddress"] == "[::]:9000"
    assert agent["readinessProbe"]["httpGet"]["host"] == "127.0.0.1"


@pytest.mark.parametrize("monitor", ["false", "true"])
def test_helm_finds_no_fault_with_the_chart(monitor: str) -> None:
    run(binary("helm"), "lint", "--strict", CHART, f"--set=podMonitor.enabled={monitor}")


def test_the_chart_and_its_image_have_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)
    images = re.findall(r"image: (.*)", kustomize(DEPLOY / "migration"))
    assert set(images) == {f"localhost/drawbridge:{version}"}


def test_the_chart_takes_the_configuration_that_the_agent_takes() -> None:
    current = json.dumps(msgspec.json.schema(Config)["$defs"], indent=2)
    found = json.loads(SCHEMA.read_text())["$defs"]
    assert found == json.loads(current), f"{SCHEMA} is not current; its $defs are to be:\n{current}"


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("config.networking=none", "'/config': additional properties 'networking' not allowed"),
        ("config.masquerade=7", "'/config/masquerade': value must be one of 'disable', 'enable'"),
        ("config.metricsAddress=", "'/config/metricsAddress': minLength"),
        ("config.metricsAddress=null", "'/config': missing property 'metricsAddress'"),
        ("podmonitor.enabled=true", "additional properties 'podmonitor' not allowed"),
        ("image.tags=next", "'/image': additional properties 'tags' not allowed"),
    ],
)
def test_a_mistake_in_the_values_is_refused_by_name(mistake: str, said: str) -> None:
    with pytest.raises(ProgramError, match=re.escape(said)):
        template(f"--set={mistake}")


def test_every_key_of_the_configuration_reaches_the_agent_as_it_was_written(tmp_path: Path) -> None:
    written: dict[str, Any] = {
        "network": "none",
        "routing": "vxlan",
        "vxlanId": (1 << 24) - 1,
        "vxlanPort": 8472,
        "masquerade": "disable",
        "notMasqueraded": ["192.0.2.0/24", "2001:db8::/32"],
        "podToOwnNode": "allow",
        "unknownPods": "allow",
        "unknownPodWaitSeconds": 2.25,
        "connectionMarkMask": 0xFFF00000,
        "policyRules": 1,
        "policySets": 7,
        "policyElements": 2,
        "policyBytes": 3,
        "namespaceRules": 4,
        "namespaceSets": 8,
        "namespaceElements": 5,
        "namespaceBytes": 6,
        "bridgeNetfilter": "leave",
        "metricsAddress": "[::1]:9470",
        "logFormat": "console",
        "logLevel": "debug",
    }
    assert set(written) == {field.encode_name for field in msgspec.structs.fields(Config)}
    values, rendered = tmp_path / "values.yaml", tmp_path / "config.yaml"
    values.write_text(yaml.safe_dump({"config": written}))
    rendered.write_text(config(f"--values={values}")[1])
    assert load(rendered) == msgspec.convert(written, Config)


def test_another_configuration_has_another_name_that_the_daemonset_mounts() -> None:
    changed = ("--set=config.logLevel=debug",)
    assert config(*changed)[0] != config()[0]
    documents = list(yaml.safe_load_all(template(*changed)))
    (pods,) = (item["spec"]["template"]["spec"] for item in documents if item["kind"] == "DaemonSet")
    (volume,) = (volume for volume in pods["volumes"] if volume["name"] == "config")
    assert volume["configMap"]["name"] == config(*changed)[0]


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("127.0.0.1:9000", "127.0.0.1", 9000),
        ("0.0.0.0:9000", "127.0.0.1", 9000),
        ("[::]:9000", "127.0.0.1", 9000),
        ("[::1]:9000", "::1", 9000),
        ("localhost:9000", "localhost", 9000),
    ],
)
def test_probes_ask_where_the_agent_listens(address: str, host: str, port: int) -> None:
    (agent,) = daemonset(f"--set=config.metricsAddress={address}")["containers"]
    for probe in ("livenessProbe", "readinessProbe"):
        assert agent[probe]["httpGet"] | {"path": ""} == {"host": host, "port": port, "path": ""}


def test_values_go_to_both_containers_or_to_the_pod(tmp_path: Path) -> None:
    values = {
        "image": {"repository": "r/d", "tag": "t", "pullPolicy": "Never", "pullSecrets": [{"name": "s"}]},
        "resources": {"requests": {"cpu": "70m"}, "limits": {"memory": "1Gi"}},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "nodeSelector": {"b": "c"},
        "priorityClassName": "p",
        "extraEnv": [{"name": "KUBERNETES_SERVICE_HOST", "value": "192.0.2.1"}],
    }
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values))
    pods = daemonset(f"--values={file}")
    for container in (*pods["initContainers"], *pods["containers"]):
        assert (container["image"], container["imagePullPolicy"]) == ("r/d:t", "Never")
        assert container["resources"] == {"requests": {"cpu": "70m", "memory": "100Mi"}, "limits": {"memory": "1Gi"}}
    assert pods["imagePullSecrets"] == [{"name": "s"}]
    assert pods["tolerations"] == [{"key": "a", "operator": "Exists"}]
    assert pods["nodeSelector"] == {"kubernetes.io/os": "linux", "b": "c"}
    assert pods["priorityClassName"] == "p"
    assert pods["containers"][0]["env"][-1] == {"name": "KUBERNETES_SERVICE_HOST", "value": "192.0.2.1"}
