"""What is done to the node: ``uninstall``; and ``version``."""

from __future__ import annotations

from importlib.metadata import version as distribution_version

import click


@click.command()
def uninstall() -> None:
    """Remove tables, bridge, pods' links and routes. Stop the agent first; pods lose their network."""
    from cni.node import remove_all  # noqa: PLC0415
    from enforcer.kernel.nftables import Tables  # noqa: PLC0415 - loads libnftables

    for removed in remove_all():
        click.echo(f"removed {removed}")
    Tables().remove()
    click.echo("removed the nftables tables")


@click.command()
def version() -> None:
    """Print the version."""
    click.echo(f"drawbridge {distribution_version('kube-drawbridge')}")
