"""The command line: one module a group of commands, nothing but words and tables."""

from __future__ import annotations

import click

from enforcer.cli import agent, demo, inspect, manifests, node

_HELP = """Drawbridge: Kubernetes pod networking with NetworkPolicy on nftables.

\b
Try it:            drawbridge demo
Check policies:    drawbridge check policies/
See the ruleset:   drawbridge render manifests/
Why a drop?        drawbridge explain shop/frontend-0 shop/db-0 5432

Completion for your shell: eval "$(_DRAWBRIDGE_COMPLETE=bash_source drawbridge)"
"""


@click.group(help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """The commands below; what a user reads is ``_HELP``."""


for command in (
    agent.agent,
    inspect.status,
    inspect.pods,
    inspect.policies,
    inspect.explain,
    manifests.render,
    manifests.check,
    demo.demo,
    node.install,
    node.uninstall,
    node.config,
    node.version,
):
    cli.add_command(command)
