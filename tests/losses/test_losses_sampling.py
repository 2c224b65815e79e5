"""Sampling: the right distribution, replayable, and batches that hold what the docstrings say."""

import numpy as np
import pytest
import torch

from lightning_opt.losses import OnPolicy, sample_continuations

V, EOS, PAD = 6, 5, 0


def chain(ids):
    """A Markov chain: the next token is surely one more, modulo V."""
    return 50.0 * torch.nn.functional.one_hot((ids + 1) % V, V).float()


def fixed(logits):
    return lambda ids: torch.tensor(logits).expand(*ids.shape, len(logits))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def frequencies(logits, **options):
    prompts = torch.zeros(4000, 1, dtype=torch.long)
    tokens, _ = sample_continuations(fixed(logits), prompts, max_new_tokens=5, generator=seeded(0), **options)
    return np.bincount(tokens[:, 1:].flatten().numpy(), minlength=len(logits)) / 20_000


class TestSampling:
    def test_continues_each_prompt(self):
        tokens, mask = sample_continuations(chain, torch.tensor([[0, 1], [3, 4]]), max_new_tokens=3)
        assert tokens.tolist() == [[0, 1, 2, 3, 4], [3, 4, 5, 0, 1]]
        assert mask.tolist() == [[False, False, True, True, True]] * 2

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_follows_the_softened_distribution(self, temperature):
        logits = [1.0, 0.0, -1.0, 2.0]
        expected = np.exp(np.array(logits) / temperature)
        assert frequencies(logits, temperature=temperature) == pytest.approx(expected / expected.sum(), abs=0.02)

    def test_top_k_leaves_the_others_out(self):
        expected = np.exp([1.0, 2.0]) / np.exp([1.0, 2.0]).sum()
        assert frequencies([1.0, 0.0, -1.0, 2.0], top_k=2) == pytest.approx([expected[0], 0, 0, expected[1]], abs=0.02)

    def test_top_k_larger_than_the_vocabulary_is_all_of_it(self):
        assert np.array_equal(frequencies([1.0, 0.0], top_k=9), frequencies([1.0, 0.0]))

    def test_temperature_zero_takes_the_likeliest(self):
        assert frequencies([0.0, 0.1, 0.0], temperature=0.0).tolist() == [0.0, 1.0, 0.0]

    def test_the_same_seed_draws_the_same(self):
        draw = [
            sample_continuations(
                fixed([0.0] * V), torch.zeros(3, 1, dtype=torch.long), max_new_tokens=20, generator=seeded(s)
            )[0]
            for s in (1, 1, 2)
        ]
        assert torch.equal(draw[0], draw[1])
        assert not torch.equal(draw[0], draw[2])

    def test_the_global_random_state_is_left_alone(self):
        before = torch.get_rng_state()
        sample_continuations(
            fixed([0.0] * V), torch.zeros(3, 1, dtype=torch.long), max_new_tokens=2, generator=seeded(0)
        )
        assert torch.equal(torch.get_rng_state(), before)

    def test_ends_after_its_last_token(self):
        calls = []

        def predict(ids):
            calls.append(ids.shape[1])
            return chain(ids)

        tokens, mask = sample_continuations(predict, torch.tensor([[3], [1]]), max_new_tokens=8, eos_id=EOS, pad_id=PAD)
        assert tokens.tolist() == [[3, 4, 5, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 0, 0, 0, 0]]
        assert mask.sum(dim=1).tolist() == [2, 4]
        assert calls == [1, 2, 3, 4]  # nothing is computed once all have ended

    def test_the_context_is_cut(self):
        seen = []

        def predict(ids):
            seen.append(ids.tolist()[0])
            return chain(ids)

        sample_continuations(predict, torch.tensor([[0, 1, 2]]), max_new_tokens=2, context_length=2)
        assert seen == [[1, 2], [2, 3]]

    def test_no_gradient_is_recorded(self):
        weight = torch.ones((), requires_grad=True)
        states = []

        def predict(ids):
            states.append((weight * chain(ids)).requires_grad)
            return chain(ids)

        sample_continuations(predict, torch.tensor([[0]]), max_new_tokens=1)
        assert states == [False]

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens"),
            ({"temperature": -1.0}, "temperature"),
            ({"top_k": 0}, "top_k"),
            ({"context_length": 0}, "context_length"),
        ],
    )
    def test_refused(self, options, named):
        with pytest.raises(ValueError, match=named):
            sample_continuations(chain, torch.zeros(1, 1, dtype=torch.long), **{"max_new_tokens": 1, **options})
        with pytest.raises(ValueError, match="prompt_ids"):
            sample_continuations(chain, torch.zeros(1, 0, dtype=torch.long), max_new_tokens=1)

    def test_top_k_keeps_no_more_than_k_of_equal_logits(self):
        tokens, _ = sample_continuations(
            lambda ids: torch.zeros(*ids.shape, 9), torch.zeros(400, 1, dtype=torch.long), max_new_tokens=1, top_k=2
        )
        assert len(tokens[:, 1].unique()) == 2


def count_down(ids):
    return 50.0 * torch.nn.functional.one_hot((ids - 1) % V, V).float()


def batch():
    ids = torch.tensor([[0, 1, 2, 3, 4], [2, 3, 4, 5, 0]])
    return ids, (ids + 1) % V


