"""Agents as users of TF-Agents write them, good ones and ones that our pipelines cannot train."""

import tensorflow as tf
from tf_agents.agents import tf_agent
from tf_agents.agents.categorical_dqn import categorical_dqn_agent
from tf_agents.agents.dqn import dqn_agent
from tf_agents.networks import categorical_q_network, q_network, sequential
from tf_agents.policies import random_tf_policy
from tf_agents.specs import tensor_spec
from tf_agents.trajectories import time_step as ts

ADAM = tf.keras.optimizers.legacy.Adam


def _layers(*more):
    return [
        tf.keras.layers.Rescaling(1 / 255),
        tf.keras.layers.Conv2D(16, 8, 4, activation='relu'),
        tf.keras.layers.Conv2D(32, 4, 2, activation='relu'),
        tf.keras.layers.Flatten(),
        tf.keras.layers.Dense(64, activation='relu'),
        *more,
    ]


def stock_dqn(time_step_spec, action_spec, config):
    """TF-Agents' own DQN over a network of Keras layers."""
    num_actions = action_spec.maximum + 1
    network = sequential.Sequential(_layers(tf.keras.layers.Dense(num_actions)))
    return dqn_agent.DqnAgent(
        time_step_spec,
        action_spec,
        network,
        ADAM(1e-4),
        n_step_update=config.n_step,
        gamma=config.discount,
    )


def scaled_reward_dqn(time_step_spec, action_spec, config):
    """The same with a reward scale, which TF-Agents' `loss` forgets."""
    network = sequential.Sequential(_layers(tf.keras.layers.Dense(action_spec.maximum + 1)))
    return dqn_agent.DqnAgent(
        time_step_spec,
        action_spec,
        network,
        ADAM(1e-4),
        gamma=config.discount,
        reward_scale_factor=0.5,
    )


def stock_c51(time_step_spec, action_spec, config):
    """TF-Agents' own C51, whose loss takes a Trajectory only and ignores weights."""
    network = categorical_q_network.CategoricalQNetwork(
        time_step_spec.observation,
        action_spec,
        num_atoms=21,
        preprocessing_layers=tf.keras.layers.Rescaling(1 / 255),
        conv_layer_params=[(16, 8, 4), (32, 4, 2)],
        fc_layer_params=(64,),
    )
    return categorical_dqn_agent.CategoricalDqnAgent(
        time_step_spec, action_spec, network, ADAM(1e-4), gamma=config.discount
    )


def batch_normalised(time_step_spec, action_spec, config):
    """Its statistics move without a gradient."""
    layers = _layers(
        tf.keras.layers.BatchNormalization(), tf.keras.layers.Dense(action_spec.maximum + 1)
    )
    return dqn_agent.DqnAgent(
        time_step_spec, action_spec, sequential.Sequential(layers), ADAM(1e-4)
    )


def recurrent(time_step_spec, action_spec, config):
    """Its policy has a state."""
    from tf_agents.networks import q_rnn_network

    network = q_rnn_network.QRnnNetwork(
        time_step_spec.observation,
        action_spec,
        preprocessing_layers=tf.keras.layers.Rescaling(1 / 255),
        conv_layer_params=[(8, 8, 8)],
        input_fc_layer_params=(8,),
        lstm_size=(8,),
    )
    return dqn_agent.DqnAgent(time_step_spec, action_spec, network, ADAM(1e-4))


class _HandsOnKeywords(dqn_agent.DqnAgent):
    def _loss(self, experience, *args, **kwargs):
        return super()._loss(experience, *args, **kwargs)


class _OwnDiscount(dqn_agent.DqnAgent):
    def _loss(self, experience, weights=None, training=False, **unused):
        return super()._loss(experience, gamma=self._gamma, weights=weights, training=training)


class _UnknownDiscount(_OwnDiscount):
    def _loss(self, experience, weights=None, training=False):
        return dqn_agent.DqnAgent._loss(
            self, experience, gamma=0.9, weights=weights, training=training
        )


