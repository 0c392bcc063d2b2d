"""prefopt.nn.quantize.load_quantized: from files the same bits as in place, in little memory."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from prefopt.durable import load_tensors, save_tensors
from prefopt.errors import InputError
from prefopt.nn.empty_model import Places, empty_model, mismatch, read_config
from prefopt.nn.quantize import load_quantized, quantize_model
from prefopt.nn.tensor_files import TensorFiles

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
X = torch.arange(24).view(2, 12) % 90


def saved(folder: Path, tied=False, dtype=torch.float32, **options) -> Path:
    config = transformers.LlamaConfig(
        **SIZES, attention_bias=True, tie_word_embeddings=tied, dtype=str(dtype)[6:]
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    model.generation_config.max_new_tokens = 7
    model.to(dtype).save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("dense"))


def loaded(folder: Path, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def in_place(folder: Path, dtype=torch.float32, skip=("lm_head",), **options):
    model = loaded(folder, dtype)
    return model, quantize_model(model, skip, **options)


def assert_same_models(a, b) -> None:
    """Every tensor, buffers that are not saved among them, its dtype, and what is trainable."""
    for of in (
        lambda m: dict(m.named_parameters(remove_duplicate=False)),
        lambda m: dict(m.named_buffers()),
    ):
        mine, other = of(a), of(b)
        assert list(mine) == list(other)
        for name, tensor in mine.items():
            assert tensor.dtype == other[name].dtype, name
            assert torch.equal(tensor, other[name]), name
            assert tensor.requires_grad == other[name].requires_grad, name
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]
    assert [m.training for m in a.modules()] == [m.training for m in b.modules()]
    assert torch.equal(a(X).logits, b(X).logits)


@pytest.mark.parametrize(
    ("tied", "stored", "dtype", "files"),
    [
        (False, torch.float32, torch.float32, {}),
        (False, torch.float32, torch.bfloat16, {"max_shard_size": "60KB"}),
        (True, torch.bfloat16, torch.float16, {}),
        (True, torch.bfloat16, torch.bfloat16, {"max_shard_size": "30KB"}),
    ],
)
def test_from_files_as_in_place(tied, stored, dtype, files, tmp_path, caplog):
    folder = saved(tmp_path, tied, stored, **files)
    assert (tmp_path / WEIGHTS).exists() != bool(files)
    want, in_place_report = in_place(folder, dtype)
    with caplog.at_level(logging.INFO, "prefopt"):
        model, report = load_quantized(str(folder), dtype, CPU)
    assert not caplog.records  # not by way of the whole model
    assert_same_models(model, want)
    assert report == in_place_report
    assert model.config.to_dict() == want.config.to_dict()
    assert model.name_or_path == want.name_or_path == str(folder)
    assert model.generation_config.to_dict() == want.generation_config.to_dict()
    assert model.generation_config.max_new_tokens == 7
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_options_and_skip_from_files(dense):
    options = {"kind": "fp4", "double": False, "search": "unsigned", "skip": ("lm_head", "mlp")}
    model, report = load_quantized(str(dense), torch.float32, CPU, **options)
    want, in_place_report = in_place(dense, **options)
    assert_same_models(model, want)
    assert report == in_place_report


def rewritten(source: Path, folder: Path, change) -> Path:
    """A copy whose tensors went through `change`."""
    folder.mkdir(exist_ok=True)
    tensors = load_tensors(source / WEIGHTS)
    change(tensors)
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def test_old_names_that_transformers_drops(dense, tmp_path, caplog):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    folder = rewritten(dense, tmp_path, lambda tensors: tensors.update(extra))
    with caplog.at_level(logging.INFO, "prefopt"):
        model, _ = load_quantized(str(folder), torch.float32, CPU)
    assert not caplog.records
    assert_same_models(model, in_place(dense)[0])


def test_biases_behind_their_weights(dense, tmp_path, caplog):
    """A file has its widest types first."""

    def narrow(tensors):
        for name in tensors:
            if name.endswith("bias"):
                tensors[name] = tensors[name].bfloat16()

    folder = rewritten(dense, tmp_path, narrow)
    names = [name for name in load_tensors(folder / WEIGHTS) if "0.self_attn.q_proj" in name]
    assert [name.rpartition(".")[2] for name in names] == ["weight", "bias"]
    with caplog.at_level(logging.INFO, "prefopt"):
        model, _ = load_quantized(str(folder), torch.float32, CPU)
    assert not caplog.records
    assert_same_models(model, in_place(folder)[0])


def test_both_tied_weights_in_the_file(tmp_path, caplog):
    source = saved(tmp_path / "source", tied=True)
    head = "lm_head.weight"
    embed = "model.embed_tokens.weight"
    equal = rewritten(source, tmp_path / "equal", lambda t: t.update({head: t[embed].clone()}))
    with caplog.at_level(logging.INFO, "prefopt"):
        model, _ = load_quantized(str(equal), torch.float32, CPU)
        assert not caplog.records
        assert model.lm_head.weight is model.model.embed_tokens.weight
        other = rewritten(source, tmp_path / "other", lambda t: t.update({head: t[embed] * 2}))
        model, _ = load_quantized(str(other), torch.float32, CPU)
    assert "differ, which the config ties" in caplog.text  # transformers unties them
    assert_same_models(model, in_place(other)[0])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def unprefixed(tensors):
    for name in list(tensors):
        if name.startswith("model."):
            tensors[name.removeprefix("model.")] = tensors.pop(name)


def test_what_does_not_fit_one_to_one_is_loaded_whole(dense, tmp_path, caplog):
    """Names without the prefix of the base model, and a file that torch.save wrote."""
    folders = {
        "the files lack model.": rewritten(dense, tmp_path / "base", unprefixed),
        "it has no model.safetensors": tmp_path / "bin",
        "the model has no extra.weight": rewritten(
            dense, tmp_path / "extra", lambda t: t.update({"extra.weight": torch.zeros(2)})
        ),
    }
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_bytes((dense / "config.json").read_bytes())
    torch.save(load_tensors(dense / WEIGHTS), tmp_path / "bin" / "pytorch_model.bin")
    want, in_place_report = in_place(dense)
    for reason, folder in folders.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, "prefopt"):
            model, report = load_quantized(str(folder), torch.float32, CPU)
        assert "is loaded whole before it is quantised: " + reason in caplog.text
        assert_same_models(model, want)
        assert report == in_place_report


def test_fused_experts(tmp_path, caplog):
    """Saved expert by expert, held as one tensor: attention in 4 bits, the experts as they are."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "prefopt"):
        model, report = load_quantized(str(tmp_path), torch.float32, CPU)
    assert "is loaded whole" in caplog.text and report is not None
    assert {x.name.rpartition(".")[2] for x in report.layers} >= {"q_proj", "o_proj"}
    assert any("experts" in reason for reason in report.skipped.values())
    assert_same_models(model, in_place(tmp_path)[0])


