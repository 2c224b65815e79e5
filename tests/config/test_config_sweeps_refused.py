"""What a sweep refuses before its first job: nothing is created, and the message names the key."""

import pytest

from lightning_opt.config.compose import read_command_line
from lightning_opt.config.sweeps_check import check_launcher
from lightning_opt.config.sweeps_open import open_sweep, refuse_alone
from lightning_opt.errors import ConfigError, MissingExtraError

BASE = ["data=synthetic_images", "model=mlp", "model.input_shape=[3,8,8]", "trainer.accelerator=cpu"]
PROGRAM = ["python", "train.py"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def opened(*words):
    line = read_command_line(["-m", *BASE, *words], config_name="train")
    return open_sweep(line, program=PROGRAM, rehearse=lambda config: None)


def refused(place, *words):
    with pytest.raises(ConfigError) as caught:
        opened(*words)
    assert list(place.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer.rl=0.1,0.2"], "optimizer.lr"),
        (["modle=cnn,mlp"], "modle"),
        (["optimizer=adamw,adamq"], "adamq"),
        (["optimizer.lr=0.1,-1"], "optimizer.lr=-1"),
        (["data.batch_size=range(-3,9)"], "data.batch_size=-3"),
        (["optimizer.lr=interval(0.1,0.2)"], "sweep=optuna"),
        (["seed=1,2", "run_dir=x"], "sweep_dir"),
        (["seed=1,2", "objective=latency_ms", "benchmark=false"], "objective=latency_ms"),
        (["seed=1,2", "objective=tset/acc"], "objective=tset/acc"),
        (["seed=1,2", "objective=[test/acc,test/akk]"], "test/acc"),
        (["seed=1,2", "sweep.n_jobs=0"], "n_jobs=0"),
        (["seed=1,2", "sweep.on_failure=cry"], "on_failure=cry"),
        (["seed=1,2", "sweep.n_job=2"], "n_job"),
        (["seed=1,2", "sweep.launcher=joblob"], "sweep.launcher=joblob"),
        (["seed=1,2", "sweep=greed"], "greed"),
    ],
)
def test_sweep_that_cannot_work_is_refused(place, words, said):
    assert said in refused(place, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer.lr=interval(-1,0.2)"], "optimizer.lr=-1"),
        (["trainer.gradient_clip_val=interval(0.1,-0.5)"], "below the second"),
        (["optimizer.momentm=interval(0,1)"], "momentm"),
        ([], "nothing varies"),
        (["seed=1,2", "sweep.direction=up"], "direction=up"),
        (["seed=1,2", "sweep.direction=[maximize,minimize]"], "sweep.direction"),
        (["seed=1,2", "objective=[val,size_bytes]"], "sweep.pruner"),
        (["seed=1,2", "sweep.n_trials=0"], "n_trials=0"),
    ],
)
def test_search_that_cannot_work_is_refused(place, words, said):
    pytest.importorskip("optuna")
    assert said in refused(place, "sweep=optuna", *words)


def test_optuna_that_is_missing_is_named(place, monkeypatch):
    from lightning_opt.config import sweeps_open

    monkeypatch.setattr(sweeps_open, "find_spec", lambda name: None)
    assert "pip install 'lightning_opt[sweep]'" in refused(place, "sweep=optuna", "optimizer.lr=interval(0.1,0.2)")


def test_launcher_that_is_missing_is_named(monkeypatch):
    from lightning_opt.config import sweeps_check

    monkeypatch.setattr(sweeps_check, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"lightning_opt\[ray\]"):
        check_launcher("ray")


@pytest.mark.parametrize("word", ["sweep=optuna", "sweep.n_trials=3", "sweep/sampler=random", "sweep_dir=x"])
def test_words_of_a_sweep_need_one(word):
    with pytest.raises(ConfigError, match="add -m"):
        refuse_alone(read_command_line([word], config_name="train"))
    refuse_alone(read_command_line(["-m", word], config_name="train"))


def test_folder_of_another_sweep_is_refused_and_of_a_larger_grid_is_not(place):
    first = opened("seed=1,2", "sweep_dir=s")
    first.folder.mkdir()
    first.write()
    for words in (["optimizer.lr=1e-3,1e-2"], ["seed=1,2", "trainer.max_epochs=3"], ["seed=1,2", "objective=val"]):
        with pytest.raises(ConfigError, match="holds another sweep"):
            opened(*words, "sweep_dir=s")
    again = opened("seed=1,2,3", "sweep_dir=s")
    assert [job.folder.name for job in again.jobs.values()] == ["seed-1", "seed-2", "seed-3"]


def test_folder_with_other_files_is_refused(place):
    (place / "mine").mkdir()
    (place / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        opened("seed=1,2", "sweep_dir=mine")


def test_new_sweeps_never_share_a_folder(place):
    one, other = opened("seed=1,2"), opened("seed=1,2")
    assert one.folder != other.folder
    assert one.folder.parent == other.folder.parent == place / "runs" / "train"


def test_argument_that_only_the_class_knows_needs_no_plus(place):
    sweep = opened("trainer.limit_val_batches=2,3", "sweep_dir=s")
    words = [sweep.composer.words(job.point)[-1] for job in sweep.jobs.values()]
    assert words == ["++trainer.limit_val_batches=2", "++trainer.limit_val_batches=3"]


def test_objectives_and_their_directions(place):
    sweep = opened("seed=1,2", "objective=[test/acc,test/loss,val,size_bytes]")
    assert sweep.directions == ("maximize", "minimize", "maximize", "minimize")
