from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from programs import load

from hf_stompp import StoMPPConfig


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
KERNELS = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
FINDINGS = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")


def test_the_glue_table_is_what_the_result_files_say() -> None:
    glue_table = load(ROOT / "benchmarks" / "glue_table.py")
    assert glue_table.table(glue_table.read_results()) in FINDINGS


def test_the_table_of_accuracy_is_what_the_result_lines_say() -> None:
    accuracy_table = load(ROOT / "benchmarks" / "accuracy_table.py")
    lines = accuracy_table.read_results()
    assert accuracy_table.table(lines) in BENCHMARKS
    by_seed = {
        cell: [line for line in lines if (line["task"], line["cell"]) == ("sst2", cell)] for cell in ("float", "bwn")
    }
    floats = [line["float"]["accuracy"] for line in by_seed["float"]]
    packed = [line["packed"]["accuracy"] for line in by_seed["bwn"]]
    of_float, of_packed = (f"{sum(found) / len(found):.1f}" for found in (floats, packed))
    assert f"| float | {of_float} (2) |" in BENCHMARKS and f"| `bwn` | {of_packed} (2) |" in BENCHMARKS
    means = f"SST-2 is at {of_packed}, with float weights at {of_float} (means of two seeds"
    assert means in " ".join(README.split()) and len(floats) == len(packed) == 2


