"""The benchmarks run, measure what they say, and compare two trainers. At tiny scale their figures mean nothing."""

import json
import sys

import pytest
from diffusers import ZImagePipeline

from running import ROOT, SCRIPT, run


BENCHMARKS = ROOT / "tests" / "benchmarks"
sys.path.append(str(BENCHMARKS))

import full_size  # noqa: E402 (needs the path)
import gpu  # noqa: E402


ENCODERS = ("text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors")


def benchmark(name, *flags, output):
    """Run a benchmark with --output, in float32 unless `flags` say otherwise; gives its JSON and what it printed."""
    finished = run([sys.executable, BENCHMARKS / name, "--mixed_precision=no", *flags, f"--output={output}"])
    return json.loads(output.read_text(encoding="utf-8")), finished.stdout


@pytest.mark.slow
def test_full_size_compares_two_trainers_by_turns(tiny_model, tmp_path):
    flags = [f"--folder={tiny_model}", "--resolution=64", "--steps=4", f"--script={SCRIPT}"]
    content, printed = benchmark("full_size.py", *flags, output=tmp_path / "figures.json")
    ours, other = content["results"]
    assert ours["script"] == "ours" and other["script"].endswith(SCRIPT.name)
    assert ours["losses"] == other["losses"] and len(ours["losses"]) == 4
    for row in (ours, other):
        assert "--gradient_checkpointing" in row["command"]
        assert 0 < row["step_s"] < row["first_step_s"] < row["wall_s"]
        # The launcher and the trainer have both imported torch, and there is nothing else that takes memory.
        assert 0.3 < row["anonymous_peak_gb"] < row["resident_peak_gb"] < 3
        assert row["training_peak_gb"] <= row["resident_peak_gb"]
    assert printed.count("\n") == 5 and content["machine"]["cpu"] in printed


@pytest.mark.slow
def test_products_are_computed_in_float32_or_left_out(tiny_model, tmp_path):
    flags = [f"--folder={tiny_model}", "--resolution=64", "--steps=3", "--mixed_precision=bf16"]
    losses = {}
    for products in ("bf16", "float32", "none"):
        more = [] if products == "bf16" else [f"--products={products}"]
        content, _ = benchmark("full_size.py", *flags, *more, output=tmp_path / f"{products}.json")
        losses[products] = content["results"][0]["losses"]
    assert losses["float32"] == pytest.approx(losses["bf16"], rel=0.01) and losses["float32"] != losses["bf16"]
    # Without products the velocity is zero, and the loss that of the target itself.
    assert all(abs(without - loss) > 0.01 for without, loss in zip(losses["none"], losses["bf16"], strict=True))


@pytest.mark.slow
def test_step_sets_the_step_against_a_bare_pass(tmp_path):
    flags = ["--dim=48", "--layers=1", "--resolution=64", "--steps=3", "--rounds=1"]
    content, _ = benchmark("step.py", *flags, output=tmp_path / "figures.json")
    bare, ours = content["results"]
    assert bare["steps"] == ours["steps"] == 2
    assert bare["ratio"] == 1 and ours["ratio"] == pytest.approx(ours["step_s"] / bare["step_s"])
    assert 0 < bare["step_s"] < ours["step_s"]  # the step has all of the pass, and an optimizer


@pytest.mark.slow
def test_encode_starts_cold_and_then_warm(tiny_model, tmp_path):
    flags = [f"--folder={tiny_model}", "--resolution=32", "--pictures=3"]
    content, _ = benchmark("encode.py", *flags, output=tmp_path / "figures.json")
    cold, warm = content["results"]
    assert [cold["run"], warm["run"]] == ["cold", "warm"]
    assert cold["losses"] == warm["losses"]
    # What the warm start leaves unread: the weights of the text encoder and of the VAE.
    spared = sum((tiny_model / name).stat().st_size for name in ENCODERS) / 1e9
    assert cold["read_gb"] - warm["read_gb"] > 0.9 * spared


@pytest.mark.slow
def test_same_weights_tells_a_script_that_trains_something_else(tmp_path):
    changed = tmp_path / "changed.py"
    other_noise = "\n\nof_parts = seeded_generator\nseeded_generator = lambda *parts: of_parts('other', *parts)\n"
    changed.write_text(SCRIPT.read_text(encoding="utf-8") + other_noise, encoding="utf-8")
    for new, status, result in [(SCRIPT, 0, "the same"), (changed, 1, "32 of 32 tensors differ")]:
        command = [sys.executable, BENCHMARKS / "same_weights.py", SCRIPT, new, "--only=plain"]
        finished = run(command, check=False)
        assert finished.returncode == status
        assert f"| plain                 | {result}" in finished.stdout


