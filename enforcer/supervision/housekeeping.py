"""What the agent looks after beside rules and links: the node's settings, and the runtime's configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import structlog

from cni.plugin import install

_FIRST_PAUSE_SECONDS, _PAUSE_SECONDS = 0.1, 1.0

log = structlog.get_logger()


class Housekeeping:
    """Looks, puts right what is ours, and keeps what is wrong for people, in words. For one thread.

    Args:
        settings: puts settings of the node right, or asks for those that are wrong; in words.
        unready: asks why no pod can be attached now; None if one can.
        conf_dir: where the runtime has its network configurations; None where ours is not written.
        bin_dir: where it has its plugins.

    Attributes:
        settings: what was found of them last.
        problems: what was found of the runtime's configuration last.
        pause: seconds until it is to look again: a node waits for its configuration to become ready.
    """

    def __init__(
        self,
        settings: Callable[[], list[str]],
        unready: Callable[[], str | None],
        *,
        conf_dir: Path | None,
        bin_dir: Path,
    ) -> None:
        self._ask_settings = settings
        self._unready = unready
        self._conf_dir = conf_dir
        self._bin_dir = bin_dir
        self.settings: list[str] = []
        self.problems: list[str] = []
        self.pause = _PAUSE_SECONDS if conf_dir is None else _FIRST_PAUSE_SECONDS

    def look(self) -> None:
        """Look at all of it; what has changed since the last time is logged."""
        if (settings := self._ask_settings()) != self.settings:
            self.settings = settings
            log.warning("node settings changed by another program", settings=settings or "right again")
        if (problems := self._announce()) != self.problems:
            self.problems = problems
            log.warning("node problems changed", problems=problems)

    def _announce(self) -> list[str]:
        """Give the runtime its network configuration, if pods can be attached; what is wrong with it."""
        folder = self._conf_dir
        if folder is None or self._unready() is not None:
            return []
        try:
            if install.install_configuration(folder, self._bin_dir):
                log.info("network configuration written", folder=str(folder))
            self.pause = _PAUSE_SECONDS
            return [
                f"{folder / name}: the runtime takes it before ours; remove it" for name in install.preceding(folder)
            ]
        except OSError as error:
            return [f"the network configuration cannot be written, no pod starts here: {error}"]
