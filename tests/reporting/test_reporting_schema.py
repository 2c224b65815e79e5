"""Our small schema checker against the jsonschema package, on good records and on broken ones."""

import copy
import json

import jsonschema
import pytest

from lightning_opt.reporting import problems, read_record, record_schema, write_record


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(record):
        node = record
        for step in path:
            node = node[step]
        node[last] = value

    return change


def _drop(*path):
    def change(record):
        node = record
        for step in path[:-1]:
            node = node[step]
        del node[path[-1]]

    return change


BROKEN = {
    "no status": _drop("status"),
    "unknown status": _set("status", "done"),
    "future schema": _set("schema_version", 2),
    "schema version true": _set("schema_version", True),
    "no models when finished": _set("models", {}),
    "running with an end": _set("status", "running"),
    "finished without wall time": _set("wall_seconds", None),
    "negative wall time": _set("wall_seconds", -1.0),
    "local time": _set("started", "2026-11-24T09:00:00"),
    "short digest": _set("config_sha256", "abc"),
    "empty command": _set("command", ""),
    "text for a count": _set("models", "student", "params", "71402"),
    "half a parameter": _set("models", "student", "params", 1.5),
    "true for a count": _set("models", "student", "params", True),
    "null without a reason": _set("models", "student", "flops", None),
    "null in quality without a reason": _set("models", "student", "quality", {"acc": None}),
    "null in a latency without a reason": _set("models", "student", "latency_ms", 0, "p95", None),
    "empty reason": _set("models", "student", "reasons", {"energy_j_per_1k": "", "cost_per_1m": "no"}),
    "no latencies": _set("models", "student", "latency_ms", []),
    "batch zero": _set("models", "student", "latency_ms", 0, "batch", 0),
    "latency zero": _set("models", "student", "latency_ms", 0, "p50", 0),
    "file outside of the run": _set("deployed", 0, "file", "a/../../x"),
    "absolute file": _set("deployed", 0, "file", "/etc/x"),
    "agreement above one": _set("deployed", 0, "argmax_agreement", 1.1),
    "stage without a name": _set("stages", 0, "method", ""),
    "edit without an op": _set("recipe", [{"version": 1}]),
    "warning that is a number": _set("warnings", [1]),
    "no gpu list": _drop("hardware", "gpus"),
    "commit that is a branch": _set("git", {"commit": "main", "dirty": False}),
}
FINE = {
    "as it is": lambda record: None,
    "foreign keys": _set("models", "student", "my_own", {"a": None}),
    "one more model": lambda record: record["models"].update(assistant=copy.deepcopy(record["models"]["student"])),
    "whole float": _set("models", "student", "params", 71402.0),
    "no commit": _set("git", None),
    "null with a reason": lambda record: record["models"]["student"].update(
        flops=None, reasons=record["models"]["student"]["reasons"] | {"flops": "a custom operator"}
    ),
    "runtime as text": _set("models", "student", "runtime", "torch eager"),
}


def _verdicts(record):
    data, schema = json.loads(json.dumps(record)), record_schema()
    theirs = jsonschema.Draft202012Validator(schema).is_valid(data)
    return next(problems(data, schema), None) is None, theirs


def test_the_schema_itself_is_one():
    jsonschema.Draft202012Validator.check_schema(record_schema())


@pytest.mark.parametrize("name", FINE)
def test_good_records_pass_both(record, name):
    FINE[name](record)
    assert _verdicts(record) == (True, True)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_records_fail_both(record, name):
    BROKEN[name](record)
    assert _verdicts(record) == (False, False)


def test_a_problem_names_its_place(record):
    record["models"]["student"]["latency_ms"][1]["p50"] = -2.0
    assert str(next(problems(record, record_schema()))) == "models.student.latency_ms.1.p50: -2.0 is not above 0"


def test_a_keyword_that_is_not_implemented_is_refused():
    with pytest.raises(NotImplementedError, match="multipleOf"):
        list(problems(3, {"multipleOf": 2}))


def test_what_is_written_is_valid_and_read_back_equal(tmp_path, record):
    write_record(tmp_path, record)
    on_disk = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(record_schema()).validate(on_disk)
    assert read_record(tmp_path) == json.loads(json.dumps(record))
