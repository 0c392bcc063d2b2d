"""Reward models: loaded, drawn, read at the last real token, saved, and the same elsewhere."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from prefopt import InputError, LoraConfig, Policy, pack
from prefopt.data.encode import Encoded
from prefopt.export import ScoreVerdict, merge_policy
from prefopt.nn.heads import ScoreStats, scores
from prefopt.nn.saved_module import SavedModule

V = 61
SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LORA = LoraConfig(r=4, alpha=8)


def write_model(folder: Path, kind="Llama", **options) -> Path:
    """A random language model with large weights, and a tokenizer of words."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    model.tie_weights()
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, V)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("rm") / "base", tie_word_embeddings=False)


def load(path, seed=0, **kwargs) -> Policy:
    torch.manual_seed(seed)
    return Policy.from_pretrained(path, **kwargs)


def groups(tokens=None) -> list[Encoded]:
    rng = np.random.default_rng(0)
    sizes = ((11, (9, 4)), (3, (1, 12)), (6, (5, 2, 7)))
    draw = tokens or (lambda n: rng.integers(3, V, n).astype(np.int32))
    return [
        Encoded(draw(p), tuple(draw(n) for n in lengths), i) for i, (p, lengths) in enumerate(sizes)
    ]


def batch_of(policy, layout=None, items=None):
    items = items or groups()
    (batch,) = pack(items, max_tokens=1 << 20, layout=layout or policy.layout, ends=True)
    return batch.to(policy.device)


@torch.no_grad()
def scored(policy, items=None) -> torch.Tensor:
    return policy.eval().scores(batch_of(policy, items=items))


@torch.no_grad()
def move(policy) -> Policy:
    """Some way from the start, as training would."""
    generator = torch.Generator().manual_seed(3)
    for _, p in policy.trainable():
        p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p))
    return policy


@torch.no_grad()
def by_transformers(model, tokenizer, side, items=None) -> torch.Tensor:
    """transformers' own scores of all texts in one padded batch."""
    texts = [[*i.prompt.tolist(), *r.tolist()] for i in items or groups() for r in i.responses]
    tokenizer.padding_side = side
    batch = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
    return model(**batch).logits[:, 0]


# --- the head ----------------------------------------------------------------------------------


def test_a_fresh_head_is_drawn_with_variance_1_over_d_plus_1_from_torchs_generator(base, tmp_path):
    wide = write_model(
        tmp_path / "wide", hidden_size=1024, intermediate_size=16, num_attention_heads=8
    )
    policy = load(wide, head="score")
    weight = policy.model.score.weight
    assert weight.shape == (1, 1024) and weight.dtype == torch.float32
    assert policy.model.score.bias is None and policy.is_reward_model
    # sd of the estimate: 1 / sqrt(2 * 1024) = 2.2 %
    assert weight.std().item() * math.sqrt(1025) == pytest.approx(1, abs=0.07)
    assert abs(weight.mean().item()) < 4 / 1024
    same, other = load(base, head="score"), load(base, seed=1, head="score")
    assert torch.equal(load(base, head="score").model.score.weight, same.model.score.weight)
    assert not torch.equal(other.model.score.weight, same.model.score.weight)


