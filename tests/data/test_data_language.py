import pytest
import torch

from lightning_opt.data import CharTokenizer, Shakespeare, TextFiles
from lightning_opt.data.language import held_out
from lightning_opt.errors import ConfigError, StorageError

TEXT = "All the world's a stage,\nand all the men and women merely players.\n" * 4


@pytest.fixture
def files(tmp_path):
    names = {"train": TEXT, "more": "Exit.\n", "val": "the stage Q\n", "test": "the men\n"}
    for name, text in names.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    return {name: str(tmp_path / f"{name}.txt") for name in names}


def test_labels_follow_the_inputs_and_give_the_text_back(files):
    module = TextFiles(
        train=[files["train"], files["more"]], val=[files["val"]], test=[files["test"]], context_length=16
    )
    data = module.splits.train
    batch = data.__getitems__(list(range(len(data))))
    characters = sorted(set(TEXT + "Exit.\n"))
    labels = batch["labels"]
    text = "".join(characters[token] for token in labels[labels != -100].tolist())
    assert text == (TEXT + "Exit.\n")[1:]
    assert torch.equal(batch["input_ids"][:-1, 1:], labels[:-1, :-1])
    assert module.num_outputs == module.vocab_size == len(characters) + 1
    unknown = module.splits.val.__getitems__([0])["input_ids"][0]
    assert unknown[10] == len(characters)  # the Q


def test_the_validation_files_serve_as_test_files(files):
    module = TextFiles(train=[files["train"]], val=[files["val"]])
    assert torch.equal(module.splits.val.stream, module.splits.test.stream)


def test_versions_move_the_windows(files):
    kwargs = {"train": [files["train"]], "val": [files["val"]], "context_length": 16, "batch_size": 4}
    fixed, moving = TextFiles(**kwargs), TextFiles(**kwargs, variants=2)
    assert (fixed.variants, moving.variants) == (0, 2)
    assert fixed.fingerprint() != moving.fingerprint()
    assert fixed.fingerprint() == TextFiles(**kwargs, seed=4).fingerprint()
    assert moving.fingerprint() != TextFiles(**kwargs, variants=2, seed=4).fingerprint()
    assert fixed.fingerprint() != TextFiles(**(kwargs | {"context_length": 8})).fingerprint()
    assert torch.equal(moving.example_inputs(2)["input_ids"], fixed.example_inputs(2)["input_ids"])


def test_your_own_tokenizer(files):
    module = TextFiles(train=[files["train"]], val=[files["val"]], tokenizer=CharTokenizer("ahet"))
    assert module.num_outputs == 5
    assert module.splits.val.stream[:4].tolist() == [3, 1, 2, 4]  # "the "


def test_missing_and_binary_files_are_named(files, tmp_path):
    with pytest.raises(StorageError, match=r"nothing\.txt"):
        TextFiles(train=[str(tmp_path / "nothing.txt")], val=[files["val"]]).setup()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StorageError, match=r"binary\.txt is no UTF-8 text"):
        TextFiles(train=[str(tmp_path / "binary.txt")], val=[files["val"]]).setup()


@pytest.mark.parametrize("train", ["one.txt", []])
def test_files_come_as_a_list(train):
    with pytest.raises(ValueError, match="train must be a list"):
        TextFiles(train=train, val=["a.txt"])


def test_whole_plays_are_held_out():
    plays = {"a": "1", "b": "2", "c": "3", "d": "4"}
    assert held_out(plays, val=["b"], test=["d"]) == {"train": ["1", "3"], "val": ["2"], "test": ["4"]}


@pytest.mark.parametrize(
    ("val", "test", "message"),
    [
        (["hamlett"], ["d"], r"data\.val_plays: there is no play 'hamlett'"),
        (["b"], ["b"], "both hold 'b'"),
        ([], ["b"], "each hold a play"),
        (["a", "b"], ["c", "d"], "leave some"),
    ],
)
def test_bad_choices_of_plays_are_named(val, test, message):
    with pytest.raises(ConfigError, match=message):
        held_out({"a": "1", "b": "2", "c": "3", "d": "4"}, val=val, test=test)


def test_the_vocabulary_is_known_without_the_plays(no_connection, tmp_path):
    module = Shakespeare(cache_dir=tmp_path)
    assert module.num_outputs == 85
    with pytest.raises(StorageError, match=r"lightning_opt\.data\.fetch shakespeare"):
        module.prepare_data()
