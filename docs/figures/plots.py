"""Draws the figures of docs/conflicts.md: the Axes that its own code makes.

Run `python -m docs.figures.plots` from the root of the repository, with `pip install -e '.[plot]'`.
"""

from docs.figures.page import run, save

if __name__ == "__main__":
    run("conflicts.md", lambda name, found: save(found["ax"].figure, name))
