"""A plain step from shapes: against transformers on fake tensors, and against the paper's table."""

import collections
import csv
import json
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining
from transformers.models.wav2vec2 import modeling_wav2vec2

from common import command
from common.errors import UsageError
from ssl_core.paper import table2, table2_report
from ssl_core.paper.plain_step import (
    Accelerator,
    PlainPrecision,
    kept_activations,
    parameter_counts,
    plain_operations,
    plain_step,
    position_weights,
)
from ssl_core.plan import main
from ssl_core.planning.decision import Decision, Option
from ssl_core.planning.device_profiles import known_profiles
from ssl_core.planning.parts import ALLOCATOR, Estimate
from ssl_core.wav2vec2.config import ModelConfig, preset

pytestmark = pytest.mark.usefixtures("shared_estimates")

MIB = 2**20
BASE, TINY = preset("base"), preset("tiny")
PAPER = Path(__file__).parents[2].parent / "shared" / "paper" / "table2.csv"


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.follow(leaf)
        return result


def mask_by_where(
    model: Any, states: torch.Tensor, mask_time_indices: torch.Tensor, **_: Any
) -> torch.Tensor:
    """transformers' masking, which counts masked frames, without the count."""
    embedding = model.masked_spec_embed.to(states.dtype)
    return torch.where(mask_time_indices[..., None], embedding, states)


def transformers_step(
    config: ModelConfig, samples: int, batch: int, device: str, mixed: bool
) -> tuple[int, int, int]:
    """transformers' loss on fake tensors, backward too on a CPU.

    Returns:
        Bytes above the parameters that autograd keeps, and at most; operations.
    """
    if device == "cuda" and torch.__version__ < "2.11":
        pytest.skip("before torch 2.11 a fake CUDA tensor asks for the driver")
    live, counter = Live(), FlopCounterMode(display=False)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.device(device),
        mock.patch.object(modeling_wav2vec2.torch, "FloatTensor", torch.empty),
        mock.patch.object(torch.Tensor, "__bool__", return_value=False),
        mock.patch.object(modeling_wav2vec2.Wav2Vec2Model, "_mask_hidden_states", mask_by_where),
    ):
        settings = config.to_hf() | {"layerdrop": 0.0}
        del settings["torch_dtype"]
        model = Wav2Vec2ForPreTraining(
            Wav2Vec2Config(**settings, attn_implementation="eager")
        ).train()
        # made on the CPU whatever the device
        model.wav2vec2.masked_spec_embed = torch.nn.Parameter(torch.empty(config.hidden_size))
        frames = config.frames(samples)
        waveform = torch.zeros(batch, samples)
        masked = torch.zeros(batch, frames, dtype=torch.long)
        negatives = torch.zeros(batch, frames, config.num_negatives, dtype=torch.long)
        for parameter in model.parameters():
            live.follow(parameter)
        before = live.now
        with counter, live:
            # torch.autocast turns itself off where there is no GPU.
            torch.set_autocast_enabled(device, mixed)
            torch.autocast_increment_nesting()
            try:
                loss = model(
                    waveform, mask_time_indices=masked, sampled_negative_indices=negatives
                ).loss
            finally:
                torch.set_autocast_enabled(device, False)
                torch.autocast_decrement_nesting()
                torch.clear_autocast_cache()
            kept = live.now - before
            if device == "cpu":
                loss.backward()
    return kept, live.most - before, int(counter.get_total_flops())


@pytest.mark.parametrize(
    ("config", "seconds", "batch", "accelerator", "precision"),
    [
        (BASE, 1, 4, "cpu", "fp32"),
        (BASE, 15, 1, "cpu", "fp32"),
        (BASE, 5, 2, "cuda", "fp32"),
        (BASE, 5, 2, "cuda", "mixed"),
        (BASE, 15, 1, "cuda", "mixed"),
        (TINY, 5, 2, "cpu", "fp32"),
        (TINY, 5, 2, "cuda", "mixed"),
    ],
)
def test_what_transformers_keeps(
    config: ModelConfig,
    seconds: int,
    batch: int,
    accelerator: Accelerator,
    precision: PlainPrecision,
) -> None:
    mixed = precision == "mixed"
    kept, most, _ = transformers_step(config, seconds * 16_000, batch, accelerator, mixed)
    estimate = sum(
        kept_activations(config, seconds * 16_000, batch, precision, accelerator).values()
    )
    parameters, copied = parameter_counts(config)
    if mixed:
        estimate += 2 * copied
    assert abs(estimate - kept) < 0.3 * MIB
    if accelerator == "cpu":
        peak = plain_step(config, seconds, batch, precision, "cpu", allocator=0).total
        assert most <= peak - 12 * parameters < 1.05 * most + MIB


def test_parameters() -> None:
    assert parameter_counts(BASE) == (95_044_608, 90_202_752)
    assert parameter_counts(TINY) == (1_956_608, 1_796_928)


def test_operations_are_those_of_torchs_counter_less_what_it_counts_twice() -> None:
    *_, counted = transformers_step(BASE, 5 * 16_000, 4, "cpu", mixed=False)
    assert counted == 1_005_158_719_488
    # The weight gradient of the convolution in 16 groups is counted once for each of them.
    again = (16 - 1) * 2 * 4 * 250 * position_weights(BASE)
    assert plain_operations(BASE, 5, 4) == counted - again == 863_600_959_488


def test_the_packaged_table_is_the_papers() -> None:
    if not PAPER.exists():
        pytest.skip("no ../shared/paper/table2.csv")
    packaged = Path(table2.__file__).with_name("table2.csv").read_text(encoding="utf-8")
    source, _, table = packaged.partition("\n")
    assert source.startswith("#")
    assert list(csv.reader(table.splitlines())) == list(
        csv.reader(PAPER.read_text(encoding="utf-8").splitlines())
    )


