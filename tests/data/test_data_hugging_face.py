import sys

import pytest
import torch

from lightning_opt.data import HuggingFaceDataset
from lightning_opt.errors import ConfigError, MissingExtraError, StorageError


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    import lightning_opt.data.hugging_face as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="datasets"):
        HuggingFaceDataset(name="any", text_columns=["text"], cache_dir=tmp_path).prepare_data()
    assert "datasets" not in sys.modules


@pytest.mark.parametrize("kwargs", [{}, {"text_columns": ["a"], "input_columns": ["b"]}])
def test_texts_or_numbers(kwargs):
    with pytest.raises(ValueError, match="text_columns or input_columns"):
        HuggingFaceDataset(name="any", **kwargs)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    films = tmp_path / "films"
    films.mkdir()
    head = "title,text,a,b,label\n"
    for part, count in (("train", 60), ("validation", 12)):
        body = "".join(f"No {n},{'good' if n % 3 else 'bad'} film,{n},{n * 2},{n % 3}\n" for n in range(count))
        (films / f"{part}.csv").write_text(head + body)
    return str(films)


def test_texts(folder, tmp_path):
    module = HuggingFaceDataset(name=folder, text_columns=["title", "text"], cache_dir=tmp_path / "cache")
    module.prepare_data()
    assert module.num_outputs == 3
    assert (len(module.splits.train), len(module.splits.val)) == (60, 12)
    assert module.splits.train.labels.tolist() == [n % 3 for n in range(60)]
    names = {number: word for word, number in module.tokenizer._numbers.items()}
    assert [names[int(i)] for i in module.splits.train.ids[3, 1:5]] == ["no", "3", "bad", "film"]
    assert torch.equal(module.splits.test.ids, module.splits.val.ids)


def test_numbers(folder, tmp_path):
    module = HuggingFaceDataset(name=folder, input_columns=["a", "b"], cache_dir=tmp_path / "cache", scale=0.5)
    assert module.splits.train.inputs[5].tolist() == [2.5, 5.0]
    values = HuggingFaceDataset(
        name=folder, input_columns=["a"], label_column="b", target="value", cache_dir=tmp_path / "cache"
    )
    assert values.num_outputs == 1
    assert values.splits.train.targets[5].item() == 10.0


def test_what_is_wrong_is_named(folder, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(ConfigError, match="no column 'texts'; it has title"):
        HuggingFaceDataset(name=folder, text_columns=["texts"], cache_dir=cache).setup()
    with pytest.raises(StorageError, match="cannot load split nowhere"):
        HuggingFaceDataset(name=folder, text_columns=["text"], train_split="nowhere", cache_dir=cache).setup()
    with pytest.raises(ConfigError, match=r"outside 0\.\.1"):
        HuggingFaceDataset(name=folder, text_columns=["text"], num_outputs=2, cache_dir=cache).setup()
