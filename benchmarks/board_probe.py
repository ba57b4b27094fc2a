"""Runs on the board, in a process of its own: `python board_probe.py NAME...`.

Names are `about`, `list`, `import:MODULE`, `product:PRECISION:THREADS` and
`step:PRECISION:THREADS`. For each it prints a line of JSON when it starts and one when it is done,
so that the parent knows which one a signal killed. It needs the installed project and nothing of
`benchmarks`.
"""

import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import pkgutil
import platform
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

PROJECT = "shortwave"
OURS = ("common", "partitions", "ssl_core", "fl_client", "fl_server")
"""The project's packages that a device may import."""
AT_HWCAP, ATOMICS = 16, 1 << 8
"""Of Linux' `getauxval` on arm64: an Armv8.0 processor such as Cortex-A72 lacks atomics."""
SAMPLES = 16_000
"""Of each of the two crops of a step: 1 s."""


def modules() -> Iterator[str]:
    """Names of the modules of the base dependencies, then of the project's own."""
    provided = importlib.metadata.packages_distributions()
    for line in importlib.metadata.requires(PROJECT) or []:
        name = _normal(re.split(r"[^\w.-]", line, maxsplit=1)[0])
        if "extra ==" not in line:
            for module, distributions in provided.items():
                usual = module.isidentifier() and not module.startswith("_")
                if usual and name in map(_normal, distributions):
                    yield module
    for package in OURS:
        yield package
        spec = importlib.util.find_spec(package)
        folders = (spec and spec.submodule_search_locations) or []
        for found in pkgutil.walk_packages(folders, f"{package}."):
            if not found.name.endswith("__main__"):
                yield found.name


def about() -> dict[str, Any]:
    """Versions, and what torch takes by default."""
    import torch

    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "blas": blas[1] if blas else None,
        "threads": torch.get_num_threads(),
        "lse_atomics": bool(ctypes.CDLL(None).getauxval(AT_HWCAP) & ATOMICS),
    }


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def product(precision: str, threads: int) -> float:
    """Largest error of a matrix product and a convolution, relative to the largest element.

    Args:
        precision: fp32 or bf16.
        threads: torch's threads.
    """
    import torch

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    a, b = draw(384, 256), draw(256, 320)
    x, w = draw(2, 32, 400), draw(64, 32, 3)
    convolution = torch.nn.functional.conv1d
    pairs = (
        (a @ b, a.double() @ b.double()),
        (convolution(x, w), convolution(x.double(), w.double())),
    )
    return max(float((o.double() - e).abs().max() / e.abs().max()) for o, e in pairs)


def step(precision: str, threads: int) -> float:
    """Loss of one training step of a small `tiny` on noise.

    Args:
        precision: of matrix products.
        threads: torch's threads.
    """
    import dataclasses

    import numpy as np
    import torch

    from ssl_core.planning.step_plan import Plan
    from ssl_core.training.pretraining_recipe import RECIPES
    from ssl_core.training.pretraining_step import PretrainingStep
    from ssl_core.wav2vec2.config import preset
    from ssl_core.wav2vec2.model import PretrainingModel

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = PretrainingModel(dataclasses.replace(preset("tiny"), num_hidden_layers=1))
    plan: Any = Plan(length=1.0, batch=2, precision=precision, threads=threads)  # type: ignore[arg-type]
    taken = PretrainingStep(model, RECIPES["tiny"], plan, seed=0, total_updates=10)
    noise = np.random.default_rng(0).standard_normal((2, SAMPLES), dtype=np.float32)
    report = taken.update([noise], 0)
    return float(report.metrics()["loss"])


def probe(name: str) -> Any:
    """What one name is about; its value, if there is one."""
    kind, *words = name.split(":")
    if kind in ("about", "list"):
        return about() if kind == "about" else list(modules())
    if kind == "import":
        importlib.import_module(words[0])
        return None
    return {"product": product, "step": step}[kind](words[0], int(words[1]))


def main(names: list[str]) -> None:
    """Probe each name, and print lines of JSON."""
    for name in names:
        print(json.dumps({"start": name}), flush=True)
        begin = time.monotonic()
        row: dict[str, Any] = {"done": name}
        try:
            row["value"] = probe(name)
        except (Exception, SystemExit) as error:
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps(row | {"seconds": round(time.monotonic() - begin, 2)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
