"""Agents as users of TF-Agents write them, good ones and ones that our pipelines cannot train."""

import numpy as np
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
        tf.keras.layers.Conv2D(8, 8, 8, activation='relu'),
        tf.keras.layers.Flatten(),
        tf.keras.layers.Dense(16, activation='relu'),
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
        conv_layer_params=[(8, 8, 8)],
        fc_layer_params=(16,),
    )
    return categorical_dqn_agent.CategoricalDqnAgent(
        time_step_spec, action_spec, network, ADAM(1e-4), gamma=config.discount
    )


def _zero_started(num_actions):
    """Layers of which the last gives nothing but zeros at first."""
    return _layers(tf.keras.layers.Dense(num_actions, kernel_initializer='zeros'))


def _with_dropout(num_actions):
    return _layers(tf.keras.layers.Dropout(0.5), tf.keras.layers.Dense(num_actions))


def zero_started(time_step_spec, action_spec, config):
    """All its values are zero at first, at any gamma."""
    return _subclassed(dqn_agent.DqnAgent, time_step_spec, action_spec, config, _zero_started)


def zero_started_own_discount(time_step_spec, action_spec, config):
    """Likewise, and it multiplies by its own gamma."""
    return _subclassed(_OwnDiscount, time_step_spec, action_spec, config, _zero_started)


def dropout_own_discount(time_step_spec, action_spec, config):
    """Two of its losses are never the same, whatever gamma."""
    return _subclassed(_OwnDiscount, time_step_spec, action_spec, config, _with_dropout)


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


class _NormalisesItsWeights(dqn_agent.DqnAgent):
    def _loss(self, experience, *args, **kwargs):
        kernel = self._q_network.trainable_variables[0]
        kernel.assign(kernel / tf.norm(kernel))
        return super()._loss(experience, *args, **kwargs)


class _OwnDiscount(dqn_agent.DqnAgent):
    def _loss(self, experience, weights=None, training=False, **unused):
        return super()._loss(experience, gamma=self._gamma, weights=weights, training=training)


class _UnknownDiscount(_OwnDiscount):
    def _loss(self, experience, weights=None, training=False):
        return dqn_agent.DqnAgent._loss(
            self, experience, gamma=0.9, weights=weights, training=training
        )


class _HardCodedDiscount(dqn_agent.DqnAgent):
    def _loss(self, experience, weights=None, training=False):
        return super()._loss(experience, gamma=0.9, weights=weights, training=training)


class _SquaredDiscount(dqn_agent.DqnAgent):
    def _loss(self, experience, weights=None, training=False):
        gamma = self._gamma**2
        return super()._loss(experience, gamma=gamma, weights=weights, training=training)


class _DiscountOfTargets(dqn_agent.DqnAgent):
    def _compute_next_q_values(self, next_time_steps, info):
        return self._gamma * super()._compute_next_q_values(next_time_steps, info)


class _FixedDiscount(dqn_agent.DqnAgent):
    @property
    def _gamma(self):
        return 0.9

    @_gamma.setter
    def _gamma(self, value):
        if hasattr(self, '_q_network') and value != 0.9:
            raise AttributeError('fixed')


class _ConditionedOnDiscount(dqn_agent.DqnAgent):
    def _loss(self, experience, gamma=1.0, weights=None, training=False):
        self._asked = gamma
        return super()._loss(experience, gamma=self._gamma, weights=weights, training=training)

    def _compute_next_q_values(self, next_time_steps, info):
        return super()._compute_next_q_values(next_time_steps, info) + tf.sin(self._asked)


class _InFunction(dqn_agent.DqnAgent):
    @tf.function(autograph=False)  # whose conversions take seconds, and change nothing here
    def _loss(self, experience, weights=None, training=False):
        return super()._loss(experience, gamma=self._gamma, weights=weights, training=training)