def test_the_table_has_its_140_cells() -> None:
    cells = table2.paper_cells()
    assert collections.Counter(cell.outcome for cell in cells) == {"fits": 89, "oom": 51}
    assert all((cell.seconds is None) == (cell.outcome == "oom") for cell in cells)
    assert {cell.device for cell in cells} == set(table2.DEVICES) <= set(known_profiles())


def test_a_plain_step_comes_out_as_in_the_paper_in_every_cell() -> None:
    profiles = known_profiles()
    wrong = [
        cell
        for cell in table2.paper_cells()
        if table2.outcome(cell, profiles[cell.device]) != cell.outcome
    ]
    assert not wrong
    assert sum(count.agree for count in table2.agreement().values()) == 140


def test_no_cell_is_nearer_to_wrong_than_two_per_cent() -> None:
    found = table2.calibrate(table2.DEVICES)
    assert found.allocator == ALLOCATOR == 0.435
    assert found.fraction == pytest.approx(0.6153, abs=1e-4)
    assert found.margin == pytest.approx(0.0248, abs=1e-4)


@pytest.mark.parametrize(
    ("devices", "counts"),
    [
        (("rtx2080ti", "jetson-xavier-nx"), (40, 20, 40, 40)),
        (("rtx2080ti", "jetson-xavier-agx"), (40, 20, 39, 40)),
        (("rpi4", "jetson-xavier-nx"), (39, 20, 40, 40)),
        (("rpi4", "jetson-xavier-agx"), (38, 20, 39, 40)),
        (("jetson-xavier-nx", "jetson-xavier-agx"), (39, 20, 40, 40)),
    ],
)
def test_two_devices_predict_the_others(devices: tuple[str, ...], counts: tuple[int, ...]) -> None:
    found, agreement = table2.split(devices)
    assert tuple(agreement[device].agree for device in table2.DEVICES) == counts
    assert found.margin > 0.03


def test_calibration_needs_devices_of_the_table() -> None:
    with pytest.raises(UsageError, match="calibrate on some of"):
        table2.calibrate(["rpi5-8gb"])
    with pytest.raises(UsageError, match="at least one of jetson-xavier-nx"):
        table2.split(["rtx2080ti", "rpi4"])


def test_the_dagger() -> None:
    """10 s x 2 in fp32 fits the 8 GB Pi but not the 8 GB NX."""
    profiles = known_profiles()
    cells = {
        cell.device: cell
        for cell in table2.paper_cells()
        if (cell.length, cell.batch, cell.precision) == (10, 2, "fp32")
    }
    assert table2.outcome(cells["rpi4"], profiles["rpi4"]) == "fits"
    assert table2.outcome(cells["jetson-xavier-nx"], profiles["jetson-xavier-nx"]) == "oom"


def test_growth_from_1_to_15_seconds() -> None:
    rows = table2_report.figure2_rows()
    memory = {b: round(x, 2) for b, x in table2_report.growth(rows, "bytes").items()}
    assert memory == {1: 1.6, 2: 2.47, 4: 4.2, 8: 7.2, 12: 9.05}
    operations = table2_report.growth(rows, "operations")
    assert all(round(times, 2) == 16.58 for times in operations.values())
    # The paper's "1 s" and "15 s" crops last 1.1 and 15.8 s on average.
    times = plain_operations(BASE, 15.8, 1) / plain_operations(BASE, 1.1, 1)
    assert times == pytest.approx(15.92, abs=0.01)


def test_the_parts_add_up_and_are_named() -> None:
    estimate = plain_step(BASE, 5, 4, "fp32", "cuda", runtime=MIB)
    assert estimate.parts["runtime"] == MIB
    assert estimate.parts["parameters"] == 4 * 95_044_608
    assert estimate.parts["optimizer state"] == 8 * 95_044_608
    assert estimate.parts["transients"] == 4 * 249 * (12 * 640 * 128 + 16 * 512)
    moving = sum(estimate.parts.values()) - MIB - 12 * 95_044_608 - estimate.parts["allocator"]
    assert estimate.parts["allocator"] == int(0.435 * moving)


def test_the_command_writes_table_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def quick(decision: Decision) -> Option:
        return Option(decision.plan, Estimate({"imports": decision.runtime, "all": 7}), 1.0)

    # The real ones are in test_memory.
    monkeypatch.setattr(
        Decision, "chosen", property(lambda own: None if own.plan.batch == 12 else quick(own))
    )
    monkeypatch.setattr(Decision, "leanest", property(quick))
    assert main(["--table2", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "140 of 140" in printed
    assert printed.rstrip().endswith(str(tmp_path))
    result = json.loads((tmp_path / "table2.json").read_text())
    assert result["agree"] == len(result["cells"]) == 140
    fits = [row["batch"] != 12 for row in result["cells"]]
    assert [row["planned"] == "fits" for row in result["cells"]] == fits
    assert all(row["planned_bytes"] == 7 for row in result["cells"])
    assert (tmp_path / "table2.png").stat().st_size > 10_000
    assert main(["--figure2", "--json", "--output", str(tmp_path)]) == 0
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 20
    assert (tmp_path / "figure2.png").stat().st_size > 10_000
    assert main(["--list", "--json"]) == 0
    names = [device["name"] for device in json.loads(capsys.readouterr().out)["devices"]]
    assert names == [*known_profiles(), "auto"]


def test_the_command_asks_for_one_thing() -> None:
    for arguments in ([], ["--list", "--table2"], ["--tabel2"]):
        with pytest.raises(SystemExit) as caught:
            command.run(lambda _, words=arguments: main(words))  # type: ignore[misc]
        assert caught.value.code == 2
