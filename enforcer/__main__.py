"""The ``drawbridge`` command."""

from enforcer.cli import cli


def main() -> None:
    """Run the command line."""
    cli(prog_name="drawbridge")


if __name__ == "__main__":
    main()
