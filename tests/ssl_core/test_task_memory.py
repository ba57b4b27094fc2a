"""What fine-tuning a task takes is known before, for every task, frozen and unfrozen."""

import dataclasses
import json
from pathlib import Path

import pytest

from common.errors import UsageError
from common.units import Size
from ssl_core.downstream.task_recipe import Head, recipe_of, tasks
from ssl_core.downstream.task_work import LABELS, TaskWork, task_work
from ssl_core.paper import table3_report
from ssl_core.paper.plain_step import backbone_parameters, plain_task_step
from ssl_core.paper.table3 import paper_task_cells, task_need, trace_head
from ssl_core.plan import main
from ssl_core.planning.advice import Request, advise
from ssl_core.planning.advice_report import explain
from ssl_core.planning.decision import Decision
from ssl_core.planning.device_profiles import find_profile
from ssl_core.planning.estimate import estimate
from ssl_core.planning.ladder import describe, fallbacks, ladder
from ssl_core.planning.measure import measure
from ssl_core.planning.operation_count import count_operations
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.trace import trace
from ssl_core.wav2vec2.config import preset

pytestmark = pytest.mark.usefixtures("shared_estimates")

TINY, BASE = preset("tiny"), preset("base")
PLAN = Plan(length=2.0, batch=4)
MIB = 2**20
PAPER = Path(__file__).parents[2].parent / "shared" / "paper" / "table3.csv"


def work(head: Head = "mean-linear", **changes: object) -> TaskWork:
    """A task of few units, so that it is traced and measured quickly."""
    found = recipe_of("asr" if head.endswith("ctc") else "kws12")
    recipe = dataclasses.replace(found, head=head, lstm_layers=1, lstm_units=64)
    return TaskWork(**{"architecture": TINY, "recipe": recipe, "labels": 12, **changes})  # type: ignore[arg-type]


def peak(of: TaskWork, plan: Plan = PLAN) -> int:
    return trace(of, plan).peak


def test_every_task_has_its_labels() -> None:
    assert sorted(LABELS) == list(tasks())


@pytest.mark.parametrize("head", ["mean-linear", "x-vector", "linear-ctc", "lstm-ctc"])
def test_a_frozen_backbone_takes_less(head: Head) -> None:
    frozen, unfrozen = work(head), work(head, share="backbone")
    parts = estimate(frozen, PLAN).parts
    assert {"imports", "parameters", "optimizer state", "activations", "libraries"} <= set(parts)
    assert min(parts.values()) > 0
    state = trace(frozen, PLAN).peak_parts["optimizer state"]
    trained = trace(unfrozen, PLAN).peak_parts["optimizer state"]
    # Each tensor is rounded up to a page.
    assert state == pytest.approx(8 * frozen.trained_parameters(), rel=0.1, abs=4096 * 20)
    assert trained == pytest.approx(8 * unfrozen.trained_parameters(), rel=0.15)
    assert peak(frozen) < 0.8 * peak(unfrozen)


def test_what_is_shared_takes_what_is_trained() -> None:
    lora = work(share="lora", lora_rank=4)
    layers = work(share="layers", shared_layers=1)
    sizes = [w.trained_parameters() for w in (work(), lora, layers, work(share="backbone"))]
    assert sizes == sorted(set(sizes))
    assert peak(work()) < peak(lora) < peak(work(share="backbone"))


def test_features_are_computed_before_a_head_is_trained_on_them() -> None:
    parts = trace(work(cached=True), PLAN).peak_parts
    # 20 clips of 2 s are taken through the backbone together, more than the 4 of an update.
    assert parts["computing features"] > 0
    assert peak(work(cached=True)) > peak(work())
    longer = dataclasses.replace(PLAN, length=40.0, batch=1)
    assert peak(work(cached=True), longer) == pytest.approx(peak(work(), longer), rel=0.1)


