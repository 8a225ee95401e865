"""The operators `torch.ops.hf_stompp.*` as PyTorch sees them: results, transforms, refusals."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

# Importing them registers the operators.
from hf_stompp.ops import binary_linear, binary_linear_sign, cpu, layer_norm_sign, pack_sign, packed_bytes


FLOATS = [torch.float32, torch.bfloat16, torch.float16]
IN_FEATURES, OUT_FEATURES = 300, 70
ROW_BYTES, OUTPUT_BYTES = 64, 32

OPS = {
    "pack_sign": pack_sign,
    "binary_linear": binary_linear,
    "binary_linear_sign": binary_linear_sign,
    "layer_norm_sign": layer_norm_sign,
}


@pytest.fixture(autouse=True, scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A library that no earlier test has loaded is built in a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_STOMPP_CACHE", str(tmp_path_factory.mktemp("cache")))
        cpu.native_kernels()


# ----- The independent computation -----


def packed(signs: np.ndarray) -> Tensor:
    *shape, features = signs.shape
    padded = np.zeros((*shape, 256 * math.ceil(features / 256)), dtype=bool)
    padded[..., :features] = signs
    return torch.from_numpy(np.packbits(padded, axis=-1, bitorder="little"))


def unpacked(bits: Tensor, features: int) -> np.ndarray:
    return np.unpackbits(bits.numpy(), axis=-1, bitorder="little")[..., :features].astype(bool)


def signs_of(input: Tensor, threshold: Tensor | None, features: int) -> np.ndarray:
    if input.dtype == torch.uint8:
        return unpacked(input, features)
    return input.float().numpy() >= (np.float32(0) if threshold is None else threshold.numpy())


def expected(op: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """What an operator must return, as a tuple."""
    if op == "pack_sign":
        signs = signs_of(arguments["input"], arguments["threshold"], arguments["input"].shape[-1])
        return packed(signs), torch.from_numpy(np.asarray(signs.sum(-1), dtype=np.int32))
    if op == "layer_norm_sign":
        output = layer_norm(**{name: value for name, value in arguments.items() if name != "threshold"})
        return output, packed(signs_of(output, arguments["threshold"], output.shape[-1]))
    features = arguments["in_features"]
    signs = signs_of(arguments["input"], arguments["threshold"], features)
    integers = (2.0 * signs - 1) @ (2.0 * unpacked(arguments["packed_weight"], features) - 1).T
    output = integers.astype(np.float32) * arguments["scale"].numpy()
    if arguments["bias"] is not None:
        output = output + arguments["bias"].numpy()
    rounded = torch.from_numpy(output).to(arguments["dtype"])
    if op == "binary_linear":
        return (rounded,)
    return (packed(signs_of(rounded, arguments["output_threshold"], output.shape[-1])),)


def layer_norm(input: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    total = input if residual is None else input + residual
    wide = total if weight.dtype == input.dtype else total.float()
    return F.layer_norm(wide.contiguous(), wide.shape[-1:], weight, bias, epsilon).to(input.dtype)


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def assert_equal(actual: Tensor | tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, other in zip(as_tuple(actual), wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


# ----- Arguments -----


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments_of(
    op: str,
    shape: tuple[int, ...] = (4,),
    input_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    optional: bool = True,
) -> dict[str, Any]:
    """Arguments by name; `shape` are the leading dimensions, `optional`: with thresholds and a bias."""
    input = draw(*shape, IN_FEATURES)
    is_bits = input_dtype == torch.uint8
    input = packed(input.numpy() >= 0) if is_bits else input.to(input_dtype)
    threshold = draw(IN_FEATURES, seed=1) if optional and not is_bits else None
    if op == "pack_sign":
        return {"input": input, "threshold": threshold}
    if op == "layer_norm_sign":
        # Weights may be float32 whatever the input is.
        vectors = [draw(IN_FEATURES, seed=seed).to(torch.float32 if optional else input_dtype) for seed in (3, 4)]
        return {
            "input": input,
            "residual": draw(*shape, IN_FEATURES, seed=2).to(input_dtype) if optional else None,
            "weight": vectors[0],
            "bias": vectors[1],
            "epsilon": 1e-5,
            "threshold": threshold,
        }
    arguments = {
        "input": input,
        "threshold": threshold,
        "packed_weight": packed(draw(OUT_FEATURES, IN_FEATURES, seed=2).numpy() >= 0),
        "in_features": IN_FEATURES,
        "scale": draw(OUT_FEATURES, seed=3),
        "bias": draw(OUT_FEATURES, seed=4) if optional else None,
        "dtype": dtype,
    }
    if op == "binary_linear":
        return arguments
    return arguments | {"output_threshold": draw(OUT_FEATURES, seed=5) if optional else None}


def transposed(arguments: dict[str, Any]) -> dict[str, Any]:
    """With the leading dimensions of the input, and of what has its shape, in the other order."""
    swapped = {
        name: arguments[name].transpose(0, 1) for name in ("input", "residual") if arguments.get(name) is not None
    }
    return arguments | swapped


def to(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


# Each op with each dtype of the input it takes.
SOURCES = [(op, dtype) for op in ("pack_sign", "layer_norm_sign") for dtype in FLOATS]
SOURCES += [(op, dtype) for op in ("binary_linear", "binary_linear_sign") for dtype in [*FLOATS, torch.uint8]]
SHAPES = [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)]


# ----- Results -----


@pytest.mark.parametrize("optional", [True, False], ids=["all", "required"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("op", "input_dtype"), SOURCES, ids=str)
def test_result_is_exact(op: str, input_dtype: torch.dtype, shape: tuple[int, ...], optional: bool) -> None:
    for dtype in FLOATS:
        arguments = arguments_of(op, shape, input_dtype, dtype, optional)
        outputs = as_tuple(OPS[op](**arguments))
        assert_equal(outputs, expected(op, arguments))
        for output in outputs:
            assert output.shape[: len(shape)] == shape
            assert output.is_contiguous()


@pytest.mark.parametrize("op", OPS)
def test_op_is_found_by_name_and_takes_arguments_in_their_order(op: str) -> None:
    arguments = arguments_of(op)
    by_name = getattr(torch.ops.hf_stompp, op)
    assert_equal(by_name(*arguments.values()), expected(op, arguments))
    assert list(arguments) == [argument.name for argument in by_name.default._schema.arguments]


def test_threshold_of_packed_signs_may_be_left_out() -> None:
    arguments = arguments_of("pack_sign", optional=False)
    assert_equal(torch.ops.hf_stompp.pack_sign(arguments["input"]), expected("pack_sign", arguments))


def test_layers_on_bits_chain() -> None:
    arguments = arguments_of("binary_linear_sign", (5,))
    hidden = binary_linear_sign(**arguments)
    following = arguments_of("binary_linear", (5,)) | {
        "input": hidden,
        "threshold": None,
        "in_features": OUT_FEATURES,
        "packed_weight": packed(draw(OUT_FEATURES, OUT_FEATURES, seed=6).numpy() >= 0),
    }
    assert_equal(binary_linear(**following), expected("binary_linear", following))
    # The hidden bits are those that would be packed from the output of the layer before.
    output = binary_linear(**{name: value for name, value in arguments.items() if name != "output_threshold"})
    assert torch.equal(pack_sign(output, arguments["output_threshold"])[0], hidden)


@pytest.mark.parametrize(("op", "input_dtype"), SOURCES, ids=str)
def test_arguments_need_not_be_contiguous(op: str, input_dtype: torch.dtype) -> None:
    arguments = arguments_of(op, (2, 3), input_dtype)
    spread = {
        name: torch.stack([value, value], dim=-1)[..., 0] if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    for variant in (spread, transposed(arguments)):
        assert not variant["input"].is_contiguous()
        outputs = as_tuple(OPS[op](**variant))
        assert_equal(outputs, expected(op, variant))
        assert all(output.is_contiguous() for output in outputs)


def test_lazily_negated_input_is_read_as_negated() -> None:
    lazy = torch.complex(draw(4, 70), draw(4, 70, seed=1)).conj().imag
    assert lazy.is_neg()
    assert_equal(pack_sign(lazy), expected("pack_sign", {"input": lazy.resolve_neg(), "threshold": None}))


# ----- Contexts -----


CONTEXTS: dict[str, Callable[[], AbstractContextManager]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "another default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
@pytest.mark.parametrize(("op", "input_dtype"), SOURCES, ids=str)
def test_context_changes_nothing(
    op: str, input_dtype: torch.dtype, context: Callable[[], AbstractContextManager]
) -> None:
    arguments = arguments_of(op, (2, 3), input_dtype)
    with context():
        outputs = OPS[op](**arguments)
    assert_equal(outputs, expected(op, arguments))


def test_another_default_dtype_changes_nothing() -> None:
    before = torch.get_default_dtype()
    arguments = {op: arguments_of(op) for op in OPS}
    torch.set_default_dtype(torch.float64)
    try:
        outputs = {op: OPS[op](**arguments[op]) for op in OPS}
    finally:
        torch.set_default_dtype(before)
    for op in OPS:
        assert_equal(outputs[op], expected(op, arguments[op]))


@pytest.mark.parametrize("op", OPS)
def test_input_that_requires_a_gradient_gives_the_same_values(op: str) -> None:
    arguments = arguments_of(op)
    with_gradient = arguments | {"input": arguments["input"].clone().requires_grad_()}
    outputs = as_tuple(OPS[op](**with_gradient))
    assert_equal(tuple(output.detach() for output in outputs), expected(op, arguments))


def test_python_threads_may_call_the_ops_at_once() -> None:
    calls = [(op, arguments_of(op, (3 + i,), dtype)) for i, (op, dtype) in enumerate(SOURCES)]
    wanted = [expected(op, arguments) for op, arguments in calls]

    def run(index: int) -> None:
        op, arguments = calls[index % len(calls)]
        assert_equal(OPS[op](**arguments), wanted[index % len(calls)])

    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(run, range(20 * len(calls))):
            pass


# ----- opcheck, compile, export -----


OPCHECK_SHAPES = [(), (5,), (2, 3), (0,)]


@pytest.mark.parametrize("optional", [True, False], ids=["all", "required"])
@pytest.mark.parametrize("shape", OPCHECK_SHAPES, ids=str)
@pytest.mark.parametrize(("op", "input_dtype"), SOURCES, ids=str)
def test_opcheck_passes(op: str, input_dtype: torch.dtype, shape: tuple[int, ...], optional: bool) -> None:
    dtype = FLOATS[len(shape)]
    arguments = arguments_of(op, shape, input_dtype, dtype, optional)
    result = torch.library.opcheck(OPS[op], (), arguments)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", OPS)
def test_opcheck_passes_on_strided_arguments(op: str) -> None:
    arguments = transposed(arguments_of(op, (2, 3)))
    result = torch.library.opcheck(OPS[op], (), arguments)
    assert set(result.values()) == {"SUCCESS"}


def two_layers(x: Tensor, threshold: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """All three operators, between ordinary ones."""
    features = x.shape[-1]
    bits, popcounts = torch.ops.hf_stompp.pack_sign(x * 2, threshold)
    first = torch.ops.hf_stompp.binary_linear(bits, None, weight, features, scale, bias, torch.bfloat16)
    second = torch.ops.hf_stompp.binary_linear(x * 2, threshold, weight, features, scale, None, torch.float32)
    hidden = torch.ops.hf_stompp.binary_linear_sign(bits, None, weight, features, scale, bias, torch.float16, bias)
    return first + 1, second * 2, hidden, popcounts + 1


class TwoLayers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, value in layer_arguments(IN_FEATURES).items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return two_layers(x, self.threshold, self.weight, self.scale, self.bias)


def layer_arguments(in_features: int) -> dict[str, Tensor]:
    return {
        "threshold": draw(in_features, seed=1),
        "weight": packed(draw(OUT_FEATURES, in_features, seed=2).numpy() >= 0),
        "scale": draw(OUT_FEATURES, seed=3),
        "bias": draw(OUT_FEATURES, seed=4),
    }


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_function_gives_the_same_values(backend: str, fresh_compiler: None) -> None:
    compiled = torch.compile(two_layers, fullgraph=True, backend=backend)
    for dtype in [torch.float32, torch.bfloat16]:
        arguments = (draw(4, IN_FEATURES).to(dtype), *layer_arguments(IN_FEATURES).values())
        assert_equal(compiled(*arguments), two_layers(*arguments))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_function_takes_other_sizes_without_a_recompilation(backend: str, fresh_compiler: None) -> None:
    compiled = torch.compile(two_layers, fullgraph=True, dynamic=True, backend=backend)
    layer = layer_arguments(IN_FEATURES).values()
    compiled(draw(2, 5, IN_FEATURES), *layer)
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in [(3, 7), (11, 2)]:
            x = draw(*shape, IN_FEATURES)
            assert_equal(compiled(x, *layer), two_layers(x, *layer))


def test_compiled_function_takes_other_numbers_of_features(fresh_compiler: None) -> None:
    compiled = torch.compile(two_layers, fullgraph=True, dynamic=True, backend="aot_eager")
    for in_features in [300, 310, 600, 1000]:
        arguments = (draw(5, in_features), *layer_arguments(in_features).values())
        assert_equal(compiled(*arguments), two_layers(*arguments))


def test_compiled_function_takes_no_rows(fresh_compiler: None) -> None:
    compiled = torch.compile(two_layers, fullgraph=True, backend="aot_eager")
    layer = layer_arguments(IN_FEATURES).values()
    for rows in [4, 0, 1]:
        x = draw(rows, IN_FEATURES)
        assert_equal(compiled(x, *layer), two_layers(x, *layer))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported_program_gives_the_same_values(strict: bool) -> None:
    model = TwoLayers()
    rows = torch.export.Dim("rows", min=1)
    program = torch.export.export(model, (draw(4, IN_FEATURES),), dynamic_shapes={"x": {0: rows}}, strict=strict)
    called = [str(node.target) for node in program.graph.nodes if "hf_stompp" in str(node.target)]
    assert called == [
        f"hf_stompp.{op}.default" for op in ("pack_sign", "binary_linear", "binary_linear", "binary_linear_sign")
    ]
    for count in (1, 4, 33):
        x = draw(count, IN_FEATURES)
        assert_equal(program.module()(x), model(x))


def test_exported_program_survives_saving() -> None:
    model, x = TwoLayers(), draw(4, IN_FEATURES)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    assert_equal(torch.export.load(file).module()(x), model(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("op", "input_dtype"), SOURCES, ids=str)
def test_shapes_are_known_without_computing(op: str, input_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for dtype in FLOATS:
        arguments = arguments_of(op, shape, input_dtype, dtype)
        outputs = as_tuple(OPS[op](**to(arguments, "meta")))
        for output, wanted in zip(outputs, expected(op, arguments), strict=True):
            assert output.device.type == "meta"
            assert (output.shape, output.dtype) == (wanted.shape, wanted.dtype)


# ----- Refusals -----


class Case:
    """An argument that an operator must refuse."""

    def __init__(self, argument: str, value: Any, error: type[Exception], **others: Any) -> None:
        self.argument, self.value, self.error, self.others = argument, value, error, others

    def __str__(self) -> str:
        value = self.value
        described = f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)
        return f"{self.argument}: {described}" + "".join(f", with {name}" for name in self.others)


def bytes_of(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def of_other_features(in_features: int) -> dict[str, Any]:
    """Bits of 300 features, said to be of others."""
    return {"input": bytes_of(4, ROW_BYTES), "threshold": None, "in_features": in_features}


def vectors_refused(name: str, size: int) -> list[Case]:
    wrong_dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool]
    wrong_shapes = [(), (0,), (1,), (size - 1,), (size + 1,), (1, size), (size, 1), (2, size)]
    return [
        *(Case(name, torch.ones(size, dtype=dtype), TypeError) for dtype in wrong_dtypes),
        *(Case(name, torch.ones(shape), ValueError) for shape in wrong_shapes),
    ]


INPUT_DTYPES_REFUSED = [torch.float64, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64]
PACK_SIGN_REFUSES = [
    *(Case("input", torch.ones(4, IN_FEATURES, dtype=dtype), TypeError) for dtype in INPUT_DTYPES_REFUSED),
    Case("input", bytes_of(4, ROW_BYTES), TypeError, threshold=None),
    *(Case("input", torch.ones(shape), ValueError, threshold=None) for shape in [(), (0,), (4, 0)]),
    *vectors_refused("threshold", IN_FEATURES),
]
LINEAR_REFUSES = [
    *(Case("input", torch.ones(4, IN_FEATURES, dtype=dtype), TypeError) for dtype in INPUT_DTYPES_REFUSED),
    *(Case("input", torch.ones(shape), ValueError) for shape in [(), (0,), (4, 0), (4, 299), (4, 301), (300, 4)]),
    *(
        Case("input", bytes_of(*shape), ValueError, threshold=None)
        for shape in [(), (4, 63), (4, 65), (4, 32), (4, IN_FEATURES), (64, 4)]
    ),
    Case("threshold", torch.ones(IN_FEATURES), ValueError, input=bytes_of(4, ROW_BYTES)),
    *(
        Case("packed_weight", torch.zeros(OUT_FEATURES, ROW_BYTES, dtype=dtype), TypeError)
        for dtype in [torch.int8, torch.int32, torch.bool, torch.float32]
    ),
    *(
        Case("packed_weight", bytes_of(*shape), ValueError)
        for shape in [(), (ROW_BYTES,), (70, 32), (70, 63), (70, 96), (70, IN_FEATURES), (1, 70, 64), (64, 70)]
    ),
    # The scale fits neither.
    *(Case("scale", torch.ones(OUT_FEATURES), ValueError, packed_weight=bytes_of(rows, 64)) for rows in (0, 69, 71)),
    *(Case("in_features", value, ValueError) for value in [0, 1, 299, 301, 512, -1, -300]),
    *(Case("in_features", value, ValueError, input=bytes_of(4, 64), threshold=None) for value in [0, -300]),
    # Which of the two is wrong cannot be told.
    *(Case("input|in_features", None, ValueError, **of_other_features(value)) for value in [256, 513]),
    # Their rows would have no bytes.
    *(
        Case("in_features", value, ValueError, input=bytes_of(4, 0), packed_weight=bytes_of(70, 0), threshold=None)
        for value in [-1, -255]
    ),
    *vectors_refused("threshold", IN_FEATURES),
    *vectors_refused("scale", OUT_FEATURES),
    *vectors_refused("bias", OUT_FEATURES),
    *(Case("dtype", dtype, TypeError) for dtype in [torch.float64, torch.uint8, torch.int32, torch.bool]),
]
LAYER_NORM_REFUSES = [
    *(Case("input", torch.ones(4, IN_FEATURES, dtype=dtype), TypeError) for dtype in INPUT_DTYPES_REFUSED),
    *(Case("input", torch.ones(shape), ValueError) for shape in [(), (0,), (4, 0)]),
    *(
        Case("residual", torch.ones(4, IN_FEATURES, dtype=dtype), TypeError)
        for dtype in [torch.float64, torch.bfloat16, torch.float16, torch.int32]
    ),
    *(Case("residual", torch.ones(shape), ValueError) for shape in [(), (300,), (1, 300), (4, 299), (1, 4, 300)]),
    *vectors_refused("weight", IN_FEATURES),
    *vectors_refused("bias", IN_FEATURES),
    # float32 goes with every input, and the other half type with none; both vectors are of one dtype.
    *(
        Case(name, torch.ones(IN_FEATURES, dtype=dtype), TypeError, input=torch.ones(4, 300).bfloat16(), residual=None)
        for name, dtype in [("weight", torch.float16), ("bias", torch.bfloat16)]
    ),
    *(Case("epsilon", value, ValueError) for value in [0.0, -1e-5, math.nan]),
    *vectors_refused("threshold", IN_FEATURES),
]
REFUSED = [
    *(("pack_sign", case) for case in PACK_SIGN_REFUSES),
    *(("layer_norm_sign", case) for case in LAYER_NORM_REFUSES),
    *(("binary_linear", case) for case in LINEAR_REFUSES),
    *(("binary_linear_sign", case) for case in LINEAR_REFUSES),
    *(("binary_linear_sign", case) for case in vectors_refused("output_threshold", OUT_FEATURES)),
]


def is_named(op: str, argument: str, message: str) -> bool:
    """Whether an error says of which operator and which argument it speaks."""
    return bool(re.search(rf"\b{op}\b", message) and re.search(rf"\b({argument})\b", message))


@pytest.mark.parametrize("device", ["cpu", "meta", "fake"])
@pytest.mark.parametrize(("op", "case"), REFUSED, ids=str)
def test_argument_that_does_not_fit_is_refused_by_name(op: str, case: Case, device: str) -> None:
    arguments = arguments_of(op) | case.others | ({} if case.value is None else {case.argument: case.value})
    if device == "meta":
        arguments = to(arguments, "meta")
    if device == "fake":
        mode = FakeTensorMode()
        arguments = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in arguments.items()
        }
    with pytest.raises(case.error) as raised:
        OPS[op](**arguments)
    assert is_named(op, case.argument, str(raised.value)), str(raised.value)


@pytest.mark.parametrize("op", OPS)
def test_tensors_of_two_devices_are_refused(op: str) -> None:
    arguments = arguments_of(op)
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    for name, devices in itertools.product(tensors, [("cpu", "meta"), ("meta", "cpu")]):
        mixed = to(arguments, devices[0]) | {name: arguments[name].to(devices[1])}
        with pytest.raises((ValueError, RuntimeError)) as raised:
            OPS[op](**mixed)
        assert op in str(raised.value)
        assert "meta" in str(raised.value) and "cpu" in str(raised.value)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("scale", 1.0),
        ("dtype", None),
        ("dtype", "float32"),
        ("in_features", None),
        ("in_features", 300.0),
        ("in_features", "300"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["binary_linear", "binary_linear_sign"])
def test_value_of_another_type_is_refused_by_the_dispatcher(op: str, argument: str, value: object) -> None:
    with pytest.raises((RuntimeError, TypeError)) as raised:
        OPS[op](**arguments_of(op) | {argument: value})
    assert is_named(op, argument, str(raised.value))


@pytest.mark.parametrize("op", OPS)
def test_compiling_a_call_that_does_not_fit_is_refused(op: str, fresh_compiler: None) -> None:
    argument = {"pack_sign": "threshold", "layer_norm_sign": "weight"}.get(op, "scale")
    arguments = arguments_of(op) | {argument: torch.ones(3)}
    with pytest.raises(Exception) as raised:
        torch.compile(lambda: OPS[op](**arguments), fullgraph=True, backend="eager")()
    assert is_named(op, argument, str(raised.value))


@pytest.mark.parametrize("op", ["binary_linear", "binary_linear_sign"])
def test_so_many_features_that_sums_are_not_exact_are_refused(op: str) -> None:
    operator = getattr(torch.ops.hf_stompp, op)

    def run(in_features: int) -> Tensor:
        bits = torch.empty(1, packed_bytes(in_features), dtype=torch.uint8, device="meta")
        more = (None,) if op == "binary_linear_sign" else ()
        scale = torch.ones(1, device="meta")
        return operator(bits, None, bits, in_features, scale, None, torch.float32, *more)

    assert len(run(2**24 - 1)) == 1
    for in_features in (2**24, 2**24 + 1, 2**40):
        with pytest.raises(ValueError, match=f"in_features must be .* below {2**24}, .*; got {in_features}"):
            run(in_features)
