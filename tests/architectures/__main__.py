"""Writes the tables of models in docs/support.md."""

from tests.architectures.page import PAGE, page

PAGE.write_text(page(), encoding="utf-8")
