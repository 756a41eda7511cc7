"""The CNI's words, decoded and encoded: requests, network configurations, results of each version, errors. Pure.

Sources: the CNI specification 1.1.0, and 0.3.1, 0.4.0 and 1.0.0 where a version's result differs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from enforcer.model.addresses import Address, Family, Network, family_of, format_address, parse_address

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
_SINCE = {"ADD": "0.3.1", "DEL": "0.3.1", "CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
_CONTAINER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}\Z")
_IFNAME = re.compile(r"[^\s/:]{1,15}\Z")
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}\Z")

INCOMPATIBLE_VERSION, UNKNOWN_CONTAINER, INVALID_ENVIRONMENT = 1, 3, 4
IO_FAILURE, DECODING_FAILURE, INVALID_CONFIGURATION, TRY_AGAIN_LATER = 5, 6, 7, 11
UNAVAILABLE = 50
ADDRESS_FAILURE, LINK_FAILURE, CHECK_FAILURE = 100, 101, 102


class CniError(Exception):
    """A failure for the runtime: a code of the specification (or ours, from 100), what failed, and the way out."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(f"{message}: {details}" if details else message)
        self.code = code
        self.message = message
        self.details = details


class RuntimeConfig(msgspec.Struct, frozen=True):
    """``runtimeConfig``: the capabilities ``ips`` and ``mac``."""

    ips: list[str] | None = None
    mac: str | None = None


class AttachmentId(msgspec.Struct, frozen=True, rename={"container_id": "containerID", "ifname": "ifname"}):
    """An entry of ``cni.dev/valid-attachments``."""

    container_id: str
    ifname: str


class NetConf(msgspec.Struct, frozen=True, rename="camel"):
    """A network configuration (CNI specification, section 1)."""

    cni_version: str = "0.1.0"
    name: str = ""
    type: str = ""
    ipam: dict[str, Any] | None = None
    dns: dict[str, Any] | None = None
    prev_result: dict[str, Any] | None = None
    runtime_config: RuntimeConfig | None = None
    valid_attachments: list[AttachmentId] | None = msgspec.field(name="cni.dev/valid-attachments", default=None)

    @property
    def ipam_type(self) -> str:
        """The IPAM plugin to delegate to; empty for none."""
        return str((self.ipam or {}).get("type") or "")


