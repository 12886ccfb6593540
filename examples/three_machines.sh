#!/usr/bin/env bash
# docs/deploy.md, step by step, on four machines: a server and three sites. The machines are network
# namespaces with an address of their own each, joined by a bridge; all they share is the kits that
# are handed over. Needs root, Linux and iproute2; leaves nothing but the folder that it works in.
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

# same KIT KIT: whether both have the same private key.
same() {
  "$python" - "$@" <<'SAME'
import sys
import zipfile

one, other = (zipfile.ZipFile(kit).read("startup/client.key") for kit in sys.argv[1:])
sys.exit(one != other)
SAME
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

say "1. certificates and kits, and the server"
cat >"$work/fl/project.yml" <<PROJECT
server: {address: $server, port: $port, admin_port: $admin_port}
sites: [north, south, west]
days: 360              # how long the certificate authority is valid
PROJECT
fedvlm fl deploy init project.yml
start fl server deploy server
for site in "${sites[@]}"; do
  cp "$work/fl/federation/sites/$site.zip" "$work/$site/" # a channel that you trust
done

say "3. every site, with its kit and its rows"
for site in "${sites[@]}"; do
  start "$site" site site start "$site.zip" --data rows.parquet --state state
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

say "a site more: the others keep their kits, and nothing but it is started"
sed -i 's/west\]/west, east]/' "$work/fl/project.yml"
fedvlm fl deploy init project.yml
for site in "${sites[@]}"; do
  same "$work/$site/$site.zip" "$work/fl/federation/sites/$site.zip" || fail "$site's key is new"
done
mkdir "$work/east"
cp "$work/fl/federation/sites/east.zip" "$work/north/rows.parquet" "$work/east/"
machine east 5
start east site site start east.zip --data rows.parquet --state state
until_true 90 grep -q "connected to the server" "$work/east/site.log"
fedvlm fl deploy status
fedvlm fl deploy run config.yaml train.rounds=2 output=runs/four >"$work/fl/four.log" 2>&1 ||
  fail "the run of four sites did not end well"
grep "round 2" "$work/fl/four.log"
grep -q "east: round 2" "$work/fl/four.log" || fail "east has not taken part"

say "all done; logs and results are in $work"
