"""Parts of every report: status, cards, charts, predicted against measured, timeline. One HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.report.drawing import Chart
from orchestrator.report.records import finite
from orchestrator.report.text import bytes_text, clock, duration, metric_text, number, pretty
from orchestrator.report.timeline import Row


@dataclass(frozen=True)
class Figure:
    """One number with the words around it; `tone` is good, fair, bad or empty."""

    label: str
    value: str
    detail: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Comparison:
    """One thing the plan predicted: as text, and the measured value over the predicted one."""

    what: str
    predicted: str
    measured: str
    ratio: float | None


@dataclass(frozen=True)
class Share:
    """A part of the time, and the color of its piece of the bar."""

    what: str
    seconds: float
    color: str


@dataclass(frozen=True)
class Page:
    """The part common to both reports. `callouts`: (text, tone), to be read first."""

    name: str
    status: str
    tone: str
    callouts: Sequence[tuple[str, str]]
    headline: Sequence[Figure]
    shares: Sequence[Share]
    charts: Sequence[Chart]
    comparisons: Sequence[Comparison]
    timeline: Sequence[Row]
    job_text: str

    @property
    def began(self) -> float | None:
        """Time of the first event, in seconds since the epoch."""
        return self.timeline[0].time if self.timeline else None


def render_page(template: str, page: Page, **more: Any) -> str:
    """The page as text; `template` fills the blocks of page.html.jinja. Everything is escaped."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("orchestrator", "report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bytes=bytes_text, duration=duration, clock=clock, number=number, pretty=pretty,
        metric=lambda value: "–" if finite(value) is None else metric_text(value),
    )  # fmt: skip
    found = environment.get_template(template)
    return found.render(page=page, plotly_js=Markup(get_plotlyjs()), **more)


def compared(
    what: str, predicted: float | None, measured: float | None, text: Callable[[Any], str]
) -> Comparison:
    """A prediction beside a measurement; a dash where either is unknown."""
    ratio = measured / predicted if predicted and measured is not None else None
    return Comparison(what, text(predicted), text(measured), ratio)


def two_to_a_row(drawn: Sequence[Chart | None]) -> list[Chart]:
    """The charts there are, the last narrow one widened where it would leave a hole beside it."""
    found = [chart for chart in drawn if chart]
    narrow = [i for i, chart in enumerate(found) if not chart.wide]
    if len(narrow) % 2:
        found[narrow[-1]] = replace(found[narrow[-1]], wide=True)
    return found
