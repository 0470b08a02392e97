#!/usr/bin/env bash
# The gateway as its users meet it: in front of owner and helper, three real processes over TLS, with curl, with the Python package
# `openai`, and with Chromium on the page. Installs the packages (a virtual environment beside the build, Debian's chromium where there
# is none). Usage: tests/clients/run.sh TREFOIL [IMAGES]: screenshots go to IMAGES. Exit code 77: the clients cannot be installed here, nothing was
# tested.
set -euo pipefail
trefoil=$(realpath "$1") images=${2:+$(realpath "$2")}
cd "$(dirname "$0")/../.."
here=$PWD
tools=$here/target/clients
fail() { printf 'clients: %s\n' "$*" >&2; cat "$work"/*.log >&2 2> /dev/null || true; exit 1; }

missing() { printf 'clients: %s: NOT TESTED\n' "$*" >&2; exit 77; }

command -v curl > /dev/null && command -v python3 > /dev/null || missing "needs curl and python3"
if [ ! -x "$tools/bin/python" ] || ! "$tools/bin/python" -c 'import openai, playwright' 2> /dev/null; then
    python3 -m venv "$tools" > /dev/null || missing "python3 has no venv"
    "$tools/bin/pip" --quiet --disable-pip-version-check install "openai>=1.50,<3" "playwright>=1.45,<2" || missing "pip cannot install openai and playwright"
fi
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
if [ -z "$browser" ]; then
    # Debian's, where there is apt and the right to use it; otherwise Playwright's own.
    if command -v apt-get > /dev/null && [ "$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium > /dev/null; then
        browser=$(command -v chromium)
    else
        "$tools/bin/playwright" install chromium > /dev/null || missing "no Chromium can be installed"
    fi
fi

work=$(mktemp -d)
pids=()
cleanup() {
    for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null || true; done
    wait 2> /dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
cd "$work"
port=$((20000 + $$ % 20000))
# The README's three hosts, on this one.
"$trefoil" init owner --name Provider --host 127.0.0.1 --listen 127.0.0.1:$port --helper 127.0.0.1:$((port + 1)) > /dev/null
"$trefoil" init helper --name Third --host 127.0.0.1 --listen 127.0.0.1:$((port + 1)) > /dev/null
"$trefoil" init client --name Alice --owner 127.0.0.1:$port --helper 127.0.0.1:$((port + 1)) > /dev/null
"$trefoil" prepare --model "$here/models/quill-4m" --out prep 2> /dev/null > /dev/null
"$trefoil" party --config configs/helper.toml > helper.out 2> helper.log &
pids+=($!)
"$trefoil" party --config configs/owner.toml > owner.out 2> owner.log &
pids+=($!)
for _ in $(seq 300); do grep -q "the helper has the model" owner.log && break; sleep 0.1; done
grep -q "the helper has the model" owner.log || fail "owner and helper do not start"
"$trefoil" serve --config configs/client.toml --listen 127.0.0.1:0 --sessions 2 > gateway.out 2> gateway.log &
pids+=($!)
for _ in $(seq 300); do grep -q "listening on" gateway.out && break; sleep 0.1; done
url=$(sed -n 's/^listening on //p' gateway.out)
[ -n "$url" ] || fail "the gateway does not start"
"$trefoil" generate --config configs/client.toml --prompt "It was a bright morning" --max-new-tokens 12 --json > want.json 2> /dev/null

echo "==> curl"
body='{"messages":[{"role":"user","content":"It was a bright morning"}],"max_tokens":12,"temperature":0}'
curl -sS --fail "$url/v1/chat/completions" -H 'Content-Type: application/json' -d "$body" > whole.json || fail "curl: chat"
curl -sSN --fail "$url/v1/chat/completions" -H 'Content-Type: application/json' -d "${body%\}},\"stream\":true}" > chunks.txt || fail "curl: stream"
tail -n 2 chunks.txt | grep -q '^data: \[DONE\]$' || fail "curl: the stream does not end in [DONE]"
"$tools/bin/python" - << 'PY' || fail "curl: other tokens than generate"
import json
want = json.load(open("want.json"))["text"]
whole = json.load(open("whole.json"))["choices"][0]["message"]["content"]
lines = [l[6:] for l in open("chunks.txt").read().splitlines() if l.startswith("data: {")]
parts = "".join(json.loads(l)["choices"][0]["delta"].get("content", "") for l in lines)
assert want == whole == parts, (want, whole, parts)
PY

echo "==> openai (Python)"
"$tools/bin/python" "$here/tests/clients/api.py" "$url" want.json || fail "openai"

echo "==> the page, in $("${browser:-$tools/bin/playwright}" --version | head -1)"
"$tools/bin/python" "$here/tests/clients/page.py" "$url" "${browser:-}" ${images:+"$images"} || fail "the page"
echo "all clients are served"
