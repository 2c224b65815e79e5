import sys

import pytest
import torch
from data_helpers import make_sdist, make_tar, member_of

from lightning_opt.data import AmazonReviews, FileTokenizer, WordTokenizer
from lightning_opt.data.text import RatedTexts, parse_ratings
from lightning_opt.data.tokenizers import CharTokenizer, text_key
from lightning_opt.errors import ConfigError, MissingExtraError, StorageError


def lines():
    rows = [f"{number}\t{(number % 9) - 4}.5\ttext number {number} is café" for number in range(200)]
    rows += ["900\t1.0\tThe same, twice!", "901\t-1.0\tthe SAME twice...", "902\t0.0\tneutral words", "903\t2.0\t!?"]
    rows += [f"904_{piece}\t1.0\tpiece {piece} of one very long review" for piece in range(30)]
    return "\r\n".join(rows).encode()


@pytest.fixture
def reviews(index, tmp_path):
    inner = make_tar({"set/reviews.txt": lines()})
    package = index.add(*make_sdist({"data/inner.tar.gz": inner}))

    class Reviews(RatedTexts):
        member = member_of(package, "toysource-1.0/data/inner.tar.gz!set/reviews.txt", lines())

    return lambda **kwargs: Reviews(cache_dir=tmp_path / "cache", **kwargs)


def words_of(module, part):
    names = {number: word for word, number in module.tokenizer._numbers.items()}
    return [{names.get(int(i)) for i in row} for row in getattr(module.splits, part).ids]


def test_texts_come_from_an_archive_in_an_archive(reviews):
    module = reviews(tokenizer=WordTokenizer(vocab_size=400))
    module.prepare_data()
    batch = next(iter(module.val_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels", "index"}
    assert batch["labels"].unique().tolist() == [0, 1]
    assert "café" in set().union(*words_of(module, "train"))


def test_duplicates_and_wordless_texts_are_dropped(reviews):
    texts = reviews(target="rating").texts()
    keys = [text_key(row.text) for row in texts]
    assert len(keys) == len(set(keys)) == 200 + 2 + 30
    assert [row.rating for row in texts if "same" in row.text.lower()] == [1.0]  # the first is kept


def test_polarity_is_the_sign_of_the_rating_and_leaves_zero_out(reviews):
    by_target = {target: reviews(target=target) for target in ("polarity", "rating")}
    sizes = {t: sum(len(getattr(m.splits, p)) for p in ("train", "val", "test")) for t, m in by_target.items()}
    assert sizes == {"polarity": 231, "rating": 232}
    assert by_target["polarity"].num_outputs == 2
    assert by_target["rating"].num_outputs == 1
    assert by_target["rating"].splits.test.labels.dtype == torch.float32
    ratings = by_target["rating"].splits.test.labels
    assert torch.equal(by_target["polarity"].splits.test.labels, (ratings[ratings != 0] > 0).long())


def test_strength_leaves_out_weak_texts_of_the_same_split(reviews):
    everything, strong = reviews(target="rating"), reviews(target="rating", min_strength=2.0)
    for part in ("train", "val", "test"):
        ratings = getattr(everything.splits, part).labels
        assert torch.equal(getattr(strong.splits, part).labels, ratings[ratings.abs() >= 2])


def test_pieces_of_one_review_stay_together(reviews):
    module = reviews(tokenizer=WordTokenizer(vocab_size=400))
    pieces = [int((getattr(module.splits, part).lengths == 8).sum()) for part in ("train", "val", "test")]
    assert sorted(pieces) == [0, 0, 30]


def test_no_text_is_on_two_sides(reviews):
    module = reviews(tokenizer=WordTokenizer(vocab_size=10_000))
    texts = module.texts()
    rows = {
        part: {tuple(row[:length].tolist()) for row, length in zip(data.ids, data.lengths, strict=True)}
        for part, data in vars(module.splits).items()
    }
    assert sum(len(some) for some in rows.values()) <= len(texts)
    known = [{row for row in rows[part] if 1 not in row} for part in ("train", "val", "test")]
    assert len(set.union(*known)) == sum(len(some) for some in known)


def test_fingerprints_follow_the_preprocessing(reviews):
    kinds = [
        {},
        {"max_length": 32},
        {"target": "rating"},
        {"tokenizer": WordTokenizer(vocab_size=50)},
        {"split_seed": 1},
    ]
    found = [reviews(**kind).fingerprint() for kind in kinds]
    assert len(set(found)) == len(found)
    assert reviews(batch_size=4, seed=3).fingerprint() == found[0]


@pytest.mark.parametrize(("line", "number"), [("1\t2.0", 2), ("1\tgood\ttext", 2), ("1\t2\ta\tb", 2)])
def test_a_line_of_another_form_is_named(line, number):
    with pytest.raises(StorageError, match=rf"reviews\.txt, line {number}"):
        parse_ratings(f"1\t1.0\tfine\n{line}".encode(), source="reviews.txt")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("target", "stars"), ("min_strength", 4.0), ("max_length", 1), ("multiple_of", 0), ("batch_size", 0)],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=argument):
        AmazonReviews(**{argument: value})


def test_words_are_ranked_by_frequency_then_alphabet():
    words = WordTokenizer(vocab_size=6)
    words.fit(["b a c", "B, a", "b"])
    assert words.encode(["a b c , d"]) == [[2, 4, 3, 1, 5, 1]]  # b 3 times, a twice, then ',' before 'c'
    assert words.encode(["a b c"], max_length=2) == [[2, 4]]
    assert words.encode([""]) == [[2]]


def test_words_keep_apostrophes_and_split_marks():
    words = WordTokenizer(vocab_size=100)
    words.fit(["Don't stop! x_y"])
    assert set(words._numbers) == {"don't", "stop", "!", "x", "_", "y"}


def test_characters():
    learnt = CharTokenizer()
    with pytest.raises(ConfigError, match="setup"):
        _ = learnt.vocab_size
    learnt.fit(["abc", "cd"])
    assert learnt.encode(["dcbax"]) == [[3, 2, 1, 0, 4]]
    assert learnt.vocab_size == 5
    with pytest.raises(ValueError, match="1 do"):
        CharTokenizer("aab")


@pytest.fixture
def tokenizer_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "good": 3}, "[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 2)])
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer_file(tokenizer_file):
    tokenizer = FileTokenizer(tokenizer_file)
    assert tokenizer.encode(["good bad", "good good good"], max_length=3) == [[2, 3, 0], [2, 3, 3]]
    assert tokenizer.encode(["good good good"]) == [[2, 3, 3, 3]]
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (1, 4)
    with pytest.raises(ConfigError, match=r"'<pad>' is not in the vocabulary"):
        _ = FileTokenizer(tokenizer_file, pad_token="<pad>").pad_id


def test_a_damaged_or_missing_tokenizer_file_is_one_error(tokenizer_file):
    tokenizer_file.write_text("{")
    with pytest.raises(StorageError, match=r"tokenizer\.json"):
        FileTokenizer(tokenizer_file).encode(["good"])
    with pytest.raises(StorageError, match="cannot read the tokenizer"):
        FileTokenizer(tokenizer_file.with_name("nothing.json")).encode(["good"])


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"lightning_opt\[text\]"):
        FileTokenizer(tmp_path / "tokenizer.json").encode(["good"])
