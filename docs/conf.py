"""Sphinx: ``python -m sphinx -W --keep-going -b html docs docs/_build/html``; what it makes needs no network."""

import sys
from pathlib import Path

import pipeline

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "featuremaps"
author = "the featuremaps developers"
copyright = "the featuremaps developers, Apache-2.0"  # noqa: A001 (Sphinx names it)
version = release = pipeline.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "pages"]
exclude_patterns = ["_build", "extensions", "templates"]
nitpicky = True
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(collections|concurrent|dask|distributed|matplotlib|np|numpy|pandas|pathlib|pd|pydantic|threading|typing|xarray|xr)\..*",
    ),
    (r"py:.*", r"pipeline\.[\w.]+\.(Array|Pixels|Place|M|_\w+)"),  # aliases of types, which have no page
    (r"py:class", r"[^.]*"),  # words of numpy docstrings: "int, optional", "(y, x, channel) uint8"
    (r"py:obj", r".*"),  # single back quotes: a link where there is a page, code elsewhere
]

# -- Markdown ---------------------------------------------------------------------------------------------------------------------

myst_heading_anchors = 4  # links to headings are written as for a code host
myst_enable_extensions = ["attrs_block", "attrs_inline"]
highlight_language = "sh"  # of indented blocks
copybutton_exclude = ".linenos, .gp, .go"

# -- docstrings -------------------------------------------------------------------------------------------------------------------

default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say types, with shapes and units
napoleon_google_docstring = False
napoleon_use_rtype = False

# -- pages ------------------------------------------------------------------------------------------------------------------------

templates_path = ["templates"]
html_theme = "pydata_sphinx_theme"
html_title = f"featuremaps {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "featuremaps"},
    "footer_start": ["copyright"],
    "footer_end": [],
    "navbar_center": [],
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
}
html_sidebars = {"**": ["contents.html"]}
html_context = {"default_mode": "auto"}