def test_scores_are_float32_products_with_the_hidden_state_of_the_last_token(base):
    policy = load(base, head="score", dtype=torch.float64)
    assert policy.model.score.weight.dtype == torch.float64
    got, want = scored(policy), []
    for item in groups():
        for response in item.responses:
            ids = torch.tensor([[*item.prompt, *response]])
            with policy.plain_attention():
                hidden = policy.model.model(ids, use_cache=False).last_hidden_state[0, -1]
            want.append((hidden * policy.model.score.weight[0]).sum())
    # Norms are taken in float32 even in a float64 model.
    assert (got - torch.stack(want)).abs().max() < 1e-5 and got.dtype == torch.float64
    h = torch.randn(5, 32, dtype=torch.float64)
    assert (scores(policy.model.score, h) - h @ policy.model.score.weight[0]).abs().max() < 1e-12
    half = load(base, head="score", dtype=torch.bfloat16)
    assert half.model.score.weight.dtype == torch.float32 and scored(half).dtype == torch.float32
    h = torch.randn(5, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = scores(half.model.score, h)
    want = (h.float() @ half.model.score.weight.T)[:, 0]
    assert (got - want).abs().max() < 1e-5 and got.dtype == torch.float32


def test_the_gradient_of_head_and_body_is_that_of_a_float64_oracle(base):
    policy = load(base, head="score", dtype=torch.float64)
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
    (policy.scores(batch_of(policy)) * weights).sum().backward()
    got = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    policy.zero_grad()
    texts = [[*item.prompt, *r] for item in groups() for r in item.responses]
    with policy.plain_attention():
        for weight, text in zip(weights, texts, strict=True):
            (weight * policy.model(torch.tensor([text])).logits[0, 0]).backward()
    for name, p in policy.model.named_parameters():
        bound = 1e-6 * max(1.0, p.grad.abs().max().item())  # norms are taken in float32
        assert (got[name] - p.grad).abs().max() < bound, name
    assert got["score.weight"].abs().max() > 0


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral", "GPTNeoX"])
def test_padded_and_shared_layouts_give_the_same_scores_and_gradients(kind, tmp_path):
    policy = load(write_model(tmp_path / kind, kind), head="score", dtype=torch.float64)
    assert policy.layout == "shared"
    gradients = []
    for layout in ("shared", "padded"):
        policy.zero_grad()
        policy.scores(batch_of(policy, layout)).square().sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-6 * max(1.0, b.abs().max().item())


def test_scores_depend_on_no_other_text_and_on_no_order(base):
    policy = load(base, head="score")
    items = groups()
    together = scored(policy).split([2, 2, 3])
    for item, want in zip(items, together, strict=True):
        assert (scored(policy, [item]) - want).abs().max() < 1e-5
    back = scored(policy, items[::-1]).split([3, 2, 2])
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(back[::-1], together, strict=True))


# --- saved and loaded --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"lora": LORA},
        {"lora": LORA, "quantize": "nf4"},
        {"dtype": "bfloat16"},
        {"lora": LORA, "dtype": "bfloat16", "quantize": "nf4"},
        {"lora": LoraConfig(r=2, use_dora=True)},
        {"lora": LoraConfig(r=2, init="pissa")},
    ],
    ids=str,
)
def test_saved_and_loaded_scores_are_the_same_bit_for_bit(base, tmp_path, how):
    policy = move(load(base, head="score", **how))
    want = scored(policy)
    policy.score_stats = ScoreStats(0.5, 2.0, 7)
    policy.save_pretrained(tmp_path / "m")
    again = load(tmp_path / "m", seed=99, dtype=how.get("dtype", "auto"))  # says itself what it is
    assert again.is_reward_model and again.score_stats == policy.score_stats
    got = scored(again)
    # PiSSA is stored as LoRA of twice the rank: the same function in another rounding.
    pissa = "lora" in how and how["lora"].init == "pissa"
    assert torch.equal(got, want) if not pissa else (got - want).abs().max() < 1e-4
    if not pissa:  # and once more
        again.save_pretrained(tmp_path / "n")
        assert torch.equal(scored(load(tmp_path / "n", dtype=how.get("dtype", "auto"))), want)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_transformers_and_peft_load_the_folder_with_the_same_scores(base, tmp_path, lora, side):
    peft = pytest.importorskip("peft")
    policy = move(load(base, head="score", lora=lora))
    policy.save_pretrained(tmp_path / "m")
    auto = transformers.AutoModelForSequenceClassification
    found = [auto.from_pretrained(tmp_path / "m", num_labels=1)]
    if lora:
        own = peft.AutoPeftModelForSequenceClassification
        found.append(own.from_pretrained(tmp_path / "m", num_labels=1))
    else:
        config = found[0].config
        assert config.architectures == ["LlamaForSequenceClassification"]
        assert (config.num_labels, config.problem_type) == (1, "regression")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for model in found:
        got = by_transformers(model.eval(), tokenizer, side)
        assert (got - scored(policy)).abs().max() < 1e-5


