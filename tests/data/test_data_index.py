import json

import pytest
from data_helpers import make_sdist

from lightning_opt.data.index import DEFAULT_INDEX, IndexReadError, download, index_urls, pip_settings


def test_reads_a_json_page(index):
    filename, content = make_sdist({"a": b"1"})
    package = index.add(filename, content)
    page = index.folder / "simple" / "toysource"
    other = {"filename": "toysource-0.9.tar.gz", "url": "toysource-0.9.tar.gz", "hashes": {}}
    listing = {"files": [other, {"filename": filename, "url": f"../toysource/{filename}#sha256=0", "hashes": {}}]}
    (page / "index.html").write_text(json.dumps(listing))
    assert download(package) == content
    assert "application/vnd.pypi.simple.v1+json" in index.headers[0]["Accept"]


def test_sends_the_login_of_the_index_and_hides_it_from_messages(index, monkeypatch):
    package = index.add(*make_sdist({"a": b"1"}))
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("http://", "http://me:s3cret@"))
    download(package)
    assert index.headers[0]["Authorization"] == "Basic bWU6czNjcmV0"  # base64 of me:s3cret
    (index.folder / "simple" / "toysource" / "index.html").unlink()
    (index.folder / "simple" / "toysource" / package.filename).unlink()
    with pytest.raises(IndexReadError) as caught:
        download(package)
    assert "s3cret" not in str(caught.value)


def test_asks_further_indexes_in_order(index, monkeypatch):
    filename, content = make_sdist({"a": b"1"})
    package = index.add(filename, content)
    monkeypatch.setenv("PIP_INDEX_URL", index.url + "/nothing")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{index.url}/neither {index.url}")
    assert download(package) == content


def test_reads_an_index_in_a_folder(index, monkeypatch):
    filename, content = make_sdist({"a": b"1"})
    package = index.add(filename, content)
    monkeypatch.setenv("PIP_INDEX_URL", (index.folder / "simple").as_uri())
    assert download(package) == content
    assert not index.requests


def test_a_page_from_the_network_cannot_point_into_the_file_system(index, tmp_path):
    filename, content = make_sdist({"a": b"1"})
    package = index.add(filename, content)
    (tmp_path / filename).write_bytes(content)
    page = index.folder / "simple" / "toysource" / "index.html"
    page.write_text(f'<a href="{(tmp_path / filename).as_uri()}">{filename}</a>')
    with pytest.raises(IndexReadError, match="'file' is not followed"):
        download(package)


def test_stops_reading_what_is_too_large(index):
    filename, content = make_sdist({"a": b"1"})
    package = index.add(filename, content)
    (index.folder / "simple" / "toysource" / filename).write_bytes(content + b"0" * 100)
    with pytest.raises(IndexReadError, match="larger than"):
        download(package)


def test_an_unlisted_file_is_named(index):
    package = index.add(*make_sdist({"a": b"1"}))
    (index.folder / "simple" / "toysource" / "index.html").write_text("<a href='toysource-2.0.tar.gz'>x</a>")
    with pytest.raises(IndexReadError, match=r"does not list toysource-1\.0\.tar\.gz"):
        download(package)


def test_the_index_is_the_one_pip_uses(monkeypatch, tmp_path):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    settings = tmp_path / "pip.conf"
    settings.write_text(
        "[global]\nindex-url = https://one.example/simple\n[download]\nindex-url = https://two.example/simple\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    assert index_urls(pip_settings())[0] == "https://two.example/simple"
    monkeypatch.setenv("PIP_INDEX_URL", "https://three.example/simple")
    assert index_urls(pip_settings())[0] == "https://three.example/simple"
    assert index_urls({}) == [DEFAULT_INDEX]
    assert index_urls({"no-index": "1", "index-url": "https://one.example/simple"}) == []
