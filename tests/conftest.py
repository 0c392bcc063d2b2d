"""What every test shares: no network, one torch thread, repeatable examples, the real data."""

import os

# Before anything imports torch or a Hugging Face library, and for the processes that tests start.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # workers run in parallel; and sums do not depend on the machine
    "MPLBACKEND": "agg",
}

import json
from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter; triton reads this when prefopt_kernels is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every run, so that a red test stays red; HYPOTHESIS_PROFILE=explore looks
# further. Nothing is timed: a slow machine is no failure.
hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "explore", hypothesis.settings.get_profile("fixed"), derandomize=False, max_examples=1000
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _from_shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(('../shared', *parts))}, which is not there")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the repository."""
    return _from_shared()


@pytest.fixture(scope="session")
def hh_path() -> Path:
    """1,500 real preference pairs (HH-RLHF, harmless-base), gzipped JSON lines."""
    return _from_shared("data", "hh_harmless.jsonl.gz")


@pytest.fixture(scope="session")
def stories_path() -> Path:
    """A real pretrained Llama of 260,032 parameters, a Hugging Face model folder."""
    return _from_shared("models", "stories260K")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers and its tokenizer, a Hugging Face model folder."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tiny") / "model"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    letters, specials = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator(["Please tell me about the thing. I will gladly help."], trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=bpe.get_vocab_size(), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.1, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_rows() -> list[dict[str, str]]:
    """Preference pairs on 24 prompts, with responses of different lengths."""
    return [
        {
            "prompt": f"Tell me about {thing} {number}.",
            "chosen": f"I will gladly help: {thing} {number} is a fine thing{', really' * number}.",
            "rejected": f"No. {thing}{'! No' * (3 - number)}",
        }
        for thing in ("cats", "dogs", "trees", "rain", "music", "bread")
        for number in range(4)
    ]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, tiny_rows: list[dict[str, str]]) -> Path:
    """The tiny preference pairs as a file of JSON lines."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows))
    return path
