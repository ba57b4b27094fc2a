#!/usr/bin/env bash
# nvidia-cublas 13.1.0.3 (what torch 2.11.0's wheels for x86-64 load), Linux, no GPU: loading
# libcublasLt.so.13 writes over 80 MB of memory that belongs to the process alone, before any call.
#
# Guess before: a CUDA library that is never used costs address space and file pages that the kernel can
# drop. Its initialisers fill tables of kernels in zero-initialised memory, which cannot be dropped.
#
# Seen: 148 MiB of private dirty memory after ctypes.CDLL, which binds every symbol at once; 86 MiB in a
# process that imports torch, which does not.
#
# Matters for clients without a GPU: every process that imports torch takes it, a fifth of such an
# import's memory; a CPU-only wheel (arm64 until torch 2.10) does not. Exits with 0 if this is still so
# (above 60 MiB), 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps nvidia-cublas==13.1.0.3
cat > "$folder/load.py" <<'PYTHON'
import ctypes
import pathlib
import sys


def dirty():
    lines = pathlib.Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Private_Dirty"))


before = dirty()
(library,) = pathlib.Path(sys.prefix).rglob("libcublasLt.so.13")
ctypes.CDLL(str(library))
taken = dirty() - before
print(f"loading {library.name}: {taken:.0f} MiB of private dirty memory")
sys.exit(taken < 60)
PYTHON
if "$folder/venv/bin/python" "$folder/load.py"; then
    echo "as described: nvidia-cublas 13.1.0.3"
else
    echo "changed: see above"
    exit 1
fi
