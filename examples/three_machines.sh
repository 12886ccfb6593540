#!/usr/bin/env bash
# docs/deploy.md and docs/deploy-site.md, step by step, on four machines: a server and three sites. The machines are network
# namespaces with an address of their own each, joined by a bridge; all they share is the files that
# are handed over when a site joins. Needs root, Linux and iproute2; leaves nothing but the folder that it works in.
#
#   sudo PYTHON=$(which python) examples/three_machines.sh [FOLDER]     two to three minutes
#
# Each step is told, and checked: the script ends with an error where one fails.
set -euo pipefail

[[ $EUID == 0 ]] || { echo "network namespaces need root: use sudo" >&2; exit 2; }
python=$(realpath -s "$(command -v "${PYTHON:-python}")")
work=$(realpath -m "${1:-three-machines}")
sites=(north south west)
server=fl.example.org
port=8002 admin_port=8003
net=10.77.0
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} COLUMNS=110

say() { printf '\n== %s\n' "$*"; }

fail() {
  echo "FAILED: $*" >&2
  tail -n 5 "$work"/*/*.log >&2 || true
  exit 1
}

# on MACHINE COMMAND...: there, in the machine's own folder.
on() {
  local machine=$1
  shift
  (cd "$work/$machine" && exec ip netns exec "fedvlm-$machine" "$@")
}

fedvlm() { on "$1" "$python" -m fedvlm "${@:2}"; }

# until_true SECONDS COMMAND...: waits for a command to succeed.
until_true() {
  local end=$((SECONDS + $1))
  while ! "${@:2}" >/dev/null 2>&1; do
    ((SECONDS < end)) || fail "after $1 s still not: ${*:2}"
    sleep 0.5
  done
}

# machine NAME NUMBER: a network namespace with the address NET.NUMBER, which knows the server's name.
machine() {
  mkdir -p "/etc/netns/fedvlm-$1"
  printf '127.0.0.1 localhost\n%s.1 %s\n' "$net" "$server" >"/etc/netns/fedvlm-$1/hosts"
  ip netns add "fedvlm-$1"
  machines+=("$1")
  ip link add "fv-$1" type veth peer name eth0 netns "fedvlm-$1"
  ip link set "fv-$1" master fedvlm-bridge up
  ip -n "fedvlm-$1" addr add "$net.$2/24" dev eth0
  ip -n "fedvlm-$1" link set eth0 up
  ip -n "fedvlm-$1" link set lo up
  echo "$1: $net.$2"
}

# fingerprint MACHINE: of the site's key, as its person reads it out.
fingerprint() { fedvlm "$1" site fingerprint --state state | sed -n 's/^this site *\|^its new key *//p'; }

# join SITE: its key is made there; invitation, request and admission travel.
join() {
  local files=$work/fl/federation/sites
  cp "$files/$1.invitation" "$work/$1/"
  fedvlm "$1" site join "$1.invitation" --state state
  cp "$work/$1/$1.request" "$work/fl/"
  fedvlm fl deploy admit "$1.request" --fingerprint "$(fingerprint "$1")"
  cp "$files/$1.admission" "$work/$1/"
  fedvlm "$1" site join "$1.admission" --state state
}

machines=()
started=()

clean_up() {
  for pid in "${started[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  for pid in "${started[@]}"; do wait "$pid" 2>/dev/null || true; done
  for machine in "${machines[@]}"; do
    ip link del "fv-$machine" 2>/dev/null || true
    ip netns del "fedvlm-$machine" 2>/dev/null || true
    rm -rf "/etc/netns/fedvlm-$machine"
  done
  ip link del fedvlm-bridge 2>/dev/null || true
  rmdir /etc/netns 2>/dev/null || true
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# start MACHINE LOG WORDS...: a fedvlm command that stays, as in a terminal of that machine.
start() {
  (cd "$work/$1" && exec ip netns exec "fedvlm-$1" "$python" -m fedvlm "${@:3}") \
    >>"$work/$1/$2.log" 2>&1 &
  started+=($!)
}

say "four machines"
[[ -z $(ls -A "$work" 2>/dev/null) ]] || { echo "'$work' is not empty" >&2; exit 2; }
ip link add fedvlm-bridge type bridge
ip link set fedvlm-bridge up
number=0
for machine in fl "${sites[@]}"; do
  mkdir -p "$work/$machine"
  machine "$machine" $((++number))
done
"$python" - "$work" "${sites[@]}" <<'ROWS'
import sys

import fedvlm

work, *sites = sys.argv[1:]
table = fedvlm.scenes(style="mixed", strength=1.0, sites=len(sites), rows=48).to_pandas()
for k, site in enumerate(sites):
    table[table["site"] == f"site-{k}"].to_parquet(f"{work}/{site}/rows.parquet", index=False)
ROWS

say "1. the operator's keys, invitations, and the server"
cat >"$work/fl/project.yml" <<PROJECT
server: {address: $server, port: $port, admin_port: $admin_port}
sites: [north, south, west]
days: 360              # how long the certificate authority is valid
PROJECT
fedvlm fl deploy init project.yml
start fl server deploy server

say "3. every site joins with a key of its own, and starts with its rows"
for site in "${sites[@]}"; do
  join "$site"
  start "$site" site site start --data rows.parquet --state state
done
for key in $(find "$work"/*/state -name site.key); do
  grep -rqF "$(sed -n 2p "$key")" "$work/fl" && fail "the server's machine has the key $key"
done
for site in "${sites[@]}"; do
  until_true 90 grep -q "connected to the server" "$work/$site/site.log"
done

say "4. a run, ended by a person after some rounds, and resumed"
cat >"$work/fl/config.yaml" <<'CONFIG'
algorithm: {name: plora}
train: {rounds: 20, local_steps: 5, batch_size: 4, lr: 5.0e-3}
eval: {every: 0, max_rows: 10, max_new_tokens: 4}
CONFIG
fedvlm fl deploy status
start fl run deploy run config.yaml train.rounds=12
run=$!
until_true 120 grep -q "^round 2 done" "$work/fl/run.log"

say "2. what the firewalls have to let through (while the run is under way)"
ends() { # MACHINE COLUMN ss-OPTIONS: of its sockets, those that are not of the machine alone
  on "$1" ss "${@:3}" | awk -v c="$2" '{gsub(/\[::ffff:|\]|\[/, "", $c); print $c}' |
    { grep -v '^127\.\|^::1:' || true; } | sort -u | xargs
}
for site in "${sites[@]}"; do
  away=$(ends "$site" 4 -Htn state established)
  echo "$site: connected to ${away:-nobody}; listens on: $(ends "$site" 4 -Htln)"
  [[ $away == "$net.1:$port" ]] || fail "$site is not connected to the server's port $port alone"
done
echo "fl: listens on: $(ends fl 4 -Htln)"

fedvlm fl deploy abort
wait "$run" && fail "a run that was ended has succeeded"
tail -n 1 "$work/fl/run.log"
fedvlm fl deploy run --resume runs/run >>"$work/fl/run.log" 2>&1 || fail "the run did not go on"
tail -n 25 "$work/fl/run.log"

say "what is where"
for site in "${sites[@]}"; do
  for part in adapters/personal/adapter_model.safetensors answers/personal.jsonl; do
    ls "$work/$site"/state/runs/*/"$part" || fail "$site lacks $part"
  done
done
[[ -z $(find "$work/fl" -name 'personal*') ]] || fail "the server's machine has something personal"
ls "$work/fl/runs/run"

say "a site more: the others keep their keys, and nothing but it is started"
cp "$work/fl/federation/admitted.json" "$work/admitted.json"
sed -i 's/west\]/west, east]/' "$work/fl/project.yml"
fedvlm fl deploy init project.yml
cmp "$work/admitted.json" "$work/fl/federation/admitted.json" || fail "a key is new"
mkdir "$work/east"
cp "$work/north/rows.parquet" "$work/east/"
machine east 5
join east
start east site site start --data rows.parquet --state state
until_true 90 grep -q "connected to the server" "$work/east/site.log"
fedvlm fl deploy status
fedvlm fl deploy run config.yaml train.rounds=2 output=runs/four >"$work/fl/four.log" 2>&1 ||
  fail "the run of four sites did not end well"
grep "round 2" "$work/fl/four.log"
grep -q "east: round 2" "$work/fl/four.log" || fail "east has not taken part"

say "east is revoked: its connection is closed, and the others go on"
fedvlm fl deploy revoke east
until_true 60 grep -q "closed the connection of a revoked key" "$work/fl/server.log"
fedvlm fl deploy status
fedvlm fl deploy run config.yaml train.rounds=2 output=runs/three >"$work/fl/three.log" 2>&1 ||
  fail "the run without east did not end well"
grep "round 2" "$work/fl/three.log"
! grep -q "east: round" "$work/fl/three.log" || fail "east has taken part"

say "all done; logs and results are in $work"
