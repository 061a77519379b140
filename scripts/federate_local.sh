#!/usr/bin/env bash
# Federated rounds over Flower as real processes on this machine: one SuperLink and a SuperNode for each of three
# clients, with TLS and node authentication, on loopback. Certificates and keys are made anew and thrown away.
# Usage: scripts/federate_local.sh OUTPUT [EXPERIMENT.toml]
#   OUTPUT      a new folder, as `cahfp simulate` writes it, without figures; OUTPUT.logs has the log of each process.
#   EXPERIMENT  of three clients; scripts/federation_local.toml if none is given.
# DATA=FOLDER gives the nodes data of their own, FOLDER/0.npz and so on, for an experiment with the partition on-device.
# KILL_NODE=2 kills that client's node after the first round, UNREGISTERED=2 does not register its key, to see that the
# rounds go on without it. PORT (default 29480) and the three after it are used; DEADLINE is in seconds (default 300).
# Needs pip install 'cahfp[federated]', openssl and ssh-keygen. Exits 0 only if all rounds were committed.
set -euo pipefail

here="$(cd "$(dirname "$0")" && pwd)"
output="$(realpath -m "${1:?usage: scripts/federate_local.sh OUTPUT [EXPERIMENT.toml]}")"
experiment="$(realpath "${2:-$here/federation_local.toml}")"
port="${PORT:-29480}" clients=3
for tool in flwr flower-superlink flower-supernode openssl ssh-keygen; do
  command -v "$tool" > /dev/null || { echo "$tool is missing: pip install 'cahfp[federated]'" >&2; exit 2; }
done
if [ -e "$output" ]; then echo "$output exists: name a new folder" >&2; exit 2; fi

work="$(mktemp -d)" logs="$output.logs" pids=()
mkdir -p "$logs"
finish() {  # each process was started in a group of its own, which ends with what it started
  for pid in "${pids[@]}"; do kill -- "-$pid" 2> /dev/null || true; done
  for pid in "${pids[@]}"; do wait "$pid" 2> /dev/null || true; done
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

export FLWR_HOME="$work/home" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 RAY_USAGE_STATS_ENABLED=0
mkdir -p "$FLWR_HOME"

start() {  # NAME COMMAND...: in the background, in a process group of its own
  local name="$1"
  shift
  set -m
  "$@" > "$logs/$name.log" 2>&1 &
  set +m
  pids+=("$!")
}

certificates() {
  openssl req -x509 -newkey rsa:3072 -nodes -days 2 -subj "/CN=cahfp test CA" \
    -keyout "$work/ca.key" -out "$work/ca.crt"
  openssl req -newkey rsa:3072 -nodes -subj "/CN=localhost" -keyout "$work/server.key" -out "$work/server.csr"
  openssl x509 -req -days 2 -in "$work/server.csr" -CA "$work/ca.crt" -CAkey "$work/ca.key" -CAcreateserial \
    -extfile <(echo "subjectAltName=DNS:localhost,IP:127.0.0.1") -out "$work/server.crt"
  for ((client = 0; client < clients; client++)); do
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "client $client" -f "$work/client$client"
  done
}
certificates > "$logs/certificates.log" 2>&1

start superlink flower-superlink --host 127.0.0.1 --port "$port" --enable-supernode-auth \
  --ssl-ca-certfile "$work/ca.crt" --ssl-certfile "$work/server.crt" --ssl-keyfile "$work/server.key"
cat > "$FLWR_HOME/config.toml" << END
[superlink]
default = "local"

[superlink.local]
address = "127.0.0.1:$port"
root-certificates = "$work/ca.crt"
END
for ((try = 0; try < 120; try++)); do
  (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null && break
  sleep 0.5
done

for ((client = 0; client < clients; client++)); do
  if [ "${UNREGISTERED:-}" != "$client" ]; then
    flwr supernode register "$work/client$client.pub" local > "$logs/register$client.log" 2>&1
  fi
  start "node$client" flower-supernode --superlink "127.0.0.1:$port" --root-certificates "$work/ca.crt" \
    --host 127.0.0.1 --port "$((port + 1 + client))" \
    --auth-supernode-private-key "$work/client$client" \
    --node-config "client=$client${DATA:+ data=\"npz:$(realpath "$DATA")/$client.npz\"}"
done

started=$SECONDS
start run flwr run "$here/flower_app" local --stream --run-config \
  "experiment=\"$experiment\" output=\"$output\" deadline=${DEADLINE:-300}.0 joining=${JOINING:-120}.0"
run="${pids[-1]}"
while kill -0 "$run" 2> /dev/null; do
  if [ -n "${KILL_NODE:-}" ] && grep -qs "round 1 committed" "$logs/run.log"; then
    kill -9 -- "-${pids[1 + KILL_NODE]}" 2> /dev/null || true
    KILL_NODE=""
  fi
  sleep 1
done
grep -o -e "round [0-9]* committed" -e "round [0-9]*: client .*" "$logs/run.log" || true
if [ ! -f "$output/summary.json" ]; then  # the status of `flwr run --stream` says nothing of the run's
  echo "the rounds did not complete; see $logs" >&2
  exit 1
fi
echo "wrote $output in $((SECONDS - started)) s"
