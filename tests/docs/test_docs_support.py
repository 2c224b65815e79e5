"""docs/support.md says what the marks of the tests say, and the plugin writes down what became of them."""

import json
import subprocess
import sys

import pytest

from lightning_opt.testing.support_table import METHODS, STRATEGIES, Claim, cell, claims_from, claims_in, document

PROJECT = """
import pytest

MARK = pytest.mark.support(method=["n_m", "qat"], strategy="ddp", feature="masks")
CASES = [pytest.param(1, marks=MARK), 2]


@pytest.mark.support(method="unstructured", strategy="fsdp2", feature="resume")
def test_good():
    pass


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.support(
    method="ptq", strategy="pipeline", feature="pair", refused=True))])
def test_of_cases(number):
    pass


@pytest.mark.parametrize("number", CASES)
def test_that_fails(number):
    assert number == 2


@pytest.mark.support(method="structured", strategy="ddp", feature="structure")
def test_that_cannot_run():
    pytest.skip("nothing here")


def test_of_something_else():
    pass
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_project.py").write_text(PROJECT)
    command = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "lightning_opt.testing.support",
        "--strict-markers",
        "-p",
        "no:cacheprovider",
    ]
    command += ["--support", "outcomes.json", "tests"]
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=120)
    assert "1 failed, 5 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    return folder


def test_the_table_is_what_the_tests_claim(root):
    written = (root / "docs" / "support.md").read_text(encoding="utf-8")
    assert written == document(claims_in(root / "tests")), "make docs/support.md anew, as it says itself"


def test_every_cell_is_there(root):
    rows = [line for line in (root / "docs" / "support.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == len(METHODS) + 1
    assert {row.count("|") for row in rows} == {len(STRATEGIES) + 2}


def test_outcomes_become_cells(project):
    claims = claims_from(json.loads((project / "outcomes.json").read_text()))
    assert cell(claims, "unstructured", "fsdp2") == "tested: resume"
    assert cell(claims, "ptq", "pipeline") == "refused by name"
    assert cell(claims, "n_m", "ddp") == cell(claims, "qat", "ddp") == "**failing**"
    assert cell(claims, "structured", "ddp") == cell(claims, "structured", "fsdp2") == "not tested"


def test_what_passes_in_part_is_said_in_full():
    rows = [
        {"method": "qat", "strategy": "ddp", "feature": "resume", "refused": False, "test": "a", "outcome": "passed"},
        {"method": "qat", "strategy": "ddp", "feature": "pair", "refused": True, "test": "b", "outcome": "passed"},
        {"method": "qat", "strategy": "ddp", "feature": "loss", "refused": False, "test": "c", "outcome": "passed"},
    ]
    assert cell(claims_from(rows), "qat", "ddp") == "tested: loss, resume; part refused"
    assert cell(claims_from([*rows, rows[0] | {"outcome": "failed"}]), "qat", "ddp") == "**failing**"


def test_marks_in_the_source_are_those_that_ran(project):
    read = claims_in(project / "tests")
    ran = claims_from(json.loads((project / "outcomes.json").read_text()))
    assert {claim: set(tests) for claim, tests in read.items()} == {claim: set(tests) for claim, tests in ran.items()}
    assert Claim("qat", "ddp", "masks") in read
    assert read[Claim("ptq", "pipeline", "pair", refused=True)] == {"tests/test_project.py::test_of_cases": "passed"}


def test_a_mark_with_an_unknown_name_is_refused(tmp_path):
    (tmp_path / "tests").mkdir()
    mark = '@pytest.mark.support(method="pruning", strategy="ddp", feature="masks")'
    (tmp_path / "tests" / "test_one.py").write_text(f"import pytest\n\n\n{mark}\ndef test_one():\n    pass\n")
    with pytest.raises(ValueError, match="'pruning' is none of supervised"):
        claims_in(tmp_path / "tests")
