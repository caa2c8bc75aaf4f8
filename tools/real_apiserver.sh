#!/bin/sh
# A real kube-apiserver with etcd for the tests of the fake one, from Debian's packages; needs apt, make and a C compiler.
#
#   tools/real_apiserver.sh build FOLDER              download and build; nothing outside of FOLDER changes
#   tools/real_apiserver.sh run FOLDER COMMAND...     run a command with KUBECONFIG of a new, empty API server
#
# `build` keeps FOLDER/bin/kube-apiserver and FOLDER/bin/etcd, and does nothing when they exist. It takes 5 to 20
# minutes of two cores, and 3 GB while it builds. `run` ends both programs when the command ends.
set -eu

SUITE=bookworm # the last one with kube-apiserver in its source package
# By default the mirror from which this machine installs packages of that release.
MIRROR=${ROCK_DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' "Codename: $SUITE" 2> /dev/null | head -n 1)}
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

fail() {
    echo "real_apiserver.sh: $1" >&2
    exit 1
}

apt_here() {
    apt-get -q -o APT::Sandbox::User=root -o Dir::Etc::sourcelist="$folder/apt/sources.list" \
        -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists="$folder/apt/lists" -o Dir::Cache="$folder/apt/cache" "$@"
}

build() {
    [ ! -x "$folder/bin/kube-apiserver" ] || [ ! -x "$folder/bin/etcd" ] || return 0
    for program in apt-get dpkg make gcc tar; do
        command -v "$program" > /dev/null || fail "$program is missing; install it, or build on a Debian machine"
    done
    [ -n "$MIRROR" ] || fail "no Debian mirror is known: set ROCK_DEBIAN_MIRROR to the URL of one"
    mkdir -p "$folder/apt/lists/partial" "$folder/apt/cache/archives/partial" "$folder/packages" "$folder/root" \
        "$folder/bin" "$folder/home"
    printf 'deb [signed-by=%s] %s %s main\ndeb-src [signed-by=%s] %s %s main\n' \
        "$KEYRING" "$MIRROR" "$SUITE" "$KEYRING" "$MIRROR" "$SUITE" > "$folder/apt/sources.list"
    apt_here update
    cd "$folder/packages"
    apt_here source --download-only kubernetes
    apt_here download golang-1.19-go golang-1.19-src etcd-server rsync libpopt0 libxxhash0
    for package in *.deb; do dpkg -x "$package" "$folder/root"; done
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$folder/root/usr/lib/$(gcc -print-multiarch)" \
        "$folder/root/usr/bin/rsync" > "$folder/root/usr/lib/go-1.19/bin/rsync" # the build of Kubernetes calls it
    chmod +x "$folder/root/usr/lib/go-1.19/bin/rsync"
    cat > "$folder/version" <<END
KUBE_GIT_COMMIT=debian
KUBE_GIT_TREE_STATE=archive
KUBE_GIT_VERSION=v1.20.2
KUBE_GIT_MAJOR=1
KUBE_GIT_MINOR=20
END
    cp "$folder/root/usr/bin/etcd" "$folder/bin/etcd"
    mkdir -p "$folder/source"
    tar xf kubernetes_*.orig.tar.gz -C "$folder/source" --strip-components=1
    cd "$folder/source"
    env HOME="$folder/home" GOROOT="$folder/root/usr/lib/go-1.19" GOPATH="$folder/source/.go" GOPROXY=off \
        PATH="$folder/root/usr/lib/go-1.19/bin:$PATH" CGO_ENABLED=0 GOFLAGS=-mod=vendor \
        KUBE_GIT_VERSION_FILE="$folder/version" nice -n 19 make WHAT=cmd/kube-apiserver \
        || fail "the build failed; see its output above"
    cp _output/bin/kube-apiserver "$folder/bin/kube-apiserver"
    rm -rf "$folder/source" "$folder/root"
}

case "${1:-}" in
build | run) [ $# -ge 2 ] || fail "usage: real_apiserver.sh build FOLDER | run FOLDER COMMAND..." ;;
*) fail "usage: real_apiserver.sh build FOLDER | run FOLDER COMMAND..." ;;
esac
mode=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
shift 2
if [ "$mode" = build ]; then
    (build)
    exit
fi

[ -x "$folder/bin/kube-apiserver" ] && [ -x "$folder/bin/etcd" ] || fail "nothing is built; run: $0 build $folder"
[ $# -ge 1 ] || fail "usage: real_apiserver.sh run FOLDER COMMAND..."
state=$(mktemp -d)
etcd_pid="" server_pid=""
finish() {
    [ -z "$server_pid" ] || kill -9 "$server_pid" 2> /dev/null || true
    [ -z "$etcd_pid" ] || kill -9 "$etcd_pid" 2> /dev/null || true
    wait
    rm -rf "$state"
}
trap finish EXIT
trap 'exit 1' INT TERM
ports=$(python3 -c 'import socket
made = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(one.getsockname()[1] for one in made))')
client=${ports%% *} rest=${ports#* }
peer=${rest%% *} port=${rest#* }

"$folder/bin/etcd" --data-dir "$state/etcd" --unsafe-no-fsync --log-level error \
    --listen-client-urls "http://127.0.0.1:$client" --advertise-client-urls "http://127.0.0.1:$client" \
    --initial-cluster "default=http://127.0.0.1:$peer" --initial-advertise-peer-urls "http://127.0.0.1:$peer" \
    --listen-peer-urls "http://127.0.0.1:$peer" > "$state/etcd.log" 2>&1 &
etcd_pid=$!
token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
echo "$token,rock,rock,system:masters" > "$state/tokens.csv"
openssl genrsa -out "$state/accounts.key" 2048 2> /dev/null
# ServiceAccount is off: the accounts of namespaces are made by a controller, which is not here. A watch of ConfigMaps
# has no cache, so that a version that etcd has compacted expires.
"$folder/bin/kube-apiserver" --etcd-servers "http://127.0.0.1:$client" --bind-address 127.0.0.1 --secure-port "$port" \
    --cert-dir "$state/certs" --token-auth-file "$state/tokens.csv" --service-cluster-ip-range 10.0.0.0/24 \
    --service-account-issuer https://kubernetes.default --service-account-key-file "$state/accounts.key" \
    --service-account-signing-key-file "$state/accounts.key" --disable-admission-plugins ServiceAccount \
    --etcd-compaction-interval 10s --watch-cache-sizes 'configmaps#0' > "$state/server.log" 2>&1 &
server_pid=$!
for _ in $(seq 1 600); do
    kill -0 "$server_pid" 2> /dev/null || { tail -20 "$state/server.log" >&2; fail "kube-apiserver ended"; }
    if [ -f "$state/certs/apiserver.crt" ] && [ "$(curl -s --cacert "$state/certs/apiserver.crt" \
        -H "Authorization: Bearer $token" "https://127.0.0.1:$port/readyz")" = ok ]; then
        break
    fi
    sleep 0.1
done
cat > "$state/kubeconfig" <<END
{"apiVersion": "v1", "kind": "Config", "current-context": "real",
 "clusters": [{"name": "real", "cluster": {"server": "https://127.0.0.1:$port",
   "certificate-authority": "$state/certs/apiserver.crt"}}],
 "users": [{"name": "real", "user": {"token": "$token"}}],
 "contexts": [{"name": "real", "context": {"cluster": "real", "user": "real", "namespace": "default"}}]}
END
status=0
KUBECONFIG="$state/kubeconfig" ROCK_TEST_APISERVER="$server_pid" "$@" || status=$?
exit "$status"
