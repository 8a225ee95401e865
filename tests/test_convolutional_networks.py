"""ResNet and MobileNetV2 of Transformers: planned, trained, packed, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_stompp import (
    StoMPPConfig,
    StoMPPTrainer,
    StoMPPTrainingArguments,
    binarization_report,
    binarize,
    commit,
    pack,
    unpack,
)
from hf_stompp.export import export_onnx, plain_torch
from hf_stompp.model.modules import masked_modules
from hf_stompp.model.planning import plan_modules
from hf_stompp.model.sensitivity import layer_bytes
from hf_stompp.model.stack import find_stack
from hf_stompp.nn import MaskedBinaryConv2d, PackedBinaryConv2d
from hf_stompp.training.freezing import initialize_activations


SIZE = 32


def resnet(kind: str = "basic", width: int = 8) -> ResNetForImageClassification:
    outside = 4 * width if kind == "bottleneck" else width
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=width,
            hidden_sizes=[outside, 2 * outside],
            depths=[1, 2],
            layer_type=kind,
            num_labels=3,
        )
    )


def mobilenet() -> MobileNetV2ForImageClassification:
    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, image_size=SIZE, num_labels=3))


NETWORKS = {"basic": resnet, "bottleneck": lambda: resnet("bottleneck"), "mobilenet": mobilenet}
networks = pytest.mark.parametrize("network", NETWORKS)


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE)


def committed(network: str, config: StoMPPConfig) -> nn.Module:
    """A committed model whose BatchNorm has seen a batch."""
    model = NETWORKS[network]().train()
    model(pixel_values=images())
    binarize(model, config).eval()
    with torch.no_grad():
        model(pixel_values=images())
    return commit(model)


def logits(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=batch).logits


def test_plan_of_a_resnet_follows_its_blocks_and_leaves_shortcuts_float() -> None:
    plan = plan_modules(resnet(), StoMPPConfig())

    # Neither the first convolution nor the classifier is in a block.
    stages = "resnet.encoder.stages"
    assert {name: entry.unit for name, entry in plan.items()} == {
        f"{stages}.{block}.layer.{layer}.convolution": f"{stages}.{block}"
        for block in ("0.layers.0", "1.layers.0", "1.layers.1")
        for layer in (0, 1)
    }
    assert all(entry.kind == "convolution" and entry.input == name for name, entry in plan.items())


def test_layers_of_a_transformer_come_before_convolutions_that_are_larger() -> None:
    model = nn.Module()
    model.stem = nn.ModuleList(nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3)) for _ in range(2))
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

    found = find_stack(model)

    assert (found.kind, list(found.layers)) == ("linear", ["layers.0", "layers.1"])


def test_units_may_be_stages_or_single_convolutions() -> None:
    stages = binarize(resnet(), StoMPPConfig(layer_stack="resnet.encoder.stages")).config.quantization_config
    modules = binarize(resnet(), StoMPPConfig(unit="module")).config.quantization_config

    assert stages.units == ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]
    assert modules.units == list(modules.plan) and len(modules.units) == 6
    with pytest.raises(ValueError, match="unit='sublayer' is for attention and feed-forward"):
        binarize(resnet(), StoMPPConfig(unit="sublayer"))


def test_a_shortcut_becomes_binary_where_modes_ask_for_it() -> None:
    plan = plan_modules(resnet(), StoMPPConfig(modes={"shortcut": "bwn"}))

    shortcuts = {name: entry.input for name, entry in plan.items() if "shortcut" in name}
    assert shortcuts == {"resnet.encoder.stages.1.layers.0.shortcut.convolution": None}


def test_convolutions_with_groups_stay_float() -> None:
    model = binarize(mobilenet(), StoMPPConfig())

    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | MaskedBinaryConv2d)}
    inside = {name: m for name, m in convolutions.items() if name.startswith("mobilenet_v2.layer.")}
    # Depthwise, of one channel a group; the others multiply all channels at a pixel.
    assert {name for name, m in inside.items() if m.groups > 1} == {
        name for name, m in inside.items() if type(m) is nn.Conv2d
    }
    assert sum(m.groups == 1 for m in inside.values()) == 32


def test_channels_that_bits_do_not_fill_are_refused_by_name_and_may_be_bwn() -> None:
    with pytest.raises(
        ValueError, match=r"stages.0.layers.0.layer.0.convolution has 12 input channels; .* multiple of 8"
    ):
        binarize(resnet(width=12), StoMPPConfig())

    model = binarize(resnet(width=12), StoMPPConfig(mode="bwn"))

    assert sum(isinstance(m, MaskedBinaryConv2d) for m in model.modules()) == 6


SIGNS = {"activation_functions": "sign", "weight_scale": "none"}


@networks
@pytest.mark.parametrize(
    ("settings", "version"), [({}, 5), ({"mode": "bwn"}, 5), (SIGNS, 6)], ids=["bnn", "bwn", "signs"]
)
def test_packed_network_answers_exactly_as_the_committed_one_saved_and_loaded_too(
    network, settings, version, tmp_path: Path
) -> None:
    model, batch = committed(network, StoMPPConfig(**settings)), images()

    packed = pack(model)
    packed.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)

    expected = logits(model, batch)
    assert loaded.config.quantization_config.format_version == version
    assert any(isinstance(m, PackedBinaryConv2d) for m in loaded.modules())
    assert torch.equal(logits(packed, batch), expected) and torch.equal(logits(pack(unpack(packed)), batch), expected)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in packed.state_dict().items())
    # PyTorch's own convolution of one pixel, in MobileNetV2, depends on where in memory its weight lies.
    assert torch.allclose(logits(loaded, batch), expected, atol=1e-6)
    assert torch.allclose(logits(plain_torch(packed), batch), expected, atol=1e-5)


def test_signs_take_the_place_of_the_activation_functions_of_blocks() -> None:
    model = resnet()
    plan = plan_modules(model, StoMPPConfig(activation_functions="sign"))

    signs = {name: entry for name, entry in plan.items() if entry.kind == "sign"}
    functions = [name for name, module in model.resnet.encoder.named_modules() if isinstance(module, nn.ReLU)]
    assert list(signs) == [f"resnet.encoder.{name}" for name in functions]
    # All but the first convolution, which reads the stem, read a sign; and so does the float shortcut.
    own, *others = [entry for entry in plan.values() if entry.kind == "convolution"]
    assert own.input == own.name and {entry.input for entry in others} == set(list(signs)[:-1])
    assert all(plan[entry.input].unit == entry.unit for entry in signs.values())


@pytest.mark.parametrize("settings", [{"mode": "bwn"}, {"modules_to_not_convert": ["activation"]}], ids=str)
def test_signs_that_would_replace_nothing_are_refused(settings) -> None:
    with pytest.raises(ValueError, match=r"activation_functions='sign' finds no activation function to replace"):
        plan_modules(resnet(), StoMPPConfig(activation_functions="sign", **settings))


def test_activation_functions_of_blocks_that_are_not_binary_stay() -> None:
    config = StoMPPConfig(activation_functions="sign", modes={r"stages\.0": "bwn"})
    plan = plan_modules(resnet(), config)

    signs = [name for name, entry in plan.items() if entry.kind == "sign"]
    assert signs and all("stages.1" in name for name in signs)


def test_signs_in_the_place_of_activation_functions_are_for_convolutions_only(tiny_model) -> None:
    with pytest.raises(ValueError, match=r"activation_functions='sign' is for blocks of convolutions"):
        binarize(tiny_model("bert"), StoMPPConfig(activation_functions="sign"))


@pytest.mark.parametrize(("functions", "is_blocked"), [("sign", True), ("kept", False)])
def test_a_frozen_sign_lets_no_gradient_pass_and_a_float_shortcut_does(functions, is_blocked) -> None:
    config = StoMPPConfig(surrogate="none", activation_functions=functions)
    model = binarize(resnet(), config).train()
    initialize_activations(model, {"pixel_values": images()}, by_batch=True)
    unit = model.config.quantization_config.units[1]
    for name, module in masked_modules(model).items():
        if name.startswith(unit):
            module.commit()

    model(pixel_values=images(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()

    gradient = model.resnet.embedder.embedder.convolution.weight.grad
    assert (gradient is None or not bool(gradient.any())) == is_blocked
    assert bool(model.resnet.encoder.stages[1].layers[1].layer[1].convolution.weight.grad.any())


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"mode": "bwn"}, SIGNS], ids=["bnn", "bwn", "signs"])
def test_exported_network_answers_as_the_packed_one_for_any_number_of_images(settings, tmp_path: Path) -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    onnxruntime = pytest.importorskip("onnxruntime")
    packed = pack(committed("basic", StoMPPConfig(**settings)))

    export_onnx(packed, tmp_path / "network.onnx", {"pixel_values": images()})

    session, batch = onnxruntime.InferenceSession(tmp_path / "network.onnx"), images(3)
    (found,) = session.run(["logits"], {"pixel_values": batch.numpy()})
    assert torch.allclose(torch.from_numpy(found), logits(packed, batch), atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("settings", [{}, SIGNS], ids=["kept", "signs"])
def test_packed_network_compiles_without_a_graph_break(memory_format, settings) -> None:
    packed, batch = pack(committed("basic", StoMPPConfig(**settings))), images().to(memory_format=memory_format)
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)

    assert torch.equal(logits(compiled, batch), logits(packed, batch))


def test_report_counts_the_filters_of_each_block() -> None:
    model = committed("basic", StoMPPConfig())
    filters = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, MaskedBinaryConv2d)}

    latent, packed = binarization_report(model), binarization_report(pack(model))

    assert sum(unit.binary_weights for unit in latent.units) == sum(filters.values())
    assert sum(unit.binary_weights for unit in packed.units) == sum(filters.values())


def test_activations_are_measured_behind_batch_norm_as_it_normalises_in_training() -> None:
    model = binarize(resnet(), StoMPPConfig(weight_clip=3.0, activation_clip=10.0)).train()
    model.resnet.embedder.embedder.normalization.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name}
    batch = 1e-3 * images()
    found: list[Tensor] = []
    block = model.resnet.encoder.stages[0].layers[0].layer
    block[1].convolution.register_forward_pre_hook(lambda module, args: found.append(args[0]))

    initialize_activations(model, {"pixel_values": batch}, by_batch=True)

    # What the second convolution of a block reads is normalised: without, it would be as small as the images.
    activation = block[1].convolution.input_activation
    assert activation.scale > 0.1 and torch.allclose(activation.shift, found[0].mean(dim=(0, 2, 3)), atol=1e-5)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_activations_are_measured_by_what_batch_norm_has_recorded_where_nothing_is_trained() -> None:
    model = binarize(resnet(), StoMPPConfig()).train()
    found: list[Tensor] = []
    convolution = model.resnet.encoder.stages[0].layers[0].layer[1].convolution
    convolution.register_forward_pre_hook(lambda module, args: found.append(args[0]))

    # One image: a batch of which BatchNorm could take no statistics at one pixel.
    initialize_activations(model, {"pixel_values": 1e-3 * images(1)})
    with torch.no_grad():
        model.eval()(pixel_values=1e-3 * images(1))

    assert found[0].abs().max() < 0.1 and convolution.input_activation.scale < 0.1


def test_first_step_measures_activations_behind_batch_norm_in_training_mode_whatever_mode_the_model_came_in(
    tmp_path: Path,
) -> None:
    rows = [{"pixel_values": 1e-3 * torch.randn(3, SIZE, SIZE), "labels": 0} for _ in range(8)]
    model = binarize(resnet(), StoMPPConfig(activation_scale="fixed")).eval()
    arguments = StoMPPTrainingArguments(
        tmp_path, max_steps=6, per_device_train_batch_size=8, learning_rate=0.0, report_to=[], use_cpu=True
    )

    StoMPPTrainer(model=model, args=arguments, train_dataset=rows).train()

    assert model.resnet.encoder.stages[0].layers[0].layer[1].convolution.input_activation.scale > 0.1


def block_network(forward) -> nn.Module:
    """Two blocks of three convolutions, run as `forward(block, input)` says, and two heads."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short = nn.Conv2d(8, 8, 1)
            self.first, self.second = nn.Conv2d(8, 8, 3, padding="valid"), nn.Conv2d(8, 8, 1)
            self.idle = nn.Conv2d(12, 8, 1)
            self.gate = nn.Sigmoid()

        def forward(self, input: Tensor) -> Tensor:
            return forward(self, input)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Block(), Block())
            self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 2)])

        def forward(self, pixel_values: Tensor) -> list[Tensor]:
            pooled = self.blocks(pixel_values).mean(dim=(-1, -2))
            return [head(pooled) for head in self.heads]

    return Network()


