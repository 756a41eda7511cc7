"""The API server's rules for names, labels and ports, as pure predicates and reasons.

Names and ports come from ``k8s.io/apimachinery/pkg/util/validation``. What passes here holds no character that means
something to nft, so a name may go into a ruleset as it is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from enforcer.model.addresses import Address, Network, parse_address
from enforcer.model.selectors import Labels

MAX_PORT = 65535
_MAX_LABEL = 63
_MAX_SUBDOMAIN = 253
_MAX_PORT_NAME = 15
_MAX_SHOWN = 80
_MAX_SHARED = 4096

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?").fullmatch
_DNS_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*").fullmatch
_QUALIFIED_NAME = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]").fullmatch
_LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?").fullmatch
_IPV4_MAPPED = bytes(10) + b"\xff\xff"
_PORT_NAME = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]*[a-z0-9])?").fullmatch

T = TypeVar("T")


def shown(value: object) -> str:
    """A value of a manifest for a reason: quoted, control characters escaped, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def is_dns_label(text: str) -> bool:
    """RFC 1123 label, at most 63 characters: the name of a namespace."""
    return len(text) <= _MAX_LABEL and _DNS_LABEL(text) is not None


def is_dns_subdomain(text: str) -> bool:
    """RFC 1123 subdomain, at most 253 characters: the name of a pod, a node or a policy."""
    return len(text) <= _MAX_SUBDOMAIN and _DNS_SUBDOMAIN(text) is not None


def is_port_name(text: str) -> bool:
    """IANA service name: at most 15 of ``[a-z0-9-]``, one letter at least, no hyphen at an end or beside another."""
    return len(text) <= _MAX_PORT_NAME and _PORT_NAME(text) is not None


def is_label_key(text: str) -> bool:
    """A qualified name: ``name`` (at most 63 characters) or ``prefix/name`` with a DNS subdomain before the slash."""
    prefix, slash, name = text.rpartition("/")
    return len(name) <= _MAX_LABEL and _QUALIFIED_NAME(name) is not None and (not slash or is_dns_subdomain(prefix))


def is_label_value(text: str) -> bool:
    """Empty, or at most 63 of ``[A-Za-z0-9._-]`` that begin and end with a letter or a digit."""
    return len(text) <= _MAX_LABEL and _LABEL_VALUE(text) is not None


def read_address(text: str) -> Address:
    """An address that a packet can carry.

    Raises:
        ValueError: ``text`` is no address, or an IPv4 address in the clothes of IPv6: no packet carries one.
    """
    address = parse_address(text)
    if address.startswith(_IPV4_MAPPED):
        raise ValueError(f"{text!r} is an IPv4-mapped IPv6 address")
    return address


def read_network(text: str) -> Network:
    """A CIDR of addresses that a packet can carry.

    Raises:
        ValueError: ``text`` is no CIDR, or one of IPv4-mapped IPv6 addresses, which stand for IPv4 elsewhere.
    """
    network = Network.parse(text)
    if network.first.startswith(_IPV4_MAPPED):
        raise ValueError(f"{text!r} is of IPv4-mapped IPv6 addresses")
    return network


def label_errors(labels: Mapping[str, str], path: str) -> Iterator[str]:
    """What the API server has against ``labels``, each reason with its path under ``path``."""
    for key, value in labels.items():
        if not is_label_key(key):
            yield f"{path}: {shown(key)} is no label key"
        if not is_label_value(value):
            yield f"{path}[{shown(key)}]: {shown(value)} is no label value"


class Shared:
    """Valid labels, one mapping for all objects that have equal ones.

    The pods of a Deployment have equal labels, so this saves both the mapping and its validation. Bounded: past 4,096
    different ones it starts anew, and only sharing is lost.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[str, str], ...], Labels] = {}

    def labels(self, labels: dict[str, str], path: str, errors: list[str]) -> Labels:
        """The shared equal of ``labels``; reasons against them are added to ``errors``."""
        identity = tuple(labels.items())
        known = self._known.get(identity)
        if known is None:
            refused = list(label_errors(labels, path))
            if refused:
                errors += refused
                return labels
            known = {sys.intern(key): sys.intern(value) for key, value in identity}
            if len(self._known) >= _MAX_SHARED:
                self._known.clear()
            self._known[tuple(known.items())] = known
        return known


def checked(text: str | None, valid: Callable[[str], bool], *, path: str, noun: str, errors: list[str]) -> str:
    """``text`` where it is valid (None counts as empty); else a reason is added to ``errors``."""
    if not text:
        errors.append(f"{path}: must be given")
    elif not valid(text):
        errors.append(f"{path}: {shown(text)} is no {noun}")
    return text or ""
