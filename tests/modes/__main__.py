"""Writes the table of docs/support.md."""

from tests.modes.page import PAGE, page

PAGE.write_text(page(), encoding="utf-8")
