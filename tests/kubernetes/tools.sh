#!/bin/sh
# Builds the programs of the checks on a real control plane, once: etcd, kube-apiserver, kube-controller-manager,
# kube-scheduler, kubectl, helm, and kwok, which reports pods as running without running them. Prints their directory.
#
# The build from Go modules takes about ten minutes on two cores. Versions are set here and in go.mod.
set -eu
cd "$(dirname "$0")"
version=1.37.2 helm=v4.3.1 kwok=v0.8.0
tools=${XDG_CACHE_HOME:-$HOME/.cache}/gateway-tests/kubernetes-$version
mkdir -p "$tools"
tools=$(cd "$tools" && pwd)
export CGO_ENABLED=0 GOFLAGS=-buildvcs=false GOTOOLCHAIN=auto

# Programs are built in a temporary directory and moved into place, so that an aborted build leaves none incomplete.
built() { mv "$tools/.new/$1" "$tools/$1"; }
rm -rf "$tools/.new"
mkdir "$tools/.new"
base=k8s.io/component-base/version minor=${version#*.}
about="-s -w -X $base.gitVersion=v$version -X $base.gitMajor=1 -X $base.gitMinor=${minor%.*}"
for program in kube-apiserver kube-controller-manager kube-scheduler kubectl; do
  [ -x "$tools/$program" ] && continue
  go build -trimpath -ldflags "$about" -o "$tools/.new/$program" "k8s.io/kubernetes/cmd/$program"
  built $program
done
if [ ! -x "$tools/etcd" ]; then
  (cd etcd && go build -trimpath -ldflags "-s -w" -o "$tools/.new/etcd" go.etcd.io/etcd/server/v3)
  built etcd
fi
for module in "kwok sigs.k8s.io/kwok/cmd/kwok@$kwok" "helm helm.sh/helm/v4/cmd/helm@$helm"; do
  program=${module%% *}
  [ -x "$tools/$program" ] && continue
  GOBIN="$tools/.new" go install "${module#* }"
  built "$program"
done
rm -rf "$tools/.new"
echo "$tools"
