"""The directory as a source: what it hands on is what a fresh look at the directory would."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from inotify_simple import Event, INotify, flags

from enforcer.manifests import files
from enforcer.manifests.directory import DirectorySource
from enforcer.manifests.settling import Unsettled
from enforcer.model.changes import Change, Rejection
from enforcer.model.objects import Direction
from enforcer.model.selectors import EVERYTHING
from tests.support.directory import SECONDS, View, pod, policy, replace


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "manifests").mkdir()
    return tmp_path / "manifests"


@pytest.fixture
def view(root: Path) -> Iterator[View]:
    view = View(root)
    yield view
    view.source.stop()


def test_all_that_is_there_at_the_start_is_handed_on_at_once_and_then_it_is_synced(root: Path, view: View) -> None:
    (root / "a.yaml").write_text(pod("a") + "---\n" + pod("b"))
    (root / "sub/deep").mkdir(parents=True)
    (root / "sub/deep/c.yml").write_text(pod("c"))
    (root / "sub/d.json").write_text('{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "d"}}')
    (root / "notes.txt").write_text(pod("no"))
    (root / ".hidden.yaml").write_text(pod("no"))
    (root / ".git").mkdir()
    (root / ".git/x.yaml").write_text(pod("no"))
    view.started()
    assert view.batches == [["Pod default/a", "Pod default/b", "Pod default/c", "Pod default/d"]]
    assert view.source.rejections() == ()


def test_an_empty_directory_is_synced(view: View) -> None:
    assert view.started().batches == []


def test_a_file_that_is_written_replaced_renamed_or_removed_is_followed(root: Path, view: View) -> None:
    view.started()
    (root / "a.yaml").write_text(pod("a"))
    view.until_pods("a")
    replace(root / "a.yaml", pod("b"))
    view.until_pods("b")
    (root / "a.yaml").rename(root / "a.txt")
    view.until_pods()
    (root / "a.txt").rename(root / "b.yml")
    view.until_pods("b")
    (root / "b.yml").unlink()
    view.until_pods()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is renamed is awaited for longer than any test takes."""
    monkeypatch.setattr("enforcer.manifests.settling.HELD_SECONDS", 10 * SECONDS)


@pytest.mark.usefixtures("held")
def test_an_editor_that_renames_a_file_before_it_writes_it_anew_removes_nothing(root: Path, view: View) -> None:
    path = root / "web.yaml"
    path.write_text(policy("web", port=80))
    view.started()
    path.rename(root / "web.yaml~")
    # Its event is heard, and seen through, before the editor goes on.
    (root / "a.yaml").write_text(pod("a"))
    view.until_pods("a")
    with path.open("w") as file:
        view.source.rescan()
        file.write(policy("web", port=81))
        file.flush()
        view.source.rescan()
        assert view.batches == [["NetworkPolicy shop/web"], ["Pod default/a"]]
    (root / "web.yaml~").unlink()
    view.source.rescan()
    assert view.batches[2:] == [["NetworkPolicy shop/web"]]
    assert view.policy("shop/web").rules[Direction.INGRESS][0].ports[0].port == 81


def test_a_rescan_sees_that_a_file_was_renamed_and_does_not_come_back(root: Path, view: View) -> None:
    (root / "a.yaml").write_text(pod("a"))
    view.started()
    (root / "a.yaml").rename(root / "a.yaml.off")
    view.source.rescan()
    assert view.pods == set()


@pytest.mark.usefixtures("held")
def test_a_look_at_everything_awaits_a_renamed_file_too(root: Path, view: View) -> None:
    (root / "a.yaml").write_text(pod("a"))
    view.started()
    (root / "a.yaml").rename(root / "a.yaml~")
    (root / "sub").mkdir()
    (root / "sub/b.yaml").write_text(pod("b"))
    view.until_pods("a", "b")


