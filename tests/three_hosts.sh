#!/usr/bin/env bash
# The README's three hosts, tried: owner, helper and client each in a directory and, where that is allowed, a network
# namespace of its own, with nothing in common but what the README says they exchange. Then the client's tokens are compared
# with those of one process. Usage: tests/three_hosts.sh TREFOIL MODEL
set -euo pipefail
trefoil=$(realpath "$1") model=$(realpath "$2")
work=$(mktemp -d)
prompt="It was a bright morning"
names=() pids=()

cleanup() {
    for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null || true; done
    wait 2> /dev/null || true
    for name in "${names[@]}"; do ip netns del "$name" 2> /dev/null || true; done
    rm -rf "$work"
}
trap cleanup EXIT

# Three hosts on one switch, or three directories on this one.
hosts() {
    local id=$$
    ip netns add "tre$id-sw" 2> /dev/null || return 1
    names+=("tre$id-sw")
    ip -n "tre$id-sw" link add br0 type bridge 2> /dev/null || return 1
    ip -n "tre$id-sw" link set br0 up
    local i=1
    for host in owner helper client; do
        ip netns add "tre$id-$host" || return 1
        names+=("tre$id-$host")
        ip link add "tre$id$i" type veth peer name "tp$id$i" || return 1
        ip link set "tre$id$i" netns "tre$id-$host"
        ip link set "tp$id$i" netns "tre$id-sw"
        ip -n "tre$id-sw" link set "tp$id$i" master br0 up
        ip -n "tre$id-$host" addr add "10.77.0.$i/24" dev "tre$id$i"
        ip -n "tre$id-$host" link set "tre$id$i" up
        ip -n "tre$id-$host" link set lo up
        i=$((i + 1))
    done
    # Half of it is allowed in some containers.
    ip netns exec "tre$id-client" true 2> /dev/null && ip -n "tre$id-client" route get 10.77.0.1 > /dev/null 2>&1
}
if command -v ip > /dev/null && [ "$(id -u)" = 0 ] && hosts; then
    echo "three network namespaces"
    owner=10.77.0.1 helper=10.77.0.2 owner_port=7001 helper_port=7002
    at() { local host=$1; shift; (cd "$work/$host" && exec ip netns exec "tre$$-$host" "$@"); }
else
    echo "three directories: network namespaces are not allowed here"
    owner=127.0.0.1 helper=127.0.0.1
    owner_port=$((20000 + $$ % 20000)) helper_port=$((owner_port + 1))
    at() { local host=$1; shift; (cd "$work/$host" && exec "$@"); }
fi
mkdir "$work"/{owner,helper,client}
started=$SECONDS

# 1-3: each host its own key, certificate and configuration.
at owner "$trefoil" init owner --name Provider --host $owner --listen $owner:$owner_port --helper $helper:$helper_port
at helper "$trefoil" init helper --name Third --host $helper --listen $helper:$helper_port
at client "$trefoil" init client --name Alice --owner $owner:$owner_port --helper $helper:$helper_port
# 4: the owner prepares its model.
at owner "$trefoil" prepare --model "$model" --out prep
# What they exchange: certificates, and the public part of the model.
for to in owner helper client; do
    for from in owner helper client; do
        [ $from = $to ] || cp "$work/$from/certs/$from.pem" "$work/$to/certs/"
    done
done
mkdir "$work/client/prep" && cp -r "$work/owner/prep/public" "$work/client/prep/public"
# 5-6: the two servers.
at helper "$trefoil" party --config configs/helper.toml > "$work/helper.out" 2> "$work/helper.log" &
pids+=($!)
at owner "$trefoil" party --config configs/owner.toml > "$work/owner.out" 2> "$work/owner.log" &
pids+=($!)
for _ in $(seq 300); do
    grep -q "the helper has the model" "$work/owner.log" && break
    sleep 0.1
done
grep -q "the helper has the model" "$work/owner.log" || { cat "$work"/*.log >&2; exit 1; }
# 7: everything in order?
at client "$trefoil" doctor --config configs/client.toml
at owner "$trefoil" doctor --config configs/owner.toml
at helper "$trefoil" doctor --config configs/helper.toml
# 8: generate.
at client "$trefoil" generate --config configs/client.toml --prompt "$prompt" --max-new-tokens 16 --json > "$work/three.json" ||
    { cat "$work"/*.log >&2; exit 1; }
echo "eight commands, $((SECONDS - started)) s"

"$trefoil" generate --model "$model" --prompt "$prompt" --max-new-tokens 16 --json > "$work/one.json"
tokens() { tr -d ' \n' < "$1" | sed 's/.*"tokens":\[\([0-9,]*\)\].*/\1/'; }
[ "$(tokens "$work/three.json")" = "$(tokens "$work/one.json")" ] || { echo "the tokens differ" >&2; exit 1; }
echo "the same tokens as in one process: $(tokens "$work/three.json")"
