import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from library.errors import UserError
from library.training.charts import Line, chart
from library.training.preview_grid import PreviewGrid
from library.training.prompt_files import PreviewPrompt
from library.training.report import (
    Failure,
    Message,
    Report,
    Table,
    counted,
    preview_rows,
    render,
    report_path,
    write_report,
)

HOSTILE = "</title></style></script><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7 * 7 }} \" ' &"


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.text = ""
        self.attributes = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.text += data


def report(**changes):
    grid = PreviewGrid([PreviewPrompt(prompt="a cat", seed=3)])
    grid.add(0, Image.new("RGB", (64, 64), "red"), 0)
    grid.add(0, Image.new("RGB", (64, 64), "blue"), 40)
    facts = {
        "title": "thing",
        "outcome": "finished",
        "ending": "All 40 of 40 steps were done",
        "summary": (("seed", "7"),),
        "failure": None,
        "charts": (chart("Loss", [Line(name="loss", points=[(1, 2.0), (2, 1.0)]), Line(name="b", points=[(1, 1.0)])]),),
        "previews": preview_rows(grid),
        "data": (Table(title="Folders", head=("folder", "images"), rows=(("cats", "8"),)),),
        "captions": (("01.png", "a cat"),),
        "options": (("learning_rate", "0.1", "2e-06"),),
        "versions": (("Python", "3.11"),),
        "messages": (Message(level="warning", time="12:00:00", text="look", count=3),),
    }
    return Report(**{**facts, **changes})


def test_everything_is_on_the_page():
    page = Page(render(report()))
    for text in ("thing", "finished", "All 40", "seed", "Loss", "a cat", "untrained", "step 40", "cats", "01.png"):
        assert text in page.text
    for text in ("--learning_rate", "2e-06", "3.11", "look", "3 times"):
        assert text in page.text
    assert page.tags.count("polyline") == 2
    assert page.tags.count("circle") == 1
    assert "Why it failed" not in page.text


def test_the_page_needs_nothing_from_elsewhere():
    text = render(report())
    page = Page(text)
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "action")]
    assert len(sources) == 2
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.findall(r"https?://|url\((?!#)", text)
    assert "default-src 'none'" in text


def test_hostile_text_stays_text():
    grid = PreviewGrid([PreviewPrompt(prompt=HOSTILE, negative_prompt=HOSTILE)])
    grid.add(0, Image.new("RGB", (8, 8)), 1)
    hostile = render(
        report(
            title=HOSTILE,
            ending=HOSTILE,
            summary=((HOSTILE, HOSTILE),),
            failure=Failure(what=HOSTILE, trace=HOSTILE),
            charts=(chart(HOSTILE, [Line(name=HOSTILE, points=[(1, 1.0)])], note=HOSTILE),),
            previews=preview_rows(grid),
            data=(Table(title=HOSTILE, head=(HOSTILE,), rows=((HOSTILE,),)),),
            captions=((HOSTILE, HOSTILE),),
            options=((HOSTILE, HOSTILE, HOSTILE),),
            versions=((HOSTILE, HOSTILE),),
            messages=(Message(level="warning", time=HOSTILE, text=HOSTILE),),
        )
    )
    page = Page(hostile)
    assert page.tags.count("script") == 1
    # One for the preview.
    assert page.tags.count("img") == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 15
    assert "{{ 7 * 7 }}" in page.text
    assert '49 "' not in page.text


def test_a_failed_run_says_why():
    page = Page(render(report(outcome="failed", failure=Failure(what="out of memory", trace="line 3"))))
    assert "Why it failed" in page.text
    assert "out of memory" in page.text
    assert "line 3" in page.text


def test_a_run_without_anything_has_a_page():
    empty = report(charts=(), previews=(), data=(), captions=(), options=(), messages=(), summary=())
    page = Page(render(empty))
    assert "All have their defaults." in page.text
    assert "Curves" not in page.text


def test_repeated_messages_are_told_once():
    one, other = (Message(level="warning", time="1", text=text) for text in ("a", "b"))
    assert [(message.text, message.count) for message in counted([one, other, one, one])] == [("a", 3), ("b", 1)]


def test_the_page_is_written_whole_or_not_at_all(tmp_path):
    path = report_path(tmp_path / "out", "thing")
    write_report(path, report())
    assert path.name == "thing-report.html"
    assert report_path(tmp_path, None).name == "report.html"
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        write_report(tmp_path / "file" / "x.html", report())