@pytest.mark.usefixtures("held")
def test_a_file_that_becomes_another_manifest_is_not_awaited(root: Path, view: View) -> None:
    (root / "a.yaml").write_text(pod("a", uid="1"))
    view.started()
    (root / "a.yaml").rename(root / "b.yaml")
    (root / "b.yaml").write_text(pod("a", uid="2"))
    view.until(lambda: view.uid("a") == "2")


def test_a_manifest_that_is_written_right_after_a_rename_keeps_its_state_meanwhile(root: Path, view: View) -> None:
    (root / "a.yaml").write_text(pod("a"))
    view.started()
    take, entered, leave = view.source._changes, threading.Event(), threading.Event()

    def hold(changes: Sequence[Change]) -> None:
        entered.set()
        assert leave.wait(SECONDS)
        take(changes)

    # The rename and the write are heard of together.
    view.source._changes = hold
    (root / "c.yaml").write_text(pod("c"))
    assert entered.wait(SECONDS)
    (root / "a.yaml").rename(root / "b.yaml")
    with (root / "b.yaml").open("w") as file:
        leave.set()
        view.source.rescan()
        assert view.pods == {"a", "c"}
        file.write(pod("b"))
    view.until_pods("b", "c")


def test_a_file_that_was_renamed_as_its_directory_went_keeps_its_state(
    root: Path, view: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expired, given_up = Unsettled.expired, threading.Event()

    def seen(unsettled: Unsettled) -> set[str]:
        gone = expired(unsettled)
        if gone:
            given_up.set()
        return gone

    monkeypatch.setattr(Unsettled, "expired", seen)
    (root / "a.yaml").write_text(pod("a"))
    view.started()
    (root / "a.yaml").rename(root / "a.yaml~")
    root.rename(tmp_path / "away")
    assert given_up.wait(SECONDS)
    view.source.rescan()
    assert view.pods == {"a"}


def test_a_hard_link_appears_complete(root: Path, view: View) -> None:
    (root / "a.txt").write_text(pod("a"))
    view.started()
    os.link(root / "a.txt", root / "a.yaml")
    view.until_pods("a")


def test_sub_directories_made_moved_in_moved_about_and_removed_are_followed(
    root: Path, view: View, tmp_path: Path
) -> None:
    view.started()
    (root / "one/two").mkdir(parents=True)
    (root / "one/two/a.yaml").write_text(pod("a"))
    view.until_pods("a")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "in").mkdir(parents=True)
    (elsewhere / "in/b.yaml").write_text(pod("b"))
    elsewhere.rename(root / "three")
    view.until_pods("a", "b")
    (root / "three").rename(root / "one/four")
    view.source.rescan()
    (root / "one/four/in/c.yaml").write_text(pod("c"))
    view.until_pods("a", "b", "c")
    (root / "one").rename(elsewhere)
    view.until_pods()
    (elsewhere / "two/a.yaml").write_text(pod("d"))
    view.source.rescan()
    assert view.pods == set()


