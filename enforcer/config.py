"""The agent's configuration file: YAML, typed, every key optional. All of it can be left out."""

from __future__ import annotations

import difflib
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from enforcer.manifests.documents import read_yaml
from enforcer.model.addresses import Network
from enforcer.model.marks import DEFAULT_MASK, ConnectionMark
from enforcer.model.tunnel import Vxlan
from enforcer.policy.budget import Cost, Limits

_LAST_PORT = (1 << 16) - 1


class ConfigError(Exception):
    """The configuration cannot be used; the text names the file, every key that is wrong, and what is wanted."""


class Config(msgspec.Struct, rename="camel", frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a node's operator decides; the keys of the file are the names in camel case."""

    network: Annotated[
        Literal["bridge", "none"],
        Meta(
            description="`bridge` attaches pods and routes to other nodes; `none` leaves that to another pod network, "
            "whose pods obey policy all the same, and touches no link, route or setting."
        ),
    ] = "bridge"
    routing: Annotated[
        Literal["auto", "direct", "vxlan"],
        Meta(
            description="How pods of other nodes are reached: `auto` is directly where nodes are on one segment and "
            "by a VXLAN tunnel where not, `direct` never by the tunnel, `vxlan` always. The pods' MTU is that of the "
            "uplink, less what the tunnel adds unless it is `direct`. The same on every node.",
        ),
    ] = "auto"
    vxlan_id: Annotated[
        int,
        Meta(
            ge=1,
            lt=1 << 24,
            description="The tunnel's network identifier (VNI), the same on every node. Flannel's is 1, Calico's and "
            "Docker's begin at 4096: another one may share the port.",
        ),
    ] = 84
    vxlan_port: Annotated[
        int,
        Meta(
            ge=1,
            lt=1 << 16,
            description="The tunnel's UDP port, the same on every node: that of RFC 7348, which firewalls and network "
            "cards know. Take another one where a link of mode `external` (Cilium's) has it.",
        ),
    ] = 4789
    masquerade: Annotated[
        Literal["enable", "disable"],
        Meta(
            description="Whether what pods send out of the cluster gets an address of the node. It needs Node objects, "
            "which say what the cluster's pod networks are: with `--pod-cidr` nothing is masqueraded."
        ),
    ] = "enable"
    not_masqueraded: Annotated[
        tuple[str, ...], Meta(description="Networks outside the cluster that see the pods' own addresses, as CIDRs.")
    ] = ()
    pod_to_own_node: Annotated[
        Literal["policy", "allow"],
        Meta(description="Whether a pod's traffic to its own node follows its egress policy, or always passes."),
    ] = "policy"
    unknown_pods: Annotated[
        Literal["deny", "allow"],
        Meta(
            description="What a pod may do that was attached but whose object is not known; with `network: none`, what "
            "an address of this node's podCIDRs may do that is no known pod's."
        ),
    ] = "deny"
    unknown_pod_wait_seconds: Annotated[
        float, Meta(ge=0, le=10, description="How long a CNI ADD waits for the object of its pod.")
    ] = 0.5
    connection_mark_mask: Annotated[
        int,
        Meta(
            ge=0,
            lt=1 << 32,
            description="The bits of the connection mark that say which connections were judged: one run of at least 5 "
            "(the default is 0xff000000). Change it where another program uses one of them. The more bits, the less "
            "often stamps have to be cleared.",
        ),
    ] = DEFAULT_MASK
    policy_rules: Annotated[
        int,
        Meta(
            ge=1,
            lt=1 << 32,
            description="How many rules of one policy a packet may meet. A policy that needs more is rejected, and "
            "its pods are closed. A denied packet may meet each of them: a thousand cost it 0.1 ms.",
        ),
    ] = 800
    policy_sets: Annotated[
        int,
        Meta(ge=1, lt=1 << 32, description="How many sets one policy may need: two a selector, one for many blocks."),
    ] = 800
    policy_elements: Annotated[
        int,
        Meta(
            ge=1,
            lt=1 << 32,
            description="How many set elements one policy may need: ports, ranges of ports, and what is left of "
            "ipBlocks with excepts. Pods do not count.",
        ),
    ] = 10_000
    policy_bytes: Annotated[
        int,
        Meta(
            ge=1,
            lt=1 << 32,
            description="How many bytes the selectors and port names of one policy may have.",
        ),
    ] = 256 << 10
    namespace_rules: Annotated[
        int,
        Meta(
            ge=1,
            lt=1 << 32,
            description="How many rules all policies of a namespace may need together. Policies are counted in the "
            "order of their names, and those after the limit are rejected. Each counts ten for itself.",
        ),
    ] = 4_000
    namespace_sets: Annotated[
        int, Meta(ge=1, lt=1 << 32, description="How many sets all policies of a namespace may need together.")
    ] = 2_000
    namespace_elements: Annotated[
        int,
        Meta(
            ge=1,
            lt=1 << 32,
            description="How many set elements all policies of a namespace may need together.",
        ),
    ] = 20_000
    namespace_bytes: Annotated[
        int,
        Meta(
            ge=1,
            lt=1 << 32,
            description="How many bytes the selectors and port names of all policies of a namespace may have together.",
        ),
    ] = 2 << 20
    bridge_netfilter: Annotated[
        Literal["disable", "leave"],
        Meta(
            description="Whether to set net.bridge.bridge-nf-call-iptables and -ip6tables to 0, or leave them alone. "
            "With `network: none` they are left alone, and must be 1 where the other pod network has a bridge."
        ),
    ] = "disable"
    metrics_address: Annotated[
        str,
        Meta(
            pattern=r"^$|^[^:]+:\d+$|^\[.+\]:\d+$",
            description="`host:port` (`[host]:port` for IPv6) of /metrics, /livez and /readyz; empty for none.",
        ),
    ] = ""
    log_format: Annotated[
        Literal["auto", "json", "console"], Meta(description="`auto` is `console` on a terminal, else `json`.")
    ] = "auto"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="The least severe level that is logged; `debug` adds elements of sets."),
    ] = "info"

    def mistakes(self) -> list[str]:
        """What is wrong although each value is of its type."""
        found = []
        try:
            ConnectionMark(self.connection_mark_mask)
        except ValueError as error:
            found.append(f"`connectionMarkMask`: {error}")
        if self.metrics_address and int(self.metrics_address.rpartition(":")[2]) > _LAST_PORT:
            found.append(f"`metricsAddress`: a port is at most {_LAST_PORT}, got `{self.metrics_address}`")
        for text in self.not_masqueraded:
            try:
                Network.parse(text)
            except ValueError as error:
                found.append(f"`notMasqueraded`: {error}")
        return found

    @property
    def limits(self) -> Limits:
        """What a policy and a namespace may need."""
        return Limits(
            policy=Cost(self.policy_rules, self.policy_sets, self.policy_elements, self.policy_bytes),
            namespace=Cost(self.namespace_rules, self.namespace_sets, self.namespace_elements, self.namespace_bytes),
        )

    @property
    def tunnel(self) -> Vxlan:
        """``vxlan_id`` and ``vxlan_port``."""
        return Vxlan(self.vxlan_id, self.vxlan_port)

    @property
    def networks_not_masqueraded(self) -> tuple[Network, ...]:
        """``not_masqueraded`` as networks."""
        return tuple(map(Network.parse, self.not_masqueraded))


