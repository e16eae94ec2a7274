"""The flags that lead a run to servers of Kubernetes and systemd, from what those say of them."""

import copy
import json
import shutil
import subprocess
import sys

import pytest

from infra import deployment
from infra.deployment import DeploymentError
from pipelines.experiment import command_line
from tests.support.engines import ROOT

KUBERNETES = ROOT / 'infra' / 'kubernetes'
with_kubectl = pytest.mark.skipif(not shutil.which('kubectl'), reason='kubectl is not on PATH')


def run(*arguments, text=''):
    """Exit code, standard output and standard error of the command."""
    ended = subprocess.run(
        [sys.executable, '-m', 'infra.deployment', *arguments],
        input=text,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    return ended.returncode, ended.stdout, ended.stderr


def stateful_set(kind, replicas, port, namespace='gorila'):
    """As `kubectl get statefulsets -o json` shows one, without what is not looked at."""
    return {
        'apiVersion': 'apps/v1',
        'kind': 'StatefulSet',
        'metadata': {
            'name': f'gorila-{kind}',
            'namespace': namespace,
            'labels': {
                'app.kubernetes.io/name': 'gorila',
                'app.kubernetes.io/component': kind,
            },
        },
        'spec': {
            'serviceName': f'gorila-{kind}',
            'replicas': replicas,
            'template': {
                'spec': {
                    'containers': [{'name': kind, 'ports': [{'name': kind, 'containerPort': port}]}]
                }
            },
        },
        'status': {'replicas': replicas, 'readyReplicas': 0},
    }


def balancer(pod, port, address):
    """A Service with the address that its load balancer has; None: none yet."""
    ingress = [{'ip': address}] if address else None
    return {
        'kind': 'Service',
        'metadata': {'name': pod, 'namespace': 'gorila'},
        'spec': {
            'type': 'LoadBalancer',
            'selector': {'statefulset.kubernetes.io/pod-name': pod},
            'ports': [{'port': port}],
        },
        'status': {'loadBalancer': {'ingress': ingress} if ingress else {}},
    }


OBJECTS = [stateful_set('parameter', 2, 7101), stateful_set('replay', 1, 7001)]


def changed(kind, **spec):
    """The objects, one with other values in its spec; a value of None: without the field."""
    objects = copy.deepcopy(OBJECTS)
    for each in objects:
        if each['metadata']['name'] == f'gorila-{kind}':
            each['spec'].update(spec)
            each['spec'] = {
                name: value for name, value in each['spec'].items() if value is not None
            }
    return objects


def test_pods_are_named_in_the_order_of_their_shards():
    code, output, errors = run('kubernetes', text=json.dumps({'kind': 'List', 'items': OBJECTS}))
    suffix = 'svc.cluster.local'
    assert (code, errors) == (0, '')
    assert output == (
        f'--parameter_addresses=gorila-parameter-0.gorila-parameter.gorila.{suffix}:7101,'
        f'gorila-parameter-1.gorila-parameter.gorila.{suffix}:7101'
        f' --replay_addresses=gorila-replay-0.gorila-replay.gorila.{suffix}:7001\n'
    )


def test_more_than_ten_shards_stay_in_their_numbers_order():
    shards = deployment.in_kubernetes([stateful_set('parameter', 31, 7101)], 'parameter')
    text = deployment.flags(reversed(shards)).split()[0]
    numbers = [int(part.split('.')[0].rpartition('-')[2]) for part in text.split(',')]
    assert numbers == list(range(31))


def test_the_flags_are_a_runs_own():
    shards = [
        shard for kind in deployment.KINDS for shard in deployment.in_kubernetes(OBJECTS, kind)
    ]
    launch, _, values = command_line.parse(deployment.flags(shards).split())
    assert launch.parameter_addresses == tuple(shard.address for shard in shards[:2])
    assert launch.replay_addresses == (shards[2].address,)
    assert values == {'num_parameter_shards': 2, 'num_replay_shards': 1}


@with_kubectl
@pytest.mark.parametrize(('overlay', 'shards'), [('base', 2), ('overlays/paper', 31)])
def test_what_kubectl_makes_of_our_files_is_read(tmp_path, overlay, shards):
    built = subprocess.run(
        ['kubectl', 'kustomize', str(KUBERNETES / overlay)],
        check=True,
        capture_output=True,
        text=True,
    )
    file = tmp_path / 'objects.yaml'
    file.write_text(built.stdout)
    code, output, errors = run('kubernetes', str(file), '--namespace=pong')
    assert code == 0, errors
    parameter, replay = output.split()
    assert parameter.count('.gorila-parameter.pong.svc.cluster.local:7101') == shards
    assert replay.endswith('=gorila-replay-0.gorila-replay.pong.svc.cluster.local:7001')


def test_load_balancers_lead_to_the_shards_from_outside():
    objects = [
        *OBJECTS,
        balancer('gorila-parameter-1', 7101, '10.0.0.12'),
        balancer('gorila-parameter-0', 7101, '10.0.0.11'),
        balancer('gorila-replay-0', 7001, '10.0.0.10'),
    ]
    code, output, errors = run('kubernetes', '--external', text=json.dumps({'items': objects}))
    assert code == 0, errors
    assert output == (
        '--parameter_addresses=10.0.0.11:7101,10.0.0.12:7101 --replay_addresses=10.0.0.10:7001\n'
    )


@pytest.mark.parametrize(
    ('balancers', 'says'),
    [
        ([], 'pod gorila-replay-0 has no Service of type LoadBalancer'),
        ([balancer('gorila-replay-0', 7001, None)], 'Service gorila-replay-0 has no address yet'),
    ],
)
def test_a_shard_that_cannot_be_reached_from_outside_is_named(balancers, says):
    with pytest.raises(DeploymentError, match=says):
        deployment.outside_kubernetes([*OBJECTS, *balancers], 'replay')


@pytest.mark.parametrize(
    ('objects', 'says'),
    [
        ([], 'no StatefulSet has the labels .*=replay, among 0 objects; apply infra/kubernetes'),
        ([OBJECTS[0]], 'no StatefulSet has the labels .*=replay, among 1 objects'),
        (changed('replay', serviceName=None), 'gorila-replay has no serviceName'),
        (changed('replay', replicas=0), 'gorila-replay has 0 replicas'),
        (changed('replay', ordinals={'start': 1}), 'counts its pods from 1'),
        (
            changed('replay', template={'spec': {'containers': [{'name': 'replay'}]}}),
            'has no container port named replay',
        ),
        (
            [*OBJECTS, stateful_set('replay', 1, 7001, namespace='other')],
            '2 StatefulSets hold replay shards: gorila/gorila-replay, other/gorila-replay',
        ),
        ([stateful_set('replay', 1, 7001, namespace=None)], 'give it with --namespace'),
    ],
)
def test_objects_that_hold_no_shards_are_refused(objects, says):
    with pytest.raises(DeploymentError, match=says):
        deployment.in_kubernetes(objects, 'replay')


def test_one_of_two_namespaces_can_be_chosen():
    objects = [*OBJECTS, stateful_set('replay', 3, 7001, namespace='other')]
    shards = deployment.in_kubernetes(objects, 'replay', namespace='other')
    assert [shard.host.split('.')[2] for shard in shards] == ['other'] * 3


@pytest.mark.parametrize(
    ('text', 'says'),
    [
        ('', 'no StatefulSet has the labels'),
        ('NAME READY\ngorila-replay 1/1\n', 'is no object of Kubernetes'),
        ('{"items": [', 'neither JSON nor YAML'),
        ('[' * 1_000, 'neither JSON nor YAML'),
        ('a: b: c', 'neither JSON nor YAML'),
    ],
)
def test_text_that_is_no_object_of_kubernetes_is_one_line_and_code_2(text, says):
    code, output, errors = run('kubernetes', text=text)
    assert (code, output) == (2, '')
    assert says in errors
    assert errors.count('\n') == 1


def test_a_file_that_is_not_there_is_named(tmp_path):
    code, _, errors = run('kubernetes', str(tmp_path / 'missing.json'))
    assert code == 2
    assert 'missing.json' in errors


def test_shards_go_round_the_hosts_and_ports_follow_their_numbers():
    hosts = ('--parameter_hosts=a,b', '--replay_hosts=a')
    code, output, errors = run('hosts', *hosts, '--parameter_shards=4', '--replay_shards=1')
    assert (code, errors) == (0, '')
    assert output == (
        '--parameter_addresses=a:7101,b:7102,a:7103,b:7104 --replay_addresses=a:7001\n'
    )
    code, output, _ = run('hosts', *hosts, '--parameter_shards=4', '--units')
    assert code == 0
    assert output == (
        'a: gorila-parameter@0 gorila-parameter@2 gorila-replay@0\n'
        'b: gorila-parameter@1 gorila-parameter@3\n'
    )


def test_an_ipv6_host_gets_its_brackets():
    (shard,) = deployment.on_hosts('replay', ['fd00::1'], 1, 7001)
    assert shard.address == '[fd00::1]:7001'


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (('--parameter_hosts=', '--replay_hosts=a'), '--parameter_hosts is empty'),
        (('--parameter_hosts=a', '--replay_hosts=a', '--replay_shards=0'), '--replay_shards 0'),
        (('--parameter_hosts=a b', '--replay_hosts=a'), "'a b' is no name or address"),
        (('--parameter_hosts=a', '--replay_hosts=a:7001'), 'without port and scheme'),
        (('--parameter_hosts=http://a', '--replay_hosts=a'), 'without port and scheme'),
        (
            ('--parameter_hosts=a', '--replay_hosts=a', '--parameter_port=65535')
            + ('--parameter_shards=2',),
            'ports up to 65536',
        ),
        (
            ('--parameter_hosts=a', '--replay_hosts=a', '--replay_port=7102')
            + ('--parameter_shards=2',),
            'a:7102: is the place of gorila-parameter@1 and of gorila-replay@0',
        ),
    ],
)
def test_places_that_cannot_be_are_one_line_and_code_2(arguments, says):
    code, output, errors = run('hosts', *arguments)
    assert (code, output) == (2, '')
    assert says in errors
    assert errors.count('\n') == 1


@pytest.mark.parametrize(
    'text', ['{"items": 3}', '{"kind": "StatefulSet", "metadata": {"labels": 1}}']
)
def test_objects_that_are_none_of_kubernetes_are_one_line_and_exit_code_2(text, tmp_path):
    file = tmp_path / 'objects.json'
    file.write_text(text)
    code, output, errors = run('kubernetes', str(file))
    assert (code, output) == (2, '')
    assert len(errors.strip().splitlines()) == 1
