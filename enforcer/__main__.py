"""The ``drawbridge`` command."""


def main() -> None:
    """Placeholder until the CLI lands in this session."""
