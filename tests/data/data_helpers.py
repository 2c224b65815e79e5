"""Builders of tiny packages."""

import hashlib
import io
import tarfile
import zipfile

from lightning_opt.data.packages import Member, Package


def make_wheel(files: dict[str, bytes], *, name: str = "toydata", version: str = "1.0") -> tuple[str, bytes]:
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return f"{name}-{version}-py3-none-any.whl", stream.getvalue()


def make_tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for path, content in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def make_sdist(files: dict[str, bytes], *, name: str = "toysource", version: str = "1.0") -> tuple[str, bytes]:
    """A source archive whose setup.py leaves a mark where it is run."""
    root = f"{name}-{version}"
    setup = (
        "import os, pathlib\npathlib.Path(os.environ['TOY_MARK']).touch()\n"
        f"from setuptools import setup\nsetup(name='{name}', version='{version}')\n"
    )
    contents = {
        f"{root}/setup.py": setup.encode(),
        f"{root}/PKG-INFO": f"Metadata-Version: 1.0\nName: {name}\nVersion: {version}\n".encode(),
    }
    return f"{root}.tar.gz", make_tar(contents | {f"{root}/{path}": content for path, content in files.items()})


def package_of(filename: str, content: bytes) -> Package:
    name, version = filename.removesuffix(".tar.gz").removesuffix("-py3-none-any.whl").split("-")
    return Package(
        name=name,
        version=version,
        filename=filename,
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
    )


def member_of(package: Package, path: str, content: bytes) -> Member:
    return Member(package=package, path=path, sha256=hashlib.sha256(content).hexdigest())
