"""Several runs side by side: grouped by what differs besides the seed, with mean and sample deviation."""

import json
import re

import numpy as np
import pytest
from fake_run import HOSTILE, full_record, make_run

from lightning_opt.errors import ConfigError, StorageError
from lightning_opt.reporting import comparison, render_comparison, write_record
from lightning_opt.reporting.groups import group_runs


def run_of(folder, *, loss="kd", seed=0, acc=0.95, config=None):
    record = full_record()
    record |= {"command": f"python train.py +experiment=distill loss={loss} seed={seed} run_dir={folder}", "seed": seed}
    record["models"]["student"]["quality"]["acc"] = acc
    record["comparison"] = comparison(record["models"])
    folder.mkdir()
    write_record(folder, record)
    if config is not None:
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "resolved.json").write_text(json.dumps(config | {"seed": seed, "run_dir": str(folder)}))
    return folder


def cells_of(markdown, name):
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_runs_that_differ_by_seed_become_one_row(tmp_path):
    accuracies = {"kd": [0.951, 0.957, 0.954], "dkd": [0.961, 0.960, 0.968]}
    runs = [
        run_of(tmp_path / f"{loss}{seed}", loss=loss, seed=seed, acc=acc)
        for loss, values in accuracies.items()
        for seed, acc in enumerate(values)
    ]
    html, path = render_comparison(runs, tmp_path / "out")
    markdown = path.read_text(encoding="utf-8")
    for loss, values in accuracies.items():
        cells = cells_of(markdown, f"loss={loss}")
        assert cells[1] == "3"
        assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in cells
        gains = np.array(values) - 0.945
        assert f"+{gains.mean():.3f} ± {gains.std(ddof=1):.3f}" in cells
    assert "loss=dkd is best: acc 0.963 on average over 3 seeds" in markdown
    assert html.parent == tmp_path / "out"
    assert (tmp_path / "out" / "figures" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "<script" not in html.read_text(encoding="utf-8")


def test_the_config_decides_what_belongs_together(tmp_path):
    def config(seed, width):
        return {"model": {"width": width}, "data": {"seed": seed}}

    runs = [run_of(tmp_path / f"narrow{seed}", seed=seed, config=config(seed, 8)) for seed in (1, 2)]
    runs.append(run_of(tmp_path / "wide", seed=3, config=config(3, 16)))
    assert [len(group.runs) for group in group_runs(runs)] == [2, 1]


def test_an_unclear_lead_is_called_so(tmp_path):
    runs = [run_of(tmp_path / f"a{seed}", loss="a", seed=seed, acc=acc) for seed, acc in enumerate([0.94, 0.96])]
    runs += [run_of(tmp_path / f"b{seed}", loss="b", seed=seed, acc=acc) for seed, acc in enumerate([0.945, 0.957])]
    _, path = render_comparison(runs, tmp_path / "out")
    assert "no clear lead" in path.read_text(encoding="utf-8")


def test_incomplete_and_hostile_runs(tmp_path):
    failed = full_record() | {"status": "failed", "error": HOSTILE[0], "models": {}, "comparison": {}, "deployed": []}
    failed["command"] = f"train.py loss={HOSTILE[0]}"
    bare = full_record()
    bare["models"] = {"student": bare["models"]["student"]}
    bare |= {"comparison": comparison(bare["models"]), "command": f"train.py loss='{HOSTILE[7]}'"}
    runs = [make_run(tmp_path / "failed", failed), make_run(tmp_path / "bare", bare), make_run(tmp_path / "full")]
    html, markdown = render_comparison(runs, tmp_path / "out")
    page = html.read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r'(?i)(src|href)="(?!data:)', page)
    assert "failed" in markdown.read_text(encoding="utf-8")


def test_nothing_to_compare(tmp_path):
    with pytest.raises(ConfigError, match="at least one"):
        render_comparison([], tmp_path / "out")
    with pytest.raises(StorageError, match=r"record\.json"):
        render_comparison([tmp_path / "nowhere"], tmp_path / "out")
