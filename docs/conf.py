"""The documentation as a site: `make docs`, or `sphinx-build docs docs/_build`."""

import html
import importlib
import inspect
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from docutils import nodes
from docutils.nodes import Element
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
sys.path.insert(0, str(SOURCE))  # the docstrings of this checkout, whatever is installed

project = "posegrad"
author = copyright = "The posegrad developers"
[release] = re.findall(
    r'^__version__ = "(.*)"', (SOURCE / project / "__init__.py").read_text(), re.MULTILINE
)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_math_renderer = "mathml"  # what browsers set by themselves: no script, no network
html_show_sourcelink = False
html_copy_source = False

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]  # GitHub's way to set maths apart
myst_heading_anchors = 4

default_role = "py:name"  # `Min` in a docstring is a link; what is no name of ours stays code
nitpick_ignore_regex = [
    ("py:name", ".*"),
    # Classes of others, whose lists of names are not fetched, and those in annotations alone.
    ("py:class", r"(torch|collections|matplotlib)\..*|Tensor|SearchStrategy"),
    ("py:class", r"posegrad\.\w+\._.*"),
]
napoleon_custom_sections = ["Shape", ("In backward", "params_style")]
autosummary_generate = False  # the pages of docs/api/ name what they show
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80

PAGES = {"../CONTRIBUTING.md": "contributing.md", "../CHANGELOG.md": "changelog.md"}
"""Files outside of this folder, and the pages that include them."""


def link_files(app: Sphinx, docname: str, content: list[str]) -> None:
    """Has links to files outside of this folder lead to their page here, or else to a download."""
    for file, page in PAGES.items():
        content[0] = content[0].replace(f"]({file}", f"]({page}")
    content[0] = content[0].replace("](../", "](path:../")


@cache
def public_names() -> dict[str, str]:
    """Names that classes are documented under, by those of where they are defined."""
    found: dict[str, str] = {}
    for path in ("posegrad", "posegrad.testing", "posegrad.interop.mtenn"):
        module = importlib.import_module(path)
        for name in module.__all__:
            kind = getattr(module, name)
            if inspect.isclass(kind):
                found[f"{kind.__module__}.{name}"] = f"{path}.{name}"
    return found


def link_public_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> Any:
    """Links annotations, which say where a class is defined, and `Mean` from any of our modules."""
    target = node["reftarget"]
    name = public_names().get(target, f"{project}.{target}")
    python = env.get_domain("py")
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)


class Name(PyXRefRole):
    """Text between single backticks: a name of ours, or code as it stands."""

    def process_link(
        self, env: BuildEnvironment, refnode: Element, explicit: bool, title: str, target: str
    ) -> tuple[str, str]:
        """Unlike the role for Python objects it leaves a leading dot alone, as of `.grad`."""
        super().process_link(env, refnode, explicit, title, target)
        refnode.attributes.pop("refspecific", None)
        return title, target


MATHML = "http://www.w3.org/1998/Math/MathML"
ElementTree.register_namespace("", MATHML)
TAG = re.compile(r"\\tag\{(\d+)\}")
ALSO = {r"\dots": r"\ldots", r"\Big(": r"\Bigl(", r"\Big)": r"\Bigr)"}
"""LaTeX that docutils does not know, in what it knows."""


def mathml(node: nodes.math | nodes.math_block, *, as_block: bool) -> str:
    """A formula as MathML; one that cannot be set is a warning."""
    text = TAG.sub("", node.astext())
    for found, known in ALSO.items():
        text = text.replace(found, known)
    try:
        return indexed(tex2mathml(text, as_block=as_block))
    except MathError as error:
        logging.getLogger(__name__).warning("formula: %s", error, location=node)
        return text


def indexed(formula: str) -> str:
    """A formula in which the index of a letter with an accent stands beside it.

    docutils sets it below the letter, like the bound of a sum.
    """
    named = re.sub(r"&(?!amp;|lt;|gt;)\w+;", lambda found: html.unescape(found[0]), formula)
    root = ElementTree.fromstring(named)
    for stack in [*root.iter(f"{{{MATHML}}}munderover")]:
        letter, index, accent = stack
        if letter.tag != f"{{{MATHML}}}mo":  # else it is a sum, with its bounds
            stack.tag = f"{{{MATHML}}}msub"
            accented = ElementTree.Element(f"{{{MATHML}}}mover", accent="true")
            accented.extend((letter, accent))
            stack[:] = [accented, index]
    return ElementTree.tostring(root, encoding="unicode")


def visit_math(translator: HTML5Translator, node: nodes.math) -> None:
    """A formula within a line."""
    translator.body.append(mathml(node, as_block=False))
    raise nodes.SkipNode


def visit_displaymath(translator: HTML5Translator, node: nodes.math_block) -> None:
    """A formula set apart, with its number."""
    number = TAG.search(node.astext())
    tag = f'<span class="eqno">({number[1]})</span>' if number else ""
    translator.body.append(f'<div class="math">{tag}{mathml(node, as_block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Connects these."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.add_role_to_domain("py", "name", Name())
    app.connect("source-read", link_files)
    app.connect("missing-reference", link_public_name)
