#!/usr/bin/env bash
# ray 2.55.1, Linux: after ray.init a driver's own SIGTERM handler, installed with signal.signal before,
# never runs. The process exits with code 15 (or aborts, if workers of its process group end with it), so
# nothing is saved when systemd, Slurm or Docker stop it.
#
# Guess before: a library leaves the driver's handlers alone, or chains to them, as it does with SIGINT,
# for which KeyboardInterrupt is raised as ever.
#
# Seen: handler installed before ray.init: exit 15, handler not called; installed again after ray.init:
# called, exit 0.
#
# Matters for every training that is to save a checkpoint on SIGTERM: install the handler after ray.init.
# Exits with 0 if this is still so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ray==2.55.1
cat > "$folder/driver.py" <<'PYTHON'
import os
import signal
import sys
import time

import ray


def stop(*_):
    print("handler called", flush=True)
    os._exit(0)


signal.signal(signal.SIGTERM, stop)
ray.init(num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
if sys.argv[1] == "again":
    signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
PYTHON
cat > "$folder/check.py" <<'PYTHON'
import os
import signal
import subprocess
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
seen = {}
for when in ("before", "again"):
    driver = subprocess.Popen(
        [sys.executable, sys.argv[1], when],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )
    while driver.stdout.readline().strip() != "ready":
        pass
    driver.send_signal(signal.SIGTERM)
    rest, _ = driver.communicate(timeout=60)
    seen[when] = (driver.returncode, "handler called" in rest)
    print(f"handler installed {when}: exit {seen[when][0]}, called: {seen[when][1]}")
sys.exit(seen != {"before": (15, False), "again": (0, True)})
PYTHON
if "$folder/venv/bin/python" "$folder/check.py" "$folder/driver.py"; then
    echo "as described: ray 2.55.1"
else
    echo "changed: see above"
    exit 1
fi
