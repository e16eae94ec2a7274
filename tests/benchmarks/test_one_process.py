"""Gradients of a chosen staleness and encoding are applied late, in order, each once."""

import dataclasses

import numpy as np

from infra.parameter_server.optimizers import OptimizedSlice
from pipelines.experiment import presets
from tests.benchmarks.benchmark_one_process import DelayedParameters, Games

CONFIG = presets.experiment(
    'classic', {'target_update_period': 2, 'learning_rate_updates': 4}
)  # so that the number of an update matters
START = np.ones(3, np.float32)


def gradients(count):
    rng = np.random.default_rng(0)
    return [rng.normal(size=3).astype(np.float32) for _ in range(count)]


def after(applied):
    part = OptimizedSlice(CONFIG.parameter_server, 3)
    np.copyto(part.parameters, START)
    for update, gradient in enumerate(applied, start=1):
        part.step(gradient, update)
    return part.parameters.copy()


def test_a_gradient_is_applied_when_as_many_others_have_been_pushed_since():
    parameters = DelayedParameters(CONFIG, START, staleness=2)
    pushed = gradients(5)
    for number, gradient in enumerate(pushed):
        reply = parameters.push(gradient, parameters.pull().version)
        # Of the first three none, none and the first; each later push applies one more.
        np.testing.assert_array_equal(parameters.values, after(pushed[: max(0, number - 1)]))
        assert reply.staleness == min(number, 2)
    assert parameters.updates == 3


def test_without_staleness_each_is_applied_at_once_and_the_target_every_period():
    parameters = DelayedParameters(CONFIG, START, staleness=0)
    pushed = gradients(3)
    for gradient in pushed:
        parameters.push(gradient, parameters.pull().version)
    np.testing.assert_array_equal(parameters.values, after(pushed))
    target = parameters.pull_target()
    assert target.target_versions == (2,)
    assert target.parts is not None
    np.testing.assert_array_equal(target.parts[0], after(pushed[:2]))


def test_a_gradient_reaches_the_optimizer_as_its_encoding_leaves_it():
    # Of three values top-k sends the largest; what is left of the others follows.
    server = dataclasses.replace(CONFIG.parameter_server, wire='top_k')
    config = dataclasses.replace(CONFIG, parameter_server=server)
    parameters = DelayedParameters(config, START, staleness=0)
    parameters.push(np.array([1, 3, 2], np.float32), 0)
    parameters.push(np.zeros(3, np.float32), 1)
    first, second = np.array([[0, 3, 0], [0, 0, 2]], np.float32)
    np.testing.assert_array_equal(parameters.values, after([first, second]))


def test_a_curve_has_one_point_of_ten_games_in_each_5000_updates():
    games = Games()
    for number in [*range(17), 23, 23.5]:  # a game at each 1,000 updates but some, its return that
        games.record('episode', run_updates=int(1000 * number), raw_return=float(number))
    # The tenth game, number 9, is the first with ten before it and past 5,000; the last ten of
    # number 23 are 8 to 16 and itself, 131 in sum.
    assert games.curve() == [(9000, 4.5), (10_000, 5.5), (15_000, 10.5), (23_000, 13.1)]
