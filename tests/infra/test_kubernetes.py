"""infra/kubernetes: every overlay is valid, and what its objects say of each other is true.

No cluster is asked. What the containers would run is run here: the servers' own parsers and loaders
read the flags and files, and the last test trains with the commands of overlay `dask`.
"""

import contextlib
import fnmatch
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import kubernetes_validate  # type: ignore[import-untyped]
import portpicker
import pytest
import yaml  # type: ignore[import-untyped]

from infra import cluster, deployment, probe
from infra.parameter_server import server as parameter_server
from infra.replay import server as replay_server
from pipelines import servers
from pipelines.engines import catalog
from pipelines.experiment import command_line
from pipelines.launch import shard_watch, training
from pipelines.preflight import resources
from pipelines.workers import boxes
from tests.end_to_end import launching
from tests.support.engines import ROOT, listens, process
from tests.support.waiting import eventually

KUBERNETES = ROOT / 'infra' / 'kubernetes'
OVERLAYS = {  # and the first version of Kubernetes whose schemas have all of it
    'base': '1.28',
    'overlays/paper': '1.28',
    'overlays/tls': '1.28',
    'overlays/external-workers': '1.28',
    'overlays/dask': '1.29',
}
FLAGS = dict.fromkeys(OVERLAYS, '--preset laptop --num_parameter_shards 2')
FLAGS['overlays/paper'] = '--preset paper'
DASK = 'overlays/dask'
KINDS = deployment.KINDS
SERVERS = {'parameter': parameter_server, 'replay': replay_server}
COMPONENT = 'app.kubernetes.io/component'
MIB, GIB = 1024**2, 1024**3

pytestmark = pytest.mark.skipif(
    not shutil.which('kubectl'), reason='kubectl, which builds the overlays, is not on PATH'
)
each_overlay = pytest.mark.parametrize('overlay', OVERLAYS)
each_kind = pytest.mark.parametrize('kind', KINDS)


