"""`benchmarks.gpu` without a GPU: a dry run, its order, its budget and its refusals."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_turns
from benchmarks.gpu_checks import SameCodes
from benchmarks.gpu_jobs import Cell, GpuJob
from benchmarks.gpu_worker import measure
from common.errors import UsageError
from common.units import Names, Seconds

JOB = GpuJob(variant="graph", cells=(Cell(5.0, 12),), steps=10, dry=False)


@pytest.mark.slow
def test_a_dry_run_measures_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    words = ["--dry-run", "--steps=1", "--cells=0.4sx2", "--variants=graph,checks"]
    assert gpu.main([*words, f"--output={path}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(printed[-1])
    assert json.loads(path.read_text()) == found
    (row,) = found["cells"]
    assert (row["cell"], row["variant"], row["not_run"]) == ("0.4s x 2", "graph", None)
    assert row["ms"]["median"] > 0
    assert row["gemm_fraction"] > 0
    assert row["peak_gib"] is None  # no GPU
    assert row["launches"] is None
    assert found["checks_not_run"] is None
    checks = {each.pop("what"): each for each in found["checks"]}
    assert not [each["failure"] for each in checks.values() if "failure" in each]
    assert found["plans"]["0.4s x 2"].keys() == {"gflop", "predicted_gib", "leanest_gib"}
    errors = checks["gradient_error"]
    assert errors["codes_pinned"]
    assert 0 < errors["bf16"] < 0.05
    assert errors["fp32_plain_kernels"] == errors["fp32_again"] == 0
    bytes_of = checks["same_bytes"]
    assert [key for key, value in bytes_of.items() if value is True] == [
        "eager_twice", "graph_twice", "graph_as_eager", "resumed",
        "graph_as_eager_with_layerdrop_and_accumulation",
    ]  # fmt: skip


@pytest.mark.slow
def test_transformers_warms_up_and_then_takes_timed_updates() -> None:
    job = GpuJob(variant="transformers_eager", cells=(Cell(0.4, 2),), steps=2, dry=True)
    steps = measure(job)
    assert next(steps)["warm_up_s"] > 0
    reply = next(steps)
    assert 0 < reply["ms"]["min"] <= reply["ms"]["median"]
    assert 4 <= reply["timed_updates"] <= 10


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device"):
        gpu.main([])


def test_a_budget_that_is_used_up_is_a_reason() -> None:
    settings = gpu.GpuSettings(dry_run=True, cells=Names(("5sx12", "1sx96")), budget=Seconds(1))
    jobs = gpu.jobs_of(settings)
    turns = gpu_turns.Turns(0.0, 60.0, 2, lambda _: None)
    turns.run(jobs)
    found = gpu.results_of(turns, jobs, {})
    assert turns.workers == []
    reason = "the budget of 0 s was used up before"
    assert [row["not_run"] for row in found["cells"]] == [reason] * 4
    assert {row["ms"] for row in found["cells"]} == {None}
    assert found["checks_not_run"] == reason
    assert gpu.table_of(found["cells"]).row_count == 4


def test_what_is_too_large_for_the_gpu_is_not_started() -> None:
    turns = gpu_turns.Turns(0.0, 20.0, 2, lambda _: None)
    large = dataclasses.replace(JOB, cells=(Cell(15.0, 48),))
    turns.run([large])
    assert turns.not_run[large] == "it may take 28 GiB of the GPU's memory, of which 20 can be used"


def test_a_wave_is_what_fits_in_order() -> None:
    cells = (Cell(5.0, 12), Cell(15.0, 48), Cell(1.0, 96))
    small, large, other = (dataclasses.replace(JOB, cells=(cell,)) for cell in cells)
    assert [round(gpu_turns.needed_gib(job), 2) for job in (small, large, other)] == [
        5.1, 28.2, 6.36,
    ]  # fmt: skip
    assert gpu_turns.next_wave([small, large, other], 20.0, 3) == [small, other]
    assert gpu_turns.next_wave([small, large, other], 72.0, 3) == [small, large, other]
    assert gpu_turns.next_wave([small, large, other], 72.0, 2) == [small, large]


def test_the_first_cell_and_what_compiles_come_first() -> None:
    jobs = gpu.jobs_of(gpu.GpuSettings(cells=Names(("5sx12", "15sx12"))))
    assert [job.name for job in jobs] == [
        "graph 5s x 12", "transformers_compiled 5s x 12", "eager 5s x 12",
        "transformers_eager 5s x 12", "plain 5s x 12", "graph 15s x 12",
        "transformers_compiled 15s x 12", "checks", "eager 15s x 12", "transformers_eager 15s x 12",
    ]  # fmt: skip
    assert jobs[7].cells == (Cell(5.0, 12), Cell(15.0, 12))


def test_rates_follow_from_times() -> None:
    measured = {
        "ms": {"min": 8.0, "median": 10.0}, "latency_ms": {"min": 9.0, "median": 12.0},
        "timed_updates": 5, "peak_gib": 3.0, "reserved_gib": 4.0, "gemm_tflops": 800.0,
        "launches": {"kernels": 690, "copies": 4},
    }  # fmt: skip
    row = gpu.row_of(JOB, measured, {"gflop": 2400.0, "predicted_gib": 2.5}, 800.0)
    assert row["audio_s_per_s"] == 6000  # 60 s of audio in 10 ms
    assert row["measured_of_predicted"] == 1.2
    assert row["gemm_fraction"] == pytest.approx(0.3)  # 240 of 800 TFLOP/s
    assert row["paper_run_days"] == pytest.approx(300_000 * 1.6 * 3600 / 6000 / 86400)
    peer = dataclasses.replace(JOB, variant="transformers_compiled")
    theirs = gpu.row_of(peer, measured, {"gflop": 2400.0, "predicted_gib": 2.5}, 800.0)
    assert theirs["audio_s_per_s"] == 7500  # the least time counts
    assert theirs["predicted_gib"] is None


def test_codes_are_those_of_the_first_time() -> None:
    codes, logits = SameCodes(), torch.tensor([[1.0, 2.0], [4.0, 3.0]])
    with codes:
        assert logits.argmax(-1).tolist() == [1, 0]
        codes.repeat()
        assert (-logits).argmax(-1).tolist() == [1, 0]
    assert codes.changed == 1


@pytest.mark.parametrize("text", ["5s", "12", "5sx0", "x12", "5sxtwo"])
def test_a_cell_is_a_length_and_a_batch(text: str) -> None:
    assert gpu.parse_cell("5s x 12") == gpu.parse_cell("5sx12") == Cell(5.0, 12)
    with pytest.raises(UsageError, match="is not a length and a batch"):
        gpu.parse_cell(text)
