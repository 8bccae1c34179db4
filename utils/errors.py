"""The one base of every error that a user can cause and mend."""

from __future__ import annotations


class UserError(ValueError):
    """Something asked for cannot be done; the text says what, got, allowed and the remedy.

    Command-line tools print it as one line and exit with ``exit_code``; a traceback would only
    hide the sentence.
    """

    exit_code = 2