class TestOnPolicy:
    @pytest.mark.parametrize(("source", "first"), [("student", [0, 1, 2, 3, 4]), ("teacher", [0, 1, 0, 5, 4])])
    def test_prompts_and_samples_in_the_batchs_shape(self, source, first):
        ids, labels = batch()
        policy = OnPolicy(fraction=1.0, source=source, prompt_length=2)
        new_ids, new_labels = policy.mix(ids, labels, chain, count_down, step=3, seed=0)
        assert new_ids.shape == ids.shape
        assert new_ids[0].tolist() == first
        following = (first[-1] + (1 if source == "student" else -1)) % V
        assert new_labels[0].tolist() == [-100, *first[2:], following]
        assert policy.labels_are_true == (source == "teacher")

    def test_a_dict_keeps_its_attention_mask(self):
        ids, labels = batch()
        attention = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
        policy = OnPolicy(fraction=1.0, prompt_length=2, eos_id=3, pad_id=PAD)
        inputs = {"input_ids": ids, "attention_mask": attention}
        new, new_labels = policy.mix(inputs, labels, chain, chain, step=0, seed=0)
        assert new["input_ids"][0].tolist() == [0, 1, 2, 3, 0]
        assert new["attention_mask"][0].tolist() == [1, 1, 1, 1, 0]
        assert new["attention_mask"].dtype == attention.dtype
        assert new_labels[0].tolist() == [-100, 2, 3, -100, -100]
        # The second prompt holds padding: what follows it counts for nothing.
        assert new_labels[1].tolist() == [-100] * 5

    def test_number_of_new_tokens(self):
        ids, labels = batch()
        new_ids, new_labels = OnPolicy(fraction=1.0, prompt_length=2, max_new_tokens=7).mix(
            ids, labels, chain, chain, step=0, seed=0
        )
        assert new_ids.shape == new_labels.shape == (2, 8)

    def test_a_whole_batch_as_prompt_leaves_one_token(self):
        ids, labels = batch()
        new_ids, new_labels = OnPolicy(fraction=1.0, prompt_length=5).mix(ids, labels, chain, chain, step=0, seed=0)
        assert torch.equal(new_ids, ids)
        assert new_labels.tolist() == [[-100] * 4 + [5], [-100] * 4 + [1]]

    def test_the_share_of_replaced_batches(self):
        policy = OnPolicy(fraction=0.3)
        replaced = [policy.replaces(step=step, seed=0) for step in range(4000)]
        assert np.mean(replaced) == pytest.approx(0.3, abs=0.03)
        assert replaced == [policy.replaces(step=step, seed=0) for step in range(4000)]
        assert replaced != [policy.replaces(step=step, seed=1) for step in range(4000)]
        assert not any(OnPolicy(fraction=0.0).replaces(step=step, seed=0) for step in range(100))
        assert all(OnPolicy(fraction=1.0).replaces(step=step, seed=0) for step in range(100))

    def test_a_batch_that_is_not_replaced_is_the_same_object(self):
        ids, labels = batch()
        same_ids, same_labels = OnPolicy(fraction=0.0).mix(ids, labels, chain, chain, step=0, seed=0)
        assert same_ids is ids
        assert same_labels is labels

    def test_ranks_replace_the_same_batches_and_write_different_samples(self):
        """A rank that alone replaces its batch has no loss on labels to log, and the others wait for it for ever."""
        policy = OnPolicy(fraction=0.5, prompt_length=2)
        ids, labels = torch.randint(5, (8, 12)), torch.randint(5, (8, 12))

        def written(rank):
            return [policy.mix(ids, labels, even, even, step=step, seed=0, rank=rank)[0] for step in range(20)]

        def even(tokens):
            return torch.zeros(*tokens.shape, 5)

        first, second = written(0), written(1)
        assert [new is ids for new in first] == [new is ids for new in second]
        assert any(new is ids for new in first)
        assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not ids)

    def test_a_step_is_replayable_and_steps_differ(self):
        ids, labels = torch.zeros(4, 16, dtype=torch.long), torch.zeros(4, 16, dtype=torch.long)
        policy = OnPolicy(fraction=1.0, prompt_length=1)
        even = fixed([0.0] * V)
        draws = [
            policy.mix(ids, labels, even, even, step=step, seed=seed)[0]
            for step, seed in ((1, 0), (1, 0), (2, 0), (1, 1))
        ]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
        assert not torch.equal(draws[0], draws[3])

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"fraction": 1.5}, "fraction"),
            ({"source": "data"}, "source"),
            ({"prompt_length": 0}, "prompt_length"),
            ({"max_new_tokens": 0}, "max_new_tokens"),
            ({"temperature": -1.0}, "temperature"),
            ({"top_k": 0}, "top_k"),
        ],
    )
    def test_refused(self, options, named):
        with pytest.raises(ValueError, match=named):
            OnPolicy(**{"fraction": 0.5, **options})

    def test_batches_that_do_not_fit_are_refused(self):
        ids, labels = batch()
        with pytest.raises(ValueError, match="prompt_length is 16"):
            OnPolicy(fraction=1.0).mix(ids, labels, chain, chain, step=0, seed=0)
        with pytest.raises(ValueError, match="position_ids"):
            OnPolicy(fraction=1.0, prompt_length=1).mix(
                {"input_ids": ids, "position_ids": ids}, labels, chain, chain, step=0, seed=0
            )
