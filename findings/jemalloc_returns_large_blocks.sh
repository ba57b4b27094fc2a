#!/usr/bin/env bash
# jemalloc 5.3.0 (as in ray 2.55.1, and in Debian 12 and 13), Linux: the main thread returns each freed
# block of 8 MiB or more to the kernel at once, whatever dirty_decay_ms says, and oversize_threshold does not
# change this. The kernel clears every page again at its next use.
#
# Guess before: freed pages are kept for 10 s (dirty_decay_ms:10000, the default), so a program that frees
# and allocates blocks of the same size over and over touches fresh pages once. Who knows of
# oversize_threshold (8 MiB): with oversize_threshold:0 this is true of larger blocks as well.
#
# Seen: fraction of the pages of 50 blocks, allocated, written and freed in turn, that the kernel cleared:
#                                         4 MiB   16 MiB
#   main thread, defaults                  0.02     1.00
#   main thread, oversize_threshold:0      0.02     1.00
#   main thread, dirty_decay_ms:-1         0.02     0.02
#   other thread, defaults                 0.02     1.00
#   other thread, oversize_threshold:0     0.02     0.02
# The main thread's arena is made before the option is read (github.com/jemalloc/jemalloc/issues/2809,
# mended after 5.3.0). dirty_decay_ms:-1 helps, and sets no bound to what is kept.
#
# Matters for PyTorch on a CPU, whose tensors are that large and made by the main thread. Exits with 0 if
# this is still so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --dest "$folder" ray==2.55.1
library=ray/core/libjemalloc.so
"$folder/venv/bin/python" -m zipfile -e "$folder"/ray-*.whl "$folder/wheel"
cat > "$folder/loop.py" <<'PYTHON'
import ctypes
import resource
import sys
import threading

c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
BLOCKS = 50
PR_SET_THP_DISABLE = 41  # with huge pages a fault clears more than one page
c.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)


def cleared(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(BLOCKS):
        block = c.malloc(size)
        c.memset(block, 1, size)
        c.free(block)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults * resource.getpagesize() / (BLOCKS * size)


def run():
    print(*(f"{cleared(mib << 20):.2f}" for mib in (4, 16)))


if sys.argv[1] == "main":
    run()
else:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
PYTHON
cat > "$folder/check.py" <<'PYTHON'
import os
import subprocess
import sys

KEPT, RETURNED = False, True
CASES = [
    ("main", "", RETURNED),
    ("main", "oversize_threshold:0", RETURNED),
    ("main", "dirty_decay_ms:-1", KEPT),
    ("other", "", RETURNED),
    ("other", "oversize_threshold:0", KEPT),
]
same = True
for thread, options, expected in CASES:
    environment = os.environ | {"LD_PRELOAD": sys.argv[2], "MALLOC_CONF": options}
    words = [sys.executable, sys.argv[1], thread]
    found = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    small, large = map(float, found.stdout.split())
    print(f"{thread} thread, {options or 'defaults'}: 4 MiB {small:.2f}, 16 MiB {large:.2f}")
    same &= small < 0.2 and (large > 0.9 if expected == RETURNED else large < 0.2)
sys.exit(not same)
PYTHON
if "$folder/venv/bin/python" "$folder/check.py" "$folder/loop.py" "$folder/wheel/$library"; then
    echo "as described: jemalloc 5.3.0"
else
    echo "changed: see above"
    exit 1
fi
