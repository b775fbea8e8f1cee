import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from superpose.bags import position_weights
from superpose.cli import main
from superpose.data.store import TokenStore
from superpose.errors import InputError
from superpose.experiment import analyse as module
from superpose.experiment.analyse import (
    analyse,
    fit_power_law,
    mutual_information,
    read_pieces,
    repeated_ngrams,
    repetition,
    write_analysis,
)
from superpose.experiment.recipe import Recipe


def markov_chain(states, copies, tokens, seed=0):
    """A chain that goes to a fixed successor with probability ``copies``, else anywhere by Zipf's law; and I(1), I(2), I(4)."""
    draw = np.random.default_rng(seed)
    fresh = 1 / np.arange(1, states + 1)
    fresh /= fresh.sum()
    successor = draw.permutation(states)
    transition = np.tile((1 - copies) * fresh, (states, 1))
    transition[np.arange(states), successor] += copies
    chains, length = 500, tokens // 500
    copied, drawn = draw.random((chains, length)) < copies, draw.choice(states, (chains, length), p=fresh)
    state, sequence = drawn[:, 0], np.empty((chains, length), np.int64)
    for step in range(-50, length):  # the first 50 are not kept: the chain forgets how it began
        state = np.where(copied[:, step], successor[state], drawn[:, step])
        sequence[:, step] = state
    stationary = np.linalg.matrix_power(transition, 64)[0]
    information = []
    for distance in (1, 2, 4):
        conditional = np.linalg.matrix_power(transition, distance)
        logs = np.log(np.maximum(conditional, 1e-300) / stationary)
        information.append(float(stationary @ (conditional * logs).sum(1)))
    return sequence, information


@pytest.mark.parametrize(
    ("states", "copies", "tokens", "relative"),
    [(200, 0.5, 300_000, 0.01), (1000, 0.5, 500_000, 0.03), (1000, 0.8, 500_000, 0.03)],
)
def test_information_of_markov_chains(states, copies, tokens, relative):
    sequence, true = markov_chain(states, copies, tokens)
    found = mutual_information(sequence, states, (1, 2, 4))
    np.testing.assert_allclose(found.corrected, true, rtol=relative, atol=0.004)
    # what counting says is further off at every distance
    assert (abs(found.counted - true) > abs(found.corrected - true)).all()


def test_independent_tokens_have_no_information():
    """With 5,000 words counting finds over a nat where there is none."""
    share = 1 / np.arange(1, 5001)
    sequence = np.random.default_rng(0).choice(5000, (10, 20_000), p=share / share.sum())
    found = mutual_information(sequence, 5000, (1, 3))
    np.testing.assert_allclose(found.corrected, 0, atol=0.01)
    assert found.counted.min() > 1
    assert found.seen_once > module.SPARSE


def test_pairs_are_counted_the_same_by_a_table_and_by_sorting(monkeypatch):
    sequence, _ = markov_chain(50, 0.5, 50_000)
    table = mutual_information(sequence, 50, (1, 5))
    monkeypatch.setattr(module, "DENSE", 0)
    by_sorting = mutual_information(sequence, 50, (1, 5))
    np.testing.assert_allclose(by_sorting.corrected, table.corrected, rtol=1e-9)
    assert by_sorting.seen_once == table.seen_once


def test_grassbergers_numbers_are_those_of_the_digamma_function():
    n = torch.arange(1, 200, dtype=torch.float64)
    sign = torch.where(n % 2 == 0, 1.0, -1.0)
    expected = torch.digamma(n) + sign / 2 * (torch.digamma((n + 1) / 2) - torch.digamma(n / 2))
    np.testing.assert_allclose(module._G[1:200], expected.numpy(), rtol=1e-10)
    np.testing.assert_allclose(module._G[-1], math.log(len(module._G) - 1), rtol=1e-4)


