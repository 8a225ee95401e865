"""What a traced graph packs once, and that it computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hf_stompp.ops import (
    binary_linear,
    binary_linear_sign,
    cuda,
    fuses_layer_norm,
    layer_norm_sign,
    pack_bits,
    pack_sign,
)


FEATURES = 300


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def count_operators(graph: torch.fx.Graph) -> Counter[str]:
    names = [str(node.target) for node in graph.nodes if "hf_stompp" in str(node.target)]
    return Counter(name.split(".")[1] for name in names)


def run_compiled(function: Callable, *arguments: Tensor) -> tuple[tuple[Tensor, ...], Counter[str]]:
    """What a function returns when it is compiled, and the operators in its graph."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example: object) -> Callable:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    with torch.no_grad():
        outputs = compiled(*(argument.clone() for argument in arguments))
    (graph,) = graphs
    return outputs, count_operators(graph.graph)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(input: Tensor, threshold: Tensor | None, op: Callable = binary_linear) -> Tensor:
    weight = pack_bits(torch.ones(5, FEATURES))
    last = (None,) if op is binary_linear_sign else ()
    return op(input, threshold, weight, FEATURES, torch.ones(5), None, torch.float32, *last)


def shared(x: Tensor, threshold: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    return tuple(pack_sign(y, threshold.float())[0] for _ in range(3))


def written_between(x: Tensor, threshold: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    first = pack_sign(y, threshold)[0]
    y.neg_()
    return first, pack_sign(y, threshold)[0]


def written_through_a_view(x: Tensor, threshold: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    first = pack_sign(y, threshold)[0]
    y.view(-1)[: x.numel() // 2] = -1
    return first, pack_sign(y, threshold)[0]


def input_written_between(x: Tensor, threshold: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
    first = pack_sign(x, threshold)[0]
    x.neg_()
    return first, pack_sign(x, threshold)[0]


def threshold_written_between(x: Tensor, threshold: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
    first = pack_sign(x, threshold)[0]
    threshold.neg_()
    return first, pack_sign(x, threshold)[0]


def two_thresholds(x: Tensor, threshold: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
    return pack_sign(x, threshold)[0], pack_sign(x)[0], pack_sign(x, vector)[0]


def from_layer_norm(x: Tensor, threshold: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
    output, _ = layer_norm_sign(x, x, vector, vector, 1e-5, threshold)
    return (
        output,
        pack_sign(output, threshold)[0],
        product(output, threshold),
        product(output, threshold, binary_linear_sign),
    )


def layer_norm_written(x: Tensor, threshold: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
    output, _ = layer_norm_sign(x, x, vector, vector, 1e-5, threshold)
    output.neg_()
    return pack_sign(output, threshold)[0], product(output, threshold)


def popcounts_are_read(x: Tensor, threshold: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
    return (*pack_sign(x, threshold), *pack_sign(x, threshold))


CASES = {
    shared: {"pack_sign": 1},
    written_between: {"pack_sign": 2},
    written_through_a_view: {"pack_sign": 2},
    input_written_between: {"pack_sign": 2},
    threshold_written_between: {"pack_sign": 2},
    two_thresholds: {"pack_sign": 3},
    from_layer_norm: {"layer_norm_sign": 1, "binary_linear": 1, "binary_linear_sign": 1},
    layer_norm_written: {"layer_norm_sign": 1, "pack_sign": 1, "binary_linear": 1},
    popcounts_are_read: {"pack_sign": 2},
}


@pytest.mark.parametrize(("function", "operators"), CASES.items(), ids=lambda case: getattr(case, "__name__", ""))
def test_graph_packs_a_tensor_once_for_each_of_its_states_and_thresholds(function, operators) -> None:
    arguments = draw(4, FEATURES), draw(FEATURES, seed=1), draw(FEATURES, seed=2)

    outputs, found = run_compiled(function, *arguments)

    expected = function(*(argument.clone() for argument in arguments))
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    assert found == operators


def test_product_takes_the_bits_of_the_layer_norm_in_front_of_it() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, example: object) -> Callable:
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    arguments = draw(4, FEATURES), draw(FEATURES, seed=1), draw(FEATURES, seed=2)
    with torch.no_grad():
        torch.compile(from_layer_norm, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(*arguments)

    products = [node for node in graphs[0].nodes if "binary_linear" in str(node.target)]
    assert len(products) == 2
    assert all(node.args[0].meta["val"].dtype == torch.uint8 and node.args[1] is None for node in products)


@pytest.mark.parametrize("function", [function for function in CASES if "written" in function.__name__])
def test_trace_that_keeps_in_place_writes_packs_anew_behind_them(function) -> None:
    arguments = draw(4, FEATURES), draw(FEATURES, seed=1), draw(FEATURES, seed=2)

    graph = make_fx(function, tracing_mode="fake")(*(argument.clone() for argument in arguments))

    found, expected = (run(*(argument.clone() for argument in arguments)) for run in (graph, function))
    schemas = [getattr(node.target, "_schema", None) for node in graph.graph.nodes]
    assert any(schema is not None and schema.is_mutable for schema in schemas)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_second_trace_takes_nothing_from_the_first() -> None:
    x, threshold = draw(4, FEATURES), draw(FEATURES, seed=1)
    mode = FakeTensorMode()
    traced = [mode.from_tensor(tensor) for tensor in (x, threshold)]

    graphs = [make_fx(lambda x, t: pack_sign(x, t)[0])(*traced) for _ in range(2)]

    assert [count_operators(graph.graph) for graph in graphs] == [{"pack_sign": 1}] * 2
    assert torch.equal(graphs[1](x, threshold), pack_sign(x, threshold)[0])


@pytest.mark.parametrize("tracing_mode", ["real", "fake"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_trace_leaves_nothing_on_real_tensors(mode, tracing_mode) -> None:
    with mode():
        arguments = draw(4, FEATURES), draw(FEATURES, seed=1), draw(FEATURES, seed=2)
        graph = make_fx(two_thresholds, tracing_mode=tracing_mode)(*arguments)

        assert not any(vars(argument) for argument in arguments)
        assert all(torch.equal(a, b) for a, b in zip(graph(*arguments), two_thresholds(*arguments), strict=True))


def test_kernels_of_a_device_are_loaded_outside_of_the_trace(monkeypatch) -> None:
    class Device:
        native = object()

    monkeypatch.setattr(cuda, "_devices", {})
    monkeypatch.setattr(cuda, "_load", lambda *arguments: Device)
    device = torch.device("cuda", 0)

    compiled = torch.compile(lambda x: x + 1 if fuses_layer_norm(device) else x, fullgraph=True, backend="eager")

    assert compiled(torch.zeros(1)).item() == 1
    assert cuda._devices == {0: Device}
