"""prefopt.nn.bnb_format against transformers and bitsandbytes: the same bytes, the same logits."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prefopt.durable import load_tensors, save_tensors
from prefopt.errors import InputError
from prefopt.nn import bnb_format, tensor_files
from prefopt.nn.bnb_format import STATE, encode, load_bnb, quantization_config, save_bnb
from prefopt.nn.lora import LoraConfig, add_lora
from prefopt.nn.nf4 import Packed4, quantize_nf4
from prefopt.nn.nf4_linear import NF4Linear
from prefopt.nn.quantize import load_quantized, quantize_model

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
# name -> (options of quantize_nf4, what the peer calls them, storage)
FORMATS = {
    "nf4 double": ({}, {"bnb_4bit_use_double_quant": True}, "uint8"),
    "nf4": ({"double": False}, {}, "uint8"),
    "fp4": ({"double": False, "kind": "fp4"}, {"bnb_4bit_quant_type": "fp4"}, "uint8"),
    "nf4 in bfloat16": (
        {},
        {"bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.bfloat16},
        "bfloat16",
    ),
}
X = torch.arange(24).view(2, 12) % 90
pytestmark = [
    # The peer's own: torch.jit in its dependencies, casts that it reports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with biases, its widths multiples of 64."""
    folder = tmp_path_factory.mktemp("dense")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, attention_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


def ours(dense: Path, skip=("lm_head",), **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    quantize_model(model, skip, **options)
    return model


def peers(folder: Path, **options):
    """The peer's model, in training mode: in evaluation its CPU kernels repack the weights."""
    pytest.importorskip("bitsandbytes")
    if options:
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16} | options
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
        options = {"quantization_config": config}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", **options
    )
    return model.train()


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(a: Packed4 | torch.Tensor, b: Packed4 | torch.Tensor) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    tensors = zip(a[:4], b[:4], strict=True)
    equal = all(
        x is y if x is None else torch.equal(x, y) and x.dtype == y.dtype for x, y in tensors
    )
    return equal and a[4:] == b[4:]


# ---- the peer ----


@pytest.mark.parametrize("name", FORMATS)
def test_the_files_are_transformers_byte_for_byte(name, dense, tmp_path):
    options, peer_options, storage = FORMATS[name]
    peers(dense, **{"bnb_4bit_use_double_quant": False} | peer_options).save_pretrained(
        tmp_path / "p"
    )
    save_bnb(ours(dense, rounding="bnb_cpu", **options), tmp_path / "o", storage=storage)
    assert read(tmp_path / "o") == read(tmp_path / "p")


@pytest.mark.parametrize("name", FORMATS)
def test_the_peer_computes_the_same_from_our_files(name, dense, tmp_path):
    options, _, storage = FORMATS[name]
    model = ours(dense, **options)
    save_bnb(model, tmp_path / "o", storage=storage)
    peer = peers(tmp_path / "o")
    assert torch.equal(peer(X).logits, model(X).logits)
    # 5.23 cannot turn what it loaded into the "original" format (NotImplementedError).
    peer.save_pretrained(tmp_path / "again", save_original_format=False)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "o" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_we_compute_the_same_from_the_peers_files(name, dense, tmp_path):
    _, options, _ = FORMATS[name]
    peer = peers(dense, **{"bnb_4bit_use_double_quant": False} | options)
    peer.save_pretrained(tmp_path / "p")
    model, report = load_quantized(str(tmp_path / "p"), torch.bfloat16, CPU)
    assert report is None and not model.training
    assert torch.equal(model(X).logits, peer(X).logits)
    assert not hasattr(model.config, "quantization_config")


def test_layers_left_dense_are_named_with_the_head(dense, tmp_path):
    skip = ("lm_head", "layers.1.mlp.down_proj", "k_proj")
    model = ours(dense, skip)
    listed = quantization_config(model)["llm_int8_skip_modules"]
    names = ("0.self_attn.k_proj", "1.mlp.down_proj", "1.self_attn.k_proj")
    assert listed == ["lm_head", *(f"model.layers.{name}" for name in names)]
    save_bnb(model, tmp_path / "o")
    assert torch.equal(peers(tmp_path / "o")(X).logits, model(X).logits)
    again, _ = load_quantized(str(tmp_path / "o"), torch.bfloat16, CPU)
    assert torch.equal(again(X).logits, model(X).logits)