@dataclass(frozen=True, slots=True)
class Request:
    """What the executable was run with; ``netns`` is a descriptor of CNI_NETNS, None if it could not be opened."""

    command: str
    container_id: str
    ifname: str
    netns_path: str
    netns: int | None
    path: str
    args: Mapping[str, str]
    config: NetConf
    raw_config: bytes
    environment: Mapping[str, str]

    @property
    def pod(self) -> str | None:
        """``namespace/name`` from CNI_ARGS, None without Kubernetes arguments."""
        namespace, name = self.args.get("K8S_POD_NAMESPACE", ""), self.args.get("K8S_POD_NAME", "")
        return f"{namespace}/{name}" if namespace and name else None

    @property
    def _runtime(self) -> RuntimeConfig:
        return self.config.runtime_config or RuntimeConfig()

    @property
    def requested_addresses(self) -> tuple[Address, ...]:
        """The ``ips`` capability, without prefix lengths."""
        try:
            return tuple(parse_address(text.partition("/")[0]) for text in self._runtime.ips or ())
        except ValueError as error:
            raise CniError(INVALID_CONFIGURATION, "runtimeConfig.ips", str(error)) from error

    @property
    def previous_addresses(self) -> set[Address]:
        """The addresses of ``prevResult``."""
        return {address for address, _ in self._previous()}

    @property
    def previous_gateways(self) -> dict[Family, Address]:
        """The gateways of ``prevResult``."""
        return {family_of(gateway): gateway for _, gateway in self._previous() if gateway is not None}

    def _previous(self) -> list[tuple[Address, Address | None]]:
        try:
            return [
                (
                    parse_address(ip["address"].partition("/")[0]),
                    parse_address(ip["gateway"]) if "gateway" in ip else None,
                )
                for ip in (self.config.prev_result or {}).get("ips", [])
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CniError(INVALID_CONFIGURATION, "prevResult is not valid", repr(error)) from error

    @property
    def requested_mac(self) -> bytes | None:
        """The ``mac`` capability."""
        mac = self._runtime.mac
        if not mac:
            return None
        if not _MAC.match(mac) or int(mac[:2], 16) & 1:
            raise CniError(INVALID_CONFIGURATION, "runtimeConfig.mac", f"{mac!r} is not a unicast hardware address")
        return bytes.fromhex(mac.replace(":", ""))


def request(environment: Mapping[str, str], config: bytes, netns: int | None) -> Request:
    """Decode and validate a request.

    Raises:
        CniError: with the specification's code; nothing has been done.
    """
    try:
        conf = msgspec.json.decode(config, type=NetConf)
    except msgspec.ValidationError as error:
        raise CniError(INVALID_CONFIGURATION, "the network configuration is not valid", str(error)) from error
    except msgspec.DecodeError as error:
        raise CniError(DECODING_FAILURE, "the network configuration is not JSON", str(error)) from error
    command = environment.get("CNI_COMMAND", "")
    if command not in _SINCE:
        raise CniError(INVALID_ENVIRONMENT, f"CNI_COMMAND {command!r} is not one of {', '.join(_SINCE)}, VERSION")
    if conf.cni_version not in VERSIONS or conf.cni_version < _SINCE[command]:
        raise CniError(
            INCOMPATIBLE_VERSION,
            f"cniVersion {conf.cni_version!r} cannot be used for {command}",
            f"supported: {', '.join(v for v in VERSIONS if v >= _SINCE[command])}",
        )
    if not conf.name:
        raise CniError(INVALID_CONFIGURATION, "the network configuration has no name")
    container_id, ifname = environment.get("CNI_CONTAINERID", ""), environment.get("CNI_IFNAME", "")
    if command in {"ADD", "CHECK", "DEL"}:
        if not _CONTAINER_ID.match(container_id):
            raise CniError(INVALID_ENVIRONMENT, f"CNI_CONTAINERID {container_id[:80]!r} is not a container id")
        if not _IFNAME.match(ifname) or ifname in {".", ".."} or len(ifname.encode()) > 15:  # noqa: PLR2004
            raise CniError(INVALID_ENVIRONMENT, f"CNI_IFNAME {ifname[:80]!r} is not an interface name")
    return Request(
        command=command,
        container_id=container_id,
        ifname=ifname,
        netns_path=environment.get("CNI_NETNS", ""),
        netns=netns,
        path=environment.get("CNI_PATH", ""),
        args=_args(environment.get("CNI_ARGS", "")),
        config=conf,
        raw_config=config,
        environment=environment,
    )


def _args(text: str) -> dict[str, str]:
    args = {}
    for pair in filter(None, text.split(";")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise CniError(INVALID_ENVIRONMENT, "CNI_ARGS", f"{pair[:80]!r} is not KEY=VALUE")
        args[key] = value
    return args


@dataclass(frozen=True, slots=True)
class Result:
    """What an ADD made; ``gateways`` are by family."""

    port: str
    port_mac: bytes
    ifname: str
    mac: bytes
    netns_path: str
    mtu: int
    addresses: Sequence[Address]
    gateways: Mapping[Family, Address]
    dns: Mapping[str, Any]


def success(result: Result, config: NetConf) -> dict[str, Any]:
    """The result of an ADD in the format of the configuration's version (specification, section 5).

    What an earlier plugin of the chain has made (``prevResult``) stays, before what is ours.
    """
    version = config.cni_version
    earlier = {key: list((config.prev_result or {}).get(key) or ()) for key in ("interfaces", "ips", "routes")}
    place = len(earlier["interfaces"]) + 1
    interfaces: list[dict[str, Any]] = [
        {"name": result.port, "mac": result.port_mac.hex(":")},
        {"name": result.ifname, "mac": result.mac.hex(":"), "sandbox": result.netns_path},
    ]
    if version == "1.1.0":
        for interface in interfaces:
            interface["mtu"] = result.mtu
    ips = []
    for address in result.addresses:
        family = family_of(address)
        ip: dict[str, Any] = {"interface": place, "address": f"{format_address(address)}/{family.bits}"}
        if family in result.gateways:
            ip["gateway"] = format_address(result.gateways[family])
        if version in {"0.3.1", "0.4.0"}:
            ip["version"] = family.label[1]
        ips.append(ip)
    routes = [
        {"dst": str(Network(bytes(family.bits // 8), 0)), "gw": format_address(gateway)}
        for family, gateway in result.gateways.items()
    ]
    return {
        "cniVersion": version,
        "interfaces": earlier["interfaces"] + interfaces,
        "ips": earlier["ips"] + ips,
        "routes": earlier["routes"] + routes,
        "dns": config.dns or result.dns or (config.prev_result or {}).get("dns") or {},
    }


def failure(error: CniError, version: str) -> dict[str, Any]:
    """An error as the runtime reads it (specification, section 5)."""
    version = version if version in VERSIONS else "1.0.0"
    return {"cniVersion": version, "code": error.code, "msg": error.message, "details": error.details}