def planned(network: nn.Module, config: StoMPPConfig | None = None) -> list[str]:
    batch = {"pixel_values": torch.zeros(1, 8, 9, 9)}
    return list(plan_modules(network, StoMPPConfig() if config is None else config, batch))


def test_the_main_path_is_binary_whether_it_runs_before_the_shortcut_or_after_it() -> None:
    def before(block: nn.Module, input: Tensor) -> Tensor:
        main = block.second(block.first(input))
        return main + block.short(input)[..., 1:-1, 1:-1]

    def after(block: nn.Module, input: Tensor) -> Tensor:
        short = block.short(input)[..., 1:-1, 1:-1]
        return block.second(block.first(input)) + short

    expected = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("first", "second")]
    assert planned(block_network(before)) == planned(block_network(after)) == expected


def test_a_gate_that_reads_the_input_of_a_convolution_makes_no_shortcut_of_it() -> None:
    def gated(block: nn.Module, input: Tensor) -> Tensor:
        gate = block.gate(input)[..., 1:-1, 1:-1]
        return block.second(block.first(input) * gate)

    assert planned(block_network(gated)) == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("first", "second")]


def test_a_function_of_other_channels_than_those_of_the_convolution_before_it_stays() -> None:
    def concatenated(block: nn.Module, input: Tensor) -> Tensor:
        main = block.second(block.first(input))
        return block.gate(torch.cat([main, main], dim=1))[:, :8]

    with pytest.raises(ValueError, match="finds no activation function to replace"):
        planned(block_network(concatenated), StoMPPConfig(activation_functions="sign"))


