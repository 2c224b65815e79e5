"""Fixtures of this room: a complete record, and the run folder that would hold it."""

import pytest
from fake_run import full_record, make_run


@pytest.fixture
def record():
    return full_record()


@pytest.fixture
def run_dir(tmp_path):
    return make_run(tmp_path / "run")
