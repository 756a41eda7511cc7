"""``drawbridge agent``."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import click

from enforcer.cli import common
from enforcer.config import ConfigError, load
from enforcer.model.addresses import Network
from enforcer.model.sources import SourceError
from enforcer.observe import logs
from enforcer.supervision.lock import LockError


class _Cidr(click.ParamType[Network]):
    name = "cidr"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Network:
        if isinstance(value, Network):
            return value
        try:
            return Network.parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command()
@click.option(
    "--source",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="A directory of manifests (YAML or JSON): Namespace, Node, Pod, NetworkPolicy. It is watched. "
    "Without it the source is the Kubernetes API.",
)
@click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="How to reach the Kubernetes API; by default the service account of the pod that this is.",
)
@click.option(
    "--node-name", "node", default=lambda: os.environ.get("NODE_NAME", platform.node()), help="This node's name."
)
@common.run_dir
@click.option("--pod-cidr", "pod_cidrs", type=_Cidr(), multiple=True, help="Pod network; twice for dual stack.")
@click.option(
    "--cni-conf-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where to write the network configuration for the container runtime, once pods can be attached.",
)
@common.cni_bin_dir
@click.option("--config", "config_file", type=click.Path(path_type=Path, dir_okay=False), help="Configuration (YAML).")
def agent(config_file: Path | None, **options: Any) -> None:
    """Run the node agent in the foreground.

    It attaches pods for the CNI executable and keeps the nftables table equal to what the manifests, or the objects of
    the API, say. Nothing is flushed when it starts or stops.
    """
    if options["source"] is not None and options["kubeconfig"] is not None:
        raise click.UsageError("--source and --kubeconfig exclude each other")
    try:
        config = load(config_file)
    except ConfigError as error:
        raise click.ClickException(str(error)) from error
    logs.configure(form=config.log_format, level=config.log_level)
    # Here, because it loads libnftables, which the other commands do without.
    from enforcer.agent import Agent, Options  # noqa: PLC0415

    try:
        made = Agent(Options(config=config, **options))
    except (SourceError, LockError) as error:
        raise click.ClickException(str(error)) from error
    sys.exit(made.run())