def test_a_convolution_with_groups_that_modes_ask_for_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"conv_3x3.convolution: a convolution with groups=\d+, .* cannot be binarized"
    ):
        binarize(mobilenet(), StoMPPConfig(modes={"conv_3x3": "bnn"}))


def test_bytes_of_a_convolution_are_those_of_its_packed_tensors() -> None:
    model = resnet()
    name = next(iter(plan_modules(model, StoMPPConfig())))

    found = layer_bytes(model, [name])[name]

    # 8 filters of 72 weights in rows of 32 bytes, a scale and a bias each, a threshold a channel; names come on top.
    assert 0 < found["bnn"] - (8 * 32 + 2 * 8 * 4 + 8 * 4) < 2000
    assert found["float"] >= 8 * 72 * 4


def test_trainer_makes_a_network_from_a_config_binary_block_by_block(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"pixel_values": torch.randn(3, SIZE, SIZE, generator=generator) + index % 3, "labels": index % 3}
        for index in range(24)
    ]
    model = binarize(resnet(), StoMPPConfig(surrogate="none"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    arguments = StoMPPTrainingArguments(
        tmp_path, max_steps=18, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[], use_cpu=True
    )

    StoMPPTrainer(model=model, args=arguments, train_dataset=rows).train()

    convolutions = [m for m in model.modules() if isinstance(m, MaskedBinaryConv2d)]
    assert all(m.committed and m.input_activation.committed for m in convolutions)
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert all(f"{name}.weight" in changed for name, m in model.named_modules() if isinstance(m, MaskedBinaryConv2d))
    batch = images()
    assert torch.equal(logits(pack(model.eval()), batch), logits(model, batch))