def test_the_table_of_ablations_is_what_the_result_lines_say() -> None:
    lines = (ROOT / "benchmarks" / "results" / "accuracy_ablations.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert {line["split"] for line in found} == {"held_out"}
    for line in found:
        name = line["cell"] if line["packed"] is None else f"`{line['cell']}`"
        accuracy = (line["packed"] or line["float"])["accuracy"]
        assert re.search(rf"^\| {name}[:,][^|]* \| {accuracy:.1f} \|$", FINDINGS, re.MULTILINE), name


def test_the_table_of_costs_is_what_the_result_file_says() -> None:
    tradeoff = load(ROOT / "benchmarks" / "tradeoff.py")
    (file,) = (ROOT / "benchmarks" / "results").glob("tradeoff_*.json")
    table = tradeoff.table(json.loads(file.read_text(encoding="utf-8")))
    assert table in BENCHMARKS
    begin = README.index("| model | accuracy | MiB |")
    shown = README[begin : README.index("\n\n", begin)].splitlines()
    assert len(shown) == 2 + 7 and set(shown) <= set(table.splitlines())


def test_the_table_of_serving_is_what_the_result_file_says() -> None:
    example = ROOT / "examples" / "serve"
    load_test = load(example / "load_test.py")
    result = json.loads((ROOT / "benchmarks" / "results" / "serve_amd_epyc_zen5.json").read_text(encoding="utf-8"))
    assert load_test.table(result) in (example / "README.md").read_text(encoding="utf-8")
    changes = {name: row["score_changes_with_batch"] for name, row in result["models"].items()}
    page = " ".join((ROOT / "docs" / "howto" / "deploy_cpu.md").read_text(encoding="utf-8").split())
    assert f"moved by up to {changes['float, int8']:.1f} with what other clients asked" in page
    (packed,) = (name for name in changes if name.startswith("1-bit weights"))
    assert f"by up to {changes[packed]:.3f} with 1-bit weights" in page
    rates = [f"{result['models'][name]['requests_per_second']:.0f}" for name in (packed, "float, int8", "float")]
    assert f"answers {rates[0]} requests a second, in int8 {rates[1]}, in float {rates[2]};" in page


def test_the_tables_of_cpu_speed_are_what_the_result_file_says() -> None:
    cpu_table = load(ROOT / "benchmarks" / "cpu_table.py")
    tables = [table for result in cpu_table.read_results() for table in cpu_table.tables(result)]
    assert len(tables) == 5
    assert all(table in KERNELS for table in tables)


def test_the_table_of_speed_is_what_the_result_file_says() -> None:
    file = ROOT / "benchmarks" / "results" / "cpu_bytes_intel_xeon.json"
    cases = json.loads(file.read_text(encoding="utf-8"))["models"]
    found = {(case["model"], case["batch"], case["length"]): case["seconds"] for case in cases}
    rows = re.findall(r"^\| (all-MiniLM-L6-v2|BERT-base shape) \| (\d+) x (\d+) \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 4
    for model, batch, length, cells in rows:
        seconds = found[model, int(batch), int(length)]
        columns = "fp32", "int8", "packed_bwn", "packed_fp32"
        assert cells == " | ".join(f"{1000 * seconds[column]['median']:.1f}" for column in columns)


def test_the_table_of_training_cost_is_what_the_result_files_say() -> None:
    names = {"bert-base": "BERT-base shape", "minilm": "all-MiniLM-L6-v2"}
    methods = {"ste": "vanilla STE", "stompp": "StoMPP, STE-free", "stompp_ste": "StoMPP+STE"}
    for path in sorted((ROOT / "benchmarks" / "results").glob("training_*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        at_the_end = {method: row["peak_bytes_of_last_step"] for method, row in result["summary"].items()}
        for method, label in methods.items():
            row = result["summary"][method]
            ratios = [row[f"{name}_over_float"] for name in ("whole_run", "last_window", "after_last_window", "peak")]
            cells = [f"{ratio:.2f}" for ratio in [*ratios, at_the_end[method] / at_the_end["float"]]]
            assert f"| {' | '.join([names[result['model']], result['dtype'], label, *cells])} |" in TRAINING


def test_the_table_of_the_demo_is_what_the_result_file_says() -> None:
    shown = json.loads((ROOT / "benchmarks" / "results" / "demo_amd_epyc_zen5.json").read_text(encoding="utf-8"))
    # What the demo does today.
    assert shown["config"]["surrogate"] == StoMPPConfig().surrogate
    assert "--train_word_embeddings False" in shown["command"]
    for name in ("float", "packed"):
        accuracy, size = shown["metrics"][name]["eval_accuracy"], shown["bytes"][name]
        row = [name, f"{accuracy:.3f}", f"{size:,}", f"{shown['milliseconds_per_batch'][name]:.1f}"]
        assert row in [line.split() for line in README.splitlines()]


def test_the_cost_of_a_teacher_is_what_the_result_file_says() -> None:
    path = ROOT / "benchmarks" / "results" / "teacher_cost_minilm_fp32.json"
    summary = json.loads(path.read_text(encoding="utf-8"))["summary"]
    with_one, without = summary["stompp_ste_teacher"], summary["stompp_ste"]
    steps = [f"{row['whole_run_over_float']:.2f}" for row in (with_one, without)]
    peaks = [f"{row['peak_over_float']:.2f}" for row in (with_one, without)]
    said = f"takes {steps[0]} of a float step, without one {steps[1]}, and peak memory {peaks[0]} and {peaks[1]}"
    assert said in " ".join(TRAINING.split())


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.name)
def test_every_result_file_says_how_and_where_it_was_made(path: Path) -> None:
    summary = json.loads(path.read_text(encoding="utf-8"))
    training = ("metrics", "bytes", "seconds") if "task" in summary else ()
    for field in ("command", "seed", "machine", "versions", *training):
        assert summary[field] is not None, field
    assert not re.search(r"/(root|home|tmp|work)/", path.read_text(encoding="utf-8"))
    if training and summary["method"] != "float":
        assert summary["metrics"]["packed"] is not None and summary["metrics"]["binary_final"] is not None


def test_every_file_and_heading_that_the_readme_links_to_is_there() -> None:
    links = [link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and not [path for path, _, _ in links if not (ROOT / path).exists()]
    for path, _, anchor in links:
        if anchor:
            headings = re.findall(
                r"^#+ (.+)$", (ROOT / (path or "README.md")).read_text(encoding="utf-8"), re.MULTILINE
            )
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_table_of_encoders_on_a_gpu_is_what_the_result_file_says() -> None:
    gpu = load(ROOT / "benchmarks" / "gpu.py")
    path = ROOT / "benchmarks" / "results" / "cuda_nvidia_h100_80gb_hbm3.json"
    assert gpu.encoder_table(json.loads(path.read_text(encoding="utf-8"))) in BENCHMARKS


def test_the_table_of_text_learned_by_masks_is_what_the_result_lines_say() -> None:
    lines = (ROOT / "benchmarks" / "results" / "sentence_encoder.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {
        "minilm text-ste": "vanilla STE (`--method ste`)",
        "2-epochs": "StoMPP+STE, two epochs of text (`--epochs 2`, 6,632 steps)",
        "minilm text-": "StoMPP+STE (`--method stompp_ste`, the default)",
    }
    figures: dict[str, list[str]] = {name: [] for name in rows.values()}
    for line in map(json.loads, lines):
        name = next((name for part, name in rows.items() if part in line["command"]), None)
        if name is not None:
            loss, cosine = line["held_out"]["eval_loss"], line["held_out"]["eval_cosine_similarity"]
            figures[name] += [f"{loss:.3f}", f"{cosine:.3f}", f"{line['packed']['spearman']:.1f}"]
    assert [name for name, found in figures.items() if f"| {name} | {' | '.join(found)} |" not in FINDINGS] == []


def test_the_table_of_sentence_encoders_is_what_the_result_lines_say() -> None:
    page = (ROOT / "docs" / "howto" / "distillation.md").read_text(encoding="utf-8")
    lines = (ROOT / "benchmarks" / "results" / "sentence_encoder.jsonl").read_text(encoding="utf-8").splitlines()
    for line in map(json.loads, lines):
        figures = f"{line['packed']['spearman']:.1f} | {line['kept']:.1f} %"
        parts = {
            "--modes attention=bwn": "attention `bwn`",
            "--word_embeddings binary": "1-bit word embeddings",
            "all-attentions": "attention learned",
            "minilm text-": "clean text, attention learned",
            "text-masks": "masks",
            "2-epochs": "text twice",
            "--text pairs": "then pairs",
            "--bf16": "`--bf16`",
        }
        mode = ", ".join([f"`{line['mode']}`", *(said for asked, said in parts.items() if asked in line["command"])])
        row = f"| {mode} | {line['steps']:,} | {line['seconds'] / 60:.0f} | {figures} |"
        assert row in page
        assert f"{line['packed']['spearman']:.1f} ({figures.split('| ')[1]}" in " ".join(BENCHMARKS.split())