@pytest.mark.parametrize("head", ["x-vector", "lstm-ctc"])
@pytest.mark.parametrize("share", ["none", "backbone"])
def test_micro_batches_take_less(head: Head, share: str) -> None:
    task = work(head, share=share)
    sizes = [peak(task, dataclasses.replace(PLAN, batch=16, micro_batch=n)) for n in (0, 4, 1)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.8 * sizes[0]


def test_texts_take_memory_by_their_length() -> None:
    short = trace_head(work("linear-ctc"), Plan(length=1.0, batch=4))["activations"]
    long = trace_head(work("linear-ctc"), Plan(length=4.0, batch=4))["activations"]
    # Frames times symbols in CTC's table, both four times as many.
    assert long > 4 * short


def test_operations_of_a_task() -> None:
    frozen, unfrozen = (count_operations(work(share=s), PLAN) for s in ("none", "backbone"))
    assert 2 * frozen < unfrozen < 4 * frozen
    head = count_operations(work("lstm-ctc"), PLAN) - frozen
    frames, width, units = 4 * TINY.frames(PLAN.samples), TINY.hidden_size, 64
    lstms = 2 * 3 * 2 * frames * 4 * units * (width + units)
    assert head == pytest.approx(lstms, rel=0.05)


def test_the_ladder_of_a_frozen_task_only_splits() -> None:
    rungs = ladder(dataclasses.replace(PLAN, batch=8), work())
    assert [plan.micro_batch for _, plan in rungs] == [0, 4, 2, 1, 1]
    assert [plan.keep_freed_memory for _, plan in rungs] == [True] * 4 + [False]
    assert not any(plan.recompute_layers or plan.keep_attention for _, plan in rungs)


def test_the_ladder_of_an_unfrozen_task() -> None:
    task = work(share="backbone")
    plan = dataclasses.replace(PLAN, batch=8)
    rungs = [rung for _, rung in ladder(plan, task)]
    slowdowns = [rung.slowdown for rung in ladder(plan, task)]
    assert slowdowns == sorted(slowdowns)
    assert rungs[0].keep_attention
    assert not any(rung.apply_in_backward or rung.recompute_features for rung in rungs)
    free = dataclasses.replace(
        task, recipe=dataclasses.replace(task.recipe, clip_norm=0.0, train_extractor=True)
    )
    rungs = [rung for _, rung in ladder(plan, free)]
    assert rungs[0].apply_in_backward
    assert any(rung.recompute_features for rung in rungs)
    for rung in rungs:
        free.validate(rung)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1.0, 5.0])
def test_the_fastest_plan_of_a_task_that_fits_is_chosen(length: float) -> None:
    task, plan = work(share="backbone"), Plan(length=length, batch=8)
    rungs = [rung for _, rung in ladder(plan, task)]
    sizes = [estimate(task, rung).total for rung in rungs]
    option = Decision(task, plan, sizes[3] + 1, 505 * MIB).require()
    # Of crops as short as 1 s, micro-batches take more than they save.
    number = 3 if length > 1 else 0
    assert option.plan == rungs[number]
    assert option.estimate.total == sizes[number] == min(sizes[: number + 1])
    assert describe(option.plan, "clips").startswith(("8 at once", "2 of 8 clips")[length > 1])
    assert fallbacks(option.plan, task) == rungs[number + 1 :]
    least = Decision(task, plan, available=0).leanest.estimate.total
    assert least == min(sizes)
    decision = Decision(task, plan, least - MIB)
    assert decision.chosen is None
    with pytest.raises(
        UsageError, match=rf"8 clips of {length:g}s: nothing fits: .* 1 MiB more .* clips"
    ):
        Decision(task, plan, least - MIB, 505 * MIB).require()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "unfrozen", "cached", "changes"),
    [
        ("emotion", False, False, {}),
        ("emotion", False, True, {"keep_freed_memory": False}),
        ("speaker", True, False, {"micro_batch": 1}),
        ("slots", True, False, {"precision": "bf16"}),
    ],
)
def test_the_measured_peak_of_a_task_is_below_the_estimate(
    task: str, unfrozen: bool, cached: bool, changes: dict[str, object]
) -> None:
    of = task_work(task, TINY, unfrozen=unfrozen, cached=cached)
    plan = dataclasses.replace(Plan(length=2.0, batch=2, threads=1), **changes)  # type: ignore[arg-type]
    found = measure(of, plan)
    expected = estimate(of, plan, found.imports)
    assert 0.85 * expected.total < found.peak <= expected.total


