"""Text of somebody else's making on a terminal."""

from __future__ import annotations

from tools.lib.command_line import shown


def test_what_steers_a_terminal_is_spelled_out() -> None:
    assert shown("a\x9b2Jb\u202e\n") == "a\\x9b2Jb\\x202e\\x0a"
    assert shown("Zoë/人.jpg") == "Zoë/人.jpg"
