"""What is chosen for a device, what is said of it, and what is said when nothing fits."""

import dataclasses
import json
from pathlib import Path

import pytest

from common.errors import UsageError
from common.options import settings_parser
from common.settings import parse
from common.units import Size
from ssl_core.paper.device_seconds import paper_rate, update_seconds
from ssl_core.paper.table2 import paper_cells
from ssl_core.plan import main
from ssl_core.planning.advice import LENGTHS, MATCHED, Request, advise, candidate_lengths
from ssl_core.planning.advice_report import advice_result, explain
from ssl_core.planning.decision import Decision, as_planned
from ssl_core.planning.device import DeviceProfile
from ssl_core.planning.device_profiles import find_profile
from ssl_core.planning.step_plan import Plan
from ssl_core.training.central import CentralSettings
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.wav2vec2.config import preset

pytestmark = pytest.mark.usefixtures("shared_estimates")

TINY = PretrainingWork(architecture=preset("tiny"), recipe=RECIPES["tiny"])
BASE = PretrainingWork(architecture=preset("base"), recipe=RECIPES["base"])
MIB = 2**20
PI, SMALL_PI, TI = (find_profile(name) for name in ("rpi4", "rpi4-2gb", "rtx2080ti"))


def tiny(**changes: object) -> Request:
    given = {"work": TINY, "lengths": (1.0,), "batches": (2,), "seconds": update_seconds}
    return Request(**{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_length_matches_the_task() -> None:
    for task, length in MATCHED.items():
        assert advise(PI, tiny(lengths=candidate_lengths(None, task))).plan.length == length
    with pytest.raises(UsageError, match="no task 'kws'"):
        candidate_lengths(None, "kws")


def test_a_length_that_is_given_is_the_only_candidate() -> None:
    assert candidate_lengths(None) == LENGTHS
    assert candidate_lengths(2.5) == candidate_lengths(2.5, "asr") == (2.5,)
    assert list(candidate_lengths(None, longest=7.0)) == [7.0, 5.0, 1.0]
    assert list(candidate_lengths(None, "speaker", longest=7.0)) == [5.0, 1.0]


@pytest.mark.slow
def test_a_free_length_is_the_longest_that_fits_memory_and_time() -> None:
    assert advise(PI, tiny(lengths=LENGTHS)).plan.length == 15.0
    limited = advise(PI, tiny(lengths=LENGTHS, time_limit=7.0))
    assert limited.plan.length == 10.0
    assert limited.seconds is not None
    assert limited.seconds <= 7.0
    assert "about" in limited.tried[0]
    assert f"skipped: {limited.tried[0]}" in explain(limited)


def test_precision_is_one_of_the_device() -> None:
    assert advise(TI, tiny()).plan.precision == "fp16"
    assert advise(PI, tiny()).plan.precision == "fp32"
    assert "not exact: precision fp16" in explain(advise(TI, tiny()))
    with pytest.raises(UsageError, match="does not multiply in bf16, only in fp32"):
        advise(PI, tiny(precision="bf16"))


def test_messages_take_room_where_they_are_in_the_same_memory() -> None:
    chosen = advise(PI, tiny()).chosen
    assert chosen is not None
    assert chosen.estimate.parts["message buffers"] == 2 * 4 * 1_956_608
    alone, card = advise(PI, tiny(federated=False)).chosen, advise(TI, tiny()).chosen
    assert alone is not None
    assert card is not None
    assert "message buffers" not in alone.estimate.parts | card.estimate.parts


@pytest.mark.slow
def test_when_nothing_fits_what_would_is_named() -> None:
    full = dataclasses.replace(PI, memory=Size(PI.memory - 4700 * MIB))
    request = Request(work=BASE, lengths=(15.0,), batches=(1,))
    advice = advise(full, request)
    assert advice.chosen is None
    assert advice.decision.leanest.estimate.total > full.process_bytes
    assert any(line.startswith("optimizer state in 8 bits") for line in advice.would_fit)
    assert f"would fit: {advice.would_fit[0]}" in explain(advice)
    result = advice_result(advice)
    assert (result["fits"], result["chosen"], result["options"]) == (False, None, "")
    assert result["would_fit"] == list(advice.would_fit)
    auto = dataclasses.replace(request, optimizer_state="auto")
    assert advise(full, auto).chosen is not None


def test_the_options_ask_for_the_same_plan() -> None:
    plan = Plan(length=5.0, batch=4, micro_batch=1, recompute_layers=True, keep_freed_memory=False)
    options = TINY.options(plan)
    assert options == (
        "--length 5s --batch 4 --precision fp32 --micro-batch 1 "
        "--plan.recompute-layers true --plan.keep-freed-memory false"
    )
    parser = settings_parser(CentralSettings)
    settings, _ = parse(
        CentralSettings, parser, ["--model", "tiny", "--device", "cpu", *options.split()]
    )
    assert settings.step_plan() == plan


@pytest.mark.slow
def test_seconds_come_from_the_paper() -> None:
    errors = []
    for cell in paper_cells():
        if cell.seconds is None:
            continue
        precision = "fp32" if cell.precision == "fp32" else "fp16"
        plan = Plan(length=cell.length, batch=cell.batch, precision=precision)  # type: ignore[arg-type]
        found = update_seconds(find_profile(cell.device), BASE, plan)
        assert found is not None
        errors.append(abs(found / cell.seconds - 1))
    assert sorted(errors)[len(errors) // 2] < 0.07
    assert max(errors) < 0.3
    assert paper_rate("rpi4", "mixed") is None
    assert update_seconds(find_profile("phone-4gb"), BASE, Plan()) is None
    twice = update_seconds(find_profile("rpi5-8gb"), BASE, Plan())
    assert twice == pytest.approx((update_seconds(PI, BASE, Plan()) or 0) / 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "precision"), [("rpi4", "fp32"), ("jetson-xavier-nx", "fp16"), ("rtx2080ti", "fp32")]
)
def test_the_largest_cell_of_the_paper_fits_when_it_is_planned(device: str, precision: str) -> None:
    profile: DeviceProfile = find_profile(device)
    plan = Plan(length=15.0, batch=12, precision=precision, device=profile.accelerator)  # type: ignore[arg-type]
    lean = as_planned("leanest", BASE, plan)
    decision = Decision(BASE, lean, profile.process_bytes, profile.clientapp)
    assert decision.chosen is not None
    assert decision.chosen.estimate.total <= profile.process_bytes


@pytest.mark.slow
def test_the_command_plans_explains_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--model", "tiny", "--length", "1s", "--batch", "2"]
    assert main(["--device", "rpi4", *own, "--json", "--output", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "plan.json").read_text())
    assert sum(result["chosen"]["parts"].values()) == result["chosen"]["bytes"]
    assert main(["--device", "rpi4", *own]) == 0
    printed = capsys.readouterr().out
    assert "runner-up" in printed
    assert "as options: --length 1s --batch 2" in printed
    devices = tmp_path / "own.yaml"
    devices.write_text(
        "watch: {description: small, accelerator: cpu, memory: 400MiB, system: 50MiB,\n"
        "  supernode: 100MiB, clientapp: 200MiB, cores: 1, precisions: [fp32]}\n"
    )
    assert main(["--device", "watch", *own, "--devices", str(devices)]) == 1
    assert "nothing fits watch" in capsys.readouterr().out
    with pytest.raises(UsageError, match="did you mean 'rpi4'"):
        main(["--device", "rpi", *own])
