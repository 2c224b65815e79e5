"""A page of a report as data, and the two ways to write it: self-contained HTML and Markdown."""

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from lightning_opt.reporting import text
from lightning_opt.reporting.figures import Drawn
from lightning_opt.reporting.record import write_durably
from lightning_opt.reporting.tables import Table

_SHORT_CELL = 14


@dataclass(frozen=True)
class Code:
    """Lines to copy.

    Attributes:
        title: What they do.
        language: For highlighting, such as "bash".
        lines: The code itself.
    """

    title: str
    language: str
    lines: str


@dataclass(frozen=True)
class Section:
    """A part of a page: its tables, figures, remarks and code, in this order."""

    title: str
    tables: Sequence[Table] = ()
    figures: Sequence[Drawn] = ()
    remarks: Sequence[str] = ()
    code: Sequence[Code] = ()

    def __bool__(self) -> bool:
        return bool(self.tables or self.figures or self.remarks or self.code)


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: Its heading.
        kicker: One short line above the heading.
        verdict: The first sentence that one reads.
        mood: "good", "mixed", "bad" or "open".
        caveats: Sentences under the verdict.
        tiles: A few large numbers, each with what it counts.
        warnings: What to know before believing the numbers.
        sections: The rest; empty ones are left out.
    """

    title: str
    kicker: str
    verdict: str
    mood: str = "open"
    caveats: Sequence[str] = ()
    tiles: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    sections: Sequence[Section] = field(default_factory=tuple)


class _Raw(str):
    """Text that is Markdown already."""

    __slots__ = ()


def write_page(page: Page, folder: Path, name: str) -> tuple[Path, Path]:
    """Write a page as `NAME.html` (figures inside) and `NAME.md` (figures beside it).

    Returns:
        The two paths.

    Raises:
        StorageError: A file could not be written.
    """
    html, markdown = folder / f"{name}.html", folder / f"{name}.md"
    write_durably(html, to_html(page))
    write_durably(markdown, to_markdown(page, folder))
    return html, markdown


def _template(name: str) -> str:
    return files("lightning_opt.reporting").joinpath("templates", name).read_text(encoding="utf-8")


def to_html(page: Page) -> str:
    """Write a page as one HTML file without scripts and without anything remote."""
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["keep_short"] = _keep_short
    css = _template("style.jinja").strip()
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    values = {"page": page, "css": Markup(css), "css_hash": digest, "data_uri": _data_uri}
    return environment.get_template("report.html").render(values)


def _keep_short(cell: str, limit: int = _SHORT_CELL) -> str:
    """Keep a short cell, such as a number and its unit, on one line."""
    return cell.replace(" ", "\u00a0") if len(cell) <= limit else cell


def _data_uri(figure: Drawn) -> str:
    return f"data:image/png;base64,{base64.b64encode(figure.path.read_bytes()).decode()}"


def to_markdown(page: Page, folder: Path) -> str:
    """Write a page as Markdown for a file in `folder`; every value is escaped on its way in."""
    environment = Environment(  # Markdown has its own escaping, done by `finalize` for every value
        loader=FunctionLoader(_template),
        autoescape=False,
        finalize=lambda value: value if isinstance(value, _Raw) else text.markdown(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tools = {"row": _row, "rule": _rule, "fence": _fence, "link": lambda figure: _link(figure, folder)}
    written = environment.get_template("report.md").render({"page": page, **tools})
    return re.sub(r"\n{3,}", "\n\n", written).strip() + "\n"


def _row(cells: Sequence[str]) -> _Raw:
    return _Raw("| " + " | ".join(text.markdown(cell) or " " for cell in cells) + " |")


def _rule(cells: Sequence[Any]) -> _Raw:
    return _Raw("|" + "---|" * len(cells))


def _fence(code: Code) -> _Raw:
    longest = max((len(run) for run in re.findall(r"`+", code.lines)), default=0)
    marks = "`" * max(3, longest + 1)
    return _Raw(f"{marks}{code.language}\n{code.lines}\n{marks}")


def _link(figure: Drawn, folder: Path) -> _Raw:
    return _Raw(f"![{text.markdown(figure.title)}]({Path(os.path.relpath(figure.path, folder)).as_posix()})")
