"""Runs the rounds of a federation on Ray."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from flwr.app import Context, RecordDict

from common.settings import flat
from fl_client.federation_settings import RunSettings
from fl_server.server_app import app as server_app
from simulation.ray_environment import prepare_own_ray
from simulation.supervisor import SUPERVISED
from ssl_core.training.checkpoint import latest
from ssl_core.training.run_directory import RunDirectory


class Processes(NamedTuple):
    """Where the clients are trained."""

    workers: int | None
    """Number of worker processes; None for one per usable core."""
    address: str
    """Of a Ray cluster; empty starts Ray here."""
    words: list[str]
    """The command line."""

    def again(self, settings: RunSettings, path: Path) -> list[str]:
        """The command line that goes on with the run in `path`."""
        if settings.resume:
            return self.words
        count = ["--workers", str(self.workers)] if self.workers else []
        return ["--resume", str(path), *count, *(["--address", self.address] * bool(self.address))]


def run_on_ray(
    settings: RunSettings,
    run: RunDirectory,
    nodes: list[dict[str, Any]],
    size: int,
    processes: Processes,
) -> None:
    """Run the remaining rounds on Ray.

    Args:
        settings: of the run.
        run: its directory.
        nodes: each client's own part of its node config.
        size: bytes of the shared weights.
        processes: where the clients are trained.

    Raises:
        RayFailed: Ray does not work; the run can be resumed.
    """
    if not processes.address:
        prepare_own_ray()
    # Ray reads its environment when it is imported.
    from simulation.ray_grid import SERVER_NODE, RayGrid
    from simulation.ray_runtime import RayFailed, RayLost, RayRuntime
    from simulation.ray_worker import RUN_ID

    plan = settings.step_plan()
    run_config: dict[str, Any] = flat(settings) | {"output": "", "resume": str(run.path)}
    configs: list[dict[str, Any]] = [
        {
            "partition-id": number,
            "num-partitions": settings.clients,
            "simulated": True,
            "state": str(run.path / "clients"),
            **node,
        }
        for number, node in enumerate(nodes)
    ]
    server = {"simulated": True, "manifest": str(nodes[0].get("manifest", ""))}
    context = Context(RUN_ID, SERVER_NODE, server, RecordDict(), dict(run_config))
    runtime = RayRuntime(
        workers=processes.workers,
        most=settings.clients_per_round,
        address=processes.address,
        weights_bytes=size,
        gpu=plan.device.startswith("cuda"),
    )
    SUPERVISED.tell(run=str(run.path), again=processes.again(settings, run.path))
    done = latest(run.checkpoints)
    try:
        SUPERVISED.tell(watch=not processes.address)
        runtime.start()
        grid = RayGrid(run_config, configs, runtime)
        if done is None or not done.name.endswith(f"{settings.rounds:05d}"):
            print(
                f"{settings.rounds} rounds of {settings.clients_per_round} clients, "
                f"{settings.local_updates} updates each, on {runtime.workers} workers "
                f"({plan.precision}, {plan.device}); run directory {run.path}",
                flush=True,
            )
        server_app(grid, context)
    except RayFailed as error:
        if isinstance(error, RayLost) and SUPERVISED.tell(lost=str(error)):
            sys.exit(1)  # the parent starts again
        raise RayFailed(f"{error}; go on with --resume {run.path}") from None
    finally:
        SUPERVISED.tell(watch=False)
        runtime.close()