def load(path: Path | None) -> Config:
    """Read a configuration file; None is all defaults.

    Raises:
        ConfigError: the file cannot be read, or says something that is not understood.
    """
    if path is None:
        return Config()
    fields = {field.encode_name: field for field in msgspec.structs.fields(Config)}
    entries = _entries()
    mistakes, values = [], {}
    for key, value in _read(path).items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            mistakes.append(f"`{key}`: there is no such key" + (f"; is it `{near[0]}`?" if near else ""))
            continue
        try:
            values[fields[key].name] = msgspec.convert(value, fields[key].type)
        except msgspec.ValidationError as error:
            wanted = _allowed(entries[key]) or entries[key]["description"]
            mistakes.append(f"`{key}`: {error}. {wanted}")
    config = Config(**values)
    if mistakes := [*mistakes, *config.mistakes()]:
        raise ConfigError("\n".join([f"{path} cannot be used:", *(f"  {mistake}" for mistake in mistakes)]))
    return config


def _read(path: Path) -> dict[str, Any]:
    """The file's one mapping of YAML, read as Kubernetes reads it; empty where there is none."""
    try:
        documents = read_yaml(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split()).replace('in "<unicode string>",', "at")
        raise ConfigError(f"{path} is no YAML: {reason}") from error
    content = {} if documents in ([], [None]) else documents[0]
    if len(documents) > 1 or not isinstance(content, dict):
        raise ConfigError(f"{path}: must be one mapping of keys to values (`drawbridge config` prints them)")
    return content


def reference() -> str:
    """A configuration file with every key, what it means, what it may be, and its default."""
    parts = []
    for key, entry in _entries().items():
        text = " ".join(filter(None, (entry["description"], _allowed(entry))))
        comment = textwrap.wrap(text, width=96, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
        parts.append("\n".join([*comment, msgspec.yaml.encode({key: entry["default"]}).decode().rstrip()]))
    return "\n\n".join(parts) + "\n"


def _entries() -> dict[str, dict[str, Any]]:
    """The schema of each key."""
    (schema,) = msgspec.json.schema(Config)["$defs"].values()
    entries: dict[str, dict[str, Any]] = schema["properties"]
    return entries


def _allowed(entry: dict[str, Any]) -> str:
    """The values that a key takes, in words."""
    if "enum" in entry:
        return f"One of: {', '.join(entry['enum'])}."
    if "minimum" in entry:
        greatest = entry["maximum"] if "maximum" in entry else entry["exclusiveMaximum"] - 1
        return f"From {entry['minimum']} to {greatest}."
    return ""
