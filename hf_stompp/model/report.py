"""Counts what is binary in a model, and the bytes that it takes."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from torch import nn

from ..config import StoMPPConfig
from ..nn import (
    MaskedBinaryActivation,
    MaskedBinaryEmbedding,
    MaskedBinaryLinear,
    PackedBinaryActivation,
    PackedBinaryEmbedding,
    PackedBinaryLinear,
    PackedInt8Embedding,
    RoundedEmbedding,
)
from ..ops import packed_bytes
from ..plan import unit_prefixes


FLOAT32_BYTES = 4
"""Packed layers keep scales, biases and thresholds in float32."""


@dataclass(frozen=True)
class UnitReport:
    """
    Size of one unit, or of what is in no unit, `"(float)"`. Counts replaced modules, weights that are or become 1-bit,
    and parameters that stay float. `bytes_before` are those of the float model; `bytes_latent` include freeze masks
    and activation parameters.
    """

    unit: str
    modules: int = 0
    binary_weights: int = 0
    float_weights: int = 0
    bytes_before: int = 0
    bytes_latent: int = 0
    bytes_packed: int = 0


@dataclass(frozen=True)
class BinarizationReport:
    """
    Sizes by unit; `str()` of it is a table.

    Args:
        units (`list[UnitReport]`):
            From input to output, and last what is in no unit: `unit` (its name), `modules`, `binary_weights` and
            `float_weights` (numbers), `bytes_before`, `bytes_latent` and `bytes_packed`.
    """

    units: list[UnitReport]

    @property
    def total(self) -> UnitReport:
        """Sum of all rows."""
        fields = [name for name in UnitReport.__dataclass_fields__ if name != "unit"]
        return UnitReport("total", **{name: sum(getattr(row, name) for row in self.units) for name in fields})

    def __str__(self) -> str:
        header = ("unit", "modules", "binary weights", "float weights", "bytes before", "latent", "packed")
        rows = [(unit, *map("{:,}".format, sizes)) for unit, *sizes in map(astuple, [*self.units, self.total])]
        units, *numbers = zip(header, *rows, strict=True)
        columns = [[cell.ljust(max(map(len, units))) for cell in units]]
        columns += [[cell.rjust(max(map(len, column))) for cell in column] for column in numbers]
        return "\n".join(map("  ".join, zip(*columns, strict=True)))


def packed_linear_bytes(out_features: int, in_features: int, has_bias: bool) -> int:
    """Bytes of a packed linear layer: weight, scales, and biases where it has them; no threshold."""
    return out_features * (packed_bytes(in_features) + FLOAT32_BYTES * (2 if has_bias else 1))


def report(model: nn.Module, config: StoMPPConfig) -> BinarizationReport:
    """Sizes of a latent or packed model, as it was, as it is trained and as it is packed."""
    plan = config.plan
    counts: dict[str, dict[str, int]] = {unit: {} for unit in [*config.units, "(float)"]}
    counted: set[str] = set()

    def add(unit: str, **values: int) -> None:
        for field, value in values.items():
            counts[unit][field] = counts[unit].get(field, 0) + value

    float_bytes = next(p for p in model.parameters() if p.is_floating_point()).element_size()

    def add_binary(unit: str, weights: int, biases: int, packed: int) -> None:
        before = (weights + biases) * float_bytes
        latent = before + weights
        sizes = {"bytes_before": before, "bytes_latent": latent, "bytes_packed": packed}
        add(unit, modules=1, binary_weights=weights, float_weights=biases, **sizes)

    for name, module in model.named_modules():
        if isinstance(module, MaskedBinaryActivation | PackedBinaryActivation):
            owner = name if name in plan else name.rpartition(".")[0]
            features = module.features
            # Latent: mask, shift, threshold and scale; packed: threshold.
            add(plan[owner].unit, modules=1, bytes_latent=features * 9 + 4, bytes_packed=features * FLOAT32_BYTES)
        elif isinstance(module, MaskedBinaryLinear | PackedBinaryLinear):
            rows, columns, has_bias = module.out_features, module.in_features, plan[name].bias
            packed = packed_linear_bytes(rows, columns, has_bias or plan[name].reads_bits)
            add_binary(plan[name].unit, rows * columns, rows if has_bias else 0, packed)
        elif isinstance(module, MaskedBinaryEmbedding | PackedBinaryEmbedding):
            rows, columns = module.num_embeddings, module.embedding_dim
            add_binary(plan[name].unit, rows * columns, 0, rows * (packed_bytes(columns) + float_bytes))
        elif isinstance(module, RoundedEmbedding | PackedInt8Embedding):
            entries = module.num_embeddings * module.embedding_dim
            before, after = entries * float_bytes, entries + module.num_embeddings * float_bytes
            add("(float)", float_weights=entries, bytes_before=before, bytes_latent=before, bytes_packed=after)
        else:
            continue
        counted.update(f"{name}.{tensor}" for tensor, _ in module.named_parameters(recurse=False))
        counted.update(f"{name}.{tensor}" for tensor, _ in module.named_buffers(recurse=False))
    saved = set(model.state_dict())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in counted or name not in saved:
            continue
        unit = next((unit for unit in config.units if name.startswith(unit_prefixes(unit))), "(float)")
        size = tensor.numel() * tensor.element_size()
        weights = tensor.numel() if isinstance(tensor, nn.Parameter) else 0
        add(unit, float_weights=weights, bytes_before=size, bytes_latent=size, bytes_packed=size)
    return BinarizationReport([UnitReport(unit, **values) for unit, values in counts.items()])