@pytest.mark.parametrize("true", [(3.63, 1.35, -1.25), (0.0, 2.4, -0.5), (0.2, 0.7, -2.5)])
def test_the_fit_finds_its_own_curve(true):
    distances = module.DISTANCES
    constant, scale, exponent = true
    values = constant + scale * np.array(distances, float) ** exponent
    np.testing.assert_allclose(fit_power_law(distances, values), true, atol=2e-3)


@pytest.mark.parametrize("values", [[0.0, -0.001, 0.001, -0.001], [1.0, 0.1, -0.2, -0.1], [0.1, 0.2, 0.3, 0.4]])
def test_the_fit_always_makes_weights(values):
    fit = fit_power_law((1, 2, 4, 8), np.array(values))
    if sum(fit[:2]):
        assert position_weights(fit, 16).sum() == pytest.approx(1)
    assert min(fit[:2]) >= 0


def test_repeated_ngrams_against_a_set():
    pieces = np.random.default_rng(1).integers(0, 4, (3, 200))
    for n in (2, 4, 8):
        grams = [tuple(piece[i : i + n]) for piece in pieces for i in range(200 - n + 1)]
        assert repeated_ngrams(pieces, n) == pytest.approx(1 - len(set(grams)) / len(grams))


def test_repetition_against_plain_loops():
    pieces = np.random.default_rng(2).integers(0, 9, (2, 50))
    within = previous = total = pairs = 0
    for piece in pieces:
        bags = [piece[i : i + 4].tolist() for i in range(0, 48, 4)]
        total += 48
        within += sum(token in bag[:i] for bag in bags for i, token in enumerate(bag))
        previous += sum(token in before for before, bag in pairwise(bags) for token in bag)
        pairs += 44
    found = repetition(pieces, 4)
    assert found.within == pytest.approx(within / total)
    assert found.from_previous == pytest.approx(previous / pairs)


def test_pieces_are_spread_over_the_split(store):
    split = TokenStore(store)
    pieces = read_pieces(split, 64_000)
    assert pieces.shape == (64, 1000)
    np.testing.assert_array_equal(pieces[0], split.read(0, 1000))
    np.testing.assert_array_equal(pieces[-1], split.read(len(split) - 1000, 1000))
    np.testing.assert_array_equal(read_pieces(split, 10**9)[0], split.read(0, len(split)))
    with pytest.raises(InputError, match="are too few"):
        read_pieces(split, 1000)


def test_analysis_of_source_code(store, recipe, tmp_path):
    found = analyse(store, tokens=200_000)
    assert found.bytes_per_token == TokenStore(store).bytes_per_token
    information = found.information.corrected
    assert 0.5 < information[0] < 2  # bytes of source code
    assert information[0] > information[3] > information[-1] > 0
    assert found.repeated[2] > found.repeated[8] > found.repeated[32] > 0
    assert [bag.bag_size for bag in found.bags] == [2, 4, 8, 16]
    assert found.bags[-1].within > found.bags[0].within
    assert 2 < found.compression < 8
    values = recipe.as_dict()
    values["superposition"]["weighting"] = list(found.fit)
    weights = Recipe.from_dict(values).schedule().stages[0].weighting
    assert weights == found.fit
    plot, table = write_analysis(found, tmp_path / "a")
    assert plot.stat().st_size > 10_000
    assert len(table.read_text().splitlines()) == 1 + len(module.DISTANCES)


def test_the_command(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["superpose", "analyse", str(store), "--tokens", "100K", "--out", str(tmp_path / "a")])
    main()
    out = capsys.readouterr().out
    assert "superposition.weighting='[" in out
    assert "n-grams that occurred before" in out
    assert (tmp_path / "a" / "analysis.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none is not a token store"),
        (["STORE", "--split", "test"], "has no split 'test'"),
        (["STORE", "--tokens", "few"], "--tokens 'few' is not a number"),
        (["STORE", "--tokens", "100"], "100 tokens are too few"),
    ],
)
def test_bad_input_is_one_line(store, monkeypatch, capsys, arguments, message):
    arguments = [str(store) if argument == "STORE" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["superpose", "analyse", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line
