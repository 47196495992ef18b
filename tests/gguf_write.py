"""GGUF files in BF16 by llama.cpp's own converter, many in one process (starting it takes longer than a tiny model).

``python gguf_write.py LLAMA_CPP_FOLDER FOLDER OUT [FOLDER OUT]...`` prints "ok" or an error for each, a line of JSON. A
folder with tokenizer.json has its vocabulary, as Qwen's; another none. A program of its own because the converter
brings its own ``gguf`` package.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Converts each folder to the file that follows it."""
    tree, *pairs = sys.argv[1:]
    sys.path[:0] = [tree, f"{tree}/gguf-py"]
    for folder, out in zip(pairs[::2], pairs[1::2], strict=True):
        try:
            convert(Path(folder), Path(out))
            print(json.dumps("ok"), flush=True)
        except Exception as error:
            print(json.dumps(f"{folder}: {type(error).__name__}: {error}"), flush=True)


def convert(folder: Path, out: Path) -> None:
    """Writes one file."""
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    model_class = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))
    model_class.no_mtp = (folder / "no_mtp").exists()
    model_class.get_vocab_base_pre = lambda *_: "qwen2"
    model_class.set_vocab = set_vocab
    model_class(folder, gguf.LlamaFileType.MOSTLY_BF16, out).write()


def set_vocab(model: Any) -> None:
    """The vocabulary, whatever class the family's own tokenizer has."""
    if (model.dir_model / "tokenizer.json").is_file():
        model._set_vocab_gpt2()
    else:
        model.gguf_writer.add_tokenizer_model("none")
        hparams = model.hparams.get("text_config", model.hparams)
        model.gguf_writer.add_vocab_size(hparams["vocab_size"])


if __name__ == "__main__":
    main()
