"""Provenance: the values describe this checkout, machine and environment."""

import json
import pathlib
import subprocess

import numpy as np

from infra.cores import usable_cores
from pipelines.storage import provenance

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_description_holds_command_machine_and_packages():
    described = provenance.describe(['run.py', '--run_dir', 'my run'])
    assert described['command'] == "run.py --run_dir 'my run'"
    assert described['cores'] == usable_cores()
    assert described['packages']['numpy'] == np.__version__
    assert described['packages']['tensorflow'] == '2.15.1'  # requirements.txt
    json.dumps(described, allow_nan=False)


def test_the_revision_is_that_of_the_checkout():
    described = provenance.describe(['run.py'])['git']
    head = subprocess.run(
        ['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert described['commit'] == head.stdout.strip()


def test_outside_git_there_is_no_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, '_ROOT', tmp_path)
    assert provenance.describe(['run.py'])['git'] is None


def test_launches_are_read_in_order_and_damaged_lines_skipped(tmp_path):
    file = tmp_path / 'launches.jsonl'
    assert provenance.launches(file) == []
    provenance.add_launch(file, {'frames': 0})
    with file.open('a') as opened:
        opened.write('[1]\n{"fra\n')
    provenance.add_launch(file, {'frames': 400})
    assert provenance.launches(file) == [{'frames': 0}, {'frames': 400}]