class _Noisy(dqn_agent.DqnAgent):
    """Its rewards and its values are noisy."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.generator = tf.random.Generator.from_seed(3)

    def _loss(self, experience, weights=None, training=False):
        noise = 1.5 + tf.sin(tf.random.normal([]) + self.generator.normal([]))
        info = super()._loss(experience, gamma=self._gamma, weights=weights, training=training)
        return info._replace(loss=info.loss * noise)


class _NoiseOfItsOwn(dqn_agent.DqnAgent):
    numbers = np.random.default_rng(1)

    def _loss(self, experience, *args, **kwargs):
        info = super()._loss(experience, *args, **kwargs)
        return info._replace(loss=info.loss * self.numbers.normal())


class _WithoutWeights(dqn_agent.DqnAgent):
    def _loss(self, experience, gamma=1.0, weights=None, training=False):
        return super()._loss(experience, gamma=gamma, training=training)


class _MeanOfWeights(dqn_agent.DqnAgent):
    def _loss(self, experience, gamma=1.0, weights=None, training=False):
        info = super()._loss(experience, gamma=gamma, training=training)
        return info if weights is None else info._replace(loss=info.loss * tf.reduce_mean(weights))


class _Bandit(dqn_agent.DqnAgent):
    def _loss(self, experience, weights=None, training=False):
        last = experience.next_time_step._replace(
            discount=tf.zeros_like(experience.next_time_step.discount)
        )
        return super()._loss(experience._replace(next_time_step=last), weights=weights)


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


def _plain(num_actions):
    return _layers(tf.keras.layers.Dense(num_actions))


def _subclassed(cls, time_step_spec, action_spec, config, layers=_plain):
    network = sequential.Sequential(layers(action_spec.maximum + 1))
    return cls(time_step_spec, action_spec, network, ADAM(1e-4), gamma=config.discount)


def _without_gamma(agent):
    del agent._gamma
    return agent


def hands_on_keywords(time_step_spec, action_spec, config):
    """Its loss names no gamma, but hands it on."""
    return _subclassed(_HandsOnKeywords, time_step_spec, action_spec, config)


def normalises_its_weights(time_step_spec, action_spec, config):
    """Its loss sets trained variables itself, as a spectral norm by hand does."""
    return _subclassed(_NormalisesItsWeights, time_step_spec, action_spec, config)


def own_discount(time_step_spec, action_spec, config):
    """Its loss looks at no gamma it is given, and multiplies by its own."""
    return _subclassed(_OwnDiscount, time_step_spec, action_spec, config)


def unknown_discount(time_step_spec, action_spec, config):
    """Nobody can tell what its loss multiplies by."""
    return _without_gamma(_subclassed(_UnknownDiscount, time_step_spec, action_spec, config))


def hard_coded_discount(time_step_spec, action_spec, config):
    """It has a gamma, and multiplies by another."""
    return _subclassed(_HardCodedDiscount, time_step_spec, action_spec, config)


def squared_discount(time_step_spec, action_spec, config):
    """It multiplies by the square of its gamma."""
    return _subclassed(_SquaredDiscount, time_step_spec, action_spec, config)


def fixed_discount(time_step_spec, action_spec, config):
    """Its gamma can't be changed, so nobody sees what becomes of it."""
    return _subclassed(_FixedDiscount, time_step_spec, action_spec, config)


def conditioned_on_discount(time_step_spec, action_spec, config):
    """It looks at the argument, but does not multiply by it."""
    return _subclassed(_ConditionedOnDiscount, time_step_spec, action_spec, config)


def discount_of_targets(time_step_spec, action_spec, config):
    """It multiplies twice: by the argument, and in its target by its own."""
    return _subclassed(_DiscountOfTargets, time_step_spec, action_spec, config, _zero_started)


def in_a_function(time_step_spec, action_spec, config):
    """Its loss is a function of TensorFlow, which keeps the gamma that it saw first."""
    return _subclassed(_InFunction, time_step_spec, action_spec, config, _zero_started)


def noisy(time_step_spec, action_spec, config):
    """It draws random numbers, from TensorFlow and from a generator."""
    return _subclassed(_Noisy, time_step_spec, action_spec, config, _zero_started)


def noise_of_its_own(time_step_spec, action_spec, config):
    """It draws them where nobody can draw the same ones again."""
    return _subclassed(_NoiseOfItsOwn, time_step_spec, action_spec, config)


def dropout_without_weights(time_step_spec, action_spec, config):
    """Its losses differ at any weights, for its dropout."""
    return _subclassed(_WithoutWeights, time_step_spec, action_spec, config, _with_dropout)


def mean_of_weights(time_step_spec, action_spec, config):
    """It looks at weights, but not whose they are."""
    return _subclassed(_MeanOfWeights, time_step_spec, action_spec, config)


def bandit(time_step_spec, action_spec, config):
    """Nothing comes after its action, so it knows no gamma."""
    return _without_gamma(_subclassed(_Bandit, time_step_spec, action_spec, config))


class _LayerOfChance(tf.keras.layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight('scale', [shape[-1]])

    def call(self, inputs):
        rare = tf.random.uniform([]) < 1e-30
        return tf.cond(rare, lambda: self.scale * inputs, lambda: tf.identity(inputs))


def layer_of_chance(time_step_spec, action_spec, config):
    """One of its layers takes part but once in a long while."""
    layers = _layers(_LayerOfChance(), tf.keras.layers.Dense(action_spec.maximum + 1))
    return _subclassed(dqn_agent.DqnAgent, time_step_spec, action_spec, config, lambda _: layers)


def on_several_devices(time_step_spec, action_spec, config):
    """Its variables are a strategy's."""
    with tf.distribute.MirroredStrategy(['CPU:0']).scope():
        return stock_dqn(time_step_spec, action_spec, config)


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
