"""What an accelerator does, on a second device that is a processor, too: run by test_device.py.

Configured before anything else uses TensorFlow, hence in a process of its own. What only an
accelerator itself could show (its kernels, its copies beside them) is not shown.
"""

import collections
import itertools
import threading

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import kernels

from agents import device
from agents.adapters.parameters import ParameterServerOptimizer
from agents.config import LearnerConfig
from agents.gradient import AgentGradient
from agents.gradient_pipeline import Ahead, InTurn, stream_on
from agents.learner import Learner
from agents.model import family_model, tf_agents_transition
from infra.parameter_server.client import ParameterClient
from infra.parameter_server.layout import Layout
from infra.replay.errors import ReplayTimeout
from infra.replay.trajectory import Transition
from tests.support import dqn_agents, memory, parameter_servers
from tests.support.waiting import eventually

_CPU = tf.config.list_physical_devices('CPU')[0]
tf.config.set_logical_device_configuration(_CPU, [tf.config.LogicalDeviceConfiguration()] * 2)
tf.config.threading.set_inter_op_parallelism_threads(8)  # shards here answer graphs that wait

SECOND = '/device:CPU:1'
BATCH = 4
WAIT_SECONDS = 20.0
# Not of a kernel: TensorFlow's own wiring, and what has to be on the host.
_TYPES = {'T', 'dtype', 'SrcT', 'DstT', 'Tidx', 'Index', 'Tshape', 'out_type'}
_TEXT = tf.string.as_datatype_enum
_NO_KERNEL = {'Placeholder', 'NoOp', 'PyFunc', 'StatefulPartitionedCall', 'PartitionedCall'}

Sample = collections.namedtuple('Sample', 'number transition')


def samples(count=None):
    """Transitions that differ in their rewards."""
    first = dqn_agents.transition(BATCH)
    for number in itertools.count() if count is None else range(count):
        yield Sample(number, first._replace(reward=first.reward + np.float32(number)))


def get_ahead(stream):
    """Draws gradients until the next one has begun; returns the last one drawn."""
    for _ in range(100):
        drawn = stream.next(no_weights)
        if stream.computing is not None:
            return drawn
    raise AssertionError('it never is ahead')


class Starving:
    """A replay that has no more than `draws` samples at first."""

    def __init__(self, of, draws):
        self._of = of
        self.draws = draws

    def __iter__(self):
        return self

    def __next__(self):
        if not self.draws:
            raise ReplayTimeout('no batch')
        self.draws -= 1
        return next(self._of)


def no_weights(_):
    return None


def network(weighted=False):
    with tf.device(SECOND):
        return dqn_agents.gradient(weighted=weighted)


@pytest.fixture
def ahead():
    """Makes streams, with an agent and random samples; closes them."""
    made = []

    def make(drawn=None, weighted=False):
        made.append(Ahead(network(weighted), drawn or samples()))
        return made[-1]

    yield make
    for stream in made:
        stream.close()


def operations_of(function):
    """The operations of an `ArrayFunction`'s graph and of the functions in it."""
    graph = function._concrete.graph.as_graph_def()
    return [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]


class TestChoice:
    def test_without_an_accelerator_the_host_is_taken(self):
        assert device.choose('auto') == device.choose('cpu') == device.HOST
        assert stream_on(device.choose('auto')) is InTurn

    def test_a_device_that_is_there_is_taken(self):
        assert device.choose('cpu:1', worker=5) == SECOND
        assert stream_on(SECOND) is Ahead

    @pytest.mark.parametrize('wanted', ['gpu', 'gpu:0', 'cpu:2'])
    def test_a_device_that_is_not_there_is_an_error_that_names_the_flag(self, wanted):
        with pytest.raises(device.DeviceError, match=f'--learner_device {wanted}: TensorFlow sees'):
            device.choose(wanted)


