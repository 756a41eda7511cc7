"""What needs neither agent nor root: ``render`` and ``check``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from enforcer.cli import common, offline
from enforcer.ruleset.listing import listing

_files = click.argument("files", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)


@click.command()
@_files
@click.option("--node-name", help="Render for this node; every pod counts as of the node if it is left out.")
def render(files: tuple[Path, ...], node_name: str | None) -> None:
    """Print the ruleset for manifests as `nft list table` would. Pods need status.podIPs."""
    read = offline.read(files, node=node_name)
    for rejection in read.rejections:
        click.echo(f"# not enforced as written: {rejection.kind} {rejection.name}: {rejection.reason}", err=True)
    click.echo(listing(read.ruleset), nl=False)


@click.command()
@_files
@common.output
def check(files: tuple[Path, ...], output: str) -> None:
    """Check manifests as the API server and the agent would. Exit 1 if anything is wrong."""
    read = offline.read(files)
    if output == "json":
        common.print_json({"policies": read.policies, "rejected": list(read.rejections)})
    else:
        for rejection in read.rejections:
            name = "/".join(filter(None, (rejection.namespace, rejection.name)))
            click.echo(f"{rejection.kind} {name}: {rejection.reason}")
        click.echo(f"{read.policies} policies read, {len(read.rejections)} findings")
    sys.exit(1 if read.rejections else 0)
