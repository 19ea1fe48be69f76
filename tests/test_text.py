"""Names may contain anything, and stay text wherever they are shown: in cards, tables, figures, on the terminal."""

from __future__ import annotations

import csv
import io
import re
import warnings
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from bkd_hf import text
from bkd_hf.announcer import Announcer
from bkd_hf.card import build
from bkd_hf.compare import save_comparison
from bkd_hf.comparison import Comparison
from bkd_hf.plots import save_plots
from bkd_hf.results import save_json
from bkd_hf.splits import _write_card
from tests.test_card import results_with

NASTY = [
    "[x](http://evil)", "![x](http://evil)", "http://evil", "www.evil.com", "a@evil.com", "<http://evil>", "<b>",
    "a|b", "`", "``` x", "a`|`b", "~~x~~", "**x**", "_x_", "# x", "$x^2$", r"$\frac{", r"\$", "$$", "[red]x[/red]",
    "[/]", "\x1b[31mx", "a\rb", "a\nb", "\u202eevil", "\ud800", "=cmd|'x'!A0", "+1", "-1", "@x", "\t=1", "---", "&lt;",
    "{{ x }}", "{% x %}", "עברית", "猫", "👩‍🚀", "e\u0301", "\x00", "", " ", "x" * 5000, "%s", "'", '"', "\\",
]  # fmt: skip
ANYTHING = st.text(st.characters(exclude_categories=()), max_size=30) | st.sampled_from(NASTY)
FEW = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))


def plain(markdown: str, in_table: bool) -> str:
    """What a reader sees of a name, which may hold no markup at all: one text."""
    parser = MarkdownIt("gfm-like", {"linkify": False}).enable("table")
    source = f"| x | {markdown} |\n|---|---|\n| y | {markdown} |\n" if in_table else f"x {markdown} y\n"
    inline = [token for token in parser.parse(source) if token.type == "inline"]
    assert len(inline) == (4 if in_table else 1)
    children = inline[-1].children or []
    kinds = {child.type for child in children}
    assert kinds <= {"text", "code_inline", "html_inline"}, kinds
    assert all(child.content in ("<code>", "</code>") for child in children if child.type == "html_inline")
    seen = "".join(child.content for child in children if child.type != "html_inline")
    return seen if in_table else seen.removeprefix("x ").removesuffix(" y")


@pytest.mark.parametrize("show", [text.markdown, text.code])
@pytest.mark.parametrize("in_table", [True, False])
@given(name=ANYTHING)
@settings(max_examples=100, deadline=None)
@example("a\\")
@example("`|")
def test_markdown_shows_a_name_as_it_is(show, in_table, name):
    seen = plain(show(name), in_table)
    assert seen.strip() == (text.one_line(name) or "(no name)")


@given(name=ANYTHING)
@settings(max_examples=200, deadline=None)
def test_every_reader_gets_one_printable_line(name):
    for shown in (
        text.markdown(name),
        text.code(name),
        text.figure(name),
        text.one_line(name),
        text.spreadsheet(name),
    ):
        assert len(shown.splitlines()) <= 1
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e]", shown)
        shown.encode("utf-8")
    assert len(text.figure(name).replace(r"\$", "$")) <= 24
    assert not text.spreadsheet(name).startswith(("=", "+", "-", "@"))
    assert yaml.safe_load(yaml.safe_dump({"x": text.one_line(name)})) == {"x": text.one_line(name)}


@pytest.mark.parametrize("block", ["x", "```", "a\n````\nb", "`" * 10])
def test_code_cannot_end_its_block(block):
    (token,) = MarkdownIt().parse(text.code_block(block, "bash"))
    assert (token.type, token.content, token.info) == ("fence", block + "\n", "bash")


def results_of(names: list[str], name: str):
    results = results_with([60, 50, 8, 4], [20] * 4, [*names[:3], "plain"])
    results["data"]["name"] = results["student"]["model"] = results["teacher"]["model"] = name
    results["data"]["eval_split"] = results["command"] = results["hardware"]["device"] = name
    results["versions"]["torch"] = results["hardware"]["precision"] = name
    return results