class TestPlacement:
    def test_variables_and_arithmetic_are_on_the_device_and_arrays_on_the_host(self):
        learner = network()
        assert {device.is_host(variable.device) for variable in learner.variables} == {False}
        learner.gradient(dqn_agents.transition(BATCH))
        nodes = operations_of(learner._gradient)
        on = {node.op: node.device for node in nodes}
        assert on['PyFunc'].endswith('CPU:0')
        assert {on[op][-5:] for op in ('MatMul', 'Conv2D', 'Conv2DBackpropFilter')} == {'CPU:1'}

    def test_on_the_host_nothing_is_elsewhere(self):
        learner = dqn_agents.gradient()
        learner.gradient(dqn_agents.transition(BATCH))
        devices = {node.device[-5:] for node in operations_of(learner._gradient) if node.device}
        assert devices == {'CPU:0'}

    def test_all_that_computes_has_a_kernel_for_a_gpu(self, ahead):
        # This TensorFlow is built with CUDA: its kernels are registered with or without a GPU.
        if not tf.test.is_built_with_cuda():
            pytest.skip('this TensorFlow has no kernels for GPUs')
        stream = ahead(weighted=True)
        stream.next(lambda sample: np.ones(BATCH, np.float32))
        (slot, _) = stream.slots
        kept = {variable.dtype for variable in (*slot.batch, *slot.results)}
        for kind in kept:
            assert has_gpu_kernel('VarHandleOp', {'dtype': kind.as_datatype_enum})
        actions = {'dtype': tf.int32.as_datatype_enum}  # as they come
        assert not has_gpu_kernel('VarHandleOp', actions)
        missing = {
            (node.op, str(types_of(node)))
            for function in (slot.stage, slot.compute, slot.fetch)
            for node in operations_of(function)
            if node.device.endswith('CPU:1') and node.op not in _NO_KERNEL
            if _TEXT not in {value.type for value in node.attr.values()}
            if not has_gpu_kernel(node.op, types_of(node))
        }
        assert missing == set()


def types_of(node):
    """The types, by attribute, that a node's kernel is chosen by; texts stay on the host."""
    kinds = {name: value.type for name, value in node.attr.items() if name in _TYPES}
    return {name: kind for name, kind in kinds.items() if kind not in (0, _TEXT)}


def has_gpu_kernel(op, types):
    """Whether some kernel of `op` for a GPU, or for any device, takes these types."""
    return any(
        all(
            types[constraint.name] in constraint.allowed_values.list.type
            for constraint in kernel.constraint
            if constraint.name in types
        )
        for kernel in kernels.get_registered_kernels_for_op(op).kernel
        if kernel.device_type in ('GPU', 'DEFAULT')
    )


class TestAhead:
    def test_its_gradients_are_those_in_turn(self, ahead):
        streams = ahead(), InTurn(dqn_agents.gradient(), samples())
        for number in range(5):
            one, other = (stream.next(no_weights) for stream in streams)
            assert one.sample.number == other.sample.number == number
            np.testing.assert_array_equal(one.gradient, other.gradient)
            np.testing.assert_array_equal(one.absolute_error, other.absolute_error)
            assert one.loss == other.loss

    def test_weights_go_with_their_batch(self, ahead):
        def weights(sample):
            return np.full(BATCH, 1.0 + sample.number, np.float32)

        plain = InTurn(dqn_agents.gradient(), samples())
        stream = ahead(weighted=True)
        for number in range(3):
            expected = (1.0 + number) * plain.next(no_weights).gradient
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                stream.next(weights).gradient / scale, expected / scale, atol=1e-5
            )

    def test_a_gradient_comes_to_the_host_while_the_next_is_computed(self, ahead):
        stream = ahead()
        last = get_ahead(stream).sample.number
        assert eventually(stream.staged.done)
        begun, may_end = threading.Event(), threading.Event()
        for slot in stream.slots:
            compute = slot.compute

            def held(compute=compute):
                begun.set()
                assert may_end.wait(WAIT_SECONDS)
                compute()

            slot.compute = held
        stream.next(no_weights)  # its computation began before it was held
        # The one behind is held, and yet:
        assert begun.wait(WAIT_SECONDS)
        assert not stream.computing.end.done()
        may_end.set()
        assert stream.next(no_weights).sample.number == last + 2

    def test_a_batch_goes_to_the_device_while_a_gradient_is_computed(self, ahead):
        drawn = []

        def counted():
            for sample in samples():
                drawn.append(sample.number)
                yield sample

        stream = ahead(counted())
        get_ahead(stream)
        staged = threading.Event()
        for slot in stream.slots:
            stage, compute = slot.stage, slot.compute

            def told(*columns, stage=stage):
                stage(*columns)
                staged.set()

            def held(compute=compute):
                assert staged.wait(WAIT_SECONDS)
                compute()

            slot.stage, slot.compute = told, held
        for _ in range(3):
            assert eventually(stream.staged.done)
            last = stream.next(no_weights).sample.number
        # One gradient is ahead, and one batch ahead of that.
        assert eventually(lambda: drawn[-1] == last + 2)

    def test_parameters_that_arrive_are_those_of_the_gradient_that_begins_next(self, ahead):
        stream, expected = ahead(), dqn_agents.gradient()
        stream.set_parameters([np.zeros(expected.size, np.float32)], 7)
        old = get_ahead(stream)
        ones = np.full(expected.size, 1e-2, np.float32)
        stream.set_parameters([ones[:100], ones[100:]], 8)
        ones[:] = 9.0  # parts are lent
        assert (old.version, stream.next(no_weights).version) == (7, 7)
        new = stream.next(no_weights)
        assert new.version == 8
        expected.set_parameters(np.full(expected.size, 1e-2, np.float32))
        transition = new.sample.transition
        np.testing.assert_array_equal(new.gradient, expected.gradient(transition)[0])

    def test_a_replay_without_a_batch_costs_no_gradient(self, ahead):
        replay = Starving(samples(), draws=2)
        stream = ahead(replay)
        assert [stream.next(no_weights).sample.number for _ in range(2)] == [0, 1]
        for _ in range(2):
            with pytest.raises(ReplayTimeout):
                stream.next(no_weights)
        replay.draws = 5
        assert [stream.next(no_weights).sample.number for _ in range(2)] == [2, 3]

    def test_a_gradient_that_is_done_does_not_wait_for_another_batch(self, ahead):
        replay = Starving(samples(), draws=2)
        held = threading.Event()

        def drawn():
            yield next(replay)
            yield next(replay)
            assert held.wait(WAIT_SECONDS)
            yield next(samples())

        stream = ahead(drawn())
        numbers: list[int] = []
        done = threading.Thread(
            target=lambda: numbers.extend(stream.next(no_weights).sample.number for _ in range(2))
        )
        done.start()
        done.join(WAIT_SECONDS / 2)
        assert numbers == [0, 1]
        held.set()

    def test_it_leaves_nothing_behind(self, ahead):
        stream = ahead(itertools.repeat(next(samples())))
        # A single block an update would be 60.
        assert memory.blocks_kept(lambda: stream.next(no_weights), 60, few=60) < 60


