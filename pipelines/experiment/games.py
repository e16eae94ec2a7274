"""Groups of games: `pong,atari5` in, names of games out; a list of all games for a terminal."""

from agents.environments.factory import check_name
from agents.games import game_names
from pipelines.errors import UsageError

# fmt: off
ATARI_49 = (
    'alien', 'amidar', 'assault', 'asterix', 'asteroids', 'atlantis', 'bank_heist', 'battle_zone',
    'beam_rider', 'bowling', 'boxing', 'breakout', 'centipede', 'chopper_command',
    'crazy_climber', 'demon_attack', 'double_dunk', 'enduro', 'fishing_derby', 'freeway',
    'frostbite', 'gopher', 'gravitar', 'hero', 'ice_hockey', 'jamesbond', 'kangaroo', 'krull',
    'kung_fu_master', 'montezuma_revenge', 'ms_pacman', 'name_this_game', 'pong', 'private_eye',
    'qbert', 'riverraid', 'road_runner', 'robotank', 'seaquest', 'space_invaders', 'star_gunner',
    'tennis', 'time_pilot', 'tutankham', 'up_n_down', 'venture', 'video_pinball', 'wizard_of_wor',
    'zaxxon',
)
# fmt: on
"""The games of Nair et al. 2015, which are those of Mnih et al. 2015."""

ATARI_5 = ('battle_zone', 'double_dunk', 'name_this_game', 'phoenix', 'qbert')
"""The subset of Aitchison et al. 2023 ("Atari-5") that predicts the median score of 57 games."""

GROUPS = {'atari49': ATARI_49, 'atari5': ATARI_5}

_GAP = 2


def games_of(text: str) -> tuple[str, ...]:
    """The games and environments that a comma-separated list names, groups too, each once.

    Raises:
      UsageError: a name is empty or unknown, or a game cannot be played.
    """
    names = [name.strip() for name in text.split(',')]
    if not any(names):
        raise UsageError('--games: empty. Fix: name a game, atari49 or atari5.')
    if not all(names):
        raise UsageError(f'--games {text}: a name is empty. Fix: omit a comma, or name a game.')
    try:
        games = [game for name in names for game in GROUPS.get(name) or (check_name(name),)]
    except ValueError as error:
        text = str(error).rstrip('.')
        raise UsageError(f'--games: {text}, or a group: {", ".join(GROUPS)}.') from error
    return tuple(dict.fromkeys(games))


def listing(columns: int) -> str:
    """All playable games in columns, those of a group marked, on lines of at most `columns`."""
    cells = [f'{name} {_marks(name)}'.rstrip() for name in game_names()]
    width = max(map(len, cells)) + _GAP
    across = max(1, (columns + _GAP) // width)
    down = -(-len(cells) // across)
    lines = [''.join(f'{cell:<{width}}' for cell in cells[row::down]) for row in range(down)]
    legend = f'{len(cells)} games; 49: in atari49 (Nair et al. 2015), 5: in atari5 (Aitchison'
    return '\n'.join([*(line.rstrip() for line in lines), f'{legend} et al. 2023)'])


def _marks(game: str) -> str:
    marks = {'atari49': '49', 'atari5': '5'}
    return ','.join(mark for group, mark in marks.items() if game in GROUPS[group])
