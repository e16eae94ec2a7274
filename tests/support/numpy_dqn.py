"""The DQN family's losses in plain NumPy, float64, one row at a time, written from the papers.

Slow and obvious on purpose: it shares no code with agents/, only the order of the variables.
"""

import dataclasses

import numpy as np

# (stride of each convolution) of the DQN 2013 torso (Mnih et al. 2013, section 4.1)
STRIDES = (4, 2)


@dataclasses.dataclass(frozen=True)
class Member:
    """One of the family.

    Attributes:
      agent: 'dqn', 'c51', 'qr_dqn' or 'iqn'.
      double: the online network chooses the best next action (van Hasselt et al. 2016).
      dueling: value and advantage streams (Wang et al. 2016).
      loss: of 'dqn'.
      outputs: atoms or quantiles for each action; of 'iqn' those whose mean is the value.
      v_min, v_max: of 'c51'.
      munchausen: temperature, scale and lowest bound (Vieillard et al. 2020); () without.
      cosines, drawn: of 'iqn', n and N = N' (Dabney et al. 2018b).
    """

    agent: str = 'dqn'
    double: bool = False
    dueling: bool = False
    loss: str = 'huber'
    outputs: int = 1
    v_min: float = -10.0
    v_max: float = 10.0
    munchausen: tuple[float, ...] = ()
    cosines: int = 5
    drawn: int = 3


def relu(x):
    return np.maximum(x, 0.0)


def convolution(x, kernel, bias, stride):
    """Unpadded: x [height, width, in], kernel [size, size, in, out]."""
    size = kernel.shape[0]
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(0, 1))  # type: ignore[call-overload]
    return np.einsum('hwcij,ijco->hwo', windows[::stride, ::stride], kernel) + bias


def network(variables, observation, member, num_actions, fractions=()):
    """Outputs [num_actions, outputs] for one observation uint8 [height, width, stack].

    Of 'iqn' they are quantiles at `fractions`; without, at the midpoints of `outputs` equal parts.

    `variables` in the network's order: convolutions, embedding of fractions, dense and outputs of
    the (advantage) stream, dense and outputs of the state's stream; of each layer the bias, then
    the kernel, which is [out, in] in dense layers.
    """
    x = observation.astype(np.float64) / 255.0
    for index, stride in enumerate(STRIDES):
        bias, kernel = variables[2 * index], variables[2 * index + 1]
        x = relu(convolution(x, kernel, bias, stride))
    x = x.reshape(-1)

    if member.agent != 'iqn':
        return joined_streams(variables[4:], x, member, num_actions)
    if not len(fractions):
        fractions = (np.arange(member.outputs) + 0.5) / member.outputs
    quantiles = []
    for fraction in fractions:  # Dabney et al. 2018b, equation 4
        embedded = variables[4].copy()
        for i in range(member.cosines):
            embedded += np.cos(np.pi * i * fraction) * variables[5][:, i]
        quantiles.append(joined_streams(variables[6:], x * relu(embedded), member, num_actions))
    return np.concatenate(quantiles, axis=1)


def joined_streams(variables, x, member, num_actions):
    """Outputs [num_actions, outputs] for features x [width]; of 'iqn' one output."""

    def stream(first):
        dense_bias, dense, last_bias, last = variables[first : first + 4]
        return last @ relu(dense @ x + dense_bias) + last_bias

    outputs = stream(0).reshape(num_actions, -1)
    if member.dueling:
        outputs = stream(4)[None, :] + outputs - outputs.mean(axis=0)
    return outputs


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def support(member):
    return np.linspace(member.v_min, member.v_max, member.outputs)


def expected_return(outputs, member):
    """Q of one action from its outputs [outputs]."""
    if member.agent == 'c51':
        return softmax(outputs) @ support(member)
    return outputs.mean()  # of quantiles, or of the one value


def huber(x):
    return 0.5 * x * x if abs(x) <= 1.0 else abs(x) - 0.5


def dqn_loss(chosen, best_next, reward, discount, member, fractions):
    """Mnih et al. 2015, Methods."""
    error = reward + discount * best_next[0] - chosen[0]
    return (huber(error) if member.loss == 'huber' else error * error), error


