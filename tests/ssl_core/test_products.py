"""Products by both libraries, the remembered choice between them, and estimates that follow it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UsageError
from ssl_core.downstream.lora import LoraLinear
from ssl_core.planning.operation_count import count_operations
from ssl_core.planning.step_plan import Plan
from ssl_core.planning.trace import trace
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.wav2vec2.config import preset
from ssl_core.wav2vec2.cpu import onednn, product_library
from ssl_core.wav2vec2.cpu.product_library import BLAS, ONEDNN, VARIABLE, library
from ssl_core.wav2vec2.cpu.products import Linear, add_product, by_onednn, linear, multiply
from ssl_core.wav2vec2.cpu.strided_convolution import activated_convolution
from ssl_core.wav2vec2.feed_forward import FeedForward

Force = Callable[[str], None]


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Force:
    """Choose a library from here on."""

    def choose(name: str) -> None:
        monkeypatch.setenv(VARIABLE, name)
        library.cache_clear()

    return choose


def close(found: Tensor, expected: Tensor) -> None:
    """Equal to an fp64 reference but for fp32 rounding, relative to the largest element."""
    assert found.dtype is torch.float32
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < 2e-6


def wide(rows: int, columns: int, kind: str) -> Tensor:
    """A matrix `[row, column]`: dense, transposed, a part of wider rows, or overlapping rows."""
    if kind == "transposed":
        return torch.randn(columns, rows).t()
    if kind == "part":
        return torch.randn(rows, columns + 24)[:, 8 : columns + 8]
    if kind == "overlapping":
        return torch.randn((rows + 1) * 16 + columns).as_strided((rows, columns), (16, 1), 16)
    if kind == "expanded":
        return torch.randn(1, 1).expand(rows, columns)
    return torch.randn(rows, columns)


KINDS = ("dense", "transposed", "part", "overlapping", "expanded")


@pytest.mark.parametrize("name", [BLAS, ONEDNN])
@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_products_of_any_strides(force: Force, name: str, first: str, second: str) -> None:
    force(name)
    torch.manual_seed(0)
    a, b = wide(150, 96, first), wide(96, 40, second)
    assert by_onednn(a, 150, 40) == (name == ONEDNN)
    expected = a.double() @ b.double()
    close(multiply(a, b), expected)
    out = torch.zeros(150, 64)
    assert multiply(a, b, out=out[:, 8:48]).data_ptr() == out[:, 8:].data_ptr()
    close(out[:, 8:48], expected)
    add_product(out[:, 8:48], a, b)
    close(out[:, 8:48], 2 * expected)
    assert out[:, :8].abs().max() == out[:, 48:].abs().max() == 0


def test_small_products_and_other_types_stay_with_torch(force: Force) -> None:
    force(ONEDNN)
    x = torch.randn(64, 64)
    assert by_onednn(x, 64, 64)
    assert not by_onednn(x, 64, 8)
    assert not by_onednn(x.double(), 64, 64)
    assert not by_onednn(x.bfloat16(), 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, x), F.linear(x, x))
    exact = multiply(x.double(), x.double())
    assert torch.equal(exact, x.double() @ x.double())


@pytest.mark.parametrize("name", [BLAS, ONEDNN])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_and_their_gradients(force: Force, name: str, bias: bool) -> None:
    force(name)
    torch.manual_seed(0)
    layer = Linear(64, 96, bias=bias)
    x = torch.randn(3, 50, 64, requires_grad=True)
    slope = torch.randn(3, 96, 50).transpose(1, 2)
    given = [x, *layer.parameters()]
    double = [value.detach().double().requires_grad_() for value in given]
    expected, found = F.linear(*double), layer(x)
    close(found, expected)
    assert ("_Linear" in type(found.grad_fn).__name__) == (name == ONEDNN)
    slopes = torch.autograd.grad(expected, double, slope.double())
    for one, other in zip(torch.autograd.grad(found, given, slope), slopes, strict=True):
        close(one, other)
    if name == BLAS:
        assert torch.equal(found, F.linear(*given))


def test_only_the_wanted_gradients_of_a_layer_are_computed(force: Force) -> None:
    force(ONEDNN)
    layer = Linear(64, 96).requires_grad_(False)
    x = torch.randn(50, 64, requires_grad=True)
    layer(x).sum().backward()
    close(x.grad, layer.weight.double().sum(0).expand(50, 64))  # type: ignore[arg-type]
    assert layer.weight.grad is layer.bias.grad is None


def test_adapters_and_accumulated_gradients(force: Force) -> None:
    torch.manual_seed(0)
    layer = LoraLinear(Linear(64, 96), 4)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(50, 64)
    found: dict[str, list[Tensor]] = {}
    for name in (BLAS, ONEDNN):
        force(name)
        layer.zero_grad()
        for part in x.split(20):  # the last part is smaller than SMALLEST
            layer(part).square().sum().backward()
        found[name] = [p.grad.double() for p in layer.parameters() if p.grad is not None]
    assert len(found[ONEDNN]) == 4
    for one, other in zip(found[ONEDNN], found[BLAS], strict=True):
        close(one.float(), other)


def gradients(make: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The first tensor that `make` returns, and its gradients to the others."""
    out, *leaves = make()
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn_like(out))]


