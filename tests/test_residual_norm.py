"""Packed models with fused output blocks: the same logits, less work, the same files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from hf_stompp import StoMPPConfig, binarization_report, pack, unpack
from hf_stompp.model.swap import swap_out_norms
from hf_stompp.nn import PackedResidualNorm


BLOCKS_OF_A_LAYER = {
    "bert": 2,
    "roberta": 2,
    "electra": 2,
    "deberta_v2": 2,
    # Its attention holds LayerNorm itself.
    "mpnet": 1,
    "distilbert": 0,
    "modernbert": 0,
    "vit": 0,
}


def blocks(model: nn.Module) -> dict[str, PackedResidualNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedResidualNorm)}


def without_blocks(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    swap_out_norms(plain)
    return plain


def test_output_blocks_of_each_family_are_found(tiny_packed, family) -> None:
    found = blocks(tiny_packed(family))

    assert len(found) == 2 * BLOCKS_OF_A_LAYER[family]
    # All but the last are followed by a layer that binarizes its input.
    assert [block._following is None for block in found.values()] == [False] * (len(found) - 1) + [True] * bool(found)


def test_mode_with_float_inputs_keeps_the_blocks_of_the_model(tiny_packed) -> None:
    assert not blocks(tiny_packed("bert", StoMPPConfig(mode="bwn")))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_logits_are_those_of_the_models_own_blocks(
    tiny_packed, family, tiny_inputs, fused, operators, dtype, mode
) -> None:
    model = tiny_packed(family).to(dtype)
    inputs = {key: v.to(dtype) if v.is_floating_point() else v for key, v in tiny_inputs(family).items()}
    plain = without_blocks(model)
    with mode():
        with operators() as run:
            found = model(**inputs).logits
        fused(False)
        off, expected = model(**inputs).logits, plain(**inputs).logits

    assert run.count["hf_stompp::layer_norm_sign"] == max(0, 2 * BLOCKS_OF_A_LAYER[family] - 1)
    assert found.dtype == dtype
    assert torch.equal(off, expected)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_fused_bert_packs_embeddings_alone(tiny_packed, tiny_inputs, fused, operators, mode) -> None:
    model = tiny_packed("bert", num_hidden_layers=3)

    with mode(), operators() as run:
        model(**tiny_inputs("bert"))

    assert run.count["hf_stompp::pack_sign"] == 1
    assert run.count["hf_stompp::layer_norm_sign"] == 2 * 3 - 1
    # The attention's output is signed within its product.
    assert run.inputs["hf_stompp::binary_linear_sign"] == [torch.uint8] * 3
    bits, floats = torch.uint8, torch.float32
    assert run.inputs["hf_stompp::binary_linear"] == [bits, bits, bits, floats, bits] * 3


def test_threads_that_run_one_fused_model_get_what_each_would_alone(tiny_packed, tiny_inputs, fused) -> None:
    model = tiny_packed("bert")
    batches = [tiny_inputs("bert", seed=seed) for seed in range(16)]

    def run(inputs: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return model(**inputs).logits

    fused(False)
    expected = [run(inputs) for inputs in batches]
    fused(True)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, batches * 4))

    assert all(torch.equal(a, b) for a, b in zip(found, expected * 4, strict=True))


def test_hidden_states_and_hooks_see_what_they_saw(tiny_packed, tiny_inputs, fused) -> None:
    model = tiny_packed("bert")
    seen: list[Tensor] = []
    for layer in model.bert.encoder.layer:
        layer.attention.output.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
        layer.output.LayerNorm.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    outputs = []
    with torch.no_grad():
        for on in (True, False):
            fused(on)
            outputs += [(*model(**tiny_inputs("bert"), output_hidden_states=True).hidden_states, *seen)]
            seen.clear()

    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert len(outputs[0]) == 3 + 4


def test_training_mode_is_that_of_the_models_own_blocks(tiny_packed, tiny_inputs, fused) -> None:
    model = tiny_packed("bert")
    losses = []
    for variant in (model.train(), without_blocks(model).train()):
        torch.manual_seed(0)
        losses.append(variant(**tiny_inputs("bert"), labels=torch.tensor([0, 1])).loss)

    assert torch.equal(*losses)


# ----- Compiled -----


@pytest.fixture
def graphs() -> list[torch.fx.Graph]:
    """What `compiled` has traced."""
    return []


@pytest.fixture
def compiled(graphs) -> Callable[..., nn.Module]:
    """`compiled(model, **options)`: with PyTorch's operators, without a graph break."""

    def keep(graph: torch.fx.GraphModule, example: object) -> Callable:
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    yield lambda model, **options: torch.compile(
        model, fullgraph=True, backend=aot_autograd(fw_compiler=keep), **options
    )
    torch.compiler.reset()


