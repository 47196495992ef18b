"""Runs llama.cpp's converter, with the name of the pre-tokenizer given instead of guessed from a hash.

A script, run with ``python -P`` so that this folder (it has a ``gguf.py``) is not on the import path:
``_convert_main.py CONVERTER PRE_TOKENIZER ARGUMENT...``; an empty PRE_TOKENIZER leaves the guess alone.
"""

import importlib
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Puts the converter's own packages first, patches the guess, and runs the converter as a program."""
    converter, pre_tokenizer, *arguments = sys.argv[1:]
    tree = Path(converter).parent
    sys.path[:0] = [str(tree), str(tree / "gguf-py")]
    if pre_tokenizer:
        text_model = importlib.import_module("conversion").TextModel
        text_model.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer
    sys.argv = [converter, *arguments]
    runpy.run_path(converter, run_name="__main__")


if __name__ == "__main__":
    main()
