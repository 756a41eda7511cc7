"""What is done to the node: ``install``, ``uninstall``; and ``version``."""

from __future__ import annotations

import os
from importlib.metadata import version as distribution_version
from pathlib import Path

import click

import cni
from cni.plugin import install as installation
from enforcer.cli import common
from enforcer.config import reference
from enforcer.supervision.lock import Lock, LockError

_STATE = ("state.db*", "denied.json", "secret", "*.sock")
"""What an agent leaves in its run directory, beside the lock."""
_EXECUTABLE = Path(cni.__file__).parent.parent / "build" / "cni" / "drawbridge"


@click.command()
@common.cni_bin_dir
@click.option(
    "--executable",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    envvar="DRAWBRIDGE_CNI_EXECUTABLE",
    default=_EXECUTABLE,
    help="The CNI executable, as it was built.",
)
def install(cni_bin_dir: Path, executable: Path) -> None:
    """Put the CNI executable where the runtime looks for it. It is replaced in one step.

    The network configuration follows from the agent (--cni-conf-dir), once pods can be attached.
    """
    try:
        changed = installation.install_executable(executable, cni_bin_dir)
    except OSError as error:
        raise click.ClickException(f"the CNI executable cannot be installed: {error}") from error
    click.echo(f"{cni_bin_dir}: {'the CNI executable is installed' if changed else 'the CNI executable was there'}")


@click.command()
@common.run_dir
@common.cni_bin_dir
@click.option(
    "--cni-conf-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=installation.CONF_DIR,
    show_default=True,
    help="Where the container runtime has its network configurations.",
)
def uninstall(run_dir: Path, cni_bin_dir: Path, cni_conf_dir: Path) -> None:
    """Remove what Drawbridge put on the node.

    That is the network configuration, executable, tables, bridge, links and routes. Stop the agent first; pods lose
    their network. What is gone already is passed over.
    """
    if os.geteuid() != 0:
        raise click.ClickException("only root can remove links and tables: use sudo")
    try:
        lock = Lock(run_dir if run_dir.is_dir() else None)
    except LockError as error:
        raise click.ClickException(str(error)) from error
    from cni.node.bridge import remove_all  # noqa: PLC0415
    from enforcer.kernel.nftables import Tables  # noqa: PLC0415 - loads libnftables

    # First, that no pod is started any more.
    for removed in (*installation.remove(cni_conf_dir, cni_bin_dir), *remove_all()):
        click.echo(f"removed {removed}")
    Tables().remove()
    click.echo("removed the nftables tables")
    for path in (found for pattern in _STATE for found in run_dir.glob(pattern)):
        path.unlink(missing_ok=True)
        click.echo(f"removed {path}")
    lock.remove()


@click.command()
def version() -> None:
    """Print the version."""
    click.echo(f"drawbridge {distribution_version('kube-drawbridge')}")


@click.command()
def config() -> None:
    """Print a configuration file with every key and its default."""
    click.echo(reference(), nl=False)
