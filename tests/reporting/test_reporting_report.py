"""The report of one run: complete, self-contained, honest, and harmless whatever the names are."""

import base64
import copy
import hashlib
import re
from html.parser import HTMLParser

import pytest
from fake_run import HOSTILE, full_record, make_run, rename, write_metrics

from lightning_opt.errors import StorageError
from lightning_opt.reporting import comparison, finish, new_record, render, write_record
from lightning_opt.reporting.record import MEASURES

ALLOWED_TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "main",
    "header",
    "section",
    "aside",
    "div",
    "p",
    "span",
    "h1",
    "h2",
    "b",
    "ul",
    "li",
    "dl",
    "dt",
    "dd",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "figure",
    "figcaption",
    "img",
    "pre",
    "code",
}


class Page(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.addresses, self.meta, self.words, self.style, self._inside = [], [], {}, [], "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self._inside = tag
        self.tags.append((tag, values))
        self.addresses += [values[name] for name in ("src", "href", "action", "srcset", "data") if name in values]
        if tag == "meta":
            self.meta[values.get("http-equiv") or values.get("name") or "charset"] = values.get("content")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "style":
            self.style += data
        else:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Give the folder, page and Markdown of a complete run, rendered once."""
    folder = make_run(tmp_path_factory.mktemp("complete") / "run")
    (folder / "artifact").mkdir()
    return folder, *read(folder)


def read(run_dir):
    html, markdown = render(run_dir)
    return Page(html.read_text(encoding="utf-8")), markdown.read_text(encoding="utf-8")


def test_a_complete_run(complete):
    run_dir, page, markdown = complete
    for text in (page.text, markdown):
        assert "keeps 99.2 % of the teacher's acc (0.968 of 0.976)" in text
        assert "gains 2.3 points over the student alone" in text
        for words in ("teacher", "student alone", "distilled student", "17×", "5.2×", "4.21 ms", "ONNX Runtime"):
            assert words in text, words
        assert "no energy counter on this machine" in text
        assert "the machine was busy" in text
        assert "python train.py +experiment=distill seed=7" in text
        assert "import lightning_opt" in text
        assert f"lightning_opt.load({str(run_dir)!r})" in text
        assert "0.1 CE + 0.9 KD" in text
    names = {path.name for path in (run_dir / "figures").iterdir()}
    assert names == {"quality_and_cost.png", "gains.png", "quality.png", "losses.png", "latency.png"}
    for name in names:
        assert f"(figures/{name})" in markdown


def test_the_verdict_comes_first(complete):
    _, page, markdown = complete
    sentence = "The distilled student keeps"
    assert page.text.index(sentence) < page.text.index("Before and after")
    assert markdown.index(sentence) < markdown.index("## ")


def test_the_page_needs_nothing_but_itself(complete):
    _, page, _ = complete
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert {tag for tag, _ in page.tags} <= ALLOWED_TAGS
    assert not [name for _, values in page.tags for name in values if name.startswith("on") or name == "style"]
    assert not re.search(r"url\(|@import", page.style)
    for address in page.addresses:
        assert base64.b64decode(address.split(",", 1)[1]).startswith(b"\x89PNG")


def test_the_policy_allows_this_style_and_nothing_else(complete):
    _, page, _ = complete
    rules = dict(rule.strip().split(" ", 1) for rule in page.meta["Content-Security-Policy"].split(";"))
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert rules["default-src"] == "'none'"
    assert rules["style-src"] == f"'sha256-{digest}'"
    assert rules["img-src"] == "data:"
    assert "prefers-color-scheme: dark" in page.style
    assert "@media print" in page.style


def test_distillation_that_did_not_help_is_said_first(tmp_path, record):
    record["models"]["student"]["quality"]["acc"] = 0.941
    record["comparison"] = comparison(record["models"])
    write_record(tmp_path, record)
    page, markdown = read(tmp_path)
    said = "did not beat the student alone (0.941 against 0.945)"
    assert said in page.text
    assert said in markdown.split("## ")[0]
    assert ("header", {"class": "bad"}) in page.tags


def hostile_record():
    record = full_record()
    record["git"] = {**record["git"], "commit": "0" * 40}  # a real one may hold a word that is renamed
    plain = {name: value for name, value in record["models"]["student"].items() if name != "engines"}
    for name in HOSTILE:
        record["models"][name] = copy.deepcopy(plain)
        record["stages"].append({"method": name, "from_step": None, "to_step": 3, "what": name})
        record["deployed"].append(copy.deepcopy(record["deployed"][1]) | {"format": name, "file": f"x/{len(name)}"})
        record["warnings"].append(name)
        record["predicted"].append({name: name})
    record |= {"command": " ".join(HOSTILE), "task_name": HOSTILE[0], "recipe": [{"op": name} for name in HOSTILE]}
    record["versions"][HOSTILE[1]] = HOSTILE[0]
    record["hardware"]["gpus"] = [{"name": HOSTILE[0], "memory_bytes": None}]
    record["comparison"]["fidelity"] = {HOSTILE[0]: 0.5}
    for model in record["models"].values():
        model["quality"][HOSTILE[2]] = model["quality"].pop("f1")
    return record


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Give the folder, page and Markdown of a run in which every name is hostile."""
    folder = make_run(tmp_path_factory.mktemp("hostile") / "run", rename(hostile_record(), "acc", HOSTILE[7]))
    write_metrics(folder / "metrics.csv", best=0.9, terms=[f"loss_{name}" for name in HOSTILE[:3]], steps=60, epochs=2)
    return folder, *read(folder)


def test_hostile_names_are_only_text_in_html(hostile):
    folder, page, _ = hostile
    assert {tag for tag, _ in page.tags} <= ALLOWED_TAGS
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not [name for _, values in page.tags for name in values if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert not set("\x00\x07\x1b\u202e\u2066") & set(page.text)
    assert {path.name for path in folder.rglob("*.png")} == {path.name for path in (folder / "figures").iterdir()}


def test_hostile_names_are_only_text_in_markdown(hostile):
    _, _, markdown = hostile
    outside = re.sub(r"(?ms)^(`{3,})\w*$.*?^\1$", "", markdown)
    assert "&lt;script&gt;alert(1)" in outside
    assert "<" not in outside
    assert not re.search(r"(?<!\\)\[link(?<!\\)\]\(", outside)
    assert not set("\x00\x07\x1b\u202e\u2066") & set(markdown)
    widths = [
        {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines() if line.startswith("|")}
        for block in outside.split("\n\n")
    ]
    assert all(len(found) <= 1 for found in widths)


def test_code_with_fences_in_it_stays_code(tmp_path, record):
    record["command"] = "train.py x='\n```\n# not a heading\n'"
    write_record(tmp_path, record)
    assert "````bash" in read(tmp_path)[1]


@pytest.mark.parametrize("absent", [("baseline",), ("teacher",), ("teacher", "baseline"), ("student",)])
def test_models_may_be_absent(tmp_path, record, absent):
    for name in absent:
        del record["models"][name]
    record["comparison"] = comparison(record["models"], deployed=record["deployed"])
    write_record(tmp_path, record)
    page, markdown = read(tmp_path)
    if "baseline" in absent and "teacher" not in absent:
        assert "no control run of the student alone" in page.text
        assert "no control run of the student alone" in markdown


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_a_run_without_results(tmp_path, status):
    record = new_record("train.py", seed=1, config_sha256=None)
    if status != "running":
        finish(record, status=status, error="loss is NaN at step 7" if status == "failed" else None)
    write_record(tmp_path, record)
    page, markdown = read(tmp_path)
    said = {"running": "still going on", "failed": "loss is NaN at step 7", "interrupted": "was interrupted"}[status]
    assert said in page.text
    assert said in markdown
    assert "No model was measured" in page.text
    assert not (tmp_path / "figures").exists()


def test_a_run_without_benchmark(tmp_path, record):
    for model in record["models"].values():
        unmeasured = dict.fromkeys(name for name in MEASURES if name != "quality")
        model |= unmeasured | {"engines": [], "reasons": dict.fromkeys(unmeasured, "benchmark=false")}
    record |= {"deployed": [], "comparison": comparison(record["models"])}
    folder = make_run(tmp_path / "run", record)
    page, _ = read(folder)
    assert "benchmark=false" in page.text
    assert "0.968" in page.text
    assert {path.name for path in (folder / "figures").iterdir()} == {"quality.png", "losses.png"}


def test_a_run_without_curves_still_has_its_tables(tmp_path, record):
    write_record(tmp_path, record)
    page, _ = read(tmp_path)
    assert "99.2 %" in page.text
    assert not (tmp_path / "figures" / "losses.png").exists()
    assert (tmp_path / "figures" / "gains.png").exists()


def test_rendering_again_gives_the_same_bytes(complete):
    run_dir, _, _ = complete
    first = [path.read_bytes() for path in (run_dir / "report.html", run_dir / "report.md")]
    assert [path.read_bytes() for path in render(run_dir)] == first


def test_no_record_no_report(tmp_path):
    with pytest.raises(StorageError, match=r"record\.json"):
        render(tmp_path)
    assert list(tmp_path.iterdir()) == []
