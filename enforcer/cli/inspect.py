"""What a running agent is asked: ``status``, ``pods``, ``policies``, ``explain``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from enforcer.cli import common, offline
from enforcer.control.explain import Evidence, QuestionError
from enforcer.control.explain import explain as explain_flow
from enforcer.control.messages import (
    MAX_WAIT_SECONDS,
    Flow,
    PodRow,
    PodsQuestion,
    Policies,
    PoliciesQuestion,
    Question,
    Status,
    StatusQuestion,
)
from enforcer.ruleset.evaluate import RulesetView


@click.command()
@common.run_dir
@click.option(
    "--wait", type=click.FloatRange(0, MAX_WAIT_SECONDS), default=0.0, help="Seconds to wait until it is in sync."
)
@common.output
def status(run_dir: Path, wait: float, output: str) -> None:
    """Say whether the kernel holds all that the source holds. Exit 0 if so, else 1."""
    # Without --wait the loop still gets a moment to answer in.
    answer = common.asked(run_dir, StatusQuestion(max(wait, 1.0)), Status, seconds=wait + 10)
    common.show(answer, output, lambda: _print_status(answer))
    sys.exit(0 if answer.synced else 1)


def _print_status(answer: Status) -> None:
    state = "[green]in sync[/]" if answer.synced else "[red]not in sync[/]"
    out = common.console()
    out.print(f"{state}: node {answer.node}, source {answer.source}, table {answer.table}")
    pods = answer.pods
    out.print(f"{pods.local} pods here of {pods.cluster} in the cluster, {answer.policies} policies")
    if answer.failure:
        out.print("[red]the kernel refuses[/]:", end=" ")
        out.print(answer.failure, markup=False)
    if stamps_failure := answer.stamps.failure:
        out.print("[red]every packet is judged[/]:", end=" ")
        out.print(f"stamps of old epochs could not be cleared from connections: {stamps_failure}", markup=False)
    for missing in answer.kernel.missing:
        out.print("[red]missing in the kernel[/]:", end=" ")
        out.print(missing, markup=False)
    for setting in answer.settings:
        out.print("[red]a setting of the node is wrong[/]:", end=" ")
        out.print(setting, markup=False)
    for source in answer.sources:
        if source.last_error:
            out.print("[red]the last state stands[/]:", end=" ")
            out.print(str(source), markup=False)
    if fine := [str(source) for source in answer.sources if not source.last_error]:
        out.print(", ".join(fine))
    if answer.unready:
        out.print("[red]no pod can start here[/]:", end=" ")
        out.print(answer.unready, markup=False)
    for problem in answer.problems:
        out.print("problem on the node:", problem, markup=False)
    for rejected in answer.rejected:
        name = "/".join(filter(None, (rejected.namespace, rejected.name)))
        out.print("not enforced as written:", f"{rejected.kind} {name}: {rejected.reason}", markup=False)


@click.command()
@common.run_dir
@common.output
def pods(run_dir: Path, output: str) -> None:
    """List the pods that the agent knows, with their addresses."""
    answer = common.asked(run_dir, PodsQuestion(), list[PodRow])
    columns = ["POD", "ADDRESSES", "NODE", "PORT", "STANDING"]
    rows = [
        [
            row.pod,
            ", ".join(row.addresses),
            "this" if row.local else "other",
            row.port or "-",
            row.standing,
        ]
        for row in answer
    ]
    common.show(answer, output, lambda: common.print_table(columns, rows))


@click.command()
@common.run_dir
@common.output
def policies(run_dir: Path, output: str) -> None:
    """List policies, with what each of them allowed and denied.

    A connection that goes on is counted once more each time that policy changes.
    """
    answer = common.asked(run_dir, PoliciesQuestion(), Policies)
    common.show(answer, output, lambda: _print_policies(answer))


def _print_policies(answer: Policies) -> None:
    columns = ["POLICY", "PODS HERE", "NEW FLOWS ALLOWED", "PACKETS DENIED", "REJECTED"]
    rows = [
        [row.policy, str(row.pods), _counted(row.packets), _counted(row.denied), row.rejected or "-"]
        for row in answer.policies
    ]
    common.print_table(columns, rows)
    click.echo(f"packets denied by no policy: {_counted(answer.denied)}")


def _counted(packets: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in packets.items())


@click.command()
@click.argument("source", metavar="FROM")
@click.argument("destination", metavar="TO")
@click.argument("port", metavar="PORT[/PROTO]")
@common.run_dir
@click.option("-f", "--file", "files", type=click.Path(path_type=Path, exists=True), multiple=True,
              help="Ask these manifests, not an agent.")  # fmt: skip
@common.output
def explain(source: str, destination: str, port: str, run_dir: Path, files: tuple[Path, ...], output: str) -> None:
    """Say why a connection is allowed or denied. Exit 0 if allowed, 1 if denied.

    FROM and TO are namespace/pod, an IP address, or `node`. PORT is a number (tcp unless /udp or /sctp is added), or
    `icmp`. With a running agent the kernel's own rules are asked as well.
    """
    question = _question(source, destination, port)
    if files:
        try:
            read = offline.read(files)
            flows = explain_flow(read.cluster, question, Evidence(view=RulesetView(read.ruleset)))
        except (QuestionError, OSError) as error:
            raise click.ClickException(str(error)) from error
    else:
        flows = common.asked(run_dir, question, list[Flow])
    common.show(flows, output, lambda: print_flows(flows))
    sys.exit(0 if all(flow.allowed for flow in flows) else 1)


def _question(source: str, destination: str, port: str) -> Question:
    number, _, protocol = port.partition("/")
    if number == "icmp":
        return Question(source=source, destination=destination, protocol="icmp")
    if not number.isdecimal() or not 0 < int(number) <= 65535:  # noqa: PLR2004
        raise click.BadParameter(f"{port!r} is not PORT, PORT/PROTO or icmp", param_hint="PORT")
    return Question(source=source, destination=destination, protocol=protocol or "tcp", port=int(number))


def print_flows(flows: Sequence[Flow]) -> None:
    """Print explanations for people."""
    for flow in flows:
        _print_flow(flow)


def _print_flow(flow: Flow) -> None:
    out = common.console()
    verdict = "[bold green]allowed[/]" if flow.allowed else "[bold red]denied[/]"
    port = flow.protocol if flow.port is None else f"{flow.port}/{flow.protocol}"
    out.print(f"{flow.source} -> {flow.destination} {port}: {verdict}")
    for answer in flow.answers:
        word = "[green]allows[/]" if answer.allowed else "[red]denies[/]"
        out.print(f"  {answer.direction:7} {word}", end="  ")
        out.print(f"{answer.pod + ': ' if answer.pod else ''}{answer.reason}", markup=False)
        if answer.kernel is not None:
            agreement = "agrees" if answer.agrees else "DISAGREES: run `drawbridge status`"
            packets = "" if answer.packets is None else f" ({answer.packets} counted so far)"
            out.print(f"          kernel {agreement}: {answer.kernel}{packets}", markup=False)
        if answer.advice:
            out.print(f"          to allow it: {answer.advice}", markup=False)
