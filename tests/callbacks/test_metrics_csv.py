"""metrics.csv: new columns, no row twice after a resume."""

import csv

from lightning_opt.callbacks import LogPosition, MetricsCsv


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_new_metric_becomes_a_column_of_all_rows(tmp_path):
    log = MetricsCsv(tmp_path / "metrics.csv")
    log.log_metrics({"train/loss": 0.5, "epoch": 0}, step=9)
    log.log_metrics({"val/acc": 0.25, "epoch": 0}, step=9)
    first, second = rows(tmp_path / "metrics.csv")
    assert first == {"epoch": "0", "step": "9", "train/loss": "0.5", "val/acc": ""}
    assert second == {"epoch": "0", "step": "9", "train/loss": "", "val/acc": "0.25"}


def test_numbers_come_back_exactly(tmp_path):
    log = MetricsCsv(tmp_path / "metrics.csv")
    value = 0.1 + 0.2
    log.log_metrics({"x": value}, step=0)
    assert float(rows(tmp_path / "metrics.csv")[0]["x"]) == value


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"
    log = MetricsCsv(path)
    for step in range(3):
        log.log_metrics({"loss": float(step)}, step=step)
    state = LogPosition(log).state_dict()
    log.log_metrics({"loss": 99.0, "other": 1.0}, step=3)

    again = MetricsCsv(path)
    LogPosition(again).load_state_dict(state)
    again.log_metrics({"loss": 3.0}, step=3)
    assert [row["loss"] for row in rows(path)] == ["0.0", "1.0", "2.0", "3.0"]


def test_a_fresh_run_replaces_an_old_file(tmp_path):
    path = tmp_path / "metrics.csv"
    MetricsCsv(path).log_metrics({"loss": 1.0}, step=0)
    MetricsCsv(path).log_metrics({"loss": 2.0}, step=0)
    assert [row["loss"] for row in rows(path)] == ["2.0"]
