"""Sources of objects: decoded once, compared, and handed on as changes; what is refused is named with a reason."""
