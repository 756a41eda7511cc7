"""``drawbridge demo``: stub to be replaced below in this session."""

import click


@click.command()
def demo() -> None:
    """Demo."""