def test_a_learner_ahead_pushes_every_gradient_and_none_is_stale():
    gradient = network()
    config = parameter_servers.config(max_staleness=2)
    with parameter_servers.serve(config) as shards:
        layout = Layout.from_variables(gradient.variables)
        with ParameterClient([shard.address for shard in shards], layout) as client:
            client.initialise(gradient.parameters())
            settings = LearnerConfig(batch_size=BATCH, outlier_deviations=0.0)
            learner = Learner(settings, gradient, samples(), client, stream=Ahead)
            for _ in range(10):
                learner.update()
            learner.close()
            # Its own pushes age its gradients, by the one on its way and the one ahead.
            assert (learner.counters.stale, client.pull().clock.updates) == (0, 10)


def values_of(agent):
    return np.concatenate([v.numpy().ravel() for v in agent.q_network.trainable_variables])


def test_two_replicas_push_the_gradient_of_the_whole_batch_once():
    strategy = tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1'])
    batch = dqn_agents.transition(2 * BATCH, gamma_n=1.0)
    halves = [
        tf_agents_transition(Transition(*(tf.constant(column[rows]) for column in batch)))
        for rows in (slice(BATCH), slice(BATCH, None))
    ]
    # These servers move a parameter by -g (see tests/support/parameter_servers.py).
    with parameter_servers.serve(parameter_servers.config()) as shards:
        optimizer = ParameterServerOptimizer([shard.address for shard in shards])
        with strategy.scope():
            agent = dqn_agents.make(discount=1.0)
        agent._optimizer = optimizer
        experience = strategy.experimental_distribute_values_from_function(
            lambda replica: halves[replica.replica_id_in_sync_group]
        )
        before = values_of(agent)
        update = tf.function(lambda: strategy.run(agent.train, args=(experience,)), autograph=False)
        update()
        step = before - values_of(agent)
        update()
        optimizer.close()
    for variable in agent.q_network.trainable_variables:
        one, other = strategy.experimental_local_results(variable)
        np.testing.assert_array_equal(one, other)
    whole = AgentGradient(family_model(dqn_agents.make(discount=1.0)), gradient_clip_norm=0.0)
    expected, *_ = whole.gradient(batch)
    np.testing.assert_allclose(step, expected, atol=1e-5 * np.abs(expected).max())
    assert (optimizer.updates, optimizer.rejected) == (2, 0)