def test_an_adapter_of_peft_loads_with_the_same_scores(base, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(base, num_labels=1)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p) * p.requires_grad)
    model.save_pretrained(tmp_path / "a")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    policy = load(tmp_path / "a")
    got = scored(policy)
    assert policy.is_reward_model
    assert (got - by_transformers(model, tokenizer, "right")).abs().max() < 1e-5


def test_an_adapter_without_a_task_type_that_has_a_head_is_a_reward_models(base, tmp_path):
    policy = move(load(base, head="score", lora=LORA))
    policy.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"task_type": None}))
    assert torch.equal(scored(load(tmp_path / "a")), scored(policy))


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_statistics_of_what_was_in_a_folder_before_are_gone(base, tmp_path, lora):
    policy = load(base, head="score", lora=lora)
    policy.score_stats = ScoreStats(0.5, 2.0, 7)
    policy.save_pretrained(tmp_path / "m")
    policy.score_stats = None
    policy.save_pretrained(tmp_path / "m")
    assert load(tmp_path / "m").score_stats is None


def test_the_head_trains_under_lora_and_after_it_was_loaded(base, tmp_path):
    """Elsewhere it is frozen without a task type, and random after loading."""
    policy = load(base, head="score", lora=LORA)
    assert policy.lora_report is not None and policy.lora_report.saved == ["score"]
    for name in ("first", "second"):
        assert isinstance(policy.model.score, SavedModule)
        (head,) = [p for n, p in policy.trainable() if "score" in n]
        assert head.dtype == torch.float32
        before, plain = head.detach().clone(), policy.model.score.base.weight.clone()
        optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.1)
        policy.scores(batch_of(policy)).sum().backward()
        optimizer.step()
        assert not torch.equal(head, before)
        assert torch.equal(policy.model.score.base.weight, plain)
        policy.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        assert torch.equal(stored["base_model.model.score.weight"], head)
        policy = load(tmp_path / name, seed=5)


def test_a_model_with_an_adapter_can_be_a_policys_again(base):
    policy = move(load(base, head="score", lora=LORA))
    again = Policy(policy.model, policy.tokenizer, base=policy.base)
    assert again.is_reward_model and torch.equal(scored(again), scored(policy))


def test_full_training_in_16_bits_keeps_float32_masters_and_an_exact_head(base, tmp_path):
    policy = load(base, head="score", dtype="bfloat16")
    policy.use_float32_masters()
    move(policy)
    policy.save_pretrained(tmp_path / "m")
    again = load(tmp_path / "m", dtype="bfloat16")
    assert torch.equal(again.model.score.weight, policy.model.score.weight)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (scored(again) - scored(policy)).abs().max() < 0.25
    assert scored(policy).dtype == torch.float32


def test_a_4_bit_reward_model_keeps_its_head_dense_and_is_read_again(base, tmp_path):
    load(base, head="score").save_pretrained(tmp_path / "dense")
    policy = load(tmp_path / "dense", quantize="nf4")
    assert type(policy.model.score).__name__ in ("Linear", "CpuLinear")
    assert policy.quant_report is not None
    assert policy.quant_report.skipped["score"] == "the head of a reward model"
    half = load(tmp_path / "dense", quantize="nf4", dtype="bfloat16")
    assert torch.equal(half.model.score.weight, policy.model.score.weight)
    policy.save_pretrained(tmp_path / "packed")
    assert torch.equal(scored(load(tmp_path / "packed")), scored(policy))
    tuned = move(load(tmp_path / "packed", lora=LORA))
    tuned.save_pretrained(tmp_path / "tuned")
    assert torch.equal(scored(load(tmp_path / "tuned")), scored(tuned))
    # A 4-bit language model becomes one too.
    lm = load(base, quantize="nf4")
    lm.save_pretrained(tmp_path / "lm4")
    fresh = load(tmp_path / "lm4", head="score", lora=LORA)
    assert fresh.is_reward_model and scored(fresh).isfinite().all()
    with pytest.raises(InputError, match="train an adapter"):
        policy.parameter_groups(1e-3)


