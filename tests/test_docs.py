"""What the documentation shows, runs: its code blocks, its links, the docstrings' examples."""

import doctest
import importlib
import inspect
import math
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import posegrad
import posegrad.plot
import posegrad.testing
from benchmarks import report
from benchmarks.exact import largest_difference
from benchmarks.table import SUITES, losses
from posegrad import Combination, Engine
from posegrad.testing import table
from posegrad.weighting import GradientRule
from tests import house

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python(?: (\w+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)
"""A block, and the package that it needs beside those of the tests, where it names one."""
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)

OPTIONS = doctest.ELLIPSIS | doctest.DONT_ACCEPT_TRUE_FOR_1


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_code_blocks_of_a_page_run_from_top_to_bottom(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run_page(page, {""}, monkeypatch)


def _packages(page: Path) -> set[str]:
    return {block[1] for block in BLOCK.finditer(page.read_text(encoding="utf-8")) if block[1]}


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha:UserWarning")  # of Opacus
@pytest.mark.parametrize("page", [page for page in PAGES if _packages(page)], ids=_name)
def test_code_blocks_that_need_another_package_run_where_it_is(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in _packages(page):
        pytest.importorskip(package, reason=f"{_name(page)} needs {package}, not installed here")
    _run_page(page, {"", *_packages(page)}, monkeypatch)


def _run_page(page: Path, packages: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the blocks that need no other package than these."""
    module = ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # so that its classes pickle
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        if (block[1] or "") in packages:
            _run(block[2], module, page, line=text.count("\n", 0, block.start(2)))


def _run(source: str, module: ModuleType, page: Path, *, line: int) -> None:
    if source.lstrip().startswith(">>>"):
        example = doctest.DocTestParser().get_doctest(source, {}, _name(page), str(page), line)
        _check(example, module.__dict__)
    else:
        exec(compile("\n" * line + source, str(page), "exec"), module.__dict__)


def _check(example: doctest.DocTest, namespace: dict[str, Any]) -> None:
    example.globs = namespace
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    runner.run(example, out=report.append, clear_globs=False)
    assert not report, "".join(report)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(_prose(page)):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{_name(page)} links to {path}, which does not exist"
        if anchor:
            anchors = [_anchor(heading) for heading in HEADING.findall(_prose(target))]
            assert anchor in anchors, f"{_name(page)} links to {path}#{anchor}, which has {anchors}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_rows_of_a_table_have_as_many_cells_as_its_head(page: Path) -> None:
    for rows in TABLE.findall(_prose(page)):
        cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows.splitlines()}
        assert len(cells) == 1, f"{_name(page)}: {rows.splitlines()[0]}"


@pytest.mark.parametrize(
    ("term", "page"),
    [
        ("NTK", "neural-tangent-kernel"),
        ("PINN", "natural-gradient"),
        ("MIL", "whole-slide-bags"),
        ("GradCache", "contrastive-training"),
        ("DP-SGD", "clipping-and-privacy"),
        ("multi-task", "conflicts"),
        ("out of memory", "choose-a-schedule"),
        ("censored", "train-on-docked-poses"),
    ],
)
def test_what_is_searched_for_is_on_its_page(term: str, page: str) -> None:
    assert term in _prose(ROOT / "docs" / f"{page}.md")


def _prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def _anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(posegrad.__path__, "posegrad.")
    return [posegrad, *(importlib.import_module(info.name) for info in found)]


def _examples() -> Iterator[Any]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    for module in _modules():
        for example in finder.find(module):
            if example.examples:
                yield pytest.param(example, id=example.name.removeprefix("posegrad."))


@pytest.mark.parametrize("example", list(_examples()))
def test_examples_in_docstrings_print_what_they_say(example: doctest.DocTest) -> None:
    torch.manual_seed(0)
    names = {"torch": torch, "nn": nn, "Tensor": Tensor, "plot": posegrad.plot}
    for package in (posegrad, posegrad.testing):
        names |= {name: getattr(package, name) for name in package.__all__}
    _check(example, names)


PUBLIC = [
    f"{package.__name__}.{name}"
    for package in (posegrad, posegrad.testing, posegrad.plot)
    for name in package.__all__
    if name != "__version__"
]
METHODS = [
    f"posegrad.Engine.{name}"
    for name, _ in inspect.getmembers(Engine, inspect.isfunction)
    if not name.startswith("_")
]


def _is_rule(path: str) -> bool:
    found = pkgutil.resolve_name(path)
    kinds = (Combination, GradientRule)
    return inspect.isclass(found) and issubclass(found, kinds) and not inspect.isabstract(found)


@pytest.mark.parametrize("path", [*PUBLIC, *METHODS])
def test_public_names_are_documented(path: str) -> None:
    found = pkgutil.resolve_name(path)
    own = found.__doc__ if inspect.isfunction(found) else vars(found).get("__doc__")
    assert own, f"{path} has no docstring of its own"


def _is_error(path: str) -> bool:
    found = pkgutil.resolve_name(path)
    return inspect.isclass(found) and issubclass(found, Exception)


@pytest.mark.parametrize("path", [*METHODS, *(path for path in PUBLIC if not _is_error(path))])
def test_public_names_but_errors_show_an_example(path: str) -> None:
    assert ">>>" in pkgutil.resolve_name(path).__doc__, f"the docstring of {path} has no Example"


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "figures").glob("*.py")), ids=_name)
def test_scripts_of_figures_can_be_imported(path: Path) -> None:
    importlib.import_module(f"docs.figures.{path.stem}")


def test_there_are_results_of_every_suite() -> None:
    assert report.load().keys() >= SUITES.keys()


def test_the_page_of_the_benchmarks_is_made_of_the_results() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == report.page(report.load()), "Run `python -m benchmarks.report`."
    assert losses.UNKNOWN not in page, "Say why, in benchmarks/table/losses.py."


@pytest.mark.parametrize("path", report.TABLES)
def test_tables_of_figures_are_made_of_the_results(path: str) -> None:
    start, end = report.MARKS
    table = (ROOT / path).read_text(encoding="utf-8").split(start)[1].split(end)[0]
    assert table == report.TABLES[path](report.load()), "Run `python -m benchmarks.report`."


def test_where_a_peer_is_ahead_is_found() -> None:
    rows = [
        {"task": "gramian", "case": "mlp-64", "method": "posegrad", "seconds": [3.0, 2.0, 4.0]},
        {"task": "gramian", "case": "mlp-64", "method": "peer", "seconds": [1.5, 2.0, 0.4]},
    ]
    [loss] = losses.losses({"suite": "gramian", "rows": rows})
    assert loss == ("gramian/mlp-64/peer/time", 0.5)
    assert not losses.losses({"suite": "gramian", "rows": rows[:1]})
    assert losses.why(loss, "cpu") == losses.UNKNOWN


def test_errors_of_the_benchmarks_do_not_hide_a_nan() -> None:
    one, lost = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert math.isnan(largest_difference({"a": one, "b": lost}, {"a": one, "b": one}))
    assert math.isnan(largest_difference({"a": one, "b": one}, {"a": one, "b": lost}))
    assert largest_difference({"a": one, "b": 3 * one}, {"a": one, "b": one}) == pytest.approx(2)
    tiny = 1e-8 * one
    assert largest_difference({"a": one, "b": 0 * one}, {"a": one, "b": tiny}) == 0
    assert largest_difference({"a": one, "b": one}, {"a": one, "b": tiny}) > 1e6


def test_the_table_of_the_rules_is_that_of_the_kit() -> None:
    page = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
    assert table.markdown() in page, "Paste `python -m posegrad.testing` into docs/rules.md."


def test_the_table_of_the_kit_has_every_rule() -> None:
    kinds = {type(row.make()).__name__ for row in table.RULES.values()}
    public = {path.removeprefix("posegrad.") for path in PUBLIC if _is_rule(path)}
    left_out = {"Projected", "AdaptiveClip"}  # a rule of another library; one that moves
    assert public - kinds == left_out


def test_the_map_of_the_house_is_made_of_the_docstrings() -> None:
    assert house.PAGE.read_text(encoding="utf-8") == house.page(), "Run `python -m tests.house`."
