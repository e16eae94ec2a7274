#!/bin/bash
# Installs shards of a run on this host as systemd units: install.sh [--flags FLAGS] UNIT...
#
#   sudo infra/systemd/install.sh --flags "--preset laptop" gorila-parameter@{0,1} gorila-replay@0
#
# Sets up /opt/gorila from this checkout (`make setup`), writes /etc/gorila and enables the units;
# `python -m infra.deployment hosts --units` prints the units of each host. FLAGS are the run's
# flags, from which the shards' configuration is written. A second call updates code and units,
# keeps servers.env, and without --flags keeps the configuration; running shards are not restarted
# (`systemctl restart gorila.target` does that). After a `git clone` the script also works as the
# start-up script of a virtual machine.
#
# PYTHON        Python 3.11 to use, see the Makefile; not one in a home directory
# GORILA_ROOT   root of the files of an image that is being built; nothing is started

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
  [ "${#units[@]}" -gt 0 ] || fail 'no unit. Fix: name the shards of this host, such as gorila-replay@0'
  local unit
  for unit in "${units[@]}"; do
    [[ "$unit" =~ ^gorila-(parameter|replay)@[0-9]+$ ]] \
      || fail "$unit: unknown unit. Fix: use gorila-parameter@N or gorila-replay@N"
  done
  [ -n "$ROOT" ] || [ "$(id -u)" = 0 ] || fail 'only root may install units. Fix: use sudo'
}

# Installs the requirements of `make setup` from Debian's or Ubuntu's packages.
install_packages() {
  if command -v make > /dev/null && "${PYTHON:-python3.11}" -c 'import ensurepip' 2> /dev/null; then
    return
  fi
  command -v apt-get > /dev/null \
    || fail 'make or Python 3.11 with its venv module is missing. Fix: install them'
  apt-get update --quiet
  DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes make python3.11 python3.11-venv
}

copy_checkout() {
  local checkout
  checkout="$(cd "$HERE/../.." && pwd)"
  mkdir -p "$PREFIX"
  [ "$checkout" != "$(cd "$PREFIX" && pwd)" ] || return 0
  rm -rf "$PREFIX"/{agents,infra,pipelines}  # removes modules that the checkout no longer has
  tar -C "$checkout" -cf - Makefile README.md constraints.txt pyproject.toml requirements.txt \
    agents infra pipelines | tar -C "$PREFIX" --no-same-owner -xf -
}

set_up() {
  local python
  make -C "$PREFIX" setup
  python="$ROOT$(readlink -f "$PREFIX/.venv/bin/python")"  # an image's builder chooses its own
  case "$python" in
    ~root/* | /home/*)
      fail "$python: the shards' user cannot read home directories. Fix: install Python 3.11" \
        "system-wide, remove $PREFIX/.venv and set PYTHON=/usr/bin/python3.11"
      ;;
  esac
  # The shards may not write byte-code here.
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

# Probes each shard until it answers.
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
      || fail "$unit: no answer within 300 s. Fix: see journalctl -u $unit"
  done
}

flags=()
units=()
while [ "$#" -gt 0 ]; do
  case "$1" in
    --flags)
      [ "$#" -gt 1 ] || fail '--flags: value missing. Fix: pass the flags of the run in quotes'
      read -r -a flags <<< "$2"
      shift 2
      ;;
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    --*) fail "$1: unknown flag. Fix: see --help" ;;
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