class _EagerOnly(dqn_agent.DqnAgent):
    def _loss(self, experience, *args, **kwargs):
        info = super()._loss(experience, *args, **kwargs)
        if info.loss > 1e9:
            raise ValueError('diverged')
        return info


class _ColumnOfErrors(dqn_agent.DqnAgent):
    def _loss(self, experience, *args, **kwargs):
        info = super()._loss(experience, *args, **kwargs)
        column = info.extra.td_error[:, None]
        return info._replace(extra=dqn_agent.DqnLossInfo(column, column))


def _subclassed(cls, time_step_spec, action_spec, config):
    network = sequential.Sequential(_layers(tf.keras.layers.Dense(action_spec.maximum + 1)))
    return cls(time_step_spec, action_spec, network, ADAM(1e-4), gamma=config.discount)


def hands_on_keywords(time_step_spec, action_spec, config):
    """Its loss names no gamma, but hands it on."""
    return _subclassed(_HandsOnKeywords, time_step_spec, action_spec, config)


def own_discount(time_step_spec, action_spec, config):
    """Its loss looks at no gamma it is given, and multiplies by its own."""
    return _subclassed(_OwnDiscount, time_step_spec, action_spec, config)


def unknown_discount(time_step_spec, action_spec, config):
    """Nobody can tell what its loss multiplies by."""
    agent = _subclassed(_UnknownDiscount, time_step_spec, action_spec, config)
    del agent._gamma
    return agent


def eager_only(time_step_spec, action_spec, config):
    """Its loss asks a tensor for its truth."""
    return _subclassed(_EagerOnly, time_step_spec, action_spec, config)


def column_of_errors(time_step_spec, action_spec, config):
    """Its errors are [B, 1]."""
    return _subclassed(_ColumnOfErrors, time_step_spec, action_spec, config)


def half_precision(time_step_spec, action_spec, config):
    """One of its layers is not float32."""
    layers = _layers(
        tf.keras.layers.Dense(16, dtype='float16'),
        tf.keras.layers.Dense(action_spec.maximum + 1, dtype='float32'),
    )
    return dqn_agent.DqnAgent(
        time_step_spec, action_spec, sequential.Sequential(layers), ADAM(1e-4)
    )


def not_finite(time_step_spec, action_spec, config):
    """It starts from weights that are no numbers."""
    nan = tf.keras.initializers.Constant(float('nan'))
    layers = _layers(tf.keras.layers.Dense(action_spec.maximum + 1, kernel_initializer=nan))
    return dqn_agent.DqnAgent(
        time_step_spec, action_spec, sequential.Sequential(layers), ADAM(1e-4)
    )


def of_other_actions(time_step_spec, action_spec, config):
    """It knows two actions more than the game."""
    more = tensor_spec.BoundedTensorSpec((), tf.int32, 0, action_spec.maximum + 2)
    return stock_dqn(time_step_spec, more, config)


def of_other_observations(time_step_spec, action_spec, config):
    """It looks at single frames."""
    single = tensor_spec.TensorSpec((84, 84, 1), tf.uint8)
    return stock_dqn(ts.time_step_spec(single), action_spec, config)


def raising(time_step_spec, action_spec, config):
    """It fails."""
    raise RuntimeError('no licence')


def exiting(time_step_spec, action_spec, config):
    """It ends the program."""
    raise SystemExit(7)


def not_an_agent(time_step_spec, action_spec, config):
    """A network is no agent."""
    return q_network.QNetwork(time_step_spec.observation, action_spec)


class _Lossless(tf_agent.TFAgent):
    def __init__(self, time_step_spec, action_spec):
        policy = random_tf_policy.RandomTFPolicy(time_step_spec, action_spec)
        super().__init__(time_step_spec, action_spec, policy, policy, train_sequence_length=2)

    def _initialize(self):
        pass

    def _train(self, experience, weights=None):
        raise NotImplementedError


def without_a_loss(time_step_spec, action_spec, config):
    """It can only train itself."""
    return _Lossless(time_step_spec, action_spec)
