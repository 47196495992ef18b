"""What llama.cpp itself says about its memory: ``llama-fit-params`` on header-only GGUF files of real models.

Nothing in the files is ours but names, shapes and types of the tensors (``test_gguf_oracle`` proves those, and the
loader checks the shapes): all metadata are what llama.cpp's converter makes of the catalogue's config.json. The
converter brings its own ``gguf`` package, so this file is also the program that runs it:
``python fit_params.py LLAMA_CPP_FOLDER FOLDER...``, each folder with a config.json and a tensors.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from reapc.arch.spec import ModelSpec

MIB = 2**20


class Allocation(NamedTuple):
    """MiB, rounded down by the tool."""

    model: int
    context: int
    compute: int


def measure(model: Path, context: int, slots: int, kv: str) -> Allocation:
    """What llama-server would allocate on the CPU: ``context`` tokens in each of ``slots`` slots, micro-batches of 512.

    AssertionError with the tool's words where it cannot load the model.
    """
    from reapc.toolchain import require

    tool = require("fit_params")
    command = [
        str(tool), "-m", str(model), "-c", str(context * slots), "-np", str(slots), "-ctk", kv, "-ctv", kv,
        "-fa", "on", "-b", "2048", "-ub", "512", "-nr", "-fitp", "on",
    ]  # fmt: skip
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tool.parent), "GGML_NO_BACKTRACE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("Host ")]
    assert len(rows) == 1, (done.stdout + done.stderr)[-2000:]
    return Allocation(*map(int, rows[0][1:]))


def published(name: str, spec: ModelSpec) -> dict[str, Any]:
    """The catalogue's config.json, with keys that the converter asks for and that trimmed copies lack.

    Where these are guessed (rope), they change no size.
    """
    from reapc.arch import known

    config = {key: value for key, value in known.config(name).items() if not key.startswith("_")}
    config.pop("quantization_config", None)
    match spec.family:
        case "minimax_m3":
            config["architectures"] = ["MiniMaxM3SparseForCausalLM"]
        case "mimo_v2_flash":
            config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.334}
        case "qwen3_vl_moe":
            rope = {"rope_type": "default", "mrope_section": [24, 20, 20]}
            config["text_config"] = {**config["text_config"], "rope_scaling": rope}
        case "step3p7":
            types = config["layer_types"] + ["full_attention"] * len(spec.mtp_layers)
            config |= {
                "model_type": "step3p5_published", "architectures": ["Step3p5ForCausalLM"],
                "num_attention_groups": spec.num_kv_heads, "moe_num_experts": spec.num_experts,
                "moe_top_k": spec.top_k,
                # 96 heads on sliding layers, as llama.cpp's loader wants them and as the published config says
                "attention_other_setting": {"num_attention_heads": 96, "num_attention_groups": spec.num_kv_heads},
                "partial_rotary_factors": [1.0 if kind == "sliding_attention" else 0.5 for kind in types],
            }  # fmt: skip
    return config


def write_models(root: Path, models: dict[str, tuple[ModelSpec, dict[str, Any], str]]) -> dict[str, Path]:
    """One sparse GGUF for each name: the spec's tensors in the given file type, the converter's metadata.

    One process for all. AssertionError with the converter's words where it fails.
    """
    from reapc.formats import gguf as formats
    from reapc.toolchain import require

    folders = {}
    for number, (name, (spec, config, ftype)) in enumerate(models.items()):
        folder = folders[name] = root / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        tensors = [(t.name, t.shape, t.type, t.data_bytes) for t in formats.tensor_types(spec, ftype, True)]
        about = {"vocabulary": spec.vocab_size, "tensors": tensors}
        (folder / "tensors.json").write_text(json.dumps(about))
    tree = str(require("convert").parent)
    command = [sys.executable, "-P", __file__, tree, *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: folder / "model.gguf" for name, folder in folders.items()}


def main() -> None:
    """The program: writes FOLDER/model.gguf for every folder."""
    tree, *folders = sys.argv[1:]
    sys.path[:0] = [tree, f"{tree}/gguf-py"]
    for folder in folders:
        try:
            _write(Path(folder))
        except Exception as error:  # one family must not hide the others: the test of this one finds no file
            (Path(folder) / "error.txt").write_text(f"{type(error).__name__}: {error}")


def _write(folder: Path) -> None:
    """Runs the converter for its metadata alone, and writes the header and a hole for the data."""
    import gguf
    import numpy as np
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    model_class = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))
    model_class.no_mtp = True
    model = model_class(folder, gguf.LlamaFileType.MOSTLY_BF16, folder / "unused.gguf")
    model.set_gguf_parameters()
    writer, about = model.gguf_writer, json.loads((folder / "tensors.json").read_text())
    writer.add_tokenizer_model("none")
    if gguf.Keys.LLM.VOCAB_SIZE.format(arch=writer.arch) not in writer.kv_data[0]:
        writer.add_vocab_size(about["vocabulary"])
    total = 0
    for name, shape, kind, size in about["tensors"]:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, gguf.GGMLQuantizationType[kind])
        total += size + -size % 32
    path = folder / "model.gguf"
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + -path.stat().st_size % 32 + total)


if __name__ == "__main__":
    main()
