"""A directory of manifests as a source: watched by inotify, never polled.

Manifests are files named ``*.yaml``, ``*.yml`` or ``*.json``, in sub-directories too, each of which is read once,
however many links lead there. Names that begin with a dot are passed over: editors' scratch files, ``.git``, and the
hidden directories of a mounted ConfigMap, whose files are read through its ``..data`` link.

What a link leads to is watched where it is; what comes to be outside the directory behind a link that led nowhere is
seen at the next rescan.

One thread watches, reads and hands changes on. A directory is watched before it is listed, so nothing falls between.
A file costs what is in it; what may change many paths at once (a directory, a link, lost events) costs one ``stat`` a
file. A file is not read while someone writes it: at its close, its rename or its removal (see ``unsettled``).
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import structlog
from inotify_simple import Event, INotify, flags

from enforcer.manifests.files import SUFFIXES, ManifestFile, load, signature
from enforcer.manifests.precedence import Claims
from enforcer.manifests.settling import Unsettled
from enforcer.model.changes import Change, Rejection
from enforcer.model.objects import NetworkPolicy
from enforcer.model.sources import SourceStatus

_ENTRY_GONE = flags.DELETE | flags.MOVED_FROM
_ENTRY_NEW = flags.CREATE | flags.MOVED_TO
_SELF_GONE = flags.DELETE_SELF | flags.MOVE_SELF | flags.UNMOUNT
_PARENT_MASK = _ENTRY_GONE | _ENTRY_NEW | flags.ONLYDIR
_DIRECTORY_MASK = (
    flags.MODIFY | flags.CLOSE_WRITE | flags.ATTRIB | _ENTRY_GONE | _ENTRY_NEW | _SELF_GONE | flags.ONLYDIR
)
_TARGET_MASK = flags.MODIFY | flags.CLOSE_WRITE | flags.ATTRIB | flags.DELETE_SELF | flags.MOVE_SELF

log = structlog.get_logger()


class DirectorySource:
    """Hands on what a directory of manifests holds, and then each difference.

    Args:
        directory: the manifests.
        changes: takes differences, in the watcher's thread; called once with all at the start (if there is anything),
            and then once for what arrived together. Must not raise.
        synced: called once, in the watcher's thread, when all that the directory held at the start is handed on.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        directory: Path,
        *,
        changes: Callable[[Sequence[Change]], None],
        synced: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = directory.absolute()
        self._changes = changes
        self._synced = synced
        self._clock = clock
        self._thread: threading.Thread | None = None
        self._inotify: INotify
        self._wake: int = -1
        # What the two sides share, under one condition.
        self._condition = threading.Condition()
        self._requested = self._completed = 0
        self._stopping = self._ended = False
        self._unread: dict[str, None] = {}
        self._rejections: tuple[Rejection, ...] = ()
        # The watcher's own.
        self._claims = Claims()
        self._files: dict[str, ManifestFile] = {}
        self._refused: dict[str, list[Rejection]] = {}
        self._unreadable: dict[str, str] = {}
        self._unsettled = Unsettled(clock)
        self._awaiting: deque[tuple[int, float]] = deque()
        self._links: set[str] = set()
        self._dangling = False
        self._directories: dict[int, str] = {}
        self._targets: dict[int, set[str]] = {}
        self._parent = -1
        self._reported: frozenset[Rejection] = frozenset()

    def start(self) -> None:
        """Begin to watch; the first scan runs in the watcher's thread.

        Raises:
            OSError: the directory is missing, is none, or cannot be listed or watched; the error names it.
            RuntimeError: the source was started before.
        """
        if self._thread is not None:
            raise RuntimeError("a source starts once")
        with os.scandir(self._root):
            self._inotify = INotify()
        try:
            self._directories = {self._inotify.add_watch(self._root, _DIRECTORY_MASK): ""}
        except OSError as error:
            self._inotify.close()
            raise OSError(error.errno, f"cannot be watched: {error.strerror}", str(self._root)) from error
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="manifests", daemon=True)
        self._thread.start()

    def alive(self) -> bool:
        """Whether the watcher's thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """End the watch. No callback is called after this returns; to stop again is no mistake."""
        if self._thread is None:
            return
        with self._condition:
            self._stopping = True
            self._signal()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def rescan(self) -> None:
        """Look at every file again, and return when all that the directory held at the call is handed on.

        Files that have not changed cost a ``stat`` each; one that is being written is left until it is closed, and one
        that was renamed a moment ago is awaited.

        Raises:
            RuntimeError: the source does not run.
        """
        with self._condition:
            if self._thread is None or self._ended:
                raise RuntimeError("the source does not run")
            self._requested += 1
            mine = self._requested
            self._signal()
            self._condition.wait_for(lambda: self._completed >= mine or self._ended)
            if self._completed < mine:
                raise RuntimeError("the source was stopped")

    def catch_up(self, _seconds: float) -> bool:
        """Rescan; a directory is read before this returns, however long that takes."""
        self.rescan()
        return True

    def read_again(self, policies: Collection[str]) -> None:
        """Hand on these policies as they stand; what was read of them is kept here."""
        with self._condition:
            self._unread.update(dict.fromkeys(policies))
            self._signal()

    def rejections(self) -> tuple[Rejection, ...]:
        """What is not enforced as written at present: objects, files (kind ``File``), duplicates."""
        return self._rejections

    def status(self) -> tuple[SourceStatus, ...]:
        """Nothing: a directory is read as soon as it changes."""
        return ()

    def _signal(self) -> None:
        if not self._ended:
            os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        try:
            self._scan(frozenset())
            self._publish()
            self._synced()
            poller = select.poll()
            poller.register(self._inotify.fileno(), select.POLLIN)
            poller.register(self._wake, select.POLLIN)
            while not self._stopping:
                wait = self._unsettled.wait
                poller.poll(None if wait is None else math.ceil(wait * 1000))
                with self._condition:
                    requested = self._requested
                    unread, self._unread = self._unread, {}
                    self._drain_wake()
                self._follow(list(self._inotify.read(timeout=0)), whole=requested > self._completed)
                if unread:
                    self._changes(self._claims.present(NetworkPolicy, unread))
                self._complete(requested)
        finally:
            with self._condition:
                self._ended = True
                self._inotify.close()
                os.close(self._wake)
                self._condition.notify_all()

    def _complete(self, requested: int) -> None:
        """Let rescans return, once no file is awaited any more that had been renamed before."""
        if requested > (self._awaiting[-1][0] if self._awaiting else self._completed):
            self._awaiting.append((requested, self._clock()))
        with self._condition:
            while self._awaiting and not self._unsettled.any_renamed_by(self._awaiting[0][1]):
                self._completed = self._awaiting.popleft()[0]
            self._condition.notify_all()

    def _drain_wake(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return

    def _follow(self, events: Sequence[Event], *, whole: bool) -> None:
        """Bring the state up to the directory's after ``events``; ``whole`` looks at everything anyway."""
        dirty: set[str] = set()
        for event in events:
            whole |= self._note(event, dirty)
        gone = self._unsettled.expired()
        dirty |= gone
        # While a directory cannot be read, only a look at everything tells what is gone from what is not seen.
        if whole or (gone and self._unreadable):
            self._scan(dirty)
        else:
            for path in sorted(dirty):
                if path not in self._unsettled:
                    self._load(path)
        self._publish()

    def _note(self, event: Event, dirty: set[str]) -> bool:
        """Put the files that an event is about into ``dirty``; whether it takes a look at everything."""
        mask, name = event.mask, event.name
        if mask & flags.Q_OVERFLOW:
            self._unsettled.clear()
            return True
        if event.wd == self._parent and name == self._root.name:
            return bool(mask & (_ENTRY_NEW | _ENTRY_GONE))
        if event.wd in self._targets:
            for path in self._targets[event.wd]:
                self._note_file(path, event, dirty)
            # The link may lead to another file now, which is not watched yet.
            return bool(mask & (flags.ATTRIB | _SELF_GONE | flags.IGNORED))
        directory = self._directories.get(event.wd)
        return directory is not None and self._note_entry(f"{directory}{name}", event, dirty)

    def _note_entry(self, path: str, event: Event, dirty: set[str]) -> bool:
        mask, name = event.mask, event.name
        if not name or mask & flags.ISDIR:
            return not name.startswith(".")
        if path in self._links or (mask & _ENTRY_NEW and (self._root / path).is_symlink()):
            self._unsettled.settle(path)
            return True
        if name.endswith(SUFFIXES) and not name.startswith("."):
            self._note_file(path, event, dirty)
        # What appears may be what a link has been leading to.
        return self._dangling and bool(mask & _ENTRY_NEW)

    def _note_file(self, path: str, event: Event, dirty: set[str]) -> None:
        mask = event.mask
        if mask & flags.MODIFY:
            self._unsettled.written(path)
        elif mask & flags.MOVED_FROM:
            self._unsettled.renamed(path, cookie=event.cookie)
        elif mask & (flags.CLOSE_WRITE | flags.MOVED_TO | flags.DELETE | _SELF_GONE):
            self._unsettled.settle(path)
            dirty.add(path)
            if mask & flags.MOVED_TO:
                for renamed in self._unsettled.arrived(event.cookie):
                    dirty.add(renamed)
                    self._inherit(path, renamed)
        elif not mask & flags.CREATE:
            dirty.add(path)
        else:
            self._note_appeared(path, dirty)

    def _note_appeared(self, path: str, dirty: set[str]) -> None:
        """A file has yet to be written and closed, unless it appears complete, as a hard link does."""
        try:
            status = (self._root / path).lstat()
        except OSError:
            dirty.add(path)
            return
        if status.st_nlink > 1:
            self._unsettled.settle(path)
            dirty.add(path)
        elif status.st_size == 0 or self._unsettled.is_held(path):
            self._unsettled.written(path)

    def _scan(self, dirty: frozenset[str] | set[str]) -> None:
        """Watch and list every directory, and load the files that changed, or that are in ``dirty``."""
        self._unreadable = {}
        self._links = set()
        self._dangling = False
        stale = {*self._directories, *self._targets, self._parent}
        self._directories, self._targets = {}, {}
        self._parent = self._watch(self._root.parent, _PARENT_MASK)
        present: set[str] = set()
        for path, mark in self._walk():
            present.add(path)
            last = self._files.get(path)
            if path not in self._unsettled and (last is None or last.signature != mark or path in dirty):
                self._load(path)
        unknown = tuple(self._unreadable)
        for path in [path for path in self._files if path not in present and not path.startswith(unknown)]:
            # It may exist all the same: a new link leads to its directory by a path that comes first.
            if not self._unsettled.is_held(path):
                self._put(path, None)
        self._unsettled.keep_written(present)
        for watch in stale - {*self._directories, *self._targets, self._parent, -1}:
            self._unwatch(watch)

    def _walk(self) -> Iterator[tuple[str, bytes]]:
        """Path and signature of each manifest file; directories that cannot be listed go into ``_unreadable``."""
        seen: set[tuple[int, int]] = set()
        waiting = [""]
        while waiting:
            directory = waiting.pop()
            try:
                status = (self._root / directory).stat()
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                watch = self._watch(self._root / directory, _DIRECTORY_MASK)
                if watch >= 0:
                    self._directories[watch] = directory
                with os.scandir(self._root / directory) as entries:
                    listed = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                if directory and isinstance(error, (FileNotFoundError, NotADirectoryError)):
                    continue
                self._unreadable[directory] = f"cannot be read: {error.strerror or error}"
                continue
            inner = []
            for entry in listed:
                path = f"{directory}{entry.name}"
                is_link = entry.is_symlink()
                if is_link:
                    self._links.add(path)
                if entry.name.startswith("."):
                    continue
                if _is_directory(entry):
                    inner.append(f"{path}/")
                elif entry.name.endswith(SUFFIXES):
                    yield path, self._mark(entry, path, is_link=is_link)
            waiting += reversed(inner)

    def _mark(self, entry: os.DirEntry[str], path: str, *, is_link: bool) -> bytes:
        """A file's signature, none if it has to be tried; what a link leads to is watched as well."""
        if is_link:
            watch = self._watch(self._root / path, _TARGET_MASK)
            if watch >= 0:
                self._targets.setdefault(watch, set()).add(path)
        try:
            return signature(entry.stat())
        except OSError:
            self._dangling |= is_link
            return b""

    def _watch(self, path: Path, mask: int) -> int:
        """The watch on a path, which is the same for the same inode; -1 if there is none."""
        try:
            return int(self._inotify.add_watch(path, mask))
        except OSError as error:
            if not isinstance(error, FileNotFoundError) and path != self._root.parent:
                log.warning(
                    "manifests not watched", hint="changes are seen at the next rescan", path=str(path), error=error
                )
            return -1

    def _unwatch(self, watch: int) -> None:
        try:
            self._inotify.rm_watch(watch)
        except OSError:
            # The kernel drops the watch itself with the inode.
            return

    def _load(self, path: str) -> None:
        self._put(path, load(self._root, path, self._files.get(path)))

    def _inherit(self, path: str, renamed: str) -> None:
        """Let what stands for a renamed manifest stand for its new name, which may be read only after it is written."""
        if (file := self._files.get(renamed)) is not None:
            self._put(path, replace(file, path=path, signature=b"", errors=()))

    def _put(self, path: str, new: ManifestFile | None) -> None:
        old = self._files.pop(path, None)
        self._refused.pop(path, None)
        self._claims.replace(path, old=old.objects if old else (), new=new.objects if new else ())
        if new is not None:
            self._files[path] = new
            refused = new.rejections()
            if refused:
                self._refused[path] = refused

    def _publish(self) -> None:
        """Hand on the differences, after what is rejected is there to be read."""
        found = [Rejection("File", "", path or ".", f"{path or '.'}: {why}") for path, why in self._unreadable.items()]
        for path in sorted(self._refused):
            found += self._refused[path]
        self._rejections = (*found, *self._claims.duplicates())
        for rejection in self._rejections:
            if rejection not in self._reported:
                log.warning(
                    "not enforced as written",
                    kind=rejection.kind,
                    namespace=rejection.namespace,
                    name=rejection.name,
                    reason=rejection.reason,
                )
        self._reported = frozenset(self._rejections)
        changes = self._claims.take()
        if changes:
            self._changes(changes)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is or leads to a directory; a link in a loop does not."""
    try:
        return entry.is_dir()
    except OSError:
        return False
