"""Errors that a user can cause. The CLI prints their text as one paragraph, without a traceback."""


class UserError(ValueError):
    """A mistake in a recipe, a file or a command: the text names the key, file or line, and the remedy."""