def test_a_change_costs_only_its_file(root: Path, view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (root / f"{name}.yaml").write_text(pod(name))
    view.started()
    loaded: list[str] = []

    def recorded(root: Path, path: str, last: files.ManifestFile | None) -> files.ManifestFile | None:
        loaded.append(path)
        return files.load(root, path, last)

    monkeypatch.setattr("enforcer.manifests.directory.load", recorded)
    replace(root / "b.yaml", pod("b", uid="2"))
    view.until(lambda: view.uid("b") == "2")
    view.source.rescan()
    assert loaded == ["b.yaml"]
    assert view.batches[1:] == [["Pod default/b"]]


def test_only_the_documents_that_differ_are_handed_on(root: Path, view: View) -> None:
    (root / "a.yaml").write_text("---\n".join(map(pod, "abc")))
    view.started()
    replace(root / "a.yaml", "---\n".join([pod("a"), pod("b", uid="2"), "# a note\n" + pod("c")]))
    view.source.rescan()
    replace(root / "a.yaml", "---\n".join([pod("new"), pod("a"), pod("b", uid="2"), pod("c")]))
    view.source.rescan()
    assert view.batches[1:] == [["Pod default/b"], ["Pod default/new"]]


def test_a_file_is_not_read_while_it_is_being_written(root: Path, view: View) -> None:
    (root / "a.yaml").write_text(pod("a") + "---\n" + pod("b"))
    view.started()
    with (root / "a.yaml").open("w") as file:
        file.write(pod("a"))
        file.flush()
        (root / "a.yaml").chmod(0o600)
        (root / "d.yaml").write_text(pod("d"))
        view.until_pods("a", "b", "d")
        view.source.rescan()
        assert view.pods == {"a", "b", "d"}
        file.write("---\n" + pod("c"))
    view.until_pods("a", "c", "d")


def test_a_file_whose_directory_goes_while_it_is_written_stops_no_other_of_its_name(
    root: Path, view: View, tmp_path: Path
) -> None:
    (root / "sub").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.yaml").write_text(pod("other"))
    view.started()
    with (root / "sub/a.yaml").open("w") as file:
        file.write(pod("a"))
        file.flush()
        view.source.rescan()
        (root / "sub").rename(tmp_path / "away")
        view.source.rescan()
        (tmp_path / "other").rename(root / "sub")
        view.until_pods("other")


def test_a_new_file_is_not_read_before_it_is_closed(root: Path, view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    read = INotify.read

    def without_modify(watch: INotify, *, timeout: int) -> list[Event]:
        return [event for event in read(watch, timeout=timeout) if not event.mask & flags.MODIFY]

    monkeypatch.setattr(INotify, "read", without_modify)
    view.started()
    with (root / "a.yaml").open("w") as file:
        file.write(pod("a"))
        file.flush()
        (root / "b.yaml").write_text(pod("b"))
        view.until_pods("b")
        file.write("---\n" + pod("c"))
    view.until_pods("a", "b", "c")


def test_two_writes_that_no_stat_can_tell_apart_are_both_seen(
    root: Path, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    for holder in ("files", "directory"):
        monkeypatch.setattr(f"enforcer.manifests.{holder}.signature", lambda _: b"same")
    (root / "a.yaml").write_text(pod("a", uid="1"))
    view.started()
    (root / "a.yaml").write_text(pod("a", uid="2"))
    view.source.rescan()
    assert view.uid("a") == "2"


def test_a_file_that_does_not_parse_keeps_its_last_good_state_and_names_the_line(root: Path, view: View) -> None:
    (root / "policies").mkdir()
    path = root / "policies/web.yaml"
    path.write_text(policy("web") + "---\n" + pod("a"))
    view.started()
    replace(path, pod("b") + "---\n" + policy("web", port=81) + "x: [\n")
    view.source.rescan()
    assert view.pods == {"a"}
    assert view.policy("shop/web").rejected is None
    (rejection,) = view.source.rejections()
    assert (rejection.kind, rejection.name) == ("File", "policies/web.yaml")
    assert rejection.reason.startswith("policies/web.yaml:9: did not find expected node content")
    replace(path, pod("b"))
    view.until_pods("b")
    assert view.source.rejections() == ()
    assert "NetworkPolicy shop/web" not in view.objects


def test_a_file_that_never_parsed_gives_its_good_documents_and_closes_for_the_broken(root: Path, view: View) -> None:
    path = root / "web.yaml"
    path.write_text(pod("a") + "---\n" + policy("web") + "x: [\n---\n" + pod("b"))
    view.started()
    assert view.pods == {"a", "b"}
    closed = view.policy("shop/web")
    assert closed.pod_selector is EVERYTHING
    assert set(closed.rules.values()) == {()}
    assert len(closed.rules) == 2
    assert closed.rejected is not None
    assert closed.rejected.startswith("web.yaml:9: ")
    assert view.source.rejections() == (
        Rejection("File", "", "web.yaml", closed.rejected),
        Rejection("NetworkPolicy", "shop", "web", closed.rejected),
    )
    replace(path, pod("c") + "---\n" + policy("db") + "x: [\n")
    view.source.rescan()
    assert (view.pods, view.policy("shop/db").rejected is None) == ({"c"}, False)
    assert "NetworkPolicy shop/web" not in view.objects
    replace(path, pod("e") + "---\n" + policy("db") + "x: [\n")
    view.source.rescan()
    assert (view.pods, view.policy("shop/db").rejected is None) == ({"e"}, False)
    assert len(view.source.rejections()) == 2
    replace(path, policy("db"))
    view.source.rescan()
    assert view.policy("shop/db").rejected is None
    assert view.source.rejections() == ()


def test_a_policy_is_handed_on_again_when_asked_for(root: Path, view: View) -> None:
    (root / "a.yaml").write_text(policy("a") + "---\n" + policy("b"))
    view.started()
    wanted = view.objects.pop("NetworkPolicy shop/b")
    view.source.read_again(["shop/b"])
    view.until(lambda: view.objects.get("NetworkPolicy shop/b") == wanted)
    assert view.batches[1:] == [["NetworkPolicy shop/b"]]


def test_a_rejected_policy_is_an_object_and_a_rejection(root: Path, view: View) -> None:
    (root / "a.yaml").write_text(policy("web", port=0))
    view.started()
    reason = "spec.ingress[0].ports[0].port: 0 is not in 1-65535"
    assert view.policy("shop/web").rejected == reason
    assert view.source.rejections() == (Rejection("NetworkPolicy", "shop", "web", reason),)


def test_an_invalid_pod_and_a_body_of_no_kind_are_rejections_and_no_objects(root: Path, view: View) -> None:
    (root / "a.yaml").write_text(pod("UP") + "---\nname: x\n---\n" + pod("a"))
    view.started()
    assert view.pods == {"a"}
    assert view.source.rejections() == (
        Rejection("Pod", "default", "UP", "metadata.name: 'UP' is no DNS subdomain"),
        Rejection("File", "", "a.yaml", "a.yaml:4: kind: must be given"),
    )


def test_a_pod_that_becomes_invalid_is_gone(root: Path, view: View) -> None:
    (root / "a.yaml").write_text(pod("a"))
    view.started()
    replace(root / "a.yaml", pod("a") + "status: {podIP: x}\n")
    view.until_pods()


def test_of_duplicates_the_first_path_stands_and_the_next_takes_over(root: Path, view: View) -> None:
    (root / "b.yaml").write_text(pod("x", uid="b"))
    (root / "c.yaml").write_text(pod("x", uid="c"))
    view.started()
    assert view.uid("x") == "b"
    assert view.reasons == ["c.yaml (object 1): already given at b.yaml (object 1), which stands"]
    (root / "a.yaml").write_text(pod("x", uid="a"))
    view.until(lambda: view.uid("x") == "a")
    assert len(view.reasons) == 2
    (root / "a.yaml").unlink()
    (root / "b.yaml").unlink()
    view.until(lambda: view.uid("x") == "c")
    view.source.rescan()
    assert view.reasons == []


def test_a_config_map_is_followed_through_the_swap_of_its_data_link(root: Path, view: View) -> None:
    for number in (1, 2):
        (root / f"..{number}").mkdir()
        (root / f"..{number}/a.yaml").write_text(pod("a", uid=str(number)))
    (root / "..data").symlink_to("..1")
    (root / "a.yaml").symlink_to("..data/a.yaml")
    view.started()
    assert view.uid("a") == "1"
    (root / "..data_tmp").symlink_to("..2")
    (root / "..data_tmp").rename(root / "..data")
    view.until(lambda: view.uid("a") == "2")
    (root / "..1/a.yaml").unlink()
    (root / "..1").rmdir()
    assert view.reasons == []


def test_what_a_link_leads_to_is_followed_where_it_is(root: Path, view: View, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.yaml"
    target.write_text(pod("a"))
    (root / "a.yaml").symlink_to(target)
    (tmp_path / "more").mkdir()
    (root / "more").symlink_to(tmp_path / "more")
    view.started()
    target.write_text(pod("b"))
    view.until_pods("b")
    replace(target, pod("c"))
    view.until_pods("c")
    target.write_text(pod("d"))
    view.until_pods("d")
    (tmp_path / "more/e.yaml").write_text(pod("e"))
    view.until_pods("d", "e")
    (root / "more").unlink()
    (root / "a.yaml").unlink()
    view.until_pods()
    (root / "again").symlink_to(tmp_path / "more")
    view.until_pods("e")


def test_what_comes_to_be_behind_a_link_is_followed(root: Path, view: View) -> None:
    (root / "a.yaml").symlink_to("target")
    view.started()
    (root / "target").write_text(pod("a"))
    view.until_pods("a")
    (root / "target").write_text(pod("b"))
    view.until_pods("b")
    view.source.rescan()
    assert view.reasons == []


def test_what_is_left_is_watched_no_more(root: Path, view: View, tmp_path: Path) -> None:
    def watches() -> int:
        infos = [info.read_text() for info in Path("/proc/self/fdinfo").iterdir() if info.exists()]
        return sum(info.count("inotify wd:") for info in infos)

    view.started()
    before = watches()
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.yaml").write_text(pod("a"))
    (root / "more").symlink_to(tmp_path / "more")
    (root / "a.yaml").symlink_to(tmp_path / "more/a.yaml")
    view.source.rescan()
    assert watches() == before + 2
    (root / "more").unlink()
    (root / "a.yaml").unlink()
    view.source.rescan()
    assert watches() == before


def test_a_directory_that_a_new_link_reaches_first_is_read_by_that_path_alone(root: Path, view: View) -> None:
    (root / "sub").mkdir()
    (root / "sub/a.yaml").write_text(pod("a"))
    view.started()
    (root / "first").symlink_to("sub")
    view.source.rescan()
    assert view.reasons == []
    (root / "sub/a.yaml").write_text(pod("b"))
    view.until_pods("b")


def test_links_in_loops_are_walked_once(root: Path, view: View) -> None:
    (root / "sub").mkdir()
    (root / "sub/a.yaml").write_text(pod("a"))
    (root / "sub/up").symlink_to("..")
    (root / "again").symlink_to("sub")
    (root / "self").symlink_to("self")
    (root / "self.yaml").symlink_to("self.yaml")
    view.started()
    assert view.pods == {"a"}
    assert view.reasons == [f"self.yaml: cannot be read: {os.strerror(errno.ELOOP)}"]


def test_a_link_that_leads_nowhere_keeps_the_last_state_and_is_reported(root: Path, view: View, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.yaml"
    target.write_text(pod("a"))
    (root / "a.yaml").symlink_to(target)
    view.started()
    target.unlink()
    view.source.rescan()
    assert view.pods == {"a"}
    assert view.reasons == [f"a.yaml: cannot be read: {os.strerror(errno.ENOENT)}"]


def test_a_file_that_is_too_large_or_none_keeps_the_last_state_and_is_reported(
    root: Path, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_BYTES", 1 << 20)
    (root / "a.yaml").write_text(pod("a"))
    os.mkfifo(root / "b.yaml")
    view.started()
    (root / "a.yaml").write_text("#" * ((1 << 20) + 1))
    view.source.rescan()
    assert view.pods == {"a"}
    assert view.reasons == [f"{name}: is larger than 1 MiB, or no regular file" for name in ("a.yaml", "b.yaml")]


def test_a_directory_in_the_place_of_a_file_is_a_directory(root: Path, view: View) -> None:
    (root / "a.yaml").write_text(pod("a"))
    view.started()
    (root / "a.yaml").unlink()
    (root / "a.yaml").mkdir()
    (root / "a.yaml/b.yaml").write_text(pod("b"))
    view.until_pods("b")
    assert view.reasons == []


def test_a_directory_that_cannot_be_listed_keeps_what_it_held_and_is_reported(
    root: Path, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "sub/deep").mkdir(parents=True)
    (root / "sub/deep/a.yaml").write_text(pod("a"))
    (root / "b.yaml").write_text(pod("b"))
    view.started()
    scandir = os.scandir

    def denied(path: Path) -> Iterator[os.DirEntry[str]]:
        if path.name == "sub":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied)
        (root / "b.yaml").unlink()
        view.source.rescan()
        assert view.pods == {"a"}
        assert view.reasons == [f"sub/: cannot be read: {os.strerror(errno.EACCES)}"]
    view.source.rescan()
    assert (view.pods, view.reasons) == ({"a"}, [])


def test_a_file_that_cannot_be_read_keeps_its_last_state_until_it_can(
    root: Path, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "a.yaml").write_text(pod("a"))
    view.started()

    def denied(path: Path, _: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", denied)
        replace(root / "a.yaml", pod("b"))
        view.source.rescan()
        assert view.pods == {"a"}
        assert view.reasons == [f"a.yaml: cannot be read: {os.strerror(errno.EACCES)}"]
    (root / "a.yaml").chmod(0o600)
    view.until_pods("b")
    view.source.rescan()
    assert view.reasons == []


def test_lost_events_are_made_good_by_looking_at_everything(
    root: Path, view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    view.started()

    def overflown(watch: INotify, *, timeout: int) -> list[Event]:
        os.read(watch.fileno(), 1 << 16)
        return [Event(-1, flags.Q_OVERFLOW, 0, "")]

    monkeypatch.setattr(INotify, "read", overflown)
    (root / "sub").mkdir()
    (root / "sub/a.yaml").write_text(pod("a"))
    view.until_pods("a")


def test_a_directory_that_is_missing_at_the_start_is_an_error_that_names_it(root: Path) -> None:
    missing, plain = root / "missing", root / "plain"
    plain.write_text("")
    with pytest.raises(FileNotFoundError, match=str(missing)):
        View(missing).source.start()
    with pytest.raises(NotADirectoryError, match=str(plain)):
        View(plain).source.start()


def test_a_directory_that_cannot_be_watched_is_an_error_that_names_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(INotify, "add_watch", full)
    with pytest.raises(OSError, match=f"cannot be watched.*{root}"):
        View(root).source.start()


def test_when_the_directory_goes_the_last_state_stands_until_it_comes_back(
    root: Path, view: View, tmp_path: Path
) -> None:
    (root / "a.yaml").write_text(pod("a"))
    view.started()
    root.rename(tmp_path / "away")
    view.source.rescan()
    assert view.pods == {"a"}
    assert view.reasons == [f".: cannot be read: {os.strerror(errno.ENOENT)}"]
    (tmp_path / "next").mkdir()
    (tmp_path / "next/b.yaml").write_text(pod("b"))
    (tmp_path / "next").rename(root)
    view.until_pods("b")
    (root / "c.yaml").write_text(pod("c"))
    view.until_pods("b", "c")
    assert view.reasons == []


def test_a_rescan_before_the_start_or_after_the_stop_is_an_error_not_a_hang(view: View) -> None:
    with pytest.raises(RuntimeError, match="does not run"):
        view.source.rescan()
    view.source.stop()
    view.started()
    with pytest.raises(RuntimeError, match="once"):
        view.source.start()
    view.source.stop()
    view.source.stop()
    with pytest.raises(RuntimeError, match="does not run"):
        view.source.rescan()


def test_a_stop_ends_a_rescan_that_waits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        leave.wait(SECONDS)

    source = DirectorySource(root, changes=lambda _: None, synced=hold)
    source.start()
    assert entered.wait(SECONDS)
    failures: list[str] = []

    def wait() -> None:
        try:
            source.rescan()
        except RuntimeError as error:
            failures.append(str(error))

    waiter = threading.Thread(target=wait)
    with source._condition:
        source._stopping = True
    waiter.start()
    while not source._requested:
        threading.Event().wait(0.001)
    leave.set()
    waiter.join(SECONDS)
    assert not waiter.is_alive()
    assert failures == ["the source was stopped"]
    source.stop()


def test_stopping_leaves_no_descriptor_and_no_thread(root: Path) -> None:
    before = set(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208
    for _ in range(3):
        View(root).started().source.stop()
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before  # noqa: PTH208
