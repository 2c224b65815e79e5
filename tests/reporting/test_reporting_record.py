"""record.json: durable, without NaN, without secrets, with a reason for each number that is missing."""

import json
import math

import pytest

from lightning_opt.errors import ConfigError, StorageError
from lightning_opt.reporting import finish, model_entry, new_record, read_record, update_record, write_record


def test_missing_measures_are_null_with_a_reason():
    entry = model_entry({"params": 10, "quality": {}}, reason="benchmark=false")
    assert entry["flops"] is None
    assert entry["reasons"]["flops"] == "benchmark=false"
    assert entry["quality"] is None
    assert "params" not in entry["reasons"]


def test_nan_never_reaches_the_file(tmp_path, record):
    record["models"]["student"]["quality"]["acc"] = math.nan
    record["models"]["teacher"]["flops"] = math.inf
    write_record(tmp_path, record)
    written = (tmp_path / "record.json").read_text(encoding="utf-8")
    assert "NaN" not in written
    assert "Infinity" not in written
    models = json.loads(written)["models"]
    assert models["student"]["quality"]["acc"] is None
    assert models["student"]["reasons"]["quality"] == "was not a finite number"
    assert models["teacher"]["reasons"]["flops"] == "was not a finite number"


def test_secrets_in_the_command_are_masked(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "abcdefgh12345")
    words = ["train.py", "logger.api_key=s3cret value", "x=abcdefgh12345", "url=https://me:pw@host/x", "pad_token=7"]
    command = new_record(words, seed=1, config_sha256=None)["command"]
    assert "s3cret" not in command
    assert "abcdefgh12345" not in command
    assert "me:pw" not in command
    assert "pad_token=7" in command


def test_a_broken_record_is_not_written_over_a_good_one(tmp_path, record):
    path = write_record(tmp_path, record)
    before = path.read_bytes()
    record["status"] = "perhaps"
    with pytest.raises(ConfigError, match="status"):
        write_record(tmp_path, record)
    assert path.read_bytes() == before


def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path, record):
    with pytest.raises(StorageError, match="cannot write"):
        write_record(tmp_path / "nowhere", record)
    with pytest.raises(StorageError, match="does not exist"):
        read_record(tmp_path)


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"a": NaN}', "\x00" * 40])
def test_a_damaged_record_is_a_storage_error(tmp_path, damage):
    (tmp_path / "record.json").write_text(damage)
    with pytest.raises(StorageError, match=r"record\.json"):
        read_record(tmp_path)


def test_a_newer_record_asks_for_an_upgrade(tmp_path, record):
    (tmp_path / "record.json").write_text(json.dumps(record | {"schema_version": 99}))
    with pytest.raises(ConfigError, match="upgrade"):
        read_record(tmp_path)


def test_an_update_merges_and_drops_reasons_that_no_longer_hold(tmp_path, record):
    write_record(tmp_path, record)
    energy = {"value": 0.2, "source": "counter"}
    update_record(tmp_path, {"models": {"student": {"energy_j_per_1k": energy}}})
    student = read_record(tmp_path)["models"]["student"]
    assert student["energy_j_per_1k"] == energy
    assert "energy_j_per_1k" not in student["reasons"]
    assert "cost_per_1m" in student["reasons"]
    assert student["params"] == record["models"]["student"]["params"]


def test_a_failed_run_says_why(tmp_path):
    record = finish(new_record("train.py", seed=None, config_sha256=None), status="failed", error="loss is NaN")
    write_record(tmp_path, record)
    assert read_record(tmp_path)["error"] == "loss is NaN"
    assert read_record(tmp_path)["wall_seconds"] >= 0
