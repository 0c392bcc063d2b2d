"""`prefopt quantize`, `prefopt merge` and `prefopt dpo --quantize`, as their users meet them."""

import json
import shutil

import pytest
import safetensors.torch
import torch
import transformers

from prefopt import export
from prefopt.cli import main
from prefopt.nn.nf4_linear import NF4Linear
from prefopt.policy import Policy

IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def flags(tiny_model, tiny_data):
    return [
        "--model", str(tiny_model), "--data", str(tiny_data), "--max_steps", "3", "--lr", "5e-2",
        "--eval_fraction", "0.25", "--sample_tokens", "4", "--lora.r", "4", "--quiet",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, flags):
    out = tmp_path_factory.mktemp("runs") / "lora"
    assert main(["dpo", *flags, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def qlora_run(tmp_path_factory, flags):
    out = tmp_path_factory.mktemp("runs") / "qlora"
    assert main(["dpo", *flags, "--quantize", "nf4", "--out", str(out)]) == 0
    return out


def logits(path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits


def own_logits(path, **options) -> torch.Tensor:
    policy = Policy.from_pretrained(path, **options).eval()
    with torch.no_grad(), policy.plain_attention():
        return policy.model(IDS, use_cache=False).logits


def fails(capsys, *argv: str) -> str:
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("prefopt: ") and error.count("\n") == 1, error
    return error


# ---- dpo --quantize ------------------------------------------------------------------------------


def test_dpo_says_what_became_4bit_and_what_the_reference_is(flags, tmp_path, capsys, run):
    out = tmp_path / "run"
    arguments = [flag for flag in flags if flag != "--quiet"]
    assert main(["dpo", *arguments, "--quantize", "nf4", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for part in (
        "linear layers in nf4", "bytes a weight", "relative error", "left as it is: lm_head",
        "the reference is the base with the adapter off", "before: policy = reference",
    ):  # fmt: skip
        assert part in text, part
    assert "quantize: nf4" in (out / "config.yaml").read_text()
    again = [flag if flag != str(flags[1]) else str(run) for flag in arguments]
    assert main(["dpo", *again, "--out", str(tmp_path / "on")]) == 0
    text = capsys.readouterr().out
    assert "does not start at zero, so the reference is a frozen copy" in text


def test_eval_repeats_what_training_measured(qlora_run, tiny_data, capsys):
    """Against the 4-bit base that the run began with, not the dense one of its folder."""
    result = json.loads((qlora_run / "evaluation.json").read_text())["after"]
    arguments = ["eval", str(qlora_run), "--data", str(tiny_data), "--held_out", "0.25"]
    assert main([*arguments, "--out", str(qlora_run / "again.json")]) == 0
    again = json.loads((qlora_run / "again.json").read_text())
    assert again["margin_mean"] == pytest.approx(result["margin_mean"], rel=1e-5)
    assert main([*arguments, "--quantize", "none", "--out", str(qlora_run / "dense.json")]) == 0
    dense = json.loads((qlora_run / "dense.json").read_text())
    assert dense["margin_mean"] != pytest.approx(result["margin_mean"], rel=1e-2)


# ---- quantize ------------------------------------------------------------------------------------


def test_quantize_writes_a_folder_like_any_other(tiny_model, tmp_path, capsys):
    out = tmp_path / "four"
    assert main(["quantize", "--model", str(tiny_model), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "bytes a weight" in text and "relative error" in text and f"model: {out}" in text
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert (out / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    on_the_fly = own_logits(tiny_model, quantize="nf4")
    assert torch.equal(own_logits(out), on_the_fly)
    assert main(["generate", "--model", str(out), "--prompt", "Hi", "--max_new_tokens", "2"]) == 0


def test_quantize_has_the_options_of_the_format(tiny_model, tmp_path):
    sizes, errors, doubles = {}, {}, {}
    dense = own_logits(tiny_model)
    for name, options in {
        "plain": [], "single": ["--double", "false"], "search": ["--search", "signed"],
        "fp4": ["--kind", "fp4"], "bf16": ["--storage", "bfloat16"],
        "all": ["--skip", '["lm_head", "q_proj"]'],
    }.items():  # fmt: skip
        out = tmp_path / name
        assert main(["quantize", "--model", str(tiny_model), "--out", str(out), *options]) == 0
        tensors = safetensors.torch.load_file(out / "model.safetensors")
        sizes[name] = sum(t.nbytes for t in tensors.values())
        doubles[name] = any("nested" in key for key in tensors)
        errors[name] = (own_logits(out) - dense).norm().item()
    assert [name for name, double in doubles.items() if not double] == ["single"]
    assert sizes["plain"] < sizes["all"]  # where two layers are left out
    assert errors["search"] < errors["plain"] < errors["fp4"]
    assert errors["bf16"] == errors["plain"]


def test_quantize_refuses_what_it_cannot_do(tiny_model, run, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["quantize", "--model", str(tiny_model), "--out", str(tmp_path / "four")]) == 0
    capsys.readouterr()
    assert "adapter" in fails(capsys, "quantize", "--model", str(run), "--out", out)
    four = str(tmp_path / "four")
    assert "nf4 already" in fails(capsys, "quantize", "--model", four, "--out", out)
    assert "exists already" in fails(capsys, "quantize", "--model", str(tiny_model), "--out", four)
    assert "skip" in fails(
        capsys, "quantize", "--model", str(tiny_model), "--out", out, "--skip", '["nothing"]'
    )
    assert not (tmp_path / "out").exists()


# ---- merge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
def test_merge_writes_what_was_trained(run, qlora_run, quantized, tmp_path, capsys):
    source, out = qlora_run if quantized else run, tmp_path / "merged"
    assert main(["merge", str(source), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for part in ("rounding lost at most 0.00%", "KL to the trained", "100.0% of", f"model: {out}"):
        assert part in text, part
    torch.testing.assert_close(logits(out), own_logits(source), rtol=1e-4, atol=1e-4)
    report = json.loads((out / "merge_report.json").read_text())
    assert report["kl_merged"] < 1e-8 < 1e-5 < report["kl_base"]
    assert report["agreement"] == 1.0 and len(report["layers"]) == 14
    assert report["accuracy_trained"] == report["accuracy_merged"]
    assert (out / "tokenizer.json").is_file()
    assert not any("lora" in k for k in safetensors.torch.load_file(out / "model.safetensors"))


def test_merge_into_the_original_weights_and_into_4_bits(qlora_run, run, tmp_path, capsys):
    """Both are other models than the trained one, here further away than what training changed."""
    for into in ("original", "4bit"):
        out = tmp_path / into
        argv = ["merge", str(qlora_run), "--out", str(out), "--into", into]
        code = main(argv)
        text, error = capsys.readouterr()
        if code:  # the verdict depends on how much was trained
            assert code == 2 and "--into dequantized" in error and not out.exists()
            assert main([*argv, "--force"]) == 0
            text = capsys.readouterr().out
        report = json.loads((out / "merge_report.json").read_text())
        assert report["kl_merged"] > 1e-5 and "KL to the trained" in text
    dense = own_logits(qlora_run, quantize="none")
    torch.testing.assert_close(logits(tmp_path / "original"), dense, rtol=1e-4, atol=1e-4)
    policy = Policy.from_pretrained(tmp_path / "4bit")
    assert sum(isinstance(m, NF4Linear) for m in policy.model.modules()) == 14
    layers = json.loads((tmp_path / "4bit" / "merge_report.json").read_text())["layers"]
    assert min(layer["lost"] for layer in layers.values()) > 0.1


def test_a_merge_that_loses_the_training_is_not_written(run, tmp_path, capsys, monkeypatch):
    """Whatever merging did: the check is on the result."""
    real = export.merge.merge_lora

    def broken(model, *args, **kwargs):
        report = real(model, *args, **kwargs)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(3.0)
        return report

    monkeypatch.setattr(export.merge, "merge_lora", broken)
    out = tmp_path / "out"
    error = fails(capsys, "merge", str(run), "--out", str(out))
    assert "lost much of the training" in error and "--force" in error
    assert not out.exists()


def test_a_small_change_lost_in_bfloat16_is_noticed(run, tmp_path, capsys):
    """|D| far below the last bit of W: merged in bfloat16 the model is the base again."""
    shutil.copytree(run / "model", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(
        {k: t * 1e-4 if "lora_B" in k else t for k, t in tensors.items()}, file
    )
    argv = ["merge", str(tmp_path / "adapter"), "--dtype", "bfloat16"]
    error = fails(capsys, *argv, "--out", str(tmp_path / "lost"))
    assert "--dtype float32" in error
    assert main([*argv[:2], "--dtype", "float32", "--out", str(tmp_path / "kept")]) == 0


def test_merge_refuses_bad_input(tiny_model, run, tiny_data, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert "no adapter to merge" in fails(capsys, "merge", str(tiny_model), "--out", out)
    assert "exists already" in fails(capsys, "merge", str(run), "--out", str(run))
    assert "pairs_checked" in fails(capsys, "merge", str(run), "--out", out, "--pairs_checked", "0")
    assert "max_length" in fails(capsys, "merge", str(run), "--out", out, "--max_length", "2")
    assert "nothing.jsonl" in fails(
        capsys, "merge", str(run), "--out", out, "--data", "nothing.jsonl"
    )
    assert not (tmp_path / "out").exists()
