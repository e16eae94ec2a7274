"""Servers under Kubernetes or systemd: their objects or hosts in, flags with their addresses out.

    kubectl get statefulsets -o json | python -m infra.deployment kubernetes
    python -m infra.deployment hosts --parameter_hosts a,b --replay_hosts a --parameter_shards 4

print `--parameter_addresses=... --replay_addresses=...` in the order of the shards. The directories
infra/kubernetes and infra/systemd define the objects and ports.
"""

import argparse
import dataclasses
import pathlib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from infra.addresses import is_port, split_address
from infra.flags import Parser, integer, nonempty
from infra.sealed import parse_object

KINDS = ('parameter', 'replay')
"""Kinds of shards, also values of the objects' label `app.kubernetes.io/component`."""

FIRST_PORTS = {'parameter': 7101, 'replay': 7001}
"""Port of shard 0 of each kind under systemd; shard I listens on the I-th port after it."""

# A name or an IPv4 address, or an IPv6 address, which has at least two colons.
_HOST = re.compile(r'[\w.-]+|[\da-fA-F.]*:[\da-fA-F.]*:[\da-fA-F:.]*')
_NAME_LABEL = 'app.kubernetes.io/name'
_COMPONENT_LABEL = 'app.kubernetes.io/component'
_POD_LABEL = 'statefulset.kubernetes.io/pod-name'


class DeploymentError(ValueError):
    """The servers are not found; the message names the value and the remedy on one line."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard and its place.

    Attributes:
      kind: one of `KINDS`.
      number: from 0.
      host: name or address, without brackets.
      port: that it listens on.
    """

    kind: str
    number: int
    host: str
    port: int

    @property
    def address(self) -> str:
        """`host:port`, an IPv6 host in brackets."""
        host = f'[{self.host}]' if ':' in self.host else self.host
        return f'{host}:{self.port}'

    @property
    def unit(self) -> str:
        """Name of its systemd unit."""
        return f'gorila-{self.kind}@{self.number}'


def flags(shards: Iterable[Shard]) -> str:
    """The flags that make a run use the shards."""
    shards = sorted(shards, key=lambda shard: shard.number)
    return ' '.join(
        f'--{kind}_addresses=' + ','.join(shard.address for shard in shards if shard.kind == kind)
        for kind in KINDS
    )


def units(shards: Iterable[Shard]) -> str:
    """One line per host: its name and the units that it runs."""
    hosts: dict[str, list[str]] = {}
    for shard in shards:
        hosts.setdefault(shard.host, []).append(shard.unit)
    return '\n'.join(f'{host}: {" ".join(names)}' for host, names in hosts.items())


def on_hosts(kind: str, hosts: Sequence[str], count: int, first_port: int) -> list[Shard]:
    """Places shards of a kind on hosts in turn, each on port `first_port` plus its number.

    Raises:
      DeploymentError: there is no host or no shard, or a host or port is invalid.
    """
    if not hosts:
        raise DeploymentError(f'--{kind}_hosts is empty; name the hosts of the {kind} shards')
    if count < 1:
        raise DeploymentError(f'--{kind}_shards {count}: a run has one at least')
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise DeploymentError(
                f'--{kind}_hosts: {host!r} is no name or address of a host; give it without port'
                f' and scheme (--{kind}_port is the first one)'
            )
    last_port = first_port + count - 1
    if not (is_port(str(first_port)) and is_port(str(last_port))):
        raise DeploymentError(
            f'--{kind}_port {first_port}: {count} shards take the ports up to {last_port};'
            ' they must be between 1 and 65535'
        )
    return [
        Shard(kind, number, hosts[number % len(hosts)], first_port + number)
        for number in range(count)
    ]


def require_distinct(shards: Iterable[Shard]) -> None:
    """Checks that no two shards share a port of a host.

    Raises:
      DeploymentError: two shards share one.
    """
    taken: dict[tuple[str, int], Shard] = {}
    for shard in shards:
        other = taken.setdefault((shard.host, shard.port), shard)
        if other is not shard:
            raise DeploymentError(
                f'{shard.address}: is the place of {other.unit} and of {shard.unit}; choose another'
                f' --{shard.kind}_port'
            )


