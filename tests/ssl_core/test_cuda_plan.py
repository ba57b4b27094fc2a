"""Plans for a GPU, without one: memory by part, its allocator, kernels, rungs and refusals."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from common.errors import UsageError
from common.units import Size
from ssl_core.downstream.task_work import task_work
from ssl_core.plan import main
from ssl_core.planning import cuda_trace
from ssl_core.planning.advice import Request
from ssl_core.planning.cuda_allocator import MIB, CachingAllocator
from ssl_core.planning.cuda_trace import WORKSPACE, fused_parts
from ssl_core.planning.device_profiles import find_profile, known_profiles
from ssl_core.planning.estimate import estimate
from ssl_core.planning.kernel_choice import choose, choose_here
from ssl_core.planning.ladder import describe, fallbacks, ladder
from ssl_core.planning.largest_batch import STEP, largest_batch
from ssl_core.planning.parts import RESERVED
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.trace import trace
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.wav2vec2.config import preset
from ssl_core.wav2vec2.model import PretrainingModel

pytestmark = pytest.mark.usefixtures("shared_estimates")

TINY = PretrainingWork(architecture=preset("tiny"), recipe=RECIPES["tiny"])
PLAN = Plan(length=1.0, batch=2, precision="bf16", device="cuda", kernels="fused")


def rounded(*sizes: int) -> int:
    """Bytes that torch counts for tensors of these sizes."""
    return sum(-(-size // 512) * 512 for size in sizes)


def test_parts_have_the_bytes_that_follow_from_the_architecture() -> None:
    parts = fused_parts(TINY, PLAN)
    model = PretrainingModel(TINY.architecture)
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert parts["parameters"] == rounded(*(4 * size for size in sizes))
    # Two moments of each, their steps in one tensor, and a few numbers of the step.
    moments = 2 * rounded(*(4 * size for size in sizes)) + rounded(4 * len(sizes))
    assert moments <= parts["optimizer state"] <= moments + 8 * 512
    config = model.config
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = rounded(6 * hidden * hidden, 6 * hidden, 2 * hidden * hidden)  # q, k and v are one
    layer += 2 * rounded(2 * hidden * inner)
    halves = config.num_hidden_layers * layer
    projection = model.wav2vec2.feature_projection.projection
    for linear in (projection, model.quantizer.weight_proj, model.project_hid, model.project_q):
        halves += rounded(2 * linear.weight.numel(), 2 * linear.bias.numel())
    assert parts["copies in 16 bits"] == halves
    assert parts["input buffers"] == rounded(4 * 2 * 16_000)
    assert parts["cuBLAS workspaces"] == 2 * WORKSPACE == 64 * MIB


def test_a_step_in_fp32_has_no_copies_and_one_in_8_bits_less_state() -> None:
    wide = fused_parts(TINY, dataclasses.replace(PLAN, precision="fp32"))
    assert "copies in 16 bits" not in wide
    rounded_products = fused_parts(TINY, dataclasses.replace(PLAN, precision="tf32"))
    assert sum(rounded_products.values()) == sum(wide.values())
    small = fused_parts(TINY, dataclasses.replace(PLAN, optimizer_state="int8"))
    assert small["optimizer state"] < 0.3 * wide["optimizer state"]


def test_fused_kernels_keep_less_than_those_of_a_cpu() -> None:
    plan = dataclasses.replace(PLAN, length=5.0, batch=4)
    fused = fused_parts(TINY, plan)
    plain = trace(TINY, dataclasses.replace(plan, device="cpu")).peak_parts
    moving = ("activations", "made in the backward pass", "gradients")
    kept = [sum(parts.get(name, 0) for name in moving) for parts in (fused, plain)]
    assert kept[0] < kept[1]
    split = fused_parts(TINY, dataclasses.replace(plan, micro_batch=1))
    sums = rounded(*(4 * p.numel() for p in PretrainingModel(TINY.architecture).parameters()))
    assert split["gradients"] >= 0.99 * sums  # in fp32, while micro-batches add to them


def test_few_micro_batches_tell_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dataclasses.replace(PLAN, batch=9, micro_batch=1)
    few = fused_parts(TINY, plan)
    monkeypatch.setattr(cuda_trace, "_TRACED", 99)
    all_of_them = fused_parts(TINY, plan)
    gaps = (RESERVED, cuda_trace.UNSPLIT)
    for name in all_of_them.keys() - {*gaps}:
        # What is drawn for the whole batch is one tensor, whose size is rounded once.
        assert abs(few[name] - all_of_them[name]) <= 9 * 512, name


def test_the_second_update_needs_no_more_than_the_first() -> None:
    log = cuda_trace.trace_fused(TINY, PLAN)
    begin, end = log.marks
    kept = cuda_trace._held(log.events[begin:end])
    assert not [number for number in kept if log.sizes[number] > 512]


def test_an_estimate_is_of_reserved_memory() -> None:
    found = estimate(TINY, PLAN, runtime=700 * MIB)
    assert found.parts["CUDA context"] == 700 * MIB
    assert found.total == found.allocated + found.parts[RESERVED] + 700 * MIB
    assert (found.total - 700 * MIB) % (2 * MIB) == 0
    plain = estimate(TINY, dataclasses.replace(PLAN, kernels="plain"), runtime=0)
    moving = plain.allocated - plain.parts["parameters"] - plain.parts["optimizer state"]
    assert plain.parts[RESERVED] == int(0.435 * moving)
    assert "copies in 16 bits" not in plain.parts


def test_blocks_and_segments_have_the_sizes_of_torchs_allocator() -> None:
    allocator = CachingAllocator()
    small = allocator.allocate(1)
    assert (allocator.allocated, allocator.reserved) == (512, 2 * MIB)
    middle = allocator.allocate(MIB + 1)
    assert (middle.size, allocator.reserved) == (MIB + 512, 22 * MIB)
    large = allocator.allocate(10 * MIB + 1)
    # What is left of the segment of 20 MiB is 8.999 MiB more than asked for: it is split.
    assert (large.size, allocator.reserved) == (10 * MIB + 512, 22 * MIB)
    allocator.allocate(11 * MIB)
    assert allocator.reserved == 34 * MIB  # one of its own, of a multiple of 2 MiB
    for piece in (small, middle, large):
        allocator.free(piece)
    assert allocator.allocated == 12 * MIB
    allocator.empty_cache()
    assert (allocator.reserved, allocator.peak_reserved) == (12 * MIB, 34 * MIB)


def test_a_rest_of_at_most_1_mib_is_not_split() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(12 * MIB))
    assert allocator.allocate(11 * MIB).size == 12 * MIB
    assert (allocator.allocated, allocator.reserved) == (12 * MIB, 12 * MIB)


def test_the_smallest_free_piece_that_suffices_is_taken_and_joined_again() -> None:
    allocator = CachingAllocator()
    pieces = [allocator.allocate(size * MIB) for size in (30, 14, 20)]
    for piece in pieces:
        allocator.free(piece)
    assert allocator.allocate(13 * MIB).start == pieces[1].start
    first = allocator.allocate(15 * MIB)
    assert first.start == pieces[2].start
    allocator.free(first)
    assert allocator.allocate(20 * MIB).start == pieces[2].start
    assert allocator.reserved == 64 * MIB


def test_a_graphs_pool_is_its_own() -> None:
    allocator = CachingAllocator()
    allocator.free(allocator.allocate(12 * MIB))
    captured = allocator.allocate(12 * MIB, "graph")
    assert allocator.reserved == 24 * MIB
    allocator.free(captured)
    allocator.empty_cache()
    assert allocator.reserved == 12 * MIB  # a graph keeps its memory


def test_rungs_are_those_of_a_gpu() -> None:
    plan = dataclasses.replace(PLAN, batch=8)
    rungs = ladder(plan, TINY)
    slowdowns = [rung.slowdown for rung in rungs]
    assert slowdowns == sorted(slowdowns)
    for rung in rungs:
        TINY.validate(rung.plan)
    assert rungs[0].plan == plan
    assert rungs[1].plan == dataclasses.replace(plan, recompute_features=True)
    assert [rung.plan.micro_batch for rung in rungs[2:5]] == [4, 2, 1]
    assert [rung.plan.graph for rung in rungs] == [True] * 7 + [False] * 2
    assert len(ladder(dataclasses.replace(plan, graph=False), TINY)) == 7
    assert fallbacks(rungs[-2].plan, TINY) == [rungs[-1].plan]
    pooled = dataclasses.replace(
        TINY, recipe=dataclasses.replace(TINY.recipe, negative_pool="batch")
    )
    assert not any(rung.plan.is_split for rung in ladder(plan, pooled))
    assert describe(plan) == "8 at once, fused kernels"
    sizes = [estimate(TINY, rung.plan).total for rung in (rungs[0], rungs[4])]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("unfrozen", [False, True])
def test_tasks_have_plans_for_a_gpu(unfrozen: bool) -> None:
    work = task_work("kws12", preset("tiny"), unfrozen=unfrozen)
    plan = dataclasses.replace(PLAN, batch=4)
    rungs = ladder(plan, work)
    assert all(rung.plan.graph for rung in rungs)  # which a task does not use
    whole, leanest = (estimate(work, rung.plan) for rung in (rungs[0], rungs[-1]))
    assert ("copies in 16 bits" in whole.parts) == unfrozen
    assert leanest.parts["parameters"] == whole.parts["parameters"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_attention": True}, "keep-attention is for a CPU: leave it at false on a GPU"),
        ({"apply_in_backward": True}, "apply-in-backward is for a CPU"),
        ({"keep_freed_memory": False}, "keep-freed-memory is for a CPU: leave it at true"),
        ({"compile": True}, "compile cannot compile fused kernels"),
        ({"kernels": "quick"}, "kernels 'quick' is not one of auto, fused, plain"),
    ],
)
def test_what_means_nothing_on_a_gpu_is_refused(changes: dict[str, object], message: str) -> None:
    plan = dataclasses.replace(PLAN, **changes)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=message):
        plan.validate()
    if "compile" not in changes and "kernels" not in changes:
        dataclasses.replace(plan, device="cpu").validate()


def test_kernels_follow_from_what_the_gpu_can_do() -> None:
    auto = dataclasses.replace(PLAN, kernels="auto")
    assert choose(auto, 9.0) == ("fused", "compute capability 9")
    assert choose(auto, 7.5) == ("plain", "compute capability 7.5 is below 8")
    assert choose(auto, 8.7, triton=False) == ("plain", "there is no Triton")
    compiled = dataclasses.replace(auto, compile=True)
    assert choose(compiled, 9.0) == ("plain", "torch.compile makes its own")
    assert choose(dataclasses.replace(auto, kernels="plain"), 9.0).kernels == "plain"
    with pytest.raises(UsageError, match=r"compute capability 7.5 is below 8; set plan.kernels"):
        choose(PLAN, 7.5)
    if not torch.cuda.is_available():
        assert "is assumed" in choose_here(auto).reason


def test_the_kernels_of_a_device_are_those_of_its_profile() -> None:
    auto = dataclasses.replace(PLAN, kernels="auto")
    chosen = {
        name: profile.with_kernels(auto)[0].kernels
        for name, profile in known_profiles().items()
        if profile.accelerator == "cuda"
    }
    plain = {name for name, kernels in chosen.items() if kernels == "plain"}
    assert plain == {
        "jetson-xavier-nx", "jetson-xavier-agx", "jetson-orin-nano", "jetson-orin-nx",
        "jetson-orin-agx", "rtx2080ti", "v100-16gb", "v100-32gb", "t4",
    }  # fmt: skip
    own = dataclasses.replace(find_profile("t4"), capability=None)
    assert own.with_kernels(auto)[0].kernels == "plain"  # no bf16
    own = dataclasses.replace(find_profile("l4"), capability=None)
    assert own.with_kernels(auto)[0].kernels == "fused"
    with pytest.raises(UsageError, match="capability is that of a GPU"):
        dataclasses.replace(find_profile("rpi4"), capability=8.0).validate()


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    card = dataclasses.replace(find_profile("l4"), memory=Size(1800 * MIB))
    request = Request(work=TINY, lengths=(15.0,))
    batch = largest_batch(card, request)
    assert batch % STEP == 0

    def total(crops: int) -> int:
        plan = dataclasses.replace(PLAN, length=15.0, batch=crops)
        return estimate(TINY, plan, card.clientapp).total

    assert total(batch) <= card.process_bytes < total(batch + STEP)
    assert largest_batch(find_profile("h200"), request) == 384  # an update of the paper
    assert largest_batch(dataclasses.replace(card, memory=Size(card.clientapp + MIB)), request) == 0


def test_a_card_is_planned_with_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "h100", "--model", "tiny", "--length", "15s", "--batch", "12"]) == 0
    printed = capsys.readouterr().out
    assert "h100-80gb: NVIDIA H100" in printed
    assert "12 x 15s in bf16: 12 at once, fused kernels" in printed
    assert "fused kernels: compute capability 9; updates replayed from CUDA graphs" in printed
    assert main(["--device", "t4", "--model", "tiny", "--length", "1s", "--batch", "2"]) == 0
    printed = capsys.readouterr().out
    assert "plain kernels: compute capability 7.5 is below 8" in printed


def test_a_plan_for_a_card_needs_neither_triton_nor_torchs_compiler() -> None:
    """On a laptop whose torch has no Triton; in a process of its own, as it must be imported."""
    code = (
        "import importlib.util, sys\n"
        "real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else real(name, *a)\n"
        "from ssl_core.planning.cuda_trace import fused_parts\n"
        "from ssl_core.planning.step_plan import Plan\n"
        "from ssl_core.training.pretraining_recipe import RECIPES\n"
        "from ssl_core.training.pretraining_work import PretrainingWork\n"
        "from ssl_core.wav2vec2.config import preset\n"
        "work = PretrainingWork(architecture=preset('tiny'), recipe=RECIPES['tiny'])\n"
        f"parts = fused_parts(work, {PLAN!r})\n"
        "assert not {'triton', 'torch._dynamo', 'torch._inductor'} & sys.modules.keys()\n"
        "print(sum(parts.values()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(fused_parts(TINY, PLAN).values())
