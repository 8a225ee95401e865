from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from hf_stompp import benchmark
from hf_stompp.cli import benchmarking


def test_functions_take_turns() -> None:
    calls: list[str] = []

    times = benchmark.interleave({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3)

    turns = [name for previous, name in zip(["", *calls], calls, strict=False) if name != previous]
    assert "".join(turns) == "ab" * 4
    assert all(0 < t["minimum"] <= t["median"] for t in times.values())


def test_speedups_are_geometric_means_of_ratios_of_medians() -> None:
    def case(rows: int, **seconds: float) -> dict:
        return {"rows": rows, "seconds": {name: {"median": s, "minimum": s / 2} for name, s in seconds.items()}}

    results = [
        case(1, fp32=8.0, bf16=4.0, int8=2.0, packed_fp32=1.0, packed_bf16=0.5),
        case(1, fp32=2.0, bf16=1.0, int8=2.0, packed_fp32=1.0, packed_bf16=0.5),
        case(7, fp32=3.0, bf16=4.0, int8=2.0, packed_fp32=1.0, packed_bf16=2.0),
    ]

    first, second = benchmark.speedups(results)

    assert first["rows"] == 1 and second["rows"] == 7
    assert first["packed_fp32/fp32"] == pytest.approx(4.0) and first["packed_fp32/int8"] == pytest.approx(2.0)
    assert first["packed_bf16/bf16"] == pytest.approx(math.sqrt(16))
    assert second["packed_bf16/bf16"] == pytest.approx(2.0)


def test_share_of_the_limit_is_of_the_kernel_that_ran() -> None:
    case = {"in_features": 8, "out_features": 8, "seconds": {"fp32": {"median": 2e-6, "minimum": 1e-6}}}
    few = {**case, "rows": 1, "kernel": "avx512", "packed_operations_per_second": 1e12}
    many = {**case, "rows": 512, "kernel": "amx", "packed_operations_per_second": 3e12}
    limits = {"amx": 6e12, "avx512": 4e12}

    header, *rows = benchmarking.linear_rows({"linear": [few, many], "limit_operations_per_second": limits})

    assert header[-1] == "of limit" and [row[-1] for row in rows] == ["25%", "50%"]


def test_rows_of_whole_models_give_milliseconds_and_ratios_of_medians() -> None:
    seconds = {"fp32": 8e-3, "bf16": 3e-3, "int8": 4e-3, "packed_fp32": 2e-3, "packed_bf16": 1e-3}
    case = {"model": "m", "batch": 4, "length": 32, "threads": 2}
    case["seconds"] = {name: {"median": value, "minimum": 0.0} for name, value in seconds.items()}

    _, row = benchmarking.model_rows({"models": [case]})

    assert row == ["m", "4 x 32", "2", "8.0", "3.0", "4.0", "2.0", "1.0", "4.0x", "3.0x", "2.0x"]


def test_all_variants_of_a_linear_layer_compute_a_layer_of_its_shape() -> None:
    functions = benchmark.linear_case(3, 40, 24, [])

    assert {name: tuple(function().shape) for name, function in functions.items()} == dict.fromkeys(functions, (3, 24))


def test_threads_are_given_back_after_an_error() -> None:
    before = torch.get_num_threads()

    with pytest.raises(ZeroDivisionError), benchmark.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError

    assert torch.get_num_threads() == before


def test_packed_copy_leaves_the_model_as_it_was(tiny_model) -> None:
    model = tiny_model("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    packed = benchmark.packed_copy(model)

    assert not any(isinstance(module, nn.Linear) for module in packed.bert.encoder.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_packed_variants_are_of_the_mode_and_dtype_that_they_are_called_by(tiny_model) -> None:
    variants = benchmark.variants_of(tiny_model("bert"))

    found = {name: variants[name].config.quantization_config.mode for name in variants if name.startswith("packed")}
    assert found == {"packed_fp32": "bnn", "packed_bf16": "bnn", "packed_bwn": "bwn", "packed_mixed": "bnn"}
    attention = variants["packed_mixed"].bert.encoder.layer[0].attention
    assert not attention.self.query.binary_input and not attention.output.dense.binary_input
    assert variants["packed_mixed"].bert.encoder.layer[0].output.dense.binary_input
    assert {name: variants[name].dtype for name in found} == {
        "packed_fp32": torch.float32,
        "packed_bf16": torch.bfloat16,
        "packed_bwn": torch.float32,
        "packed_mixed": torch.float32,
    }


def test_whole_models_are_timed_for_every_batch_and_number_of_threads(tiny_model) -> None:
    results = benchmark.bench_model("tiny", tiny_model("bert"), [(1, 4), (2, 8)], [1, 2])

    assert [(r["threads"], r["batch"], r["length"]) for r in results] == [(1, 1, 4), (1, 2, 8), (2, 1, 4), (2, 2, 8)]
    packed = {"packed_fp32", "packed_bf16", "packed_bwn", "packed_mixed"}
    assert set(results[0]["seconds"]) == {"fp32", "bf16", "int8"} | packed


def test_models_are_shapes_that_need_no_package_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    named: dict[str, nn.Module] = {}
    monkeypatch.setattr(benchmarking, "bench_model", lambda name, model, *_: named.update({name: model}) or [])
    benchmarking.measure(["model"], [1], [], "")

    assert list(named) == ["MiniLM shape", "BERT-base shape"]
    for first, layers, model in zip((0, 3), (6, 12), named.values(), strict=True):
        linears = [module for module in model.encoder.modules() if isinstance(module, nn.Linear)]
        shapes = {(linear.in_features, linear.out_features) for linear in linears}
        assert shapes == {*benchmark.SHAPES[first : first + 3]} and len(linears) == 6 * layers


@pytest.mark.slow
def test_loading_is_measured_in_fresh_processes_for_both_models(tiny_model) -> None:
    loading = benchmark.bench_loading(tiny_model("bert", max_position_embeddings=128), rounds=1)

    if loading is None:
        pytest.skip("the system does not tell resident memory")
    assert set(loading) == {"float", "packed"}
    for values in loading.values():
        assert values["file_bytes"] > 0
        for cache in ("warm", "cold"):
            assert 0 < values[cache]["load_seconds"] < values[cache]["load_and_first_batch_seconds"]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_packed_model_is_timed_beside_a_float_one_and_stays_as_it_is(tiny_packed: Callable, family: str) -> None:
    packed = tiny_packed(family).train()
    before = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    state = torch.get_rng_state()
    rows = benchmark.compare_with_float(packed, batches=(1, 3))
    assert [row["batch"] for row in rows] == [1, 3]
    assert all(row["float"] > 0 and row["packed"] > 0 for row in rows)
    assert all(row["length"] == packed.config.max_position_embeddings - 2 for row in rows)
    assert packed.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in packed.state_dict().items())


def test_model_that_takes_no_tokens_is_not_timed(tiny_packed: Callable) -> None:
    assert benchmark.compare_with_float(tiny_packed("vit")) == []


def test_no_memory_for_a_float_model_costs_the_times_alone(tiny_packed, caplog):
    packed = tiny_packed("bert")
    # The table that a float model of this config would need does not fit into any memory.
    packed.config.vocab_size = 2**45
    assert benchmark.compare_with_float(packed) == []
    assert "No times for the model card" in caplog.text
