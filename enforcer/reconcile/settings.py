"""What a node's operator decides of the loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from enforcer.policy.budget import Limits
from enforcer.translate.base import BaseSettings


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one node.

    Attributes:
        node: this node's name.
        unknown_pods_allowed: whether an attached pod whose object is not known may send and receive.
        unknown_pod_wait: how long an ADD waits for a pod's object, in seconds.
        state_folder: keeps counts over a restart; None keeps none.
    """

    node: str
    unknown_pods_allowed: bool = False
    unknown_pod_wait: float = 0.5
    base: BaseSettings = field(default_factory=BaseSettings)
    limits: Limits = field(default_factory=Limits)
    state_folder: Path | None = None
