"""Names of games: every one that is offered can be played, every other is refused by name."""

import subprocess
import sys
import threading

import pytest
from ale_py import roms

from agents import games
from agents.config import EnvironmentConfig
from agents.environments.atari import AtariEnvironment
from agents.games import GameError

# Of ale-py 0.12.1: games of two players, for which it has no rules.
REFUSED = {'combat', 'joust', 'maze_craze', 'warlords'}
LOAD_EACH = """
import sys
import threading
from ale_py import roms, vector_env
for name in sys.argv[1:]:
    print(name, flush=True)
    vector_env.AtariVectorEnv(name, 1, num_threads=1).close()
"""


def _loading(*names: str) -> subprocess.Popen:
    """A process that loads games as actors do, and prints each name before."""
    command = [sys.executable, '-c', LOAD_EACH, *names]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


class TestPlayable:
    @pytest.mark.slow
    def test_every_game_that_is_offered_can_be_loaded(self):
        loading = _loading(*games.game_names())
        loaded, _ = loading.communicate(timeout=170)
        assert loading.returncode == 0, f'ended by {loaded.splitlines()[-1]}'
        assert len(loaded.splitlines()) == 104

    def test_a_game_is_refused_if_and_only_if_it_ends_the_process_that_loads_it(self):
        assert set(roms.get_all_rom_ids()) - set(games.game_names()) == REFUSED
        for loading in [_loading(name) for name in REFUSED]:
            loading.communicate(timeout=60)
            assert loading.returncode != 0

    def test_a_game_that_would_end_the_process_raises_an_error_instead(self):
        with pytest.raises(GameError, match=r"game 'Warlords' cannot be played .*one player"):
            AtariEnvironment(EnvironmentConfig(game='Warlords'), 1, seed=0)

    def test_a_rom_that_is_not_there_is_named(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv('ALE_ROMS_DIR', str(tmp_path))
        with pytest.raises(GameError, match=rf"'pong' cannot be played .*{tmp_path}/pong\.bin"):
            games.rom_id('pong')
        assert games.game_names() == ()
        assert capsys.readouterr().out == ''


class TestNames:
    @pytest.mark.parametrize(
        'game',
        [
            'SpaceInvaders',
            'space_invaders',
            'space-invaders',
            'ALE/SpaceInvaders-v5',
            'SpaceInvaders-v0',
            'SpaceInvadersNoFrameskip-v4',
        ],
    )
    def test_common_spellings_and_ids_of_gymnasium_name_the_same_game(self, game):
        assert games.rom_id(game) == 'space_invaders'

    def test_every_name_is_its_own_rom(self):
        names = games.game_names()
        assert {'pong', 'breakout', 'seaquest'} <= set(names)
        assert [games.rom_id(name) for name in names] == list(names)

    def test_an_unknown_game_is_refused_with_the_nearest_names(self):
        with pytest.raises(GameError, match=r"'brakout' .did you mean breakout.*\?\). Fix: choose"):
            games.rom_id('brakout')

    @pytest.mark.parametrize('game', ['PongDeterministic-v4', 'ALE/Pong-ram-v5', 'ale/pong-v5'])
    def test_an_id_that_gymnasium_does_not_have_leads_to_its_game(self, game):
        with pytest.raises(GameError, match='did you mean pong'):
            games.rom_id(game)

    def test_a_game_like_no_other_is_refused_with_the_command_that_lists_them_all(self):
        with pytest.raises(
            GameError, match=r"^unknown game '\+{3}'\. Fix: .*--list_games` lists\.$"
        ):
            games.rom_id('+++')

    def test_another_environment_of_gymnasium_is_no_game(self):
        with pytest.raises(GameError, match="unknown game 'CartPole-v1'"):
            games.rom_id('CartPole-v1')

    def test_a_near_miss_of_a_refused_game_does_not_offer_it(self):
        with pytest.raises(GameError, match='unknown game') as error:
            games.rom_id('warlord')
        assert 'warlords' not in str(error.value)


class TestNotTakenOver:
    @pytest.mark.parametrize(
        ('game', 'values'),
        [
            # ale_py's own table (registration.py).
            ('ALE/Pong-v5', ('0.25', '4')),
            ('Pong-v0', ('0.25', '(2, 5)')),
            ('PongNoFrameskip-v4', ('0.0', '1')),
        ],
    )
    def test_an_ids_own_values_are_named_in_one_line(self, game, values):
        note = games.not_taken_over(game)
        assert note.startswith(f'{game}: plays pong ')
        assert f'sticky actions {values[0]} and frameskip {values[1]}.' in note
        assert '\n' not in note

    def test_a_name_has_nothing_to_be_told(self):
        assert games.not_taken_over('Pong') == ''


def test_threads_that_name_games_leave_the_output_alone():
    before = sys.stdout
    for _ in range(20):
        threads = [threading.Thread(target=games.game_names) for _ in range(4)]
        games._obstacle_in.cache_clear()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sys.stdout is before