def test_values_that_transformers_converts(dense, monkeypatch):
    """Under the same name and in the same shape, so that names do not tell."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    turned = WeightConverter(["o_proj.weight"], ["o_proj.weight"], operations=[Transpose(0, 1)])
    files = TensorFiles(dense)
    places = Places(empty_model(read_config(dense), torch.float32))
    assert mismatch(places, set(files.names), files) is None
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: [turned])
    reason = mismatch(places, set(files.names), files)
    assert reason == "transformers converts model.layers.0.self_attn.o_proj.weight on loading"


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NAME), f"lacks weights the model needs: {NAME}"),
        (
            lambda t: t.update({NAME: t[NAME][:, :64]}),
            r"\[64, 64\], but its config asks for \[64, 128\]",
        ),
        (lambda t: t[NAME].fill_(float("nan")), f"{NAME} has 8192 NaN or infinite values"),
    ],
    ids=["missing", "shape", "nan"],
)
def test_damaged_weights(change, words, dense, tmp_path):
    with pytest.raises(InputError, match=words):
        load_quantized(str(rewritten(dense, tmp_path, change)), torch.float32, CPU)


def test_damaged_folders(dense, tmp_path):
    with pytest.raises(InputError, match="cannot read the model config"):
        load_quantized(str(tmp_path), torch.float32, CPU)
    with pytest.raises(InputError, match="cannot load a model from no/such-model"):
        load_quantized("no/such-model", torch.float32, CPU)
    folder = rewritten(dense, tmp_path, lambda t: None)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1000])
    with pytest.raises(InputError, match="is damaged or not a safetensors file"):
        load_quantized(str(folder), torch.float32, CPU)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised to 8 bits"),
    ],
)
def test_other_quantisations(settings, words, dense, tmp_path):
    folder = rewritten(dense, tmp_path, lambda t: None)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        load_quantized(str(folder), torch.float32, CPU)


def test_gpt2_is_refused_with_the_reason(tmp_path):
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=96)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a Conv1D, whose weight is stored the other way round"):
        load_quantized(str(tmp_path), torch.float32, CPU)


def test_parameters_are_real_again_outside():
    assert not nn.Linear(2, 2).weight.is_meta


# Peak of the process's memory above what it had before, in MB.
PEAK = """
import sys, re, torch
from pathlib import Path
from prefopt.nn.quantize import load_quantized
torch.set_num_threads(1)
load_quantized(sys.argv[1], torch.bfloat16, torch.device("cpu"))  # what the imports take
def memory(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000
Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
before = memory("VmRSS")
model, report = load_quantized(sys.argv[2], torch.bfloat16, torch.device("cpu"))
print(memory("VmHWM") - before, report.before / 1e6, report.after / 1e6)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_dense_model_is_never_in_memory(dense, tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=512,
        num_attention_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    noise = torch.randn(2048 * 512) * 0.02
    tensors = {k: noise[: v.numel()].view(v.shape) for k, v in state.items()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    save_tensors(tmp_path / WEIGHTS, tensors)
    del tensors
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(dense), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))},
    )
    assert not done.returncode, done.stderr
    peak, before, after = map(float, done.stdout.split()[-3:])
    assert before > 60 and after < before / 3
    # The files are float32, so `before`, in bfloat16, is half of what they hold.
    assert peak < after + before / 2, done.stdout
