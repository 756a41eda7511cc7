"""Options and output that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import click
import msgspec
from rich.console import Console
from rich.table import Table

from cni.plugin import install
from enforcer.control.messages import AnyQuestion
from enforcer.control.socket import ControlError, ask

T = TypeVar("T")

_WIDTH = 120
RUN_DIR = Path("/run/drawbridge")

run_dir = click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=RUN_DIR,
    show_default=True,
    help="The agent's run directory.",
)
cni_bin_dir = click.option(
    "--cni-bin-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=install.BIN_DIR,
    show_default=True,
    help="Where the container runtime has its CNI executables.",
)
output = click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Form of the output."
)


def console() -> Console:
    """Standard output: colours on a terminal, plain in a pipe; never so narrow that a table would cut words."""
    found = Console(highlight=False)
    return Console(highlight=False, width=max(found.width, _WIDTH) if found.is_terminal else 200)


def asked(directory: Path, question: AnyQuestion, answer: type[T], *, seconds: float = 10.0) -> T:
    """Ask the agent, or end with what it says is wrong."""
    try:
        return ask(directory, question, answer, seconds=seconds)
    except ControlError as error:
        raise click.ClickException(str(error)) from error


def print_json(value: object) -> None:
    """Print a value as indented JSON."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def show(answer: object, form: str, text: Callable[[], None]) -> None:
    """Print an answer as JSON, or as ``text`` prints it."""
    if form == "json":
        print_json(answer)
    else:
        text()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table without lines."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console().print(table)