@pytest.mark.slow
def test_reading_measures_what_two_trainers_wait_and_what_an_update_takes(tmp_path):
    flags = ["--photographs=4", "--megapixels=0.5", "--resolution=64", "--threads=2", "--rounds=1", "--steps=4"]
    flags += ["--sleep=0.05", "--updates=4", f"--script={SCRIPT}"]
    content, _ = benchmark("reading.py", *flags, output=tmp_path / "figures.json")
    waits, updates = content["results"][2:], content["results"][:2]
    assert [row["what"] for row in content["results"]] == ["update of the tiny model"] * 2 + ["waiting, 2"] * 2
    assert {row["script"] for row in waits} == {row["script"] for row in updates} and len(updates) == 2
    assert all(0 <= row["low"] <= row["s"] <= row["high"] for row in content["results"])


@pytest.fixture
def small_builder(monkeypatch):
    """`full_size.build`, and shards so small that a tiny model has several."""
    monkeypatch.setattr(full_size, "SHARD_BYTES", 50_000)
    transformer = {"dim": 48, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 32}
    transformer |= {"axes_dims": [4, 6, 6]}
    text_encoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text_encoder = (
        full_size.TEXT_ENCODER | text_encoder | {"vocab_size": 300, "num_key_value_heads": 1, "head_dim": 16}
    )
    vae = full_size.VAE | {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
    return lambda folder: full_size.build(folder, transformer, text_encoder, vae)


def test_full_size_builds_on_after_an_interruption_and_deletes_only_what_it_built(
    small_builder, tmp_path, monkeypatch
):
    folder = tmp_path / "model"
    small_builder(folder)
    shards = sorted(folder.rglob("*.safetensors"))
    assert len(shards) > 6
    contents = [shard.read_bytes() for shard in shards]
    kept, lost = shards[0], shards[1:]
    written = kept.stat().st_mtime_ns
    for shard in lost:
        shard.unlink()
    small_builder(folder)
    assert kept.stat().st_mtime_ns == written
    assert [shard.read_bytes() for shard in shards] == contents
    assert ZImagePipeline.from_pretrained(folder).transformer.config.n_layers == 1
    monkeypatch.setattr(sys, "argv", ["full_size.py", f"--folder={folder}", "--delete"])
    assert full_size.main() == 0 and not folder.exists()
    folder.mkdir()  # someone else's
    with pytest.raises(SystemExit):
        full_size.main()
    assert folder.exists()


@pytest.mark.slow
def test_gpu_runs_all_of_its_code_on_a_tiny_model(tmp_path):
    flags = ["--device=cpu", "--tiny", "--quick", "--steps=2", "--only=picture|float8|^bf16, recomputed|NF4"]
    finished = run([sys.executable, BENCHMARKS / "gpu.py", *flags, f"--output={tmp_path / 'gpu.md'}"])
    written = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    table = [line for line in written.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6 and all(line in finished.stdout for line in table)
    assert "a resumed run is the run itself, bit for bit" in written
    assert "here and on the CPU: cosine 1.0000" in written


def test_gpu_puts_its_table_between_the_marks_of_the_readme(tmp_path):
    (tmp_path / "README.md").write_text(f"before\n{gpu.BEGIN}old\n{gpu.END}after\n", encoding="utf-8")
    gpu.put_into_readme("| new |", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text("utf-8") == f"before\n{gpu.BEGIN}\n| new |\n\n{gpu.END}after\n"
    assert gpu.BEGIN in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_recipes_trains_both_subjects_and_scores_each_average(tmp_path):
    flags = ["--recipes=rate 2e-3", "--seeds=0", "--steps=2", f"--output={tmp_path / 'recipes.jsonl'}"]
    rows = run([sys.executable, BENCHMARKS / "recipes.py", *flags]).stdout.strip().splitlines()
    assert [row.split("|")[2].strip() for row in rows[2:]] == ["no", "0.99", "0.995"]
    lines = [json.loads(line) for line in (tmp_path / "recipes.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["run"] for line in lines] == [["rate 2e-3", "striped-ball", 0], ["rate 2e-3", "cross-toy", 0]]
    again = run([sys.executable, BENCHMARKS / "recipes.py", *flags]).stdout.strip().splitlines()
    assert again == rows


@pytest.mark.slow
def test_cards_prints_a_row_for_each_recipe_that_fits(tiny_model):
    printed = run(
        [sys.executable, BENCHMARKS / "cards.py", f"--model={tiny_model}"], {"ACCELERATE_USE_CPU": "1"}
    ).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    assert [row[0] for row in rows] == ["8 GB", "12 GB", "16 GB", "24 GB"]
    assert all(float(size) < float(row[1]) for row in rows for size in row[4:7])
