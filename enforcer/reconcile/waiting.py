"""Attachments whose pod's object has not come yet. For the loop's thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from enforcer.model.objects import Attachment


class WaitingAttachments:
    """The ADDs that wait until the pod of their attachment is known."""

    def __init__(self, knows_pod_of: Callable[[Attachment], bool]) -> None:
        self._knows_pod_of = knows_pod_of
        self._waiting: dict[str, tuple[Attachment, Future[None]]] = {}

    def add(self, attachment: Attachment, known: Future[None]) -> None:
        """Have ``known`` completed at a later ``complete``."""
        self._waiting[attachment.key] = attachment, known

    def remove(self, key: str) -> None:
        """Wait no longer."""
        self._waiting.pop(key, None)

    def complete(self) -> None:
        """Complete those whose pod is known, now that the kernel holds its policy."""
        for key, (attachment, known) in list(self._waiting.items()):
            if self._knows_pod_of(attachment):
                known.set_result(None)
                del self._waiting[key]
