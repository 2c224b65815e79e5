"""What the tests say about which method goes with which strategy, as a pytest plugin that writes it down.

A test says what it shows with a mark:

    @pytest.mark.support(method="unstructured", strategy="ddp", feature="masks")

`pytest -p lightning_opt.testing.support --support outcomes.json` writes every mark with what became of its test, and
`scripts/support_table.py` makes `docs/support.md` of it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from lightning_opt.testing.support_table import Claim, claims_of

_MARK = (
    "support(method, strategy, feature, refused=False): what the test shows; rows and columns of docs/support.md "
    "(lightning_opt.testing.support)"
)


class _Item(Protocol):
    nodeid: str

    def iter_markers(self, name: str) -> Iterator[Any]: ...


class Recorder:
    """Keep what became of each test that has a mark.

    Args:
        path: Where to write it in the end; None: nowhere.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.claims: dict[str, list[Claim]] = {}
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[_Item]) -> None:
        """Read the marks of all tests."""
        for item in items:
            found = [claim for mark in item.iter_markers("support") for claim in claims_of(**mark.kwargs)]
            if found:
                self.claims[item.nodeid] = found

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note the outcome: that of the test itself, or what kept it from running."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        """Write what is known."""
        if self.path is not None:
            self.path.write_text(json.dumps(self.rows(), indent=1) + "\n", encoding="utf-8")

    def rows(self) -> list[dict[str, Any]]:
        """Return each mark with its test and what became of it; tests that did not run are left out."""
        return [
            {**vars(claim), "test": test.partition("[")[0], "outcome": self.outcomes[test]}
            for test, claims in self.claims.items()
            if test in self.outcomes
            for claim in claims
        ]


def pytest_addoption(parser: Any) -> None:
    """Add `--support`."""
    parser.addoption("--support", type=Path, default=None, help="file for what the marks of `support` tests show")


def pytest_configure(config: Any) -> None:
    """Declare the mark, and watch."""
    config.addinivalue_line("markers", _MARK)
    path = config.getoption("--support")
    if path is not None:
        config.pluginmanager.register(Recorder(path), "support-recorder")
