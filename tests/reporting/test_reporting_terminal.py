"""The table at the end of a run: plain text without a terminal, right numbers, harmless names."""

import io
import re

from fake_run import HOSTILE, full_record, rename

from lightning_opt.reporting import comparison, finish, new_record, summary


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Latin(io.StringIO):
    encoding = "ascii"


def row(text, name):
    line = next(line for line in text.splitlines() if line.startswith(name))
    return re.split(r"\s{2,}", line.strip())


def test_the_three_models_and_the_verdict(record):
    text = summary(record)
    assert row(text, "teacher")[1:] == ["0.976", "1.21 M", "4.85 MB", "4.21 ms", "1.00×"]
    assert row(text, "student alone")[1:3] == ["0.945", "71.4 k"]
    assert row(text, "distilled student")[1:] == ["0.968", "71.4 k", "287 kB", "0.810 ms", "5.2×"]
    assert "keeps 99.2 % of the teacher's acc" in text
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines() if "ms" in line and "|" not in line) <= 200


def test_colour_only_on_a_terminal(record):
    assert "\x1b[" in summary(record, stream=Terminal())
    assert "\x1b[" not in summary(record, stream=io.StringIO())


def test_a_stream_that_knows_only_ascii_can_print_it(record):
    text = summary(record, stream=Latin())
    text.encode("ascii")
    assert "5.2x" in text


def test_without_a_benchmark_there_is_no_latency_column(record):
    for model in record["models"].values():
        model["latency_ms"] = None
        model["reasons"]["latency_ms"] = "benchmark=false"
    record["comparison"] = comparison(record["models"])
    text = summary(record)
    assert "latency" not in text
    assert "0.968" in text


def test_a_run_without_models():
    record = finish(new_record("train.py", seed=1, config_sha256=None), status="failed", error="out of memory")
    assert "out of memory" in summary(record)


def test_hostile_names_cannot_drive_the_terminal():
    record = full_record()
    record["models"] = {**record["models"], "[link=file:///x]\x1b]0;owned\x07[/link]": record["models"]["student"]}
    for name in HOSTILE[4:6]:
        text = summary(rename(record, "acc", name))
        assert not set(text) & set("\x00\x07\x1b\u202e\u2066")
    assert "[link=file:///x]" in text
