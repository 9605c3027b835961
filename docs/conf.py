"""The documentation's settings, and the pages that are made from the code and the records: `make docs`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from dcn_kernels.cli import bench, check

import dcn_kernels
from dcn_kernels.bench import record

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "dcn-kernels"
author = "the dcn-kernels authors"
copyright = author
version = release = dcn_kernels.__version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]
templates_path = ["_templates"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
# Parts of CONTRIBUTING.md are included, whose links lead from its own folder; tests/test_docs.py follows all links.
suppress_warnings = ["myst.xref_missing"]
autosummary_generate = True
numpydoc_show_class_members = False
toc_object_entries = False

html_theme = "pydata_sphinx_theme"  # NumPy's, SciPy's and CuPy's
html_title = "dcn-kernels"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_show_sourcelink = False
html_theme_options = {"show_prev_next": True, "navigation_with_keys": False, "secondary_sidebar_items": ["page-toc"]}


def _commands() -> str:
    """A page with the help of every command."""
    lines = ["# Commands", "", "What `--help` prints.", ""]
    for name, group in (("dcn-bench", bench.main), ("dcn-check", check.main)):
        lines += [f"## {name}", *_help(name, group)]
        for command in sorted(group.commands):
            lines += [f"### {name} {command}", *_help(f"{name} {command}", group.commands[command])]
    return "\n".join(lines)


def _help(name: str, command: click.Command) -> list[str]:
    context = click.Context(command, info_name=name, max_content_width=88)
    return ["", "```text", command.get_help(context), "```", ""]


def _write(path: Path, text: str) -> None:
    """Only what changed, so that a second build has little to do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _made_pages(app: Any) -> None:
    """Commands, records and pictures, before Sphinx looks for its sources."""
    import pictures

    _write(HERE / "reference" / "made" / "commands.md", _commands())
    for path in sorted((HERE.parent / "bench_results").glob("*.json")):
        found = record.read(path)
        lines = [f"# {path.stem}", "", record.markdown(found)]
        _write(HERE / "records" / "made" / f"{path.stem}.md", "\n".join(lines))
    pictures.make(HERE / "explanation" / "made")


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("config-inited", lambda app, config: _made_pages(app))
