"""What is done to the node: ``uninstall``; and ``version``."""

from __future__ import annotations

import os
from importlib.metadata import version as distribution_version

import click

from enforcer.lock import Lock, LockError


@click.command()
def uninstall() -> None:
    """Remove tables, bridge, pods' links and routes. Stop the agent first; pods lose their network."""
    if os.geteuid() != 0:
        raise click.ClickException("only root can remove links and tables: use sudo")
    try:
        lock = Lock()
    except LockError as error:
        raise click.ClickException(str(error)) from error
    from cni.node import remove_all  # noqa: PLC0415
    from enforcer.kernel.nftables import Tables  # noqa: PLC0415 - loads libnftables

    for removed in remove_all():
        click.echo(f"removed {removed}")
    Tables().remove()
    click.echo("removed the nftables tables")
    lock.release()


@click.command()
def version() -> None:
    """Print the version."""
    click.echo(f"drawbridge {distribution_version('kube-drawbridge')}")
