"""Sources of objects: decoded once, compared, and handed on as changes; whatever is refused is named with its reason."""