def c51_loss(chosen, best_next, reward, discount, member, fractions):
    """Bellemare et al. 2017, algorithm 1; the error is the Kullback-Leibler divergence."""
    atoms, spacing = support(member), (member.v_max - member.v_min) / (member.outputs - 1)
    projected = np.zeros(member.outputs)
    for probability, atom in zip(softmax(best_next), atoms):
        place = (np.clip(reward + discount * atom, member.v_min, member.v_max) - member.v_min) / (
            spacing
        )
        lower, upper = int(np.floor(place)), int(np.ceil(place))
        if lower == upper:  # on an atom: the algorithm's two shares would both be 0
            projected[lower] += probability
        else:
            projected[lower] += probability * (upper - place)
            projected[upper] += probability * (place - lower)
    log_probability = np.log(softmax(chosen))
    cross_entropy = -(projected @ log_probability)
    positive = projected[projected > 0]
    return cross_entropy, cross_entropy + positive @ np.log(positive)


def qr_dqn_loss(chosen, best_next, reward, discount, member, fractions):
    """Dabney et al. 2018, algorithm 1 with kappa = 1."""
    total = 0.0
    for i, quantile in enumerate(chosen):
        midpoint = (2 * i + 1) / (2 * member.outputs)
        for target in reward + discount * best_next:
            difference = target - quantile
            total += abs(midpoint - (difference < 0)) * huber(difference) / member.outputs
    return total, (reward + discount * best_next).mean() - chosen.mean()


def iqn_loss(chosen, best_next, reward, discount, member, fractions):
    """Dabney et al. 2018b, equation 3 with kappa = 1."""
    total, errors = 0.0, []
    for target in reward + discount * best_next:
        for fraction, quantile in zip(fractions, chosen):
            error = target - quantile
            below = 1.0 if error < 0 else 0.0
            total += abs(fraction - below) * huber(error) / len(best_next)
            errors.append(error)
    return total, np.mean(errors)


def log_policy(outputs, member):
    """ln pi of each action, pi = sm(q / tau) of the target network (Vieillard et al. 2020)."""
    temperature = member.munchausen[0]
    return np.log(softmax(np.array([expected_return(o, member) for o in outputs]) / temperature))


def munchausen_bonus(outputs, action, member):
    """alpha [tau ln pi(a|s)] within [l0, 0] (same paper, section 3)."""
    temperature, scale, lowest = member.munchausen
    return scale * np.clip(temperature * log_policy(outputs, member)[action], lowest, 0.0)


def soft_outputs(outputs, log_probabilities, member):
    """The sum over actions of pi(a|s') (q(s', a) - tau ln pi(a|s')), equation 1."""
    total = np.zeros(outputs.shape[1])
    for log_probability, of_action in zip(log_probabilities, outputs):
        soft = of_action - member.munchausen[0] * log_probability
        total += np.exp(log_probability) * soft
    return total


LOSSES = {'dqn': dqn_loss, 'c51': c51_loss, 'qr_dqn': qr_dqn_loss, 'iqn': iqn_loss}


def loss_and_errors(variables, target, batch, member, num_actions):
    """The mean of the weighted rows' losses, and the rows' errors.

    `batch`: rows (observation, action, reward, discount, next_observation, weight, valid,
    fractions, next_fractions), the last two for 'iqn'; a row that is not valid, one that begins
    behind the end of an episode, counts 0.
    """
    total, errors = 0.0, []
    for row in batch:
        observation, action, reward, discount, next_observation, weight, valid, *fractions = row
        chosen = network(variables, observation, member, num_actions, fractions[0])[action]
        next_target = network(target, next_observation, member, num_actions, fractions[1])
        judging = variables if member.double else target
        judge = network(judging, next_observation, member, num_actions)
        if member.munchausen:
            taken_in = network(target, observation, member, num_actions)
            reward = reward + munchausen_bonus(taken_in, action, member)
            following = soft_outputs(next_target, log_policy(judge, member), member)
        else:
            best = max(range(num_actions), key=lambda a: expected_return(judge[a], member))
            following = next_target[best]
        loss, error = LOSSES[member.agent](
            chosen, following, reward, discount, member, fractions[0]
        )
        total += weight * valid * loss / len(batch)
        errors.append(valid * error)
    return total, np.array(errors)
