"""What the documents say can be typed, opened and found."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from lightning_opt.__main__ import _COMMANDS
from lightning_opt.config import compose
from lightning_opt.config.checks import check
from lightning_opt.config.sweeps_open import open_sweep
from lightning_opt.errors import LightningOptError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STUDIES = sorted(path for path in (ROOT / "experiments").iterdir() if path.is_dir() and path.name[0] not in "._")
DOCUMENTS += [ROOT / "experiments" / "README.md", *(path / "README.md" for path in STUDIES)]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = """
import lightning.pytorch as pl
import torch


class Net(torch.nn.Sequential):
    def __init__(self, width: int = 32):
        super().__init__()


class Data(pl.LightningDataModule):
    pass
"""


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """Return the words of each of our commands in the shell blocks of a document."""
    found = []
    for line in (line for block in blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()):
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words[:2] == ["python", "train.py"]:
            found.append(["train", *words[2:]])
        elif words[:1] == ["lightning-opt"]:
            found.append(words[1:])
    return found


COMMANDS = [pytest.param(words, id=" ".join(words)) for words in commands(README)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder: own package, own options, some runs."""
    (tmp_path / "my_pkg.py").write_text(PACKAGE)
    (tmp_path / "my_conf" / "model").mkdir(parents=True)
    (tmp_path / "my_conf" / "model" / "mine.yaml").write_text("_target_: my_pkg.Net\n")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_readme_shows_commands():
    assert len(COMMANDS) >= 10
    assert {words.values[0][0] for words in COMMANDS} >= {"train", "evaluate", "benchmark", "export", "report"}


@pytest.mark.parametrize("words", COMMANDS)
def test_command_of_the_readme_passes_the_checks(words, folder):
    command, *rest = words
    assert command in _COMMANDS
    if "--help" in rest:
        return
    if command == "report":
        rest = [word for word in rest if "=" in word]
    line = compose.read_command_line(rest, config_name=command)
    if line.multirun:
        if any(word.startswith("sweep=optuna") for word in rest):
            pytest.importorskip("optuna")
        open_sweep(line, program=["python", "train.py"], rehearse=lambda config: None)  # checks the whole space
        return
    sweeps = [word.partition("=")[0] for word in line.overrides if "," in word and "[" not in word]
    assert not sweeps, f"{sweeps} has several values and -m is missing"
    config = compose.plain(compose.compose_config(line))
    if command == "train":
        check(config)


def test_a_wrong_command_would_not_pass(folder):
    with pytest.raises(LightningOptError, match="distill"):
        test_command_of_the_readme_passes_the_checks(["train", "+experiment=distil"], folder)


def test_python_of_the_readme_parses_and_its_imports_exist():
    for block in blocks(README, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("lightning_opt"):
                module = __import__(node.module, fromlist=["*"])
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_every_experiment_is_named_and_every_named_one_exists():
    shipped = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    named = set(re.findall(r"\bexperiment=(\w+)", README)) - {"NAME"}
    assert named <= shipped
    assert shipped <= named


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_a_document_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://", "mailto:")):
            continue
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def anchors(document):
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_study_is_whole(study):
    """README with the command, a script, results; and both lists of studies name it."""
    text = (study / "README.md").read_text(encoding="utf-8")
    assert json.loads((study / "results.json").read_text(encoding="utf-8"))
    scripts = [path for path in study.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert scripts
    for script in scripts:
        ast.parse(script.read_text(encoding="utf-8"))
    assert [path for path in scripts if f"python experiments/{study.name}/{path.name}" in text], "README has no command"
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (study / picture).is_file()
    assert f"({study.name}/README.md)" in (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")


def test_named_studies_exist():
    for document in DOCUMENTS:
        for name in re.findall(r"\bexperiments/(\w+)/", document.read_text(encoding="utf-8")):
            assert (ROOT / "experiments" / name).is_dir(), f"{document.name} names experiments/{name}"


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(blocks(README, "bash")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_extras_of_the_readme_are_those_of_the_package():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    table = README[README.index("| extra |") :].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in table.splitlines())))
    assert named == set(extras)