@functools.cache
def build(overlay):
    """The objects that `kubectl apply -k` would apply."""
    built = subprocess.run(
        ['kubectl', 'kustomize', str(KUBERNETES / overlay)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert built.returncode == 0, built.stderr
    return tuple(yaml.safe_load_all(built.stdout))


def of_kind(overlay, kind):
    """The objects of a kind, by name."""
    return {each['metadata']['name']: each for each in build(overlay) if each['kind'] == kind}


def stateful_set(overlay, kind):
    return of_kind(overlay, 'StatefulSet')[f'gorila-{kind}']


def container(overlay, kind):
    """The one container of a kind of shards."""
    (found,) = stateful_set(overlay, kind)['spec']['template']['spec']['containers']
    return found


def templates(overlay):
    """The pod templates, by the names of their controllers."""
    return {
        each['metadata']['name']: each['spec']['template']
        for each in build(overlay)
        if 'template' in each.get('spec', {})
    }


def labels(overlay):
    """The labels of pods, by the names of their controllers."""
    return {name: each['metadata']['labels'] for name, each in templates(overlay).items()}


def selects(selector, found):
    """Whether a label selector matches these labels."""
    operators = {
        'In': lambda value, values: value in values,
        'NotIn': lambda value, values: value not in values,
    }
    wanted = selector.get('matchLabels', {}).items()
    return all(found.get(name) == value for name, value in wanted) and all(
        operators[each['operator']](found.get(each['key']), each['values'])
        for each in selector.get('matchExpressions', [])
    )


def selected(overlay, selector):
    """The controllers whose pods a selector matches."""
    return {name for name, found in labels(overlay).items() if selects(selector, found)}


def files(overlay, volume):
    """What a pod sees in a volume made of a ConfigMap, by file name."""
    return of_kind(overlay, 'ConfigMap')[volume['configMap']['name']]['data']


def environment(overlay, of_container):
    """The environment variables that a container gets from ConfigMaps."""
    found: dict[str, str] = {}
    for each in of_container.get('envFrom', []):
        found |= of_kind(overlay, 'ConfigMap')[each['configMapRef']['name']]['data']
    return found


def server_options(overlay, kind, shard=0):
    """The container's command, parsed by the server."""
    found = container(overlay, kind)
    module = SERVERS[kind]
    assert found['command'] == ['python', '-m', module.__name__]
    return module.parse([each.replace('$(SHARD)', str(shard)) for each in found['args']])


def probe_options(question):
    """A probe's command, parsed by infra.probe."""
    python, dash, module, *arguments = question['exec']['command']
    assert (python, dash, module) == ('python', '-m', probe.__name__)
    return probe.parse(arguments)


def config_texts(overlay):
    """The two files of an overlay's servers, by kind, from where their --config says they are."""
    found = {}
    for kind in KINDS:
        path = pathlib.PurePath(server_options(overlay, kind).config)
        mounts = {each['mountPath']: each for each in container(overlay, kind)['volumeMounts']}
        name = mounts[str(path.parent)]['name']
        volumes = stateful_set(overlay, kind)['spec']['template']['spec']['volumes']
        (volume,) = [each for each in volumes if each['name'] == name]
        found[kind] = files(overlay, volume)[path.name]
    return found


def bytes_of(quantity):
    """A quantity of memory or storage, in bytes."""
    return int(quantity[:-2]) * {'Mi': MIB, 'Gi': GIB}[quantity[-2:]]


def seconds_until_killed(question):
    """How long a container may fail to answer a probe, in seconds."""
    return question['periodSeconds'] * question['failureThreshold']


@each_overlay
def test_every_object_is_valid_for_the_oldest_and_the_newest_kubernetes(overlay):
    for version in (OVERLAYS[overlay], kubernetes_validate.latest_version()):
        for each in build(overlay):
            assert kubernetes_validate.validate(each, version, strict=True) in version


def test_the_schemas_would_find_a_misspelt_field():
    wrong = json.loads(json.dumps(stateful_set('base', 'replay')))
    wrong['spec']['template']['spec']['terminationGracePeriod'] = 3
    with pytest.raises(kubernetes_validate.ValidationError, match='terminationGracePeriod'):
        kubernetes_validate.validate(wrong, '1.37', strict=True)


@each_overlay
@each_kind
def test_the_server_takes_every_flag_of_its_container(overlay, kind):
    for shard in (0, 30):
        found = server_options(overlay, kind, shard)
        assert found.shard == shard
        assert found.host == '0.0.0.0'  # a pod's address is not known in advance


@each_kind
def test_a_pods_number_is_its_shards(kind):
    (variable,) = container('base', kind)['env']
    assert variable['name'] == 'SHARD'
    path = variable['valueFrom']['fieldRef']['fieldPath']
    assert path == "metadata.labels['apps.kubernetes.io/pod-index']"
    assert 'ordinals' not in stateful_set('base', kind)['spec']


@each_overlay
def test_there_are_as_many_pods_as_the_servers_own_files_have_shards(overlay, tmp_path):
    texts = config_texts(overlay)
    file = tmp_path / 'parameter_server.json'
    file.write_text(texts['parameter'])
    parameter = parameter_server.load_config(str(file))
    replay = replay_server.ShardConfig.from_dict(json.loads(texts['replay']))
    replicas = {kind: stateful_set(overlay, kind)['spec']['replicas'] for kind in KINDS}
    shards = replay.replay.num_replay_shards if replay.experience else 1
    assert replicas == {'parameter': parameter.num_parameter_shards, 'replay': shards}
    assert replay.telemetry


@each_overlay
def test_the_servers_files_are_those_of_the_runs_flags(overlay, tmp_path):
    launch, preset, values = command_line.parse(FLAGS[overlay].split())
    config = command_line.experiment(preset, values)
    servers.write_configurations(config, launch, tmp_path)
    texts = config_texts(overlay)
    for kind, component in (('parameter', cluster.PARAMETER_SERVER), ('replay', cluster.REPLAY)):
        assert texts[kind] == (tmp_path / f'{component}.json').read_text()


@each_overlay
@each_kind
def test_one_port_is_meant_everywhere(overlay, kind):
    (port,) = container(overlay, kind)['ports']
    number = server_options(overlay, kind).port
    assert (port['name'], port['containerPort']) == (kind, number)
    assert number == deployment.FIRST_PORTS[kind]
    service = of_kind(overlay, 'Service')[f'gorila-{kind}']
    assert [(each['port'], each['targetPort']) for each in service['spec']['ports']] == [
        (number, kind)
    ]
    (rule,) = of_kind(overlay, 'NetworkPolicy')[f'gorila-{kind}']['spec']['ingress']
    assert rule['ports'] == [{'protocol': 'TCP', 'port': number}]
    for name in ('startupProbe', 'livenessProbe'):
        question = probe_options(container(overlay, kind)[name])
        assert (question.kind, question.addresses) == (kind, f'127.0.0.1:{number}')
    assert container(overlay, kind)['readinessProbe']['tcpSocket']['port'] == kind


@each_overlay
@each_kind
def test_each_shard_has_a_name_of_its_own_that_stays(overlay, kind):
    shards = stateful_set(overlay, kind)
    service = of_kind(overlay, 'Service')[shards['spec']['serviceName']]
    assert service['spec']['clusterIP'] == 'None'
    assert service['spec']['publishNotReadyAddresses'] is True
    assert selected(overlay, {'matchLabels': service['spec']['selector']}) == {f'gorila-{kind}'}
    assert selected(overlay, shards['spec']['selector']) == {f'gorila-{kind}'}
    assert shards['spec']['podManagementPolicy'] == 'Parallel'


@each_overlay
def test_each_kind_of_shards_may_lose_one_pod_at_a_time(overlay):
    budgets = of_kind(overlay, 'PodDisruptionBudget')
    assert {
        name: selected(overlay, budget['spec']['selector']) for name, budget in budgets.items()
    } == {f'gorila-{kind}': {f'gorila-{kind}'} for kind in KINDS}
    assert {budget['spec']['maxUnavailable'] for budget in budgets.values()} == {1}


@each_overlay
@each_kind
def test_shards_of_a_kind_spread_over_the_nodes(overlay, kind):
    (rule,) = stateful_set(overlay, kind)['spec']['template']['spec']['topologySpreadConstraints']
    assert selected(overlay, rule['labelSelector']) == {f'gorila-{kind}'}


@each_overlay
@each_kind
def test_only_workers_and_launcher_come_near_the_shards(overlay, kind):
    policy = of_kind(overlay, 'NetworkPolicy')[f'gorila-{kind}']['spec']
    assert selected(overlay, policy['podSelector']) == {f'gorila-{kind}'}
    assert policy['policyTypes'] == ['Ingress', 'Egress']
    assert 'egress' not in policy  # none: a shard opens no connection
    (rule,) = policy['ingress']
    for component, admitted in (
        ('worker', True),
        ('launcher', True),
        ('scheduler', False),
        ('results', False),
        ('parameter', False),
    ):
        pod = {'app.kubernetes.io/name': 'gorila', COMPONENT: component}
        assert _admits(rule, pod) is admitted
        assert not _admits(rule, {COMPONENT: component})  # of another application


def _admits(rule, pod):
    return any(selects(each['podSelector'], pod) for each in rule['from'] if 'podSelector' in each)


def _ranges(overlay, kind):
    (rule,) = of_kind(overlay, 'NetworkPolicy')[f'gorila-{kind}']['spec']['ingress']
    return [each['ipBlock']['cidr'] for each in rule['from'] if 'ipBlock' in each]


@each_kind
def test_an_address_range_is_admitted_for_workers_outside_alone(kind):
    outside = 'overlays/external-workers'
    (admitted,) = _ranges(outside, kind)
    assert admitted.count('/') == 1
    assert admitted != '0.0.0.0/0'
    for overlay in set(OVERLAYS) - {outside}:
        assert _ranges(overlay, kind) == []


def test_workers_outside_reach_each_shard_at_an_internal_address_of_its_own():
    overlay = 'overlays/external-workers'
    objects = [dict(each) for each in build(overlay)]
    for each in objects:
        if each['spec'].get('type') == 'LoadBalancer' if 'spec' in each else False:
            each['status'] = {'loadBalancer': {'ingress': [{'ip': each['metadata']['name']}]}}
            assert each['spec']['externalTrafficPolicy'] == 'Local'  # keeps the client's address
            kind = each['metadata']['labels'][COMPONENT]
            assert each['spec']['loadBalancerSourceRanges'] == _ranges(overlay, kind)
            assert (
                each['metadata']['annotations']['networking.gke.io/load-balancer-type']
                == 'Internal'
            )
    for kind in KINDS:
        shards = deployment.outside_kubernetes(objects, kind)
        port = deployment.FIRST_PORTS[kind]
        replicas = stateful_set(overlay, kind)['spec']['replicas']
        assert [shard.address for shard in shards] == [
            f'gorila-{kind}-{number}:{port}' for number in range(replicas)
        ]


@each_overlay
@each_kind
def test_a_question_to_a_shard_ends_before_its_probe_does(overlay, kind):
    for name in ('startupProbe', 'livenessProbe'):
        question = container(overlay, kind)[name]
        assert probe_options(question).timeout_seconds < question['timeoutSeconds']


@each_overlay
def test_a_replay_shard_that_writes_its_state_is_not_killed_for_it(overlay):
    patience = seconds_until_killed(container(overlay, 'replay')['livenessProbe'])
    assert patience > replay_server.SAVE_SECONDS


@each_overlay
def test_a_parameter_shard_that_hangs_is_back_before_workers_and_run_give_up(overlay):
    liveness = container(overlay, 'parameter')['livenessProbe']
    hangs = seconds_until_killed(liveness) + probe_options(liveness).timeout_seconds
    away = hangs + liveness['terminationGracePeriodSeconds'] + 15  # to start
    assert away < min(boxes.SERVER_SECONDS, shard_watch.AWAY_SECONDS)


@each_overlay
def test_a_replay_shard_that_hangs_is_back_before_the_run_gives_up(overlay):
    liveness = container(overlay, 'replay')['livenessProbe']
    hangs = seconds_until_killed(liveness) + probe_options(liveness).timeout_seconds
    away = hangs + liveness['terminationGracePeriodSeconds'] + 15  # to start
    assert away < shard_watch.REPLAY_AWAY_SECONDS


@each_overlay
@each_kind
def test_a_shards_state_has_a_claim_that_a_runs_end_deletes(overlay, kind):
    spec = stateful_set(overlay, kind)['spec']
    (claim,) = spec['volumeClaimTemplates']
    mounts = {each['mountPath']: each['name'] for each in container(overlay, kind)['volumeMounts']}
    assert mounts[server_options(overlay, kind).state_dir] == claim['metadata']['name']
    assert spec['persistentVolumeClaimRetentionPolicy'] == {
        'whenDeleted': 'Delete',
        'whenScaled': 'Retain',
    }


@each_overlay
@each_kind
def test_memory_and_disk_hold_what_the_sizing_says(overlay, kind):
    _, preset, values = command_line.parse(FLAGS[overlay].split())
    config = command_line.experiment(preset, values)
    other = 'replay' if kind == 'parameter' else 'parameter'
    alone = command_line.parse([f'--{other}_addresses=elsewhere:1'])[0]
    spec = stateful_set(overlay, kind)['spec']
    needed = resources.servers_bytes(config, alone) / spec['replicas']
    found = container(overlay, kind)['resources']
    assert found['requests']['memory'] == found['limits']['memory']
    assert needed < bytes_of(found['limits']['memory']) < 2 * needed
    holds_replay = kind == 'replay' and config.run.topology != 'bundled'
    state = resources.replay_bytes(config) / spec['replicas'] if holds_replay else 0
    (claim,) = spec['volumeClaimTemplates']
    assert bytes_of(claim['spec']['resources']['requests']['storage']) > 3 * state
    # At 10 MB/s, a slow disk's.
    assert spec['template']['spec']['terminationGracePeriodSeconds'] > max(30, state / 10e6)


@each_overlay
def test_no_pod_has_more_rights_than_it_needs(overlay):
    accounts = of_kind(overlay, 'ServiceAccount')
    for template in templates(overlay).values():
        pod = template['spec']
        assert accounts[pod['serviceAccountName']]['automountServiceAccountToken'] is False
        assert pod['automountServiceAccountToken'] is False
        security = pod['securityContext']
        assert security['runAsNonRoot'] is True
        assert security['runAsUser'] == security['fsGroup'] == 10001
        assert security['seccompProfile'] == {'type': 'RuntimeDefault'}
        for each in pod['containers'] + pod.get('initContainers', []):
            assert each['securityContext'] == {
                'allowPrivilegeEscalation': False,
                'readOnlyRootFilesystem': True,
                'capabilities': {'drop': ['ALL']},
            }


@each_overlay
def test_every_container_may_write_where_its_home_is(overlay):
    for template in templates(overlay).values():
        empty = {each['name'] for each in template['spec']['volumes'] if 'emptyDir' in each}
        for each in template['spec']['containers'] + template['spec'].get('initContainers', []):
            mounts = {mount['mountPath']: mount['name'] for mount in each['volumeMounts']}
            assert mounts['/tmp'] in empty
            assert environment(overlay, each)['HOME'] == '/tmp'


@each_overlay
def test_shards_have_the_environment_of_a_runs_own(overlay):
    for kind in KINDS:
        found = environment(overlay, container(overlay, kind))
        assert {name: found[name] for name in cluster.ENVIRONMENT} == cluster.ENVIRONMENT


def test_the_images_are_those_that_the_dockerfile_makes():
    file = ROOT / 'infra' / 'docker' / 'Dockerfile'
    text = file.read_text()
    titles = set(re.findall(r'image\.title="([\w-]+)"', text))
    images = set()
    for overlay in OVERLAYS:
        for template in templates(overlay).values():
            for each in template['spec']['containers'] + template['spec'].get('initContainers', []):
                images.add(each['image'].partition(':')[0])
    assert images == {'gorila-servers', 'gorila-worker'}
    assert images <= titles
    assert 'USER 10001' in text


def test_tls_is_the_parameter_shards_alone():
    overlay = 'overlays/tls'
    found = server_options(overlay, 'parameter')
    mounts = {each['mountPath']: each for each in container(overlay, 'parameter')['volumeMounts']}
    for path, key in ((found.tls_certificate, 'tls.crt'), (found.tls_key, 'tls.key')):
        directory, name = os.path.split(path)
        assert name == key  # of a Secret of type kubernetes.io/tls
        assert mounts[directory]['readOnly'] is True
    volumes = stateful_set(overlay, 'parameter')['spec']['template']['spec']['volumes']
    (secret,) = [each['secret'] for each in volumes if each['name'] == mounts[directory]['name']]
    assert secret['secretName'] == _certificate()['spec']['secretName']
    for kind in KINDS:
        for name in ('startupProbe', 'livenessProbe'):
            assert probe_options(container(overlay, kind)[name]).tls is (kind == 'parameter')
    assert 'tls' not in ' '.join(container(overlay, 'replay')['args'])


def _certificate():
    return yaml.safe_load((KUBERNETES / 'components' / 'tls' / 'certificate.yaml').read_text())


def test_the_certificate_names_every_shard_as_a_run_does():
    shards = deployment.in_kubernetes(build('overlays/tls'), 'parameter', namespace='gorila')
    for shard in shards:
        assert any(
            fnmatch.fnmatch(shard.host, name) and shard.host.count('.') == name.count('.')
            for name in _certificate()['spec']['dnsNames']
        )


def dask_environment():
    """The environment variables of the launcher's containers."""
    (found,) = templates(DASK)['gorila-launcher']['spec']['containers']
    return environment(DASK, found)


def words(directory, script, **variables):
    """The arguments that a script of the launcher passes to Python, which here prints them."""
    python = directory / 'python'
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    runs = directory / 'runs'
    (directory / 'script.sh').write_text(script.replace('/runs/', f'{runs}/'))
    printed = subprocess.run(
        ['sh', str(directory / 'script.sh')],
        env={'PATH': f'{directory}{os.pathsep}{os.environ["PATH"]}', **variables},
        check=True,
        capture_output=True,
        text=True,
    )
    return printed.stdout.splitlines()


def launcher_script(name):
    volumes = templates(DASK)['gorila-launcher']['spec']['volumes']
    (volume,) = [each for each in volumes if each['name'] == 'scripts']
    return files(DASK, volume)[name]


def launcher_flags(directory, **variables):
    """The flags of the launcher's run, as its script gives them."""
    given = {**dask_environment(), 'JOB_UID': 'uid', **variables}
    dash, module, *flags = words(directory, launcher_script('launch.sh'), **given)
    assert (dash, module) == ('-m', 'pipelines.run')
    return flags


def test_the_launchers_flags_lead_to_every_shard_in_its_order(tmp_path):
    launch, preset, values = command_line.parse(launcher_flags(tmp_path))
    assert launch.engine is catalog.ENGINES['DaskRunner']
    for kind in KINDS:
        # Names without the namespace.
        expected = [
            f'{".".join(shard.host.split(".")[:2])}:{shard.port}'
            for shard in deployment.in_kubernetes(build(DASK), kind, namespace='any')
        ]
        assert list(getattr(launch, f'{kind}_addresses')) == expected
    assert dask_environment()['FLAGS'] == FLAGS[DASK]
    command_line.experiment(preset, values)


def test_there_is_a_pod_for_each_worker_of_the_run(tmp_path):
    _, preset, values = command_line.parse(launcher_flags(tmp_path))
    needed = sum(command_line.experiment(preset, values).run.workers.values())
    assert of_kind(DASK, 'Deployment')['gorila-worker']['spec']['replicas'] == needed
    assert dask_environment()['WORKERS'] == str(needed)
    (worker,) = templates(DASK)['gorila-worker']['spec']['containers']
    assert {'--nworkers=1', '--nthreads=1', '--memory-limit=0'} <= set(worker['args'])


def test_launcher_and_workers_call_the_scheduler_by_its_service(tmp_path):
    service = of_kind(DASK, 'Service')['gorila-scheduler']['spec']
    assert selected(DASK, {'matchLabels': service['selector']}) == {'gorila-scheduler'}
    (port,) = service['ports']
    (scheduler,) = templates(DASK)['gorila-scheduler']['spec']['containers']
    (own,) = scheduler['ports']
    assert port['targetPort'] == own['name']
    assert port['port'] == own['containerPort']
    assert f'--port={own["containerPort"]}' in scheduler['args']
    address = f'tcp://gorila-scheduler:{port["port"]}'
    assert dask_environment()['SCHEDULER'] == address
    (worker,) = templates(DASK)['gorila-worker']['spec']['containers']
    assert worker['command'][-1] == address
    assert f'--dask_client_address={address}' in launcher_flags(tmp_path)


def test_a_run_directory_is_on_the_claim_that_shows_the_results(tmp_path):
    (flag,) = [each for each in launcher_flags(tmp_path) if each.startswith('--run_dir')]
    assert flag == f'--run_dir={tmp_path}/runs/uid'
    (flag,) = [each for each in launcher_flags(tmp_path, RUN='mine') if '--run_dir' in each]
    assert flag == f'--run_dir={tmp_path}/runs/mine'
    pod = templates(DASK)['gorila-launcher']['spec']
    mounts = {each['mountPath']: each['name'] for each in pod['containers'][0]['volumeMounts']}
    (volume,) = [each for each in pod['volumes'] if each['name'] == mounts['/runs']]
    results = of_kind(DASK, 'StatefulSet')['gorila-results']['spec']
    (claim,) = results['volumeClaimTemplates']
    # The name that a StatefulSet gives to the claim of a pod.
    assert (
        volume['persistentVolumeClaim']['claimName']
        == f'{claim["metadata"]["name"]}-gorila-results-0'
    )
    assert results['persistentVolumeClaimRetentionPolicy']['whenDeleted'] == 'Retain'
    (rule,) = pod['affinity']['podAffinity']['requiredDuringSchedulingIgnoredDuringExecution']
    assert selected(DASK, rule['labelSelector']) == {'gorila-results'}


def test_a_pod_in_the_place_of_another_goes_on_with_its_run(tmp_path):
    assert '--resume' not in launcher_flags(tmp_path)
    run = tmp_path / 'runs' / 'uid'
    run.mkdir(parents=True)
    (run / 'config.json').write_text('{}')
    flags = launcher_flags(tmp_path)
    assert flags[-1] == '--resume'
    assert command_line.parse(flags)[0].resume
    job = of_kind(DASK, 'Job')['gorila-launcher']['spec']
    assert job['backoffLimit'] > 0
    refused, moved = job['podFailurePolicy']['rules']
    assert (refused['action'], refused['onExitCodes']['values']) == ('FailJob', [2])
    assert moved['action'] == 'Ignore'


def test_a_launcher_has_time_for_its_last_checkpoint():
    pod = templates(DASK)['gorila-launcher']['spec']
    assert pod['terminationGracePeriodSeconds'] >= training.DRAIN_SECONDS + 120


def test_every_box_of_a_dask_run_admits_those_who_call_it_and_no_others():
    callers = {
        'gorila-scheduler': {'gorila-worker', 'gorila-launcher'},
        'gorila-worker': {'gorila-worker', 'gorila-scheduler'},
        'gorila-parameter': {'gorila-worker', 'gorila-launcher'},
        'gorila-replay': {'gorila-worker', 'gorila-launcher'},
        'gorila-launcher': set(),
        'gorila-results': set(),
    }
    assert set(labels(DASK)) == set(callers)
    for policy in of_kind(DASK, 'NetworkPolicy').values():
        for called in selected(DASK, policy['spec']['podSelector']):
            admitted = {
                caller
                for rule in policy['spec'].get('ingress', [])
                for caller, found in labels(DASK).items()
                if _admits(rule, found)
            }
            assert admitted == callers.pop(called)
            ports = {
                each['port'] for rule in policy['spec'].get('ingress', []) for each in rule['ports']
            }
            own = templates(DASK)[called]['spec']['containers'][0].get('ports', [])
            assert ports == {each['containerPort'] for each in own}
    assert not callers


class LocalPods:
    """The pods of overlay `dask` as processes of this machine, with local addresses."""

    def __init__(self, directory, flags):
        """Writes the configuration of a run with these flags."""
        self.directory = directory
        launch, preset, values = command_line.parse([*FLAGS[DASK].split(), *flags])
        servers.write_configurations(command_line.experiment(preset, values), launch, directory)
        self.flags = ' '.join([FLAGS[DASK], *flags])
        self.addresses = {}
        for kind in KINDS:
            for shard in deployment.in_kubernetes(build(DASK), kind, namespace='any'):
                short = '.'.join(shard.host.split('.')[:2])
                self.addresses[f'{short}:{shard.port}'] = self._free()
        self.addresses['gorila-scheduler:8786'] = self._free()

    def start(self, stack):
        """Starts every pod but the launcher."""
        for kind in KINDS:
            found = [address for address in self.addresses if f'.gorila-{kind}:' in address]
            for shard, address in enumerate(found):
                self._start(stack, f'{kind}-{shard}', self._shard(kind, shard, address))
        scheduler = self._command('gorila-scheduler')
        port = self.addresses['gorila-scheduler:8786'].rpartition(':')[2]
        scheduler[-2] = scheduler[-2].replace('8786', port)
        self._start(stack, 'scheduler', [*scheduler, '--host=127.0.0.1'])
        assert eventually(lambda: listens(int(port)), 60.0), self.logs()
        for number in range(of_kind(DASK, 'Deployment')['gorila-worker']['spec']['replicas']):
            worker = self._command('gorila-worker')
            own = [f'--{name}-port={portpicker.pick_unused_port()}' for name in ('worker', 'nanny')]
            worker = [each for each in worker if '-port=' not in each]
            self._start(stack, f'worker-{number}', [*worker, *own, '--host=127.0.0.1'])

    def environment(self):
        """The launcher's environment, with local addresses."""
        given = {**dask_environment(), 'JOB_UID': 'uid', 'FLAGS': self.flags}
        inherited = {
            **os.environ,
            'PATH': f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}',
        }
        return {**inherited, **{name: self._here(value) for name, value in given.items()}}

    def script(self, name):
        """A script of the launcher, with its files below `directory`."""
        file = self.directory / name
        file.write_text(launcher_script(name).replace('/runs/', f'{self.directory}/'))
        return file

    def logs(self):
        """The end of each pod's log."""
        return '\n'.join(
            f'== {log.name}\n{log.read_text(errors="replace")[-2000:]}'
            for log in sorted(self.directory.glob('*.log'))
        )

    def _free(self):
        return f'127.0.0.1:{portpicker.pick_unused_port()}'

    def _here(self, text):
        for name, address in self.addresses.items():
            text = text.replace(name, address)
        return text

    def _command(self, name):
        (found,) = templates(DASK)[name]['spec']['containers']
        return [self._here(each) for each in [*found['command'], *found['args']]]

    def _shard(self, kind, shard, address):
        here = {
            '--config': self.directory / pathlib.PurePath(server_options(DASK, kind).config).name,
            '--port': self.addresses[address].rpartition(':')[2],
            '--host': '127.0.0.1',
            '--state_dir': self.directory / f'state-{kind}-{shard}',
            '--shard': shard,
        }
        command = []
        for each in self._command(f'gorila-{kind}'):
            name, equals, _ = each.partition('=')
            command.append(f'{name}={here.pop(name)}' if equals else each)
        assert not here
        return command

    def _start(self, stack, name, command):
        assert command[0] == 'python'
        stack.enter_context(
            process([sys.executable, *command[1:]], self.directory / f'{name}.log', ROOT)
        )


@pytest.mark.end_to_end
@pytest.mark.timeout(900)
def test_the_dask_overlays_commands_train_and_a_second_launcher_goes_on(tmp_path):
    # The first launcher is stopped after its first updates, some 4,000 frames.
    flags = (*launching.SMALL, '--max_frames=12000')
    pods, run = LocalPods(tmp_path, flags), tmp_path / 'uid'
    with contextlib.ExitStack() as stack:
        pods.start(stack)
        waiting = subprocess.run(
            ['sh', str(pods.script('wait.sh'))],
            env=pods.environment(),
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert waiting.returncode == 0, waiting.stderr + pods.logs()
        first = _launch(stack, pods, 'first')
        assert eventually(lambda: first.poll() is not None or _trains(pods, 'first'), 150.0)
        first.send_signal(signal.SIGTERM)
        assert first.wait(180) == 128 + signal.SIGTERM, pods.logs()
        before = launching.summary(run)
        assert 0 < before['frames'] < 12_000
        second = _launch(stack, pods, 'second')
        assert second.wait(400) == 0, pods.logs()
        after = launching.check_run_directory(run, 12_000)
        assert after['updates'] > before['updates'] > 0


def _launch(stack, pods, name):
    log = pods.directory / f'{name}.log'
    script = pods.script('launch.sh')
    environment_ = pods.environment()
    argv = ['env', *(f'{key}={value}' for key, value in environment_.items()), 'sh', str(script)]
    return stack.enter_context(process(argv, log, ROOT))


def _trains(pods, name):
    return '] training' in (pods.directory / f'{name}.log').read_text(errors='replace')
