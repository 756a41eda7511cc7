"""The agent's configuration file: YAML, typed, every key optional. All of it can be left out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from enforcer.model.addresses import Network


class ConfigError(Exception):
    """The configuration cannot be used; the text names the file, the key and what is wanted."""


class Config(msgspec.Struct, rename="camel", frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a node's operator decides.

    Attributes:
        unknown_pods: what a pod may do that was attached but whose object is not known.
        unknown_pod_wait_seconds: how long a CNI ADD waits for the object of its pod.
        pod_to_own_node: whether a pod's traffic to its own node follows its egress policy, or always passes.
        revoked_connection_mark: the bit of the conntrack mark that says: policy does not allow this established flow.
            Take another one where another program uses that bit; 0 lets established flows go on.
        network: ``bridge`` attaches pods and routes to other nodes; ``none`` leaves that to another pod network, whose
            pods obey policy all the same, and touches no link, route or setting.
        masquerade: whether what pods send out of the cluster gets an address of the node. It needs Node objects, which
            say what the cluster's pod networks are: with ``--pod-cidr`` nothing is masqueraded.
        not_masqueraded: networks outside the cluster that see the pods' own addresses.
        bridge_netfilter: whether to set net.bridge.bridge-nf-call-ip(6)tables to 0, or leave them alone.
        metrics_address: ``host:port`` (``[host]:port`` for IPv6) of /metrics, /livez and /readyz; empty for none.
        log_format: ``json``, ``console``, or ``auto``: console on a terminal.
        log_level: the least severe level that is logged; ``debug`` adds elements.
    """

    unknown_pods: Literal["deny", "allow"] = "deny"
    unknown_pod_wait_seconds: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.5
    pod_to_own_node: Literal["policy", "allow"] = "policy"
    revoked_connection_mark: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)] = 0x02000000
    network: Literal["bridge", "none"] = "bridge"
    masquerade: Literal["enable", "disable"] = "enable"
    not_masqueraded: tuple[str, ...] = ()
    bridge_netfilter: Literal["disable", "leave"] = "disable"
    metrics_address: Annotated[str, msgspec.Meta(pattern=r"^$|^[^:]+:\d+$|^\[.+\]:\d+$")] = ""
    log_format: Literal["auto", "json", "console"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __post_init__(self) -> None:
        if self.revoked_connection_mark & (self.revoked_connection_mark - 1):
            raise ValueError(f"`revokedConnectionMark` must be one bit or 0, got {self.revoked_connection_mark:#x}")
        try:
            _ = self.networks_not_masqueraded
        except ValueError as error:
            raise ValueError(f"`notMasqueraded`: {error}") from error

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
    try:
        return msgspec.yaml.decode(path.read_bytes() or b"{}", type=Config)
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path}: {error}") from error