def convolved() -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 200, 48, requires_grad=True)
    weight = torch.randn(40, 48, 3, requires_grad=True)
    return [activated_convolution(x, weight, 2), x, weight]


def fed_forward() -> list[Tensor]:
    torch.manual_seed(0)
    part, x = FeedForward(preset("tiny"), 0), torch.randn(2, 70, preset("tiny").hidden_size)
    x.requires_grad_()
    return [part(x, None).whole(), x, *part.parameters()]


@pytest.mark.parametrize("make", [convolved, fed_forward])
def test_parts_of_the_network_are_the_same_by_both(
    force: Force, make: Callable[[], list[Tensor]]
) -> None:
    force(BLAS)
    expected = gradients(make)
    force(ONEDNN)
    for one, other in zip(gradients(make), expected, strict=True):
        close(one, other.double())


def measured(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Let the timing choose a library; a list that grows with every timing."""
    timed: list[str] = []

    def choose() -> tuple[str, float]:
        timed.append(name)
        return name, 2.0

    monkeypatch.setattr(product_library, "faster_library", choose)
    return timed


def test_the_choice_is_made_once_for_a_machine(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    first, later = measured(monkeypatch, ONEDNN), library()
    assert (first, later) == ([ONEDNN], ONEDNN)
    other = measured(monkeypatch, BLAS)
    library.cache_clear()  # as in another process
    assert library() == ONEDNN
    assert not other
    (file,) = (cache / "shortwave" / "products").glob("*.json")
    assert json.loads(file.read_text()) == {"library": ONEDNN, "onednn_times_as_fast": 2.0}
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")  # as another processor
    library.cache_clear()
    assert library() == BLAS
    assert other == [BLAS]


@pytest.mark.parametrize("text", ["", '{"library": "on', "[]", '{"library": "other"}'])
def test_a_broken_choice_is_replaced(
    monkeypatch: pytest.MonkeyPatch, cache: Path, text: str
) -> None:
    timed = measured(monkeypatch, ONEDNN)
    library()
    (file,) = (cache / "shortwave" / "products").glob("*.json")
    file.write_text(text)
    library.cache_clear()
    assert library() == ONEDNN
    assert len(timed) == 2
    assert json.loads(file.read_text())["library"] == ONEDNN


def test_without_a_cache_each_process_chooses(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    timed = measured(monkeypatch, ONEDNN)
    cache.write_text("not a folder")
    for _ in range(2):
        library.cache_clear()
        assert library() == ONEDNN
    assert len(timed) == 2


def test_timing_leaves_threads_and_modes_alone() -> None:
    threads = torch.get_num_threads()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        name, ratio = product_library.faster_library()
    assert name == (ONEDNN if ratio >= product_library.FASTER else BLAS)
    assert torch.get_num_threads() == threads


def test_where_onednn_has_no_product_it_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("could not create a primitive descriptor")

    monkeypatch.setattr(onednn, "multiply", refuse)
    assert product_library.faster_library() == (BLAS, 0.0)


def test_a_library_that_is_not_known_is_refused(force: Force) -> None:
    force("mkl")
    with pytest.raises(UsageError, match="SHORTWAVE_PRODUCTS must be blas or onednn, not 'mkl'"):
        library()


def test_estimates_follow_the_choice_and_operations_do_not(force: Force) -> None:
    work = PretrainingWork(architecture=preset("base"), recipe=RECIPES["base"])
    plan = Plan(length=5.0, batch=2, recompute_features=True, micro_batch=1)
    peaks, operations = {}, {}
    for name in (BLAS, ONEDNN):
        force(name)
        peaks[name] = trace(work, plan).peak
        operations[name] = count_operations(work, plan)
    assert operations[ONEDNN] == operations[BLAS]
    assert peaks[BLAS] < peaks[ONEDNN] < 1.05 * peaks[BLAS]
