"""The protocol: its form, and slips that are named where they are made."""

from __future__ import annotations

import doctest
from dataclasses import fields, replace

import pytest

import fedvlm
from fedvlm.algorithms import base, dry
from fedvlm.algorithms.base import Averaged, Sent, Trained, step
from fedvlm.algorithms.sharing import sharing
from fedvlm.engines.wire import Forms, Reply
from fedvlm.errors import FedVLMError
from fedvlm.rounds.fold import Fold
from test_algorithms import VISIT, tree


def test_an_algorithm_has_half_of_the_fields_that_it_had_in_the_first_version():
    assert len(fields(fedvlm.Algorithm)) == 6


def test_its_docstring_is_a_runnable_algorithm():
    assert doctest.testmod(base).attempted >= 5
    assert doctest.testmod(base).failed == 0


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda local: (yield "train"), "must yield Train or Score, got 'train'"),
        (lambda local: Sent({}), "must be a generator function"),
        (lambda local: (yield from ()), r"must return Sent\(...\), got None"),
    ],
)
def test_a_program_that_breaks_the_protocol_is_named(work, said):
    with pytest.raises(TypeError, match=said):
        step(work(None))


def test_a_stretch_has_no_negative_steps():
    with pytest.raises(ValueError, match="0 steps or more, got -1"):
        base.Train({}, steps=-1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: base.Train({}, trains="A"), "a function of a factor's name, got 'A'"),
        (lambda: Sent(Trained({}, {})), "Sent.up is a dict of names and tensors, got Trained"),
        (lambda: Sent({}, {"loss": 3.0}), r"Sent.keep\['loss'\] is a tensor, got float"),
        (
            lambda: fedvlm.Algorithm(None, None, None, None, lambda s, m, r: m),
            r"server is Averaged\(update\) or Gathered\(update\), got <function",
        ),
    ],
)
def test_a_slip_in_an_algorithm_is_named_where_it_is_made(make, said):
    with pytest.raises(TypeError, match=said):
        make()


def test_an_algorithm_that_reads_a_value_is_told_why_it_may_not():
    def work(local):
        (end, _) = yield base.Train(local.begin)
        return Sent(end if float(next(iter(end.values())).sum()) > 0 else {})

    algorithm = replace(sharing({"": "AB"}), work=work)
    whole = dry.bare(tree(0))
    with pytest.raises(FedVLMError, match="reads the value of a tensor"):
        dry.rehearse(algorithm, whole, VISIT, whole, 2)


@pytest.mark.parametrize(
    ("update", "said"),
    [
        (lambda state, mean, round: None, "a dict of the tensors that change, got NoneType"),
        (
            lambda state, mean, round: {n: t.double() for n, t in mean.items()},
            r"as torch\.float64 .*, and the state has torch\.float32",
        ),
        (
            lambda state, mean, round: {n: t[:1] for n, t in mean.items()},
            r"\[1, 5\], and the state",
        ),
    ],
)
def test_a_servers_update_of_another_form_is_refused_before_it_is_the_state(update, said):
    algorithm = replace(sharing({"": "AB"}), server=Averaged(update))
    state = algorithm.init(tree(0))
    fold = Fold({"c": VISIT}, {"c": state}, Forms(algorithm, tree(0)))
    assert fold.add(Reply("c", tree(1), 3.0, 1.0))
    with pytest.raises(FedVLMError, match=said):
        fold.update(state, 1)
