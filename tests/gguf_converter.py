"""What llama.cpp's own converter makes of checkpoints without data: tensors and metadata, as JSON lines.

``python gguf_converter.py LLAMA_CPP_FOLDER FOLDER...``: each folder holds a config.json, a sparse model.safetensors and
may hold ``no_mtp``. A program of its own because the converter brings its own ``gguf`` package.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    """Prints for each folder {"tensors": {name: [shape, type]}, "arch", "kv"} or {"error": text}."""
    tree, *folders = sys.argv[1:]
    sys.path[:0] = [tree, f"{tree}/gguf-py"]
    for folder in folders:
        try:
            found = convert(Path(folder))
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


def convert(folder: Path) -> dict[str, Any]:
    """Runs the converter up to the point where it would write."""
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    model_class = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))
    model_class.no_mtp = (folder / "no_mtp").exists()
    with tempfile.TemporaryDirectory() as scratch:
        model = model_class(folder, gguf.LlamaFileType.MOSTLY_BF16, Path(scratch) / "out.gguf")
        tensors: dict[str, Any] = {}

        def add_tensor(name: str, data: Any, raw_dtype: Any = None, **_: Any) -> None:
            shape = data.shape
            if str(data.dtype) == "uint8":
                shape = gguf.quant_shape_from_byte_shape(shape, raw_dtype)
            kind = raw_dtype.name if raw_dtype is not None else {"int32": "I32"}[str(data.dtype)]
            tensors[name] = [[int(size) for size in shape], kind]

        model.gguf_writer.add_tensor = add_tensor
        model.prepare_tensors()
        model.set_gguf_parameters()
        kv = {key.split(".", 1)[1]: value.value for key, value in model.gguf_writer.kv_data[0].items() if "." in key}
        wanted = ("block_count", "attention.head_count", "attention.head_count_kv", "expert_count")
        return {"tensors": tensors, "arch": model.gguf_writer.arch, "kv": {key: kv.get(key) for key in wanted}}


if __name__ == "__main__":
    main()
