import hashlib
import io
import random
import stat
import tarfile
import zipfile

import pytest
from data_helpers import make_tar

from lightning_opt.data.archives import member_names, read_member, read_text_members
from lightning_opt.errors import StorageError

CONTENT = random.Random(0).randbytes(8000)
SHA = hashlib.sha256(CONTENT).hexdigest()


def write_zip(path, *infos):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in infos:
            archive.writestr(info, content)
    return path


def write_tar(path, *infos):
    with tarfile.open(path, "w:gz") as archive:
        for info, content in infos:
            archive.addfile(info, io.BytesIO(content))
    return path


def tar_info(name, content=CONTENT, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


def test_reads_a_file_of_a_zip_and_of_a_tar(tmp_path):
    assert read_member(write_zip(tmp_path / "a.whl", ("in/a.csv", CONTENT)), "in/a.csv", sha256=SHA) == CONTENT
    assert read_member(write_tar(tmp_path / "a.tar.gz", tar_info("in/a.csv")), "in/a.csv", sha256=SHA) == CONTENT
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "a.whl"]  # nothing was unpacked


def test_reads_an_archive_in_an_archive(tmp_path):
    inner = make_tar({"deep/a.csv": CONTENT})
    path = write_zip(tmp_path / "a.zip", ("inner.tar.gz", inner))
    assert read_member(path, "inner.tar.gz!deep/a.csv", sha256=SHA) == CONTENT


def test_names_another_checksum(tmp_path):
    path = write_zip(tmp_path / "a.zip", ("a.csv", CONTENT + b"!"))
    with pytest.raises(StorageError) as caught:
        read_member(path, "a.csv", sha256=SHA)
    assert SHA in str(caught.value)
    assert hashlib.sha256(CONTENT + b"!").hexdigest() in str(caught.value)


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(StorageError, match=r"no file named b\.csv"):
        read_member(write_zip(tmp_path / "a.zip", ("a.csv", CONTENT)), "b.csv", sha256=SHA)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_refuses_two_files_of_one_name(tmp_path):
    both = write_zip(tmp_path / "a.zip", ("a.csv", CONTENT), ("a.csv", CONTENT))
    with pytest.raises(StorageError, match="2 files named"):
        read_member(both, "a.csv", sha256=SHA)
    both = write_tar(tmp_path / "a.tar.gz", tar_info("a.csv"), tar_info("a.csv"))
    with pytest.raises(StorageError, match="2 files named"):
        read_member(both, "a.csv", sha256=SHA)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_follows_no_link_of_a_tar(tmp_path, kind):
    target = tar_info("real.csv")
    path = write_tar(tmp_path / "a.tar.gz", target, tar_info("a.csv", b"", kind, "real.csv"))
    with pytest.raises(StorageError, match="link or a folder"):
        read_member(path, "a.csv", sha256=SHA)


def test_follows_no_link_of_a_zip(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_bytes(CONTENT)
    info = zipfile.ZipInfo("a.csv")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = write_zip(tmp_path / "a.zip", (info, str(secret)))
    with pytest.raises(StorageError, match="link or a folder"):
        read_member(path, "a.csv", sha256=SHA)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_truncated_archive_is_one_error(tmp_path, kind, share):
    write = {"zip": lambda p: write_zip(p, ("a.csv", CONTENT)), "tar": lambda p: write_tar(p, tar_info("a.csv"))}[kind]
    path = write(tmp_path / "a")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(StorageError, match=str(path)):
        read_member(path, "a.csv", sha256=SHA)


def test_refuses_what_unpacks_to_too_much(tmp_path):
    for path in (
        write_zip(tmp_path / "a.zip", ("a.csv", CONTENT)),
        write_tar(tmp_path / "a.tar.gz", tar_info("a.csv")),
    ):
        assert read_member(path, "a.csv", sha256=SHA, max_bytes=len(CONTENT)) == CONTENT
        with pytest.raises(StorageError, match="more than"):
            read_member(path, "a.csv", sha256=SHA, max_bytes=len(CONTENT) - 1)


def test_a_missing_archive_is_one_error(tmp_path):
    with pytest.raises(StorageError, match="unreadable"):
        read_member(tmp_path / "nothing.zip", "a.csv", sha256=SHA)


def test_reads_several_texts(tmp_path):
    path = write_zip(tmp_path / "a.zip", ("a.md", "fünf".encode()), ("b.md", b"two"), ("c.md", b"\xff"))
    assert member_names(path) == ["a.md", "b.md", "c.md"]
    assert read_text_members(path, ["a.md", "b.md"]) == {"a.md": "fünf", "b.md": "two"}
    with pytest.raises(StorageError, match="no UTF-8"):
        read_text_members(path, ["c.md"])