@given(names=st.lists(ANYTHING, min_size=3, max_size=3), name=ANYTHING)
@example(names=NASTY[:3], name="```\n[x](http://evil)")
@example(names=NASTY[12:15], name="---\nlicense: mit")
@FEW
def test_card(names, name):
    card = str(build(results_of(names, name), tags=[name], language=name or None, license=name or None))
    card.encode("utf-8")
    metadata = ModelCard(card).data
    assert text.one_line(name)[:20] in str(metadata.tags) or not text.one_line(name).isalnum()
    body = MarkdownIt("gfm-like", {"linkify": False}).enable("table").parse(ModelCard(card).text)
    inline = [child for token in body if token.type == "inline" for child in token.children or []]
    links = {
        child.attrs.get("href", child.attrs.get("src")) for child in inline if child.type in ("link_open", "image")
    }
    assert all(str(link).startswith("figures/") for link in links)
    html = {child.content for child in inline if child.type == "html_inline"}
    assert html <= {"<code>", "</code>", "<summary>", "</summary>"}
    assert next(token.content for token in body if token.type == "fence").count("pipeline(") == 1


@given(names=st.lists(ANYTHING, min_size=3, max_size=3), name=ANYTHING)
@example(names=NASTY[12:15], name="$x^$")
@settings(FEW, max_examples=2)
@pytest.mark.slow
def test_figures_and_comparison(names, name, tmp_path_factory):
    results, folder = results_of(names, name), tmp_path_factory.mktemp("x")
    results["method"] = name
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that is missing
        save_plots(results, folder)
        save_comparison(Comparison([results]), folder)
    page = (
        MarkdownIt("gfm-like", {"linkify": False}).enable("table").parse((folder / "comparison.md").read_text("utf-8"))
    )
    kinds = {child.type for token in page if token.type == "inline" for child in token.children or []}
    assert kinds <= {"text", "image", "code_inline", "softbreak", "strong_open", "strong_close", "html_inline"}
    for table in ("comparison.csv", "cells.csv"):
        rows = list(csv.DictReader(io.StringIO((folder / table).read_text("utf-8"))))
        assert {row["method"] for row in rows} == {text.spreadsheet(name)}
    save_json(results, folder / "results.json")


@given(name=ANYTHING)
@example("[red]x[/red] :smile: \x1b[31m[/]")
@settings(max_examples=30, deadline=None)
def test_terminal(name):
    say, file = Announcer(), io.StringIO()
    say._console = Console(file=file, width=1000, highlight=False, emoji=False, soft_wrap=True, force_terminal=False)
    say(name)
    say.table(results_of(["a", "b", "c"], name))
    assert text.one_line(name, 80) in file.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", file.getvalue().replace("\t", ""))
    file.getvalue().encode("utf-8")


@given(names=st.lists(ANYTHING, min_size=2, max_size=2, unique=True), name=ANYTHING)
@example(names=["[x](http://evil)", "```"], name="a`|[x](http://evil)")
@FEW
def test_card_of_a_split(names, name, tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("split")
    how = {"name": name, "command": name, "train_list": name, "test_list": name}
    content = {"num_images": 3, "class_counts": [2, 1]}
    record = {"how": how, "class_names": ["a", "b"], "splits": {"train": content, "test": content}}
    record["class_names"] = names
    _write_card(folder, record, license=name or "mit")
    card = (folder / "README.md").read_text(encoding="utf-8")
    body = MarkdownIt("gfm-like", {"linkify": False}).enable("table").parse(card.split("\n---\n", 1)[1])
    inline = [child for token in body if token.type == "inline" for child in token.children or []]
    assert not [child for child in inline if child.type == "link_open"]
    assert sum(child.type == "image" for child in inline) == 1
