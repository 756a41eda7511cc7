"""``drawbridge demo``."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.table import Table

import enforcer
from enforcer.cli import common
from enforcer.cli.inspect import print_flows
from enforcer.control.messages import Flow, Question
from enforcer.demo.lab import Lab, LabError

_MANIFESTS = Path(enforcer.__file__).parent / "demo" / "manifests"
_EXECUTABLE = Path(enforcer.__file__).parent.parent / "build" / "cni" / "drawbridge"
_PORTS = {"shop/frontend": 8080, "shop/api": 8080, "shop/db": 5432, "metrics/prometheus": 9090}
_ALLOWED = {
    ("shop/frontend", "shop/api"),
    ("shop/api", "shop/db"),
    ("metrics/prometheus", "shop/frontend"),
    ("metrics/prometheus", "shop/api"),
    ("shop/frontend", "metrics/prometheus"),
    ("shop/api", "metrics/prometheus"),
}
_Matrix = dict[tuple[str, str], bool]


_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _end(number: int, _: object) -> None:
    """End in order, once: what comes while the demo cleans up is too late to matter."""
    for other in _ENDS:
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


@click.command()
@click.option(
    "--cni",
    "executable",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=_EXECUTABLE,
    help="The CNI executable.",
)
def demo(executable: Path) -> None:
    """Show the product at work in network namespaces of its own. Exit 0 only if every packet fared as expected."""
    if os.geteuid() != 0:
        raise click.ClickException("the demo makes network namespaces: run it as root (make demo uses sudo)")
    for number in _ENDS:
        signal.signal(number, _end)
    folder = Path(tempfile.mkdtemp(prefix="drawbridge-demo-"))
    try:
        right = _show(folder, executable)
    except LabError as error:
        raise click.ClickException(str(error)) from error
    finally:
        shutil.rmtree(folder)
    common.console().print("\n[bold green]All as expected.[/]" if right else "\n[bold red]NOT as expected.[/]")
    sys.exit(0 if right else 1)


def _show(folder: Path, executable: Path) -> bool:
    out = common.console()
    source = folder / "manifests"
    source.mkdir()
    shutil.copy(_MANIFESTS / "pods.yaml", source)
    name = f"drawbridge-demo-{os.getpid()}"
    with Lab(name=name, source=("--source", source), run_dir=folder / "run", executable=executable,
             pod_cidrs=("10.84.0.0/24", "fd84::/64")) as lab:  # fmt: skip
        for key, port in _PORTS.items():
            lab.listen(lab.add_pod(key), port)
        out.print("[bold]Pods[/], attached through the CNI executable")
        rows = [[key, ", ".join(pod.addresses), str(_PORTS[key])] for key, pod in lab.pods.items()]
        common.print_table(["POD", "ADDRESSES", "LISTENS ON"], rows)

        right = _matrix(lab, "Before the policies: who reaches whom", dict.fromkeys(_pairs(), True))
        _put(source / "policies.yaml", (_MANIFESTS / "policies.yaml").read_text())
        lab.status()
        right &= _matrix(lab, "With the policies of policies.yaml", {pair: pair in _ALLOWED for pair in _pairs()})

        out.print("\n[bold]Why can the frontend not reach the database?[/]")
        question = Question(source="shop/frontend", destination="shop/db", protocol="tcp", port=5432)
        flows = lab.ask(question, list[Flow])
        print_flows(flows[:1])
        right &= not flows[0].allowed and all(answer.agrees for flow in flows for answer in flow.answers)

        milliseconds = _edit(lab, source / "policies.yaml")
        out.print("\n[bold]A live edit[/] adds the frontend to the database's policy")
        if milliseconds is None:
            out.print("[red]the kernel did not obey[/]")
            return False
        out.print(f"the first packet passed {milliseconds:.1f} ms after the file was renamed into place")

        out.print("\n[bold]What does it[/], from `nft list table inet drawbridge`")
        for chain in _chains_of(lab, lab.pods["shop/db"].addresses[0]):
            listing = lab.nft("list", "chain", "inet", "drawbridge", chain).splitlines()
            out.print("\n".join(listing[1:-1]), markup=False, soft_wrap=True)
    return right


def _chains_of(lab: Lab, address: str) -> list[str]:
    """The chain that decides for an isolated pod, and those of its policies."""
    element = lab.nft("get", "element", "inet", "drawbridge", "ingress-v4", f"{{ {address} }}")
    group = element.rpartition("jump ")[2].split()[0]
    rules = lab.nft("list", "chain", "inet", "drawbridge", group).split("jump ")[1:]
    return [group, *(rule.split()[0] for rule in rules)]


def _pairs() -> list[tuple[str, str]]:
    return [(source, destination) for source in _PORTS for destination in _PORTS if source != destination]


def _matrix(lab: Lab, title: str, expected: _Matrix) -> bool:
    """Probe every pair over both families, print what came of it, and say whether all was as expected."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("from \\ to")
    for destination, port in _PORTS.items():
        table.add_column(f"{destination}:{port}")
    right = True
    for source in _PORTS:
        cells = []
        for destination, port in _PORTS.items():
            if source == destination:
                cells.append("-")
                continue
            # Policies name IPv4 blocks only, so IPv6 fares alike here.
            # What is expected to be silent is not waited for as long as what is expected to answer.
            seconds = 1.5 if expected[source, destination] else 0.3
            found = {lab.connects(lab.pods[source], a, port, seconds=seconds) for a in lab.pods[destination].addresses}
            good = found == {expected[source, destination]}
            right &= good
            word = "[green]yes[/]" if found == {True} else "[red]no[/]" if found == {False} else "[yellow]one family[/]"
            cells.append(word if good else f"{word} [bold red](unexpected)[/]")
        table.add_row(source, *cells)
    out = common.console()
    out.print()
    out.print(table)
    return right


def _edit(lab: Lab, path: Path) -> float | None:
    """Let the frontend reach the database, and measure the time until a packet does."""
    address = lab.pods["shop/db"].addresses[0]
    text = path.read_text().replace("values: [api]", "values: [api, frontend]")
    started = time.perf_counter()
    _put(path, text)
    while time.perf_counter() - started < 5:  # noqa: PLR2004 - seconds
        if lab.connects(lab.pods["shop/frontend"], address, _PORTS["shop/db"], seconds=0.001):
            return (time.perf_counter() - started) * 1e3
    return None


def _put(path: Path, text: str) -> None:
    """Write a file as an editor does: whole, by a rename."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(text)
    scratch.rename(path)
