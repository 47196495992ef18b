"""The tiny model's tokenizer: the demo's byte-level BPE where this is a checkout, else one trained on Python's text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from reapc.rehearse.shrink import Vocabulary

DEMO = Path(__file__).resolve().parents[2] / "demo" / "model"
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
PRE_TOKENIZER = "qwen2"  # llama.cpp knows tokenizers by hash, and cannot know this one
# Tokens that llama.cpp's converter asks a family's tokenizer for, by the beginning of model_type.
ASKED = {"glm": ("[gMASK]", "<sop>", "<|user|>", "<|observation|>")}
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SIZE = 2048
_LONGEST = 1_000_000
_ROWS = 64  # embeddings have a multiple of this many rows, as published ones have
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, model_type: str, demo: Path = DEMO) -> Vocabulary:
    """Writes tokenizer.json, its config and the chat template to ``folder``; what the model's config says of them."""
    if all((demo / name).is_file() for name in FILES):
        for name in FILES:
            shutil.copyfile(demo / name, folder / name)
    else:
        _train(folder)
    asked = next((tokens for prefix, tokens in ASKED.items() if model_type.startswith(prefix)), ())
    data = json.loads((folder / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    size = len({*data["model"]["vocab"], *added})
    for token in asked:
        data["added_tokens"].append({
            "id": size, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        })  # fmt: skip
        size += 1
    if asked:
        (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["model_max_length"] = _LONGEST  # else transformers warns of every document of the calibration text
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return Vocabulary(-(-size // _ROWS) * _ROWS, added[_SPECIAL[0]], added[_SPECIAL[2]], added[_SPECIAL[0]])


def _train(folder: Path) -> None:
    """A byte-level BPE of 2,048 tokens on the documentation that every Python carries; the same each time."""
    from pydoc_data import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZE, special_tokens=list(_SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(topics.topics.values(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": _SPECIAL[0], "eos_token": _SPECIAL[2], "pad_token": _SPECIAL[0], "clean_up_tokenization_spaces":
        False, "extra_special_tokens": [_SPECIAL[1]], "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
