"""Sources of objects: decoded once, compared, and handed on as changes; what is refused is named with a reason."""


class SourceError(Exception):
    """A source cannot be used as configured; the text says what to correct."""
