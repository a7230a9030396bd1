#!/usr/bin/env bash
# Make a virtual environment and install the pinned dependencies: tools/install.sh FOLDER cpu|gpu
# Environment: PYTHON (interpreter to use), TORCH_ARGS (options of the pip call that installs torch).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1
kind=$2
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { echo "grove: $*"; }

# A name on PATH may be a shim that does not run, or a Python without venv: take the first that proves itself.
runs_grove() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null
}

find_python() {
    local name candidate
    for name in ${PYTHON:-python3.11 python3.12 python3 python}; do
        while read -r candidate; do
            if runs_grove "$candidate"; then
                echo "$candidate"
                return
            fi
        done < <(type -aP "$name")
    done
    return 1
}

make_venv() {
    local python
    # The CPU and the CUDA build of vLLM install the same folder, so one cannot be put over the other.
    if [ ! -e "$venv/.installed-$kind" ] && compgen -G "$venv/.installed-*" >/dev/null; then
        say "$venv was installed for another kind of machine; making it anew"
        rm -rf "$venv"
    fi
    if [ -x "$venv/bin/python" ] && runs_grove "$venv/bin/python"; then
        return
    fi
    if ! python=$(find_python); then
        say "found no ${PYTHON:-python3.11 or python3.12} that runs, is 3.11 or 3.12, and has venv. The pinned" >&2
        say "wheels are for these two versions. Install one (e.g. apt-get install python3.11-venv) or name one:" >&2
        say "make install PYTHON=/path/to/python3.12" >&2
        exit 1
    fi
    say "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
}

# Errors only: the locks leave packages out on purpose, and pip's complaint about them is noise.
pip_install() {
    "$venv/bin/python" -m pip install -qq --no-warn-conflicts "$@"
}

install_packages() {
    pip_install pip==26.3
    if [ "$kind" = gpu ]; then
        say "installing vLLM, Ray, torch and TRL for CUDA: about 230 packages, several GB"
        pip_install --no-compile --no-deps -r requirements/gpu.txt
    else
        say "installing vLLM, Ray, Transformers and TRL for CPU: about 120 packages"
        pip_install --no-compile --no-deps -r requirements/cpu.txt
        say "installing torch"
        # shellcheck disable=SC2086  # TORCH_ARGS is a list of options
        pip_install --no-compile -r requirements/torch.txt ${TORCH_ARGS:-}
    fi
    say "installing the test tools, environments and grove"
    pip_install --no-compile --no-deps -r requirements/dev.txt
    pip_install --no-compile --no-deps --no-build-isolation -r requirements/envs.txt
    pip_install --no-deps --no-build-isolation --editable .
}

# pip would compile on one core, and without bytecode each process of a run spends 12 s more on its imports. Left out
# are large parts that a run does not import; a file that does not compile is a template or for another Python.
compile_bytecode() {
    local skip='/tests?/|/transformers/models/(?!auto|llama|qwen)|/ray/(data|rllib|serve|train|tune)/'
    say "compiling bytecode"
    "$venv/bin/python" -W ignore -m compileall -qq -j 0 -x "$skip" "$venv/lib" >/dev/null || true
}

check() {
    "$venv/bin/python" - "$kind" <<'PYTHON'
import ctypes
import sys

import torch

if sys.argv[1] == "cpu":
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        sys.exit(
            "grove: vLLM for CPU needs the system library libnuma.so.1, which is not on this machine. "
            "Install it (apt-get install libnuma1, dnf install numactl-libs), then run make again."
        )
    if torch.version.cuda:
        print("grove: this torch is the CUDA build, which runs on a CPU and takes 3.6 GB more. For the CPU one name")
        print("grove: PyTorch's CPU wheel index: make clean install TORCH_ARGS='--extra-index-url ...'")
elif not torch.cuda.is_available():
    sys.exit(
        f"grove: nvidia-smi answers but torch {torch.__version__} finds no CUDA device: the driver is older than "
        f"CUDA {torch.version.cuda}, or CUDA_VISIBLE_DEVICES hides the devices. Update the driver, then run make again."
    )
PYTHON
}

make_venv
install_packages
compile_bytecode
check
say "installed in $venv in $SECONDS s"