def test_a_quantised_head_is_not_skipped(dense, tmp_path):
    model = ours(dense, skip=())
    assert quantization_config(model)["llm_int8_skip_modules"] == []
    save_bnb(model, tmp_path / "o")
    assert torch.equal(peers(tmp_path / "o")(X).logits, model(X).logits)


def test_quantised_and_plain_scales_in_one_folder(dense, tmp_path):
    """One weight whose rows differ by orders of magnitude, so that 8-bit scales would hurt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:120] *= 1e-4
    report = quantize_model(model)
    assert report.fallbacks == ["model.layers.0.mlp.up_proj"]
    save_bnb(model, tmp_path / "o")
    assert torch.equal(peers(tmp_path / "o")(X).logits, model(X).logits)
    loaded = load_bnb(tmp_path / "o")
    name = "model.layers.0.mlp.up_proj.weight"
    assert loaded[name].nested is None and loaded[name.replace("up", "down")].nested is not None


def test_shards_hold_whole_weights(dense, tmp_path):
    model = ours(dense)
    save_bnb(model, tmp_path / "one")
    save_bnb(model, tmp_path / "many", max_shard_size="30KB")
    index = json.loads((tmp_path / "many" / tensor_files.INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert not (tmp_path / "many" / WEIGHTS).exists()
    assert all(load_tensors(tmp_path / "many" / f).keys() for f in files)
    for name, file in index["weight_map"].items():
        weight = name.partition(".weight.")[0] + ".weight"
        assert ".weight." not in name or index["weight_map"][weight] == file
    whole, parts = load_bnb(tmp_path / "one"), load_bnb(tmp_path / "many")
    assert whole.keys() == parts.keys() and all(same(whole[k], parts[k]) for k in whole)
    assert torch.equal(peers(tmp_path / "many")(X).logits, model(X).logits)
    total = sum(t.nbytes for t in load_tensors(tmp_path / "one" / WEIGHTS).values())
    numel = sum(
        p.numel() for p in transformers.AutoModelForCausalLM.from_pretrained(dense).parameters()
    )
    assert index["metadata"] == {"total_parameters": numel, "total_size": total}


def test_tied_weights_are_written_once(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        vocab_size=96, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    model = ours(tmp_path / "dense")
    save_bnb(model, tmp_path / "o")
    assert "lm_head.weight" not in load_bnb(tmp_path / "o")
    assert torch.equal(peers(tmp_path / "o")(X).logits, model(X).logits)
    again, _ = load_quantized(str(tmp_path / "o"), torch.bfloat16, CPU)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(X).logits, model(X).logits)


# ---- by itself ----


def test_use_and_casts_leave_the_file_as_it_is(dense, tmp_path):
    model = ours(dense)
    save_bnb(model, tmp_path / "a")
    model.eval()
    with torch.no_grad():
        model(X)
        model(X[:, :1])
    model.train()
    model(X).logits.sum().backward()
    save_bnb(model, tmp_path / "b")
    model.float().half().to(torch.bfloat16)
    save_bnb(model, tmp_path / "c")
    assert read(tmp_path / "a") == read(tmp_path / "b")
    assert all(
        same(x, y) for x, y in zip(packed(tmp_path / "a"), packed(tmp_path / "c"), strict=True)
    )


def packed(folder: Path) -> list[Packed4]:
    return [value for value in load_bnb(folder).values() if isinstance(value, Packed4)]


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 90)),
    kind=st.sampled_from(["nf4", "fp4"]),
    double=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    block=st.sampled_from([32, 64, 256]),
    storage=st.sampled_from(sorted(bnb_format.STORAGES)),
)
def test_any_shape_comes_back(shape, kind, double, dtype, block, storage, tmp_path_factory):
    p = quantize_nf4(torch.randn(shape).to(dtype), kind=kind, double=double, block=block)
    folder = tmp_path_factory.mktemp("any")
    if len(p.codes) % bnb_format.STORAGES[storage].itemsize:
        storage = "uint8"
    parts = encode(p, bnb_format.STORAGES[storage])
    save_tensors(folder / WEIGHTS, {f"x.weight.{k}".rstrip("."): v for k, v in parts.items()})
    (name, back), *more = load_bnb(folder).items()
    assert name == "x.weight" and not more and same(back, p)


def test_the_folder_is_replaced_whole_or_not_at_all(dense, tmp_path, monkeypatch):
    model = ours(dense)
    folder = tmp_path / "o"
    save_bnb(model, folder)
    before = read(folder)
    assert (folder / WEIGHTS).stat().st_mode & 0o777 == 0o666 & ~umask()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(bnb_format, "save_shards", full)
    model.config.architectures = ["Other"]
    for name in ("o", "new"):
        with pytest.raises(OSError, match="No space"):
            save_bnb(model, tmp_path / name, storage="bfloat16")
    assert read(folder) == before and [p.name for p in tmp_path.iterdir()] == ["o"]
    assert model.config.architectures == ["Other"]


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_what_cannot_be_saved(dense, tmp_path):
    model = ours(dense)
    (tmp_path / "file").write_text("")
    for arguments, words in (
        ({"storage": "int4"}, "storage of 4-bit weights is one of 'uint8'"),
        ({"max_shard_size": "5 gigs"}, "max_shard_size is a size such as"),
        ({"max_shard_size": "0GB"}, "max_shard_size is a size such as"),
        ({"dir": tmp_path / "file"}, "is a file"),
    ):
        with pytest.raises(InputError, match=words):
            save_bnb(model, **{"dir": tmp_path / "o"} | arguments)
    assert not (tmp_path / "o").exists()
    odd = nn.Module()
    odd.x = NF4Linear(quantize_nf4(torch.randn(3, 6)))
    with pytest.raises(InputError, match="x has 9 packed bytes, which cannot be viewed as float32"):
        save_bnb(odd, tmp_path / "o", storage="float32")
    with pytest.raises(InputError, match="call quantize_model first"):
        save_bnb(transformers.AutoModelForCausalLM.from_pretrained(dense), tmp_path / "o")
    add_lora(model, LoraConfig(r=2, targets=["q_proj"]))
    with pytest.raises(InputError, match="q_proj has an adapter"):
        save_bnb(model, tmp_path / "o")


# ---- damage ----

NAME = "model.layers.0.self_attn.q_proj.weight"


def without(part):
    return lambda tensors: tensors.pop(f"{NAME}.{part}")


def replaced(part, change):
    def damage(tensors):
        key = f"{NAME}.{part}".rstrip(".")
        tensors[key] = change(tensors[key])

    return damage


def state(**changes):
    def damage(tensors):
        key = f"{NAME}.{STATE}nf4"
        text = json.dumps(json.loads(bytes(tensors[key].tolist())) | changes).encode()
        tensors[key] = torch.tensor(list(text), dtype=torch.uint8)

    return damage


DAMAGE = [
    (without("absmax"), f"lacks {NAME}.absmax"),
    (without("quant_map"), f"lacks {NAME}.quant_map"),
    (without("nested_absmax"), f"lacks {NAME}.nested_absmax"),
    (without("nested_quant_map"), f"lacks {NAME}.nested_quant_map"),
    (without(STATE + "nf4"), f"needs {NAME}.{STATE}nf4"),
    (lambda t: t.pop(NAME), f"has {NAME}.absmax without {NAME} itself|without {NAME} itself"),
    (lambda t: t.update({f"{NAME}.{STATE}fp4": torch.zeros(3, dtype=torch.uint8)}), "needs"),
    (replaced("", lambda x: x[:-1]), "is 2047 of torch.uint8, not 2048"),
    (replaced("", lambda x: x.long()), "is stored as torch.int64"),
    (
        replaced("absmax", lambda x: x.float()),
        "absmax is 64 of torch.float32, not 64 of torch.uint8",
    ),
    (replaced("absmax", lambda x: x[1:]), "absmax is 63 of torch.uint8"),
    (replaced("nested_absmax", lambda x: x.repeat(2)), "nested_absmax is 2 of"),
    (replaced("quant_map", lambda x: x * 2), "quant_map is not the codebook of nf4"),
    (replaced("quant_map", lambda x: x[:8]), "quant_map is 8 of"),
    (replaced("nested_quant_map", lambda x: x.flip(0)), "nested_quant_map is not the codebook"),
    (replaced(STATE + "nf4", lambda x: x[:-3]), "is damaged"),
    (replaced(STATE + "nf4", lambda x: x.double()), "is damaged"),
    (state(quant_type="fp4"), "does not describe a nf4 weight"),
    (state(blocksize=48), "does not describe a nf4 weight"),
    (state(dtype="int8"), "does not describe a nf4 weight"),
    (state(shape=[64, -64]), "does not describe a nf4 weight"),
    (state(shape=None), "does not describe a nf4 weight"),
    (state(shape=[64, 32]), "is 2048 of torch.uint8, not 1024"),
    (state(nested_offset=None), "does not describe quantised scales"),
    (state(nested_blocksize=128), "does not describe quantised scales"),
    (state(nested_dtype="float16"), "does not describe quantised scales"),
]


@pytest.fixture(scope="module")
def saved(dense, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "o"
    save_bnb(ours(dense), folder)
    return folder


@pytest.mark.parametrize(("damage", "words"), DAMAGE, ids=[words for _, words in DAMAGE])
def test_damage_is_named(damage, words, saved, tmp_path):
    tensors = load_tensors(saved / WEIGHTS)
    damage(tensors)
    save_tensors(tmp_path / WEIGHTS, tensors)
    with pytest.raises(InputError, match=words) as raised:
        load_bnb(tmp_path)
    assert str(tmp_path / WEIGHTS) in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (None, "has no quantization_config; it is a dense model"),
        ({"quant_method": "gptq"}, "quantised by gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised to 8 bits"),
    ],
)
def test_other_folders_are_refused(settings, words, saved, tmp_path):
    (tmp_path / WEIGHTS).write_bytes((saved / WEIGHTS).read_bytes())
    config = json.loads((saved / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        load_bnb(tmp_path)


def test_a_dense_file_and_an_empty_folder(dense, tmp_path):
    with pytest.raises(InputError, match=r"has no model\.safetensors and no"):
        load_bnb(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((dense / WEIGHTS).read_bytes())
    with pytest.raises(InputError, match="has no 4-bit weights"):
        load_bnb(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"12345678")
    with pytest.raises(InputError, match="damaged or not a safetensors file"):
        load_bnb(tmp_path)


def test_shards_that_do_not_fit_their_index(dense, tmp_path):
    save_bnb(ours(dense), tmp_path / "o", max_shard_size="30KB")
    index = tmp_path / "o" / tensor_files.INDEX
    right = json.loads(index.read_text())["weight_map"]
    first, *_, last = sorted(set(right.values()))
    name = next(name for name, file in right.items() if file == first)
    for change, words in (
        (
            {name: "model-00009-of-00009.safetensors"},
            "00009.safetensors does not exist; copy all shards",
        ),
        ({name: "../elsewhere.safetensors"}, 'has no "weight_map" of tensors and files'),
        ({name: 3}, 'has no "weight_map" of tensors and files'),
        ({"new.weight": first}, f"{first} lacks new.weight, which"),
        ({name: last}, f"{last} lacks {name}, which"),
    ):
        index.write_text(json.dumps({"weight_map": right | change}))
        with pytest.raises(InputError, match=words):
            load_bnb(tmp_path / "o")
    fewer = {k: v for k, v in right.items() if k != name}
    index.write_text(json.dumps({"weight_map": fewer}))
    with pytest.raises(InputError, match=f"{first} has {name}, which"):
        load_bnb(tmp_path / "o")
    index.write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        load_bnb(tmp_path / "o")
