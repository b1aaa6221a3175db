"""The HTML report: one well-formed page that fetches nothing, every plot drawn; opened in a browser where one is."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpquant.charts import Chart, layer_map, line_chart
from dpquant.page import page
from dpquant.rundir import Run
from tests.test_report import LAYERS, record, run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def parsed(text: str) -> ElementTree.Element:
    """The page as a tree; a tag left open or a text not escaped fails."""
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def runs(count: int = 1, epochs: int = 4) -> list[Run]:
    chosen = [("fc",), LAYERS, (), ("conv1",)]
    return [run([record(e, chosen[(e + i) % 4]) for e in range(1, epochs + 1)]) for i in range(count)]


def test_page_is_well_formed_and_fetches_nothing() -> None:
    text = page(runs())
    tree = parsed(text)
    assert [element.tag for element in tree] == ["head", "body"]
    assert not tree.findall(".//script")
    assert not [e for e in tree.iter() if {"src", "href"} & set(e.attrib) and e.get("href") != "data:,"]
    assert "url(" not in text
    assert "http" not in text


def test_every_plot_is_drawn() -> None:
    tree = parsed(page(runs()))
    figures = tree.findall(".//figure")
    assert len(figures) == 7
    for figure in figures:
        drawn = figure.findall(".//polyline") + figure.findall(".//rect")
        assert drawn, ElementTree.tostring(figure)
        assert figure.find(".//svg").get("aria-label")  # type: ignore[union-attr]
    cells = figures[0].findall(".//rect")
    assert len(cells) == 4 * len(LAYERS)
    filled = [float(cell.get("fill-opacity", "0")) > 0.5 for cell in cells]
    assert sum(filled) == sum(len(r.quantized) for r in runs()[0].records)


def test_page_says_what_the_terminal_says() -> None:
    words = " ".join("".join(parsed(page(runs())).itertext()).split())
    for expected in ("the target of 1.50x is met", "adding or removing one example", "PRV accountant", "33.3 %"):
        assert expected in words


def test_runs_are_compared() -> None:
    tree = parsed(page(runs(3)))
    polylines = tree.findall(".//figure")[0].findall(".//polyline")
    assert len(polylines) == 3
    assert len(tree.findall(".//ul[@class='legend']")[0]) == 3
    assert len(tree.findall(".//tr[@class='best']")) == 1


def test_a_run_without_epochs() -> None:
    assert "No epoch is complete" in page([run([])])


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\ufffe\uffff")))
def test_names_are_escaped(name: str) -> None:
    text = page([run([record(1, (name,))], name=name, model=name, layers=(name,))])
    parsed(text)
    assert "<script" not in text
    assert html.escape(name) in text


@given(
    st.lists(st.none() | st.floats(-1e6, 1e6) | st.just(float("nan")) | st.just(float("inf")), min_size=1, max_size=60)
)
def test_any_line_stays_inside_its_chart(values: list[float | None]) -> None:
    chart = line_chart(Chart(series={"a": values}, unit="unit", level=("target", 0.5)))
    known = [v for v in values if v is not None and abs(v) < float("inf")]
    assert bool(chart) == bool(known)
    if chart:
        tree = ElementTree.fromstring(chart)
        for circle in tree.iter("circle"):
            assert 0 <= float(circle.get("cx", "-1")) <= 440
            assert 0 <= float(circle.get("cy", "-1")) <= 210
        assert len(list(tree.iter("circle"))) == len(known)


def test_many_layers_and_epochs_fit() -> None:
    tree = ElementTree.fromstring(layer_map([f"layer{i}" for i in range(150)], 300, lambda n, e: 0.5, "t", "c"))
    assert len(list(tree.iter("rect"))) == 150 * 300
    assert float(tree.find(".//svg").get("viewBox", "").split()[2]) <= 1000  # type: ignore[union-attr]


# --- in a real browser

_LOOK = """<script>
window.addEventListener("load", () => {
  const box = e => e.getBoundingClientRect(), drawn = e => box(e).width > 0.5 || box(e).height > 0.5;
  getSelection().selectAllChildren(document.body);
  const found = {
    selected: getSelection().toString(),
    plots: [...document.querySelectorAll("figure")].map(f => ({
      width: box(f.querySelector("svg")).width,
      height: box(f.querySelector("svg")).height,
      marks: [...f.querySelectorAll("polyline, rect.cell, circle")].filter(drawn).length,
      all: f.querySelectorAll("polyline, rect.cell, circle").length,
      inside: [...f.querySelectorAll("svg *")].filter(e => e.tagName != "title").every(e =>
        box(e).left >= box(f.querySelector("svg")).left - 1 && box(e).right <= box(f.querySelector("svg")).right + 1),
    })),
    overflow: document.scrollingElement.scrollWidth - innerWidth,
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
  };
  document.body.textContent = JSON.stringify(found);
});
</script>"""


def browse(folder: Path, text: str, *options: str) -> tuple[str, str]:
    """What Chromium writes on stdout, and on its console, for a page."""
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={folder}"]
    words = [str(CHROMIUM), *quiet, *options, file.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@needs_chromium
@pytest.mark.parametrize(("size", "dark"), [("1000,2400", False), ("390,3200", True)], ids=["desk", "phone"])
def test_a_browser_draws_every_plot_and_lets_text_be_selected(tmp_path: Path, size: str, dark: bool) -> None:
    text = page(runs(2))
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    dom, console = browse(
        tmp_path, text.replace("</body>", _LOOK + "</body>"), f"--window-size={size}", "--dump-dom", *theme
    )
    assert console == ""
    found = json.loads(html.unescape(dom.split("<body>")[1].split("</body>")[0]))
    assert len(found["plots"]) == len(parsed(text).findall(".//figure")) == 18
    for plot in found["plots"]:
        assert plot["marks"] == plot["all"] > 0
        assert plot["inside"]
        assert plot["width"] > 250
        assert plot["height"] > 60
    assert found["overflow"] <= 0
    for words in ("Side by side", "the target of 1.50x is met", "adding or removing one example", "test accuracy"):
        assert words in found["selected"]
    light, ink = (sum(map(int, re.findall(r"\d+", found[key])[:3])) for key in ("background", "ink"))
    assert (light < ink) == dark


@needs_chromium
def test_a_browser_shows_it(tmp_path: Path) -> None:
    shot = tmp_path / "report.png"
    _, console = browse(tmp_path, page(runs()), "--window-size=1000,2400", f"--screenshot={shot}")
    assert console == ""
    assert shot.stat().st_size > 20_000


@needs_chromium
def test_a_console_error_is_seen(tmp_path: Path) -> None:
    _, console = browse(tmp_path, "<!DOCTYPE html><script>nothing.there</script>", "--dump-dom")
    assert "nothing is not defined" in console
