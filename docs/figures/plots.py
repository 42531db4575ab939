"""Draws the figures of docs/plots.md: the Axes that its own code makes.

Run `python -m docs.figures.plots` from the root of the repository, with `pip install -e '.[plot]'`.
"""

from docs.figures.page import run, save

if __name__ == "__main__":
    run("plots.md", lambda name, found: save(found["ax"].figure, name))
