#!/usr/bin/env bash
# ray 2.55.1, Linux: worker processes, of tasks and actors alike, run with niceness 15, whatever the
# driver's. Beside other programs of the usual priority a worker gets next to no processor time.
#
# Guess before: child processes that do the work have the priority of the program that starts them, as
# with multiprocessing and concurrent.futures.
#
# Seen: driver 0, task 15, actor 15; with RAY_worker_niceness=0 in the environment before ray.init: 0, 0, 0.
# With as many busy loops at priority 0 as twice the cores, an actor that trains got 2 % of a core.
#
# Matters wherever training on Ray shares a machine: what looks like a hang is a lack of priority. Exits
# with 0 if this is still so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ray==2.55.1
cat > "$folder/driver.py" <<'PYTHON'
import json
import os

import ray


@ray.remote
def task():
    return os.getpriority(os.PRIO_PROCESS, 0)


@ray.remote
class Actor:
    def priority(self):
        return os.getpriority(os.PRIO_PROCESS, 0)


ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
own = os.getpriority(os.PRIO_PROCESS, 0)
print(json.dumps([own, *ray.get([task.remote(), Actor.remote().priority.remote()])]))
PYTHON
cat > "$folder/check.py" <<'PYTHON'
import json
import os
import subprocess
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
seen = []
for settings in ({}, {"RAY_worker_niceness": "0"}):
    printed = subprocess.run(
        [sys.executable, sys.argv[1]], env=os.environ | settings, timeout=120, check=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ).stdout
    seen.append(json.loads(printed.strip().splitlines()[-1]))
    print("niceness of driver, task, actor:", seen[-1], settings or "")
own = seen[0][0]
sys.exit(seen != [[own, own + 15, own + 15], [own, own, own]])
PYTHON
if "$folder/venv/bin/python" "$folder/check.py" "$folder/driver.py"; then
    echo "as described: ray 2.55.1"
else
    echo "changed: see above"
    exit 1
fi