def test_transformers_loads_a_4_bit_reward_model_with_its_scores(tmp_path):
    pytest.importorskip("bitsandbytes")  # whose CPU products want multiples of 64
    wide = write_model(tmp_path / "wide", hidden_size=64, intermediate_size=64)
    load(wide, head="score").save_pretrained(tmp_path / "dense")
    policy = load(tmp_path / "dense", quantize="nf4")
    policy.save_pretrained(tmp_path / "packed")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "packed")
    assert type(model.score) is torch.nn.Linear
    model.train()  # in evaluation its CPU kernel rounds the scales to bfloat16
    assert (by_transformers(model, tokenizer, "right") - scored(policy)).abs().max() < 1e-4


# --- padding -----------------------------------------------------------------------------------


def repad(base: Path, folder: Path, pad: str | None, config_pad: int | None, drop=()) -> Path:
    shutil.copytree(base, folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("pad_token", None)
    if pad is not None:
        settings["pad_token"] = pad
    for key in drop:
        settings.pop(key, None)
    file.write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": config_pad}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("pad", "config_pad"), [("</s>", 2), (None, None), ("</s>", None)])
def test_a_pad_token_that_ends_texts_is_replaced_and_scores_stay(
    base, tmp_path, caplog, pad, config_pad, side
):
    """The texts end with EOS: where that is the pad token, transformers reads before the end."""
    rng = np.random.default_rng(0)

    def ending(n):
        return np.append(rng.integers(3, V, n - 1), 2).astype(np.int32)

    items = groups(ending)
    want = scored(load(base, head="score"), items)
    policy = load(repad(base, tmp_path / "same", pad, config_pad), head="score")
    assert torch.equal(scored(policy, items), want)
    assert policy.tokenizer.pad_token_id not in (None, 2)
    assert policy.model.config.pad_token_id == policy.tokenizer.pad_token_id
    assert "a reward model needs one that ends no text" in caplog.text
    policy.save_pretrained(tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer.pad_token_id == policy.tokenizer.pad_token_id
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    assert (by_transformers(model, tokenizer, side, items) - want).abs().max() < 1e-5


def test_a_tokenizer_with_no_special_token_but_eos_pads_with_its_last_word(base, tmp_path, caplog):
    folder = repad(base, tmp_path / "bare", "</s>", 2, drop=["bos_token", "unk_token"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] == "</s>"]
    tokenizer["model"]["unk_token"] = "</s>"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    policy = load(folder, head="score")
    assert policy.tokenizer.pad_token_id == V - 1 and f"'w{V - 1}'" in caplog.text


def test_a_reward_folder_that_pads_with_eos_is_pointed_out(base, tmp_path, caplog):
    load(base, head="score").save_pretrained(tmp_path / "m")
    policy = load(repad(tmp_path / "m", tmp_path / "eos", "</s>", 2))
    assert "one token before their end" in caplog.text
    assert torch.equal(scored(policy), scored(load(tmp_path / "m")))


def test_the_tokenizer_of_a_good_folder_is_copied_byte_for_byte(base, tmp_path, caplog):
    load(base, head="score").save_pretrained(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (base / name).read_bytes()
    assert not [record for record in caplog.records if "pad" in record.message]


# --- what is refused ---------------------------------------------------------------------------


def test_what_a_reward_model_cannot_do_is_an_input_error(base, tmp_path):
    policy = load(base, head="score")
    (batch,) = pack(groups(), max_tokens=1 << 20)
    with pytest.raises(InputError, match=r"ends=True"):
        policy(batch)
    with pytest.raises(InputError, match="cannot write"):
        policy.generate(["w5"])
    with pytest.raises(InputError, match=r"score_stats\.json"):
        policy.normalised(torch.zeros(2))
    policy.score_stats = ScoreStats(1.0, 0.0, 5)
    with pytest.raises(InputError, match="are equal"):
        policy.normalised(torch.zeros(2))
    with pytest.raises(InputError, match="head='score'"):
        load(base).scores(batch)
    policy.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="is a reward model"):
        load(tmp_path / "m", head="lm")
    with pytest.raises(InputError, match="'lm' or 'score'"):
        load(base, head="value")
    load(base, lora=LORA).save_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match="merge it first"):
        load(tmp_path / "a", head="score")
    load(base, head="score", lora=LORA).save_pretrained(tmp_path / "b")
    with pytest.raises(InputError, match="adapter of a reward model"):
        load(tmp_path / "b", head="lm")


def edited(folder: Path, to: Path, **config) -> Path:
    shutil.copytree(folder, to)
    file = to / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return to


def test_folders_that_are_no_reward_models_are_refused(base, tmp_path):
    load(base, head="score").save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=r"num_labels|cannot load"):
        load(edited(tmp_path / "m", tmp_path / "three", id2label={"0": "a", "1": "b", "2": "c"}))
    lacking = edited(tmp_path / "m", tmp_path / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights the model needs: score\.weight"):
        load(lacking)
    stats = edited(tmp_path / "m", tmp_path / "stats")
    for text in ('{"mean": 1}', '{"mean": 1, "std": NaN, "n": 3}', "[1]", "{"):
        (stats / "score_stats.json").write_text(text)
        with pytest.raises(InputError, match=r"score_stats\.json"):
            load(stats)


def test_classes_without_a_score_head_are_refused(tmp_path):
    with pytest.raises(InputError, match="no sequence classification for granite"):
        load(write_model(tmp_path / "granite", "Granite"), head="score")
    with pytest.raises(InputError, match="no linear layer called 'score'"):
        load(write_model(tmp_path / "bloomish", "Bart", d_model=32), head="score")


def test_statistics_are_those_of_numpy_and_survive_their_file(tmp_path):
    values = torch.tensor([1.0, 2.5, -4.0, 0.25])
    stats = ScoreStats.of(values)
    assert (stats.mean, stats.std, stats.n) == (
        pytest.approx(np.mean(values.numpy()), abs=1e-12),
        pytest.approx(np.std(values.double().numpy()), abs=1e-12),
        4,
    )
    stats.write(tmp_path)
    assert ScoreStats.read(tmp_path) == stats and ScoreStats.read(tmp_path / "no") is None
    normal = stats.apply(values).double()
    assert abs(normal.mean().item()) < 1e-6 and normal.std(correction=0).item() == pytest.approx(1)
    with pytest.raises(InputError):
        ScoreStats.of(torch.empty(0))


# --- merged ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"quantize": "nf4"}, {"dtype": "bfloat16"}], ids=str)
def test_a_merged_reward_adapter_is_a_folder_for_transformers_with_its_statistics(
    base, tmp_path, how
):
    policy = move(load(base, head="score", lora=LORA, **how))
    policy.score_stats = ScoreStats(0.5, 2.0, 7)
    policy.save_pretrained(tmp_path / "a")
    items, want = groups()[:2], scored(policy, groups()[:2])
    _, verdict = merge_policy(policy, items, tmp_path / "m")
    assert isinstance(verdict, ScoreVerdict) and verdict.kept and verdict.pairs == 2
    merged = load(tmp_path / "m", dtype=how.get("dtype", "auto"))
    assert merged.is_reward_model and merged.adapter is None
    assert merged.score_stats == ScoreStats(0.5, 2.0, 7)
    bound = 1e-4 if how.get("dtype") is None else 0.3
    assert (scored(merged, items) - want).abs().max() < bound
    again = load(tmp_path / "a", dtype=how.get("dtype", "auto"))
    assert torch.equal(merged.model.score.weight, again.model.score.copies["default"].weight)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    got = by_transformers(model, tokenizer, "right", items).float()
    assert (got - scored(merged, items)).abs().max() < max(bound, 1e-4)
    told = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    assert told["agreement"] == verdict.agreement and len(verdict.lines()) == 2


def test_a_merge_that_loses_the_scores_writes_nothing(base, tmp_path):
    trained = move(load(base, head="score", lora=LORA))
    other = load(base, seed=4, head="score", lora=LORA)  # another adapter in its place
    with pytest.raises(InputError, match=r"scores moved by .*spread by"):
        merge_policy(trained, groups()[:2], tmp_path / "m", original=other)
    assert not (tmp_path / "m").exists()