def operators_of(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target).split(".")[1] for node in graph.nodes if "hf_stompp" in str(node.target)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("on", [True, False], ids=["fused", "plain"])
def test_compiled_bert_packs_each_tensor_once(tiny_packed, tiny_inputs, fused, compiled, graphs, on, mode) -> None:
    fused(on)
    model, inputs = tiny_packed("bert", num_hidden_layers=3), tiny_inputs("bert")
    with mode():
        found, expected = compiled(model)(**inputs).logits, model(**inputs).logits

    assert torch.equal(found, expected)
    (graph,) = graphs
    called = operators_of(graph)
    assert called.count("pack_sign") == (1 if on else 3)
    assert called.count("layer_norm_sign") == (5 if on else 0)
    bits = [node.args[0].meta["val"].dtype for node in graph.nodes if "binary_linear_sign" in str(node.target)]
    assert bits == [torch.uint8 if on else torch.float32] * 3


@pytest.mark.slow
def test_compiled_fused_model_takes_other_batches_without_a_recompilation(
    tiny_packed, tiny_inputs, fused, compiled, graphs
) -> None:
    model = tiny_packed("bert")
    with torch.no_grad():
        run = compiled(model, dynamic=True)
        for batch, length in ((2, 10), (3, 8), (5, 6)):
            inputs = tiny_inputs("bert", batch=batch, length=length)
            assert torch.equal(run(**inputs).logits, model(**inputs).logits)

    assert len(graphs) == 1


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fused_model_compiles_without_a_graph_break(tiny_packed, tiny_inputs, fused, compiled, backend) -> None:
    model, inputs = tiny_packed("bert"), tiny_inputs("bert")
    with torch.no_grad():
        run = torch.compile(model, fullgraph=True, backend=backend)
        found, expected = run(**inputs).logits, model(**inputs).logits

    # The default backend may sum in another order, which can turn the sign of a value next to its threshold.
    assert found.shape == expected.shape and (found - expected).abs().median() < 1e-5


def test_compiled_model_after_an_eager_one_keeps_nothing(tiny_packed, tiny_inputs, fused, compiled) -> None:
    model, inputs = tiny_packed("bert"), tiny_inputs("bert")
    with torch.no_grad():
        run = compiled(model)
        for call in (model, run, model, run):
            call(**inputs)

    shared = [block._following._bits._last for block in blocks(model).values() if block._following is not None]
    assert shared == [None] * 3


def test_exported_fused_model_computes_the_same(tiny_packed, tiny_inputs, fused) -> None:
    model, inputs = tiny_packed("bert"), tiny_inputs("bert")
    with torch.no_grad():
        exported = torch.export.export(model, args=(), kwargs=inputs)

        assert torch.equal(exported.module()(**inputs).logits, model(**inputs).logits)
    assert operators_of(exported.graph).count("layer_norm_sign") == 3


# ----- Saved, loaded, unpacked -----


def test_blocks_change_no_name_and_no_order_of_the_tensors(tiny_packed, family) -> None:
    model = tiny_packed(family)
    plain = without_blocks(model)

    assert not blocks(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert str(binarization_report(model)) == str(binarization_report(plain))


@pytest.mark.parametrize("name", ["bert", "deberta_v2", "mpnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loaded_model_has_the_blocks_and_the_logits(tiny_packed, tiny_inputs, tmp_path, fused, name, dtype) -> None:
    model = tiny_packed(name, dtype=dtype)
    model.save_pretrained(tmp_path)

    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)

    assert list(blocks(loaded)) == list(blocks(model)) != []
    wiring = [[block._following is not None for block in blocks(m).values()] for m in (loaded, model)]
    assert wiring[0] == wiring[1]
    with torch.no_grad():
        found, expected = loaded(**tiny_inputs(name)).logits, model(**tiny_inputs(name)).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "deberta_v2", "mpnet"])
def test_unpacked_model_has_its_own_blocks_again(tiny_committed, logits, name) -> None:
    committed = tiny_committed(name)
    packed = pack(committed)

    latent = unpack(packed)

    kinds = [{n: type(m) for n, m in model.named_modules()} for model in (latent, committed)]
    assert kinds[0] == kinds[1]
    assert blocks(packed) and not blocks(latent)
    assert torch.equal(logits(latent, name), logits(packed, name))
    assert list(blocks(pack(latent))) == list(blocks(packed))
    configs = [module.config for module in latent.modules() if hasattr(module, "config")]
    assert all(config is latent.config for config in configs)


def test_repr_names_block_and_children(tiny_packed) -> None:
    block = tiny_packed("bert").bert.encoder.layer[0].output

    assert repr(block).startswith("PackedResidualNorm(\n  (dense): PackedBinaryLinear(")