@pytest.mark.slow
def test_a_footprint_is_sampled() -> None:
    plan = Plan(length=1.0, batch=2, threads=1)
    found = measure(task_work("kws12", TINY, unfrozen=False), plan, updates=4, sample=0.02)
    assert len(found.footprint) > 2
    assert max(size for _, size in found.footprint) <= found.peak


def test_the_table_is_the_papers() -> None:
    cells = paper_task_cells()
    assert len(cells) == 30
    assert sum(cell.outcome == "oom" for cell in cells) == 4
    assert {(cell.batch, cell.length) for cell in cells if cell.task == "asr"} == {(6, 12.69)}
    if PAPER.exists():
        lines = PAPER.read_text().splitlines()[1:]
        assert [line.split(",")[3] for line in lines] == [cell.backbone for cell in cells]
        assert [line.split(",")[5] for line in lines] == [
            "" if cell.seconds is None else f"{cell.seconds:.2f}" for cell in cells
        ]


def test_a_plain_step_has_the_parts_it_must_have() -> None:
    assert backbone_parameters(BASE) == 94_371_712
    head = {"parameters": MIB, "optimizer state": 2 * MIB, "activations": 3 * MIB}
    frozen = plain_task_step(BASE, 1.0, 4, "cpu", head, unfrozen=False)
    unfrozen = plain_task_step(BASE, 5.0, 4, "cpu", head, unfrozen=True)
    assert frozen.parts["optimizer state"] == 2 * MIB
    assert unfrozen.parts["optimizer state"] == 8 * 94_371_712 + 2 * MIB
    assert unfrozen.parts["attention weights"] > 0
    cells = {(c.task, c.backbone): task_need(c, "cpu") for c in paper_task_cells()}
    assert cells["emotion", "frozen"] < cells["emotion", "unfrozen"]


@pytest.mark.slow
def test_the_command_regenerates_table_3_and_figure_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--table3", "--json", "--output", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "table3.json").read_text())
    assert len(result["cells"]) == 30
    assert result["agree"] == 27
    assert result["planned_fits"] == 30
    assert table3_report.table3_table(result["cells"]).row_count == 30
    assert main(["--figure3", "--json", "--output", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["cells"]
    peaks = {(row["task"], row["backbone"]): row["peak"] for row in rows}
    for task in ("kws12", "emotion"):
        assert peaks[task, "frozen"] < 0.6 * peaks[task, "unfrozen"]
    assert (tmp_path / "figure3.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_command_plans_a_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--device", "rpi4", "--model", "tiny", "--task", "kws12", "--length", "1s"]
    assert main([*own, "--unfrozen", "--batch", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["task"], result["backbone"], result["fits"]) == ("kws12", "unfrozen", True)
    assert sum(result["chosen"]["parts"].values()) == result["chosen"]["bytes"]
    assert result["seconds"] > 0
    assert main([*own, "--frozen"]) == 0
    printed = capsys.readouterr().out
    assert "as options: --task kws12 --frozen --batch 32 --precision fp32" in printed
    assert "32 x 1s in fp32" in printed


@pytest.mark.slow
def test_bad_requests_say_what_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"no task 'kws'.*did you mean 'kws"):
        main(["--device", "rpi4", "--task", "kws", "--frozen"])
    with pytest.raises(UsageError, match="say which --task"):
        main(["--device", "rpi4", "--unfrozen"])
    with pytest.raises(UsageError, match="--measure goes with --figure3"):
        main(["--table3", "--measure"])
    with pytest.raises(UsageError, match="makes no frame"):
        main(["--device", "rpi4", "--task", "kws12", "--frozen", "--length", "0.01s"])
    with pytest.raises(UsageError, match="cannot clip"):
        work().validate(dataclasses.replace(PLAN, apply_in_backward=True))
    with pytest.raises(UsageError, match="leave accumulation at 1"):
        work().validate(dataclasses.replace(PLAN, accumulation=2))
    pi = find_profile("rpi4")
    full = dataclasses.replace(pi, memory=Size(pi.memory - 6600 * MIB))
    emotion = task_work("emotion", TINY, unfrozen=False, cached=True)
    request = Request(work=emotion, lengths=(0.5,), batches=(2,))
    advice = advise(full, request)
    assert advice.chosen is None
    assert any("nothing fits rpi4" in line for line in explain(advice))