def read_objects(text: str) -> list[Mapping[str, Any]]:
    """Parses Kubernetes objects from JSON or YAML; a list contributes its items.

    Raises:
      DeploymentError: the text is neither, or holds other values than objects.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        documents = [parse_object(text)] if text.lstrip().startswith('{') else None
        documents = documents or list(yaml.safe_load_all(text))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = ' '.join(str(error).split())
        raise DeploymentError(f'neither JSON nor YAML of Kubernetes: {reason}') from error
    objects: list[Mapping[str, Any]] = []
    for document in documents:
        if not isinstance(document, Mapping | None):
            raise DeploymentError(
                f'{str(document)[:40]!r} is no object of Kubernetes; give the output of `kubectl'
                ' get statefulsets -o json`, or of `kubectl kustomize`'
            )
        found = (document or {}).get('items', [document] if document else [])
        objects += [each for each in found if isinstance(each, Mapping)]
    return objects


def in_kubernetes(
    objects: Sequence[Mapping[str, Any]],
    kind: str,
    namespace: str | None = None,
    domain: str = 'cluster.local',
) -> list[Shard]:
    """Shards of a kind, with the stable names of their pods inside the cluster.

    Args:
      objects: StatefulSets; other objects are ignored.
      kind: of the shards.
      namespace: to search; None to take it from the objects.
      domain: of the cluster's names.

    Raises:
      DeploymentError: there is not exactly one StatefulSet of the kind, or it lacks a field.
    """
    shards = _stateful_set(objects, kind, namespace)
    where = shards['metadata'].get('namespace') or namespace
    name = shards['metadata']['name']
    if not where:
        raise DeploymentError(f'StatefulSet {name} has no namespace; give it with --namespace')
    service = shards['spec'].get('serviceName')
    if not service:
        raise DeploymentError(
            f'StatefulSet {name} has no serviceName, so its pods have no stable names; give it that'
            ' of a headless Service'
        )
    port = _container_port(shards, kind)
    return [
        Shard(kind, number, f'{name}-{number}.{service}.{where}.svc.{domain}', port)
        for number in range(_replicas(shards))
    ]


def outside_kubernetes(
    objects: Sequence[Mapping[str, Any]], kind: str, namespace: str | None = None
) -> list[Shard]:
    """Shards of a kind, with the addresses of their pods' load balancers.

    Raises:
      DeploymentError: as `in_kubernetes`, or a pod has no Service of type LoadBalancer, or the
        Service has no address yet.
    """
    shards = _stateful_set(objects, kind, namespace)
    where = shards['metadata'].get('namespace')
    balancers = {
        (each.get('spec', {}).get('selector') or {}).get(_POD_LABEL): each
        for each in objects
        if each.get('kind') == 'Service'
        and each.get('spec', {}).get('type') == 'LoadBalancer'
        and each['metadata'].get('namespace') == where
    }
    found = []
    for number in range(_replicas(shards)):
        pod = f'{shards["metadata"]["name"]}-{number}'
        if pod not in balancers:
            raise DeploymentError(
                f'pod {pod} has no Service of type LoadBalancer; add one (see'
                ' infra/kubernetes/overlays/external-workers/services.yaml), and read'
                ' `kubectl get statefulsets,services -o json`'
            )
        host, port = _balanced(balancers[pod])
        found.append(Shard(kind, number, host, port))
    return found


def _stateful_set(
    objects: Sequence[Mapping[str, Any]], kind: str, namespace: str | None
) -> Mapping[str, Any]:
    """The one StatefulSet of a kind of shards."""
    found = []
    for each in objects:
        metadata = each.get('metadata') or {}
        labels = metadata.get('labels') or {}
        ours = labels.get(_NAME_LABEL) == 'gorila' and labels.get(_COMPONENT_LABEL) == kind
        elsewhere = namespace and metadata.get('namespace', namespace) != namespace
        if each.get('kind') == 'StatefulSet' and ours and not elsewhere:
            found.append(each)
    if not found:
        where = f' in namespace {namespace}' if namespace else ''
        raise DeploymentError(
            f'no StatefulSet{where} has the labels {_NAME_LABEL}=gorila and'
            f' {_COMPONENT_LABEL}={kind}, among {len(objects)} objects; apply infra/kubernetes, and'
            ' name its namespace: `kubectl get statefulsets -n NAMESPACE -o json`'
        )
    if len(found) > 1:
        names = ', '.join(
            f'{each["metadata"].get("namespace", "")}/{each["metadata"]["name"]}' for each in found
        )
        raise DeploymentError(
            f'{len(found)} StatefulSets hold {kind} shards: {names}; name one namespace'
        )
    return found[0]


def _replicas(shards: Mapping[str, Any]) -> int:
    """Number of shards of a StatefulSet, which counts them from 0."""
    name, spec = shards['metadata']['name'], shards['spec']
    if first := (spec.get('ordinals') or {}).get('start', 0):
        raise DeploymentError(
            f'StatefulSet {name} counts its pods from {first}, but shards count from 0; leave'
            ' spec.ordinals out'
        )
    if (replicas := spec.get('replicas', 1)) < 1:
        raise DeploymentError(
            f'StatefulSet {name} has {replicas} replicas: no shard; scale it to their number'
        )
    return replicas


def _container_port(shards: Mapping[str, Any], name: str) -> int:
    """The container port named `name`."""
    for container in shards['spec']['template']['spec']['containers']:
        for port in container.get('ports', []):
            if port.get('name') == name:
                return port['containerPort']
    raise DeploymentError(
        f'StatefulSet {shards["metadata"]["name"]} has no container port named {name}; name it so'
    )


def _balanced(service: Mapping[str, Any]) -> tuple[str, int]:
    """Address and port of a load balancer."""
    entries = ((service.get('status') or {}).get('loadBalancer') or {}).get('ingress') or [{}]
    host = entries[0].get('ip') or entries[0].get('hostname')
    if not host:
        raise DeploymentError(
            f'Service {service["metadata"]["name"]} has no address yet; wait until `kubectl get'
            ' services` shows one'
        )
    return host, service['spec']['ports'][0]['port']


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog='python -m infra.deployment',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    places = parser.add_subparsers(dest='place', required=True)
    cluster = places.add_parser('kubernetes', help='StatefulSets of infra/kubernetes.')
    cluster.add_argument('file', nargs='?', help='Their JSON or YAML. Default: standard input.')
    cluster.add_argument('--namespace', type=nonempty, help='Namespace to search. Default: all.')
    cluster.add_argument(
        '--domain', default='cluster.local', help='Domain of the cluster. Default: cluster.local.'
    )
    cluster.add_argument(
        '--external',
        action='store_true',
        help='Print addresses of load balancers, for workers outside the cluster.',
    )
    hosts = places.add_parser('hosts', help='Units of infra/systemd.')
    for kind in KINDS:
        first = FIRST_PORTS[kind]
        hosts.add_argument(
            f'--{kind}_hosts',
            required=True,
            help='Comma-separated hosts; shards take them in turn.',
        )
        hosts.add_argument(
            f'--{kind}_shards', type=integer, default=1, help='Number of shards. Default: 1.'
        )
        hosts.add_argument(
            f'--{kind}_port',
            type=integer,
            default=first,
            help=f'Port of shard 0; shard I uses the I-th after it. Default: {first}.',
        )
    hosts.add_argument(
        '--units', action='store_true', help='Print the units of each host instead of addresses.'
    )
    return parser.parse_args(arguments)


def _hosts(options: argparse.Namespace) -> list[Shard]:
    shards = []
    for kind in KINDS:
        given = getattr(options, f'{kind}_hosts')
        hosts = [host.strip().strip('[]') for host in given.split(',') if host.strip()]
        count, first_port = getattr(options, f'{kind}_shards'), getattr(options, f'{kind}_port')
        shards += on_hosts(kind, hosts, count, first_port)
    require_distinct(shards)
    return shards


def _cluster(options: argparse.Namespace) -> list[Shard]:
    text = pathlib.Path(options.file).read_text() if options.file else sys.stdin.read()
    objects = read_objects(text)
    shards: list[Shard] = []
    for kind in KINDS:
        if options.external:
            shards += outside_kubernetes(objects, kind, options.namespace)
        else:
            shards += in_kubernetes(objects, kind, options.namespace, options.domain)
    return shards


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints flags or units and returns the exit code."""
    options = parse(arguments)
    try:
        shards = _hosts(options) if options.place == 'hosts' else _cluster(options)
        for shard in shards:
            split_address(shard.address)
    except (OSError, ValueError) as error:
        print(f'deployment: {error}', file=sys.stderr)
        return 2
    except (KeyError, TypeError, AttributeError) as error:
        print(
            f'deployment: not valid Kubernetes objects ({error!r}). Fix: pass the output of'
            ' `kubectl get statefulsets -o json` or `kubectl kustomize`.',
            file=sys.stderr,
        )
        return 2
    print(units(shards) if options.place == 'hosts' and options.units else flags(shards))
    return 0


if __name__ == '__main__':
    sys.exit(main())
