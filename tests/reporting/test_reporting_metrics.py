"""metrics.csv as it is found: sparse, in parts, cut short."""

import numpy as np
import pytest

from lightning_opt.errors import StorageError
from lightning_opt.reporting import find_metrics, read_metrics, run_metrics

SPARSE = """epoch,step,train/loss,train/loss_kd,val/acc
0,0,2.5,1.5,
0,10,2.0,1.25,
0,10,,,0.5
1,20,1.0,,
1,20,,,0.75
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_sparse_rows_become_one_series_a_metric(tmp_path):
    table = read_metrics([write(tmp_path / "m.csv", SPARSE)])
    assert list(table) == ["train/loss", "train/loss_kd", "val/acc"]
    assert table["train/loss"].step.tolist() == [0, 10, 20]
    assert table["train/loss"].value.tolist() == [2.5, 2.0, 1.0]
    assert table["train/loss_kd"].step.tolist() == [0, 10]
    assert table["val/acc"].epoch.tolist() == [0.0, 1.0]
    assert table["val/acc"].step.dtype == np.int64


def test_a_last_line_without_its_end_is_left_out(tmp_path):
    table = read_metrics([write(tmp_path / "m.csv", SPARSE + "2,30,0.12")])
    assert table["train/loss"].value.tolist() == [2.5, 2.0, 1.0]
    whole = read_metrics([write(tmp_path / "w.csv", SPARSE + "2,30,0.123,,\n")])
    assert whole["train/loss"].value.tolist() == [2.5, 2.0, 1.0, 0.123]


def test_a_number_cut_inside_its_last_cell_is_left_out(tmp_path):
    table = read_metrics([write(tmp_path / "m.csv", SPARSE + "2,30,,,0.9")])
    assert table["val/acc"].value.tolist() == [0.5, 0.75]


def test_every_cut_of_a_file_reads_without_error_and_invents_nothing(tmp_path):
    whole = read_metrics([write(tmp_path / "m.csv", SPARSE)])
    for size in range(len(SPARSE)):
        table = read_metrics([write(tmp_path / "cut.csv", SPARSE[:size])])
        for name, series in table.items():
            assert series.value.tolist() == whole[name].value.tolist()[: len(series)]


def test_parts_are_merged_and_the_later_part_counts(tmp_path):
    first = write(tmp_path / "a.csv", "epoch,step,train/loss\n0,0,3.0\n0,10,2.0\n")
    second = write(tmp_path / "b.csv", "epoch,step,train/loss,val/acc\n0,10,1.5,\n1,20,1.0,0.9\n")
    table = read_metrics([first, second])
    assert table["train/loss"].step.tolist() == [0, 10, 20]
    assert table["train/loss"].value.tolist() == [3.0, 1.5, 1.0]
    assert table["val/acc"].value.tolist() == [0.9]


def test_a_second_header_in_one_file_starts_a_new_part(tmp_path):
    text = "epoch,step,train/loss\n0,0,3.0\nepoch,step,val/acc,train/loss\n1,5,0.9,2.0\n"
    table = read_metrics([write(tmp_path / "m.csv", text)])
    assert table["train/loss"].value.tolist() == [3.0, 2.0]
    assert table["val/acc"].value.tolist() == [0.9]


def test_damaged_lines_are_left_out(tmp_path):
    text = "epoch,step,a\n0,0,1.0\n0,1\n0,2,x\n0,nan,4.0\n0,inf,4.0\n\x00\x00\n0,3,5.0\n"
    table = read_metrics([write(tmp_path / "m.csv", text)])
    assert table["a"].step.tolist() == [0, 3]


def test_values_that_are_not_finite_are_kept(tmp_path):
    table = read_metrics([write(tmp_path / "m.csv", "step,a\n0,nan\n1,inf\n2,1.0\n")])
    assert np.isnan(table["a"].value[0])
    assert np.isinf(table["a"].value[1])


def test_empty_and_missing_files(tmp_path):
    assert read_metrics([write(tmp_path / "m.csv", "")]) == {}
    with pytest.raises(StorageError, match=r"gone\.csv"):
        read_metrics([tmp_path / "gone.csv"])


def test_files_are_found_by_model(tmp_path):
    for name in (
        "metrics.csv",
        "metrics_teacher.csv",
        "baseline/metrics.csv",
        "extra/version_10/metrics.csv",
        "extra/version_9/metrics.csv",
    ):
        write(tmp_path / name, SPARSE)
    found = find_metrics(tmp_path)
    relative = {name: [path.relative_to(tmp_path).as_posix() for path in paths] for name, paths in found.items()}
    assert relative == {
        "student": ["metrics.csv"],
        "teacher": ["metrics_teacher.csv"],
        "baseline": ["baseline/metrics.csv"],
        "extra": ["extra/version_9/metrics.csv", "extra/version_10/metrics.csv"],
    }


def test_a_run_folder_gives_a_table_a_model(run_dir, tmp_path):
    assert set(run_metrics(run_dir)) == {"student", "baseline", "teacher"}
    assert run_metrics(tmp_path / "nothing") == {}
