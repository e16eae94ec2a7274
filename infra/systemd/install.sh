#!/bin/bash
# Shards of a run on this host, kept by systemd: install.sh [--flags FLAGS] UNIT...
#
#   sudo infra/systemd/install.sh --flags "--preset laptop" gorila-parameter@{0,1} gorila-replay@0
#
# Sets up /opt/gorila from the checkout that this file is in (`make setup`), writes /etc/gorila and
# enables the units; `python -m infra.deployment hosts --units` says which units each host runs.
# FLAGS are those of the run: the shards' configuration is made of them. A second call brings code
# and units up to date, keeps servers.env, and the configuration without --flags; shards that run
# go on as they are (`systemctl restart gorila.target`). So it serves as a virtual machine's
# start-up script, behind a `git clone`.
#
# PYTHON        the Python 3.11 to use, see the Makefile; not one in a home directory GORILA_ROOT
# where the host's files are, for an image that is being made; nothing is started then.

set -euo pipefail
umask 022

readonly ROOT="${GORILA_ROOT:-}"
readonly PREFIX="$ROOT/opt/gorila" SETTINGS="$ROOT/etc/gorila" UNITS="$ROOT/etc/systemd/system"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
readonly HERE

fail() {
  echo "install.sh: $*" >&2
  exit 2
}

check_arguments() {
  [ "${#units[@]}" -gt 0 ] || fail 'no unit: name the shards of this host, such as gorila-replay@0'
  local unit
  for unit in "${units[@]}"; do
    [[ "$unit" =~ ^gorila-(parameter|replay)@[0-9]+$ ]] \
      || fail "$unit: no unit of ours; write gorila-parameter@N or gorila-replay@N"
  done
  [ -n "$ROOT" ] || [ "$(id -u)" = 0 ] || fail 'only root may install units: use sudo'
}

# What `make setup` needs, where Debian's or Ubuntu's packages can be had.
install_packages() {
  if command -v make > /dev/null && "${PYTHON:-python3.11}" -c 'import ensurepip' 2> /dev/null; then
    return
  fi
  command -v apt-get > /dev/null \
    || fail 'needs make and Python 3.11 with its venv module: install them'
  apt-get update --quiet
  DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes make python3.11 python3.11-venv
}

copy_checkout() {
  local checkout
  checkout="$(cd "$HERE/../.." && pwd)"
  mkdir -p "$PREFIX"
  [ "$checkout" != "$(cd "$PREFIX" && pwd)" ] || return 0
  rm -rf "$PREFIX"/{agents,infra,pipelines}  # no module stays that the checkout has no more
  tar -C "$checkout" -cf - Makefile README.md constraints.txt pyproject.toml requirements.txt \
    agents infra pipelines | tar -C "$PREFIX" --no-same-owner -xf -
}

set_up() {
  local python
  make -C "$PREFIX" setup
  python="$ROOT$(readlink -f "$PREFIX/.venv/bin/python")"  # of an image: who builds it knows
  case "$python" in
    ~root/* | /home/*)
      fail "$python: the shards' user sees no home directory; install Python 3.11 for all" \
        "and name it: PYTHON=/usr/bin/python3.11 (then remove $PREFIX/.venv)"
      ;;
  esac
  # The shards may not write here, so the byte-code is made now.
  "$PREFIX/.venv/bin/python" -m compileall -q "$PREFIX"/{agents,infra,pipelines}
}

write_settings() {
  mkdir -p "$SETTINGS"
  [ -e "$SETTINGS/servers.env" ] || install -m 644 "$HERE/servers.env" "$SETTINGS/servers.env"
  if [ "${#flags[@]}" -gt 0 ] || [ ! -e "$SETTINGS/replay.json" ]; then
    (cd "$PREFIX" && .venv/bin/python -m pipelines.servers --config_dir "$SETTINGS" "${flags[@]}")
  fi
}

enable_units() {
  mkdir -p "$UNITS"
  install -m 644 "$HERE"/gorila.target "$HERE"/gorila-{parameter,replay}@.service "$UNITS"
  if [ -n "$ROOT" ]; then
    systemctl --root="$ROOT" enable gorila.target "${units[@]}"
    return
  fi
  systemctl daemon-reload
  systemctl enable gorila.target "${units[@]}"
  systemctl start gorila.target "${units[@]}"
}

# Asks each shard until it answers. With TLS nothing is asked: that takes --tls.
await_shards() {
  [ -z "$ROOT" ] || return 0
  local unit kind first
  # shellcheck source=infra/systemd/servers.env
  . "$SETTINGS/servers.env"
  for unit in "${units[@]}"; do
    kind="${unit#gorila-}"
    kind="${kind%@*}"
    first="$GORILA_REPLAY_PORT"
    local options=()
    if [ "$kind" = parameter ]; then
      first="$GORILA_PARAMETER_PORT"
      [ ! -e "$UNITS/gorila-parameter@.service.d/tls.conf" ] || options=(--tls)
    fi
    (cd "$PREFIX" && .venv/bin/python -m infra.probe "$kind" \
      "$GORILA_HOST:$((first + ${unit#*@}))" --wait_seconds=300 "${options[@]}") \
      || fail "$unit does not serve: journalctl -u $unit"
  done
}

flags=()
units=()
while [ "$#" -gt 0 ]; do
  case "$1" in
    --flags)
      [ "$#" -gt 1 ] || fail '--flags misses its value: the flags of the run, in quotes'
      read -r -a flags <<< "$2"
      shift 2
      ;;
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    --*) fail "$1: unknown flag; there is --flags" ;;
    *)
      units+=("$1")
      shift
      ;;
  esac
done
check_arguments
install_packages
copy_checkout
set_up
write_settings
enable_units
await_shards
